"""The benchmark of stage 2: counted operations and memory beside the network's own, and what is printed."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, refuses, run_main

import dit
import train_stage2
from dit import PRESETS, DiT, epsilon_loss
from domain_shifter import DomainShifters, ShiftedDiT, uniform_domains
from experiments import benchmark
from experiments.benchmark import iteration_macs, memory_bytes, parameter_counts
from support.launch import Launched

LIKE_TOY = replace(TINY, image_size=32, depth=3, width=32, text_dim=32)
LIKE_FULL = replace(LIKE_TOY, patch_size=2, image_size=16, out_channels=6, vocab_size=0, text_dim=80, text_length=120,
                    qk_norm=False, output_skip=False)  # fmt: skip


def test_counted_operations_are_those_of_the_network():
    """iteration_macs against a count of every matrix product of a real forward and backward pass."""
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


def saved_bytes(config, batch, views, dtype, checkpointing):
    """Bytes of all storages that autograd keeps from the forward pass, but for parameters and buffers."""
    network = ShiftedDiT(random_model(config), DomainShifters(config).requires_grad_(False))
    network.dit.grad_checkpointing = checkpointing
    seen = {p.untyped_storage().data_ptr(): None for p in [*network.parameters(), *network.buffers()]}

    def pack(tensor):
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no storage is used again
        return tensor

    x = torch.randn(batch, views, config.channels, config.image_size, config.image_size)
    L = config.text_length
    text = torch.randint(1, 50, (batch, L)) if config.vocab_size else torch.randn(batch, L, config.text_dim)
    inputs = dict(
        text_mask=torch.ones(batch, L),
        control=torch.randn(batch, views, config.control_channels, config.image_size, config.image_size),
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        t = torch.arange(batch)
        out = network(x, t, text, uniform_domains(0, config.depth, batch), **inputs)
        loss = epsilon_loss(out, torch.randn_like(x), t)[0]
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values() if tensor is not None)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("config", [LIKE_TOY, LIKE_FULL], ids=["toy", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counted_activations_are_those_that_autograd_keeps(config, dtype, monkeypatch):
    """Of the kernels that a GPU takes: a CPU's bf16 attention is the formula."""
    monkeypatch.setattr(dit, "attend", torch.nn.functional.scaled_dot_product_attention)

    def counted(config, checkpointing):
        return memory_bytes(config, 2, 4, dtype, checkpointing)["saved activations"]

    def kept(config, checkpointing):
        return saved_bytes(config, 2, 4, dtype, checkpointing)

    deeper = replace(config, depth=4)
    assert counted(config, False) == pytest.approx(kept(config, False), rel=0.02)
    block = kept(deeper, False) - kept(config, False)
    assert counted(deeper, False) - counted(config, False) == pytest.approx(block, rel=0.02)
    # recomputing holds all of one block again, beside what the forward pass kept
    assert counted(config, True) == pytest.approx(kept(config, True) + block, rel=0.02)
    assert counted(deeper, True) - counted(config, True) == pytest.approx(kept(deeper, True) - kept(config, True), 0.01)


