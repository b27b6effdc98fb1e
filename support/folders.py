"""Images in folders: which there are, their pixels, their captions, and a function applied to all in batches."""
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.files import read_json

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def find_images(folder, pattern="*"):
    """Paths of the images under a folder whose names fit, relative to it and sorted. Raises where there are none."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}")
    if os.path.isabs(pattern) or ".." in Path(pattern).parts or not pattern:
        raise ValueError(f"the pattern {pattern!r} must be a name as color_*, below {folder}")
    paths = [path for path in Path(folder).rglob(pattern) if path.suffix.lower() in ENDINGS]
    if not paths:
        raise ValueError(f"{folder} holds no PNG, JPEG or WebP image called {pattern}")
    return sorted(str(path.relative_to(folder)) for path in paths)


def read_image(path):
    """(3, H, W) in [0, 1]; what is transparent lies before white. Raises ValueError naming a file it cannot read."""
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith(("I", "F"))
            image = image.convert("RGBA")
    except Exception as error:          # Pillow's readers raise whatever a broken file leads them to
        raise ValueError(f"cannot read the image {path}: {error}") from None
    if deep:
        raise ValueError(f"{path} has more than 8 bits a colour: save it with 8")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def read_caption(path):
    """The caption of an image: NAME.txt beside it, or of its folder: "caption" in meta.json, or caption.txt.

    Raises FileNotFoundError where there is none of them.
    """
    folder, beside = os.path.dirname(path), os.path.splitext(path)[0] + ".txt"
    meta, of_all = os.path.join(folder, "meta.json"), os.path.join(folder, "caption.txt")
    if not os.path.isfile(beside) and os.path.isfile(meta):
        stored = read_json(meta)
        if isinstance(stored, dict) and isinstance(stored.get("caption"), str):
            return stored["caption"]
    for name in (beside, of_all):
        if os.path.isfile(name):
            try:
                return Path(name).read_text(encoding="utf-8").strip()
            except UnicodeDecodeError:
                raise ValueError(f"{name} is no text in UTF-8") from None
    raise FileNotFoundError(f"no caption for {path}: --clip wants {beside}, or a 'caption' in {meta}")


def read_views(images, maps, views):
    """The views of one object: images (V, 3, H, W) in [0, 1] from the folder `images`, positions (V, 3, H, W), NaN off
    the object, from the folder `maps` (Path). Raises ValueError where they are damaged or of several sizes."""
    try:
        image = torch.stack([read_image(f"{images}/color_{v:03}.png") for v in range(views)])
        position = [torch.from_numpy(np.load(maps / f"position_{v:03}.npy")) for v in range(views)]
        position = torch.stack([view.float().permute(2, 0, 1) for view in position]) - 0.5
    except (RuntimeError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{maps}: its views or maps are not of one size, or damaged: {error}") from None
    if image.shape != position.shape:
        raise ValueError(f"{maps} has maps of {tuple(position.shape[-2:])}, its images {tuple(image.shape[-2:])}")
    if not position.isfinite().any():
        raise ValueError(f"{maps} has maps without any surface: NaN stands off the object, numbers on it")
    return image, position


def in_batches(paths, work, size=64):
    """torch.cat of work(images (n, 3, H, W), their paths) over images on disk, in their order, read a batch at a time.

    A batch holds up to `size` images, and ends early where the next image is of another size.
    """
    done, images, read = [], [], []
    for path in tqdm(paths, desc=os.path.dirname(paths[0]) or ".", unit="image", leave=False):
        image = read_image(path)
        if images and (len(images) == size or image.shape != images[0].shape):
            done.append(work(torch.stack(images), read))
            images, read = [], []
        images.append(image)
        read.append(path)
    done.append(work(torch.stack(images), read))
    return torch.cat(done)
