"""Random numbers are functions of their key."""

import torch

from support.generators import seeded_generator


def test_generators_are_functions_of_their_key():
    def draw(*key):
        return torch.rand((), generator=seeded_generator(*key)).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(a, b) for a in range(20) for b in range(20)}) == 400
