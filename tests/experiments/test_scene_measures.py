"""Measures of RefAny3D: perfect scenes reach their best, and each kind of mistake shows in its own measure."""
import pytest
import torch

from data import SEEDS
from experiments.scene_measures import (asset_colors, background_names, framed, matched_patches, measure_scenes,
                                        find_objects, silhouettes)
from toy.render import Look, render
from toy.scenes import SCENES, scene_set
from toy.world import CATEGORIES, SHAPES, exaggerated, sample_assets, take, tokenize

NUM = 12


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    scenes = scene_set(NUM, SEEDS["evaluation"], folder=tmp_path_factory.mktemp("sets"))
    scenes = {name: value[::SCENES] for name, value in scenes.items()}
    assets = exaggerated(sample_assets(NUM, SEEDS["evaluation"]))
    sides = silhouettes(assets)

    def measured(drawn):
        return measure_scenes(drawn, scenes, assets, sides)
    return scenes, assets, measured(scenes["image"]), measured


def test_perfect_scenes(perfect):
    _, _, best, _ = perfect
    assert best["drawn"] == best["background"] == 1
    assert best["surface"] < 0.006 and best["pose"] < 0.006                     # a map has 255 levels
    assert best["outline"] > 0.8 and best["shape"] > 0.8 and best["hue"] < 4 and best["tone"] > 0.5


def test_another_asset_is_found_out(perfect):
    scenes, _, best, measured = perfect
    other = measured(scenes["image"].roll(1, dims=0))
    assert other["surface"] > 5 * best["surface"] and other["hue"] > 4 * best["hue"]
    assert other["tone"] < 0.5 * best["tone"] and other["background"] < 0.7
    assert other["shape"] < best["shape"] - 0.15 and other["matches"] < 0.5 * best["matches"]


def test_a_map_beside_its_image(perfect):
    """Moved by six pixels: still a view of the surface, but not of this image."""
    scenes, _, best, measured = perfect
    moved = scenes["image"].clone()
    moved[:, 1] = torch.cat([torch.full_like(moved[:, 1, :, :, :6], 255), moved[:, 1, :, :, :-6]], dim=3)
    got = measured(moved)
    assert got["outline"] < best["outline"] - 0.2 and got["surface"] == pytest.approx(best["surface"], abs=1e-3)
    assert got["pose"] == pytest.approx(best["pose"], abs=2e-3) and got["hue"] > 2 * best["hue"]


def test_a_mirrored_asset_and_a_squeezed_one(perfect):
    """Image and map alike: both are on the surface and fit each other, but no camera takes them."""
    scenes, _, best, measured = perfect
    narrow = scenes["image"][..., :1].repeat(1, 1, 1, 1, 32)
    narrow[..., 8:24] = scenes["image"][..., ::2]
    for image in (scenes["image"].flip(-1), narrow):
        got = measured(image)
        assert got["pose"] > 10 * best["pose"] and got["surface"] == pytest.approx(best["surface"], abs=1e-3)
    assert got["shape"] < best["shape"] - 0.15                                  # from no side it is so narrow


def test_a_map_that_no_camera_takes(perfect):
    scenes, _, best, measured = perfect
    mixed = scenes["image"].clone()
    on = mixed[:, 1].amin(dim=1) < 235
    for image, where in zip(mixed[:, 1], on):
        places = image[:, where]
        image[:, where] = places[:, torch.randperm(places.shape[1], generator=torch.Generator().manual_seed(0))]
    got = measured(mixed)
    assert 0.3 < got["pose"] < 0.7 and got["surface"] == pytest.approx(best["surface"], abs=1e-6)


def test_nothing_drawn_and_another_background(perfect):
    scenes, _, _, measured = perfect
    empty = torch.full_like(scenes["image"], 255)
    assert measured(empty) == dict(background=0, drawn=0, matches=0, shape=0)
    alone = measured(scenes["image"][:, :1])                                    # without a map
    assert set(alone) == {"background", "matches", "shape"} and alone["shape"] > 0.8
    text = tokenize(["a mug, gray background", "a car, sunset background"])
    assert background_names(text) == ["gray", "sunset"]


def test_a_map_of_one_place_finds_no_pattern(perfect):
    scenes, _, best, measured = perfect
    flat = scenes["image"].clone()
    for image, where in zip(flat[:, 1], flat[:, 1].amin(dim=1) < 235):
        image[:, where] = image[:, where][:, :1]
    got = measured(flat)
    assert got["tone"] == 0 and 0.3 < got["pose"] < 0.7


def test_accents_have_their_own_color(perfect):
    """A table's legs are darker or lighter than its top: the truth is so too."""
    scenes, assets, *_ = perfect
    k = next(k for k, name in enumerate(assets.category) if CATEGORIES[int(name)] in ("table", "stool", "chair", "mug"))
    views = render(take(assets, torch.tensor([k])), Look("cartoon", supersample=1), [0], 64)
    hits = views.normal[0, 0].abs().amax(dim=0) > 0
    point, drawn = views.position[0, 0][:, hits], views.rgb[0, 0][:, hits]
    distance, abc = SHAPES[CATEGORIES[int(assets.category[k])]], assets.shape[k][:, None].expand_as(point)
    body, accent = distance(point.unbind(), *abc.unbind())
    apart = [brightness[accent < body].median() - brightness[accent >= body].median()
             for brightness in (asset_colors(point, assets, k).mean(dim=0), drawn.mean(dim=0))]
    assert min(map(abs, apart)) > 0.05 and apart[0] * apart[1] > 0


def test_objects_show_before_a_background_that_is_a_little_off(perfect):
    """In the middle of their image; the background may be darker, and its name is still read."""
    scenes, *_ = perfect
    images = scenes["image"][:, 0] / 255
    shown, behind = find_objects(images)
    darker, named = find_objects((images - 0.04).clamp(min=0))
    assert torch.equal(behind, named) and (shown == darker).float().mean() > 0.99
    truly = scenes["image"][:, 1].amin(dim=1) < 235
    assert (shown & truly).sum() > 0.85 * (shown | truly).sum()


def test_a_silhouette_is_framed_wherever_and_however_large_it_is():
    bar = torch.zeros(32, 32, dtype=torch.bool)
    bar[4:12, 20:24] = True                                                     # twice as high as wide
    larger = torch.zeros(32, 32, dtype=torch.bool)
    larger[5:29, 3:15] = larger[0, 31] = True                                   # and one pixel somewhere
    want = torch.zeros(24, 24, dtype=torch.bool)
    want[:, 6:18] = True
    assert torch.equal(framed(bar), want) and torch.equal(framed(larger), want)
    assert not framed(bar & False).any()


def test_patches_are_found_where_they_were_cut_out():
    """A reference moved by three pixels: every patch that lies on it as a whole; in noise none."""
    torch.manual_seed(0)
    texture = torch.rand(3, 32, 32)
    shown = torch.zeros(32, 32, dtype=torch.bool)
    shown[8:20, 8:20] = True
    reference = (torch.stack([texture.roll((3, -2), (1, 2)), torch.ones(3, 32, 32)]) * 255).round()
    assert matched_patches(texture, shown, reference) == 64
    assert matched_patches(torch.rand(3, 32, 32), shown, reference) == 0
    assert matched_patches(texture, shown & False, reference) == 0
