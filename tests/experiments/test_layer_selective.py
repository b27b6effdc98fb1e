"""Layer-selective training (A.2): its plans, that each half of the blocks moves alone, the experiment as a command."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ALONE, NULL, TINY, random_model, refuses, run_main, tiny_sets

import data
import train_stage2
from dit import PRESETS, save_model
from domain_shifter import ShiftedDiT
from experiments import layer_selective
from experiments.layer_selective import selective_plan
from training.batches import draw_noise
from training.flags import fill_defaults
from training.loop import train


def test_selective_plans_alternate_and_split_the_timesteps():
    layers, times, renders = (
        [selective_plan(variant, 5)(step) for step in range(4)] for variant in ("layers", "timesteps", "renders")
    )
    assert [it.domain for it in layers] == [it.domain for it in times] == ["syn", "real"] * 2
    assert [it.domain for it in renders] == ["syn"] * 4 and [it.visit for it in renders] == [0, 1, 2, 3]
    assert [(it.frozen_blocks, it.frozen_last_blocks) for it in layers[:2]] == [(0, 3), (2, 0)]
    assert all((it.views, it.control) == (1, False) for it in (*layers, *times, *renders))
    for iteration, low, high in ((times[0], 500, 1000), (times[1], 0, 500)):
        t, _, _ = draw_noise((1,), 0, 3, 0, 3000, "cpu", iteration.timesteps)
        assert low <= t.min() < low + 5 and high - 5 <= t.max() < high


@pytest.mark.parametrize("step, moved", [(0, (0, 1)), (1, (2, 3))])
def test_layer_selective_training_moves_exactly_one_half(tmp_path, step, moved):
    """Step 0 is synthetic and trains the first half of the blocks, step 1 is real and trains the second."""
    flags = ["--out", str(tmp_path), "--steps", "1", "--batch", "1"]
    args = fill_defaults(layer_selective.parse_args(flags), "selective", ALONE)
    network = ShiftedDiT(random_model().requires_grad_(False))
    network.dit.blocks.requires_grad_(True)
    before = {name: p.clone() for name, p in network.dit.named_parameters()}
    one = tiny_sets()["real"]
    train(network, {"syn": one, "real": one}, NULL, lambda _: selective_plan("layers", 4)(step), args, ALONE)
    changed = {name for name, p in network.dit.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith(tuple(f"blocks.{k}." for k in moved))}


def test_layer_selective_experiment_as_a_command(tmp_path, monkeypatch, capsys):
    """Two seeds of every variant at a tiny size, measured and drawn; the base model is not trained."""
    config = replace(TINY, image_size=32)
    monkeypatch.setitem(PRESETS, "toy", config)
    save_model(str(tmp_path / "base.safetensors"), config, random_model(config))
    before = (tmp_path / "base.safetensors").read_bytes()
    net, photos = layer_selective.train_feature_net, data.photo_set
    monkeypatch.setattr(layer_selective, "train_feature_net",
                        lambda *a, **options: net(*a, **options | dict(num=20, steps=4)))
    monkeypatch.setattr(data, "photo_set", lambda num, **options: photos(20, **options))
    flags = "--seeds 2 --steps 2 --batch 1 --num_assets 4 --num_prompts 3 --picture_steps 2 --threads 1"
    run_main(train_stage2, "--layer_selective", *flags.split(), "--out", tmp_path)
    rows = json.loads((tmp_path / "layer_selective.json").read_text())["rows"]
    assert list(rows) == ["base", "renders", "layers", "timesteps"] and all(len(row) == 2 for row in rows.values())
    assert rows["layers"][0]["FD"] != rows["base"][0]["FD"] and (tmp_path / "layer_selective.png").exists()
    assert sorted(path.name for path in tmp_path.glob("selective_*")) == sorted(
        f"selective_{variant}_{seed}" for variant in ("renders", "layers", "timesteps") for seed in (0, 1)
    )
    assert "+-" in capsys.readouterr().out and (tmp_path / "base.safetensors").read_bytes() == before
    refuses(layer_selective, ("--seeds", 0), 2, "--seeds: 0 does not lie in [1, 1000]")


@pytest.mark.parametrize("ending", [".png", ".json"])
def test_a_folder_in_the_way_is_found_before_any_work(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_selective, "layer_selective", None)
    (tmp_path / f"layer_selective{ending}").mkdir()
    refuses(layer_selective, ("--out", tmp_path, "--threads", 1), 2, f"layer_selective{ending}")
