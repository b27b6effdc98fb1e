"""The toy world: geometry against closed forms, captions, sets."""

import math
import re

import pytest
import torch

import data


@pytest.fixture(scope="module")
def world():
    assets = data.sample_assets(40, seed=7)
    return assets, data.render(assets, style="render"), data.render(assets, style="photo", geometry=False)


def grid(size):
    """Column and row coordinates of the pixel centres."""
    s = torch.arange(size) + 0.5
    return s.expand(size, size), s[:, None].expand(size, size)


def traced(distance, azimuth, elevation=data.ELEVATION, size=64):
    """Hit (S, S), points (3, S, S) and normals (3, S, S) of a bare distance function."""
    ray, p, normal, _ = data.trace(distance, torch.zeros(1, 3), torch.tensor([float(azimuth)]), size, elevation)
    hit, points, normals = torch.zeros(size**2, dtype=torch.bool), torch.zeros(3, size**2), torch.zeros(3, size**2)
    hit[ray], points[:, ray], normals[:, ray] = True, p, normal
    return hit.view(size, size), points.view(3, size, size), normals.view(3, size, size)


# ---- camera and tracer


def test_position_map_projects_back_onto_its_own_pixel_grid(world):
    _, views, _ = world
    column, row, _ = data.project(views.position, torch.tensor(data.AZIMUTHS))
    on = views.position.abs().sum(dim=2) > 0
    want = grid(32)
    assert on.sum() > 10000
    assert (column - want[0])[on].abs().max() < 1e-3 and (row - want[1])[on].abs().max() < 1e-3


def test_camera_axes_are_orthonormal_and_look_at_the_named_sides():
    axes = torch.stack(data.camera(torch.tensor([0.0, 37, 90, 180, 270]), 20), dim=1)  # (5, 3, 3)
    assert torch.allclose(axes @ axes.mT, torch.eye(3).expand(5, 3, 3), atol=1e-6)
    right, up, forward = data.camera(torch.tensor(data.AZIMUTHS), 0)
    front_right_back_left = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0]])
    assert torch.allclose(-forward, front_right_back_left, atol=1e-6)  # where the camera stands
    assert torch.allclose(right[0], torch.tensor([1.0, 0, 0])) and torch.allclose(up, torch.tensor([[0.0, 1, 0]] * 4))
    assert data.camera(0, 20)[2][1] < 0  # from above


@pytest.mark.parametrize("azimuth, elevation", [(0, 20), (90, 20), (217, 35), (0, 0)])
def test_sphere_against_closed_form(azimuth, elevation, radius=0.4, size=64):
    hit, points, normals = traced(lambda p, a, b, c: (data.sphere(p, radius), None), azimuth, elevation, size)
    column, row = grid(size)
    x, y = (column / size * 2 - 1) * data.EXTENT, (1 - row / size * 2) * data.EXTENT
    inside = x**2 + y**2 < radius**2
    sure = (x**2 + y**2 - radius**2).abs() > 1e-3
    assert torch.equal(hit[sure], inside[sure])
    right, up, forward = data.camera(azimuth, elevation)
    depth = -(radius**2 - x**2 - y**2).clamp(min=0).sqrt()
    want = right[:, None, None] * x + up[:, None, None] * y + forward[:, None, None] * depth
    deep = x**2 + y**2 < (0.95 * radius) ** 2
    assert (points - want)[:, deep].norm(dim=0).max() < 2e-3
    assert ((points / radius - normals)[:, deep].norm(dim=0)).max() < 5e-3


@pytest.mark.parametrize("azimuth, elevation", [(0, 20), (90, 20), (30, 20), (180, 0)])
def test_box_against_closed_form(azimuth, elevation, size=64):
    half = torch.tensor([0.3, 0.25, 0.2])
    hit, points, normals = traced(lambda p, a, b, c: (data.box(p, 0.3, 0.25, 0.2), None), azimuth, elevation, size)
    column, row = grid(size)
    x, y = (column / size * 2 - 1) * data.EXTENT, (1 - row / size * 2) * data.EXTENT
    right, up, forward = (axis.double()[:, None, None] for axis in data.camera(azimuth, elevation))
    origin, way = right * x + up * y, torch.where(forward.abs() < 1e-9, 1e-9, forward)

    def slabs(half):
        half = half.double()[:, None, None]
        enter, leave = (-half * way.sign() - origin) / way, (half * way.sign() - origin) / way
        return enter, enter.amax(dim=0), leave.amin(dim=0)

    enter, near, far = slabs(half)
    inner, outer = ((a < b) for _, a, b in (slabs(half - 2e-3), slabs(half + 2e-3)))  # a fifteenth of a pixel at 32
    sure = (inner == outer) & ((far - near).abs() > 2e-2)
    assert torch.equal(hit[sure], inner[sure]) and sure.float().mean() > 0.95
    assert 0.05 < (near < far).float().mean() < 0.6
    both = sure & hit
    assert (points - (origin + forward * near))[:, both].norm(dim=0).max() < 2e-3
    side = torch.nn.functional.one_hot(enter.argmax(dim=0), 3).movedim(2, 0) * -way.sign()
    top = enter.topk(2, dim=0).values
    face = both & (top[0] - top[1] > 2e-2)  # away from edges, where two faces meet
    assert face.sum() > 200 and (normals - side)[:, face].abs().max() < 1e-3


