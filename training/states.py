"""Training states: what a training resumes from. Noise, draws and data order need none, see support/generators.py."""
import json
import os
import sys
from glob import glob
from typing import NamedTuple

import torch

from support.files import load_tensors, save_tensors

# flags that do not decide the result of a training
NOT_SETTINGS = ("out", "log_every", "save_every", "sample_every", "picture_steps", "compile", "grad_checkpointing",
                "accumulate", "workers", "threads", "images_per_grid", "command", "layer_selective", "benchmark",
                "seeds", "num_prompts", "rounds")


class Trained(NamedTuple):
    """What a training changes."""
    params: dict                        # {name: parameter} of those that require a gradient
    ema: dict                           # {name: tensor}, their running averages; empty without --ema
    optimizers: list                    # AdamW, perhaps Muon, with their moments


def training_settings(args):
    """The flags that decide the result of a training."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}


def save_state(out, step, trained, args, world):
    """Writes out/state_STEP.safetensors, and keeps the one before it. For one rank to call."""
    params, ema, optimizers = trained
    tensors = {f"param.{name}": p for name, p in params.items()} | {f"ema.{name}": p for name, p in ema.items()}
    names = {p: name for name, p in params.items()}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            tensors |= {f"{key}.{names[p]}": torch.as_tensor(value) for key, value in moments.items()}
    save_tensors(f"{out}/state_{step:08d}.safetensors", tensors, step=step,
                 settings=training_settings(args) | {"processes": world})
    for old in sorted(glob(f"{out}/state_*.safetensors"))[:-2]:
        os.remove(old)


def load_state(out, trained, args, world):
    """Restores the newest readable state in `out` and returns its step, 0 if there is none.

    Raises ValueError if that state was made with other settings, or by another number of processes, which see other
    data.
    """
    for path in sorted(glob(f"{out}/state_*.safetensors"), reverse=True):
        try:
            tensors, metadata = load_tensors(path)
        except ValueError as error:
            print(f"skipping a damaged state: {error}", file=sys.stderr)
            continue
        was, now = metadata["settings"], json.loads(json.dumps(training_settings(args) | {"processes": world}))
        other = [f"{key} {was.get(key)} (now {now[key]})" for key in now if was.get(key) != now[key]]
        if other:
            raise ValueError(f"{path} was made with other settings: {', '.join(other)}; use another --out or --name, "
                             f"or delete {out}")
        restore(trained, tensors)
        return metadata["step"]
    return 0


def restore(trained, tensors):
    """Copies the tensors of a state into parameters, averages and optimizers."""
    params, ema, optimizers = trained
    for name, p in params.items():
        p.data.copy_(tensors[f"param.{name}"])
        if ema:
            ema[name].copy_(tensors[f"ema.{name}"])
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        moment, _, name = key.partition(".")
        if moment in ("param", "ema"):
            continue
        p, optimizer = params[name], owner[params[name]]
        on_cpu = moment == "step" and not optimizer.defaults["fused"]   # a fused optimizer counts steps on the device
        optimizer.state[p][moment] = value if on_cpu else value.to(p.device)


def check_ranks(start, out, world):
    """Refuses processes that found different states: their gradients would be averaged over different steps."""
    starts = [start] * world
    if world > 1:
        torch.distributed.all_gather_object(starts, start)
    if len(set(starts)) > 1:
        raise ValueError(f"the processes would go on from different steps, {starts}: all nodes must see the same {out}")
