"""The flags that every training takes, and their defaults: a row for each preset and stage."""
import argparse
import math
import os
import re
import sys

from baselines.adapters import ADAPTERS, adapter_rank, sees_both_domains
from baselines.methods import METHODS
from data import ASSETS
from dit import PRESETS, T
from support.launch import UsageError, finite
from support.speed import CPU_DTYPES

# The paper's protocol (C.2), at every size: one learning rate for both stages and all methods; EPOCHS of the
# assets; GRIDS_A_STEP grids of V = 4 views a step, over all processes (a real grid: four single images).
EPOCHS = {"stage1": 3, "stage2": 10}        # what is trained alone; models
GRIDS_A_STEP = {"toy": 4, "small": 16, "full": 512}         # 64 GPUs at batch 8
GRIDS_A_PART = 8                            # at full, the most grids that a process computes at once

# What the paper has no words for: base models (images a step, over all processes) and the experiment of A.2 (grids).
#                            steps  a step
LENGTHS = {
    ("toy", "base"):        (24000,  128),
    ("small", "base"):      (100000, 256),
    ("toy", "selective"):   (300,      4),
    ("toy", "scenes"):      (4000,   128),      # the base model of RefAny3D, from the toy's: images
    ("toy", "refany3d"):    (1000,     8),      # RefAny3D (related/): scenes
    ("toy", "view_prior"):  (3000,    32),      # the prior of CAD (related/): images
    ("full", "refany3d"):   (30000,    8),      # its paper's steps, a scene on each of its GPUs
}
#                            lr   warmup  weight decay  EMA
DEFAULTS = {
    ("toy", "base"):        (1e-3,   200,         0.01, 0.999),
    ("toy", "stage1"):      (1e-3,    40,          0.0,   0.0),
    ("toy", "stage2"):      (1e-3,    50,         0.01,  0.99),
    ("toy", "selective"):   (2e-4,    20,         0.01,  0.98),     # layer-selective training (A.2)
    ("toy", "scenes"):      (1e-3,   100,         0.01, 0.999),
    ("toy", "refany3d"):    (3e-3,    50,          0.0,  0.99),
    ("toy", "view_prior"):  (1e-3,    50,         0.01,  0.99),
    ("small", "base"):      (3e-4,  1000,         0.01, 0.9999),
    ("small", "stage1"):    (1e-4,   100,          0.0,   0.0),
    ("small", "stage2"):    (1e-4,   200,         0.01, 0.999),
    ("full", "stage1"):     (5e-5,   100,          0.0,   0.0),
    ("full", "stage2"):     (5e-5,   100,         0.01,   0.0),
    ("full", "refany3d"):   (1e-4,   100,          0.0,   0.0),
}
COLUMNS_OF_DEFAULTS = ("lr", "warmup", "weight_decay", "ema")

# the least and the most that each of these may be
LEAST = dict(batch=1, rank=1, log_every=1, save_every=1, sample_every=1, picture_steps=1, real_steps=1, num_assets=1,
             num_base_images=1, stage1_steps=1, accumulate=1, threads=1, workers=0, warmup=0, real_warmup=0, seed=0,
             lr=0, clip=1e-6, weight_decay=0, ema=0, text_dropout=0, p_B=0, tau_B=0,
             steps=1)                                                           # last, as it follows from the others
MOST = dict(threads=2 ** 10, batch=2 ** 16, rank=2 ** 13, picture_steps=T, real_steps=T, num_assets=10 ** 8,
            num_base_images=10 ** 8, stage1_steps=10 ** 8, workers=2 ** 8, seed=2 ** 63 - 1, lr=10, ema=1,
            text_dropout=1, p_B=1, tau_B=1, steps=10 ** 8)


