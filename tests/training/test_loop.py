"""The training loop: the step written out, freezing, two nodes against one process, signals, what is refused."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from glob import glob

import pytest
import torch
from conftest import ALONE, NULL, ROOT, TINY, random_model, script, tiny_sets, trained_shifters
from train_worker import tiny_args, train_tiny

import training.loop
from dit import Block, add_noise, epsilon_loss
from domain_shifter import REAL, SYN, ShiftedDiT
from support.files import load_tensors
from train_stage2 import parse_args, stage2_plan
from training.batches import with_noise
from training.loop import Iteration, check_sets, describe, in_training, learning_rate, loss_of, training_step

WORKER = "tests/training/train_worker.py"


def tensors(path):
    return load_tensors(str(path))[0]


def final(out, rank=0):
    return tensors(out / f"rank_{rank}.safetensors")


def states(out):
    return sorted(glob(f"{out}/tiny/state_*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# One iteration


def test_an_iteration_runs_in_its_domains():
    assert Iteration("syn", 0).domains(3, 2, "cpu").tolist() == [[SYN, SYN]] * 3
    assert Iteration("real", 0, reassigned_blocks=1).domains(3, 2, "cpu").tolist() == [[SYN, SYN]] + [[REAL, REAL]] * 2


def random_batch(iteration, num):
    """A batch of num samples with control, noised as of step 9; and a dropout that drops some captions of it."""
    torch.manual_seed(0)
    batch = {
        "image": torch.randint(256, (num, iteration.views, 3, 8, 8), dtype=torch.uint8),
        "text": torch.randint(2, 50, (num, 14)),
        "control": torch.randn(num, iteration.views, 6, 8, 8),
    }
    batch = with_noise(batch, iteration, 0, 9, 0)
    u = batch["u"].sort().values
    return batch, float(u[:2].mean())  # drops exactly one caption


def by_hand(batch, text_dropout, domains, control, frozen, even, grid):
    """Loss and gradients of the backbone, written out: noise, dropped captions, domains, control, frozen blocks, and
    the view encodings of single images in a grid."""
    network = ShiftedDiT(random_model(), trained_shifters())
    for block in network.dit.blocks[:frozen]:
        block.register_forward_hook(lambda _, inputs, out: out.detach())
    text = torch.where((batch["u"] < text_dropout)[:, None], NULL["text"], batch["text"])
    assert (text == NULL["text"]).all(dim=1).sum() == 1
    x0, noise, t = batch["image"].float() / 127.5 - 1, batch["noise"], batch["t"]
    shift = network.shifters(torch.tensor(domains)[:, None].expand(-1, len(x0))).clone()
    if grid:  # what every token gets before the first block, as the shift
        shift[0] = shift[0] + network.dit.view_encoding[[k % grid for k in range(len(x0))]]
    prediction = network.dit(add_noise(x0, noise, t), t, text, control=control, domain_shift=shift)
    loss = epsilon_loss(prediction, noise, t, even=True)[0] if even else (prediction - noise).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in network.dit.named_parameters()}


SYNTHETIC = Iteration("syn", 0, views=4, control=True)
SINGLE = Iteration("real", 0, grid=2, reassigned_blocks=3, frozen_blocks=2)
NO_IMAGE = ("control_embedder", "view_encoding")  # what a single image that stands in no grid does not use
BELOW_2 = (*NO_IMAGE, "x_embedder", "blocks.0.", "blocks.1.")


@pytest.mark.parametrize(
    "iteration, domains, loss, parts, still",
    [
        (SYNTHETIC, [SYN] * 4, "epsilon", 1, ()),
        (SYNTHETIC, [SYN] * 4, "even", 3, ()),
        (Iteration("real", 0), [REAL] * 4, "epsilon", 1, NO_IMAGE),
        (Iteration("real", 0, grid=2), [REAL] * 4, "epsilon", 1, NO_IMAGE[:1]),
        (SINGLE, [SYN, SYN, SYN, REAL], "epsilon", 1, BELOW_2),
        (SINGLE, [SYN, SYN, SYN, REAL], "even", 2, BELOW_2),
    ],
)
def test_a_step_is_what_the_paper_says(iteration, domains, loss, parts, still):
    """Loss and weights after a step of plain gradient descent, against the same thing written out: a single image sees
    no control and, in no grid, no view; frozen blocks and what is below them stay as they were, bit for bit."""
    batch, text_dropout = random_batch(iteration, 3)
    control = batch["control"] if iteration.domain == "syn" else None
    frozen, grid = iteration.frozen_blocks, iteration.grid
    want, grads = by_hand(batch, text_dropout, domains, control, frozen, loss == "even", grid)
    network = ShiftedDiT(random_model(), trained_shifters().requires_grad_(False))
    before = {name: p.detach().clone() for name, p in network.dit.named_parameters()}
    optimizer = torch.optim.SGD(network.dit.parameters(), lr=1.0)
    args = argparse.Namespace(accumulate=parts, text_dropout=text_dropout, dtype="float32", loss=loss, clip=1e9)
    got, (sums, counts) = training_step(network, [optimizer], batch, iteration, NULL, args)
    assert float(got) == pytest.approx(want, rel=1e-4) and counts.sum() == 3
    if loss == "epsilon":
        assert float(sums.sum()) / 3 == pytest.approx(want, rel=1e-4)
    for name, p in network.dit.named_parameters():
        moved = before[name] - p.detach()
        if name.startswith(still):
            assert torch.equal(p, before[name]), name
        else:
            assert (moved - grads[name]).abs().max() < 1e-3 * grads[name].abs().max() + 1e-6, name
            assert moved.abs().max() > 0, name
        assert p.grad is None


def test_what_is_logged_of_a_loss_in_bf16_is_not_rounded():
    """The sums by timestep are those of the loss, to more digits than bf16 has."""
    batch, _ = random_batch(SYNTHETIC, 3)
    args = argparse.Namespace(text_dropout=0.1, dtype="bfloat16", loss="epsilon")
    loss, (sums, counts) = loss_of(ShiftedDiT(random_model(), trained_shifters()), batch, SYNTHETIC, NULL, args)
    assert counts.sum() == 3 and float(sums.sum()) / 3 == pytest.approx(float(loss), rel=1e-6)


def test_a_long_gradient_is_clipped():
    batch, _ = random_batch(SYNTHETIC, 2)
    moved = []
    for clip in (1e9, 0.01):
        network = ShiftedDiT(random_model(), trained_shifters().requires_grad_(False))
        before = torch.nn.utils.parameters_to_vector(network.dit.parameters()).detach()
        optimizer = torch.optim.SGD(network.dit.parameters(), lr=1.0)
        args = argparse.Namespace(accumulate=1, text_dropout=0.1, dtype="float32", loss="epsilon", clip=clip)
        training_step(network, [optimizer], batch, SYNTHETIC, NULL, args)
        moved.append(before - torch.nn.utils.parameters_to_vector(network.dit.parameters()).detach())
    assert moved[0].norm() > 0.05 and float(moved[1].norm()) == pytest.approx(0.01, rel=0.01)
    assert torch.cosine_similarity(moved[0], moved[1], dim=0) > 0.999


@pytest.mark.parametrize("iteration, views", [(SINGLE, 4), (SYNTHETIC, 1), (replace(SYNTHETIC, views=2), 4)])
def test_an_iteration_that_its_batch_does_not_fit_is_refused(iteration, views):
    batch, text_dropout = random_batch(replace(iteration, views=views), 2)
    args = argparse.Namespace(accumulate=1, text_dropout=text_dropout, dtype="float32", loss="epsilon", clip=1.0)
    words = rf"a {iteration.domain} iteration of {iteration.views} view\(s\) got {views}"
    with pytest.raises(ValueError, match=words):
        training_step(ShiftedDiT(random_model()), None, batch, iteration, NULL, args)


def test_learning_rate_warms_up_and_falls_to_zero():
    args = parse_args(["--lr", "2", "--warmup", "10", "--steps", "100"])
    rates = [learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] and rates[99] < 0.001
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_four_compilations_serve_all_blocks_domains_and_numbers_of_frozen_ones(monkeypatch):
    """Real iterations of any i after synthetic ones, each block one graph (fullgraph), four in all."""
    from torch._dynamo.testing import CompileCounter

    counter, compile_block = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: compile_block(block, dynamic=dynamic, backend=counter,
                                                                               fullgraph=True))
    args = parse_args(["--compile"])
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


def test_what_no_compiler_can_compile_trains_as_it_is(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no working compiler")
    plain = train_tiny(tmp_path / "plain", "mixed", "--steps", 2, "--batch", 1)
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: compile_block(block, backend=broken))
    without = train_tiny(tmp_path / "without", "mixed", "--steps", 2, "--batch", 1, "--compile")
    assert all(torch.equal(plain[name], without[name]) for name in plain)


# ---------------------------------------------------------------------------------------------------------------------
# Whole trainings in this process


def test_each_optimizer_steps_at_its_share_of_the_learning_rate(tmp_path, monkeypatch):
    """Muon's three times AdamW's, which follows warm-up and cosine."""
    seen, step = [], training.loop.training_step

    def watched(model, optimizers, *rest):
        seen.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
        return step(model, optimizers, *rest)
    monkeypatch.setattr(training.loop, "training_step", watched)
    train_tiny(tmp_path, "mixed", "--muon", "--steps", 5, "--batch", 1, "--lr", 1e-3, "--warmup", 2)
    args = tiny_args(tmp_path, "--steps", 5, "--lr", 1e-3, "--warmup", 2)
    assert seen == [[learning_rate(k, args), 3 * learning_rate(k, args)] for k in range(5)]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    calls, original = [], training.loop.epsilon_loss

    def nan_at_the_sixth_step(*inputs, **options):
        loss, bins = original(*inputs, **options)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 6 else loss), bins

    monkeypatch.setattr(training.loop, "epsilon_loss", nan_at_the_sixth_step)
    flags = ("--steps", 9, "--batch", 1, "--save_every", 2, "--log_every", 100, "--real_warmup", 0)
    with pytest.raises(FloatingPointError, match=r"tiny: the loss is not finite at step 6 \(real iteration\)"):
        train_tiny(tmp_path, "mixed", *flags)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert load_tensors(states(tmp_path)[-1])[1]["step"] == 4
    assert all(p.isfinite().all() for p in tensors(states(tmp_path)[-1]).values())


def test_a_slow_run_looks_for_other_threads_and_notes_the_step(tmp_path, monkeypatch):
    """Unless they were given; nothing but the threads changes, and where these stay nothing is noted."""
    flags, looked, before = ("--steps", 5, "--batch", 1, "--lr", 1e-3, "--warmup", 0), [], torch.get_num_threads()

    def third(watch, seconds, images):
        looked.append(images)
        return len(looked) == 3

    def notes(name):
        with open(tmp_path / name / "tiny" / "log.jsonl") as file:
            return [line for line in map(json.loads, file) if "domain" not in line]
    plain = train_tiny(tmp_path / "plain", "mixed", *flags)
    monkeypatch.setattr(training.loop.Watch, "calls", third)
    monkeypatch.setattr(training.loop, "choose_threads", lambda device: before)
    again = train_tiny(tmp_path / "again", "mixed", *flags)
    assert looked == [4] * 5 and not notes("again") and all(torch.equal(plain[name], again[name]) for name in plain)
    monkeypatch.setattr(training.loop, "choose_threads", lambda device: before + 1)
    train_tiny(tmp_path / "given", "mixed", *flags, "--threads", before)
    assert len(looked) == 5 and not notes("given")
    looked.clear()
    train_tiny(tmp_path / "other", "mixed", *flags)
    assert notes("other") == [dict(step=3, threads=before + 1)] and torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_sigterm_ends_the_process_again_after_training(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train_tiny(tmp_path, "mixed", "--steps", 1, "--batch", 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_more_processes_than_data_is_one_clear_line(tmp_path):
    args = tiny_args(tmp_path, "--batch", 3)
    check_sets(tiny_sets(), args, 2)
    with pytest.raises(ValueError, match=r"one step of 3 process\(es\) takes 9 samples, but the syn set has only 6: "
                                         "use a smaller --batch or --nproc_per_node"):
        check_sets(tiny_sets(), args, 3)
    with pytest.raises(ValueError, match=r"takes 36 samples, but the real set has only 24"):
        check_sets({"real": tiny_sets()["real"]}, args, 3)


def frozen_states(out):
    """The parameters before and after the real iteration of mode "frozen"."""
    before, after = (tensors(path) for path in states(out))
    return [{name: p for name, p in state.items() if name.startswith("param.")} for state in (before, after)]


FROZEN = ("--steps", 4, "--batch", 1, "--save_every", 3, "--weight_decay", 0.1, "--lr", 1e-3, "--warmup", 0, "--ema", 0)
BELOW = tuple(f"param.dit.{name}" for name in ("x_embedder", "control_embedder", "view_encoding", "blocks.0.",
                                               "blocks.1."))


@pytest.mark.parametrize("ranks", [0, 2])
def test_frozen_blocks_are_bit_identical_after_a_real_iteration(tmp_path, ranks):
    if ranks:
        done = script(WORKER, tmp_path, "frozen", *FROZEN, torchrun=ranks)
        assert done.returncode == 0, done.stderr
    else:
        train_tiny(tmp_path, "frozen", *FROZEN)
    before, after = frozen_states(tmp_path)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith(BELOW), name
    for rank in range(ranks):
        assert all(torch.equal(p, after[f"param.{name}"]) for name, p in final(tmp_path, rank).items()
                   if f"param.{name}" in after)


# ---------------------------------------------------------------------------------------------------------------------
# Whole trainings in processes of their own

MIXED = ("--steps", 10, "--real_warmup", 2, "--lr", 1e-3, "--warmup", 0)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """10 mixed iterations on two torchrun agents of two gloo ranks each, as on two nodes; real batches in two parts."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
               f"--rdzv_endpoint={endpoint}", "--rdzv_id=test", WORKER, str(out), "mixed", *map(str, MIXED), "--batch",
               "1", "--accumulate", "2"]
    agents = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    return out


