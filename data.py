"""What training reads (Sec. 5, C.1): the synthetic set, the captions of the real set, the held-out sets.

    python data.py                                  # what the toy world looks like: runs/toy/world.png, and views/s
    python data.py --size 64 --out sheet.png

    synthetic set   renders of assets, four views each, with normal and position maps, "a red wooden mug"
    real set        what the base model draws for the same captions, without maps: in 10 DDIM steps at toy (sample.py),
                    in 20 at full (full/real_set.py)
    held-out sets   objects that no training sees, as renders and, as the toy world can, as perfect photographs

The toy's sets are made here from toy/ (the world) and kept as safetensors; those of the full configuration are latents
on disk (full/latents.py). Training takes either, as samples of V views: images are (B, V, C, H, W).
"""
import argparse
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from geometry.camera import VIEWS
from support.files import cached
from support.generators import ORDER, seeded_generator
from support.launch import a_seed, check_out, run_cli, within
from support.pictures import save_image, to_uint8
from toy.render import Look, render
from toy.world import (CATEGORIES, WORLD_VERSION, Assets, asset_captions, exaggerated, sample_assets, take, tokenize,
                       uniforms)

# no two of these share objects; elsewhere A.2 (experiments/layer_selective.py) has 6, which meets no scenes, and 7, the
# judges 11 to 14, pca_features.py 100 and more
SEEDS = dict(base=1, synthetic=2, evaluation=3, validation=4, photos=5, scenes=6)
ASSETS = {"toy": 400, "small": 4000, "full": 120_000}      # of the synthetic set, at full the paper's (C.1)
SHOWN = (14, 10, 17)                    # held-out objects of the pictures: spotted duck, striped tower, wooden donut
LATENT_SCALE = 0.18215                  # of PixArt's VAE: the model sees its latents times this

# ---------------------------------------------------------------------------------------------------------------------
# Control (Sec. 4): normal and position maps of every view


