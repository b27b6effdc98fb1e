"""
Rendered objects on disk, which the full configuration is trained on: a folder each, with square images of one size.

    python -m full.objects DIR --num 8 --size 512 --seed 0      # toy objects in our own layout, to try full.latents on

Two layouts are read; v numbers the views. Our own: four views, 000 .. 003.
    meta.json       {"caption": "a red mug", "azimuths": [0, 90, 180, 270], "elevation": 20, "extent": 0.55}: cameras as
                    in geometry/camera.py; extent is half the width of an image in the object's units
    color_v.png     RGBA, alpha = coverage; or RGB before white
    normal_v.png    n / 2 + 0.5, n in the object's frame (see geometry/camera.py); of 16 bits the upper 8 are read
    position_v.npy  p + 0.5 for p in [-0.5, 0.5], float (H, W, 3), NaN off the object; or .png, white off it

Objaverse-Ortho10View (of MV-Adapter), z up: any number of views, of which the four at AZIMUTHS are taken.
    meta.json       "locations", each with "index" (v = 0000 ..), "transform_matrix" (4 x 4, camera to world; the camera
                    looks along its -z, y is up), "ortho_scale" (an image's width in the world's units), and perhaps
                    "projection_type"
    color_v.webp    as above; normal_v.webp likewise, n in the world's frame
    depth_v.exr     or .npy, (H, W): distance from the camera's plane; 0, huge or not finite off the object

A caption that meta.json lacks is read from caption.txt.
"""
import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, Views, camera, project
from support.launch import a_seed, check_out, run_cli, within
from toy.render import Look, render
from toy.world import asset_captions, exaggerated, sample_assets, take

# ---------------------------------------------------------------------------------------------------------------------
# Reading


class FiledView(NamedTuple):
    """One view as its files have it."""
    files: list                         # three Paths: of the colour, the normal, and the position or depth
    color: torch.Tensor                 # (3 or 4, H, W) in [0, 1]
    normal: torch.Tensor                # (3, H, W)
    position: torch.Tensor              # (3, H, W), NaN off the object
    step: float                         # what the position is exact to


