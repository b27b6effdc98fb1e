"""AdamW and Muon: which parameter takes which, and Muon beside PyTorch's own."""

import pytest
import torch
from conftest import ALONE, random_model, trained_shifters
from train_worker import tiny_args

from domain_shifter import ShiftedDiT
from support.speed import autocast
from training.optimizers import Muon, make_optimizers, orthogonalized, orthogonalized_in_shares


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path):
    """Shifters and all that is no matrix of a block stay with AdamW."""
    params = dict(ShiftedDiT(random_model(), trained_shifters()).named_parameters())
    adamw, muon = make_optimizers(params, tiny_args(tmp_path, "--joint", "--no_freezing", "--muon"), ALONE)
    mine = {name for name in params for p in muon.param_groups[0]["params"] if p is params[name]}
    ends = ("qkv.weight", "q.weight", "kv.weight", "proj.weight", "mlp.0.weight", "mlp.2.weight")
    assert mine == {name for name in params if name.startswith("dit.blocks.") and name.endswith(ends)}
    assert len(adamw.param_groups[0]["params"]) + len(mine) == len(params)
    assert len(make_optimizers(params, tiny_args(tmp_path, "--no-muon"), ALONE)) == 1


def test_muon_is_pytorchs_muon():
    """Several shapes, tall and wide, several steps, one matrix without a gradient now and then."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((16, 16), (16, 16), (16, 48), (16, 48), (64, 16))]
    ours, theirs = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    optimizers = (
        Muon([dict(params=ours, lr_scale=3.0)], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([dict(params=theirs)], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        for k, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = None if k == step else torch.randn(p.shape)
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            with autocast(ALONE.device, "bfloat16"):
                optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        moved = (q - before).detach()
        assert (p - q).abs().max() < 0.03 * moved.abs().max()       # bf16 rounds
        assert moved.abs().max() > 0.01
        buffers = [optimizer.state[x]["momentum_buffer"] for optimizer, x in zip(optimizers, (p, q))]
        assert torch.allclose(*buffers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_has_nearly_equal_singular_values_and_is_as_long_as_adamws(dtype):
    torch.manual_seed(0)
    gradient = torch.randn(1, 48, 16) * torch.linspace(0.1, 1, 16)
    p = torch.nn.Parameter(torch.zeros(48, 16))
    p.grad = gradient[0]
    with autocast(ALONE.device, dtype):
        update = orthogonalized(gradient)[0]
        Muon([p], lr=1e-3, weight_decay=0).step()
    assert str(update.dtype) == f"torch.{dtype}"        # in bf16 a CPU without instructions for it is very slow
    values = torch.linalg.svdvals(update.double())
    assert 0.6 < values.min() and values.max() < 1.3                # of the gradient: ten times from each other
    assert p.detach().square().mean().sqrt() == pytest.approx(0.2 * 1e-3, rel=0.25)        # Liu et al. 2025


def test_an_update_in_fp32_is_the_iteration_on_singular_values():
    """Each singular value s becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5, five times, and U and V stay."""
    torch.manual_seed(0)
    gradient = torch.randn(2, 16, 48)
    U, s, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert (orthogonalized(gradient).double() - U @ torch.diag_embed(s) @ Vh).abs().max() < 1e-5


@pytest.mark.parametrize("num", [1, 2, 5])
def test_processes_compute_shares_of_the_updates_that_add_up(num, monkeypatch):
    """Each matrix by one of three processes; of one or two matrices a process has none."""
    torch.manual_seed(0)
    x, shares = torch.randn(num, 16, 48), []
    monkeypatch.setattr(torch.distributed, "all_reduce", shares.append)
    for rank in range(3):
        orthogonalized_in_shares(x, rank, 3)
    assert torch.allclose(sum(shares), orthogonalized(x), atol=1e-6)
    assert sum(share.flatten(1).any(dim=1).long() for share in shares).tolist() == num * [1]
