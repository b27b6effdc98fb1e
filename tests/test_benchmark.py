"""The benchmark of stage 2: memory counted by formulas beside what autograd keeps, and what is printed."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model

import dit
import train_stage2
from dit import DiT, epsilon_loss
from domain_shifter import DomainShifters, ShiftedDiT, uniform_domains
from train_stage2 import memory_bytes, parameter_counts

LIKE_TOY = replace(TINY, image_size=32, depth=3, width=32, text_dim=32)
LIKE_FULL = replace(LIKE_TOY, patch_size=2, image_size=16, out_channels=6, vocab_size=0, text_dim=80, text_length=120,
                    qk_norm=False, output_skip=False)  # fmt: skip


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
        view=torch.arange(views).expand(batch, views),
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
    """Of the kernels that a GPU takes: a CPU's linear layers and bf16 attention are dit.py's own."""
    monkeypatch.setattr(dit.Linear, "forward", torch.nn.Linear.forward)
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


@pytest.mark.parametrize("config", [TINY, LIKE_FULL, dit.PRESETS["toy"]])
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


def run_benchmark(monkeypatch, capsys, *flags):
    """What --benchmark prints on one CPU process."""
    monkeypatch.setattr(train_stage2, "launch", lambda threads: (torch.device("cpu"), 0, 1))
    monkeypatch.setattr("sys.argv", ["train_stage2.py", "--benchmark", *flags])
    train_stage2.main()
    return capsys.readouterr().out


def test_full_without_a_gpu_is_counted_and_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(train_stage2, "DiT", None)  # no model is built
    out = run_benchmark(monkeypatch, capsys, "--preset", "full", "--dtype", "bfloat16", "--batch", "2")
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


def test_benchmark_prints_rates_and_parts_that_agree(monkeypatch, capsys):
    monkeypatch.setitem(train_stage2.PRESETS, "toy", LIKE_TOY)
    compiled, recomputed = [], []
    original = dit.checkpoint
    monkeypatch.setattr(dit.Block, "compile", lambda block, dynamic: compiled.append(block))
    monkeypatch.setattr(dit, "checkpoint", lambda *a, **k: recomputed.append(1) or original(*a, **k))
    out = run_benchmark(monkeypatch, capsys, "--batch", "2", "--rounds", "1")
    assert not compiled and not recomputed
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    (product,) = re.findall(r"([\d.]+) TFLOP/s in a matrix product", out)
    for kind, views in (("synthetic", 4), ("real", 1)):
        images, rate, share = map(float, re.findall(
            r"([\d.]+) images/s +([\d.]+) TFLOP/s, ([\d.]+)%", lines[f"{kind} iteration"])[0])  # fmt: skip
        operations = 2 * train_stage2.iteration_macs(LIKE_TOY, views, text_length=14)
        assert rate == pytest.approx(images / views * operations / 1e12, rel=0.01)
        assert share == pytest.approx(100 * rate / float(product), rel=0.01, abs=0.1)
    (parts,) = [line for line in out.splitlines() if line.startswith("synthetic by part")]
    assert re.findall(r"(\S+) [\d.]+(?:,|$)", parts) == ["data", "forward", "backward", "all-reduce", "optimizer"]
    assert "all-reduce 0.0," in parts
    assert 0.01 < float(re.search(r"peak memory +([\d.]+)", out)[1]) < 100
    run_benchmark(monkeypatch, capsys, "--batch", "1", "--rounds", "1", "--compile", "--grad_checkpointing")
    assert len(compiled) == LIKE_TOY.depth and len(recomputed) > LIKE_TOY.depth


def test_running_out_of_memory_is_one_clear_line(monkeypatch, capsys):
    def measure(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_stage2, "measure", measure)
    with pytest.raises(ValueError, match="--grad_checkpointing"):
        run_benchmark(monkeypatch, capsys)
