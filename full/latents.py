"""Latents on disk, what the full model trains on: rendered objects through PixArt's VAE and T5 (Sec. 4), in shards.

    python -m full.latents encode objects latents --vae pixart/vae --text_encoder pixart/text_encoder
    torchrun --nproc_per_node=8 -m full.latents encode objects latents --vae pixart/vae --text_encoder ...
    python -m full.latents read latents                     # how fast the training can read them

An object ID, a folder that full/objects.py reads, becomes four tensors of a shard, all float16:

    ID.color, ID.normal, ID.position    (V, 2, C, h, w)     mean and deviation of the unscaled latents
    ID.text                             (n, D)              its valid tokens; the shard's null_text is the empty caption

The real set (full/real_set.py) is of the same form, without maps. The same command again makes the shards that are
missing, and those whose renders have changed: a file is newer than the shard, or there are others, or of another size.
"""
import argparse
import os
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import LATENT_SCALE, control_maps
from dit import PRESETS
from full.encoders import Encoders, encoder_id, load_text_encoder, load_vae, padded
from full.objects import object_folders, read_object
from support.files import checksum, read_metadata, save_tensors
from support.launch import barrier, check_out, launch, run_cli, within

MAPS = ("color", "normal", "position")
WRITERS = "python -m full.latents encode or python -m full.real_set"

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def encode_object(folder, encode_image, encode_text, size):
    """({name: float16 tensor} as a shard has them, caption) of one rendered object."""
    caption, views = read_object(folder)
    if views.rgb.shape[-2:] != (size, size):
        raise ValueError(f"{folder} has views of {tuple(views.rgb.shape[-2:])} pixels, not {size} x {size} (--size)")
    normal, position = control_maps(views)[0].split(3, dim=1)                                       # (V, 3, H, W)
    latents = encode_image(torch.cat([2 * views.rgb[0] - 1, normal, position])).half()              # (3 V, 2, C, h, w)
    tensors = {f"{folder.name}.{name}": part for name, part in zip(MAPS, latents.chunk(3))}
    tensors[f"{folder.name}.text"] = encode_text([caption])[0].half()
    return tensors, caption


def encode_objects(folders, out, encoders, size, shard, launched, encode=encode_object):
    """Encodes every folder of a rendered object into OUT/FIRST_ID.safetensors, `shard` objects a file.

    encoders: Encoders. size: pixels to a side that the views must have. encode: what makes of a folder its tensors and
    caption. The shard's header says under "shard" how it was made and of what, see `save_shard`. Shards are spread over
    the ranks of torchrun; each is a pure function of its objects and written whole, so that a run that was stopped goes
    on; those of files that have changed since are made again. Raises UsageError where no shard can be written,
    ValueError where `out` holds shards made otherwise or of other objects, and naming the file of a bad object.
    """
    key = dict(vae=encoder_id(encoders.vae), text_encoder=encoder_id(encoders.text_encoder), size=size,
               scale=LATENT_SCALE, dtype="float16")
    shards = {f"{out}/{folders[k].name}.safetensors": folders[k:k + shard] for k in range(0, len(folders), shard)}
    for path in shards:
        check_out(path, "out")
    for path in sorted(Path(out).glob("*.safetensors")):
        check_shard(path, key, [folder.name for folder in shards.get(f"{out}/{path.name}", ())])
    mine = left_to_write(shards, launched, is_current)
    if mine:                                                            # T5 takes its time to load
        encode_image, _ = load_vae(encoders.vae, launched.device)
        encode_text = load_text_encoder(encoders.text_encoder, launched.device)
        null_text = encode_text([""])[0].half()
    total = sum(len(members) for members in mine.values())
    with tqdm(total=total, desc="encoding", unit="object", disable=launched.rank > 0) as progress:
        for path, members in mine.items():
            tensors, captions, (files, _) = {"null_text": null_text}, {}, source_files(members)
            for folder in members:
                encoded, captions[folder.name] = encode(folder, encode_image, encode_text, size)
                tensors |= encoded
                progress.update()
            save_shard(path, tensors, key, captions, files=files)
    barrier(launched)


def left_to_write(shards, launched, current):
    """Those of {path: what goes into it} that this rank writes and that are not there yet, or for which current(path,
    what goes into it) is False; of these it says so."""
    left = dict(list(shards.items())[launched.rank::launched.world])
    for path, content in list(left.items()):
        if os.path.exists(path):
            if current(path, content):
                del left[path]
            else:
                print(f"{path}: what it is made of has changed, making it again", flush=True)
    return left