def training_arguments(parser):
    """Adds the flags that every training takes; those of DEFAULTS are None until `fill_defaults`."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="toy", help="size of model and world (default toy)")
    add("--out", help="run folder (default runs/PRESET)")
    add("--name", help="name of this training below the run folder (default says what it is)")
    add("--base", help="base model: a checkpoint of ours, or PixArt-alpha's .pth or safetensors (default: the run "
                       "folder's, else the one shipped in weights/; of RefAny3D the one that knows scenes)")
    add("--synthetic", help="synthetic set; full: folder of python -m full.latents encode (toy, small: a safetensors "
        "file, default is to render it; one of your own takes a --real too)")
    add("--real", help="real set; full: folder of python -m full.real_set (toy, small: a safetensors file, default is "
        "to let the base model draw it)")
    add("--num_assets", type=int, help="assets of the synthetic set: how many the toy world renders, and with a "
        f"--synthetic of your own how many an epoch has (default by preset: {ASSETS})")
    add("--real_steps", type=int, default=10, help="DDIM steps for the images of the real set (default %(default)s)")
    for flag, kind, text in (
            ("steps", int, "training steps"),
            ("batch", int, "per process: grids of four views, of a base model images"),
            ("lr", finite, "learning rate after warm-up"),
            ("warmup", int, "steps of linear warm-up"),
            ("weight_decay", finite, "the optimizer's"),
            ("ema", finite, "decay of the weights' running average, 0 = none")):
        add(f"--{flag}", type=kind, help=f"{text} (default by preset and stage)")
    add("--muon", action=argparse.BooleanOptionalAction, help="Muon for the blocks' matrices, at three times --lr, and "
        "AdamW for the rest (default: at toy and small, where the blocks train)")
    add("--loss", choices=("epsilon", "even"), help="plain epsilon loss as in the paper (default at full), or "
        "divided by alpha_bar so that noise levels weigh alike (default at toy and small: few pixels)")
    add("--clip", type=finite, default=1.0, help="largest norm of the gradient (default %(default)s)")
    add("--text_dropout", type=finite, default=0.1, help="how often the caption is dropped, for guidance (default "
        "%(default)s)")
    add("--seed", type=int, default=0, help="decides initial weights, data order, noise and draws "
        "(default %(default)s)")
    add("--dtype", choices=CPU_DTYPES, help="autocast (default bfloat16 on CUDA; on a CPU what is faster in a trial)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile each block (default: on a CPU, where "
        "a trial says that it pays)")
    add("--accumulate", type=int, help="parts that a batch is computed in, one after the other: less memory, same "
        f"result (default 1; full: of {GRIDS_A_PART} grids at most)")
    add("--workers", type=int, help="threads that read batches ahead (default 2 on CUDA, 0 elsewhere)")
    add("--grad_checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    add("--threads", type=int, help="CPU threads of each process (default: the fastest in a trial; without --batch too "
        "it may start more processes)")
    add("--log_every", type=int, default=20, help="steps between lines of log.jsonl (default %(default)s)")
    add("--save_every", type=int, default=250, help="steps between states to resume from (default %(default)s)")
    add("--sample_every", type=int, default=500, help="steps between pictures of samples (default %(default)s)")
    add("--picture_steps", type=int, default=25, help="DDIM steps for those pictures (default %(default)s)")


def parse_training(parser, script, argv):
    """The flags argv (None: the command line's) of a script, and as .command how to type them, for the record."""
    args = parser.parse_args(argv)
    args.command = " ".join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    return args


def refuse_unread(parser, args, flags, where):
    """Ends with a line of usage at the first of `flags` that was given although nothing reads it there."""
    for flag in flags:
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} would do nothing {where}")