def object_folders(root):
    """Sorted list of the folders (Path) in root that hold a meta.json. Raises FileNotFoundError where root is no
    folder, ValueError where it has none of them."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no such folder: {root}")
    found = sorted(path.parent for path in Path(root).glob("*/meta.json") if path.parent.suffix != ".tmp")
    if not found:
        raise ValueError(f"{root} has no folder of a rendered object, ID/meta.json with its images (see "
                         "full/objects.py)")
    return found


def read_object(folder):
    """(caption, Views) of one rendered object in either layout: N = 1, V = 4 at AZIMUTHS, rgb before white.

    Positions are scaled so that an image spans EXTENT to each side, as `project` has it. A pixel at an edge whose
    normal or position is mostly background does not count as object. Raises FileNotFoundError or ValueError, naming
    the file, where one is missing, damaged, of another size, or does not fit its camera.
    """
    folder = Path(folder)
    path = first_of(folder / "meta", ".json")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        text = meta.get("caption")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON, an object {{..}}: {error}") from None
    if text is None and (folder / "caption.txt").is_file():
        text = (folder / "caption.txt").read_text(encoding="utf-8", errors="replace").strip()
    if not text or not isinstance(text, str):
        raise ValueError(f'{path} has no caption: add "caption": "a red mug", or a file caption.txt beside it')
    read = read_ortho10view if "locations" in meta else read_own
    elevation, extent, found = read(folder, meta)
    size, scale, maps = found[0].color.shape[-1], EXTENT / extent, []
    for azimuth, view in zip(AZIMUTHS, found):
        for file, values in zip(view.files, (view.color[:3], view.normal, view.position)):
            if values.shape != (3, size, size):
                raise ValueError(f"{file} has the shape {tuple(values.shape)}, not (3, {size}, {size}): images are "
                                 f"square and as wide as {found[0].files[0].name}")
        view = view._replace(position=view.position * scale, step=view.step * scale)
        maps.append(checked_maps(view, azimuth, elevation))
    views = Views(*(torch.stack(part)[None] for part in zip(*maps)))
    if not views.normal.any():
        raise ValueError(f"{folder}: no view shows an object")
    return text, views


def checked_maps(view, azimuth, elevation):
    """The rgb (3, H, W), mask (1, H, W), normal and position (3, H, W) as in `Views` of a FiledView.

    A ValueError names the file that does not fit. All checks but the last are of pixels that the object fills, as
    others are mixtures.
    """
    files, color, normal, position, step = view
    known = position.isfinite().all(dim=0)
    mask = color[3] if len(color) == 4 else known.float()
    full = known & (mask > 0.99)
    norm, reach, limit = normal.norm(dim=0), position.abs().amax(dim=0), 0.505 + step   # half floats are off by 0.002
    if full.any():
        gap = float((norm - 1).abs()[full].median())
        if gap > 0.05:                  # 8 bits give 0.01 and edges are few; a forgotten gamma gives 0.2
            raise ValueError(f"{files[1]}: its normals are off unit length by {gap:.2f} (median): n / 2 + 0.5 is read")
        forward = camera(azimuth, elevation)[2][:, None, None]
        if (normal * forward).sum(dim=0)[full].median() > 0:
            raise ValueError(f"{files[1]}: most of its normals look away from the camera: are they in another frame?")
        if reach[full].max() > limit:
            raise ValueError(f"{files[2]}: a position is {reach[full].max():.3f} from the middle, more than 0.5 (where "
                             f"an image spans {EXTENT}): make the object smaller, or the image wider")
        column, row, _ = project(position, azimuth, elevation)
        line = torch.arange(color.shape[-1]) + 0.5
        gap = float(torch.hypot(column - line, row - line[:, None])[full].median())
        if gap > 1 + step * len(line) / (2 * EXTENT):
            raise ValueError(f"{files[2]} lies {gap:.1f} pixels off its camera (median), azimuth {azimuth}, elevation "
                             f"{elevation:g}: do the cameras in meta.json fit?")
    apart = (known & (mask == 0)) | (~known & (mask > 0.99))
    if apart.sum() > 0.25 * known.sum():                                # edges alone: 0.12 at 16 pixels, 0.01 at 64
        raise ValueError(f"{files[2]}: the object is not where {files[0].name} is opaque, {int(apart.sum())} pixels "
                         f"differ and {int(known.sum())} have a position")
    there = known & ((norm - 1).abs() < 0.5) & (reach <= limit)
    return (color[:3] * mask + 1 - mask if len(color) == 4 else color, mask[None],
            F.normalize(normal, dim=0).masked_fill(~there, 0), position.clamp(-0.5, 0.5).masked_fill(~there, 0))


def read_own(folder, meta):
    """Elevation, extent and the four FiledViews of a folder in our own layout."""
    path = folder / "meta.json"
    turns, elevation, extent = meta.get("azimuths"), meta.get("elevation"), meta.get("extent")
    if turns != list(AZIMUTHS):
        raise ValueError(f"{path} has the azimuths {turns}, the model takes {list(AZIMUTHS)}")
    for name, value, low, high in (("elevation", elevation, -90, 90), ("extent", extent, 0, math.inf)):
        if not isinstance(value, (int, float)) or not low < value < high:
            raise ValueError(f"{path}: {name} must be a number between {low} and {high}, not {value}")
    views = []
    for v in range(len(AZIMUTHS)):
        files = [first_of(folder / f"color_{v:03}", ".png"), first_of(folder / f"normal_{v:03}", ".png"),
                 first_of(folder / f"position_{v:03}", ".npy", ".png")]
        pixels = [read_pixels(file) for file in files]
        if pixels[2].ndim != 3:
            raise ValueError(f"{files[2]} has the shape {tuple(pixels[2].shape)}, not (H, W, 3)")
        color, normal, position = [part.movedim(-1, 0) for part in pixels]
        exact, position = files[2].suffix == ".npy", position[:3] - 0.5
        if not exact:
            position = position.masked_fill((position == 0.5).all(dim=0), math.nan)
        elif (~position.isfinite().all(dim=0) & ~position.isnan().all(dim=0)).any():
            raise ValueError(f"{files[2]} holds infinite values, or pixels that are NaN in part")
        views.append(FiledView(files, color, 2 * normal[:3] - 1, position, 0 if exact else 1 / 255))
    return elevation, extent, views


class Location(NamedTuple):
    """A camera of Ortho10View."""
    azimuth: float                      # degrees, as is elevation
    elevation: float
    index: int                          # of its files
    matrix: torch.Tensor                # (4, 4) float64, camera to world
    scale: float                        # an image's width in the world's units


def read_ortho10view(folder, meta):
    """What `read_own` gives, of a folder in Ortho10View's layout: of the elevations with views at all of AZIMUTHS, to
    within 1 degree, the one nearest to ELEVATION."""
    path = folder / "meta.json"
    try:
        locations = [read_location(place, meta.get("projection_type", "orthographic")) for place in meta["locations"]]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path}: its locations cannot be read: {reason}") from None
    elevation, four = four_around(locations)
    if four is None:
        raise ValueError(f"{folder} has no four views at the azimuths {list(AZIMUTHS)} and one elevation")
    scale = four[0].scale
    if not 0 < scale < math.inf or any(abs(location.scale - scale) > 1e-4 * scale for location in four):
        raise ValueError(f"{path}: ortho_scale must be above 0 and the same in all views")
    return elevation, scale / 2, [read_location_files(folder, location) for location in four]


def read_location(place, projection):
    """The Location of an entry of "locations". Raises ValueError, KeyError or another where it is none; projection: of
    entries that do not say."""
    index, kind = int(place["index"]), place.get("projection_type", projection)
    if str(kind).lower() not in ("ortho", "orthographic") or "ortho_scale" not in place:
        raise ValueError(f"view {index} is not orthographic with an ortho_scale")
    matrix = torch.tensor(place["transform_matrix"], dtype=torch.float64)
    turn = matrix[:3, :3]
    if matrix.shape != (4, 4) or not (turn.T @ turn - torch.eye(3)).abs().max() < 1e-3:
        raise ValueError(f"the transform_matrix of view {index} is no camera's, 4 x 4 and without scale")
    x, y, z = y_up(turn[:, 2]).tolist()                                 # from the object towards the camera
    return Location(math.degrees(math.atan2(x, z)), math.degrees(math.atan2(y, math.hypot(x, z))), index, matrix,
                    float(place["ortho_scale"]))


def four_around(locations):
    """(elevation, the four Locations at AZIMUTHS) nearest to ELEVATION; (None, None) where there are no such four."""
    def apart(location, azimuth):
        return abs((location.azimuth - azimuth + 180) % 360 - 180)
    for elevation in sorted((location.elevation for location in locations), key=lambda e: abs(e - ELEVATION)):
        ring = [location for location in locations if abs(location.elevation - elevation) <= 1]
        four = [min(ring, key=lambda location: apart(location, azimuth)) for azimuth in AZIMUTHS]
        if all(apart(location, azimuth) <= 1 for location, azimuth in zip(four, AZIMUTHS)):
            return elevation, four
    return None, None


def read_location_files(folder, location):
    """The FiledView of a Location: the position of a pixel follows from its depth."""
    index, scale = location.index, location.scale
    files = [first_of(folder / f"color_{index:04}", ".webp"), first_of(folder / f"normal_{index:04}", ".webp"),
             first_of(folder / f"depth_{index:04}", ".exr", ".npy")]
    color, normal, depth = [read_pixels(file) for file in files]
    if depth.ndim != 2:
        raise ValueError(f"{files[2]} has the shape {tuple(depth.shape)}, not (H, W)")
    height, width = depth.shape
    x = ((torch.arange(width) + 0.5) / width - 0.5) * scale
    y = (0.5 - (torch.arange(height)[:, None] + 0.5) / height) * scale
    right, up, back, origin = location.matrix[:3].T[:, :, None, None]
    off = ~((depth > 0) & (depth < 1000 * scale))
    if color.shape == (height, width, 4):
        off |= color[..., 3] == 0
    position = y_up(origin + x * right + y * up - depth * back).float().masked_fill(off, math.nan)
    return FiledView(files, color.movedim(-1, 0), y_up(2 * normal.movedim(-1, 0) - 1), position, 0)


def y_up(vectors):
    """(3, ...) in a frame with z up -> in ours; what looks along y from -y looks from our +z, at azimuth 0."""
    return torch.stack([vectors[0], vectors[2], -vectors[1]])


def first_of(path, *endings):
    """The first of the files path + ending that is there. Raises FileNotFoundError where none is."""
    files = [path.with_name(path.name + ending) for ending in endings]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"no such file: {' or '.join(map(str, files))}")


def read_pixels(path):
    """float32 (H, W, C) in [0, 1] of an image, C = 3 or, where it has transparency, 4; (H, W) of the first channel of
    an OpenEXR file; the array of a .npy file. Raises ValueError where it cannot be read."""
    try:
        if path.suffix == ".npy":
            pixels = np.load(path)
        elif path.suffix == ".exr":
            import OpenEXR
            pixels = next(iter(OpenEXR.File(str(path)).channels().values())).pixels
            pixels = pixels.reshape(*pixels.shape[:2], -1)[..., 0]      # R, G and B come as one
        else:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("it has more than 8 bits a colour: save it with 8")
                alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                pixels = np.float32(image.convert("RGBA" if alpha else "RGB")) / 255
        return torch.from_numpy(pixels.astype(np.float32))
    except ImportError:
        raise ValueError(f"{path} needs the package OpenEXR: pip install OpenEXR") from None
    except (OSError, SyntaxError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, MemoryError,
            Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_object(folder, caption, views, k=0, elevation=ELEVATION, extent=EXTENT):
    """Writes object k of Views at AZIMUTHS, before white, as a new folder in our own layout.

    elevation: degrees; extent: half the width of an image in the units of views.position. Raises ValueError where it
    cannot be written, or where the folder holds something already.
    """
    folder = Path(folder)
    if any(part is None or part.shape[1] != len(AZIMUTHS) for part in views):
        raise ValueError(f"{folder}: an object is written with colours and maps of {len(AZIMUTHS)} views")
    rgb, mask, normal, position = [part[k].float().cpu() for part in views]                         # (V, C, H, W)
    off = (normal == 0).all(dim=1, keepdim=True)
    color = torch.where(mask > 0, (rgb + mask - 1) / mask, 1)           # without the white
    pictures = {"color": torch.cat([color, mask], dim=1), "normal": (normal / 2 + 0.5).masked_fill(off, 1)}
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for v in range(len(AZIMUTHS)):
            for name, maps in pictures.items():
                pixels = (maps[v].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(partial / f"{name}_{v:03}.png")
            place = (position[v] + 0.5).masked_fill(off[v], math.nan)
            np.save(partial / f"position_{v:03}.npy", place.permute(1, 2, 0))
        meta = dict(caption=caption, azimuths=AZIMUTHS, elevation=elevation, extent=extent)
        (partial / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror or error}), choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_toy_objects(out, num, size=512, seed=0):
    """Writes `num` toy objects as rendered objects on disk: an example of the format, to try the full pipeline on.
    Folders that are there already are left as they are, whatever they hold; it says how many those are."""
    check_out(f"{out}/x", "out")
    assets, left = exaggerated(sample_assets(num, seed)), []
    for k in tqdm(range(num), desc="rendering", unit="object"):
        if os.path.isdir(f"{out}/{k:04}"):
            left.append(k)
            continue
        one = take(assets, slice(k, k + 1))
        write_object(f"{out}/{k:04}", asset_captions(one)[0], render(one, Look("render"), size=size))
    print(f"wrote {num - len(left)} objects to {out}" + f"; {len(left)} were there already, and are left" * bool(left))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write a folder for each object to")
    parser.add_argument("--num", type=within(1, 10 ** 6), default=8, help="how many objects (default %(default)s)")
    parser.add_argument("--size", type=within(1, 2 ** 12), default=512, help="pixels to a side (default %(default)s)")
    parser.add_argument("--seed", type=a_seed, default=0, help="which objects (default %(default)s)")
    args = parser.parse_args(argv)
    write_toy_objects(args.out, args.num, args.size, args.seed)


if __name__ == "__main__":
    run_cli(main)
