"""Scenes: an object's place, size, light and surroundings, and what its captions leave out."""
import pytest
import torch
import torch.nn.functional as F
from shapes import box

from data import SEEDS
from geometry.camera import EXTENT, camera
from support.pictures import to_pixels
from toy.render import Look, render
from toy.scenes import SCENES, SIDES, frames, mesh_references, scene_set, scene_world
from toy.trace import Cameras, trace
from toy.world import BACKGROUNDS, CATEGORIES, COLORS, MATERIALS, VOCAB, exaggerated, sample_assets, sphere


def test_a_framed_sphere_is_a_disc_at_its_place():
    """Closed form: radius r of the frame's size about its middle, in the image's units."""
    size, r = 64, 0.3
    x, y, scale = 0.25, -0.4, 0.5
    hits = trace(lambda p, a, b, c: (sphere(p, r), None), torch.zeros(1, 3),
                 Cameras(torch.tensor([30.]), torch.tensor([50.]), torch.tensor([[x, y, scale]])), size)
    s = (torch.arange(size) + 0.5) / size * 2 - 1
    distance = ((s - x) ** 2 + (-s[:, None] - y) ** 2).sqrt()               # (rows, columns)
    found = torch.zeros(size ** 2, dtype=torch.bool)
    found[hits.pixel] = True
    sure = (distance - scale * r / EXTENT).abs() > 0.01
    assert torch.equal(found.view(size, size)[sure], (distance < scale * r / EXTENT)[sure]) and found.sum() > 150
    right, up, forward = camera(30., 50.)
    row, column = hits.pixel // size, hits.pixel % size
    assert ((hits.point.T @ right) * scale / EXTENT + x - s[column]).abs().max() < 1e-4
    assert ((hits.point.T @ up) * scale / EXTENT + y + s[row]).abs().max() < 1e-4


def test_elevations_of_their_own_and_the_whole_frame_change_nothing():
    assets = sample_assets(6, 4)
    one = render(assets, Look("render"), (0, 130), elevation=35)
    each = render(assets, Look("render", frame=torch.tensor([[0., 0., 1.]]).expand(6, 3)), (0, 130),
                  elevation=torch.full((6,), 35.))
    assert all((a - b).abs().mean() < 1e-3 for a, b in zip(one, each))
    low = render(assets, Look("render"), (0, 130), elevation=torch.tensor([35., 35, 35, 0, 0, 0]))
    assert (low.rgb - one.rgb)[:3].abs().mean() < 1e-3 < (low.rgb - one.rgb)[3:].abs().mean()


def test_frames_leave_the_object_in_the_image():
    x, y, scale = frames(torch.rand(500, 3)).T
    assert scale.min() >= 0.5 and scale.max() <= 1 and 0.6 < scale.mean() < 0.9
    assert (x.abs() + scale).max() <= 1 + 1e-6 and (y.abs() + scale).max() <= 1 + 1e-6
    assert x.abs().max() > 0.3 and x.min() < 0 < x.max() and (x - y).abs().max() > 0.3


