"""Measures of RefAny3D: perfect scenes reach their best, and each kind of mistake shows in its own measure."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, run_main

from data import SEEDS
from dit import PRESETS, save_model
from experiments import references
from experiments.references import PERFECT, background_names, evaluation_cases, matched_patches, measure_scenes
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
    assert measure_scenes(empty, scenes, assets) == dict(background=0, drawn=0, matches=0)
    text = tokenize(["a mug, gray background", "a car, sunset background"])
    assert background_names(text) == ["gray", "sunset"]


def test_patches_are_found_where_they_were_cut_out():
    """A reference moved by three pixels: every patch, but for those at the rim; in noise none."""
    torch.manual_seed(0)
    texture = torch.rand(3, 32, 32)
    shown = torch.zeros(32, 32, dtype=torch.bool)
    shown[8:20, 8:20] = True
    reference = (torch.stack([texture.roll((3, -2), (1, 2)), torch.ones(3, 32, 32)]) * 255).round()
    assert matched_patches(texture, shown, reference) == 144
    assert matched_patches(torch.rand(3, 32, 32), shown, reference) == 0
    assert matched_patches(texture, shown & False, reference) == 0


def test_cases_are_new_assets_and_known_ones_before_a_new_background(tmp_path):
    scenes, assets = evaluation_cases(9, tmp_path)
    assert len(scenes["text"]) == len(assets.category) == 9 and len(scenes["image"]) == 9
    assert torch.equal(scenes["labels"], torch.stack(assets[:3], dim=1))
    known = scene_set(4, SEEDS["synthetic"], folder=tmp_path)              # what is trained on
    assert torch.equal(scenes["labels"][5:], known["labels"][::SCENES])
    for k, name in enumerate(background_names(scenes["text"][5:])):
        assert name not in background_names(known["text"][SCENES * k:SCENES * (k + 1)])


def test_rows_are_trained_drawn_measured_and_not_made_again(tmp_path, monkeypatch, capsys):
    small = replace(TINY, image_size=32, depth=1)
    monkeypatch.setitem(PRESETS, "toy", small)
    save_model(str(tmp_path / "base.safetensors"), small, random_model(small))
    net = references.train_feature_net
    monkeypatch.setattr(references, "train_feature_net",
                        lambda *a, **options: net(*a, **options | dict(num=20, steps=4)))
    scenes = references.scene_set
    monkeypatch.setattr(references, "scene_set", lambda num, *a, **options: scenes(min(num, 6), *a, **options))
    flags = ["--num", 12, "--num_steps", 2, "--threads", 1, "--folder", tmp_path, "--results", tmp_path,
             "--train_flags=--num_assets 3 --steps 2 --batch 1 --picture_steps 2"]
    rows = ["--rows", "text only", "RefAny3D", "one reference, no point maps"]
    run_main(references, *flags, *rows)
    made = (tmp_path / "refany3d-RefAny3D.safetensors").read_bytes()
    run_main(references, *flags, "--seed", 1, "--rows", "text only")
    run_main(references, *flags, *rows)
    assert made == (tmp_path / "refany3d-RefAny3D.safetensors").read_bytes()
    stored = json.loads((tmp_path / "refany3d.json").read_text())
    assert set(stored) == {PERFECT, "text only", "RefAny3D", "one reference, no point maps"}
    assert set(stored["text only"]["toy"]) == {"0", "1"} and set(stored["RefAny3D"]["toy"]) == {"0"}
    assert "drawn" in stored["RefAny3D"]["toy"]["0"] and "drawn" not in stored["text only"]["toy"]["0"]
    assert (tmp_path / "refany3d_sheet.png").exists() and "+-" in (tmp_path / "refany3d.md").read_text()