def test_replicas_stay_identical_with_stochastic_freezing(two_nodes):
    ranks = [final(two_nodes, rank) for rank in range(4)]
    assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:] for name in other)
    start = random_model().state_dict()
    assert max((ranks[0][f"dit.{name}"] - start[name]).abs().max() for name in start) > 1e-3


def test_two_nodes_of_two_ranks_match_one_process_with_the_whole_batch(two_nodes, tmp_path):
    """Also computed in three parts, and with batches read ahead by two threads."""
    one = train_tiny(tmp_path, "mixed", *MIXED, "--batch", 4, "--accumulate", 3, "--workers", 2)
    four = final(two_nodes)
    # the steps themselves are up to 1e-2; ten of AdamW magnify the last place, in which matrix products of other sizes
    # may differ, to 1e-4
    assert max((one[name] - four[name]).abs().max() for name in one) < 5e-4


def test_sigterm_and_ctrl_c_write_a_state_and_exit_cleanly(tmp_path):
    running = {}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, WORKER, str(tmp_path / str(code)), "mixed", "--steps", "100000", "--batch", "2",
                   "--save_every", "100000"]
        running[number, code] = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                                 text=True)
    for (number, code), process in running.items():
        log = tmp_path / str(code) / "tiny" / "log.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
    for (number, code), process in running.items():
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code and "stopped by a signal" in out
        step = load_tensors(states(tmp_path / str(code))[-1])[1]["step"]
        assert 0 < step < 100000 and f"at step {step}" in out


