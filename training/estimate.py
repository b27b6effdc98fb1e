"""How to compute a training on this machine, and how long it should take, from a short trial at its start."""
import copy
import os
import time
from glob import glob
from typing import NamedTuple

import torch

from baselines.adapters import sees_both_domains
from baselines.methods import METHODS
from dit import PRESETS, DiT
from support.launch import launch, with_others
from support.speed import CPU_DTYPES, MOST_THREADS, autocast, choose_speed, seconds_of, thread_counts, time_choices
from toy.render import render
from toy.world import sample_assets, tokenize
from training.flags import fill_defaults, stage1_file, stage1_folder, steps_of_stage
from training.sets import check_base, real_set_path
from training.states import stored_speed

IMAGES = 16                         # that the trial computes at once: the toy's four grids of a step
COMPILING_PAYS = 120                # seconds that a training must take at least before a compilation is tried
PROCESSES_PAY = 1.15                # how much faster several processes must be than one


class Pace(NamedTuple):
    """Seconds an image takes, and what is lost once."""
    step: float
    forward: float
    compiling: float = 0.0


def launch_training(args, stage, may_spread):
    """Launches a training, completes its flags (`fill_defaults`) and looks at its base model -> Launched.

    may_spread: whether the program may start itself again, to train in several processes, which on a CPU can be faster
    than as many threads and minds other programs less: where it was started alone, and --threads and --batch are open.
    """
    launched = launch(args.threads or MOST_THREADS)         # until the trial
    alone = fill_defaults(copy.copy(args), stage, launched)
    if stage != "base":
        check_base(alone)
    opened = may_spread and args.threads is None and args.batch is None and "WORLD_SIZE" not in os.environ
    if opened and launched.device.type == "cpu" and not PRESETS[args.preset].latent:
        processes, args.threads = choose_processes(alone, resumed(alone, stage))
        if processes > 1:
            launched = with_others(processes, args.threads)
        else:
            args.threads = None
    fill_defaults(args, stage, launched)
    return launched


def resumed(args, stage):
    """Names of the trainings that a command may go on with, the last one first: of stage 2, and of the stage 1 before it
    where that has not ended."""
    if stage == "stage2" and METHODS[args.method].stage1 and not os.path.isfile(args.shifters or stage1_file(args)):
        return [args.name, stage1_folder(args.adapter, args.rank)]
    return [args.name]


