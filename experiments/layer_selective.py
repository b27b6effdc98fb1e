"""Layer-selective training (A.2, Fig. 6), the experiment that moved the authors to layer-aware training.

    python train_stage2.py --layer_selective                   # or python -m experiments.layer_selective
    python train_stage2.py --layer_selective --seeds 3 --threads 1

Images only: no views, no control, no shifters. The base model is fine-tuned on renders and on photographs, each of
which teaches one half of the blocks, or one half of the timesteps; or on renders alone.
"""
import argparse
from functools import partial

import torch

from baselines.adapters import new_network
from data import SEEDS, build_set
from dit import PRESETS, T
from evaluate import fid, kid, measured_settings
from sample import Sampling, sample_images
from support.files import write_json
from support.launch import check_out, launch, on_rank_0_first, run_cli, within
from support.pictures import save_picture, to_uint8
from support.speed import MOST_THREADS
from toy.judge import train_feature_net, world_features
from toy.render import Look, render
from toy.world import BACKGROUNDS, asset_captions, exaggerated, sample_assets, tokenize, uniforms
from training.estimate import choose
from training.flags import fill_defaults, parse_training, refuse_unread, training_arguments
from training.loop import Iteration, train
from training.sets import base_model

VARIANTS = {
    "renders":   "all blocks on renders",
    "layers":    "first half of the blocks on renders, second half on photos",
    "timesteps": "t >= 500 on renders, t < 500 on photos",
}
OTHERS = BACKGROUNDS[1:]                # all but white


def selective_set(num, style, seed, size=32, folder="runs/toy/sets", device="cpu"):
    """A set of layer-selective training (A.2), one view of each object -> image uint8 (N, 1, 3, H, W), text (N, L).

    Renders lie before white ("a red wooden mug"), photos before anything else, which the caption names ("a red wooden
    mug, sunset background"): so one sees from which of the two sets a model has the look of an object, and from which
    the background.
    """
    def draw(assets, first):
        u = uniforms(len(assets.category), seed + 1000, 2, first)
        background = ["white" if style == "render" else OTHERS[int(b * len(OTHERS))] for b in u[:, 0]]
        view = 90. * (u[:, 1] * 4).long()
        assets = exaggerated(assets) if style == "render" else assets
        look = Look(style, background, seed * 10**6 + first)
        image = render(assets, look, view[:, None], size, geometry=False, device=device).rgb
        text = tokenize(asset_captions(assets, background=None if style == "render" else background))
        return dict(image=to_uint8(2 * image - 1), text=text)
    return build_set(f"selective_{style}", num, seed, size, folder, draw)


