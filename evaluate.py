"""Measures of control and realism (Sec. 5), calibrated on what a toy world can draw: perfect photos of its objects.

    python evaluate.py toy                          # the trained models beside the oracle: control, domain, leakage
    python evaluate.py oracle                       # perfect photos and perfect renders through every measure
    python evaluate.py folders OURS THEIRS --inception inception-2015-12-05.pt      # any images: FID, KID

The paper's tables are measured by `python -m experiments.tables table1`, B_max and t_max chosen by `python -m
experiments.shift select`, the photographs of FID_I by `python -m full.curate`.

Each measure is a plain function of images in [0, 1], (B, V, 3, H, W). In the toy world distances are taken on the
features of a small network trained here (toy/judge.py): Frechet and kernel distance (FD, KD), not FID and KID.
"""
import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, VIEWS, bilinear, camera, project
from geometry.hull import silhouette, visual_hull
from sample import (CFG_SCALE, Sampling, default_base, default_model, load_network, sample_images, selected_shift,
                    trained_task)
from support.files import cached, file_id, write_json
from support.folders import find_images, in_batches, read_caption, read_image, read_views
from support.launch import BAR, a_seed, check_picture, finite, launch, run_cli, some_steps, some_threads, within
from support.networks import LPIPS_LAYERS, load_clip, load_inception, load_lpips
from support.pictures import save_picture, to_uint8
from support.speed import choose_dtype, has_compiler
from toy.judge import load_judges, read, train_feature_net
from toy.world import WORLD_VERSION, asset_captions, sample_assets, tokenize
from training.flags import refuse_unread

# ---------------------------------------------------------------------------------------------------------------------
# Shape: is the object where the control says?


def silhouette_iou(image, mask):
    """Images (B, V, 3, H, W) in [0, 1], coverage (B, V, 1, H, W) in [0, 1] -> IoU per object (B,).

    Pixels covered in part are left out of the count: they may rightly be read either way.
    """
    seen, there = silhouette(image), mask == 1
    counted = there | (mask == 0)
    both = (seen & there & counted).flatten(1).sum(dim=1)
    either = ((seen | there) & counted).flatten(1).sum(dim=1)
    return both / either.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# 3D consistency: the views back-projected on the surface and rendered again (Sec. 5), all of them or all others


class Surface(NamedTuple):
    """The surface of B objects as V views show it, and the cameras of the views."""
    position: torch.Tensor              # (B, V, 3, H, W) in [-0.5, 0.5]
    normal: torch.Tensor                # (B, V, 3, H, W) unit
    mask: torch.Tensor                  # (B, V, 1, H, W) coverage in [0, 1]
    azimuth: tuple = AZIMUTHS           # V degrees
    elevation: float = ELEVATION        # degrees


def rerender(image, surface, leave_one_out=False, near=0.2):
    """Back-projects the views on the surface and renders them again: what each view should be, by the views that see
    the same surface (Sec. 5).

    image (B, V, 3, H, W) in [0, 1]; surface: a Surface of the same views. A point counts as seen where a view's
    position map, read where the point falls, shows the same point to `near` pixels. Views are averaged with the squared
    cosine of the angle they see it under; leave_one_out: without the view itself, else a pixel that only one view sees
    renders perfectly. Returns images like `image` (0 where unseen) and seen (B, V, 1, H, W) bool.
    """
    position, normal, mask, azimuth, elevation = surface
    views = image.shape[1]
    whole = (mask == 1).float()                                         # at an edge a pixel mixes two places
    near = near * 2 * EXTENT / image.shape[-1]                          # in the object's units
    again, seen = torch.zeros_like(image), torch.zeros_like(mask, dtype=torch.bool)
    for i in range(views):
        total, weights = 0, 0
        for j in range(views):
            if leave_one_out and j == i:
                continue
            column, row, _ = project(position[:, i], azimuth[j], elevation)
            maps = torch.cat([image[:, j], position[:, j], whole[:, j]], dim=1)                     # (B, 7, H, W)
            color, point, valid = bilinear(maps, column, row).split([3, 3, 1], dim=1)
            forward = camera(azimuth[j], elevation)[2].to(image)
            cosine = -(normal[:, i] * forward[:, None, None]).sum(dim=1, keepdim=True)
            same = (point - position[:, i]).norm(dim=1, keepdim=True) < near
            weight = (cosine.clamp(min=0)**2) * (cosine > 0.2) * same * (valid > 0.999) * whole[:, i]
            total, weights = total + weight * color, weights + weight
        again[:, i], seen[:, i] = total / weights.clamp(min=1e-9), weights > 0
    return again, seen


