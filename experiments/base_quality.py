"""How good the toy's base model is: its photographs of held-out objects beside perfect ones.

    python -m experiments.base_quality                         # 200 prompts, some four minutes on one core
    python -m experiments.base_quality --base runs/toy/base.safetensors --num 100

Not in the paper, whose base model is given. Everything else is trained from this one, and can be no better.
"""
import argparse
from dataclasses import replace

import torch
from tqdm import tqdm

from data import SEEDS
from evaluate import SAMPLING_FLAGS, asked_sampling, fid, formatted, kid, load_toy, measured_settings, measuring_flags
from sample import default_base, sample_images
from support.files import write_json
from support.launch import BAR, check_picture, launch, run_cli
from support.pictures import save_picture, to_uint8
from toy.judge import load_judges, read
from toy.render import Look, render
from toy.world import asset_captions, sample_assets, tokenize

PICTURED = 20                           # of the images


def image_quality(images, assets, judges):
    """Of images (N, 3, H, W) in [0, 1] that should be photographs of N assets: what the judges read off them, and FD
    and KD (x 1000) to held-out photographs."""
    row, features = read(images, torch.stack(assets[:3], dim=1), judges), judges.net.features(images)
    return row | dict(FD_I=fid(judges.photos, features), KD_I=1000 * kid(judges.photos, features))


def base_quality(args):
    """Draws "photo of a red wooden mug, white background" for held-out objects with the base model, measures them
    beside perfect photographs of the same objects, and writes a picture of both, without the captions."""
    device, path = launch(args.threads).device, args.base or default_base()
    judges, assets = load_judges(args.folder, device), sample_assets(args.num, SEEDS["evaluation"])
    captions = asset_captions(assets, "photo", background="white")
    azimuth = 90. * torch.arange(args.num)[:, None].remainder(4)
    perfect = to_uint8(2 * render(assets, Look("photo"), azimuth, geometry=False).rgb - 1)[:, 0]
    with tqdm(total=args.num, desc="base model", unit="image", bar_format=BAR) as progress:
        drawn = sample_images(load_toy(path, device), {"text": tokenize(captions)},
                              replace(asked_sampling(args, device), mode="real", batch=32), progress=progress)
    images = {"perfect photos": perfect, "base model": to_uint8(drawn)[:, 0]}
    rows = {name: image_quality(few / 255, assets, judges) for name, few in images.items()}
    print(f"{args.num} prompts, {args.num_steps} steps, seed {args.seed}; {path}")
    columns = {"category": 3, "color": 3, "material": 3, "caption": 3, "photo": 3, "photo_2": 3, "FD_I": 1, "KD_I": 0}
    print(f"{'':16}" + "".join(f"{name:>10}" for name in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{formatted(row[key], digits):>10}" for key, digits in columns.items()))
    half, out = PICTURED // 2, args.out.removesuffix(".png")
    save_picture(f"{out}.png", [(name, few[k:k + half]) for name, few in images.items() for k in (0, half)])
    write_json(f"{out}.json", dict(settings=measured_settings(args) | dict(seed=args.seed, base=path), rows=rows,
                                   captions=captions[:PICTURED]))
    print(f"wrote {out}.png and, with the captions of what it shows, {out}.json")


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring_flags(parser, *SAMPLING_FLAGS, "folder")
    parser.set_defaults(num=200)
    parser.add_argument("--base", help="base model (default: the run folder's, else the shipped one)")
    parser.add_argument("--out", default="runs/toy/base_quality.png",
                        help="picture to write (default %(default)s); its numbers: .json")
    args = parser.parse_args(argv)
    if args.num < PICTURED:
        parser.error(f"--num must be at least {PICTURED}, not {args.num}")
    check_picture(args.out)
    return args


def main(argv=None):
    base_quality(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
