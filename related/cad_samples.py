"""Steps 1 to 3 of CAD (related/cad.py): the samples of one reference that its 3D GAN learns from.

The view-conditioned prior draws the reference from all around (related/view_prior.py), a photographic model refines
what it drew (the base model, or under a depth condition Realiz3D's: related/depth_condition.py), and of the samples of
a pose those that disagree with the others are dropped.
"""
import json
import os
from dataclasses import replace
from zlib import crc32

import torch
import torch.nn.functional as F
from tqdm import tqdm

from baselines.sdedit import denoised_again
from dit import PRESETS, T
from geometry.camera import VIEWS
from geometry.hull import silhouette
from related.depth_condition import REFINEMENT, refine_by_depth, train_surface_net
from related.view_prior import draw_views, load_prior, poses_around
from sample import CFG_SCALE, Sampling, default_model, initial_noise, load_network, trained_task
from support.files import cached, checksum, file_id, read_metadata, run_or_shipped
from support.launch import BAR
from support.pictures import save_picture, to_uint8
from toy.world import tokenize
from training.sets import base_path, check_base

OF_REFINEMENT = ("refiner", "prompt", "depth", "strength")              # what the prior's own samples do not depend on

# ---------------------------------------------------------------------------------------------------------------------
# 2. Distribution refinement: SDEdit (Meng et al. 2022) by the photographic model


def view_phrase(azimuth, named=10):
    """", front view" within `named` degrees of a view that has a word; elsewhere nothing, as in the base model's
    captions, whose words are exact to 8 degrees: a word that does not fit turns the object."""
    quarter = round(float(azimuth) / 90)
    return f", {VIEWS[quarter % 4]} view" if abs(float(azimuth) - 90 * quarter) <= named else ""


def refine(base, images, azimuth, prompt, strength, sampling):
    """Images (N, 3, H, W) in [-1, 1], noised to `strength` of the steps and denoised by the base model, which is told
    what it sees and, where there is a word for it, from which side. azimuth: (N,) degrees."""
    text = tokenize([f"photo of {prompt}{view_phrase(turn)}, white background" for turn in azimuth])
    done = []
    for rows in tqdm(torch.arange(len(images)).split(sampling.batch), desc="refinement", unit="batch"):
        keys = (REFINEMENT + rows).tolist()                             # other noise than the samples were drawn from
        noise = initial_noise(keys, images.shape[1:], sampling.seed)
        done.append(denoised_again(base, images[rows], noise, text[rows], strength * T, sampling))
    return torch.cat(done)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pose pruning


def agree_with_others(images, features, outline=0.75, meaning=0.6):
    """Which samples (P, K, 3, H, W) in [0, 1] agree with the other samples of their pose: (P, K) bool.

    Silhouettes must overlap with those of the others by `outline` (median IoU), and features (P, K, F) point the same
    way by `meaning` (median cosine). The best of each pose stays in any case, so that no pose goes missing.
    """
    shape = silhouette(images).flatten(2).float()                                                   # (P, K, H W)
    both, count = shape @ shape.mT, shape.sum(dim=2)
    overlap = both / (count[:, :, None] + count[:, None] - both).clamp(min=1)                       # (P, K, K)
    alike = F.normalize(features, dim=2) @ F.normalize(features, dim=2).mT
    itself = torch.eye(images.shape[1], dtype=torch.bool)
    overlap, alike = [table.masked_fill(itself, torch.nan).nanquantile(0.5, dim=2, interpolation="higher").nan_to_num()
                      for table in (overlap, alike)]                    # (P, K); of two others the better one
    best = F.one_hot((overlap + alike).argmax(dim=1), images.shape[1]).bool()
    return (overlap >= outline) & (alike >= meaning) | best


# ---------------------------------------------------------------------------------------------------------------------
# The samples, kept


def prior_path(path, folder):
    """Path of the view-conditioned model: `path` of --prior, or where it is None the run folder's, else the shipped
    one. Raises FileNotFoundError."""
    path = path or run_or_shipped(folder, "toy", "view_prior.safetensors")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path} (--prior): train it with python -m related.view_prior")
    return path


def refiner_path(args):
    """The model that refines: with --depth a texturing model of Realiz3D, else the base model."""
    if not args.depth:
        return base_path(args)
    return args.depth_model or default_model(folder=args.out)