def consistency(image, surface, near=0.2, outline=None, lpips_weights=None):
    """3D consistency per object (Sec. 5), inputs as in `rerender`: dict of (B,) psnr and ssim of the views against
    their re-rendering, the paper's form (and lpips, given its weights); psnr_loo leave-one-out, and covered, the share
    of the surface it can judge.

    outline: bool (B, V, 1, H, W), what the views show, where the surface itself was lifted from them: what it leaves
    out is white when rendered again, and counts.
    """
    again, seen = rerender(image, surface, near=near)
    other, twice = rerender(image, surface, leave_one_out=True, near=near)
    again = torch.where(seen, again, image)                             # SSIM's windows reach over the edge
    if outline is not None:
        again, seen = torch.where(outline & (surface.mask == 0), 1.0, again), seen | outline
    judged = seen[..., 5:-5, 5:-5].flatten(2).any(2)                    # views in which SSIM can judge the object
    each = torch.where(judged, ssim(again, image, seen).nan_to_num(), 0.0)
    on_surface = (surface.mask == 1).flatten(1).sum(1)
    row = dict(psnr=psnr(joined(again), joined(image), joined(seen)).clamp(max=100),
               ssim=each.sum(1) / judged.sum(1),
               psnr_loo=psnr(joined(other), joined(image), joined(twice)).clamp(max=100),
               covered=twice.flatten(1).sum(1) / on_surface.clamp(min=1))
    if lpips_weights:
        row["lpips"] = lpips(again, image, lpips_weights).mean(1)
    return row


def joined(views):
    """An object's views (B, V, C, H, W) as one tall image (B, C, V H, W)."""
    return views.transpose(1, 2).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Image against image: PSNR, SSIM, LPIPS of (..., 3, H, W) in [0, 1], one value per image


def psnr(a, b, where=None):
    """Peak signal-to-noise ratio in dB, (...,) float64; inf for equal images, NaN where nothing is counted.

    where: (..., 1, H, W) bool, the pixels that count (default all).
    """
    error = (a.double() - b.double()).square().mean(dim=-3)                                         # (..., H, W)
    count = torch.ones_like(error) if where is None else where.squeeze(-3).double()
    return -10 * torch.log10((error * count).sum((-2, -1)) / count.sum((-2, -1)))