def control_maps(views):
    """Views -> (N, V, 6, H, W) in [-1, 1]: normals, then twice the positions; 1 (white) off the object.

    Not 0 there, as that is the empty control: real iterations teach that it allows an object anywhere.
    """
    background = (views.normal == 0).all(dim=2, keepdim=True)
    return torch.cat([views.normal, 2 * views.position], dim=2).masked_fill(background, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The synthetic set, and the held-out sets (Sec. 5), kept as safetensors


def build_set(kind, num, seed, size, folder, draw):
    """{name: tensor} of num objects, cached in folder under a name that tells kind, num, seed and size.

    draw(assets, first): {name: tensor} of some of them, objects first, first + 1, ..; called for a chunk at a time.
    """
    key = dict(kind=kind, num=num, seed=seed, size=size, version=WORLD_VERSION)

    def build():
        assets = sample_assets(num, seed)
        return in_chunks(num, kind, lambda first, last: draw(take(assets, slice(first, last)), first))
    return cached(Path(folder) / f"{kind}_{num}_{size}_{seed}.safetensors", key, build)


def in_chunks(num, name, draw, chunk=4096):
    """draw(first, last) -> dict of tensors, over 0..num, joined, with a progress bar."""
    bar, parts = tqdm(total=num, desc=name, unit="obj", leave=False), []
    for first in range(0, num, chunk):
        parts.append(draw(first, min(first + chunk, num)))
        bar.update(min(first + chunk, num) - first)
    bar.close()
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def synthetic_set(num, seed=SEEDS["synthetic"], size=32, folder="runs/toy/sets", device="cpu"):
    """Renders -> image uint8 (N, 4, 3, H, W), control float16 (N, 4, 6, H, W), text (N, L): "a red wooden mug"."""
    def draw(assets, first):
        assets = exaggerated(assets)
        views = render(assets, Look("render"), size=size, device=device)
        return dict(image=to_uint8(2 * views.rgb - 1), control=control_maps(views).half(),
                    text=tokenize(asset_captions(assets)))
    return build_set("synthetic", num, seed, size, folder, draw)


def evaluation_set(num, seed=SEEDS["evaluation"], size=32, folder="runs/toy/sets", device="cpu"):
    """synthetic_set of held-out objects, with what a toy world can draw: the same views as photos under one light.

    Adds photo uint8 (N, 4, 3, H, W), mask uint8 (N, 4, 1, H, W) = 255 x coverage, position and normal float32
    (N, 4, 3, H, W), labels int64 (N, 3) = category, color, material.
    """
    return build_set("evaluation", num, seed, size, folder, partial(held_views, seed=seed, size=size, device=device))


def held_objects(numbers, size=32):
    """The objects `numbers` of the `evaluation_set` of that size, drawn without the others."""
    seed = SEEDS["evaluation"]
    assets = sample_assets(max(numbers) + 1, seed)
    parts = [held_views(take(assets, slice(k, k + 1)), k, seed, size) for k in numbers]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def held_views(assets, first, seed, size, device="cpu"):
    """What `evaluation_set` has of these of its assets, of which the first is its object `first`."""
    assets = exaggerated(assets)
    views = render(assets, Look("render"), size=size, device=device)
    grain = Look("photo", seed=seed * 10**6 + first)
    photo = render(assets, grain, size=size, geometry=False, device=device).rgb
    return dict(image=to_uint8(2 * views.rgb - 1), control=control_maps(views).half(),
                text=tokenize(asset_captions(assets)), photo=to_uint8(2 * photo - 1),
                mask=to_uint8(2 * views.mask - 1), position=views.position, normal=views.normal,
                labels=torch.stack(assets[:3], dim=1))


def shown_objects(num):
    """Which of num held-out objects stand in pictures: SHOWN, or the first three where there are too few."""
    return list(SHOWN if num > max(SHOWN) else range(min(num, 3)))


def photo_set(num, seed=SEEDS["photos"], size=32, folder="runs/toy/sets", device="cpu"):
    """Held-out photos before white, one view each -> image uint8 (N, 1, 3, H, W), text (N, L), labels int64 (N, 3)."""
    def draw(assets, first):
        view = (uniforms(len(assets.category), seed + 1000, 1, first)[:, 0] * 4).long()
        grain = Look("photo", seed=seed * 10**6 + first)
        photo = render(assets, grain, 90. * view[:, None], size, geometry=False, device=device).rgb
        text = tokenize(asset_captions(assets, "photo", [VIEWS[v] for v in view], "white"))
        return dict(image=to_uint8(2 * photo - 1), text=text, labels=torch.stack(assets[:3], dim=1))
    return build_set("photos", num, seed, size, folder, draw)


# ---------------------------------------------------------------------------------------------------------------------
# Captions of the real set (C.1): what the base model is asked to draw, and what is trained on


def real_captions(assets):
    """What the base model is asked to draw for the real set (C.1), and what is trained on: lists of 4 N captions,
    object by object, view by view.

    The second are the assets' own captions, as the renders have them: where "photo of" told the domain, e_real had
    nothing to learn.
    """
    four = Assets(*(field.repeat_interleave(4, dim=0) for field in assets))
    return asset_captions(four, "photo", list(VIEWS) * len(assets.category), "white"), asset_captions(four)


VIEW_PHRASES = ("front", "right side", "back", "left side")


def real_prompt(caption, view=None):
    """What PixArt is asked for to draw a real image of the full configuration (C.1), and without the view what is
    trained on. The toy's world has words of its own, see `real_captions`."""
    seen_from = f"{view} view, " if view else ""
    return f"a realistic photograph of {caption}, {seen_from}white background, highly detailed"


# ---------------------------------------------------------------------------------------------------------------------
# Reading a set: a dictionary of tensors with "image" (N, V, ...), or a LatentSet of full/latents.py


def set_shape(dataset):
    """(samples, views a sample) of a set."""
    return tuple(dataset["image"].shape[:2]) if isinstance(dataset, dict) else dataset.shape


def read_rows(dataset, index):
    """The samples `index` (B,) of a set, {name: tensor}."""
    return {key: value[index] for key, value in dataset.items()} if isinstance(dataset, dict) else dataset.rows(index)


def data_indices(num, first, count, *key):
    """Which samples stand at places first .. first + count - 1 of the endless shuffled order of a set of num: (count,).

    key: whole numbers, such as seed and domain. Each epoch has an order of its own, a function of (key, epoch).
    """
    epochs = range(first // num, (first + count - 1) // num + 1)
    orders = [torch.randperm(num, generator=seeded_generator(ORDER, *key, epoch)) for epoch in epochs]
    start = first - num * epochs[0]
    return torch.cat(orders)[start:start + count]


# ---------------------------------------------------------------------------------------------------------------------
# A look at the toy world


def contact_sheet(out, size=32, seed=0):
    """Draws one object of each category, four views of each in every look, and prints the views drawn a second."""
    assets = sample_assets(400, seed)
    many = take(assets, slice(max(1, 400 * 32 ** 2 // size ** 2)))     # sets are drawn faster than a few objects
    start = time.time()
    views = len(render(many, size=size).rgb) * 4
    print(f"{views / (time.time() - start):.0f} photo views/s with maps, {torch.get_num_threads()} thread(s)")
    first = [int((assets.category == k).nonzero()[0]) for k in range(len(CATEGORIES))]       # one of each category
    assets = take(assets, torch.tensor(first))
    photo = render(assets, size=size)
    columns = [render(assets, Look("render"), size=size, geometry=False).rgb, photo.rgb, photo.normal / 2 + .5,
               photo.position + .5]
    for look in (Look("cartoon"), Look("sketch"), Look("watercolor"), Look("photo", "sunset")):
        columns.append(render(assets, look, (30,), size, geometry=False).rgb)
    sheet = torch.cat([c.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1) for c in columns], dim=1)
    save_image(out, Image.fromarray((sheet * 255).round().byte().numpy()))
    print(f"wrote {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy/world.png", help="the picture to write (default %(default)s)")
    parser.add_argument("--size", type=within(1, 1024), default=32, help="its pixels a view (default %(default)s)")
    parser.add_argument("--seed", type=a_seed, default=0, help="its objects (default %(default)s)")
    args = parser.parse_args(argv)
    check_out(args.out)
    contact_sheet(args.out, args.size, args.seed)


if __name__ == "__main__":
    run_cli(main)