def test_normals_are_unit_and_face_the_camera(world):
    _, views, _ = world
    on = views.position.abs().sum(dim=2) > 0
    assert torch.allclose(views.normal.norm(dim=2)[on], torch.ones(on.sum()), atol=1e-5)
    assert views.normal.norm(dim=2)[~on].max() == 0
    forward = data.camera(torch.tensor(data.AZIMUTHS))[2][None, :, :, None, None]
    assert (views.normal * forward).sum(dim=2)[on].max() < 1e-3


def test_objects_fill_the_frame_and_stay_inside_it(world):
    _, views, _ = world
    border = torch.cat([views.mask[..., 0, :], views.mask[..., -1, :], views.mask[..., 0], views.mask[..., -1]])
    assert border.max() == 0 and views.position.abs().max() <= 0.5
    covered = views.mask.mean(dim=(1, 2, 3, 4))
    assert covered.min() > 0.08 and covered.mean() > 0.2


def test_mask_is_the_share_of_supersamples(world):
    assets, _, _ = world
    few = data.take(assets, slice(0, 3))
    fine = data.render(few, size=64, supersample=1, style="render").mask.flatten(0, 1)
    coarse = data.render(few, size=32, supersample=2, style="render").mask.flatten(0, 1)
    assert torch.equal(torch.nn.functional.avg_pool2d(fine, 2), coarse)
    assert set(coarse.unique().tolist()) == {0, 0.25, 0.5, 0.75, 1}


# ---- looks


def test_render_is_flat_and_photo_is_lit(world):
    _, render, photo = world
    whole = (render.mask == 1).squeeze(2)
    for k in range(len(whole)):
        pixels = render.rgb[k].movedim(1, 3)[whole[k]]
        plain = [len(pixels[:, c].mul(255).round().unique()) for c in range(3)]
        assert (pixels.var(dim=0) < 0.1).all() and max(plain) <= 12  # body, accent, and their mixtures
    spread = photo.rgb.movedim(2, 4)[whole].mul(255).round().unique(dim=0)
    assert len(spread) > 5000
    assert (render.rgb.movedim(2, 4)[(render.mask == 0).squeeze(2)] == 1).all()  # white background, both
    assert (photo.rgb.movedim(2, 4)[(render.mask == 0).squeeze(2)] == 1).all()


def test_light_comes_from_above_and_from_everywhere():
    light = data.sample_assets(500, 3).light
    assert torch.allclose(light.norm(dim=1), torch.ones(500), atol=1e-5)
    elevation = torch.rad2deg(light[:, 1].asin())
    assert elevation.min() > 34.9 and elevation.max() < 75.1
    quadrant = (light[:, 0] > 0).long() * 2 + (light[:, 2] > 0).long()
    assert quadrant.bincount(minlength=4).min() > 90


def test_a_photo_is_lit_from_the_side_of_its_light():
    assets = data.take(data.sample_assets(60, 0), torch.tensor([0]))
    assets = assets._replace(category=torch.tensor([data.CATEGORIES.index("ball")]), material=torch.tensor([0]))
    for x in (-1.0, 1.0):
        lit = assets._replace(light=torch.tensor([[x, 1.0, 0.0]]) / math.sqrt(2))
        front = data.render(lit, (0,), geometry=False).rgb[0, 0].mean(dim=0)
        left, right = front[12:20, 7:14].mean(), front[12:20, 18:25].mean()
        assert (right - left) * x > 0.02
    toward = -data.camera(0)[2][None]  # light from where we stand, and from behind
    ahead, behind = (data.render(assets._replace(light=s * toward), (0,), geometry=False).rgb[0, 0, 0] for s in (1, -1))
    gain = ahead / behind - 1
    assert gain[14:18, 14:18].mean() > 2 * gain[14:18, 8].mean() > 0.2  # by the cosine: less at the rim