def ssim(a, b, where=None):
    """Structural similarity (Wang et al. 2004), (...,) float64: Gaussian window of sigma 1.5 (11 x 11), population
    covariance, data range 1, averaged over channels and over the pixels whose whole window lies in the image.

    where: (..., 1, H, W) bool, the window centres that count (default all). Raises ValueError below 11 x 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, not {tuple(a.shape[-2:])}")
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64)**2 / (2 * 1.5**2)).to(a.device)
    rows, columns = (g / g.sum()).view(1, 1, 11, 1), (g / g.sum()).view(1, 1, 1, 11)

    def windowed(z):
        mean = F.conv2d(F.conv2d(z, rows), columns)
        return mean.view(*a.shape[:-2], a.shape[-2] - 10, a.shape[-1] - 10)                         # (..., 3, h, w)
    x, y = a.double().reshape(-1, 1, *a.shape[-2:]), b.double().reshape(-1, 1, *b.shape[-2:])
    mx, my = windowed(x), windowed(y)
    vx, vy, vxy = windowed(x * x) - mx * mx, windowed(y * y) - my * my, windowed(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    s = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean(dim=-3)
    count = torch.ones_like(s) if where is None else where[..., 0, 5:-5, 5:-5].double()
    return (s * count).sum((-2, -1)) / count.sum((-2, -1))


def lpips(a, b, weights):
    """Learned perceptual distance on AlexNet (Zhang et al. 2018), (...,). a, b (..., 3, H, W) in [0, 1], H, W >= 32.

    weights: {name: tensor} of `lpips.LPIPS(net="alex").state_dict()`, from `load_lpips`.
    """
    shift = torch.tensor((-.030, -.088, -.188)).view(3, 1, 1).to(a)
    scale = torch.tensor((.458, .448, .450)).view(3, 1, 1).to(a)
    x = torch.cat([((2 * z - 1 - shift) / scale).reshape(-1, *z.shape[-3:]) for z in (a, b)])       # both in [-1, 1]
    total = 0
    for k, (name, stride, padding) in enumerate(LPIPS_LAYERS):
        x = F.max_pool2d(x, 3, 2) if k in (1, 2) else x
        x = F.conv2d(x, weights[f"{name}.weight"].to(x), weights[f"{name}.bias"].to(x), stride, padding).relu()
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        difference = (unit[:len(x) // 2] - unit[len(x) // 2:]).square()
        total = total + F.conv2d(difference, weights[f"lin{k}.model.1.weight"].to(x)).mean((1, 2, 3))
    return total.view(a.shape[:-3])


# ---------------------------------------------------------------------------------------------------------------------
# Set against set, by features: FID, KID; image against caption: CLIP


def fid(a, b):
    """Frechet distance of two Gaussians fitted to features (N, F) and (M, F); float64, any N and M above 1 (FID).

    The trace of the root of the product of the covariances is the nuclear norm of A B^T, A and B the centred features
    over sqrt(N - 1): no matrix root that could turn complex, and rank-deficient covariances are as good as others.
    Raises ValueError for fewer than two images, features of two widths, or NaN.
    """
    def root(x):                                            # root(x)^T root(x) is the covariance
        return (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)

    def shortened(x):                                       # to F rows at most; a rotation changes no norm
        return np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x
    a, b = check_features(a, b)
    gap = a.mean(axis=0) - b.mean(axis=0)
    a, b = root(a), root(b)
    spread = (a**2).sum() + (b**2).sum()
    return float(gap @ gap + spread - 2 * np.linalg.svd(shortened(a) @ shortened(b).T, compute_uv=False).sum())


def kid(a, b):
    """Unbiased squared MMD of features (N, F) and (M, F) with the kernel (x y / F + 1)^3 (KID, Binkowski et al. 2018);
    float64, all pairs, any N and M above 1; unlike FID unbiased at any size, as far as the images are independent.
    Raises as `fid`."""
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1)**3

    def own(x):                                             # mean over the pairs of two different images of a set
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
    a, b = check_features(a, b)
    return float(own(a) + own(b) - 2 * kernel(a, b).mean())


def kid_spread(a, b, subset_size=100, num_subsets=100, seed=0):
    """Mean and standard deviation of `kid` over random subsets, as is customary; subset_size shrinks to the sets."""
    a, b = check_features(a, b)
    size, rng = min(subset_size, len(a), len(b)), np.random.default_rng(seed)
    values = [kid(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]]) for _ in range(num_subsets)]
    return float(np.mean(values)), float(np.std(values))


def check_features(a, b):
    """Both as float64 matrices. Raises ValueError: fewer than two rows, other widths, or a value that is not finite."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a distance between sets of {len(a)} and {len(b)} images: give at least two of each")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, F) and (M, F), not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold values that are not finite")
    return a, b


