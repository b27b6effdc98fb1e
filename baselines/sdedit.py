"""SDEdit (Meng et al. 2022; baseline 8, Sec. 5): images of another method, noised and denoised by the base model."""
import torch

from dit import add_noise
from sample import Sampling, ddim_sample, ddim_timesteps, domain_mode, guided_noise, initial_noise
from toy.world import tokenize


@torch.no_grad()
def sdedit(network, images, text, t=500, sampling=Sampling(), first=0):
    """Images noised to t, one noise for all views of a grid, and each view denoised alone by the base model.

    network: ShiftedDiT of the base model. images: (N, V, C, H, W) in [-1, 1], from syn_only, grids first, first + 1, ..
    of their set. text: (N, V, L) ids, what the base model is asked for, view by view. t: the noise is that of the last
    visited step that is not above it (with 50 trailing steps 499, with 25 steps 479).
    Returns (N, V, C, H, W) in [-1, 1] on the CPU.
    """
    config, like = network.dit.config, network.dit.positions            # like: its device and dtype
    null = {"text": tokenize([""]).to(like.device)}
    steps = ddim_timesteps(sampling.num_steps, sampling.spacing)
    start, done = steps[steps <= t].max(), []
    for k, grid in enumerate(images):
        noise = initial_noise([first + k], grid.shape[1:], sampling.seed)[0].to(like)               # (C, H, W)
        x = add_noise(grid.to(like), noise.expand(grid.shape), start.expand(len(grid)).to(like.device))
        predict_noise = guided_noise(network, null, domain_mode("real", config.depth), sampling.cfg_scale,
                                     text=text[k].to(like.device))
        views = ddim_sample(predict_noise, x[:, None], sampling.num_steps, sampling.spacing,
                            clip_x0=config.output_skip, t_start=int(start))                         # (V, 1, C, H, W)
        done.append(views.cpu()[:, 0])
    return torch.stack(done)
