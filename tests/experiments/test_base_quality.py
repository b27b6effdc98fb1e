"""The base model's photographs beside perfect ones."""

import json

import pytest
import torch
from conftest import refuses, run_main

from data import SEEDS
from experiments import base_quality
from toy.render import Look, render
from toy.world import sample_assets, take


def test_image_quality_counts_what_the_judge_reads_right(quick_judges):
    """Against a count by hand; photographs of other objects are read wrong, and renders are further from photographs."""
    assets = sample_assets(24, SEEDS["evaluation"])
    photo, plain = (render(assets, Look(style), (0,), geometry=False).rgb[:, 0] for style in ("photo", "render"))
    row = base_quality.image_quality(photo, assets, quick_judges)
    with torch.no_grad():
        heads = quick_judges.net(photo)
    for name, labels in zip(("category", "color", "material"), assets):
        right = sum(int(logits.argmax()) == int(label) for logits, label in zip(heads[name], labels))
        assert row[name] == pytest.approx(right / 24)
    others = take(assets, torch.arange(24).roll(1))
    assert base_quality.image_quality(photo, others, quick_judges)["caption"] < row["caption"]
    assert base_quality.image_quality(plain, assets, quick_judges)["FD_I"] > row["FD_I"]


def test_base_quality_as_a_command(tmp_path, tiny_run, quick_judges, monkeypatch, capsys):
    monkeypatch.setattr(base_quality, "load_judges", lambda *args: quick_judges)
    flags = ("--base", tiny_run / "base.safetensors", "--num", 20, "--num_steps", 1, "--out", tmp_path / "b.png")
    run_main(base_quality, *flags)
    stored = json.loads((tmp_path / "b.json").read_text())
    assert stored["rows"]["perfect photos"]["KD_I"] < stored["rows"]["base model"]["KD_I"]
    assert len(stored["captions"]) == 20 and stored["captions"][0].endswith(", white background")
    assert (tmp_path / "b.png").exists() and "20 prompts" in capsys.readouterr().out
    refuses(base_quality, ("--num", 3), 2, "--num must be at least 20")
