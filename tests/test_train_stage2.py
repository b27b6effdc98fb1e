"""Stage 2: which iterations come, what trains for each method, what it starts from and leaves."""

import json
from collections import Counter

import pytest
import torch
from conftest import ALONE, TINY, refuses, run_main

import train_stage1
import train_stage2
import training.estimate
from baselines.adapters import load_adapter
from baselines.methods import METHODS
from data import set_shape
from dit import load_model
from domain_shifter import load_shifters
from sample import load_network
from support.files import read_metadata
from train_stage2 import parse_args, stage1_flags, stage2_plan
from training.flags import fill_defaults

# ---------------------------------------------------------------------------------------------------------------------
# The plan


def test_stage2_alternates_after_a_real_warm_up():
    args = parse_args(["--real_warmup", "3"])
    plan = stage2_plan(args, 10)
    steps = [plan(step) for step in range(2000)]
    assert [it.domain for it in steps[:8]] == ["real", "real", "real", "syn", "real", "syn", "real", "syn"]
    for domain in ("syn", "real"):
        assert [it.visit for it in steps if it.domain == domain] == list(
            range(sum(it.domain == domain for it in steps))
        )
    assert all(it.frozen_blocks == it.reassigned_blocks == 0 for it in steps if it.domain == "syn")
    frozen = Counter(it.frozen_blocks for it in steps if it.domain == "real")
    assert sorted(frozen) == [0, 1, 2, 3, 4]
    reassigned = Counter(it.reassigned_blocks for it in steps if it.domain == "real")
    assert 0.05 < 1 - reassigned[0] / sum(reassigned.values()) < 0.12  # p_B (4 of 5 draws of j are not 0)
    assert plan(77) == stage2_plan(args, 10)(77)


@pytest.mark.parametrize("task, control", [("texturing", True), ("text", False)])
def test_grids_see_their_task_s_control_and_real_images_are_single_and_see_none(task, control):
    steps = [stage2_plan(parse_args(["--task", task]), 10)(step) for step in range(60)]
    kinds = {(it.domain, it.views, it.grid, it.control) for it in steps}
    assert kinds == {("syn", 4, 0, control), ("real", 1, 4, False)}  # Sec. 4.2: "a grid of arbitrary real images"
    assert all((it.frozen_last_blocks, it.timesteps) == (0, (0, 1000, 1)) for it in steps)


@pytest.mark.parametrize("flag", ["--no_freezing", "--no_reassignment", "--no_real_data"])
def test_each_ingredient_can_be_switched_off(flag):
    steps = [stage2_plan(parse_args([flag]), 10)(step) for step in range(400)]
    assert any(it.frozen_blocks for it in steps) == (flag == "--no_reassignment")
    assert any(it.reassigned_blocks for it in steps) == (flag == "--no_freezing")
    assert any(it.domain == "real" for it in steps) == (flag != "--no_real_data")
    whole = [stage2_plan(parse_args([]), 10)(step) for step in range(400)]
    for name, off in (("frozen_blocks", "--no_freezing"), ("reassigned_blocks", "--no_reassignment")):
        same = [getattr(it, name) for it in steps] == [getattr(it, name) for it in whole]
        assert same == (flag not in (off, "--no_real_data"))  # one draws what it would draw beside the other


def test_baselines_neither_freeze_nor_reassign():
    for method in METHODS:
        args = parse_args(["--method", method])
        steps = [stage2_plan(args, 10)(step) for step in range(100)]
        assert any(it.frozen_blocks for it in steps) == (method == "realiz3d")
        assert any(it.reassigned_blocks for it in steps) == (method == "realiz3d")
        assert any(it.domain == "real" for it in steps) == METHODS[method].real_data


# ---------------------------------------------------------------------------------------------------------------------
# What trains

SHORT = ("--num_assets", 4, "--steps", 4, "--batch", 1, "--lr", 0.02, "--warmup", 0, "--log_every", 1,
         "--picture_steps", 1)
REAL, STAGE1 = ("--real_steps", 2, "--real_warmup", 1), ("--stage1_steps", 4)       # where they are read
FLAGS = (*SHORT, *REAL, *STAGE1)
NEW = ("control_embedder.weight", "view_encoding")


def parts(names):
    """Which of "dit", "shifters" and "adapter" these parameters are of."""
    return {name.partition(".")[0] for name in names}