def test_two_ranks_stop_at_the_same_step_without_waiting_for_the_log(tmp_path):
    """SIGTERM reaches torchrun, which passes it on and leaves its processes half a minute."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", WORKER,
               str(tmp_path), "mixed", "--steps", "20000", "--save_every", "20", "--log_every", "1000000", "--batch",
               "1"]
    torchrun = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not states(tmp_path) and torchrun.poll() is None:
        time.sleep(0.01)
    torchrun.send_signal(signal.SIGTERM)
    out, _ = torchrun.communicate(timeout=60)
    step = load_tensors(states(tmp_path)[-1])[1]["step"]
    assert torchrun.returncode != 0 and f"stopped by a signal at step {step};" in out


def test_the_epochs_that_are_announced_are_those_of_the_plan(capsys):
    """Counted over all steps, which `describe` does not do: there may be millions."""
    plan, sets = stage2_plan(parse_args(["--real_warmup", "3"]), TINY.depth), tiny_sets()
    args = argparse.Namespace(name="x", out="o", steps=44, batch=1, images_per_grid=4, dtype="float32")
    describe(ShiftedDiT(random_model()), {}, sets, plan, args, ALONE, 0)
    printed = capsys.readouterr().out
    for domain, images in (("syn", 6 * 4), ("real", 24)):
        steps = sum(plan(step).domain == domain for step in range(44))
        assert f"{domain} set of {images // (4 if domain == 'syn' else 1)} x" in printed
        assert f"image(s), {steps * 4 / images:.3g} epochs" in printed
    args.steps = 10 ** 7
    describe(ShiftedDiT(random_model()), {}, sets, plan, args, ALONE, 0)  # at once
