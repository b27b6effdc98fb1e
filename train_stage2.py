"""Stage 2 (Sec. 4.2, B.2): the backbone learns 3D control from renders while real images keep it realistic.

    python train_stage2.py                                     # the toy, all stages, from the shipped base model
    python train_stage2.py --task text                         # text to four views, no maps
    python train_stage2.py --method syn_only                   # the baseline: fine-tune on renders alone
    python train_stage2.py --no_freezing --no_reassignment     # an ablation (Table 2, row 3)
    python train_stage2.py --layer_selective                   # what moved the authors to it (A.2, Fig. 6)
    python train_stage2.py --benchmark                         # what a step costs and freezing saves
    python train_stage2.py --benchmark --preset full --dtype bfloat16   # on a laptop: memory and operations, counted
    torchrun --nproc_per_node=8 train_stage2.py --preset full --base pixart.safetensors \\
        --synthetic latents --real real   # eight GPUs, after train_stage1.py likewise

Iterations alternate between the domains (`stage2_plan`). Shifters are frozen, the backbone trains on the epsilon loss
(toy and small weigh it, see --loss):

    synthetic   four views of one asset, control, e_syn, attention over all views
    real        single images at the places of a grid, each attending to itself alone, empty control, e_real; the
                first i blocks frozen (layer-aware training); with probability p_B the first j blocks run with e_syn
                (domain reassignment)

What an iteration does with that is `training_step` in training/loop.py. In the toy world, stage 1 and the sets it needs
are made first where they are missing. To resume, run it again.
"""
import argparse
import os
import sys
from contextlib import nullcontext

import train_stage1
from baselines.adapters import load_beside, new_network
from baselines.methods import METHODS
from data import SHOWN, held_objects
from dit import NEW_INPUTS
from domain_shifter import P_B, TAU_B, draw_frozen_blocks, draw_reassigned_blocks
from sample import CFG_SCALE, Sampling, object_sheet
from support.files import file_id, read_metadata
from support.generators import DRAWS, seeded_generator
from support.launch import finite, run_cli
from training.estimate import announce, launch_training
from training.flags import fill_defaults, parse_training, refuse_unread, stage1_file, training_arguments
from training.loop import Iteration, save_trained, train
from training.sets import base_model, base_path, null_caption, training_sets

# ---------------------------------------------------------------------------------------------------------------------
# Which iteration comes when (Sec. 4.2)


def stage2_plan(args, num_blocks):
    """plan(step) -> Iteration: a short real warm-up, then synthetic and real in turn (Sec. 4.2, B.2)."""
    def synthetic_iteration(visit):
        return Iteration("syn", visit, views=4, control=args.task == "texturing")

    def real_iteration(step, visit):
        # one i and one j a step, the same on every rank; drawn in any case, so that an ablation of one keeps the other
        generator = seeded_generator(DRAWS, args.seed, step)
        i = draw_frozen_blocks(generator, num_blocks, args.tau_B)
        j = draw_reassigned_blocks(generator, num_blocks, args.p_B, args.tau_B)
        return Iteration("real", visit, grid=4, frozen_blocks=0 if args.no_freezing else i,
                         reassigned_blocks=0 if args.no_reassignment else j)

    def plan(step):
        if args.no_real_data:
            return synthetic_iteration(step)
        if step < args.real_warmup:
            return real_iteration(step, step)
        turn, is_real = divmod(step - args.real_warmup, 2)
        return real_iteration(step, args.real_warmup + turn) if is_real else synthetic_iteration(turn)
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# What trains, and what is frozen for good


def stage2_network(args, launched):
    """The base model with the shifters (or adapter) of stage 1, frozen, or with new ones that train along."""
    device, method = launched.device, METHODS[args.method]
    base = base_model(args, device)
    if method.stage1 and not args.joint:
        path = stage1_path(args, launched)
        network = load_beside(base, path).requires_grad_(False)
        check_stage1(path, network, args)
    else:
        network = new_network(base, method.adapter, args.rank, args.seed)
    for name, p in base.named_parameters():
        p.requires_grad_(method.backbone or name in NEW_INPUTS)
    if args.task == "text" and base.control_embedder is not None:
        base.control_embedder.requires_grad_(False)
    return network