def load_models(args):
    """The prior and the model that refines what it draws, before any work. Raises FileNotFoundError, or ValueError
    where one is another thing."""
    prior, path = load_prior(prior_path(args.prior, args.out)), refiner_path(args)
    if not args.depth:
        check_base(args)
    refiner = load_network(path, config=PRESETS["toy"])
    if args.depth and (trained_task(path) != "texturing" or refiner.shifters is None):
        raise ValueError(f"{path} (--depth_model) is no texturing model with Domain Shifters: train one with python "
                         "train_stage2.py")
    return prior, refiner


def samples_key(reference, args):
    """What the samples of a reference are made from."""
    flags = ("prompt", "elevation", "num_poses", "each", "num_steps", "view_scale", "depth", "strength", "seed")
    return dict(reference=checksum({"image": reference}), prior=file_id(prior_path(args.prior, args.out)),
                refiner=file_id(refiner_path(args)), **{flag: getattr(args, flag) for flag in flags})


def reference_samples(models, reference, judge, args):
    """Steps 1 to 3 of one reference: {"image": uint8 (N, 3, H, W), "azimuth", "elevation": (N,)}, drawn before any
    training of the GAN, and a picture of them. Kept in OUT/NAME/samples.safetensors, and what the prior drew in
    OUT/sets. models: from `load_models`."""
    poses, sampling = poses_around(args.num_poses), Sampling(num_steps=args.num_steps, seed=args.seed)
    path, key = f"{args.out}/{args.name}/samples.safetensors", json.loads(json.dumps(samples_key(reference, args)))
    before = read_metadata(path).get("key") if os.path.isfile(path) else key
    if isinstance(before, dict) and before != key:
        other = [f"{name} {before.get(name)} (now {key[name]})" for name in key if before.get(name) != key[name]]
        raise ValueError(f"{path} was made with other settings: {', '.join(other)}; use another --name, or delete it")

    def build():
        (prior, refiner), each = models, [part.repeat_interleave(args.each) for part in poses]
        of_prior, of_refiner = (replace(sampling, cfg_scale=scale) for scale in (args.view_scale, CFG_SCALE))

        def draw():
            total = args.num_poses * args.each
            with tqdm(total=total, desc="the prior's samples", unit="image", bar_format=BAR) as bar:
                return dict(image=draw_views(prior, reference, args.elevation, poses, args.each, of_prior, bar))
        own = {name: value for name, value in key.items() if name not in OF_REFINEMENT}
        own_file = f"{args.out}/sets/cad_{crc32(json.dumps(own).encode()):08x}.safetensors"         # serves other names
        drawn = cached(own_file, own, draw)["image"]
        images = refined = drawn.flatten(0, 1)
        if args.strength and args.depth:
            net = train_surface_net(f"{args.out}/sets")
            refined = refine_by_depth(refiner, net, images, each, args.prompt, args.strength, of_refiner)
        elif args.strength:
            refined = refine(refiner, images, each[0], args.prompt, args.strength, of_refiner)
        return dict(drawn=to_uint8(drawn), image=to_uint8(refined).view(drawn.shape))
    made = cached(path, key, build)
    images, shape = made["image"], made["image"].shape[:2]
    keep = torch.ones(shape, dtype=torch.bool)
    if args.pruning:
        features = judge.features(images.flatten(0, 1) / 255)
        keep = agree_with_others(images / 255, features.unflatten(0, shape))
    dropped = [f"{poses[0][k]:.0f} degrees {int((~keep[k]).sum())}" for k in range(len(keep)) if not keep[k].all()]
    print(f"{int(keep.sum())} of {keep.numel()} samples stay; dropped at {', '.join(dropped) or 'no pose'}", flush=True)
    draw_pruning(f"{args.out}/{args.name}/samples.png", made, keep, poses[0])
    azimuth, elevation = (part.repeat_interleave(args.each)[keep.flatten()] for part in poses)
    return dict(image=images.flatten(0, 1)[keep.flatten()], azimuth=azimuth, elevation=elevation)


def draw_pruning(path, made, keep, azimuth, num=6):
    """Writes a picture: of some poses the samples as drawn, and refined, before red what was dropped."""
    rows, red = [], torch.tensor([255, 60, 60], dtype=torch.uint8)[:, None, None]
    for k in range(0, len(keep), max(1, len(keep) // num))[:num]:
        white = (made["image"][k] > 230).all(dim=1, keepdim=True)
        marked = torch.where(white & ~keep[k][:, None, None, None], red, made["image"][k])
        rows += [(f"{azimuth[k]:.0f} degrees", made["drawn"][k]), ("refined", marked)]
    save_picture(path, rows)
