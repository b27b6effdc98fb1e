"""Scenes on disk, what RefAny3D (related/refany3d.py) is trained on at full size: a folder each, and latents in shards.

    python -m full.scenes toy scenes --num 8                    # toy scenes in this layout, to try the rest on
    python -m full.scenes encode scenes scene_latents --vae pixart/vae --text_encoder pixart/text_encoder
    torchrun --nproc_per_node=8 -m related.refany3d --preset full --base BASE --synthetic scene_latents

The paper's data is not out. A scene is a picture with an object in it, the object's point map in that picture, and the
object alone from VIEWS sides; all images of one size, square:

    meta.json                   {"caption": "a duck, sunset background"}
    color_000.png               the picture; its point map is points_000.png
    color_001 .. color_008.png  the object at azimuths 0, 45, .. 315, before white; points_001 .. points_008.png

A point map is position + 0.5 as a colour, white off the object. Its path to a photograph: find the object (a detector),
lift it to a mesh (image-to-3D), find its pose in the picture, keep what fits (the paper: mask IoU, and LPIPS below 0.3
between the posed render and the picture), and render the maps and the eight views.

A scene ID becomes three tensors of a shard: ID.color and ID.points, (1 + V, 2, C, h, w), and ID.text, as in
full/latents.py.
"""
import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from tqdm import tqdm

from data import LATENT_SCALE
from full.encoders import Encoders, padded
from full.latents import LatentSet, encode_objects
from full.objects import first_of, object_folders, read_pixels
from support.files import write_text
from support.launch import UsageError, check_out, launch, run_cli, within
from toy.scenes import SIDES, scene_set, spread_views
from toy.world import VOCAB

VIEWS = len(SIDES)
KINDS = ("color", "points")

# ---------------------------------------------------------------------------------------------------------------------
# Folders


def read_scene_folder(folder, size):
    """(caption, pictures (2, 1 + V, 3, size, size) in [-1, 1], colours and point maps) of a scene.

    Raises FileNotFoundError or ValueError, naming the file, where one is missing, damaged or of another size.
    """
    path = Path(folder) / "meta.json"
    try:
        caption = json.loads(path.read_text(encoding="utf-8")).get("caption")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON, an object {{..}}: {error}") from None
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f'{path} has no caption: add "caption": "a duck, sunset background"')
    pictures = []
    for kind in KINDS:
        for k in range(1 + VIEWS):
            file = first_of(Path(folder) / f"{kind}_{k:03}", ".png")
            pixels = read_pixels(file)
            if pixels.shape[:2] != (size, size):
                raise ValueError(f"{file} is of {pixels.shape[1]} x {pixels.shape[0]} pixels, not {size} (--size)")
            color = pixels[..., :3]
            if pixels.shape[2] == 4:                                    # before white
                color = color * pixels[..., 3:] + 1 - pixels[..., 3:]
            pictures.append(2 * color.movedim(-1, 0) - 1)
    return caption, torch.stack(pictures).unflatten(0, (len(KINDS), -1))


def encode_scene(folder, encode_image, encode_text, size):
    """({name: float16 tensor} as a shard has them, caption) of a scene."""
    caption, pictures = read_scene_folder(folder, size)
    tensors = {f"{folder.name}.{kind}": encode_image(images).half() for kind, images in zip(KINDS, pictures)}
    tensors[f"{folder.name}.text"] = encode_text([caption])[0].half()
    return tensors, caption