def stage1_path(args, launched):
    """The run folder's shifters or adapter, trained first where they are missing (toy and small). Raises ValueError
    where --stage1_steps says otherwise than what is there."""
    path = args.shifters or stage1_file(args)
    if os.path.isfile(path):
        made = read_metadata(path).get("settings")
        if launched.rank == 0 and isinstance(made, dict):
            print(f"stage 1: {path}, trained for {made.get('steps')} steps with seed {made.get('seed')}", flush=True)
        if args.stage1_steps and isinstance(made, dict) and made.get("steps") != args.stage1_steps:
            raise ValueError(f"{path} was trained for {made.get('steps')} steps, not --stage1_steps "
                             f"{args.stage1_steps}: delete it, and stage 1 is trained anew, or use another --out")
        return path
    if args.preset == "full" or args.shifters:
        raise FileNotFoundError(f"no {args.adapter} at {path}: train with train_stage1.py --preset {args.preset} "
                                f"--adapter {args.adapter} --rank {args.rank}, or name a file with --shifters")
    if launched.rank == 0:
        print(f"{path} is missing: stage 1 comes first", flush=True)
    return train_stage1.run_stage1(stage1_flags(args, launched), launched)


def check_stage1(path, network, args):
    """Raises ValueError where the file of stage 1 holds something else than this method's shifters or adapter, or was
    trained beside another base model."""
    found = "shifters" if network.shifters is not None else getattr(network.adapter, "kind", "neither")
    ranks = {p.shape[-2] for name, p in network.named_parameters() if name.endswith("W_right")}
    if found != args.adapter or ranks - {args.rank}:
        raise ValueError(f"{path} holds {found} of rank {', '.join(map(str, ranks)) or 'none'}, but --method "
                         f"{args.method} takes {args.adapter} of rank {args.rank}: name another file with --shifters, "
                         "or another --rank")
    beside = read_metadata(path).get("base")                    # [name, checksum]; files of earlier commits have none
    if beside and beside[1] != file_id(base_path(args))[1]:
        raise ValueError(f"{path} was trained beside another base model, {beside[0]}: name that one with --base, or "
                         "delete the file, and stage 1 is trained anew")


def stage1_flags(args, launched):
    """The flags of stage 1 on the way to stage 2: those of stage 2, but for what each stage has defaults of; the rate
    is the same."""
    stage1 = train_stage1.parse_args([])
    for name in vars(stage1).keys() - {"name", "warmup", "weight_decay", "ema", "muon"}:
        setattr(stage1, name, getattr(args, name))
    stage1.steps = args.stage1_steps
    return fill_defaults(stage1, "stage1", launched)


def run_stage2(args, launched):
    """Stage 2 -> OUT/NAME.safetensors, and a picture of held-out objects; returns the path."""
    network = stage2_network(args, launched)
    sets = training_sets(args, launched, views=4, needs_real=not args.no_real_data, control=args.task == "texturing")
    losses = train(network, sets, null_caption(network.dit, sets["syn"]), stage2_plan(args, network.dit.config.depth),
                   args, launched, object_preview(network, args))
    keep = ("model", "shifters", "adapter") if METHODS[args.method].kept else ("model",)
    return save_trained(f"{args.out}/{args.name}.safetensors", network, args, losses, launched, keep,
                        base_path(args))


