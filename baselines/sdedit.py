"""SDEdit (Meng et al. 2022; baseline 8, Sec. 5): images of another method, noised and denoised by the base model."""
import torch

from dit import add_noise
from sample import Sampling, ddim_sample, ddim_timesteps, domain_mode, guided_noise
from support.generators import EDITS, seeded_generator
from support.speed import autocast
from toy.world import tokenize


@torch.no_grad()
def sdedit(network, images, text, t=500, sampling=Sampling(), first=0):
    """Images noised to t, one noise for all views of a grid, and each view denoised alone by the base model.

    network: ShiftedDiT of the base model. images: (N, V, C, H, W) in [-1, 1], from syn_only, grids first, first + 1, ..
    of their set. text: (N, V, L) ids, what the base model is asked for, view by view. t: the noise is that of the last
    visited step that is not above it (with 50 trailing steps 499, with 25 steps 479).
    Returns (N, V, C, H, W) in [-1, 1] on the CPU.
    """
    done = []
    for k, grid in enumerate(images):
        # not of SAMPLES, which gave the front view of the grid the noise that it was drawn from
        generator = seeded_generator(EDITS, sampling.seed, first + k)
        noise = torch.randn(grid.shape[1:], generator=generator).expand(grid.shape)                 # (V, C, H, W)
        done.append(denoised_again(network, grid, noise, text[k], t, sampling))
    return torch.stack(done)


@torch.no_grad()
def denoised_again(network, images, noise, text, t, sampling, **inputs):
    """Images (B, C, H, W) in [-1, 1] with noise like them, noised to the last visited step that is not above t, and
    denoised by the network (ShiftedDiT), each alone and asked for its text (B, L). As they are where no step lies so
    low. inputs: further ones of the network, on its device, as control (B, 1, C_c, H, W)."""
    config, like = network.dit.config, network.dit.positions            # like: its device and dtype
    steps = ddim_timesteps(sampling.num_steps, sampling.spacing)
    if t < steps.min():
        return images
    start, null = steps[steps <= t].max(), {"text": tokenize([""]).to(like.device)}
    x = add_noise(images.to(like), noise.to(like), start.expand(len(images)).to(like.device))
    predict_noise = guided_noise(network, null, domain_mode("real", config.depth), sampling.cfg_scale,
                                 text=text.to(like.device), **inputs)
    with autocast(like.device, sampling.dtype):
        x0 = ddim_sample(predict_noise, x[:, None], sampling.num_steps, sampling.spacing, clip_x0=config.output_skip,
                         t_start=int(start))                                                        # (B, 1, C, H, W)
    return x0[:, 0].cpu()