def write_toy_scenes(out, num, size, seed):
    """Writes `num` toy scenes, each of another asset, as an example of the layout. Raises ValueError where `out` holds
    something already."""
    check_out(f"{out}/x", "out")
    if os.path.isdir(out) and os.listdir(out):
        raise ValueError(f"{out} is there already: name a new folder")
    for k in tqdm(range(num), desc="rendering", unit="scene"):
        with TemporaryDirectory() as folder:                            # a set of one asset
            scenes = scene_set(1, seed + k, size=size, folder=folder)
        words = [VOCAB[word] for word in scenes["text"][0] if word > 1]
        os.makedirs(f"{out}/{k:04}", exist_ok=True)
        for kind, name in enumerate(KINDS):
            for v, pixels in enumerate([scenes["image"][0, kind], *scenes["references"][0, kind]]):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(f"{out}/{k:04}/{name}_{v:03}.png")
        caption = f"a {words[1]}, {' '.join(words[2:])}"
        write_text(f"{out}/{k:04}/meta.json", json.dumps({"caption": caption}) + "\n")     # last: now it counts as one
    print(f"wrote {num} scenes to {out}")


# ---------------------------------------------------------------------------------------------------------------------
# Shards


class SceneLatents(LatentSet):
    """Shards of scenes, memory-mapped. shape: (scenes, K pictures that are drawn).

    config: the model's. num_references: V of the views, `spread_views`. points: whether there are point maps (K = 2).
    Raises ValueError where the shards are no scenes, or do not fit the model.
    """

    def __init__(self, folder, config, num_references, points=True):
        if not any(Path(folder).rglob("*.safetensors")):
            raise ValueError(f"{folder} holds no shards: write them with python -m full.scenes encode")
        super().__init__(folder, config)
        if self.grid != 1 + VIEWS:
            raise ValueError(f"{folder} holds no scenes: write them with python -m full.scenes encode")
        self.check_shapes(folder, KINDS)
        self.kinds = KINDS[:1 + points]
        self.num_references = num_references
        self.shape = (len(self.places), len(self.kinds))

    def sample(self, k):
        """Scene k: "image" (K, 2, C, h, w), mean and deviation, unscaled; "control" (K, V, C, h, w), scaled; "text"
        (L, D) and "text_mask" (L,)."""
        file, name = self.places[k]
        text, mask = padded(file.get_tensor(f"{name}.text"), self.config.text_length)
        pictures = torch.stack([file.get_tensor(f"{name}.{kind}") for kind in self.kinds])          # (K, 1 + V, 2, ..)
        views = pictures[:, 1:, 0][:, spread_views(self.num_references)]                           # (K, V, C, h, w)
        return {"image": pictures[:, 0], "control": views * LATENT_SCALE, "text": text, "text_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sub = commands.add_parser("toy", help="write toy scenes, as an example")
    sub.add_argument("out", help="folder to write a folder for each scene to")
    sub.add_argument("--num", type=within(1, 10 ** 6), default=8, help="how many (default %(default)s)")
    sub.add_argument("--seed", type=within(0, 10 ** 12), default=0, help="which assets (default %(default)s)")
    sub.add_argument("--size", type=within(8, 2 ** 12), default=512, help="pixels to a side (default %(default)s)")
    sub = commands.add_parser("encode", help="VAE latents and T5 tokens of scenes; also under torchrun")
    sub.add_argument("scenes", help="folder of scene folders")
    sub.add_argument("out", help="folder to write shards to")
    sub.add_argument("--vae", required=True, metavar="DIR", help="PixArt's vae folder (needs diffusers)")
    sub.add_argument("--text_encoder", required=True, metavar="DIR", help="PixArt's text_encoder folder, with "
                     "tokenizer beside it (needs transformers)")
    sub.add_argument("--size", type=within(8, 2 ** 12), default=512, help="pixels to a side of the images "
                     "(default %(default)s)")
    sub.add_argument("--shard", type=within(1, 10 ** 6), default=32, help="scenes a file (default %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.size % 8:
        raise UsageError(f"--size must be a multiple of 8, not {args.size}")
    if args.command == "toy":
        return write_toy_scenes(args.out, args.num, args.size, args.seed)
    launched, encoders = launch(), Encoders(args.vae, args.text_encoder)
    encode_objects(object_folders(args.scenes), args.out, encoders, args.size, args.shard, launched, encode_scene)
    if launched.rank == 0:
        print(f"the shards are in {args.out}")


if __name__ == "__main__":
    run_cli(main)
