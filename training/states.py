"""Training states: what a training resumes from. Noise, draws and data order need none, see support/generators.py."""
import json
import os
import sys
import zlib
from glob import escape, glob
from typing import NamedTuple

import torch

from support.files import checksum, load_tensors, read_metadata, save_tensors
from support.speed import CPU_DTYPES

# flags that do not decide the result of a training; files decide by what is in them, see `made_from`
NOT_SETTINGS = ("out", "log_every", "save_every", "sample_every", "picture_steps", "compile", "grad_checkpointing",
                "accumulate", "workers", "threads", "images_per_grid", "command", "layer_selective", "benchmark",
                "seeds", "num_prompts", "rounds", "base", "shifters", "synthetic", "real")


WRITTEN = dict(step=int, settings=dict, made_from=dict, checksum=int)          # beside the tensors of a state


class Trained(NamedTuple):
    """What a training changes."""
    params: dict                        # {name: parameter} of those that require a gradient
    ema: dict                           # {name: tensor}, their running averages; empty without --ema
    optimizers: list                    # AdamW, perhaps Muon, with their moments


def training_settings(args):
    """The flags that decide the result of a training."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}


def other_settings(made, args):
    """How the settings of a trained file differ from those of args, of one process, in words; "" where they do not.
    What args leaves open (None) or one of the two does not have is not compared."""
    asked = json.loads(json.dumps(training_settings(args)))
    return ", ".join(f"{name} {made[name]} (now {value})" for name, value in asked.items()
                     if name in made and value not in (None, made[name]))


def made_from(network, sets):
    """What a training starts from, as numbers that change when the files do: of the network (base model and stage 1)
    and of each set in memory a checksum, of latents on disk how and of which objects they were made and the checksums
    in their headers."""
    made = {"network": checksum(dict(network.named_parameters()))}
    for domain, dataset in sets.items():
        if isinstance(dataset, dict):
            made[f"{domain} set"] = checksum(dataset)
        else:
            held = f"{[name for _, name in dataset.places]} {dataset.checksums}"
            made[f"{domain} set"] = [dataset.key, dataset.shape, zlib.crc32(held.encode())]
    return json.loads(json.dumps(made))


def hold(out):
    """Keeps a second process from training into `out` for as long as the file that it returns is open (and its process
    lives), and clears away what a kill in the middle of writing left. Raises ValueError where another process trains
    there, or where a folder is in the way of what will be written beside it."""
    for path in (f"{out}.png", f"{out}.safetensors"):
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder, and a file of that name will be written: move it, or use another "
                             "--out or --name")
    try:
        import fcntl
    except ImportError:                                 # Windows
        return None
    os.makedirs(out, exist_ok=True)
    file = open(f"{out}/lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process trains into {out}: let it end, or use another --out or --name") from None
    except OSError:                                     # a file system without locks
        pass
    for left in glob(f"{escape(out)}/**/*.tmp", recursive=True):
        os.remove(left)
    return file


def states_in(out):
    """The paths of the states in a run folder, the oldest first."""
    return sorted(glob(f"{escape(out)}/state_*.safetensors"))


def save_state(out, step, trained, args, world, made):
    """Writes out/state_STEP.safetensors, and keeps the one before it. For one rank to call; made: by `made_from`."""
    params, ema, optimizers = trained
    tensors = {f"param.{name}": p for name, p in params.items()} | {f"ema.{name}": p for name, p in ema.items()}
    names = {p: name for name, p in params.items()}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            tensors |= {f"{key}.{names[p]}": torch.as_tensor(value) for key, value in moments.items()}
    speed = dict(dtype=args.dtype, threads=torch.get_num_threads(), compile=args.compile, processes=world)
    path = f"{out}/state_{step:08d}.safetensors"
    save_tensors(path, tensors, step=step, made_from=made, speed=speed, checksum=checksum(tensors),
                 settings=training_settings(args) | {"batch": args.batch * world})
    kept = [other for other in states_in(out) if other <= path][-2:]
    for other in states_in(out):            # later ones are damaged, or training had gone on from them
        if other not in kept:
            os.remove(other)


def load_state(out, trained, args, world, made):
    """Restores the newest readable state in `out` and returns its step, 0 if there is none.

    Raises ValueError if that state was made with other settings, from other files, or with another batch over all
    processes (their number may be another one, it changes how sums are rounded), or where its tensors do not fit.
    """
    for path in reversed(states_in(out)):
        try:
            tensors, metadata = load_tensors(path)
        except ValueError as error:
            print(f"skipping a damaged state: {error}", file=sys.stderr)
            continue
        if not all(isinstance(metadata.get(name), kind) for name, kind in WRITTEN.items()):
            raise ValueError(f"{path} is no state of this version of the code: use another --out or --name, or delete "
                             f"{out}")
        if metadata["checksum"] != checksum(tensors):           # a disk may flip bits
            print(f"skipping a damaged state: the bytes of {path} have changed", file=sys.stderr)
            continue
        was = metadata["settings"]
        now = json.loads(json.dumps(training_settings(args) | {"batch": args.batch * world}))
        other = [f"{key} {was.get(key)} (now {now[key]})" for key in now if was.get(key) != now[key]]
        other += [f"another {name}" for name in made if metadata["made_from"].get(name) != made[name]]
        if other:
            raise ValueError(f"{path} was made with other settings: {', '.join(other)}; use another --out or --name, "
                             f"or delete {out}")
        if not fits(trained, tensors) or metadata["step"] not in range(1, args.steps + 1):
            raise ValueError(f"{path} does not fit this training: use another --out or --name, or delete {out}")
        restore(trained, tensors)
        return metadata["step"]
    return 0


def fits(trained, tensors):
    """Whether a state's tensors are those of this training: every weight and average, in its shape and finite, and
    moments of nothing else."""
    params, ema, _ = trained
    expected = {f"param.{name}": p for name, p in params.items()} | {f"ema.{name}": p for name, p in ema.items()}
    for name, p in expected.items():
        if name not in tensors or tensors[name].shape != p.shape or not tensors[name].isfinite().all():
            return False
    return all(name.partition(".")[2] in params for name in tensors)


def stored_speed(folders):
    """How the run computed whose states are in the first of `folders` that has any, {"dtype": .., "threads": ..,
    "compile": .., "processes": ..}: another way rounds otherwise. {} if there is no state."""
    for path in (path for out in folders for path in reversed(states_in(out))):
        try:
            speed = read_metadata(path).get("speed")
        except ValueError:
            continue                    # `load_state` says so
        if not isinstance(speed, dict) or speed.get("dtype") not in CPU_DTYPES:
            continue
        if all(speed.get(name, 1) in range(1, 2 ** 10) for name in ("threads", "processes")):
            return speed
    return {}


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