def clip_score(image, text):
    """Cosine of each image's and its caption's embedding, (N, F) and (N, F) -> (N,) float64 (Sec. 5: CLIP)."""
    image, text = image.double(), text.double()
    return F.cosine_similarity(image, text, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Any folder of images against any other


def surface_normals(position):
    """Unit normals (..., 3, H, W) of position maps (..., 3, H, W) with NaN off the object, towards the camera: the
    cross product of the mean differences to the neighbours below and above, right and left, those that are there."""
    def slope(dim):
        step = position.diff(dim=dim)
        gap = torch.full_like(step.narrow(dim, 0, 1), torch.nan)
        return torch.stack([torch.cat([step, gap], dim), torch.cat([gap, step], dim)]).nanmean(dim=0)
    return F.normalize(torch.linalg.cross(slope(-2), slope(-1), dim=-3), dim=-3).nan_to_num()


def check_cameras(position, azimuths, elevation, folder):
    """Raises ValueError where a map of positions (V, 3, H, W), NaN off the object, does not lie on its own pixels."""
    column, row, _ = project(position, torch.tensor(azimuths), elevation)
    height, width = position.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    mask = position.isfinite().all(dim=1)                                                           # (V, H, W)
    for v in range(len(azimuths)):
        gap = torch.stack([row[v] - rows, column[v] - columns]).norm(dim=0)[mask[v]]
        if not len(gap) or not gap.median() <= 1:
            off = f"{gap.median():.1f} pixels" if len(gap) else "wholly"
            raise ValueError(f"{folder}/position_{v:03}.npy lies {off} off its camera: see --azimuths, --elevation and "
                             "--extent")


def folder_consistency(images, positions, azimuths, elevation, extent, lpips_weights=None):
    """`consistency` of IMAGES/ID/color_000.png, .. on POSITIONS/ID/position_000.npy, .., a view per azimuth.

    Positions p + 0.5 (H, W, 3) lie in the object's frame (y up, see geometry/camera.py), NaN off the object; an
    orthographic image spans extent units to each side. Returns a dict of means over the objects. Raises ValueError
    where a map does not fit its camera.
    """
    rows, folders = [], sorted(path for path in Path(positions).glob("*") if path.is_dir())
    for folder in tqdm(folders, desc="consistency", leave=False):
        image, position = read_views(f"{images}/{folder.name}", folder, len(azimuths))
        position = position * EXTENT / extent
        check_cameras(position, azimuths, elevation, folder)
        mask = position.isfinite().all(dim=1, keepdim=True).float()
        surface = Surface(position.nan_to_num()[None], surface_normals(position)[None], mask[None], azimuths, elevation)
        rows.append(consistency(image[None], surface, lpips_weights=lpips_weights))
    if not rows:
        raise ValueError(f"{positions} has no folder of position maps, ID/position_000.npy, ..")
    return {name: torch.cat([row[name] for row in rows]).nanmean().item() for name in rows[0]}


def paired_metrics(ours, theirs, names, weights=None):
    """Means of PSNR (of a pair at most 100), SSIM (and LPIPS, given its weights) of the images `names` in two folders:
    {metric: value}."""
    metrics = {"PSNR": lambda ours, theirs: psnr(ours, theirs).clamp(max=100), "SSIM": ssim}
    if weights:
        metrics["LPIPS"] = partial(lpips, weights=weights)

    def compare(images, paths):
        others = [read_image(theirs + path.removeprefix(ours)) for path in paths]
        for path, other in zip(paths, others):
            if other.shape != images.shape[1:]:
                raise ValueError(f"{path} is of another size than its counterpart in {theirs}")
        return torch.stack([metric(images, torch.stack(others)) for metric in metrics.values()], dim=1)
    means = in_batches([f"{ours}/{name}" for name in names], compare).mean(dim=0)
    return dict(zip(metrics, means.tolist()))


def features_for_distances(args, device):
    """What the two distances are called, and features(images (N, 3, H, W) in [0, 1]) -> (N, F) that they are taken on:
    Inception's where it is given, else those of the toy's network."""
    if args.inception:
        return ("FID", "KID"), load_inception(args.inception, device)
    print("without --inception: FD and KD on the toy's own network at 32 pixels, which knows nothing but the toy world",
          flush=True)
    net = train_feature_net(args.folder)
    return ("FD", "KD"), lambda images: net.features(F.interpolate(images, 32, mode="bilinear", antialias=True))


def compare_folders(args):
    """Measures one folder of images against another and prints one line: distances of features always; PSNR, SSIM (and
    LPIPS) where the two hold the same names; CLIP score and consistency of the first folder where asked for."""
    device = launch(args.threads).device
    ours, theirs = find_images(args.ours, args.pattern), find_images(args.theirs, args.pattern)
    weights = load_lpips(args.lpips) if args.lpips else None
    names, features = features_for_distances(args, device)
    paths = [f"{args.ours}/{name}" for name in ours]
    a = in_batches(paths, lambda images, _: features(images))
    b = in_batches([f"{args.theirs}/{name}" for name in theirs], lambda images, _: features(images))
    line = [f"{len(a)} images against {len(b)}:", f"{names[0]} {fid(a, b):.3f}",
            f"{names[1]}x1000 {1000 * kid(a, b):.3f}"]
    if min(len(a), len(b)) > 100:                                       # else the subsets are the sets
        mean, deviation = kid_spread(a, b)
        line.append(f"(subsets of 100: {1000 * mean:.3f} +- {1000 * deviation:.3f})")
    if ours == theirs:
        paired = paired_metrics(args.ours, args.theirs, ours, weights)
        line += [f"{name} {value:.4f}" for name, value in paired.items()]
    if args.clip:
        embed = load_clip(args.clip, device)

        def score(images, found):
            return clip_score(*embed(images, [read_caption(path) for path in found]))
        line.append(f"CLIP {in_batches(paths, score).mean():.4f}")
    if args.positions:
        views = folder_consistency(args.ours, args.positions, args.azimuths, args.elevation, args.extent, weights)
        line += ["re-rendered"] + [f"{name} {value:.4f}" for name, value in views.items()]
    print(" ".join(line))


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: what perfect photos and perfect renders score


# what is printed of `measure`: its name, what perfect photos (and renders) should have
ORACLE = {"silhouette IoU": ("iou", ">= 0.98"), "normals read wrong by (degrees)": ("normals", ""),
          "re-rendered PSNR (dB)": ("psnr", ""), "re-rendered SSIM": ("ssim", ""),
          "leave-one-out PSNR (dB)": ("psnr_loo", ">= 30"), "category read right": ("category", ""),
          "color read right": ("color", ""), "material read right": ("material", ""),
          "called a photo": ("photo", "near 1, near 0"), "  by the second judge": ("photo_2", "near 1, near 0"),
          "Frechet distance to photos": ("FD_I", "small, large"), "kernel distance x1000": ("KD_I", "small, large")}


def oracle(folder="runs/toy/sets", num=64):
    """Dict of (perfect photos, perfect renders, target) per measure on num held-out objects."""
    held, judges = data.evaluation_set(num, folder=folder), load_judges(folder)
    photos, renders = (measure(held[name] / 255, held, judges) for name in ("photo", "image"))
    return {name: (photos[key], renders[key], target) for name, (key, target) in ORACLE.items()}


def print_oracle(args):
    """Prints what `oracle` measures, each number beside its target."""
    print(f"{'':32}{'photos':>10}{'renders':>10}  target    ({args.num} held-out objects, four views)")
    for name, (photos, renders, target) in oracle(args.folder, args.num).items():
        print(f"{name:32}{photos:10.3f}{renders:10.3f}  {target}")


# ---------------------------------------------------------------------------------------------------------------------
# The trained models: does control hold, does the domain follow its switch, has the domain leaked?

DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4, "FD_B": 1, "KD_B": 0, "FD_I": 1, "KD_I": 0, "caption": 3, "iou": 3,
          "material": 2, "normals": 1, "psnr_loo": 2, "loo_gap": 2, "photo": 2, "photo_2": 2}     # of each, to print


