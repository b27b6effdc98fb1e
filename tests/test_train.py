"""The training loop: pure order and draws, exact resume, freezing, two ranks against one, stage 2's plan."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from glob import glob

import pytest
import torch
from conftest import ROOT, TINY, one_line_error, random_model, script
from test_domain_shifter import trained_shifters

import data
import evaluate
import train_stage2
from dit import Block, launch, load_tensors, save_model
from domain_shifter import REAL, SYN, ShiftedDiT
from train_stage1 import (Iteration, check_ranks, data_indices, denoising_loss, draw_noise, fill_defaults, in_training,
                          learning_rate, prefetched, read_set, split, train)
from train_stage2 import iteration_macs, stage2_plan

WORKER = "tests/train_worker.py"


def tensors(path):
    return load_tensors(str(path))[0]


def final(out, rank=0):
    return tensors(out / f"rank_{rank}.safetensors")


def states(out):
    return sorted(glob(f"{out}/tiny/state_*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions


def test_every_epoch_visits_every_sample_once():
    order = data_indices(10, 0, 40, 7, 0)
    for epoch in range(4):
        assert sorted(order[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert torch.equal(torch.cat([data_indices(10, first, 5, 7, 0) for first in range(0, 40, 5)]), order)
    assert not torch.equal(data_indices(10, 0, 40, 8, 0), order)


def test_noise_is_the_same_however_a_batch_is_split():
    whole = draw_noise((4, 3, 8, 8), 0, 5, 0, 6, "cpu")
    halves = [draw_noise((4, 3, 8, 8), 0, 5, first, 3, "cpu") for first in (0, 3)]
    for k in range(3):
        assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    t, noise, u = draw_noise((64,), 0, 6, 0, 4000, "cpu")
    assert t.min() >= 0 and t.max() < 1000 and abs(t.float().mean() - 499.5) < 25
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs(u.mean() - 0.5) < 0.03
    assert noise.flatten().unique().numel() > 250_000  # no sample repeats another


def test_learning_rate_warms_up_and_falls_to_zero():
    args = train_stage2.parse_args(["--lr", "2", "--warmup", "10", "--steps", "100"])
    rates = [learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] and rates[99] < 0.001
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_stage2_alternates_after_a_real_warm_up():
    args = train_stage2.parse_args(["--real_warmup", "3"])
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


@pytest.mark.parametrize(
    "flag, holds",
    [
        (
            "--no_freezing",
            lambda its: all(it.frozen_blocks == 0 for it in its) and any(it.reassigned_blocks for it in its),
        ),
        (
            "--no_reassignment",
            lambda its: all(it.reassigned_blocks == 0 for it in its) and any(it.frozen_blocks for it in its),
        ),
        ("--no_real_data", lambda its: all(it.domain == "syn" for it in its)),
    ],
)
def test_each_ingredient_can_be_switched_off(flag, holds):
    plan = stage2_plan(train_stage2.parse_args([flag]), 10)
    assert holds([plan(step) for step in range(400)])


def test_an_iteration_runs_in_its_domains():
    assert Iteration("syn", 0).domains(3, 2, "cpu").tolist() == [[SYN, SYN]] * 3
    assert Iteration("real", 0, reassigned_blocks=1).domains(3, 2, "cpu").tolist() == [[SYN, SYN]] + [[REAL, REAL]] * 2


def test_the_loss_feeds_the_network_what_the_stage_says():
    """denoising_loss against the same thing written out: noise, dropped captions, domains, control."""
    network = ShiftedDiT(random_model(), trained_shifters())
    torch.manual_seed(0)
    batch = {
        "image": torch.randint(256, (2, 4, 3, 8, 8), dtype=torch.uint8),
        "text": torch.randint(2, 50, (2, 14)),
        "control": torch.randn(2, 4, 6, 8, 8),
        "view": torch.arange(4).expand(2, 4),
    }
    null = {"text": torch.tensor([[1] + [0] * 13])}
    t, noise, u = draw_noise((4, 3, 8, 8), 0, 9, 0, 2, "cpu")
    dropout = float(u.sort().values.mean())  # between the two: drops exactly one caption
    loss, _ = denoising_loss(network, batch, Iteration("syn", 0), null, 0, 9, 0, dropout)
    from dit import add_noise

    text = torch.where((u < dropout)[:, None], null["text"], batch["text"])
    x0 = batch["image"].float() / 127.5 - 1
    expected = network.dit(
        add_noise(x0, noise, t),
        t,
        text,
        control=batch["control"],
        view=batch["view"],
        shift=network.shifters(torch.zeros(4, 2, dtype=torch.long)),
    )
    assert torch.allclose(loss, (expected - noise).square().mean(), rtol=1e-5)


def test_counted_operations_are_those_of_the_network():
    """iteration_macs against a count of every matrix product of a real forward and backward pass.

    In float64, as in fp32 dit.Linear goes to oneDNN, which the counter does not see.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = TINY
    for frozen in (0, 2):
        model, x = random_model(dtype=torch.float64), torch.randn(1, 1, 3, 8, 8, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x, torch.zeros(1), torch.ones(1, 14, dtype=torch.long), frozen_blocks=frozen).sum().backward()
        counted = 2 * iteration_macs(config, 1, frozen, 14)
        extra = 2 * 3 * (256 * 16 + 16 * 16 + 6 * 16 * 16 + 14 * (16 * 16 + 16 * 16))  # time and text embedders
        assert counter.get_total_flops() == pytest.approx(counted + extra, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Whole trainings, as processes


def test_resume_after_kill_9_equals_not_having_stopped(tmp_path):
    flags = ("--steps", 40, "--batch", 2, "--save_every", 4, "--ema", 0.9)
    done = script(WORKER, tmp_path / "whole", "mixed", *flags)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, WORKER, tmp_path / "cut", "mixed", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not states(tmp_path / "cut") and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert states(tmp_path / "cut") and not (tmp_path / "cut" / "rank_0.safetensors").exists(), "killed too late"
    newest = states(tmp_path / "cut")[-1]  # the newest state is also cut off: the one before is taken
    if len(states(tmp_path / "cut")) > 1:
        os.truncate(newest, os.path.getsize(newest) // 2)
    done = script(*command[1:])
    assert done.returncode == 0, done.stderr
    whole, cut = (tensors(states(tmp_path / name)[-1]) for name in ("whole", "cut"))
    assert (
        sum(name.startswith("exp_avg.") for name in whole) > 20 and sum(name.startswith("ema.") for name in whole) > 20
    )
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(torch.equal(a, final(tmp_path / "cut")[name]) for name, a in final(tmp_path / "whole").items())
    logs = [[json.loads(line) for line in open(tmp_path / name / "tiny" / "log.jsonl")] for name in ("whole", "cut")]
    assert [(line["step"], line["domain"], line["loss"]) for line in logs[0]] == [
        (line["step"], line["domain"], line["loss"]) for line in logs[1]
    ]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_write_a_state_and_exit_cleanly(tmp_path, number, code):
    command = [sys.executable, WORKER, tmp_path, "mixed", "--steps", "100000", "--batch", "2", "--save_every", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "tiny" / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and "stopped by a signal" in out
    step = load_tensors(states(tmp_path)[-1])[1]["step"]
    assert 0 < step < 100000 and f"at step {step}" in out


def test_other_settings_are_not_resumed(tmp_path):
    assert script(WORKER, tmp_path, "mixed", "--steps", 2, "--batch", 1).returncode == 0
    again = script(WORKER, tmp_path, "mixed", "--steps", 2, "--batch", 1, "--lr", 0.5)
    one_line_error(again, 1, "other settings", "lr 0.0002 (now 0.5)")


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    done = script(WORKER, tmp_path, "bad", "--steps", 9, "--batch", 1, "--save_every", 2, "--log_every", 100)
    one_line_error(
        done,
        1,
        "tiny",
        "not finite at step 5",
        f"{stage2_plan(train_stage2.parse_args([]), TINY.depth)(5).domain} iteration",
    )
    assert load_tensors(states(tmp_path)[-1])[1]["step"] == 4
    assert all(p.isfinite().all() for p in tensors(states(tmp_path)[-1]).values())


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """10 mixed iterations on two torchrun agents of two gloo ranks each, as on two nodes."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
               f"--rdzv_endpoint={endpoint}", "--rdzv_id=test", WORKER, str(out), "mixed", *MIXED, "--batch", "1"]
    agents = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    return out


MIXED = ("--steps", "10", "--real_warmup", "2", "--lr", "1e-3", "--warmup", "0")


def test_replicas_stay_identical_with_stochastic_freezing(two_nodes):
    ranks = [final(two_nodes, rank) for rank in range(4)]
    assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:] for name in other)
    start = random_model().state_dict()
    assert max((ranks[0][f"dit.{name}"] - start[name]).abs().max() for name in start) > 1e-3


def test_two_nodes_of_two_ranks_match_one_process_with_the_whole_batch(two_nodes, tmp_path):
    """Also computed in three parts, and with batches read ahead by two threads."""
    done = script(WORKER, tmp_path, "mixed", *MIXED, "--batch", 4, "--accumulate", 3, "--workers", 2)
    assert done.returncode == 0, done.stderr
    one, four = final(tmp_path), final(two_nodes)
    assert max((one[name] - four[name]).abs().max() for name in one) < 2e-5  # the steps themselves are up to 1e-2


def test_batches_are_read_ahead_and_in_order():
    read, seen = [], []
    for step in prefetched(lambda step: read.append(step) or step, range(3, 9), 2):
        seen.append(step)
        assert set(range(3, min(step + 3, 9))) >= set(read) >= set(seen)
    assert seen == list(range(3, 9)) == list(prefetched(lambda step: step, range(3, 9), 0))


def test_parts_of_a_batch_are_the_batch():
    batch = {"image": torch.arange(7), "text": torch.arange(14).view(7, 2)}
    for parts in (1, 2, 3, 9):
        found = split(batch, parts)
        assert torch.equal(torch.cat([part["image"] for _, _, part in found]), batch["image"])
        assert all(torch.equal(part["text"], batch["text"][k:k + len(part["text"])]) for k, _, part in found)
        assert sum(share for _, share, _ in found) == pytest.approx(1) and len(found) <= parts


def test_four_compilations_serve_all_blocks_domains_and_numbers_of_frozen_ones(monkeypatch):
    """Real iterations of any i after synthetic ones, each block one graph (fullgraph), four in all."""
    from torch._dynamo.testing import CompileCounter

    counter, compile_block = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: compile_block(block, dynamic=dynamic, backend=counter,
                                                                               fullgraph=True))
    args = train_stage2.parse_args(["--compile"])
    network = ShiftedDiT(random_model(), trained_shifters().requires_grad_(False))
    model = in_training(network, args, 1)
    grids = {"syn": (torch.randn(1, 4, 3, 8, 8), torch.ones(1, 14).long()),
             "real": (torch.randn(4, 1, 3, 8, 8), torch.ones(4, 14).long())}
    for domain, i in [("syn", 0), *[("real", i) for i in range(TINY.depth)], ("syn", 0), ("real", 2)]:
        x, text = grids[domain]
        iteration = Iteration(domain, 0, frozen_blocks=i)
        t = torch.full((len(x),), 500)
        model(x, t, text, iteration.domains(TINY.depth, len(x), "cpu"), frozen_blocks=i).sum().backward()
    assert counter.frame_count == 4


def test_processes_that_found_different_states_are_refused(monkeypatch):
    check_ranks(4, "runs", 1)
    for other, refused in ((4, False), (0, True)):
        monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, own: found.__setitem__(1, other))
        if refused:
            with pytest.raises(ValueError, match=r"different steps, \[4, 0\]: all nodes must see the same runs"):
                check_ranks(4, "runs", 2)
        else:
            check_ranks(4, "runs", 2)


def test_sigterm_ends_the_process_again_after_training(tmp_path):
    args = train_stage2.parse_args(["--out", str(tmp_path), "--steps", "1", "--batch", "1", "--name", "a"])
    fill_defaults(args, "stage2", torch.device("cpu"))
    images = {"image": torch.zeros(4, 1, 3, 8, 8, dtype=torch.uint8), "text": torch.ones(4, 14, dtype=torch.long)}
    train(ShiftedDiT(random_model()), {"real": images}, {"text": torch.tensor([[1] + [0] * 13])},
          lambda step: Iteration("real", step), args, str(tmp_path / "a"), (torch.device("cpu"), 0, 1))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("flag, value, message", [
    ("rank", 0, "--rank must be at least 1"), ("picture_steps", 0, "--picture_steps must be at least 1"),
    ("p_B", 7, r"--p_B must lie in .0, 1."), ("ema", 1.5, "--ema must lie in"), ("tau_B", -1, "--tau_B must lie in")])
def test_settings_out_of_range_are_refused_before_any_work(flag, value, message):
    with pytest.raises(ValueError, match=message):
        fill_defaults(train_stage2.parse_args([f"--{flag}={value}"]), "stage2", torch.device("cpu"))


def test_launch_names_a_process_without_a_gpu_and_a_thread_count_of_none(monkeypatch):
    with pytest.raises(ValueError, match="--threads must be at least 1, not -1"):
        launch(-1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this node has no GPU: --nproc_per_node must be at most 1"):
        launch()


def test_a_file_that_is_no_set_is_named(tmp_path):
    save_model(str(tmp_path / "model.safetensors"), TINY, random_model())
    with pytest.raises(ValueError, match="model.safetensors is no set of images"):
        read_set(str(tmp_path / "model.safetensors"))


def test_flags_of_stage_1_are_refused_by_methods_without_one(capsys):
    for flag in (["--joint"], ["--shifters", "a"]):
        with pytest.raises(SystemExit):
            train_stage2.parse_args(["--method", "syn_only", *flag])
        assert f"{flag[0]} says where stage 1 comes in" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [0, 2])
def test_frozen_blocks_are_bit_identical_after_a_real_iteration(tmp_path, ranks):
    done = script(
        WORKER,
        tmp_path,
        "frozen",
        "--steps",
        4,
        "--batch",
        1,
        "--save_every",
        3,
        "--weight_decay",
        0.1,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--ema",
        0,
        torchrun=ranks,
    )
    assert done.returncode == 0, done.stderr
    before, after = (tensors(path) for path in states(tmp_path))
    frozen = (
        "param.dit.x_embedder",
        "param.dit.control_embedder",
        "param.dit.view_encoding",
        "param.dit.blocks.0.",
        "param.dit.blocks.1.",
    )
    for name in before:
        if name.startswith("param."):
            assert torch.equal(before[name], after[name]) == name.startswith(frozen), name
    for rank in range(ranks):
        assert all(
            torch.equal(p, after[f"param.{name}"])
            for name, p in final(tmp_path, rank).items()
            if f"param.{name}" in after
        )


@pytest.mark.parametrize("step, moved", [(0, (0, 1)), (1, (2, 3))])
def test_layer_selective_training_moves_exactly_one_half(tmp_path, step, moved):
    """Step 0 is synthetic and trains the first half of the blocks, step 1 is real and trains the second."""
    args = train_stage2.parse_args(["--out", str(tmp_path), "--name", "half", "--steps", "1", "--batch", "1"])
    fill_defaults(args, "selective", torch.device("cpu"))
    network = ShiftedDiT(random_model().requires_grad_(False))
    network.dit.blocks.requires_grad_(True)
    before = {name: p.clone() for name, p in network.dit.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    one = {
        "image": torch.randint(256, (8, 1, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "text": torch.randint(2, 50, (8, 14), generator=generator),
    }
    plan = lambda _: train_stage2.selective_plan("layers", 4)(step)  # noqa: E731
    null = {"text": torch.tensor([[1] + [0] * 13])}
    train(network, {"syn": one, "real": one}, null, plan, args, f"{tmp_path}/half", (torch.device("cpu"), 0, 1))
    changed = {name for name, p in network.dit.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith(tuple(f"blocks.{k}." for k in moved))}


def test_shifters_that_train_with_the_model_have_their_own_learning_rate(tmp_path):
    """A share of --lr: the width's by default, none of it at 0."""
    for flags, share in (([], 1.0), (["--joint"], 192 / 1152), (["--joint", "--preset", "full"], 1.0)):
        args = fill_defaults(train_stage2.parse_args(flags), "stage2", torch.device("cpu"))
        assert args.shifter_lr_scale == pytest.approx(share)
    flags = ["--joint", "--name", "joint", "--steps", "1", "--batch", "1", "--shifter_lr_scale", "0"]
    args = fill_defaults(train_stage2.parse_args(flags), "stage2", torch.device("cpu"))
    network = ShiftedDiT(random_model(), trained_shifters())
    before = {name: p.clone() for name, p in network.named_parameters()}
    real = {"image": torch.zeros(8, 1, 3, 8, 8, dtype=torch.uint8), "text": torch.full((8, 14), 3)}
    null = {"text": torch.tensor([[1] + [0] * 13])}
    launched = (torch.device("cpu"), 0, 1)
    train(network, {"real": real}, null, lambda _: Iteration("real", 0), args, f"{tmp_path}/joint", launched)
    still = {name for name, p in network.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("shifters.")} <= still
    assert not any(name.startswith("dit.blocks.") for name in still)


def test_selective_plans_alternate_and_split_the_timesteps():
    layers, times, renders = (
        [train_stage2.selective_plan(variant, 5)(step) for step in range(4)] for variant in
        ("layers", "timesteps", "renders")
    )
    assert [it.domain for it in layers] == [it.domain for it in times] == ["syn", "real"] * 2
    assert [it.domain for it in renders] == ["syn"] * 4 and [it.visit for it in renders] == [0, 1, 2, 3]
    assert [(it.frozen_blocks, it.frozen_last_blocks) for it in layers[:2]] == [(0, 3), (2, 0)]
    for iteration, low, high in ((times[0], 500, 1000), (times[1], 0, 500)):
        t, _, _ = draw_noise((1,), 0, 3, 0, 3000, "cpu", iteration.timesteps)
        assert low <= t.min() < low + 5 and high - 5 <= t.max() < high


def test_layer_selective_experiment_as_a_command(tmp_path, tiny_run, monkeypatch, capsys):
    """Two seeds of every variant at a tiny size, measured and drawn; the base model is not trained."""
    net, photos = evaluate.train_feature_net, data.photo_set
    monkeypatch.setattr(evaluate, "train_feature_net", lambda *a, **options: net(*a, num=20, steps=4, **options))
    monkeypatch.setattr(data, "photo_set", lambda num, **options: photos(20, **options))
    flags = "--layer_selective --seeds 2 --steps 2 --batch 1 --num_assets 4 --num_prompts 3 --picture_steps 2"
    monkeypatch.setattr(
        "sys.argv",
        ["train_stage2.py", *flags.split(), "--threads", "1", "--out", str(tmp_path), "--base",
         str(tiny_run / "base.safetensors")],
    )
    train_stage2.main()
    rows = json.loads((tmp_path / "layer_selective.json").read_text())["rows"]
    assert list(rows) == ["base", "renders", "layers", "timesteps"] and all(len(row) == 2 for row in rows.values())
    assert rows["layers"][0]["FD"] != rows["base"][0]["FD"] and (tmp_path / "layer_selective.png").exists()
    assert sorted(path.name for path in tmp_path.glob("selective_*")) == sorted(
        f"selective_{variant}_{seed}" for variant in ("renders", "layers", "timesteps") for seed in (0, 1)
    )
    assert "+-" in capsys.readouterr().out


def test_more_processes_than_data_is_one_clear_line(tmp_path):
    done = script(WORKER, tmp_path, "mixed", "--steps", 2, "--batch", 4, torchrun=2)
    assert done.returncode == 1
    assert "one step of 2 process(es) takes 8 samples, but the syn set has only 6" in done.stderr
    assert "smaller --batch or --nproc_per_node" in done.stderr
