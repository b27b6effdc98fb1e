"""The photographs that FID_I and KID_I are taken against (C.1: ImageNet val, 42 classes, 4 images of each by CLIP,
background removed).

    python -m full.curate photos chosen --clip clip-vit-base-patch32
    python -m full.curate photos chosen --clip clip-vit-base-patch32 --masks masks
    python evaluate.py folders OURS chosen --inception inception-2015-12-05.pt

FOLDER holds a folder of images per class, named by the words that CLIP shall look for: the images (or a link to them)
in photos/coffee_mug are scored against "a photo of a coffee mug". The first line leaves the best four of each class in
chosen/coffee_mug/NAME.png, ..; look at them in chosen.png, their scores are in chosen.json. To remove the background,
make a grey mask of each with any tool, masks/coffee_mug/NAME.png (255 on the object, 0 around it), and type the second
line: they now stand on white. The third one measures against them.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from evaluate import clip_score, measured_settings
from support.files import write_json
from support.folders import find_images, in_batches, read_image
from support.launch import UsageError, check_out, launch, run_cli, some_threads, within
from support.networks import load_clip
from support.pictures import save_image, save_picture


def cut_out(image, path):
    """An image (3, H, W) in [0, 1] on white, cut out by the grey mask of its size at `path`, 255 = object. Raises
    naming the mask where there is none, or one of another size, coloured or without an object."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no mask {path}: --masks wants one of every chosen image")
    mask = read_image(path)
    if mask.shape != image.shape:
        raise ValueError(f"the mask {path} has {mask.shape[2]} x {mask.shape[1]} pixels, its image {image.shape[2]} x "
                         f"{image.shape[1]}")
    if (mask != mask[:1]).any() or mask.max() < 0.5:
        raise ValueError(f"{path} is no mask: --masks wants grey images, 255 on the object and 0 around it")
    return 1 - mask + mask * image


def stem(image):
    """The name of an image file without its ending."""
    return os.path.splitext(image)[0]


def class_images(source, k, masks=None):
    """{class: names of its images} of a folder with a folder of images per class. Raises where there is none, where a
    class has fewer than k images, two that would be written under one name, or fewer than k masks in `masks`, if any:
    one of the chosen would lack one."""
    classes = {path.name: find_images(path) for path in sorted(Path(source).glob("*")) if path.is_dir()}
    if not classes:
        raise FileNotFoundError(f"{source} holds no folder of images per class, as {source}/coffee_mug")
    for name, images in classes.items():
        if len(images) < k:
            raise ValueError(f"{source}/{name} has {len(images)} image(s), fewer than --k {k}")
        names = [stem(image) for image in images]
        if len(set(names)) < len(names):
            raise ValueError(f"{source}/{name} has two images called {max(names, key=names.count)}: rename one")
        if masks and (cut := sum(os.path.isfile(f"{masks}/{name}/{image}.png") for image in names)) < k:
            raise FileNotFoundError(f"{masks}/{name} has {cut} mask(s) of the images in {source}/{name}, fewer than "
                                    f"--k {k}: --masks wants one of every chosen image")
    return classes


def best_of_each(classes, embed, args):
    """{class: {image: its CLIP score}} of the --k best of each class, best first."""
    chosen = {}
    for name, images in tqdm(classes.items(), desc="CLIP", unit="class"):
        caption = args.prompt.replace("{}", name.replace("_", " "))

        def score(pixels, _):
            return clip_score(*embed(pixels, [caption]))
        paths = [f"{args.source}/{name}/{image}" for image in images]
        scores = in_batches(paths, score, size=1)   # one by one: a score must not hang on what shares the batch
        ranked = sorted(zip(images, scores.double().numpy().round(6).tolist()), key=lambda pair: -pair[1])
        chosen[name] = dict(ranked[:args.k])        # the sort is stable: equals stay ordered by name
    return chosen


def chosen_pixels(name, image, args):
    """A chosen image (3, H, W) in [0, 1], on white where there are masks. Raises as `cut_out`."""
    pixels = read_image(f"{args.source}/{name}/{image}")
    return cut_out(pixels, f"{args.masks}/{name}/{stem(image)}.png") if args.masks else pixels


def write_chosen(chosen, args):
    """Writes the chosen images into OUT, on white where there are masks, and all on one sheet beside it. Raises as
    `cut_out`, before it writes the first."""
    for name, image in [(name, image) for name in chosen for image in chosen[name]]:
        chosen_pixels(name, image, args)
    rows = []
    for name in tqdm(chosen, desc=args.out, unit="class"):
        tiles = []
        for image in chosen[name]:
            pixels = chosen_pixels(name, image, args)
            picture = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
            if args.size:
                picture = ImageOps.fit(picture, (args.size, args.size))
            save_image(f"{args.out}/{name}/{stem(image)}.png", picture)
            tiles.append(torch.from_numpy(np.array(ImageOps.fit(picture, (96, 96)))).permute(2, 0, 1))
        rows.append((name.replace("_", " "), torch.stack(tiles)))
    save_picture(f"{args.out}.png", rows, scale=1)      # beside OUT: evaluate.py folders reads all that is in it


def curate(args):
    """Picks the best photographs of each class and writes them, their scores and a sheet of them."""
    if "{}" not in args.prompt:
        raise UsageError(f"--prompt wants {{}} where the class goes, as 'a photo of a {{}}', not '{args.prompt}'")
    device, out = launch(args.threads).device, Path(args.out)
    for folder in filter(None, (args.source, args.masks)):
        if out.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{out} lies in {folder}: name a folder outside it for the chosen images")
    classes = class_images(args.source, args.k, args.masks)
    for path in (f"{out}.json", f"{out}.png", *(f"{out}/{name}/x" for name in classes)):
        check_out(path, "OUT")
    chosen = best_of_each(classes, load_clip(args.clip, device), args)
    written = {out / name / f"{stem(image)}.png" for name in chosen for image in chosen[name]}
    foreign = set(out.rglob("*.png")) - written
    if foreign:
        raise ValueError(f"{min(foreign)} is not among the chosen images: empty {out}, or name another folder")
    write_chosen(chosen, args)
    write_json(f"{args.out}.json", dict(settings=measured_settings(args), classes=chosen))
    print(f"wrote {args.k} images of each of {len(chosen)} classes to {args.out}, their scores to {args.out}.json, all "
          f"on one sheet to {args.out}.png")


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="FOLDER", help="folder of images per class: FOLDER/coffee_mug/..")
    add("out", metavar="OUT", help="folder to write to: OUT/coffee_mug/NAME.png, OUT.json, OUT.png")
    add("--clip", metavar="DIR", required=True, help="CLIP model as Hugging Face has it")
    add("--k", type=within(1, 10 ** 6), default=4, help="images to take of each class (default %(default)s)")
    add("--masks", metavar="DIR", help="grey masks DIR/coffee_mug/NAME.png of the images' own size, 255 = object: what "
        "is around it becomes white (default: the images as they are)")
    add("--prompt", default="a photo of a {}", help="caption that images are scored against, {} being the class "
        "(default '%(default)s')")
    add("--size", type=within(1, 2 ** 12), metavar="N", help="centre-crop and resize to N x N (default: as they are)")
    add("--threads", type=some_threads, help="CPU threads (default: the fastest in a trial)")
    args = parser.parse_args(argv)
    args.out = str(Path(args.out))                      # OUT/ as OUT: files are written beside it
    return args


def main(argv=None):
    curate(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