def selective_plan(variant, num_blocks):
    """plan(step) -> Iteration for one of VARIANTS; synthetic and real in turn where it takes both.

    The gradient passes the frozen last half on its way to the first; `training_step` drops what it leaves there.
    """
    half = num_blocks // 2

    def plan(step):
        turn, is_real = divmod(step, 2)
        if variant == "renders":
            return Iteration("syn", step)
        if variant == "layers" and is_real:
            return Iteration("real", turn, frozen_blocks=half)
        if variant == "layers":
            return Iteration("syn", turn, frozen_last_blocks=num_blocks - half)
        return Iteration("real", turn, timesteps=(0, T // 2, 1)) if is_real else \
            Iteration("syn", turn, timesteps=(T // 2, T, 1))
    return plan


def train_variant(variant, seed, sets, args, launched):
    """The base model ("base"), or fine-tuned on `sets` as one of VARIANTS says, from this seed: a ShiftedDiT.

    Every variant takes as many steps on renders: the one that sees no photographs takes half as many in all.
    """
    network = new_network(base_model(args, launched.device).requires_grad_(False), None, None)
    network.dit.blocks.requires_grad_(True)                             # only blocks train
    if variant != "base":
        steps = max(1, args.steps // 2) if variant == "renders" else args.steps
        run = argparse.Namespace(**vars(args) | dict(seed=seed, steps=steps, name=selective_name(variant, seed)))
        plan = selective_plan(variant, network.dit.config.depth)
        train(network, sets, {"text": tokenize([""])}, plan, run, launched)
    return network


def selective_name(variant, seed):
    """The name of a variant's training below the run folder."""
    return f"selective_{variant}_{seed}"


def layer_selective(args, launched):
    """Fine-tunes the base model in each of VARIANTS and --seeds, draws the same prompts from the same noise with all of
    them, and measures what each took from the two sets, which differ in their look and in their background."""
    size, folder, device = PRESETS[args.preset].image_size, f"{args.out}/sets", launched.device
    runs = [selective_name(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    pace = choose(args, launched, *reversed(runs))
    if launched.rank == 0:
        minutes = args.seeds * (len(VARIANTS) - 0.5) * args.steps * args.batch * 4 * pace.step / 60
        print(f"to do: {len(VARIANTS)} variants of {args.steps} steps (on renders alone half) x {args.seeds} seed(s), "
              f"about {minutes:.0f} minutes on this machine (and three to make sets and a judge of domains, the first "
              "time)", flush=True)
    make_set = partial(selective_set, 4 * args.num_assets, size=size, folder=folder, device=device)
    sets = {"syn": on_rank_0_first(launched, lambda: make_set(style="render", seed=6)),
            "real": on_rank_0_first(launched, lambda: make_set(style="photo", seed=7))}
    judge = on_rank_0_first(launched, lambda: train_feature_net(folder, num=3000, steps=1500, size=size,
                                                                world="backgrounds"))
    photos = world_features(judge, folder, device)
    assets = sample_assets(args.num_prompts, SEEDS["evaluation"])
    backgrounds = [OTHERS[k % len(OTHERS)] for k in range(args.num_prompts)]
    plain, asked = tokenize(asset_captions(assets)), tokenize(asset_captions(assets, background=backgrounds))
    measured, pictures = {}, []
    for seed in range(args.seeds):
        sampling = Sampling(seed=seed, num_steps=args.picture_steps)
        for variant in ("base", *VARIANTS):
            network = train_variant(variant, seed, sets, args, launched)
            images = to_uint8(sample_images(network, {"text": plain}, sampling)[:, 0])
            elsewhere = to_uint8(sample_images(network, {"text": asked}, sampling)[:, 0])
            if seed == 0:
                pictures.append((variant, torch.cat([images[:6], elsewhere[:6]])))
            measured.setdefault(variant, []).append(selective_measures(images / 255, elsewhere / 255, judge, photos))
    if launched.rank == 0:
        print_selective(measured, args)
        save_picture(f"{args.out}/layer_selective.png", pictures)
        write_json(f"{args.out}/layer_selective.json", dict(settings=measured_settings(args), rows=measured))
        print(f"wrote {args.out}/layer_selective.png and .json: the same prompts and noise, one row a variant (seed 0)")


def selective_measures(images, elsewhere, judge, photos):
    """Of images (N, 3, H, W) in [0, 1] after captions that name no background: share called a photo, distances to
    held-out photos before white; of images `elsewhere`, after captions that name another one: share before white."""
    features = judge.features(images)
    edge = torch.cat([elsewhere[..., 0, :], elsewhere[..., -1, :], elsewhere[..., 0], elsewhere[..., -1]], dim=-1)
    is_white = (edge > 0.9).all(dim=1).double()                                                     # (N, 4 W)
    return dict(photo=(judge.photo_probability(images) > 0.5).double().mean().item(),
                white=(is_white.mean(dim=1) > 0.9).double().mean().item(),
                FD=fid(photos, features), KD=1000 * kid(photos, features))


def print_selective(measured, args):
    """Prints mean and, with several seeds, standard deviation of each measure."""
    print(f"{args.num_prompts} prompts, {args.seeds} seed(s): share called a photo, share before white where another "
          "background is asked for, distances to held-out photos before white")
    print(f"{'':64}{'photo':>14}{'white':>14}{'FD':>14}{'KD x1000':>14}")
    for variant, rows in measured.items():
        cells = []
        for name, digits in (("photo", 2), ("white", 2), ("FD", 1), ("KD", 0)):
            values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            cell = f"{values.mean():.{digits}f}"
            if len(values) > 1:
                cell += f" +- {values.std():.{digits}f}"
            cells.append(f"{cell:>14}")
        label = f"{variant}: {VARIANTS[variant]}" if variant in VARIANTS else variant
        print(f"{label:64}{''.join(cells)}")


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser)
    add = parser.add_argument
    add("--seeds", type=within(1, 1000), default=1, help="how many times each variant is trained (default 1)")
    add("--num_prompts", type=within(2, 10 ** 5), default=64, help="images a variant is measured on (default 64)")
    parser.set_defaults(adapter=None, rank=None)
    args = parse_training(parser, "-m experiments.layer_selective", argv)
    refuse_unread(parser, args, ["synthetic", "real", "real_steps", "seed", "name", "sample_every"], "in this "
                  "experiment, which has sets, seeds and names of its own")
    return args


def main(argv=None):
    args = parse_args(argv)
    launched = launch(args.threads or MOST_THREADS)         # until the trial
    fill_defaults(args, "selective", launched)
    for ending in (".png", ".json"):
        check_out(f"{args.out}/layer_selective{ending}")
    layer_selective(args, launched)


if __name__ == "__main__":
    run_cli(main)
