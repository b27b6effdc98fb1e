"""Score distillation (DreamFusion, Poole et al. 2023): what CAD (related/cad.py) is compared with.

One object is optimised until the view-conditioned model is content with all of its views. Where CAD learns a
distribution this seeks a mode: it needs high guidance, and has one object to show.
"""
import torch
import torch.nn as nn
from tqdm import tqdm

from dit import T, add_noise, alphas_cumprod
from related.triplanes import PLANE_FEATURES, RAY_FEATURES, SAMPLES_A_RAY, SIZE, Generator
from sample import domain_mode, guided_noise
from support.generators import GAN, seeded_generator, seeded_words
from toy.poses import pose_numbers, view_control
from toy.world import tokenize

STAGE = 3               # its random numbers: (GAN, seed, 3, step)


class OneObject(nn.Module):
    """A triplane and a decoder, drawn as CAD's stage 2 draws; there is one w."""
    field, draw_lifted, layers = Generator.field, Generator.draw_lifted, 1

    def __init__(self):
        super().__init__()
        self.features = nn.Parameter(0.1 * torch.randn(1, 3, PLANE_FEATURES, 2 * SIZE, 2 * SIZE))
        self.decoder = nn.Sequential(nn.Linear(PLANE_FEATURES, 64), nn.Softplus(), nn.Linear(64, 1 + RAY_FEATURES))

    def style(self, z):
        """There is nothing to choose: zeros (B, 1, 1)."""
        return torch.zeros(len(z), 1, 1, device=z.device)

    def planes(self, w, stage=2):
        """(B, 3, C, n, n), the same for each w."""
        return self.features.expand(len(w), -1, -1, -1, -1)


def score_distillation_loss(images, noise, t, predict_noise):
    """A scalar whose gradient by images (B, ...) is (1 - alpha_bar_t) (eps_theta(x_t; t) - eps) / B (eq. 3).

    noise: eps, like images; t: a scalar tensor; predict_noise(x, t) -> eps like x.
    """
    with torch.no_grad():
        off = predict_noise(add_noise(images, noise, t.expand(len(images))), t.to(images.device)) - noise
    return (1 - float(alphas_cumprod[t])) * (off * images).sum() / len(images)


def distill_score(prior, reference, reference_elevation, poses, args):
    """OneObject that the prior takes for the reference (3, H, W) in [-1, 1], seen from azimuth 0, at all poses
    (azimuth, elevation (P,)).

    args: steps, batch, lr, scale (guidance on the reference), seed. Works where the prior is, and returns the object
    on the CPU. Raises FloatingPointError at a loss that is not finite.
    """
    torch.manual_seed(int(seeded_words(GAN, args.seed, 0, STAGE)[0] >> 1))
    device = prior.dit.positions.device
    shape, reference = OneObject().to(device), reference.to(device)
    optimizer = torch.optim.Adam(shape.parameters(), lr=args.lr, betas=(0.9, 0.99))
    null = {"control": torch.zeros(1, 1, 7, SIZE, SIZE, device=device)}
    domains, text = domain_mode("real", prior.dit.config.depth), tokenize([""]).expand(args.batch, -1).to(device)
    for step in tqdm(range(args.steps), desc="score distillation"):
        generator = seeded_generator(GAN, args.seed, STAGE, step)
        pick = torch.randint(len(poses[0]), (args.batch,), generator=generator)
        azimuth, elevation = [angles[pick].to(device) for angles in poses]
        jitter = torch.rand(args.batch, SIZE ** 2, SAMPLES_A_RAY, generator=generator).to(device)
        image, _, _ = shape.draw_lifted(shape.style(azimuth), azimuth, elevation, jitter)
        numbers = pose_numbers(azimuth, elevation, torch.full_like(elevation, reference_elevation))
        control = view_control(reference.expand(len(pick), -1, -1, -1), numbers).float()
        predict_noise = guided_noise(prior, null, domains, args.scale, control=control, text=text)
        t = torch.randint(T // 50, T * 49 // 50, (), generator=generator)
        noise = torch.randn(image[:, None].shape, generator=generator).to(device)
        loss = score_distillation_loss(image[:, None], noise, t, predict_noise)
        if not loss.isfinite():
            raise FloatingPointError(f"score distillation: the loss is not finite at step {step}: try a lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return shape.requires_grad_(False).cpu()
