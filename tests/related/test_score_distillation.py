"""Score distillation: its gradient, and an object that comes to look as the prior says."""
from argparse import Namespace
from dataclasses import replace

import torch
from conftest import TINY, random_model

from dit import add_noise, alphas_cumprod
from related.score_distillation import OneObject, distill_score, score_distillation_loss
from related.triplanes import SIZE
from related.view_prior import ViewPrior, new_prior


def test_the_gradient_is_the_weighed_error_of_the_noise():
    images = torch.randn(3, 1, 3, 4, 4, requires_grad=True)
    noise, t, scale = torch.randn(images.shape), torch.tensor(700), torch.randn(images.shape)
    score_distillation_loss(images, noise, t, lambda x, t: scale * x).backward()
    alpha_bar = float(alphas_cumprod[700])
    x_t = add_noise(images, noise, t.expand(3)).detach()
    assert torch.allclose(images.grad, (1 - alpha_bar) * (scale * x_t - noise) / 3, atol=1e-6)


class GrayPrior(ViewPrior):
    """Knows that all images are gray: eps = (x_t - sqrt(alpha_bar) gray) / sqrt(1 - alpha_bar)."""

    def forward(self, x, t, text, control, domains=None):
        alpha_bar = alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * -0.5) / (1 - alpha_bar).sqrt()


def test_an_object_becomes_what_the_prior_says():
    prior = GrayPrior(new_prior(random_model(replace(TINY, image_size=SIZE))).dit)
    poses = torch.tensor([0.0, 120, 240]), torch.tensor([15.0, 20, 25])
    args = Namespace(steps=40, batch=1, lr=0.02, scale=1.0, seed=0)
    reference = torch.zeros(3, SIZE, SIZE)
    shape = distill_score(prior, reference, 20.0, poses, args)
    torch.manual_seed(0)
    before = OneObject()

    def middle(made):
        image, _, _ = made.draw_lifted(made.style(poses[0]), *poses)
        return (image[:, :, 10:22, 10:22] + 0.5).abs().mean().item()
    assert middle(shape) < 0.6 * middle(before)
    args.steps = 3
    one, again = (distill_score(prior, reference, 20.0, poses, args) for _ in range(2))
    assert torch.equal(one.features, again.features)
