"""Steps 1 to 3 of CAD (related/cad.py): the samples of one reference that its 3D GAN learns from.

The view-conditioned prior draws the reference from all around (related/view_prior.py), a photographic model refines
what it drew (the base model, or under a depth condition Realiz3D's: related/depth_condition.py), and of the samples of
a pose those that disagree with the others are dropped.
"""
import json
import os
import shutil
from zlib import crc32

import torch
import torch.nn.functional as F
from tqdm import tqdm

from baselines.sdedit import denoised_again
from dit import PRESETS, T
from geometry.camera import VIEWS
from geometry.hull import silhouette
from related.depth_condition import read_control, refine_by_depth, train_surface_net
from related.view_prior import draw_views, load_prior, poses_around
from sample import CFG_SCALE, Sampling, default_model, initial_noise, load_network, trained_task
from support.files import (cached, checksum, file_id, joined_parts, locked, ranges, read_metadata, run_or_shipped,
                           write_parts)
from support.launch import BAR
from support.pictures import save_picture, to_uint8
from support.speed import choose_dtype
from toy.world import tokenize
from training.sets import base_path, check_base

REFINEMENT = 10 ** 9    # added to a sample's number, it names the noise of its refinement
OF_REFINEMENT = ("refiner", "prompt", "depth", "strength")              # what the prior's own samples do not depend on

# ---------------------------------------------------------------------------------------------------------------------
# 2. Distribution refinement: SDEdit (Meng et al. 2022) by the photographic model


def view_phrase(azimuth, named=10):
    """", front view" within `named` degrees of a view that has a word; elsewhere nothing, as in the base model's
    captions, whose words are exact to 8 degrees: a word that does not fit turns the object."""
    quarter = round(float(azimuth) / 90)
    return f", {VIEWS[quarter % 4]} view" if abs(float(azimuth) - 90 * quarter) <= named else ""


def refine(base, images, noise, azimuth, prompt, strength, sampling):
    """Images (N, 3, H, W) in [-1, 1] with noise like them, noised to `strength` of the steps and denoised by the base
    model, which is told what it sees and, where there is a word for it, from which side. azimuth: (N,) degrees."""
    text = tokenize([f"photo of {prompt}{view_phrase(turn)}, white background" for turn in azimuth])
    return denoised_again(base, images, noise, text, strength * T, sampling)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pose pruning


def middle_of_others(table):
    """Of (P, K, K) the median over the others, (P, K); of an even number of them the higher of the two in the middle.
    """
    itself = torch.eye(table.shape[1], dtype=torch.bool)
    return table.masked_fill(itself, torch.nan).nanquantile(0.5, dim=2, interpolation="higher").nan_to_num()


def agree_with_others(images, features, outline=0.75, meaning=0.6):
    """Which samples (P, K, 3, H, W) in [0, 1] agree with the other samples of their pose: (P, K) bool.

    Silhouettes must overlap with those of the others by `outline` (median IoU), and features (P, K, F) point the same
    way by `meaning` (median cosine). The best of each pose stays in any case, so that no pose goes missing.
    """
    shape = silhouette(images).flatten(2).float()                                                   # (P, K, H W)
    both, count = shape @ shape.mT, shape.sum(dim=2)
    overlap = both / (count[:, :, None] + count[:, None] - both).clamp(min=1)                       # (P, K, K)
    alike = F.normalize(features, dim=2) @ F.normalize(features, dim=2).mT
    overlap, alike = middle_of_others(overlap), middle_of_others(alike)                             # (P, K)
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


def kept_images(name, key, sampling, num, draw, out):
    """The images draw(rows, progress) of 0 .. num, a tensor, drawn some rows at a time. Kept in OUT/sets under the
    checksum of what they are made from, for all who ask for the same; until they are there, their parts are, so that a
    run that was stopped goes on."""
    path = f"{out}/sets/cad_{crc32(json.dumps(key).encode()):08x}.safetensors"
    parts, of_parts = f"{path}.parts", key | dict(dtype=sampling.dtype)         # parts of two precisions are not joined

    def build():
        with tqdm(total=num, desc=name, unit="image", bar_format=BAR) as progress:
            write_parts(parts, of_parts, ranges(num), lambda rows: draw(rows, progress), progress)
        return {"image": joined_parts(parts, ranges(num))}
    with locked(parts):
        made = cached(path, key, build)
        shutil.rmtree(parts, ignore_errors=True)
    return made["image"]