@pytest.mark.parametrize("config", [TINY, LIKE_FULL, PRESETS["toy"]])
def test_counted_parameters_are_those_of_the_model(config):
    block, outside, every = parameter_counts(config)
    model = DiT(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    matrices = {n: size for n, size in sizes.items() if n.endswith("weight") and "norm" not in n and "token" not in n}
    assert every == sum(sizes.values())
    assert block == sum(size for name, size in matrices.items() if name.startswith("blocks.0."))
    assert outside == sum(size for name, size in matrices.items() if not name.startswith("blocks."))
    memory = memory_bytes(config, 1, 4, "bfloat16", False)
    assert [memory[part] / every for part in ("parameters", "gradients", "AdamW's moments")] == [4, 4, 8]


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """run(*flags): what the benchmark prints on one CPU process."""
    monkeypatch.setattr(benchmark, "launch", lambda threads: Launched(torch.device("cpu")))

    def run(*flags, program=benchmark):
        run_main(program, *flags)
        return capsys.readouterr().out

    return run


def test_full_without_a_gpu_is_counted_and_not_timed(run_benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "DiT", None)  # no model is built
    out = run_benchmark("--preset", "full", "--dtype", "bfloat16", "--batch", "2")
    assert "takes a GPU" in out and "images/s" not in out
    rows = {line.split("  ")[0]: [float(x) for x in re.findall(r"\d+\.\d+", line)] for line in out.splitlines()}
    # PixArt-alpha's 610,856,096 parameters, and what this network adds: 8 channels of control and 4 view encodings
    parameters = 4 * (610_856_096 + 8 * 4 * 1152 + 4 * 1152) / 2 ** 30
    assert rows["parameters"] == rows["gradients"] == pytest.approx([parameters] * 2, abs=1e-3)
    assert rows["sum"] == pytest.approx(
        [4 * parameters + activations for activations in rows["saved activations"]], abs=3e-3
    )
    # by hand, per block: 8192 tokens of 1152 take 4 of 4 bytes and 19 of 2; 240 words; the weights in bf16
    block = 8192 * 1152 * (4 * 4 + 19 * 2) + 8192 * 4 * 36 + 240 * 1152 * 4 + 2 * 16 * 1152 ** 2
    assert rows["saved activations"][0] == pytest.approx(28 * block / 2 ** 30, rel=0.02)
    assert rows["saved activations"][1] == pytest.approx((block + 28 * 8192 * 1152 * 4) / 2 ** 30, rel=0.1)
    assert "full, 8 grids of 4 views a step" in run_benchmark("--preset", "full")  # what a GPU computes at once
    assert "full, 16 grids" in run_benchmark("--preset", "full", "--batch", "16")  # in one part, unlike in training


def test_benchmark_prints_rates_and_parts_that_agree(run_benchmark, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", LIKE_TOY)
    compiled, recomputed = [], []
    original = dit.checkpoint
    monkeypatch.setattr(dit.Block, "compile", lambda block, dynamic: compiled.append(block))
    monkeypatch.setattr(dit, "checkpoint", lambda *a, **k: recomputed.append(1) or original(*a, **k))
    out = run_benchmark("--batch", "2", "--rounds", "1")
    assert not compiled and not recomputed
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    (product,) = re.findall(r"([\d.]+) TFLOP/s in a matrix product", out)
    for kind, views in (("synthetic", 4), ("real", 1)):
        images, rate, share = map(float, re.findall(
            r"([\d.]+) images/s +([\d.]+) TFLOP/s, ([\d.]+)%", lines[f"{kind} iteration"])[0])  # fmt: skip
        operations = 2 * iteration_macs(LIKE_TOY, views, text_length=14)
        assert rate == pytest.approx(images / views * operations / 1e12, rel=0.01)
        assert share == pytest.approx(100 * rate / float(product), rel=0.01, abs=0.1)
    (parts,) = [line for line in out.splitlines() if line.startswith("synthetic by part")]
    assert re.findall(r"(\S+) [\d.]+(?:,|$)", parts) == ["data", "forward", "backward", "all-reduce", "optimizer"]
    assert "all-reduce 0.0," in parts
    assert 0.01 < float(re.search(r"peak memory +([\d.]+)", out)[1]) < 100
    run_benchmark("--batch", "1", "--rounds", "1", "--compile", "--grad_checkpointing")
    assert len(compiled) == LIKE_TOY.depth and len(recomputed) > LIKE_TOY.depth


def test_the_training_s_own_step_is_timed_and_moves_nothing(run_benchmark, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    seen, step = [], benchmark.training_step

    def watched(model, optimizer, batch, iteration, *rest):
        before = [p.detach().clone() for p in model.parameters()]
        result = step(model, optimizer, batch, iteration, *rest)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)) and result[0].isfinite()
        seen.append((iteration.domain, iteration.views, iteration.control, iteration.frozen_blocks))
        return result

    monkeypatch.setattr(benchmark, "training_step", watched)
    run_benchmark("--batch", 1, "--rounds", 1, "--tau_B", 0.5)
    grid, singles = ("syn", 4, True, 0), [("real", 1, False, i) for i in (0, 0, 1, 2)]  # 3 rounds, then 3 in parts
    assert seen == [grid, *singles] * 3 + [grid] * 3


def test_benchmark_prints_measured_beside_counted(run_benchmark, monkeypatch):
    """At the toy's depth, reached from the training's command."""
    monkeypatch.setitem(PRESETS, "toy", replace(LIKE_TOY, depth=10))
    out = run_benchmark("--benchmark", "--batch", 1, "--rounds", 1, program=train_stage2)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert float(rows["0"][1]) == 1 and 0.7 < float(rows["4"][1]) < 0.8 and float(rows["average"][0]) > 0
    assert "5" not in rows  # tau_B = 0.4 of 10 blocks


def test_running_out_of_memory_is_one_clear_line(run_benchmark, monkeypatch):
    def time_iterations(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(benchmark, "time_iterations", time_iterations)
    refuses(benchmark, (), 1, "no memory left on cpu: use --grad_checkpointing")


def test_what_cannot_be_timed_is_refused(run_benchmark):
    refuses(benchmark, ("--rounds", 0), 2, "--rounds: 0 does not lie in [1, 10000]")
    refuses(benchmark, ("--accumulate", 2), 2, "times whole batches: leave out --accumulate")