@pytest.mark.parametrize("unseen", [False, True])
def test_scenes_show_their_asset_and_name_only_its_category(tmp_path, unseen):
    got = scene_set(5, unseen=unseen, folder=tmp_path)
    assets, num = exaggerated(sample_assets(5, SEEDS["synthetic"])), 5 * SCENES
    assert got["image"].shape == (num, 2, 3, 32, 32) and got["references"].shape == (num, 2, 8, 3, 32, 32)
    words = [[VOCAB[k] for k in row if k > 1] for row in got["text"]]
    for k, (word, (category, *_)) in enumerate(zip(words, got["labels"])):
        assert word[:2] == ["a", CATEGORIES[category]] and word[3:] == ["background"] and len(word) == 4
        assert (word[2] == BACKGROUNDS[1 + k // SCENES % 7]) == unseen          # the one that is kept for later
    assert torch.equal(got["labels"], torch.stack(assets[:3], dim=1).repeat_interleave(SCENES, 0))
    sides = render(assets, Look("photo", seed=10 ** 6 * SEEDS["synthetic"]), SIDES)
    assert (to_pixels(got["references"][::SCENES, 0]) / 2 + .5 - sides.rgb).abs().max() < 0.003
    on = (got["image"][:, 1] != 255).any(dim=1)                                # (N, H, W), of the point map
    places = to_pixels(got["image"][:, 1]) / 2                                 # each is a place on the asset's surface
    assert on.flatten(1).sum(1).min() > 20 and not torch.equal(on[0], on[1])
    all_sides = to_pixels(got["references"][:, 1]) / 2
    for k in range(num):
        seen = all_sides[k].movedim(1, 0).flatten(1).T
        near = torch.cdist(places[k][:, on[k]].T, seen).min(dim=1).values
        assert near.median() < 0.05
    photo = got["image"][:, 0].float()
    corner = photo[:, :, 0, 0]
    same = [word[2] for word in words]
    assert all((corner[i] == corner[j]).all() for i in range(num) for j in range(i) if same[i] == same[j])


def test_a_mesh_of_ones_own_gives_what_a_scene_gives(tmp_path):
    """A box of the colours of its places: the point map is the picture."""
    trimesh = pytest.importorskip("trimesh", reason="meshes with colours are read by trimesh")
    solid = box(0.3, 0.4, 0.2)
    corners = solid.vertices.numpy() * 0.9 + 0.5
    trimesh.Trimesh(solid.vertices.numpy(), solid.faces.numpy(), vertex_colors=corners, process=False).export(
        tmp_path / "box.ply")
    got = mesh_references(str(tmp_path / "box.ply"))
    assert got.shape == (1, 2, 8, 3, 32, 32) and got.dtype == torch.uint8
    on = (got[0, 1] != 255).any(dim=1, keepdim=True).float()
    inside = (F.avg_pool2d(on, 3, 1, 1) > 0.99).expand(-1, 3, -1, -1)       # no pixel of the rim
    colors, places = (to_pixels(got[0]) / 2)[:, inside]
    scale = colors.abs().max() / places.abs().max()                         # the mesh is scaled to fit
    assert (colors - scale * places).abs().max() < 0.03 and len(colors) > 1000 and 0.7 < scale < 1.1


def test_a_scene_is_the_same_in_any_number_of_them(tmp_path):
    few, many = scene_set(2, folder=tmp_path), scene_set(5, folder=tmp_path)
    for name in few:
        assert (few[name].float() - many[name][:2 * SCENES].float()).abs().max() <= 1
    other = scene_set(2, unseen=True, folder=tmp_path)
    assert torch.equal(other["references"], few["references"]) and not torch.equal(other["image"], few["image"])


def test_the_world_of_scenes_shows_other_assets_and_names_two_in_five_in_full(tmp_path):
    got = scene_world(400, folder=tmp_path)
    assets = exaggerated(sample_assets(400, SEEDS["scenes"]))
    assert got["image"].shape == (400, 1, 3, 32, 32) and got["image"].dtype == torch.uint8
    texts = [[VOCAB[k] for k in row if k > 1] for row in got["text"].tolist()]
    assert all(CATEGORIES[k] in words and words[-1] == "background" for k, words in zip(assets.category, texts))
    full = [words for words in texts if len(words) > 4]                         # "a mug sunset background" has four
    assert 0.33 < len(full) / 400 < 0.47 and 0.35 < sum(words[0] == "photo" for words in full) / len(full) < 0.65
    for k, words in enumerate(texts):
        names_it = COLORS[assets.color[k]] in words[:-2] and MATERIALS[assets.material[k]] in words
        assert names_it == (len(words) > 4) and words[-2] in BACKGROUNDS[1:]
    photo = got["image"][:, 0].float()
    away = (photo - photo[:, :, :1, :1]).abs().amax(dim=1) > 60                 # roughly where the object stands
    rows = torch.tensor([mask.any(dim=1).nonzero().float().mean() for mask in away if mask.any()])
    assert rows.std() > 2                                                       # not all in the middle
