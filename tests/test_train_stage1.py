"""Stage 1: which iterations come, what trains, what it leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, refuses, run_main

import train_stage1
from baselines.adapters import load_adapter
from data import set_shape
from dit import load_model
from domain_shifter import load_shifters
from support.files import load_tensors, read_metadata
from train_stage1 import stage1_file, stage1_plan


SHORT = ("--num_assets", 4, "--steps", 4, "--batch", 1, "--lr", 0.01, "--warmup", 1, "--log_every", 1,
         "--picture_steps", 1)
FLAGS = (*SHORT, "--real_steps", 2)


def test_single_images_of_each_domain_in_turn():
    plan = stage1_plan(["syn", "real"])
    steps = [plan(step) for step in range(6)]
    assert [it.domain for it in steps] == ["syn", "real"] * 3 and [it.visit for it in steps] == [0, 0, 1, 1, 2, 2]
    assert all((it.views, it.control, it.frozen_blocks, it.reassigned_blocks) == (1, False, 0, 0) for it in steps)
    assert [(it.domain, it.visit) for it in map(stage1_plan(["syn"]), range(3))] == [("syn", 0), ("syn", 1), ("syn", 2)]


def test_stage_1_trains_the_shifters_alone_on_single_images_of_both_domains(tiny_toy, capsys):
    out, seen = tiny_toy
    before = (out / "base.safetensors").read_bytes()
    run_main(train_stage1, "--out", out, *FLAGS)
    assert {name.partition(".")[0] for name in seen["stage1"]["learns"]} == {"shifters"}
    sets = seen["stage1"]["sets"]
    assert {name: set_shape(dataset) for name, dataset in sets.items()} == {"syn": (16, 1), "real": (16, 1)}
    assert not any("control" in dataset for dataset in sets.values())
    assert "trains 1,152 of" in capsys.readouterr().out  # 4 blocks of 2 d + 2 r d
    shifters = load_shifters(str(out / "shifters.safetensors"), config=TINY)
    assert (shifters.W_left.flatten(1).abs().amax(dim=1) > 0).all() and shifters.rank == 8
    tensors, metadata = load_tensors(str(out / "shifters.safetensors"))
    assert all(name.startswith("shifters.") and tensor.dtype == torch.float16 for name, tensor in tensors.items())
    flags = " ".join(str(flag) for flag in ("--out", out, *FLAGS))
    assert metadata["command"] == f"python train_stage1.py {flags}" and metadata["settings"]["steps"] == 4
    log = [json.loads(line) for line in open(out / "stage1" / "log.jsonl")]
    assert [line["domain"] for line in log] == ["syn", "real"] * 2 and metadata["loss"] == {"real": log[3]["loss"]}
    assert (out / "stage1.png").exists()
    assert (out / "base.safetensors").read_bytes() == before


@pytest.mark.parametrize("adapter, domains", [("lora", ["syn"]), ("linear", ["syn"]), ("switcher", ["syn", "real"])])
def test_a_baselines_adapter_is_fitted_in_the_same_way(tiny_toy, adapter, domains):
    out, seen = tiny_toy
    flags = (*SHORT, *("--real_steps", 2) * ("real" in domains), *("--rank", 2) * (adapter != "switcher"))
    run_main(train_stage1, "--out", out, "--adapter", adapter, *flags)
    name = "switcher_8" if adapter == "switcher" else f"{adapter}_2"
    trained = seen[f"stage1_{name}"]
    assert {name.partition(".")[0] for name in trained["learns"]} == {"adapter"} and list(trained["sets"]) == domains
    path = f"{out}/{name}.safetensors"
    found = load_adapter(path, config=TINY)
    learnt = [p.abs().max() > 0 for name, p in found.named_parameters() if not name.endswith("W_right")]
    assert found.kind == adapter and all(learnt)
    assert read_metadata(path)["settings"]["adapter"] == adapter
    assert (out / "sets" / "real_4.safetensors").exists() == (domains == ["syn", "real"])


def test_where_stage_1_leaves_what_it_trained():
    for adapter, rank, name in (("shifters", 8, "shifters"), ("shifters", 4, "shifters_4"), ("lora", 5, "lora_5")):
        assert stage1_file(SimpleNamespace(out="a", adapter=adapter, rank=rank)) == f"a/{name}.safetensors"


def test_stage_1_needs_a_base_model_of_its_preset(tiny_toy):
    out, _ = tiny_toy
    assert load_model(str(out / "base.safetensors")).config == TINY
    flags = ("--preset", "small", "--base", out / "base.safetensors", "--out", out)
    refuses(train_stage1, flags, 1, "base.safetensors", "another configuration", "image_size 8 (expected 64)")
    refuses(train_stage1, ("--base", "nowhere.safetensors"), 1, "no such file: nowhere.safetensors (--base)")
    refuses(train_stage1, ("--preset", "full"), 1, "--base")