def test_styles_and_backgrounds_differ(world):
    assets = data.take(world[0], slice(0, 4))
    pictures = [data.render(assets, (30,), style, geometry=False).rgb for style in data.STYLES]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a - b).abs().mean() > 0.01
    corner = data.render(assets, (0,), background=["white", "black", "sky", "gray"], geometry=False).rgb[:, 0, :, 0, 0]
    assert corner[0].min() == 1 and corner[1].max() < 0.1 and corner[2][0] < 0.4 and corner[3].std() < 1e-6


def test_unknown_words_and_wrong_shapes_are_refused(world):
    assets = data.take(world[0], slice(0, 2))
    with pytest.raises(ValueError, match="unknown style 'oil'.*photo"):
        data.render(assets, style="oil")
    with pytest.raises(ValueError, match="unknown background 'plaid'"):
        data.render(assets, background=["white", "plaid"])
    with pytest.raises(ValueError, match=r"azimuth has shape \(3, 1\)"):
        data.render(assets, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least one object"):
        data.sample_assets(0, 1)


# ---- determinism


def test_asset_k_depends_on_seed_and_k_alone():
    few, many, other = data.sample_assets(5, 3), data.sample_assets(50, 3), data.sample_assets(5, 4)
    assert all(torch.equal(a, b[:5]) for a, b in zip(few, many))
    assert not torch.equal(few.shape, other.shape)


def test_same_seed_same_pixels_whatever_the_batch():
    assets = data.sample_assets(12, 3)
    first, again = data.render(assets, seed=5), data.render(assets, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.rgb, data.render(assets, seed=6, geometry=False).rgb)  # the grain
    few = data.render(data.take(assets, slice(0, 5)), seed=5)
    assert all(((a[:5] - b).abs() < 2e-3).float().mean() > 0.9999 for a, b in zip(first, few))
    assert ((first.position[:5] - few.position).abs() < 1e-6).float().mean() > 0.9995  # a ray knows not of the others


# ---- captions and tokens


def test_caption_grammar():
    assert (
        data.caption("photo", "red", "wooden", "mug", "front", "white")
        == "photo of a red wooden mug, front view, white background"
    )
    assert data.caption(None, "red", "wooden", "mug") == "a red wooden mug"
    assets = data.sample_assets(20, 5)
    pattern = re.compile(r"(\w+) of a (\w+) (\w+) (\w+), (\w+) view, (\w+) background")
    for k, text in enumerate(data.asset_captions(assets, "render", ["back"] * 20, "white")):
        assert pattern.fullmatch(text).groups() == (
            "render",
            data.COLORS[assets.color[k]],
            data.MATERIALS[assets.material[k]],
            data.CATEGORIES[assets.category[k]],
            "back",
            "white",
        )


def test_tokens_read_back():
    assert len(set(data.VOCAB)) == len(data.VOCAB) and data.VOCAB[:2] == ("<pad>", "<end>")
    texts = ["Photo of a RED wooden mug, front view, white background", "a red wooden mug", ""]
    tokens = data.tokenize(texts)
    assert tokens.shape == (3, data.TEXT_LENGTH) and tokens.dtype == torch.int64
    back = [" ".join(data.VOCAB[i] for i in row if i) for row in tokens]
    assert back == ["photo of a red wooden mug front view white background <end>", "a red wooden mug <end>", "<end>"]
    every = [
        data.caption(s, c, m, k, v, b)
        for s, c, m, k, v, b in zip(
            data.STYLES * 4, data.COLORS * 3, data.MATERIALS * 4, data.CATEGORIES, data.VIEWS * 5, data.BACKGROUNDS * 3
        )
    ]
    data.tokenize(every)


def test_unknown_word_names_the_nearest():
    with pytest.raises(ValueError, match="unknown word 'woden'.*wooden"):
        data.tokenize(["a red woden mug"])
    with pytest.raises(ValueError, match="unknown word '<pad>'|unknown word 'zzz'"):
        data.tokenize(["zzz"])
    with pytest.raises(ValueError, match="20 words"):
        data.tokenize(["a " * 20])


def test_real_captions_draw_photos_and_train_on_the_assets_own_words():
    assets = data.sample_assets(3, 1)
    draw, train = data.real_captions(assets)
    name = data.asset_captions(assets)
    assert len(draw) == len(train) == 12
    assert draw[:4] == [f"photo of {name[0]}, {view} view, white background" for view in data.VIEWS]
    assert train[4:8] == [name[1]] * 4


# ---- sets


def test_evaluation_set_agrees_with_its_maps_captions_and_labels(tmp_path):
    got = data.evaluation_set(4, folder=tmp_path)
    assets = data.sample_assets(4, data.SEEDS["evaluation"])
    views = data.render(assets, style="render")
    on = got["normal"].norm(dim=2, keepdim=True) > 0.5
    maps = torch.cat([got["normal"], 2 * got["position"]], dim=2).half()
    assert torch.equal(got["control"], torch.where(on, maps, torch.ones_like(maps)))  # white, and not the empty control
    assert torch.equal(got["position"], views.position) and got["control"].abs().max() <= 1
    assert (got["control"][(got["mask"] == 0).expand_as(maps)] == 1).float().mean() > 0.999
    assert ((got["control"] == 1).all(dim=2)[got["mask"][:, :, 0] == 255]).float().mean() < 0.001
    assert torch.equal(got["mask"], (views.mask * 255).round().byte())
    assert (got["image"] - views.rgb * 255).abs().max() < 0.51
    want = [f"a {data.COLORS[c]} {data.MATERIALS[m]} {data.CATEGORIES[k]}" for k, c, m in got["labels"]]
    assert torch.equal(got["text"], data.tokenize(want))
    assert (got["photo"].float() - got["image"].float()).abs().mean() > 3
    synthetic = data.synthetic_set(4, data.SEEDS["evaluation"], folder=tmp_path)
    assert all(torch.equal(synthetic[name], got[name]) for name in ("image", "control", "text"))


def test_base_set_is_the_wide_world(tmp_path):
    got = data.base_set(300, folder=tmp_path)
    texts = [" ".join(data.VOCAB[i] for i in row if i > 1) for row in got["text"]]
    assert got["image"].shape == (300, 1, 3, 32, 32) and got["image"].dtype == torch.uint8
    share = lambda pattern: sum(bool(re.search(pattern, text)) for text in texts) / 300
    assert 0.4 < share("^photo") < 0.65 and 0.05 < share("^a ") < 0.25 and 0.08 < share("^render") < 0.25
    assert 0.1 < share("^(cartoon|sketch|watercolor)") < 0.3 and 0.4 < share(" view") < 0.6
    assert 0.45 < share("white background") < 0.75
    corner = got["image"][:, 0, :, 0, 0].float().mean(dim=1)
    for text, value in zip(texts, corner):
        assert "white background" not in text or value == 255
        assert "black background" not in text or value < 40


def test_photo_set(tmp_path):
    got = data.photo_set(6, folder=tmp_path)
    assert got["image"].shape == (6, 1, 3, 32, 32) and got["labels"].shape == (6, 3)
    text = " ".join(data.VOCAB[i] for i in got["text"][0] if i > 1)
    category, color, material = (int(i) for i in got["labels"][0])
    assert re.fullmatch(
        f"photo of a {data.COLORS[color]} {data.MATERIALS[material]} {data.CATEGORIES[category]} "
        r"(front|right|back|left) view white background",
        text,
    )


def test_a_chunk_does_not_change_the_set(tmp_path, monkeypatch):
    whole = data.base_set(12, folder=tmp_path / "a")
    chunks = data.in_chunks
    monkeypatch.setattr(data, "in_chunks", lambda num, name, draw: chunks(num, name, draw, chunk=5))
    parts = data.base_set(12, folder=tmp_path / "b")
    assert torch.equal(whole["text"], parts["text"])
    assert ((whole["image"].int() - parts["image"].int()).abs() <= 1).float().mean() > 0.9999


def test_cached_sets_are_read_rebuilt_and_repaired(tmp_path, capsys):
    made = []

    def build():
        made.append(1)
        return {"x": torch.arange(1000)}

    path = tmp_path / "deep" / "set.safetensors"
    for _ in range(2):
        assert torch.equal(data.cached(path, {"num": 1}, build)["x"], torch.arange(1000))
    assert len(made) == 1  # the second call read the file
    data.cached(path, {"num": 2}, build)
    assert len(made) == 2  # another key
    path.write_bytes(path.read_bytes()[:500])
    assert torch.equal(data.cached(path, {"num": 2}, build)["x"], torch.arange(1000))
    assert len(made) == 3 and "damaged" in capsys.readouterr().out
    data.cached(path, {"num": 2}, build)
    assert len(made) == 3 and [p.name for p in path.parent.iterdir()] == ["set.safetensors"]  # nothing left over


def test_world_version_is_part_of_the_key(tmp_path, monkeypatch):
    data.cached(tmp_path / "s", {"num": 1}, lambda: {"x": torch.zeros(1)})
    monkeypatch.setattr(data, "WORLD_VERSION", data.WORLD_VERSION + 1)
    assert data.cached(tmp_path / "s", {"num": 1}, lambda: {"x": torch.ones(1)})["x"] == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file"):
        data.cached(tmp_path / "file" / "set.safetensors", {}, lambda: {"x": torch.zeros(1)})


def test_uint8_and_pixels_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = data.to_pixels(levels)
    assert pixels.min() == -1 and pixels.max() == 1 and torch.equal(data.to_uint8(pixels), levels)
    assert torch.equal(data.to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))
