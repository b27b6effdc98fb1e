"""The toy's base model: a text-to-image model of the toy world in all its styles. Not in the paper, which has one.

    python -m toy.pretrain                                              # from nothing
    python -m toy.pretrain --base weights/toy_base.safetensors          # train on
    torchrun --nproc_per_node=2 -m toy.pretrain --dtype bfloat16 --compile --threads 1
    python -m toy.pretrain --scenes                                     # what scenes are, on top: for RefAny3D

Single images, no control, no shifters -> OUT/base.safetensors, or OUT/scenes.safetensors. To resume, run the same
command again.
"""
import argparse

import torch

from data import SEEDS, build_set
from dit import NEW_INPUTS, PRESETS, DiT, T
from domain_shifter import ShiftedDiT
from full.pixart import load_base
from geometry.camera import VIEWS
from sample import Sampling, sample_images
from support.launch import on_rank_0_first, run_cli
from support.pictures import save_picture, to_uint8
from toy.render import Look, render
from toy.scenes import scene_world
from toy.world import BACKGROUNDS, STYLES, asset_captions, tokenize, uniforms
from training.estimate import choose, launch_training
from training.flags import parse_training, refuse_unread, training_arguments
from training.loop import Iteration, save_trained, train
from training.sets import base_path

PREVIEWS = ("photo of a red wooden mug, white background", "photo of a blue marble duck, white background",
            "photo of a green brick house, white background", "photo of a yellow striped chair, white background",
            "photo of a brown spotted tower, white background", "sketch of a purple metal car",
            "cartoon of a green spotted snowman", "photo of a pink marble teapot, sunset background")
OF_SCENES = ("a mug, sunset background", "a duck, sky background", "a house, gray background",
             "a ball, black background", "a chair, green background", "a red wooden mug, beige background",
             "photo of a blue striped car, sky background")


def base_set(num, seed=SEEDS["base"], size=32, folder="runs/toy/sets", device="cpu"):
    """The base model's wide world -> image uint8 (N, 1, 3, H, W), text int64 (N, L).

    Four photos to one picture of another style, and no renders, as the paper's base model is one of photographs and
    art; three quarters before white; half with a view phrase (and then within 8 degrees of it). A photo goes without
    its style phrase one time in five: "a red wooden mug" is a photo.
    """
    def draw(assets, first):
        u = uniforms(len(assets.category), seed + 1000, 8, first)
        style = [STYLES[int(k)] for k in torch.bucketize(u[:, 0].contiguous(), torch.tensor([.79, .86, .93]))]
        background = ["white" if a < .75 else BACKGROUNDS[1 + int(b * (len(BACKGROUNDS) - 1))] for a, b in u[:, 1:3]]
        view = (u[:, 3] * 4).long()
        named = u[:, 4] < .5
        azimuth = torch.where(named, 90 * view + 16 * (u[:, 5] - .5), 360 * u[:, 5])
        look = Look(style, background, seed * 10**6 + first)
        image = render(assets, look, azimuth[:, None], size, geometry=False, device=device).rgb
        say_style = [None if s == "photo" and a < .2 else s for s, a in zip(style, u[:, 6])]
        say_background = [None if b == "white" and a < .2 else b for b, a in zip(background, u[:, 7])]
        say_view = [VIEWS[v] if say else None for v, say in zip(view, named)]
        text = tokenize(asset_captions(assets, say_style, say_view, say_background))
        return dict(image=to_uint8(2 * image - 1), text=text)
    return build_set("base", num, seed, size, folder, draw)


def base_iteration(step):
    """t is the least of three draws, nine tenths of them below 540: what is seen at higher noise, colour and rough
    place, is learned soon, and texture goes on improving long after that."""
    return Iteration("base", step, timesteps=(0, T, 3))


def scenes_iteration(step):
    """t is uniform: where an object stands, and how large, is new to the base model."""
    return Iteration("base", step)


def train_base(args, launched):
    """Pretrains the base model, or trains --base on -> OUT/NAME.safetensors, by default OUT/base.safetensors, which the
    stages find, with --scenes OUT/scenes.safetensors, which RefAny3D finds; returns the path."""
    device, config = launched.device, PRESETS[args.preset]
    world, plan, previews = base_set, base_iteration, PREVIEWS
    if args.scenes:
        world, plan, previews = scene_world, scenes_iteration, OF_SCENES
    images = on_rank_0_first(launched, lambda: world(args.num_base_images, size=config.image_size,
                                                     folder=f"{args.out}/sets", device=device))
    torch.manual_seed(args.seed)
    base = base_path(args) if args.scenes else args.base
    network = ShiftedDiT(load_base(base, device, config) if base else DiT(config).to(device))
    for name in NEW_INPUTS:
        network.dit.get_parameter(name).requires_grad_(False)       # nothing to learn from: the base sees no control

    def preview(path):
        text = tokenize(previews).repeat_interleave(6, 0)
        drawn = to_uint8(sample_images(network, {"text": text}, Sampling(num_steps=args.picture_steps)))[:, 0]
        save_picture(path, list(zip(previews, drawn.unflatten(0, (-1, 6)))))
    losses = train(network, {"base": images}, {"text": tokenize([""])}, plan, args, launched, preview)
    return save_trained(f"{args.out}/{args.name}.safetensors", network, args, losses, launched)


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_base_images", type=int, default=100_000, help="images of the base model's "
                        "world (default %(default)s)")
    parser.add_argument("--scenes", action="store_true", help="train the base model on, on scenes: objects of any size "
                        "and place, from above too, before backgrounds (toy/scenes.py)")
    training_arguments(parser)
    parser.set_defaults(adapter=None, rank=None)
    args = parse_training(parser, "-m toy.pretrain", argv)
    refuse_unread(parser, args, ["synthetic", "real", "real_steps", "num_assets"], "for a base model, which is trained "
                  "on --num_base_images of its own world")
    return args


def main(argv=None):
    args = parse_args(argv)
    launched = launch_training(args, "scenes" if args.scenes else "base", __name__ == "__main__")
    choose(args, launched, args.name)
    train_base(args, launched)


if __name__ == "__main__":
    run_cli(main)
