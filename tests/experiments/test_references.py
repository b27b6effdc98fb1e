"""Measures of RefAny3D: perfect scenes reach their best, and each kind of mistake shows in its own measure."""
import pytest
import torch

from data import SEEDS
from experiments.references import background_names, measure_scenes
from toy.scenes import SCENES, scene_set
from toy.world import exaggerated, sample_assets, tokenize

NUM = 12


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    scenes = scene_set(NUM, SEEDS["evaluation"], folder=tmp_path_factory.mktemp("sets"))
    scenes = {name: value[::SCENES] for name, value in scenes.items()}
    assets = exaggerated(sample_assets(NUM, SEEDS["evaluation"]))
    return scenes, assets, measure_scenes(scenes["image"], scenes, assets)


def test_perfect_scenes(perfect):
    *_, best = perfect
    assert best["drawn"] == best["background"] == 1
    assert best["surface"] < 0.006                      # a map has 255 levels
    assert best["pose"] < 0.2 and best["outline"] > 0.8 and best["hue"] < 8 and best["tone"] > 0.4


def test_another_asset_is_found_out(perfect):
    scenes, assets, best = perfect
    other = measure_scenes(scenes["image"].roll(1, dims=0), scenes, assets)
    assert other["surface"] > 5 * best["surface"] and other["hue"] > 4 * best["hue"]
    assert other["tone"] < 0.5 * best["tone"] and other["background"] < 0.7


def test_a_map_beside_its_image(perfect):
    """Moved by six pixels: still a view of the surface, but not of this image."""
    scenes, assets, best = perfect
    moved = scenes["image"].clone()
    moved[:, 1] = torch.cat([torch.full_like(moved[:, 1, :, :, :6], 255), moved[:, 1, :, :, :-6]], dim=3)
    got = measure_scenes(moved, scenes, assets)
    assert got["outline"] < best["outline"] - 0.2 and got["surface"] == pytest.approx(best["surface"], abs=1e-3)
    assert got["pose"] < 0.3 and got["hue"] > 2 * best["hue"]


def test_a_map_that_no_camera_takes(perfect):
    scenes, assets, best = perfect
    mixed = scenes["image"].clone()
    on = mixed[:, 1].amin(dim=1) < 235
    for image, where in zip(mixed[:, 1], on):
        places = image[:, where]
        image[:, where] = places[:, torch.randperm(places.shape[1], generator=torch.Generator().manual_seed(0))]
    got = measure_scenes(mixed, scenes, assets)
    assert got["pose"] > 10 * best["pose"] and got["surface"] == pytest.approx(best["surface"], abs=1e-6)


def test_nothing_drawn_and_another_background(perfect):
    scenes, assets, _ = perfect
    empty = torch.full_like(scenes["image"], 255)
    assert measure_scenes(empty, scenes, assets) == dict(background=0, drawn=0)
    text = tokenize(["a mug, gray background", "a car, sunset background"])
    assert background_names(text) == ["gray", "sunset"]