def object_preview(network, args):
    """preview(path) for `train`: three held-out objects, as the method is sampled; None for latents."""
    config = network.dit.config
    if config.latent:
        return None
    objects = held_objects(SHOWN, size=config.image_size)

    def preview(path):
        with nullcontext() if METHODS[args.method].kept else network.without_adapter():
            sampling = Sampling(cfg_scale=CFG_SCALE, num_steps=args.picture_steps)
            object_sheet(path, network, objects, args.task, sampling=sampling)
    return preview


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)                # main looks for two flags by their whole names
    training_arguments(parser)
    add = parser.add_argument
    add("--task", choices=("texturing", "text"), default="texturing", help="control by normal and position maps, or by "
        "the view alone (default %(default)s)")
    add("--method", choices=METHODS, default="realiz3d", help="realiz3d or a baseline (Sec. 5) (default %(default)s)")
    add("--no_real_data", action="store_true", help="synthetic iterations only (Table 2, row 2)")
    add("--no_freezing", action="store_true", help="no layer-aware training")
    add("--no_reassignment", action="store_true", help="no domain reassignment")
    add("--joint", action="store_true", help="skip stage 1, train shifters or domain switcher with the model (Table 2, "
        "row 1, is this with --no_freezing --no_reassignment)")
    add("--tau_B", type=finite, default=TAU_B, help="how many of the first blocks may be frozen or "
        "reassigned, as a share of N_B (default %(default)s)")
    add("--p_B", type=finite, default=P_B, help="probability of domain reassignment on a real iteration "
        "(default %(default)s)")
    add("--real_warmup", type=int, default=20, help="real iterations before the domains alternate "
        "(default %(default)s)")
    add("--shifters", help="shifters, or a baseline's adapter, of stage 1 (default: in OUT)")
    add("--rank", type=int, help="r of the Domain Shifters (default 8) or of a baseline's adapter (32 at full)")
    add("--stage1_steps", type=int, help="steps of stage 1 where it is trained on the way")
    add("--layer_selective", action="store_true", help="the experiment of A.2 in place of stage 2; its flags: "
        "python -m experiments.layer_selective --help")
    add("--benchmark", action="store_true", help="what an iteration costs, in place of training it; its flags: "
        "python -m experiments.benchmark --help")
    args = parse_training(parser, "train_stage2.py", argv)
    if args.method != "realiz3d" or args.no_real_data:
        refuse_unread(parser, args, ["no_freezing", "no_reassignment"], "without Realiz3D's real iterations")
    if not METHODS[args.method].real_data:
        refuse_unread(parser, args, ["no_real_data"], f"with --method {args.method}, which sees none")
    switches = [flag for flag in ("no_real_data", "no_freezing", "no_reassignment", "joint") if getattr(args, flag)]
    switches += [f"rank{args.rank}"] if args.rank else []
    args.name = args.name or "-".join([f"{args.method}_{args.task}", *switches])
    args.adapter = METHODS[args.method].adapter
    args.no_real_data |= not METHODS[args.method].real_data
    for flag in ("joint", "shifters"):
        if getattr(args, flag) and not METHODS[args.method].stage1:
            parser.error(f"--{flag} says where stage 1 comes in, and --method {args.method} has none")
    if args.joint and args.shifters:
        parser.error("--joint trains new shifters with the model, so it takes no --shifters")
    if args.method != "realiz3d":                       # layer-aware training and reassignment are Realiz3D's
        args.no_freezing = args.no_reassignment = True
    refuse_unread(parser, args, unread_flags(args), f"in what --name {args.name} trains")
    if args.joint and not args.no_freezing:
        parser.error("--joint trains the shifters, of which those before frozen blocks would move all the same: add "
                     "--no_freezing")
    return args


def unread_flags(args):
    """Names of the flags that the others leave nothing to decide."""
    trains_stage1 = METHODS[args.method].stage1 and not args.joint and not args.shifters
    unread = [] if trains_stage1 else ["stage1_steps"]
    if args.adapter in (None, "switcher"):
        unread += ["rank"]
    if not METHODS[args.method].backbone:
        unread += ["muon"]
    if args.no_real_data:
        unread += ["real_warmup"] if trains_stage1 else ["real", "real_steps", "real_warmup"]
    if args.real:
        unread += ["real_steps"]
    if args.preset == "full":                           # its sets and stage 1 are made by hand, and latents not drawn
        unread += ["real_steps", "stage1_steps", "sample_every", "picture_steps"]
    if args.no_real_data or args.no_reassignment:
        unread += ["p_B"]
    if args.no_real_data or args.no_reassignment and args.no_freezing:
        unread += ["tau_B"]
    return unread


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--layer_selective" in argv:
        from experiments import layer_selective
        return layer_selective.main([flag for flag in argv if flag != "--layer_selective"])
    if "--benchmark" in argv:
        from experiments import benchmark
        return benchmark.main([flag for flag in argv if flag != "--benchmark"])
    args = parse_args(argv)
    launched = launch_training(args, "stage2", __name__ == "__main__")
    announce(args, launched)
    path = run_stage2(args, launched)
    if launched.rank == 0 and args.preset != "full":        # whose samples need encoders: docs/full.md
        print(f"to draw more: python sample.py --model {path}")


if __name__ == "__main__":
    run_cli(main)