def test_realiz3d_trains_the_backbone_around_shifters_that_stage_1_left(tiny_toy, capsys):
    out, seen = tiny_toy
    run_main(train_stage2, "--out", out, *FLAGS)
    printed = capsys.readouterr().out
    assert "to do: " in printed and f"{out}/shifters.safetensors is missing: stage 1 comes first" in printed
    assert list(seen) == ["stage1", "realiz3d_texturing"]
    trained = seen["realiz3d_texturing"]
    backbone = {f"dit.{name}" for name, _ in load_model(str(out / "base.safetensors")).named_parameters()}
    assert trained["learns"] == backbone
    assert {name: set_shape(dataset) for name, dataset in trained["sets"].items()} == {"syn": (4, 4), "real": (16, 1)}
    path = str(out / "realiz3d_texturing.safetensors")
    model, shifters = load_model(path, config=TINY), load_shifters(path)
    stage1 = load_shifters(str(out / "shifters.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(shifters.parameters(), stage1.parameters()))
    assert stage1.W_left.abs().max() > 0
    for (name, p), before in zip(model.named_parameters(), load_model(str(out / "base.safetensors")).parameters()):
        assert (p - before).abs().max() > 1e-4, name
    metadata, flags = read_metadata(path), " ".join(str(flag) for flag in ("--out", out, *FLAGS))
    assert metadata["command"] == f"python train_stage2.py {flags}" and metadata["name"] == "realiz3d_texturing"
    assert metadata["settings"]["task"] == "texturing" and metadata["loss"]["syn"] > 0  # of the last tenth of the steps
    # another training takes what stage 1 left
    run_main(train_stage2, "--out", out, "--no_freezing", *FLAGS)
    assert f"stage 1: {out}/shifters.safetensors, trained for 4 steps with seed 0" in capsys.readouterr().out
    assert list(seen)[2:] == ["realiz3d_texturing-no_freezing"]


def test_stage_1_on_the_way_takes_the_flags_of_stage_2_but_its_own_defaults():
    shared = "--seed 7 --clip 0.5 --batch 3 --text_dropout 0.2 --num_assets 9 --lr 0.5"
    own = "--steps 77 --ema 0.5 --warmup 5 --stage1_steps 11"
    args = fill_defaults(parse_args(f"{shared} {own}".split()), "stage2", ALONE)
    stage1, alone = stage1_flags(args, ALONE), fill_defaults(train_stage1.parse_args([]), "stage1", ALONE)
    assert (stage1.seed, stage1.clip, stage1.batch, stage1.text_dropout, stage1.num_assets) == (7, 0.5, 3, 0.2, 9)
    assert stage1.lr == 0.5                                     # one rate for all
    assert stage1.steps == 11 and stage1.name == "stage1" and stage1.adapter == "shifters" and stage1.rank == 8
    for name in ("warmup", "weight_decay", "ema", "muon"):
        assert getattr(stage1, name) == getattr(alone, name)


def test_joint_training_has_no_stage_1_and_text_no_control(tiny_toy):
    out, seen = tiny_toy
    run_main(train_stage2, "--out", out, "--joint", "--no_freezing", "--task", "text", *SHORT, *REAL)
    (trained,) = seen.values()
    assert parts(trained["learns"]) == {"dit", "shifters"} and "dit.control_embedder.weight" not in trained["learns"]
    assert "dit.view_encoding" in trained["learns"] and "control" not in trained["sets"]["syn"]
    assert not (out / "shifters.safetensors").exists()
    model = load_network(str(out / "realiz3d_text-no_freezing-joint.safetensors"))
    assert model.shifters.W_left.abs().max() > 0
    before = load_model(str(out / "base.safetensors"))
    half = before.control_embedder.weight.half().float()  # as the file keeps it
    assert torch.equal(model.dit.control_embedder.weight, half)
    assert (model.dit.view_encoding - before.view_encoding).abs().max() > 1e-4


@pytest.mark.parametrize(
    "method, domains, adapter",
    [
        ("syn_only", ["syn"], None),
        ("syn_real", ["real", "syn"], None),
        ("lora", ["syn"], "lora"),
        ("linear_adapter", ["syn"], "linear"),
        ("domain_adapter", ["syn"], None),  # removed at sampling
        ("spatial_adapter", ["syn"], None),
        ("domain_switcher", ["real", "syn"], "switcher"),
    ],
)
def test_every_baseline_trains_what_it_should(tiny_toy, method, domains, adapter):
    out, seen = tiny_toy
    of_a_rank = method in ("lora", "linear_adapter", "domain_adapter", "spatial_adapter")
    flags = (*SHORT, *REAL * ("real" in domains), *STAGE1 * METHODS[method].stage1, *("--rank", 2) * of_a_rank)
    run_main(train_stage2, "--out", out, "--method", method, *flags)
    name = f"{method}_texturing" + "-rank2" * of_a_rank
    learns, in_stage1 = seen[name]["learns"], {"domain_adapter": "lora_2", "spatial_adapter": "linear_2",
                                               "domain_switcher": "switcher_8"}.get(method)
    assert list(seen) == ([f"stage1_{in_stage1}"] if in_stage1 else []) + [name]
    alone = method in ("lora", "linear_adapter")  # the adapter trains in place of the backbone
    assert parts(learns) == ({"dit", "adapter"} if alone else {"dit"})
    in_backbone = {name.removeprefix("dit.") for name in learns if name.startswith("dit.")}
    assert in_backbone >= set(NEW) and (in_backbone == set(NEW)) == alone
    network, base = load_network(str(out / f"{name}.safetensors")), load_model(str(out / "base.safetensors"))
    assert getattr(network.adapter, "kind", None) == adapter and network.shifters is None
    moved = {name for (name, p), q in zip(network.dit.named_parameters(), base.parameters())
             if (p - q).abs().max() > 2e-3 * q.abs().max()}  # files keep 16 bits
    assert moved >= set(NEW) and (moved == set(NEW)) == alone
    if alone:
        assert all(layer.W_left.abs().max() > 0 for layer in network.adapter.layers)
    log = [json.loads(line) for line in open(out / name / "log.jsonl")]
    assert sorted({line["domain"] for line in log}) == domains == sorted(seen[name]["sets"])
    if in_stage1:  # fitted first, and frozen then
        fitted = load_adapter(str(out / f"{in_stage1}.safetensors"))
        if adapter:
            assert torch.equal(network.adapter.domain_embeddings, fitted.domain_embeddings)
            assert fitted.domain_embeddings.abs().max() > 0
        assert fitted is not None


def test_flags_of_stage_1_are_refused_by_methods_without_one():
    for flag in (["--joint"], ["--shifters", "a"]):
        refuses(train_stage2, ["--method", "syn_only", *flag], 2, f"{flag[0]} says where stage 1 comes in")


def test_shifters_that_are_missing_are_named(tiny_toy):
    out, _ = tiny_toy
    refuses(train_stage2, ("--out", out, "--shifters", out / "none.safetensors", *SHORT, *REAL), 1,
            "no shifters at", "none.safetensors", "train with train_stage1.py --preset toy --adapter shifters --rank 8")


@pytest.mark.parametrize("flag, program", [("--layer_selective", "layer_selective"), ("--benchmark", "benchmark")])
def test_another_program_gets_the_other_flags(flag, program, monkeypatch):
    from experiments import benchmark, layer_selective

    module, given = dict(layer_selective=layer_selective, benchmark=benchmark)[program], []
    monkeypatch.setattr(module, "main", given.append)
    train_stage2.main(["--batch", "2", flag, "--seed", "3"])
    assert given == [["--batch", "2", "--seed", "3"]]
    monkeypatch.setattr("sys.argv", ["train_stage2.py", flag, "--threads", "1"])
    train_stage2.main()
    assert given[1] == ["--threads", "1"]
    refuses(train_stage2, (flag[:-2],), 2, flag[:-2])  # half a flag does not start a training in its place


@pytest.mark.parametrize("method", METHODS)
def test_what_is_announced_is_what_is_missing(method, tmp_path, monkeypatch, capsys):
    """Stage 1 where the method has one, for three epochs of each domain; the real set where one of the two needs it."""
    monkeypatch.setattr(training.estimate, "choose", lambda *args: training.estimate.Pace(0.06, 0.006))
    args = fill_defaults(parse_args(["--method", method, "--out", str(tmp_path)]), "stage2", ALONE)
    training.estimate.announce(args, ALONE)
    line, kind = capsys.readouterr().out, METHODS[method]
    assert ("train stage 1" in line) == kind.stage1 and f"train stage 2 ({args.steps * 0.016:.1f} min)" in line
    if kind.stage1:
        both = args.adapter in ("shifters", "switcher")
        assert f"train stage 1 ({300 * (1 + both) * 0.016:.1f} min)" in line
    assert ("draw the real set (1.6 min)" in line) == kind.real_data
