"""How to compute a training on this machine, and how long it should take, from a short trial at its start."""
import copy
import math
import os
import time
from glob import escape, glob
from typing import NamedTuple

import torch

from baselines.adapters import sees_both_domains
from baselines.methods import METHODS
from dit import PRESETS, DiT
from support.beside import end_beside, with_others
from support.launch import Launched, UsageError, check_out, launch
from support.speed import (MOST_THREADS, autocast, choose_speed, promising_dtypes, seconds_of, thread_counts,
                           time_choices)
from toy.render import render
from toy.world import sample_assets, tokenize
from training.flags import fill_defaults, stage1_comes_first, stage1_file, stage1_folder, steps_of_stage
from training.optimizers import make_optimizers
from training.sets import check_base, real_set_path
from training.states import stored_speed

IMAGES = 16                         # of the trial, over all processes: the four grids of a step of the toy
COMPILING_PAYS = 120                # seconds that a training must take at least before a compilation is tried
MOST_PROCESSES = 8                  # that a program starts of itself: each holds the data
PROCESSES_PAY = 1.3                 # how much faster they must be, each timed alone: together they lose a fifth


class Pace(NamedTuple):
    """Seconds an image takes, and what is lost once."""
    step: float
    forward: float
    compiling: float = 0.0


def launch_training(args, stage, may_spread):
    """Launches a training, completes its flags (`fill_defaults`) and looks at its base model -> Launched.

    may_spread: whether the program may start itself again and train in several processes, which on a CPU can be faster
    than as many threads: where it was started alone, and --threads and --batch are open.
    """
    end_beside()
    launched = launch(args.threads or MOST_THREADS)         # until the trial
    filled = fill_defaults(copy.copy(args), stage, launched)
    if stage != "base" or filled.base:
        check_base(filled)
    check_writable(filled, stage)
    if stage == "stage2" and not filled.no_real_data and filled.steps <= filled.real_warmup:
        raise UsageError(f"--steps {filled.steps} end within --real_warmup {filled.real_warmup}: nothing would learn "
                         "from the renders")
    is_open = args.threads is None and args.batch is None and "WORLD_SIZE" not in os.environ
    if may_spread and is_open and launched.device.type == "cpu" and not PRESETS[args.preset].latent:
        processes, threads = choose_processes(filled, resumed(filled, stage))
        if processes > 1:
            args.threads = threads
            launched = with_others(processes, threads)
    fill_defaults(args, stage, launched)
    return launched


def check_writable(args, stage):
    """Raises UsageError where what a training writes, or stage 1 on the way to stage 2, cannot be written."""
    names = [args.name]
    if stage == "stage2" and stage1_comes_first(args):
        names.append(stage1_folder(args.adapter, args.rank))
    if stage1_folder(args.adapter, args.rank) in names:
        check_out(stage1_file(args), "what --out and --name lead to,")
    for name in names:
        for ending in (".png", ".safetensors", "/log.jsonl"):
            check_out(f"{args.out}/{name}{ending}", "what --out and --name lead to,")


def resumed(args, stage):
    """Names of the trainings whose states say how a command computed before, the last one first."""
    if stage == "stage2" and METHODS[args.method].stage1 and not args.joint:
        return [args.name, stage1_folder(args.adapter, args.rank)]
    return [args.name]


