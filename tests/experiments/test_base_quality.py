"""The base model's photographs beside perfect ones."""

import json

import pytest
import torch
from conftest import refuses, run_main

from data import SEEDS
from experiments import base_quality
from toy.render import Look, render
from toy.world import sample_assets, take


def test_photographs_of_other_objects_are_read_wrong_and_renders_are_far_from_photographs(shipped_judges):
    assets = sample_assets(24, SEEDS["evaluation"])
    photo, plain = (render(assets, Look(style), (0,), geometry=False).rgb[:, 0] for style in ("photo", "render"))
    row = base_quality.image_quality(photo, assets, shipped_judges)
    others = take(assets, torch.arange(24).roll(1))
    assert base_quality.image_quality(photo, others, shipped_judges)["caption"] < row["caption"]
    assert base_quality.image_quality(plain, assets, shipped_judges)["FD_I"] > row["FD_I"]


def test_base_quality_as_a_command(tmp_path, tiny_run, shipped_judges, monkeypatch, capsys):
    monkeypatch.setattr(base_quality, "load_judges", lambda *args: shipped_judges)
    flags = ("--base", tiny_run / "base.safetensors", "--num", 20, "--num_steps", 1, "--out", tmp_path / "b.png")
    run_main(base_quality, *flags)
    stored = json.loads((tmp_path / "b.json").read_text())
    assert stored["rows"]["perfect photos"]["KD_I"] < stored["rows"]["base model"]["KD_I"]
    assert len(stored["captions"]) == 20 and stored["captions"][0].endswith(", white background")
    assert (tmp_path / "b.png").exists() and "20 prompts" in capsys.readouterr().out
    refuses(base_quality, ("--num", 3), 2, "--num must be at least 20")


@pytest.mark.parametrize("out, in_the_way", [("b.png", "b.json"), ("b", "b.json"), ("e3", "e3.png")])
def test_a_folder_in_the_way_is_found_before_any_work(out, in_the_way, tmp_path, monkeypatch):
    monkeypatch.setattr(base_quality, "launch", None)
    (tmp_path / in_the_way).mkdir()
    refuses(base_quality, ("--out", tmp_path / out), 2, f"--out '{tmp_path}/{in_the_way}'")