def measure(images, held, judges, base=None, task="texturing", lpips_weights=None):
    """Control, consistency and realism of grids of images.

    images: (B, V, 3, H, W) in [0, 1], of the objects `held` (data.evaluation_set). judges: toy.judge.Judges; base:
    (N, F) features of the base model's images of the same prompts. task "text": there are no maps, so consistency is
    taken on the visual hull. Returns a dict of floats:

    iou             silhouette IoU with the control mask                                        (texturing only)
    normals         angle in degrees between the normals asked for and those read off the image (texturing only)
    psnr, ssim      of the views against their re-rendering (dB), the paper's form; lpips given its weights
    psnr_loo        the same, leave-one-out (dB); loo_gap: how far below that of perfect photographs and renders, mixed
                    as the share called a photo says
    photo, photo_2  share called a photo, by each of two judges
    material ..     share whose category, color, material the judge reads right
    FD_B, KD_B ..   Frechet and kernel (x 1000) distance to the base model's images, and (I) to held-out photographs
    caption         how surely the judge reads category, colour and material off the image (in place of CLIP)
    """
    flat, labels = images.flatten(0, 1), held["labels"].repeat_interleave(images.shape[1], dim=0)
    views = grid_consistency(images, held, task, lpips_weights)
    row = dict(iou=None, normals=None)
    if task == "texturing":
        row = dict(iou=silhouette_iou(images, held["mask"] / 255).mean().item(),
                   normals=judges.normals.angular_error(images, held["normal"]).mean().item())
    row |= {name: value.nanmean().item() for name, value in views.items() if name != "covered"}
    row |= read(flat, labels, judges)
    of_photos, of_renders = (grid_consistency(held[name] / 255, held, task)["psnr_loo"].nanmean().item()
                             for name in ("photo", "image"))
    row["loo_gap"] = row["photo"] * of_photos + (1 - row["photo"]) * of_renders - row["psnr_loo"]
    features = judges.net.features(flat)
    for name, reference in (("B", base), ("I", judges.photos)):
        if reference is not None:
            row |= {f"FD_{name}": fid(reference, features), f"KD_{name}": 1000 * kid(reference, features)}
    return row