def choose_processes(args, names):
    """(processes, threads of each) that compute fastest here, or with which a stopped run of one of `names` did, which
    is said where it is several. Beside a program that takes a core, processes that take turns lose less than threads
    that wait for each other."""
    before = stored_speed([f"{args.out}/{name}" for name in names])
    if before:
        processes = before.get("processes", 1)
        return processes, min(before["threads"], max(1, MOST_THREADS // processes))
    if MOST_THREADS == 1:
        return 1, 1
    print("timing a few steps in several ways, to take the fastest here", flush=True)       # up to a minute
    cpu, dtypes = torch.device("cpu"), [args.dtype] if args.dtype else promising_dtypes()
    seconds = time_choices(trial(args, cpu, IMAGES)[1], thread_counts(), dtypes)
    one, several = IMAGES / min(seconds.values()), {}                       # images a second
    for threads, dtype in seconds:
        most = min(MOST_THREADS // threads, MOST_PROCESSES)
        processes = max(count for count in range(1, most + 1) if args.batch % count == 0)
        if processes > 1:
            share = IMAGES // processes
            took = time_choices(trial(args, cpu, share, processes)[1], [threads], [dtype])
            several[processes, threads, dtype] = processes * share / min(took.values())
    if max(several.values(), default=0) < PROCESSES_PAY * one:
        return 1, MOST_THREADS
    processes, threads, dtype = max(several, key=several.get)
    print(f"fastest here: {processes} processes of {threads} thread(s) in {dtype}, up to "
          f"{several[processes, threads, dtype]:.0f} images/s (in one process {one:.0f}); --threads trains in one",
          flush=True)
    return processes, threads


def trial(args, device, images, processes=1):
    """(a new model, step(), forward()): a little of what a training does, with so many images of it, in fours, in one
    of so many processes."""
    config = PRESETS[args.preset]
    model = DiT(config).to(device)
    optimizers = make_optimizers({f"dit.{name}": p for name, p in model.named_parameters()}, args, Launched(device))
    for muon in optimizers[1:]:
        muon.param_groups[0]["params"] = muon.param_groups[0]["params"][::processes]        # its share
    x = torch.randn(images // 4, 4, config.channels, config.image_size, config.image_size, device=device)
    t, text = torch.zeros(len(x), dtype=torch.long, device=device), tokenize([""] * len(x)).to(device)

    def step():
        model(x, t, text).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    def forward():
        with torch.no_grad():
            model(x, t, text)
    return model, step, forward


def choose(args, launched, *names):
    """Completes --dtype and --compile, and sets the number of threads where --threads leaves it open: what is fastest
    here, or what a stopped run was doing -> Pace, None for latents.

    names: of the trainings that may have been stopped, the last one first. Every rank tries, as they share the cores,
    and takes rank 0's choice and the slowest one's pace.
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
    share = max(4, IMAGES // launched.world)
    model, step, forward = trial(args, device, share, launched.world)
    args.dtype, step_seconds, said = choose_speed(step, share, device, threads, args.dtype)
    with autocast(device, args.dtype):
        pace = Pace(step_seconds, min(seconds_of(forward, device) for _ in range(2)) / share)
    images = args.steps * args.batch * args.images_per_grid
    if args.compile is None and device.type == "cpu" and images * step_seconds > COMPILING_PAYS:
        pace, args.compile, more = try_compiling(model, step, (share, images), pace, args.dtype)
        said = "; ".join(part for part in (said, more) if part)
    args.compile = bool(args.compile)
    if launched.world > 1:
        chosen = [None] * launched.world
        torch.distributed.all_gather_object(chosen, (args.dtype, args.compile, pace))
        args.dtype, args.compile, _ = chosen[0]
        pace = max((pace for _, _, pace in chosen), key=lambda pace: pace.step)     # the slowest is waited for
    if said and launched.rank == 0:
        of_each = f" in each of {launched.world} processes" if launched.world > 1 else ""
        print(f"{said}{of_each}; --dtype, --threads, --compile override", flush=True)
    return pace


def try_compiling(model, step, images, pace, dtype):
    """Compiles the trial's blocks and times step() -> (Pace, whether it pays, what to say of it). Without a working
    compiler it does not. images: (of a step of the trial, of the whole training)."""
    share, whole = images
    device = next(model.parameters()).device
    try:
        for block in model.blocks:
            block.compile(dynamic=False)
        with autocast(device, dtype):
            compiling = seconds_of(step, device)
            seconds = min(seconds_of(step, device) for _ in range(2)) / share
    except Exception as error:      # whatever a compiler, or its absence, raises
        return pace, False, f"not compiled: {error!r:.80}"
    finally:
        torch.compiler.reset()      # what was compiled for the trial counts against the training's limit
    compiling *= 2                  # a training has three more shapes, which share much with the first
    pays = compiling + whole * seconds < whole * pace.step
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
    stage1 = stage1_comes_first(args)
    needs_real = not args.no_real_data or stage1 and sees_both_domains(args.adapter)
    todo = {}
    if not (args.synthetic or glob(f"{escape(args.out)}/sets/synthetic_{args.num_assets}_*")):
        todo["render the assets"] = args.num_assets * rendering
    if needs_real and not (args.real or os.path.isfile(real_set_path(args))):
        todo["draw the real set"] = args.num_assets * 4 * args.real_steps * pace.forward / launched.world
    if stage1:
        steps = args.stage1_steps or steps_of_stage(args, "stage1", launched.world)
        todo["train stage 1"] = steps * args.batch * 4 * pace.step
    todo["train stage 2"] = args.steps * args.batch * 4 * pace.step + pace.compiling
    print(f"to do: {', '.join(f'{what} ({took / 60:.1f} min)' for what, took in todo.items())}; about "
          f"{math.ceil(sum(todo.values()) / 60)} minutes on this machine", flush=True)
