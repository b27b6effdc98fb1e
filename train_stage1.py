"""Stage 1 (Sec. 4.1, B.1): the Domain Shifters learn what tells the domains apart, before any control is known.

    python train_stage1.py                                     # the toy: CPU, MPS or one GPU
    python train_stage1.py --adapter lora --rank 5             # a baseline's adapter, fitted in the same way
    torchrun --nproc_per_node=8 train_stage1.py --preset small # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_stage1.py \\
        --preset full --base pixart.safetensors --synthetic latents --real real

The whole base model is frozen. One shifter before each block is fitted to single images of both domains in turn, with
the empty control and the epsilon loss (toy and small weigh it, see --loss). To resume, run the same command again.
"""
import argparse

from baselines.adapters import ADAPTERS, new_network, sees_both_domains
from data import SEEDS
from sample import Sampling, sample_images
from support.launch import run_cli
from support.pictures import save_picture, to_uint8
from toy.world import asset_captions, sample_assets, tokenize
from training.estimate import choose, launch_training
from training.flags import parse_training, refuse_unread, stage1_file, stage1_folder, training_arguments
from training.loop import Iteration, save_trained, train
from training.sets import base_model, base_path, null_caption, training_sets


def stage1_plan(domains):
    """plan(step) -> Iteration: single images without control, of each of `domains` in turn, "syn" first (Sec. 4.1)."""
    def plan(step):
        visit, turn = divmod(step, len(domains))
        return Iteration(domains[turn], visit, views=1, control=False)
    return plan


def run_stage1(args, launched):
    """Stage 1: the whole backbone frozen, the shifters learn both domains -> OUT/shifters.safetensors.

    The four views of an asset, without their maps, are four images. A baseline's --adapter is fitted in the same way,
    LoRA and linear ones to renders alone -> OUT/ADAPTER_RANK.safetensors. With a --name: OUT/NAME.safetensors.
    """
    base = base_model(args, launched.device).requires_grad_(False)
    network = new_network(base, args.adapter, args.rank, args.seed)
    domains = ("syn", "real") if sees_both_domains(args.adapter) else ("syn",)
    sets = training_sets(args, launched, views=1, needs_real="real" in domains)
    losses = train(network, sets, null_caption(base, sets["syn"]), stage1_plan(domains), args, launched,
                   domain_preview(network, args))
    is_default = args.name == stage1_folder(args.adapter, args.rank)
    path = stage1_file(args) if is_default else f"{args.out}/{args.name}.safetensors"
    return save_trained(path, network, args, losses, launched, ("shifters", "adapter"), base_path(args))


def domain_preview(network, args):
    """preview(path) for `train`: the same captions and noise in both domains, single-image mode; None for latents."""
    if network.dit.config.latent:
        return None
    text = tokenize(asset_captions(sample_assets(12, SEEDS["validation"])))

    def preview(path):
        rows = []
        for mode in ("syn", "real"):
            images = sample_images(network, {"text": text}, Sampling(mode, num_steps=args.picture_steps))
            rows.append((mode, to_uint8(images)[:, 0]))
        save_picture(path, rows)
    return preview


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", choices=("shifters", *ADAPTERS), default="shifters", help="what stage 1 trains: "
                        "Domain Shifters, or a baseline's adapter")
    parser.add_argument("--rank", type=int, help="r of the Domain Shifters (default 8) or the adapter (32 at full)")
    training_arguments(parser)
    args = parse_training(parser, "train_stage1.py", argv)
    if args.real:
        refuse_unread(parser, args, ["real_steps"], "with a --real of your own")
    if args.preset == "full":
        refuse_unread(parser, args, ["real_steps", "sample_every", "picture_steps"], "with latents")
    refuse_unread(parser, args, ["muon"], "in stage 1, where no block trains")
    if args.adapter == "switcher":
        refuse_unread(parser, args, ["rank"], "with --adapter switcher, which is of no rank")
    if not sees_both_domains(args.adapter):
        refuse_unread(parser, args, ["real", "real_steps"], f"with --adapter {args.adapter}, which sees renders alone")
    return args


def main(argv=None):
    args = parse_args(argv)
    launched = launch_training(args, "stage1", __name__ == "__main__")
    choose(args, launched, args.name)
    run_stage1(args, launched)


if __name__ == "__main__":
    run_cli(main)
