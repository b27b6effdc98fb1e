"""The flags that every training takes, and their defaults: a row for each preset and stage."""
import math
import sys

from baselines.adapters import adapter_rank, sees_both_domains
from dit import PRESETS

# Images are counted in grids of V = 4 views in stages 1 and 2 (a real grid: four single images), one by one at base.
#                            steps  batch  lr    warmup  weight decay  EMA
DEFAULTS = {
    ("toy", "base"):        (3000,    64, 1e-3,    200,         0.01, 0.998),
    ("toy", "stage1"):      ( 600,     4, 2e-3,     40,          0.0,   0.0),
    ("toy", "stage2"):      (1600,     4, 2e-4,     50,         0.01,  0.99),
    ("toy", "selective"):   ( 300,     4, 2e-4,     20,         0.01,  0.98),    # layer-selective training (A.2)
    ("small", "base"):      (100000, 256, 3e-4,   1000,         0.01, 0.9999),
    ("small", "stage1"):    (2000,    16, 5e-4,    100,          0.0,   0.0),
    ("small", "stage2"):    (20000,   16, 5e-5,    200,         0.01, 0.999),
    ("full", "stage1"):     (None,  None, 5e-5,    100,          0.0,   0.0),    # steps and batch: `full_length`
    ("full", "stage2"):     (None,  None, 5e-5,    100,         0.01,   0.0),
}
COLUMNS_OF_DEFAULTS = ("steps", "batch", "lr", "warmup", "weight_decay", "ema")

# The paper's scale (C.2): 120K assets, 64 GPUs at batch 8, 10 epochs; what is trained alone, 3
FULL_ASSETS, GRIDS_A_STEP, GRIDS_A_PART, FULL_EPOCHS = 120_000, 512, 8, {"stage1": 3, "stage2": 10}

# the least that each of these may be
LEAST = dict(steps=1, batch=1, rank=1, log_every=1, save_every=1, sample_every=1, picture_steps=1, real_steps=1,
             num_assets=1, accumulate=1, workers=0, warmup=0, seed=0)