def source_files(folders):
    """A number that changes where a file in these folders (Paths) comes, goes or changes its size, and when the newest
    was written."""
    found = [(path, path.stat()) for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    names = " ".join(f"{path.parent.name}/{path.name} {stat.st_size}" for path, stat in found)
    return zlib.crc32(os.fsencode(names)), max(stat.st_mtime for _, stat in found)


def is_current(path, folders):
    """Whether a shard is of the files that are in the folders of its objects now."""
    files, newest = source_files(folders)
    return shard_header(path).get("files") == files and newest <= os.path.getmtime(path)


def save_shard(path, tensors, key, captions, **made):
    """Writes a shard: its header holds {"key": how it was made, "captions": {object ID: caption}, "checksum": of the
    tensors, ..}. Raises ValueError naming a tensor whose numbers are not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path} would hold numbers that are not finite, in {name}: look at what it is made of")
    made |= dict(key=key, captions=captions, checksum=checksum(tensors))
    save_tensors(path, tensors, shard=made)                             # one entry: several have no order


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def shard_header(path):
    """What `save_shard` wrote into the header of a shard. Raises ValueError if it is none."""
    header = read_metadata(str(path)).get("shard")
    key, captions = [header.get(part) for part in ("key", "captions")] if isinstance(header, dict) else (None, None)
    whole = isinstance(key, dict) and {"scale", "text_encoder"} <= key.keys() and isinstance(captions, dict)
    if not whole or not captions or not all(isinstance(caption, str) for caption in captions.values()):
        raise ValueError(f"{path} is no shard of {WRITERS}: its header lacks how it was made, or captions")
    return header


def check_shard(path, key, ids):
    """Raises ValueError unless the shard at path was made with this key and holds the objects `ids`."""
    header = shard_header(path)
    was = header["key"]
    other = [f"{name} {was.get(name)} (now {key[name]})" for name in key if was.get(name) != key[name]]
    if other:
        raise ValueError(f"{path} was made otherwise: {', '.join(other)}; choose another folder, or delete this one")
    if list(header["captions"]) != ids:
        raise ValueError(f"{path} holds other objects, or in another order, than one would write now: encode new ones "
                         "into a folder of their own inside this one, or delete it")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class LatentSet:
    """The shards in a folder and those inside it, of `encode_objects` or the real set: memory-mapped, so that a set of
    any size takes no memory.

    config: the model's, which the shapes must fit. views: False makes every view a sample of its own. control: whether
    to give the maps. Then shape is (samples, views a sample), null the empty caption ("text" (1, L, D) and "text_mask"
    (1, L)), key says how the shards were made, and checksums are those of their tensors, by shard. Raises ValueError
    where they do not fit, or one another.
    """

    def __init__(self, folder, config, views=True, control=False):
        self.folder, self.config, self.in_grids, self.control = folder, config, views, control
        self.key, self.places, self.checksums = open_shards(folder)
        file, name = self.places[0]
        found = stored_shape(file, f"{name}.color")
        self.grid, latent = found[0] if found else 0, found[2:]                 # how many views an object has
        if control and not stored_shape(file, f"{name}.normal"):
            raise ValueError(f"task texturing needs control maps, but {folder} has none: use --task text")
        wanted, width = [config.channels, config.image_size, config.image_size], stored_shape(file, "null_text")[-1:]
        if latent != wanted or not self.grid or width != [config.text_dim]:
            raise ValueError(f"{folder} has latents of {latent} and text of width {sum(width)} in float16, the model "
                             f"takes {wanted} and {config.text_dim}")
        self.check_shapes(folder, MAPS if control else MAPS[:1])
        words, num = file.get_tensor("null_text"), len(self.places)                                 # (n, D)
        if not is_finite(words):
            raise ValueError(f"{folder}: null_text holds numbers that are not finite: encode the objects again")
        self.shape = (num, self.grid) if views else (num * self.grid, 1)
        text, mask = padded(words, config.text_length)
        self.null = {"text": text[None], "text_mask": mask[None]}

    def check_shapes(self, folder, parts):
        """Raises ValueError naming the first object that is not as the others; reads headers only."""
        wanted = [self.grid, 2, self.config.channels, self.config.image_size, self.config.image_size]
        for file, name in self.places:
            texts = [stored_shape(file, part) for part in ("null_text", f"{name}.text")]
            whole = all(stored_shape(file, f"{name}.{part}") == wanted for part in parts)
            if not whole or not all(text[1:] == [self.config.text_dim] and 0 < text[0] <= self.config.text_length
                                    for text in texts):
                raise ValueError(f"{folder}: object {name} lacks {' or '.join(parts)} of the shape {wanted}, or a text "
                                 "or null_text of the model's width and length, in float16: encode it again")

    def rows(self, index):
        """The samples `index` (B,) -> "image" (B, V, 2, C, h, w), mean and deviation, unscaled, "text" (B, L, D) and
        "text_mask" (B, L); with control also "control" (B, V, 2 C, h, w), scaled. Raises ValueError naming an object
        whose numbers are not finite."""
        samples = [self.sample(k) for k in index.tolist()]
        for k, sample in zip(index.tolist(), samples):
            if not all(map(is_finite, sample.values())):
                name = self.places[k if self.in_grids else k // self.grid][1]
                raise ValueError(f"{self.folder}: object {name} holds numbers that are not finite: encode it again")
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def sample(self, k):
        """Sample k, as `rows` without its first dimension."""
        if self.in_grids:
            (file, name), views = self.places[k], slice(None)
        else:
            (file, name), view = self.places[k // self.grid], k % self.grid
            views = slice(view, view + 1)
        text, mask = padded(file.get_tensor(f"{name}.text"), self.config.text_length)
        sample = {"image": file.get_slice(f"{name}.color")[views], "text": text, "text_mask": mask}
        if self.control:
            means = [file.get_slice(f"{name}.{part}")[views, 0] for part in ("normal", "position")]     # (V, C, h, w)
            sample["control"] = torch.cat(means, dim=1) * LATENT_SCALE
        return sample


def is_finite(tensor):
    """tensor.isfinite().all(), which takes 60 times as long in float16 on a CPU."""
    return all(end.isfinite() for end in tensor.aminmax())


def stored_shape(file, name):
    """The shape of a float16 tensor in an open safetensors file, [] where it has none of that name."""
    try:
        stored = file.get_slice(name)
    except SafetensorError:
        return []
    return stored.get_shape() if stored.get_dtype() == "F16" else []


def open_shards(folder):
    """(key, [(open file, object ID), ...], [checksum, ...]) of all shards in a folder and those inside it, in the order
    of their paths; a checksum is None where an earlier commit wrote the shard.

    Raises ValueError where there is none, or one is no shard, for latents of another scale, or made otherwise than
    those before it, or where an object comes twice.
    """
    shared_key, places, checksums = None, [], []
    for path in sorted(Path(folder).rglob("*.safetensors")):
        header = shard_header(path)
        key = header["key"]
        if key["scale"] != LATENT_SCALE:
            raise ValueError(f"{path} is for latents times {key['scale']}, here they are times {LATENT_SCALE}")
        if shared_key not in (None, key):
            raise ValueError(f"{path} was made otherwise than the shards before it: {key}, not {shared_key}")
        shared_key, file = key, safe_open(path, "pt")
        places += [(file, name) for name in header["captions"]]
        checksums.append(header.get("checksum"))
    if not places:
        raise ValueError(f"{folder} holds no shards: write them with {WRITERS}")
    name, times = Counter(name for _, name in places).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{folder} holds object {name} twice")
    return shared_key, places, checksums


# ---------------------------------------------------------------------------------------------------------------------
# The command


def benchmark_reading(folder, config, workers, batch=8, rounds=1000):
    """Prints how many grids of four views with control a second a LatentSet gives: from `folder`, or from shards of
    full size that it writes there first, of random numbers."""
    if not os.path.isdir(folder):
        write_random_shards(folder, config)
    grids = LatentSet(folder, config, control=True)
    batches = torch.randint(grids.shape[0], (rounds, batch), generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(workers) as pool:
        for _ in ("warm up", "measure"):                                # the first time the pages come from the disk
            start = time.perf_counter()
            for _ in pool.map(grids.rows, batches):
                pass
    speed = rounds * batch / (time.perf_counter() - start)
    print(f"{speed:.0f} grids/s in batches of {batch}, {workers} thread(s), from {grids.shape[0]} objects in the disk "
          "cache")


def write_random_shards(folder, config, num=128, shard=64):
    """Shards that hold random numbers, of as many objects: to time the reading."""
    shape = (4, 2, config.channels, config.image_size, config.image_size)
    for first in range(0, num, shard):
        ids = [f"{k:04}" for k in range(first, first + shard)]
        tensors = {"null_text": torch.randn(1, config.text_dim).half()}
        for name in ids:
            tensors |= {f"{name}.{part}": torch.randn(shape).half() for part in MAPS}
            tensors[f"{name}.text"] = torch.randn(20, config.text_dim).half()
        key = dict(scale=LATENT_SCALE, text_encoder="none, random numbers")
        save_shard(f"{folder}/{ids[0]}.safetensors", tensors, key, dict.fromkeys(ids, ""))


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sub = commands.add_parser("encode", help="VAE latents and T5 tokens of rendered objects, the synthetic set of "
                                             "--preset full; also under torchrun")
    sub.add_argument("objects", help="folder of object folders")
    sub.add_argument("out", help="folder to write shards to")
    sub.add_argument("--vae", required=True, metavar="DIR", help="PixArt's vae folder (needs diffusers)")
    sub.add_argument("--text_encoder", required=True, metavar="DIR", help="PixArt's text_encoder folder, with "
                     "tokenizer beside it (needs transformers)")
    sub.add_argument("--size", type=within(8, 2 ** 12), default=512, help="pixels to a side of the views "
                     "(default %(default)s)")
    sub.add_argument("--shard", type=within(1, 10 ** 6), default=64, help="objects a file (default %(default)s)")
    sub = commands.add_parser("read", help="time the reading of shards for --preset full")
    sub.add_argument("folder", help="of shards; if it is not there, it is made, of random numbers (120 MB)")
    sub.add_argument("--workers", type=within(1, 256), default=2, help="threads (default %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.command == "read":
        return benchmark_reading(args.folder, PRESETS["full"], args.workers)
    launched, encoders = launch(), Encoders(args.vae, args.text_encoder)
    encode_objects(object_folders(args.objects), args.out, encoders, args.size, args.shard, launched)
    if launched.rank == 0:
        print(f"the shards are in {args.out}")


if __name__ == "__main__":
    run_cli(main)