def sampling_of(network, args, cfg_scale):
    """The Sampling by a network that the flags ask for, on a CPU in the precision that is faster there."""
    return Sampling(cfg_scale=cfg_scale, num_steps=args.num_steps, seed=args.seed,
                    dtype=choose_dtype(network.dit.positions.device))


def samples_of_prior(prior, reference, poses, key, args):
    """Step 1: what the prior draws of the reference (3, H, W) from the poses (azimuth, elevation (N,)), (N, 3, H, W) in
    [-1, 1]."""
    sampling = sampling_of(prior, args, args.view_scale)

    def draw(rows, progress):
        of_rows = [angles[rows] for angles in poses]
        return draw_views(prior, reference, args.elevation, of_rows, sampling, rows, progress)
    own = {name: value for name, value in key.items() if name not in OF_REFINEMENT}
    return kept_images("prior's samples", own, sampling, len(poses[0]), draw, args.out)


def refined_samples(refiner, images, poses, key, args):
    """Step 2: images (N, 3, H, W) in [-1, 1] from the poses as the photographic model refines them, uint8."""
    if not args.strength:
        return to_uint8(images)
    sampling = sampling_of(refiner, args, CFG_SCALE)
    net = train_surface_net(f"{args.out}/sets") if args.depth else None

    def draw(rows, progress):
        azimuth, elevation = [angles[rows] for angles in poses]
        noise = initial_noise([REFINEMENT + k for k in rows], images.shape[1:], args.seed)
        if args.depth:
            maps = read_control(net, images[rows], azimuth, elevation)
            refined = refine_by_depth(refiner, images[rows], noise, maps, args.prompt, args.strength, sampling)
        else:
            refined = refine(refiner, images[rows], noise, azimuth, args.prompt, args.strength, sampling)
        progress.update(len(rows))
        return to_uint8(refined)
    return kept_images("refinement", key, sampling, len(images), draw, args.out)


def reference_samples(models, reference, judge, args):
    """Steps 1 to 3 of one reference: {"image": uint8 (N, 3, H, W), "azimuth", "elevation": (N,)}, drawn before any
    training of the GAN, and a picture of them. Kept in OUT/NAME/samples.safetensors. models: from `load_models`."""
    places = poses_around(args.num_poses)
    poses = [angles.repeat_interleave(args.each) for angles in places]
    path, key = f"{args.out}/{args.name}/samples.safetensors", json.loads(json.dumps(samples_key(reference, args)))
    before = read_metadata(path).get("key") if os.path.isfile(path) else key
    if isinstance(before, dict) and before != key:
        other = [f"{name} {before.get(name)} (now {key[name]})" for name in key if before.get(name) != key[name]]
        raise ValueError(f"{path} was made with other settings: {', '.join(other)}; use another --name, or delete it")

    def build():
        drawn = samples_of_prior(models[0], reference, poses, key, args)
        refined = refined_samples(models[1], drawn, poses, key, args)
        return {name: images.unflatten(0, (-1, args.each))
                for name, images in (("drawn", to_uint8(drawn)), ("image", refined))}
    made = cached(path, key, build)
    images, shape = made["image"], made["image"].shape[:2]
    keep = torch.ones(shape, dtype=torch.bool)
    if args.pruning:
        features = judge.features(images.flatten(0, 1) / 255)
        keep = agree_with_others(images / 255, features.unflatten(0, shape))
    side = torch.tensor([round(float(azimuth) / 90) % 4 for azimuth in places[0]])      # the nearest view
    dropped = [f"{int((~keep[side == k]).sum())} of {int((side == k).sum()) * args.each} {VIEWS[k]}" for k in range(4)]
    print(f"{int(keep.sum())} of {keep.numel()} samples stay; dropped: {', '.join(dropped)}", flush=True)
    draw_pruning(f"{args.out}/{args.name}/samples.png", made, keep, places[0])
    azimuth, elevation = (angles[keep.flatten()] for angles in poses)
    return dict(image=images.flatten(0, 1)[keep.flatten()], azimuth=azimuth, elevation=elevation)


def draw_pruning(path, made, keep, azimuth, num=6):
    """Writes a picture: of some poses, once around, the samples as drawn, and refined, before red what was dropped."""
    rows, red = [], torch.tensor([255, 60, 60], dtype=torch.uint8)[:, None, None]
    for k in azimuth.argsort()[::max(1, len(azimuth) // num)][:num].tolist():
        white = (made["image"][k] > 230).all(dim=1, keepdim=True)
        marked = torch.where(white & ~keep[k][:, None, None, None], red, made["image"][k])
        rows += [(f"{azimuth[k]:.0f} degrees", made["drawn"][k]), ("refined", marked)]
    save_picture(path, rows)