def fill_defaults(args, stage, launched):
    """Completes the flags from DEFAULTS and checks their ranges. Raises ValueError."""
    if (args.preset, stage) not in DEFAULTS:
        raise UsageError(f"preset {args.preset} has no {stage} training"
                         + (": its base model comes from a file (--base)" if stage == "base" else ""))
    fill_length(args, stage, launched.world)
    for name, value in zip(COLUMNS_OF_DEFAULTS, DEFAULTS[args.preset, stage]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    on_cuda, config = launched.device.type == "cuda", PRESETS[args.preset]
    args.out = args.out or f"runs/{args.preset}"
    args.rank = adapter_rank(args.adapter, config) if args.rank is None else args.rank
    if args.name is None:
        args.name = stage1_folder(args.adapter, args.rank) if stage == "stage1" else stage
    if args.muon is None:
        backbone = METHODS[getattr(args, "method", "realiz3d")].backbone
        blocks_train = stage in ("base", "scenes", "selective", "view_prior") or stage == "stage2" and backbone
        args.muon = args.preset != "full" and blocks_train
    if args.workers is None:
        args.workers = 2 if on_cuda else 0
    args.loss = args.loss or ("even" if config.output_skip else "epsilon")
    if args.loss == "even" and not config.output_skip:          # its weight at t = 999 would be 25,000
        raise UsageError("--loss even is for networks whose output is corrected for the noise level: toy and small")
    args.images_per_grid = 1 if stage in ("base", "scenes", "view_prior") else config.num_views
    if stage == "refany3d":                     # what a scene costs: with its views, each in colours and perhaps as map
        args.images_per_grid = (1 + args.num_references) * (1 + args.points)
    for name, least in LEAST.items():
        value, most = getattr(args, name, None), MOST.get(name, math.inf)
        if value is not None and not least <= value <= most:
            allowed = f"be at least {least}" if most == math.inf else f"lie in [{least}, {most}]"
            raise UsageError(f"--{name} must {allowed}, not {value}")
    check_name(args.name, stage)
    return args


def check_name(name, stage):
    """Refuses a name that is no plain one, or that another stage's folder or file has in the run folder."""
    plain = os.path.basename(name) == name and name.isprintable() and name.strip() not in ("", ".", "..", "sets")
    left_by_stage1 = re.fullmatch(f"({'|'.join(('shifters', *ADAPTERS))})(_[0-9]+)?", name)
    of_another_stage = any(name.startswith(other) for other in ("base", "scenes", "stage1") if other != stage)
    if not plain or left_by_stage1 or of_another_stage:
        raise UsageError(f"--name {name!r} is no plain name, or another file's in the run folder: choose another")


def fill_length(args, stage, world):
    """Completes assets, batch, parts and steps, at any number of processes.

    One pass over the synthetic set is an epoch, for every method: stage 2 takes 10 of them, and its real iterations
    come on top; what is trained alone (stage 1) takes 3 of each domain it sees. Where GRIDS_A_STEP do not divide among
    the processes, a step takes more, and there are fewer of them.
    """
    args.num_assets = ASSETS[args.preset] if args.num_assets is None else args.num_assets
    steps, a_step = LENGTHS.get((args.preset, stage), (None, GRIDS_A_STEP[args.preset]))
    if args.batch is None:
        args.batch = math.ceil(a_step / world)
    if args.accumulate is None:
        args.accumulate = max(1, math.ceil(args.batch / GRIDS_A_PART)) if args.preset == "full" else 1
    if args.steps is None:
        args.steps = steps or steps_of_stage(args, stage, world)


def steps_of_stage(args, stage, world):
    """Steps of stage 1 or 2 with the batch and the assets of args."""
    one_domain = math.ceil(EPOCHS[stage] * args.num_assets / (max(1, args.batch) * world))
    if stage == "stage1":
        return one_domain * (2 if sees_both_domains(args.adapter) else 1)
    return one_domain if args.no_real_data else 2 * one_domain + args.real_warmup


def stage1_name(adapter, rank):
    """What stage 1 leaves is called so: "shifters" for the paper's, of rank 8; else as "lora_32"."""
    return "shifters" if (adapter, rank) == ("shifters", 8) else f"{adapter}_{rank}"


def stage1_file(args):
    """Where stage 1 leaves its shifters, or a baseline's adapter."""
    return f"{args.out}/{stage1_name(args.adapter, args.rank)}.safetensors"


def stage1_comes_first(args):
    """Whether a command of stage 2 has to train its stage 1 on the way."""
    return METHODS[args.method].stage1 and not args.joint and not os.path.isfile(args.shifters or stage1_file(args))


def stage1_folder(adapter, rank):
    """The name of a stage 1 below the run folder: "stage1" for the paper's."""
    name = stage1_name(adapter, rank)
    return "stage1" if name == "shifters" else f"stage1_{name}"