def choose_processes(args, names):
    """(processes, threads of each) that compute fastest here, or with which a stopped run did, see `choose`; (1, None)
    leaves the threads to it. Says so where it is several."""
    before = stored_speed([f"{args.out}/{name}" for name in names])
    if before:
        return before.get("processes", 1), before["threads"]
    step, _ = trial(PRESETS[args.preset], torch.device("cpu"))[1:]
    seconds = time_choices(step, thread_counts(), [args.dtype] if args.dtype else CPU_DTYPES)
    images = {}                                             # a second, of (processes, threads)
    for (threads, _), took in seconds.items():
        processes = max(count for count in range(1, MOST_THREADS // threads + 1) if args.batch % count == 0)
        images[processes, threads] = max(images.get((processes, threads), 0), processes * IMAGES / took)
    one = max((speed for (processes, _), speed in images.items() if processes == 1), default=0)
    processes, threads = max(images, key=images.get)
    best = images[processes, threads]
    if processes == 1 or best < PROCESSES_PAY * one:
        return 1, None
    print(f"fastest here: {processes} processes of {threads} thread(s), about {best:.0f} images/s (in one process "
          f"{one:.0f}); --threads trains in one", flush=True)
    return processes, threads


def trial(config, device):
    """(a new model, step(), forward()): a little of what a training does, with IMAGES images of it."""
    model = DiT(config).to(device)
    x = torch.randn(IMAGES // 4, 4, config.channels, config.image_size, config.image_size, device=device)
    t, text = torch.zeros(len(x), dtype=torch.long, device=device), tokenize([""] * len(x)).to(device)

    def step():
        model(x, t, text).square().mean().backward()

    def forward():
        with torch.no_grad():
            model(x, t, text)
    return model, step, forward


def choose(args, launched, *names):
    """Completes --dtype and --compile, and sets the number of threads where --threads leaves it open: what is fastest
    here, or what a stopped run was doing -> Pace, None for latents.

    names: of the trainings that may have been stopped, the last one first. Every rank tries, as they share the cores,
    and takes rank 0's choice.
    """
    config, device = PRESETS[args.preset], launched.device
    before = stored_speed([f"{args.out}/{name}" for name in names])
    args.dtype = args.dtype or before.get("dtype")
    if args.compile is None:
        args.compile = before.get("compile")
    threads = args.threads or min(before.get("threads", 0), MOST_THREADS)
    if threads:
        torch.set_num_threads(threads)
    if config.latent:               # too large for a trial: on GPUs, where there is nothing to choose
        args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        args.compile = bool(args.compile)
        return None
    model, step, forward = trial(config, device)
    args.dtype, step_seconds, said = choose_speed(step, IMAGES, device, threads, args.dtype)
    with autocast(device, args.dtype):
        pace = Pace(step_seconds, min(seconds_of(forward, device) for _ in range(2)) / IMAGES)
    images = args.steps * args.batch * args.images_per_grid
    if args.compile is None and device.type == "cpu" and images * step_seconds > COMPILING_PAYS:
        pace, args.compile, more = try_compiling(model, step, images, pace, args.dtype)
        said = "; ".join(part for part in (said, more) if part)
    args.compile = bool(args.compile)
    if launched.world > 1:
        chosen = [(args.dtype, args.compile, pace)]
        torch.distributed.broadcast_object_list(chosen)
        args.dtype, args.compile, pace = chosen[0]
    if said and launched.rank == 0:
        of_each = f" in each of {launched.world} processes" if launched.world > 1 else ""
        print(f"{said}{of_each}; --dtype, --threads, --compile override", flush=True)
    return pace


def try_compiling(model, step, images, pace, dtype):
    """Compiles the trial's blocks and times step() -> (Pace, whether it pays, what to say of it). Without a working
    compiler it does not."""
    device = next(model.parameters()).device
    try:
        for block in model.blocks:
            block.compile(dynamic=False)
        with autocast(device, dtype):
            compiling = seconds_of(step, device)
            seconds = min(seconds_of(step, device) for _ in range(2)) / IMAGES
    except Exception as error:      # whatever a compiler, or its absence, raises
        return pace, False, f"not compiled: {error!r:.80}"
    finally:
        torch.compiler.reset()      # what was compiled for the trial counts against the training's limit
    compiling *= 2                  # a training has three more shapes, which share much with the first
    pays = compiling + images * seconds < images * pace.step
    said = f"compiled {1 / seconds:.0f} images/s, after {compiling:.0f} s: {'--compile' if pays else '--no-compile'}"
    return (Pace(seconds, pace.forward, compiling), True, said) if pays else (pace, False, said)


def announce(args, launched):
    """Prints what train_stage2.py will do and how long that should take: what is missing before it, and stage 2.

    Nothing is said of latents, whose stages are started by hand.
    """
    config = PRESETS[args.preset]
    pace = choose(args, launched, *resumed(args, "stage2"))
    if config.latent or launched.rank > 0:
        return
    start = time.perf_counter()
    render(sample_assets(16, 0), size=config.image_size, device=launched.device)
    rendering = (time.perf_counter() - start) / 16
    stage1 = METHODS[args.method].stage1 and not args.joint and not os.path.isfile(args.shifters or stage1_file(args))
    needs_real = not args.no_real_data or stage1 and sees_both_domains(args.adapter)
    todo = {}
    if not (args.synthetic or glob(f"{args.out}/sets/synthetic_{args.num_assets}_*")):
        todo["render the assets"] = args.num_assets * rendering
    if needs_real and not (args.real or os.path.isfile(real_set_path(args))):
        todo["draw the real set"] = args.num_assets * 4 * args.real_steps * pace.forward / launched.world
    if stage1:
        steps = args.stage1_steps or steps_of_stage(args, "stage1", launched.world)
        todo["train stage 1"] = steps * args.batch * 4 * pace.step
    todo["train stage 2"] = args.steps * args.batch * 4 * pace.step + pace.compiling
    print(f"to do: {', '.join(f'{what} ({took / 60:.1f} min)' for what, took in todo.items())}; about "
          f"{sum(todo.values()) / 60:.0f} minutes on this machine", flush=True)
