"""Randomness without state: every random number is a pure function of a few whole numbers.

So data order, noise and draws need no state to resume from, and they are the same at any number of processes, workers
and batches. Each family of generators has a first key of its own, so that none repeats another's numbers.
"""
import numpy as np
import torch

ORDER = 1               # (ORDER, seed, domain, epoch): the order of a set
NOISE = 2               # (NOISE, seed, step, sample): timestep, noise and text dropout of a training sample
DRAWS = 3               # (DRAWS, seed, step): i and j of an iteration (Sec. 4.2)
SAMPLES = 4             # (SAMPLES, seed, key): the initial noise of a sample
GAN = 5                 # (GAN, seed, stage, step): a step of CAD's GAN; stage 0: what is drawn with it
EDITS = 6               # (EDITS, seed, key): the noise that SDEdit adds to a sample


def seeded_words(*key, num=1):
    """num random 64-bit words, a pure function of some whole numbers, such as (NOISE, seed, step, sample)."""
    return np.random.SeedSequence(key).generate_state(num, np.uint64)


def seeded_generator(*key, device="cpu"):
    """A torch.Generator that is a pure function of some whole numbers."""
    return torch.Generator(device).manual_seed(int(seeded_words(*key)[0] >> 1))
