"""Batches: which samples an iteration takes and what noise they get, pure functions of (seed, step, sample).

So nothing of it is part of a training's state, and two processes with half a batch each see what one sees.
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data import LATENT_SCALE, data_indices, read_rows, set_shape
from dit import T
from support.generators import NOISE, seeded_words
from support.pictures import to_pixels


def read_batch(iteration, sets, args, launched):
    """(number of its first sample within the step, this rank's samples of the iteration's set on the CPU)."""
    num, views = set_shape(sets[iteration.domain])
    count = args.batch * args.images_per_grid // views                  # a real sample is a quarter of a grid
    first = (iteration.visit * launched.world + launched.rank) * count
    domain = ("base", "syn", "real").index(iteration.domain)           # so that no two sets share an order
    batch = read_rows(sets[iteration.domain], data_indices(num, first, count, args.seed, domain))
    if launched.device.type == "cuda":          # from pinned memory the host need not wait for the copy
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return launched.rank * count, batch


def read_ahead(read, steps, workers):
    """read(step) for each of steps, in order; with workers, up to as many steps ahead of need, in as many threads."""
    if not workers:
        yield from map(read, steps)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for step in steps:
            ahead.append(pool.submit(read, step))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def draw_noise(shape, seed, step, first, count, device, timesteps=(0, T, 1)):
    """For `count` samples from number `first` of this step: t (B,), noise (B, *shape) and u (B,) uniform in [0, 1).

    timesteps: (first, last, draws), t is the least of so many uniform draws from [first, last).

    Every sample has random words of its own, so two ranks with half the batch draw what one rank draws with all of it.
    """
    low, high, draws = timesteps
    words = np.stack([seeded_words(NOISE, seed, step, k, num=2 + draws) for k in range(first, first + count)])
    noise, generator = torch.empty(count, *shape, device=device), torch.Generator(device)
    for row, word in zip(noise, words[:, 0]):
        row.normal_(generator=generator.manual_seed(int(word >> 1)))
    uniform = (words[:, 1:] >> 11) * 2.0 ** -53
    t = low + torch.from_numpy(uniform[:, 1:].min(axis=1) * (high - low)).long()
    return t.to(device), noise, torch.from_numpy(uniform[:, 0]).float().to(device)


def with_noise(batch, iteration, seed, step, first):
    """Adds to a batch what the forward process starts from: x0 (B, V, C, H, W), the clean images in the model's range;
    t (B,), noise like x0, and u (B,), which decides whether the text is dropped; and of single images in a grid their
    places (B,).

    batch: "image", uint8 pixels (B, V, C, H, W), or mean and deviation of latents (B, V, 2, C, h, w), of which the VAE
    gives a normal distribution: they are drawn anew at each visit.
    """
    image, device = batch["image"], batch["image"].device
    if image.dtype == torch.uint8:
        x0 = to_pixels(image)
        t, noise, u = draw_noise(x0.shape[1:], seed, step, first, len(x0), device, iteration.timesteps)
    else:
        mean, deviation = image.float().unbind(2)
        shape = (2, *mean.shape[1:])
        t, both, u = draw_noise(shape, seed, step, first, len(mean), device, iteration.timesteps)
        noise, z = both.unbind(1)
        x0 = LATENT_SCALE * (mean + deviation * z)
    batch = batch | dict(x0=x0, t=t, noise=noise, u=u)
    if iteration.grid:
        batch["places"] = torch.arange(first, first + len(x0), device=device) % iteration.grid
    return batch


def split_batch(batch, parts):
    """A batch in so many parts, or fewer where it is small: a list of (share of the batch, part)."""
    num = len(batch["image"])
    size = -(-num // parts)
    return [(min(size, num - k) / num, {key: value[k:k + size] for key, value in batch.items()})
            for k in range(0, num, size)]