def grid_consistency(images, held, task, lpips_weights=None):
    """`consistency` of grids (B, V, 3, H, W) of the objects `held`, on their own surface, or for "text" on the hull of
    what is seen."""
    if task == "text":
        outline = silhouette(images)
        lifted = Surface(*visual_hull(outline))
        return consistency(images, lifted, near=0.5, outline=outline, lpips_weights=lpips_weights)
    return consistency(images, Surface(held["position"], held["normal"], held["mask"] / 255),
                       lpips_weights=lpips_weights)


def base_images(path, num, folder, device, sampling):
    """What FID_B compares with: the base model's images, uint8 (4 num, 3, H, W), kept in folder.

    The prompts are those that the models get, the captions of the evaluation ("a red wooden mug"), four images each.
    """
    key = dict(model=file_id(path), num=num, steps=sampling.num_steps, cfg=sampling.cfg_scale, seed=sampling.seed,
               dtype=sampling.dtype, prompts="evaluation captions", version=WORLD_VERSION)

    def draw():
        captions = asset_captions(sample_assets(num, data.SEEDS["evaluation"]))
        text = tokenize(captions).repeat_interleave(4, dim=0)                                       # (4 num, L)
        with tqdm(total=len(text), desc="base model", unit="image", bar_format=BAR) as progress:
            images = sample_images(load_toy(path, device), {"text": text},
                                   replace(sampling, mode="real", batch=32), progress=progress)
        return dict(image=to_uint8(images)[:, 0])
    return cached(Path(folder) / f"base_images_{num}_{sampling.seed}.safetensors", key, draw)["image"]


def load_toy(path, device):
    """`load_network` of a model that draws pixels of the toy's size, which is what the feature network knows."""
    network = load_network(path, device)
    config = network.dit.config
    if config.latent or config.image_size != 32:
        raise ValueError(f"{path} is a model of {config.image_size} x {config.image_size} "
                         f"{'pixels' if not config.latent else 'latents'}: the toy's measures are for 32 x 32 pixels")
    return network


