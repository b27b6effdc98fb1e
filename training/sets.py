"""What stages 1 and 2 start from: the base model, the two sets (Sec. 5, C.1), the empty caption."""
import os

import torch

from data import synthetic_set
from dit import PRESETS, read_config, require_config
from full.latents import LatentSet
from full.pixart import load_base
from sample import Sampling, default_base, trained_task, write_real_set
from support.files import checksum, load_tensors, read_metadata, run_or_shipped
from support.launch import on_rank_0_first
from toy.world import TEXT_LENGTH, VOCAB, tokenize


def base_path(args):
    """The base model: --base, else the run folder's, else the shipped one. Raises FileNotFoundError."""
    if args.base and not os.path.isfile(args.base):
        raise FileNotFoundError(f"no such file: {args.base} (--base)")
    return args.base or default_base(args.preset, args.out)


def scenes_base(preset="toy", folder=None):
    """Path of the base model that knows scenes: at toy the one that has learned them, of the run folder, else the
    shipped one; else `default_base`. Raises FileNotFoundError."""
    if preset != "toy":
        return default_base(preset, folder)
    path = run_or_shipped(folder or "runs/toy", preset, "scenes.safetensors")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}: train it with python -m toy.pretrain --scenes")
    return path


def check_base(args):
    """Raises, before any work, where the base model is missing, damaged, of another configuration, or no base model."""
    path = base_path(args)
    metadata = read_metadata(path)
    if trained_task(path):
        raise ValueError(f"--base {path} is what stage 2 made of a base model: name the base model itself")
    if "config" in metadata:                                # PixArt-alpha's weights have none
        require_config(path, read_config(path, metadata), PRESETS[args.preset])


def base_model(args, device):
    """The base model of the preset's configuration: `base_path`'s. Raises ValueError where its view encodings are zero,
    from which they do not learn."""
    base = load_base(base_path(args), device, PRESETS[args.preset])
    if base.view_encoding is not None and not base.view_encoding.any():
        raise ValueError(f"{base_path(args)} has view encodings of zero, as base models had until 2026-11-26: take "
                         "weights/toy_base.safetensors, or train one anew with python -m toy.pretrain")
    return base


def training_sets(args, launched, views, needs_real=True, control=False):
    """{"syn": set, "real": set}, of --synthetic and --real, or of the toy world and the base model (C.1).

    views: 4 for a synthetic set of grids, 1 for one of single images; real images are always single. needs_real: False
    leaves the real set undrawn and out. control: whether the synthetic set must have maps.
    """
    if PRESETS[args.preset].latent:
        return latent_sets(args, views, needs_real, control)
    size, folder = PRESETS[args.preset].image_size, f"{args.out}/sets"
    if args.synthetic:
        synthetic = read_set(args.synthetic, size, views=4)
    else:
        synthetic = on_rank_0_first(launched, lambda: synthetic_set(args.num_assets, size=size, folder=folder,
                                                                    device=launched.device))
    if control and "control" not in synthetic:
        raise ValueError("task texturing needs control maps, but the synthetic set has none: use --task text")
    if not control:
        synthetic.pop("control", None)
    if views == 1:
        synthetic = {"image": synthetic["image"].flatten(0, 1)[:, None],                            # (4 N, 1, C, H, W)
                     "text": synthetic["text"].repeat_interleave(4, 0)}
    if not needs_real:
        return {"syn": synthetic}
    path = args.real
    if not path and args.synthetic:                             # C.1: real images have the captions of the renders
        raise ValueError("--synthetic names renders of your own: name real images with the same captions with --real")
    if not path:
        path = real_set_path(args)
        sampling = Sampling(num_steps=args.real_steps, dtype=args.dtype)
        write_real_set(path, base_path(args), args.num_assets, sampling, launched)
    return {"syn": synthetic, "real": read_set(path, size, views=1)}


def real_set_path(args):
    """Where the run folder keeps the real set that the base model draws."""
    return f"{args.out}/sets/real_{args.num_assets}.safetensors"


def latent_sets(args, views, needs_real, control):
    """`training_sets` of the full configuration: shards on disk."""
    config = PRESETS[args.preset]
    if not args.synthetic or needs_real and not args.real:
        raise FileNotFoundError(f"preset {args.preset} needs --synthetic DIR, from python -m full.latents encode, and "
                                "--real DIR, from python -m full.real_set")
    synthetic = LatentSet(args.synthetic, config, views > 1, control)
    if not needs_real:
        return {"syn": synthetic}
    real = LatentSet(args.real, config, views=False)
    if real.key["text_encoder"] != synthetic.key["text_encoder"]:
        raise ValueError(f"{args.real} has text of the encoder {real.key['text_encoder']}, {args.synthetic} of "
                         f"{synthetic.key['text_encoder']}")
    return {"syn": synthetic, "real": real}


def read_set(path, size, views):
    """A set of the toy world in a file: {"image": uint8 (N, views, 3, size, size), "text": int64 (N, L), perhaps
    "control": float16 (N, views, 6, size, size)}. Raises ValueError if it holds no such set."""
    tensors, metadata = load_tensors(path)
    if metadata.get("checksum") not in (None, checksum(tensors)):
        raise ValueError(f"{path} is damaged, its bytes have changed: make it again, or delete it")
    if not {"image", "text"} <= tensors.keys():
        raise ValueError(f"{path} is no set of images: it holds no 'image' and 'text'")
    num = len(tensors["image"]) if tensors["image"].dim() else 0
    shapes = {"image": (torch.uint8, (num, views, 3, size, size)), "text": (torch.int64, (num, TEXT_LENGTH)),
              "control": (torch.float16, (num, views, 6, size, size))}
    for name, (dtype, shape) in shapes.items():
        tensor = tensors.get(name)
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or num == 0):
            raise ValueError(f"{path}: {name!r} must be {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    words = tensors["text"]
    if not 0 <= words.min() <= words.max() < len(VOCAB):
        raise ValueError(f"{path}: 'text' holds word ids {words.min()} to {words.max()}, of the toy world's "
                         f"{len(VOCAB)}")
    if "control" in tensors and not tensors["control"].isfinite().all():
        raise ValueError(f"{path}: 'control' holds numbers that are not finite")
    return tensors


def null_caption(dit, synthetic):
    """What drops the text for guidance: no words; of vectors PixArt's own, under the caption's mask as PixArt has it,
    else the text encoder's for an empty caption."""
    if not dit.config.latent:
        return {"text": tokenize([""])}
    return synthetic.null if dit.null_text is None else {"text": dit.null_text[None]}
