"""SDEdit against a loop over single views, written out."""

import torch
from conftest import random_model

from baselines.sdedit import sdedit
from dit import alphas_cumprod
from domain_shifter import REAL, ShiftedDiT, uniform_domains
from sample import Sampling, ddim_timesteps, initial_noise
from support.generators import EDITS, seeded_generator


def test_sdedit_denoises_each_view_alone_from_one_noise():
    """Against a loop over single views by hand; equal views stay equal, as all views of a grid share the noise."""
    base, sampling = ShiftedDiT(random_model()).eval(), Sampling(num_steps=10, seed=4)
    c, size = 3, base.dit.config.image_size
    images = torch.rand(2, 4, c, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    images[1] = images[1, :1]
    text = torch.tensor([[[5, 6, v] for v in range(1, 5)], [[7, 8, 1]] * 4])
    got = sdedit(base, images, text, t=500, sampling=sampling)
    assert torch.allclose(got[1], got[1, :1], atol=1e-5) and not torch.allclose(got[0, 0], got[0, 1], atol=1e-2)
    alone = sdedit(base, images[1:], text[1:], t=500, sampling=sampling, first=1)
    assert torch.equal(alone[0], got[1])
    steps = ddim_timesteps(10)
    steps = steps[steps <= 500]
    assert steps[0] == 499
    noise = torch.randn(c, size, size, generator=seeded_generator(EDITS, 4, 0))
    assert not torch.isclose(initial_noise([0], (4, c, size, size), 4)[0], noise).all(dim=(1, 2, 3)).any()  # DDIM's own
    a = alphas_cumprod[499]
    x = (a.sqrt() * images[0, 2] + (1 - a).sqrt() * noise).float()[None, None]
    with torch.no_grad():
        for t in steps:
            eps = base(x, t.expand(1), text[0, 2:3], uniform_domains(REAL, base.dit.config.depth, 1))
            a, b = alphas_cumprod[t], alphas_cumprod[t - 100] if t >= 100 else torch.tensor(1.0).double()
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            x = (b.sqrt() * x0 + (1 - b).sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt()).float()
    assert torch.allclose(got[0, 2], x[0, 0], atol=1e-4)


def test_the_noise_is_that_of_the_last_visited_step_not_above_t(monkeypatch):
    """As the docstring has it: 499 of 50 steps, 479 of 25."""
    seen, network = [], ShiftedDiT(random_model()).eval()
    network.dit.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1].max())))
    for num_steps, first in ((50, 499), (25, 479), (10, 499)):
        seen.clear()
        sdedit(network, torch.zeros(1, 1, 3, 8, 8), torch.ones(1, 1, 5).long(), sampling=Sampling(num_steps=num_steps))
        assert seen[0] == first and len(seen) == num_steps // 2