def toy_table(args):
    """Samples the held-out objects with syn_only and with realiz3d in each mode, prints the table beside the rows of
    the oracle and of the base model, which knows no control, and writes it with a picture."""
    check_picture(args.out)
    device = launch(args.threads).device
    realiz3d = args.model or default_model("toy", "texturing")
    syn_only = args.syn_only or default_model("toy", "texturing", "syn_only")
    network, plain = load_toy(realiz3d, device), load_toy(syn_only, device)
    if network.shifters is None or {trained_task(realiz3d), trained_task(syn_only)} != {"texturing"}:
        raise ValueError(f"{realiz3d} must be a texturing model with Domain Shifters, and {syn_only} one of texturing")
    held, judges = data.evaluation_set(args.num, folder=args.folder, device=device), load_judges(args.folder, device)
    B_max, t_max = selected_shift(realiz3d)
    sampling = replace(asked_sampling(args, device), B_max=B_max, t_max=t_max)
    base = base_images(args.base or default_base(), args.num, args.folder, device, sampling)
    images = {"oracle photos": held["photo"] / 255, "oracle renders": held["image"] / 255,
              "base model, no control": base.view(held["image"].shape) / 255}
    runs = [("syn_only", plain, "real"), ("realiz3d, synthetic mode", network, "syn"),
            ("realiz3d, real mode", network, "real"), ("realiz3d, shifted", network, "shifted")]
    with tqdm(total=len(runs) * args.num * 4, desc="sampling", bar_format=BAR) as progress:
        for name, model, mode in runs:
            drawn = sample_images(model, held, replace(sampling, mode=mode), views=4, progress=progress)
            images[name] = to_uint8(drawn) / 255
    rows = {name: measure(grids, held, judges) for name, grids in images.items()}
    free = dict.fromkeys(("iou", "normals", "psnr", "ssim", "psnr_loo", "loo_gap"))
    rows["base model, no control"].update(free)                     # shapes of its own, not views of one object
    print(f"{args.num} held-out objects, four views, {args.num_steps} steps, seed {args.seed}; {realiz3d}, {syn_only}; "
          f"shifted: B_max {B_max}, t_max {t_max}")
    print_toy_table(rows)
    print("IoU: silhouette with the control mask; normals: error in degrees of those read off the image; LOO: leave-"
          "one-out consistency, and how far it is below that of perfect views; photo: share called so by "
          f"two judges; FD, KD: to {len(judges.photos)} held-out photos; material: share of which it is read right")
    out = args.out.removesuffix(".png")
    shown = data.shown_objects(args.num)
    save_picture(f"{out}.png", [(name, (grids[shown] * 255).round().byte().flatten(0, 1))
                                for name, grids in images.items()], column_titles=VIEWS * len(shown))
    write_json(f"{out}.json", dict(settings=measured_settings(args) | dict(seed=args.seed), rows=rows))
    print(f"wrote {out}.png and {out}.json")


def print_toy_table(rows):
    """Prints {name: what `measure` returned}, a line each."""
    heads = {"iou": "IoU", "normals": "normals", "psnr_loo": "LOO dB", "loo_gap": "below", "photo": "photo",
             "photo_2": "2nd judge", "FD_I": "FD", "KD_I": "KD x1000", "material": "material"}
    print(f"{'':28}" + "".join(f"{head:>10}" for head in heads.values()))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{formatted(row[key], DIGITS[key]):>10}" for key in heads))


