"""dit.py and sample.py against diffusers itself: loss, gradients and guided DDIM (speed: compare_diffusers.py)."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from compare_diffusers import make_batch, make_models, our_loss, our_sample, their_loss, their_sample  # noqa: E402
from full.pixart import PIXART_BLOCK_NAMES  # noqa: E402

SMALL = dict(depth=2, width=32, heads=2, size=8)


@pytest.fixture(scope="module")
def models():
    return make_models(**SMALL)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 1e-3)])
def test_loss_and_gradients_are_those_of_diffusers(models, dtype, tolerance):
    theirs, ours = models
    batch = make_batch(4, size=8)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = [their_loss(theirs, *batch), our_loss(ours, *batch)]
    assert abs(losses[0] - losses[1]) < tolerance
    for model, loss in zip(models, losses):
        model.zero_grad()
        loss.backward()
    for k, block in enumerate(ours.blocks):
        for name, (_, parts) in PIXART_BLOCK_NAMES.items():
            for suffix in ("",) if name.endswith("table") else (".weight", ".bias"):
                want = [theirs.get_parameter(f"transformer_blocks.{k}.{part}{suffix}").grad for part in parts.split()]
                got = block.get_parameter(name + suffix).grad
                assert (got - torch.cat(want)).norm() < 30 * tolerance * got.norm() + 1e-7, (k, name + suffix)


def test_guided_ddim_is_that_of_diffusers(models):
    x, _, _, text, mask = make_batch(2, size=8)
    inputs = x, text, torch.randn(1, *text.shape[1:]), mask, 10
    image, same = their_sample(models[0], *inputs), our_sample(models[1], *inputs)
    assert (image - same).abs().max() < 1e-4 * image.std()
