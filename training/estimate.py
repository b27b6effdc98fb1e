"""How long a training should take on this machine, from a short trial at its start."""
import os
import time
from glob import glob

import torch

from baselines.adapters import sees_both_domains
from baselines.methods import METHODS
from dit import PRESETS
from support.launch import seconds_of
from toy.render import render
from toy.world import sample_assets, tokenize
from training.flags import steps_of_stage
from training.sets import base_model, real_set_path


def step_seconds(args, device):
    """Seconds a training step and a forward pass take for each image, from a short trial of the base model."""
    config, images = PRESETS[args.preset], 16
    model = base_model(args, device)
    x = torch.randn(images, 1, config.channels, config.image_size, config.image_size, device=device)
    t, text = torch.zeros(images, dtype=torch.long, device=device), tokenize([""] * images).to(device)

    def third(work):                                                # the first two warm up
        return [seconds_of(work, device) for _ in range(3)][-1] / images
    with torch.no_grad():
        forward = third(lambda: model(x, t, text))
    return third(lambda: model(x, t, text).square().mean().backward()), forward


def announce(args, stage1_file, launched):
    """Prints what train_stage2.py will do and how long that should take: what is missing before it, and stage 2.

    stage1_file: where stage 1 leaves its shifters or adapter. Nothing for latents, whose stages are started by hand.
    """
    config = PRESETS[args.preset]
    if config.latent or launched.rank > 0:
        return
    step, forward = step_seconds(args, launched.device)
    start = time.perf_counter()
    render(sample_assets(16, 0), size=config.image_size, device=launched.device)
    rendering = (time.perf_counter() - start) / 16
    stage1 = METHODS[args.method].stage1 and not args.joint and not os.path.isfile(args.shifters or stage1_file)
    needs_real = not args.no_real_data or stage1 and sees_both_domains(args.adapter)
    todo = {}
    if not (args.synthetic or glob(f"{args.out}/sets/synthetic_{args.num_assets}_*")):
        todo["render the assets"] = args.num_assets * rendering
    if needs_real and not (args.real or os.path.isfile(real_set_path(args))):
        todo["draw the real set"] = args.num_assets * 4 * args.real_steps * forward / launched.world
    if stage1:
        steps = args.stage1_steps or steps_of_stage(args, "stage1", launched.world)
        todo["train stage 1"] = steps * args.batch * 4 * step
    todo["train stage 2"] = args.steps * args.batch * 4 * step
    print(f"to do: {', '.join(f'{what} ({took / 60:.1f} min)' for what, took in todo.items())}; about "
          f"{sum(todo.values()) / 60:.0f} minutes on this machine", flush=True)