def formatted(value, digits):
    """A number for a table, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

FLAGS = {                                                               # that several commands share
    "num": dict(type=within(1, 10 ** 5), default=40, help="objects (default %(default)s)"),
    "model": dict(help="realiz3d checkpoint (default: the run folder's, else the shipped one)"),
    "num_steps": dict(type=some_steps, default=50, help="DDIM steps (default %(default)s)"),
    "cfg_scale": dict(type=finite, default=CFG_SCALE, help="guidance on the text, 1 = none (default %(default)s)"),
    "seed": dict(type=a_seed, default=0, help="decides the noise (default %(default)s)"),
    "threads": dict(type=some_threads, help="CPU threads (default: the fastest in a trial)"),
    "folder": dict(default="runs/toy/sets", help="where the toy's sets are kept (default %(default)s)"),
    "lpips": dict(metavar="FILE", help="state_dict of lpips.LPIPS(net='alex'), to measure LPIPS too (default: not)"),
}
SAMPLING_FLAGS = ("num", "num_steps", "cfg_scale", "seed", "threads")


def measuring_flags(parser, *names):
    """Adds flags of FLAGS to a parser."""
    for name in names:
        parser.add_argument(f"--{name}", **FLAGS[name])


def add_command(commands, name, run, what, *flags):
    """A subparser for a command: run(args) does it, its docstring and `what` say what it does."""
    parser = commands.add_parser(name, help=what, description=run.__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    measuring_flags(parser, *flags)
    return parser


def asked_sampling(args, device):
    """The Sampling that the flags ask for, on a CPU in the faster precision (bf16 moves psnr by less than 0.01), and
    compiled where it takes minutes and there is a compiler."""
    pays = device.type == "cpu" and args.num * args.num_steps >= 500 and has_compiler()
    return Sampling(cfg_scale=args.cfg_scale, num_steps=args.num_steps, seed=args.seed, batch=8, compile=pays,
                    dtype=choose_dtype(device))


def measured_settings(args):
    """The flags that decide the numbers, for a results file; its seeds stand beside them."""
    ignored = ("run", "command", "table", "seed", "rows", "threads", "processes", "folder", "results", "out")
    return {key: value for key, value in vars(args).items() if key not in ignored}


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = add_command(commands, "toy", toy_table, "control, domain and leakage of the trained models", "model",
                      *SAMPLING_FLAGS, "folder")
    sub.add_argument("--syn_only", help="checkpoint of python train_stage2.py --method syn_only (default likewise)")
    sub.add_argument("--base", help="base model (default likewise)")
    sub.add_argument("--out", default="runs/toy/evaluate.png",
                     help="picture to write (default %(default)s); its numbers: .json")
    sub = add_command(commands, "oracle", print_oracle, "perfect photos and renders through every toy measure", "num",
                      "folder")
    sub.set_defaults(num=64)
    sub = add_command(commands, "folders", compare_folders, "measure a folder of images against another", "lpips",
                      "threads", "folder")
    sub.add_argument("ours", metavar="OURS", help="folder of images to measure")
    sub.add_argument("theirs", metavar="THEIRS", help="folder of images to measure them against")
    sub.add_argument("--pattern", default="*", help="which files, as color_* (default %(default)s)")
    sub.add_argument("--inception", metavar="FILE", help="TorchScript Inception, for FID and KID (default: the toy's "
                     "own network, FD and KD)")
    sub.add_argument("--clip", metavar="DIR", help="CLIP model as Hugging Face has it, for the caption score (default: "
                     "not measured)")
    sub.add_argument("--positions", metavar="DIR", help="position maps DIR/ID/position_000.npy, .. of the views "
                     "OURS/ID/color_000.png, .., for 3D consistency (default: not measured)")
    sub.add_argument("--azimuths", type=within(-1e4, 1e4, float), nargs="+", default=AZIMUTHS, help="of the views, "
                     f"degrees (default {' '.join(map(str, AZIMUTHS))})")
    sub.add_argument("--elevation", type=finite, default=ELEVATION, help="of the views, degrees (default %(default)s)")
    sub.add_argument("--extent", type=within(1e-6, 1e6, float), default=EXTENT, help="half the width of a view in the "
                     "maps' units (default %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "folders" and not args.positions:
        refuse_unread(sub, args, ["azimuths", "elevation", "extent"], "without --positions")
    return args


def main(argv=None):
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