def training_arguments(parser):
    """Adds the flags that every training takes; those of DEFAULTS are None until `fill_defaults`."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="toy", help="size of model and world (default toy)")
    add("--out", help="run folder (default runs/PRESET)")
    add("--name", help="name of this training below the run folder (default says what it is)")
    add("--base", help="base model: a checkpoint of ours, or PixArt-alpha's .pth or safetensors (default: the run "
                       "folder's, else the one shipped in weights/)")
    add("--synthetic", help="synthetic set; full: folder of python -m full.latents encode (toy, small: a safetensors "
        "file, default is to render it)")
    add("--real", help="real set; full: folder of python -m full.real_set (toy, small: a safetensors file, default is "
        "to let the base model draw it)")
    add("--num_assets", type=int, default=640, help="assets of the synthetic set the toy world renders")
    add("--real_steps", type=int, default=10, help="DDIM steps for the images of the real set")
    for flag, kind, text in (("steps", int, "training steps"), ("batch", int, "per process: grids of four views; base: "
                             "images"), ("lr", float, "learning rate after warm-up"), ("warmup", int, "steps of linear "
                             "warm-up"), ("weight_decay", float, "AdamW's"), ("ema", float, "decay of the weights' "
                             "running average, 0 = none")):
        add(f"--{flag}", type=kind, help=f"{text} (default by preset and stage)")
    add("--shifter_lr_scale", type=float, help="learning rate of shifters or an adapter as a share of --lr (default 1; "
        "with --joint width / 1152, so that beside a narrow backbone they learn as fast as beside the paper's)")
    add("--loss", choices=("epsilon", "even"), help="plain epsilon loss as in the paper (default at full), or "
        "divided by alpha_bar so that noise levels weigh alike (default at toy and small: few pixels)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--text_dropout", type=float, default=0.1, help="how often the caption is dropped, for guidance")
    add("--seed", type=int, default=0, help="decides initial weights, data order, noise and draws")
    add("--dtype", choices=("float32", "bfloat16"), help="autocast (default bfloat16 on CUDA, float32 elsewhere)")
    add("--compile", action="store_true", help="torch.compile each block")
    add("--accumulate", type=int, help="parts that a batch is computed in, one after the other: less memory, same "
        f"result (default 1; full: of {GRIDS_A_PART} grids)")
    add("--workers", type=int, help="threads that read batches ahead (default 2 on CUDA, 0 elsewhere)")
    add("--grad_checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--log_every", type=int, default=20, help="steps between lines of log.jsonl")
    add("--save_every", type=int, default=250, help="steps between states to resume from")
    add("--sample_every", type=int, default=500, help="steps between pictures of samples")
    add("--picture_steps", type=int, default=25, help="DDIM steps for those pictures")


def parse_training(parser, script, argv):
    """The flags argv (None: the command line's) of a script, and as .command how to type them, for the record."""
    args = parser.parse_args(argv)
    args.command = " ".join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    return args


def fill_defaults(args, stage, launched):
    """Completes the flags from DEFAULTS and checks their ranges. Raises ValueError."""
    if (args.preset, stage) not in DEFAULTS:
        raise ValueError(f"preset {args.preset} has no {stage} training"
                         + (": its base model comes from a file (--base)" if stage == "base" else ""))
    if args.preset == "full":
        full_length(args, stage, launched.world)
    for name, value in zip(COLUMNS_OF_DEFAULTS, DEFAULTS[args.preset, stage]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    on_cuda, config = launched.device.type == "cuda", PRESETS[args.preset]
    args.out = args.out or f"runs/{args.preset}"
    args.rank = adapter_rank(args.adapter, config) if args.rank is None else args.rank
    if args.name is None:
        args.name = stage
        if stage == "stage1" and stage1_name(args.adapter, args.rank) != "shifters":
            args.name = f"stage1_{stage1_name(args.adapter, args.rank)}"
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    if args.shifter_lr_scale is None:       # the wider, the faster matrices learn, but not vectors (Yang et al. 2022)
        args.shifter_lr_scale = config.width / 1152 if getattr(args, "joint", False) else 1.0
    if args.workers is None:
        args.workers = 2 if on_cuda else 0
    if args.accumulate is None:
        args.accumulate = 1
    args.loss = args.loss or ("even" if config.output_skip else "epsilon")
    args.images_per_grid = 1 if stage == "base" else config.num_views
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    for name in ("ema", "text_dropout", "p_B", "tau_B"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise ValueError(f"--{name} must lie in [0, 1], not {getattr(args, name)}")
    return args


def full_length(args, stage, world):
    """Batch and steps of the full configuration: the paper's, at any number of GPUs (C.2).

    A step takes 512 grids over all processes, each computing its share in parts of at most 8. One pass over the
    synthetic set is an epoch, for every method: stage 2 takes 10 of them, and its real iterations come on top; what is
    trained alone (stage 1) takes 3 of each domain it sees.
    """
    if args.batch is None:
        if GRIDS_A_STEP % world:
            raise ValueError(f"{GRIDS_A_STEP} grids a step do not divide among {world} processes: name a --batch")
        args.batch = GRIDS_A_STEP // world
    if args.accumulate is None:
        args.accumulate = max(1, math.ceil(args.batch / GRIDS_A_PART))
    if args.steps is None:
        one_domain = math.ceil(FULL_EPOCHS[stage] * FULL_ASSETS / (max(1, args.batch) * world))
        if stage == "stage1":
            args.steps = one_domain * (2 if sees_both_domains(args.adapter) else 1)
        else:
            args.steps = one_domain if args.no_real_data else 2 * one_domain + args.real_warmup


def stage1_name(adapter, rank):
    """What stage 1 leaves is called so: "shifters" for the paper's, of rank 8; else as "lora_32"."""
    return "shifters" if (adapter, rank) == ("shifters", 8) else f"{adapter}_{rank}"
