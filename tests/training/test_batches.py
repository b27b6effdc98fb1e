"""What an iteration takes: order, noise and parts of a batch are pure functions, whoever reads it."""

import pytest
import torch
from conftest import ALONE

from data import data_indices
from support.launch import Launched
from train_stage2 import parse_args
from toy import pretrain
from training.batches import draw_noise, read_ahead, read_batch, split_batch, with_noise
from training.flags import fill_defaults
from training.loop import Iteration


def test_every_epoch_visits_every_sample_once():
    order = data_indices(10, 0, 40, 7, 0)
    for epoch in range(4):
        assert sorted(order[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert torch.equal(torch.cat([data_indices(10, first, 5, 7, 0) for first in range(0, 40, 5)]), order)
    assert not torch.equal(data_indices(10, 0, 40, 8, 0), order)


def test_ranks_read_what_one_process_reads_and_visits_follow_each_other():
    """A batch of 2 is two grids of four views, or eight single images."""
    grids, images, cpu = torch.arange(12).view(12, 1).expand(12, 4), torch.arange(48).view(48, 1), torch.device("cpu")
    sets = {"syn": {"image": grids}, "real": {"image": images}}
    args, twice = (fill_defaults(parse_args(["--batch", batch]), "stage2", ALONE) for batch in ("2", "4"))
    for domain, count in (("syn", 2), ("real", 8)):
        seen = []
        for visit in range(3):
            ranks = [read_batch(Iteration(domain, visit), sets, args, Launched(cpu, rank, 2)) for rank in (0, 1)]
            assert [first for first, _ in ranks] == [0, count]
            both = torch.cat([batch["image"] for _, batch in ranks])
            assert torch.equal(both, read_batch(Iteration(domain, visit), sets, twice, ALONE)[1]["image"])
            seen += both[:, 0].tolist()
        assert len(seen) == len(set(seen)) == 6 * count  # an epoch


def test_noise_is_the_same_however_a_batch_is_split():
    whole = draw_noise((4, 3, 8, 8), 0, 5, 0, 6, "cpu")
    halves = [draw_noise((4, 3, 8, 8), 0, 5, first, 3, "cpu") for first in (0, 3)]
    for k in range(3):
        assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    t, noise, u = draw_noise((64,), 0, 6, 0, 4000, "cpu")
    assert t.min() >= 0 and t.max() < 1000 and abs(t.float().mean() - 499.5) < 25
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs(u.mean() - 0.5) < 0.03
    assert noise.flatten().unique().numel() > 250_000  # no sample repeats another


def test_the_least_of_several_draws_is_distributed_as_it_should():
    """Of three uniform draws: P(t >= x) = (1 - x)^3. The base model is trained so."""
    assert pretrain.base_iteration(7).timesteps == (0, 1000, 3) and pretrain.base_iteration(7).visit == 7
    t, _, _ = draw_noise((1,), 0, 6, 0, 4000, "cpu", (0, 1000, 3))
    for x in (0.1, 0.3, 0.5, 0.8):
        assert abs((t >= 1000 * x).float().mean() - (1 - x) ** 3) < 0.025


def test_pixels_and_latents_become_what_the_forward_process_starts_from():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1, 1)
    batch = with_noise({"image": pixels, "text": 1}, Iteration("real", 0), 0, 5, 2)
    t, noise, u = draw_noise((1, 1, 1, 1), 0, 5, 2, 3, "cpu")
    assert batch["x0"].flatten().tolist() == pytest.approx([-1, 1, -0.6]) and batch["text"] == 1
    assert torch.equal(batch["t"], t) and torch.equal(batch["noise"], noise) and torch.equal(batch["u"], u)
    in_grid = with_noise({"image": pixels, "text": 1}, Iteration("real", 0, grid=4), 0, 5, 2)
    assert in_grid["places"].tolist() == [2, 3, 0] and "places" not in batch
    mean, deviation = torch.randn(3, 2, 4, 5, 5), torch.rand(3, 2, 4, 5, 5)
    batch = with_noise({"image": torch.stack([mean, deviation], dim=2)}, Iteration("real", 0), 0, 5, 0)
    assert batch["x0"].shape == batch["noise"].shape == mean.shape
    z = (batch["x0"] / 0.18215 - mean) / deviation  # drawn anew: normal, and not the noise of the process
    assert 0.8 < z.std() < 1.2 and (z - batch["noise"]).abs().mean() > 0.5


def test_batches_are_read_ahead_and_in_order():
    read, seen = [], []
    for step in read_ahead(lambda step: read.append(step) or step, range(3, 9), 2):
        seen.append(step)
        assert set(range(3, min(step + 3, 9))) >= set(read) >= set(seen)
    assert seen == list(range(3, 9)) == list(read_ahead(lambda step: step, range(3, 9), 0))


def test_parts_of_a_batch_are_the_batch():
    batch = {"image": torch.arange(7), "text": torch.arange(14).view(7, 2)}
    for parts in (1, 2, 3, 9):
        found = split_batch(batch, parts)
        for key in batch:
            assert torch.equal(torch.cat([part[key] for _, part in found]), batch[key])
        assert all(len(part["image"]) / 7 == pytest.approx(share) for share, part in found)
        assert sum(share for share, _ in found) == pytest.approx(1) and len(found) <= parts
