"""Measures of control and realism (Sec. 5), calibrated on what no paper has: perfect photos of the same objects.

    python evaluate.py toy                          # the trained models beside the oracle: control, domain, leakage
    python evaluate.py oracle                       # perfect photos and perfect renders through every measure
    python evaluate.py table1                       # Table 1 (table2, table3) on the toy world; hours on a CPU

Each measure is a plain function of images in [0, 1], (B, V, 3, H, W). Distances are taken on the features of a small
network trained here, so they are called Frechet and kernel distance, not FID and KID.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import spearmanr
from tqdm import tqdm

import data
import sample
from dit import launch, run_cli

FOLDER = "runs/toy/sets"                                                # where the toy's sets are kept


# ---------------------------------------------------------------------------------------------------------------------
# Shape: is the object where the control says?

def silhouette(image, threshold=0.08):
    """Images (..., 3, H, W) in [0, 1] -> bool (..., 1, H, W): pixels that differ from the white background."""
    return (1 - image).amax(dim=-3, keepdim=True) > threshold


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
# 3D consistency: each view predicted from the others (the leave-one-out form of the paper's re-rendering, Sec. 5).

def bilinear(maps, column, row):
    """Bilinear values of maps (B, C, H, W) at pixel coordinates (B, H', W'), centres at + 0.5 -> (B, C, H', W')."""
    height, width = maps.shape[-2:]
    grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], dim=-1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rerender(image, position, normal, mask, leave_one_out=False, near=0.2, azimuth=data.AZIMUTHS,
             elevation=data.ELEVATION):
    """Back-projects the views on the surface and renders them again: what each view should be, by the views that see
    the same surface (Sec. 5).

    image (B, V, 3, H, W) in [0, 1]; position, normal (B, V, 3, H, W); mask (B, V, 1, H, W) coverage. A point counts as
    seen where a view's position map, read where the point falls, shows the same point to `near` pixels. Views are
    averaged with the squared cosine of the angle they see it under; leave_one_out: without the view itself, else a
    pixel that only one view sees renders perfectly. Returns images like `image` (0 where unseen) and seen
    (B, V, 1, H, W) bool.
    """
    views = image.shape[1]
    whole = (mask == 1).float()                                         # at an edge a pixel mixes two places
    near = near * 2 * data.EXTENT / image.shape[-1]                     # in the object's units
    again, seen = torch.zeros_like(image), torch.zeros_like(mask, dtype=torch.bool)
    for i in range(views):
        total, weights = 0, 0
        for j in (j for j in range(views) if j != i or not leave_one_out):
            column, row, _ = data.project(position[:, i], azimuth[j], elevation)
            maps = torch.cat([image[:, j], position[:, j], whole[:, j]], dim=1)
            color, point, valid = bilinear(maps, column, row).split([3, 3, 1], dim=1)
            forward = data.camera(azimuth[j], elevation)[2].to(image)
            cosine = -(normal[:, i] * forward[:, None, None]).sum(dim=1, keepdim=True)
            same = (point - position[:, i]).norm(dim=1, keepdim=True) < near
            weight = (cosine.clamp(min=0)**2) * (cosine > 0.2) * same * (valid > 0.999) * whole[:, i]
            total, weights = total + weight * color, weights + weight
        again[:, i], seen[:, i] = total / weights.clamp(min=1e-9), weights > 0
    return again, seen


def consistency(image, position, normal, mask, near=0.2):
    """3D consistency per object (Sec. 5), inputs as in `rerender`: dict of (B,) psnr and ssim of the views against
    their re-rendering, the paper's form; psnr_loo leave-one-out, and covered, the share of the surface it can judge."""
    again, seen = rerender(image, position, normal, mask, near=near)
    other, twice = rerender(image, position, normal, mask, leave_one_out=True, near=near)
    again = torch.where(seen, again, image)                             # SSIM's windows reach over the edge
    where = seen[..., 5:-5, 5:-5].flatten(2).any(2)                     # views in which SSIM can judge the object
    each = torch.where(where, ssim(again, image, seen).nan_to_num(), 0.0)
    joined = lambda views: views.transpose(1, 2).flatten(2, 3)          # an object's views as one tall image
    return dict(psnr=psnr(joined(again), joined(image), joined(seen)).clamp(max=100), ssim=each.sum(1) / where.sum(1),
                psnr_loo=psnr(joined(other), joined(image), joined(twice)).clamp(max=100),
                covered=twice.flatten(1).sum(1) / (mask == 1).flatten(1).sum(1))


def visual_hull(seen, size=64, azimuth=data.AZIMUTHS, elevation=data.ELEVATION, steps=192):
    """Lifts silhouettes to 3D for views that have no mesh (text to multiview): the largest shape that fits them all.

    seen: (B, V, 1, H, W) bool, from `silhouette`. Carves a grid of size^3 points, then marches each pixel's ray to it.
    Returns position, normal (B, V, 3, H, W) and mask (B, V, 1, H, W), 1 where the ray hits, as `consistency` takes
    them. The paper lifts with a pretrained reconstruction network.
    """
    B, V, _, H, W = seen.shape
    line = (torch.arange(size) + 0.5) / size - 0.5
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    points = torch.stack([x, y, z]).view(3, size, size * size)                                      # a tall "image"
    solid = torch.ones(B, 1, size, size * size)
    for v in range(V):
        right, up, _ = (axis.view(3, 1, 1) for axis in data.camera(azimuth[v], elevation))
        place = torch.stack([(points * right).sum(0), -(points * up).sum(0)], -1) / data.EXTENT     # in [-1, 1]
        solid *= F.grid_sample(seen[:, v].float(), place.expand(B, -1, -1, -1), align_corners=False)
    solid = F.avg_pool3d(F.pad(solid.view(B, 1, size, size, size), (1,) * 6), 3, 1)                 # (B, 1, x, y, z)
    slope = torch.stack(torch.gradient(solid[:, 0], dim=(1, 2, 3)), 1)                              # (B, 3, x, y, z)
    read = lambda volume, p: F.grid_sample(volume, 2 * p.flip(-1), align_corners=False)             # p (B, D, H, W, 3)
    column, row = (((torch.arange(n) + 0.5) / n * 2 - 1) * data.EXTENT for n in (W, H))
    depth = torch.linspace(-0.87, 0.87, steps)
    position, normal, mask = torch.zeros(B, V, 3, H, W), torch.zeros(B, V, 3, H, W), torch.zeros(B, V, 1, H, W)
    for v in range(V):
        right, up, forward = data.camera(azimuth[v], elevation)
        plane = column[None, :, None] * right - row[:, None, None] * up                             # (H, W, 3)
        ray = plane + depth[:, None, None, None] * forward                                          # (steps, H, W, 3)
        inside = torch.cat([read(solid[b:b + 1], ray[None]) for b in range(B)])[:, 0]               # (B, steps, H, W)
        k = (inside > 0.5).float().argmax(1, keepdim=True).clamp(min=1)                             # first hit
        before, after = inside.gather(1, k - 1), inside.gather(1, k)
        s = depth[k] - (depth[1] - depth[0]) * ((after - 0.5) / (after - before).clamp(min=1e-6)).clamp(0, 1)
        p = plane + s[..., None] * forward                                                          # (B, 1, H, W, 3)
        hit = (after > 0.5).float()
        mask[:, v] = hit
        position[:, v] = p[:, 0].movedim(-1, 1) * hit
        normal[:, v] = -F.normalize(read(slope, p)[:, :, 0], dim=1) * hit
    return position, normal, mask


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
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64)**2 / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum()**2)[None, None].to(a.device)
    x, y = (z.double().reshape(-1, 1, *z.shape[-2:]) for z in (a, b))
    mean = lambda z: F.conv2d(z, window).view(*a.shape[:-2], a.shape[-2] - 10, a.shape[-1] - 10)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    s = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean(dim=-3)
    count = torch.ones_like(s) if where is None else where[..., 0, 5:-5, 5:-5].double()
    return (s * count).sum((-2, -1)) / count.sum((-2, -1))


LPIPS_LAYERS = (("net.slice1.0", 4, 2), ("net.slice2.3", 1, 2), ("net.slice3.6", 1, 1), ("net.slice4.8", 1, 1),
                ("net.slice5.10", 1, 1))                    # AlexNet's convolutions: name, stride, padding


def lpips(a, b, weights):
    """Learned perceptual distance on AlexNet (Zhang et al. 2018), (...,). a, b (..., 3, H, W) in [0, 1], H, W >= 32.

    weights: {name: tensor} of `lpips.LPIPS(net="alex").state_dict()`, from `load_weights`.
    """
    shift, scale = (torch.tensor(v).view(3, 1, 1).to(a) for v in ((-.030, -.088, -.188), (.458, .448, .450)))
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
# Domain: a small network that knows photos from renders, and whose features the distances are taken on.

class FeatureNet(nn.Module):
    """Reads category, colour, material and domain (0 render, 1 photo) off images (N, 3, H, W) in [0, 1]."""
    heads = dict(category=len(data.CATEGORIES), color=len(data.COLORS), material=len(data.MATERIALS), domain=2)

    def __init__(self, width=64):
        super().__init__()
        stage = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(stage(3, 32), stage(32, 64), stage(64, 64), nn.Conv2d(64, width, 3, padding=1))
        self.head = nn.Linear(width, sum(self.heads.values()))

    def pool(self, images):
        maps = self.body(images * 2 - 1)
        pooled = maps.relu().mean(dim=(2, 3)) + maps.amax(dim=(2, 3))                           # (N, width)
        return pooled * pooled.square().mean(dim=1, keepdim=True).add(1e-6).rsqrt()             # scale tells nothing

    def forward(self, images):
        """-> dict of logits (N, number of classes), one per head."""
        return dict(zip(self.heads, self.head(self.pool(images)).split(list(self.heads.values()), dim=1)))

    @torch.no_grad()
    def features(self, images, batch=512):
        """(N, 3, H, W) in [0, 1] -> (N, F) float32."""
        return torch.cat([self.pool(part) for part in images.split(batch)])

    def photo_probability(self, images):
        """(N, 3, H, W) in [0, 1] -> (N,): how surely each is a photo and not a render."""
        with torch.no_grad():
            return self.head(self.features(images))[:, -2:].softmax(dim=1)[:, 1]


def disturb(images, generator):
    """Shift, gain, blur and noise, the same kinds in both domains, so that neither grain nor sharpness tells them."""
    n, size = len(images), images.shape[-1]
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)
    offset = torch.randint(0, 5, (2,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2), value=1.)[..., offset[0]:offset[0] + size, offset[1]:offset[1] + size]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + draw(-.5, .4).clamp(min=0) * (blurred - images)
    noise = torch.randn(images.shape, generator=generator) * draw(-.02, .04).clamp(min=0)
    return (1 - (1 - images) * draw(.9, 1.1) + noise).clamp(0, 1)


def train_feature_net(folder=FOLDER, num=3000, steps=1500, size=32, seed=11):
    """FeatureNet trained on photos and renders of num objects (about two minutes on one core), kept in folder."""
    def build():
        assets = data.sample_assets(num, seed)
        azimuth = 90. * torch.arange(num)[:, None].remainder(4)
        images = torch.cat([data.render(assets, azimuth, style, size=size, geometry=False, seed=seed).rgb[:, 0]
                            for style in ("render", "photo")])
        domain = torch.arange(2).repeat_interleave(num)
        labels = torch.stack([*(field.repeat(2) for field in assets[:3]), domain], dim=1)
        labels[:num, 2] = -100                                          # a render does not show its material
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = FeatureNet()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="feature net", leave=False):
            pick = torch.randint(0, 2 * num, (96,), generator=generator)
            logits = net(disturb(images[pick], generator))
            loss = sum(F.cross_entropy(z, labels[pick, k]) for k, z in enumerate(logits.values()))
            loss = loss + 2 * F.cross_entropy(logits["domain"], labels[pick, 3])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return net.state_dict()
    key = dict(kind="feature net", num=num, steps=steps, size=size, seed=seed, net=str(FeatureNet()))
    net = FeatureNet()
    net.load_state_dict(data.cached(Path(folder) / f"features_{num}_{steps}_{size}_{seed}.safetensors", key, build))
    return net.eval().requires_grad_(False)


def fid(a, b):
    """Frechet distance of two Gaussians fitted to features (N, F) and (M, F); float64, any N and M above 1 (FID).

    The trace of the root of the product of the covariances is the nuclear norm of A B^T, A and B the centred features
    over sqrt(N - 1): no matrix root that could turn complex, and rank-deficient covariances are as good as others.
    Raises ValueError for fewer than two images, features of two widths, or NaN.
    """
    a, b = check_features(a, b)
    gap = a.mean(axis=0) - b.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    spread = (a**2).sum() + (b**2).sum()
    a, b = (np.linalg.qr(x, mode="r") for x in (a, b))                  # (min(N, F), F): the rotation changes no norm
    return float(gap @ gap + spread - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


def kid(a, b):
    """Unbiased squared MMD of features (N, F) and (M, F) with the kernel (x y / F + 1)^3 (KID, Binkowski et al. 2018);
    float64, all pairs, any N and M above 1; unlike FID it does not depend on their size. Raises as `fid`."""
    a, b = check_features(a, b)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1)**3
    own = lambda x: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
    return float(own(a) + own(b) - 2 * kernel(a, b).mean())


def kid_spread(a, b, subset_size=100, num_subsets=100, seed=0):
    """Mean and standard deviation of `kid` over random subsets, as is customary; subset_size shrinks to the sets."""
    a, b = check_features(a, b)
    size, rng = min(subset_size, len(a), len(b)), np.random.default_rng(seed)
    values = [kid(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]]) for _ in range(num_subsets)]
    return float(np.mean(values)), float(np.std(values))


def check_features(a, b):
    """Both as float64 matrices. Raises ValueError: fewer than two rows, other widths, or a value that is not finite."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
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
# The oracle: what perfect photos and perfect renders score.

def oracle(folder=FOLDER, num=64):
    """Dict of (perfect photos, perfect renders, target) per measure on num held-out objects."""
    held = data.evaluation_set(num, folder=folder)
    net = train_feature_net(folder)
    mask = held["mask"] / 255
    pictures = {name: held[name] / 255 for name in ("photo", "image")}
    iou = [silhouette_iou(x, mask).mean().item() for x in pictures.values()]
    views = [consistency(x, held["position"], held["normal"], mask) for x in pictures.values()]
    real = data.photo_set(4 * num, folder=folder)["image"].flatten(0, 1) / 255
    features = [net.features(x.flatten(0, 1)) for x in (real[:, None], *pictures.values())]
    rows = {"silhouette IoU": (*iou, ">= 0.98"),
            "re-rendered PSNR (dB)": (*(x["psnr"].nanmean().item() for x in views), ""),
            "re-rendered SSIM": (*(x["ssim"].nanmean().item() for x in views), ""),
            "leave-one-out PSNR (dB)": (*(x["psnr_loo"].nanmean().item() for x in views), ">= 30"),
            "  surface seen twice (share)": (*(x["covered"].mean().item() for x in views), "")}
    labels = held["labels"].repeat_interleave(held["image"].shape[1], dim=0)
    for k, head in enumerate(FeatureNet.heads):
        right = []
        for domain, name in ((1, "photo"), (0, "image")):
            truth = labels[:, k] if k < 3 else torch.full((len(labels),), domain)
            with torch.no_grad():
                right.append((net(pictures[name].flatten(0, 1))[head].argmax(dim=1) == truth).float().mean().item())
        if head == "material":
            right[1] = float("nan")                                     # renders do not show it
        rows[f"{head} read right"] = (*right, ">= 0.99" if head == "domain" else "")
    rows["Frechet distance to photos"] = (*(fid(features[0], x) for x in features[1:]), "small, large")
    rows["kernel distance x1000"] = (*(1000 * kid(features[0], x) for x in features[1:]), "~ 0, large")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The trained models: does control hold, does the domain follow its switch, has the domain leaked?

def measure(images, held, photos, net, base=None, task="texturing"):
    """Control, consistency and realism of grids of images.

    images: (B, V, 3, H, W) in [0, 1], of the objects `held` (data.evaluation_set). photos: (N, F) features of held-out
    photographs; base: of the base model's images of the same prompts. task "text": there are no maps, so consistency
    is taken on the visual hull. Returns a dict of floats: silhouette IoU with the control mask; PSNR (dB) and SSIM of
    the views re-rendered, PSNR leave-one-out; share called a photo; Frechet and kernel (x 1000) distance to base and
    to photos; caption, how surely the heads read category, colour and material off the image (in place of CLIP).
    """
    mask, flat = held["mask"] / 255, images.flatten(0, 1)
    if task == "text":
        views = consistency(images, *visual_hull(silhouette(images)), near=0.5)
    else:
        views = consistency(images, held["position"], held["normal"], mask)
    features, labels = net.features(flat), held["labels"].repeat_interleave(images.shape[1], dim=0)
    with torch.no_grad():
        heads = net(flat)
    said = [heads[name].softmax(1).gather(1, labels[:, k:k + 1]) for k, name in enumerate(("category", "color",
                                                                                           "material"))]
    row = dict(iou=silhouette_iou(images, mask).mean().item() if task == "texturing" else None,
               **{name: views[name].nanmean().item() for name in ("psnr", "ssim", "psnr_loo")},
               photo=(net.photo_probability(flat) > 0.5).float().mean().item(), caption=torch.cat(said).mean().item())
    for name, reference in (("B", base), ("I", photos)):
        if reference is not None:
            row |= {f"FD_{name}": fid(reference, features), f"KD_{name}": 1000 * kid(reference, features)}
    return row


def number(value, digits):
    """A number for a table, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def base_prompts(num):
    """What the base model is asked for the held-out objects: (4 num, L) ids, view by view, as for the real set."""
    return data.tokenize(data.real_captions(data.sample_assets(num, data.SEEDS["evaluation"]))[0])


def base_images(path, num, folder, device, seed=0, num_steps=50, cfg_scale=1.0):
    """The base model's images of the held-out prompts, view by view: uint8 (4 num, 3, H, W), kept in folder."""
    key = dict(model=sample.file_id(path), num=num, steps=num_steps, cfg=cfg_scale, seed=seed)

    def draw():
        with tqdm(total=4 * num, desc="base model", unit="image", bar_format=sample.BAR) as progress:
            images = sample.sample_images(sample.load_network(path, device), base_prompts(num), seed=seed,
                                          num_steps=num_steps, cfg_scale=cfg_scale, progress=progress)
        return dict(image=data.to_uint8(images)[:, 0])
    return data.cached(Path(folder) / f"base_images_{num}_{seed}.safetensors", key, draw)["image"]


def toy(args):
    """Samples the held-out objects with syn_only and with realiz3d in each mode, prints the table beside the rows of
    the oracle and of the base model, which knows no control, and writes it with a picture; returns {row: measures}."""
    device = launch(args.threads)[0]
    realiz3d = args.model or sample.default_model("toy", "texturing")
    syn_only = args.syn_only or sample.default_model("toy", "texturing", "syn_only")
    network = sample.load_network(realiz3d, device)
    held = data.evaluation_set(args.num, size=network.dit.config.image_size, folder=args.folder, device=device)
    net = train_feature_net(args.folder)
    world = data.photo_set(1000, folder=args.folder, device=device)["image"][:, 0] / 255
    photos = net.features(world)
    options = dict(seed=args.seed, num_steps=args.num_steps, cfg_scale=args.cfg_scale)
    runs = [("syn_only", sample.load_network(syn_only, device), "real"), ("realiz3d, synthetic mode", network, "syn"),
            ("realiz3d, real mode", network, "real"), ("realiz3d, shifted", network, "shifted")]
    base = base_images(args.base or sample.default_base(), args.num, args.folder, device, **options)
    images = {"oracle photos": held["photo"] / 255, "oracle renders": held["image"] / 255,
              "base model, no control": base.view(held["image"].shape) / 255}
    with tqdm(total=len(runs) * args.num * 4, desc="sampling", bar_format=sample.BAR) as progress:
        for name, model, mode in runs:
            drawn = sample.sample_images(model, held["text"], mode, 4, held["control"], progress=progress, batch=16,
                                         **options)
            images[name] = data.to_uint8(drawn) / 255
    rows = {name: measure(grids, held, photos, net) for name, grids in images.items()}
    print(f"{args.num} held-out objects, four views, {args.num_steps} steps, seed {args.seed}; {realiz3d}, {syn_only}")
    rows["base model, no control"].update(iou=None, psnr_loo=None)          # free shapes, not views of one object
    columns = {"iou": 3, "psnr_loo": 2, "photo": 3, "FD_I": 1, "KD_I": 0}
    print(f"{'':28}{'IoU':>10}{'LOO dB':>10}{'photo':>10}{'FD':>10}{'KD x1000':>10}")
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{number(row[key], digits):>10}" for key, digits in columns.items()))
    print("IoU: silhouette with the control mask; LOO: leave-one-out consistency; photo: share called a photo; FD, KD: "
          f"to {len(world)} held-out photos")
    out = args.out.removesuffix(".png")
    sample.save_picture(f"{out}.png", [(name, (grids[:6] * 255).round().byte().flatten(0, 1)) for name, grids in
                                       images.items()], column_titles=data.VIEWS * min(6, args.num))
    write_json(f"{out}.json", dict(settings=settings(args), rows=rows))
    print(f"wrote {out}.png and {out}.json")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables on the toy world: Table 1 (texturing), 2 (ablation), 3 (text to multiview)


class Row(NamedTuple):
    """A row of a table: how to train and sample it, and what the paper measured."""
    label: str
    flags: str | None       # of train_stage2.py; None: the paper's numbers only
    mode: str               # domain mode of sampling, or "sdedit"
    paper: tuple            # PSNR, SSIM, LPIPS, FID_B, KID_B, FID_I, KID_I, CLIP


# The paper's ranks 32 and 128 at width 1152 are 5 and 21 at the toy's 192.
BASELINES = {
    "syn only":                   ("--method syn_only", "real"),
    "syn + real":                 ("--method syn_real", "real"),
    "LoRA 32":                    ("--method lora --rank 5", "real"),
    "LoRA 128":                   ("--method lora --rank 21", "real"),
    "linear adapters 32":         ("--method linear_adapter --rank 5", "real"),
    "linear adapters 128":        ("--method linear_adapter --rank 21", "real"),
    "SDEdit":                     ("--method syn_only", "sdedit"),
    "TRELLIS large":              (None, "real"),
    "domain adapter 32":          ("--method domain_adapter --rank 5", "real"),
    "domain adapter 128":         ("--method domain_adapter --rank 21", "real"),
    "spatial adapter 32":         ("--method spatial_adapter --rank 5", "real"),
    "spatial adapter 128":        ("--method spatial_adapter --rank 21", "real"),
    "domain switcher, two-stage": ("--method domain_switcher", "real"),
    "domain switcher, joint":     ("--method domain_switcher --joint", "real"),
    "Realiz3D":                   ("", "shifted"),
}
PAPER1 = {
    "syn only":                   (25.76, .9269, .0831, 168.21, .0240, 218.29, .0431, .2628),
    "syn + real":                 (25.63, .9260, .0833, 164.37, .0226, 214.84, .0411, .2629),
    "LoRA 32":                    (21.88, .9012, .1027, 151.97, .0157, 204.80, .0324, .2682),
    "LoRA 128":                   (22.12, .9033, .1014, 155.65, .0168, 207.69, .0339, .2680),
    "linear adapters 32":         (22.49, .9069, .0959, 154.16, .0186, 210.44, .0372, .2678),
    "linear adapters 128":        (22.87, .9088, .0967, 156.07, .0189, 213.50, .0379, .2671),
    "SDEdit":                     (22.21, .9013, .1169, 147.06, .0149, 204.35, .0327, .2672),
    "domain adapter 32":          (25.61, .9266, .0843, 164.17, .0223, 215.80, .0408, .2610),
    "domain adapter 128":         (25.60, .9264, .0848, 163.64, .0220, 215.28, .0398, .2608),
    "spatial adapter 32":         (24.91, .9200, .0858, 155.71, .0197, 210.62, .0393, .2634),
    "spatial adapter 128":        (24.86, .9198, .0863, 153.35, .0181, 208.64, .0343, .2636),
    "domain switcher, two-stage": (24.94, .9193, .0888, 157.89, .0185, 210.18, .0350, .2644),
    "domain switcher, joint":     (23.16, .9069, .0991, 145.48, .0156, 205.08, .0335, .2663),
    "Realiz3D":                   (24.78, .9153, .0865, 141.90, .0121, 200.24, .0291, .2674),
}
PAPER3 = {
    "syn only":                   (19.66, .8779, .0964, 168.60, .0204, 215.57, .0363, .2541),
    "syn + real":                 (19.37, .8714, .1017, 164.44, .0192, 214.72, .0361, .2586),
    "LoRA 32":                    (17.54, .8548, .1222, 153.89, .0125, 204.14, .0264, .2563),
    "LoRA 128":                   (17.91, .8568, .1186, 154.11, .0131, 206.68, .0269, .2579),
    "linear adapters 32":         (18.07, .8603, .1223, 152.21, .0127, 204.02, .0256, .2583),
    "linear adapters 128":        (18.38, .8690, .1191, 155.40, .0150, 208.78, .0313, .2526),
    "SDEdit":                     (18.46, .8431, .1232, 139.18, .0112, 199.67, .0263, .2609),
    "TRELLIS large":              (None, None, None, 181.92, .0275, 224.22, .0441, .2495),
    "domain adapter 32":          (19.27, .8655, .1076, 158.52, .0164, 212.00, .0308, .2607),
    "domain adapter 128":         (19.02, .8621, .1082, 157.45, .0163, 210.67, .0313, .2601),
    "spatial adapter 32":         (18.48, .8422, .1216, 132.48, .0072, 200.38, .0212, .2633),
    "spatial adapter 128":        (18.36, .8350, .1234, 130.25, .0071, 199.46, .0205, .2638),
    "domain switcher, two-stage": (18.56, .8481, .1134, 153.36, .0146, 208.14, .0303, .2587),
    "domain switcher, joint":     (17.67, .8010, .1290, 129.56, .0061, 197.11, .0180, .2629),
    "Realiz3D":                   (19.02, .8631, .1075, 122.01, .0056, 196.01, .0171, .2643),
}
PLAIN = "--no_freezing --no_reassignment"
TABLES = {
    "table1": ("texturing", [Row(label, *BASELINES[label], paper) for label, paper in PAPER1.items()]),
    "table2": ("texturing", [
        Row("1 joint", f"--joint {PLAIN}", "real",       (25.53, .9267, .0850, 166.93, .0234, 216.63, .0424, .2624)),
        Row("2 no real data", "--no_real_data", "real",  (25.11, .9232, .0849, 162.02, .0220, 212.86, .0395, .2656)),
        Row("3 real data", PLAIN, "real",                (23.97, .9123, .0897, 137.23, .0098, 198.44, .0258, .2695)),
        Row("4 = 3, shifted", PLAIN, "shifted",          (24.25, .9128, .0883, 141.99, .0123, 202.07, .0293, .2679)),
        Row("5 = 3 + reassignment", "--no_freezing", "real",
            (24.18, .9125, .0877, 139.21, .0102, 198.71, .0265, .2678)),
        Row("6 = 5, shifted", "--no_freezing", "shifted", (24.37, .9130, .0871, 141.08, .0117, 199.33, .0289, .2670)),
        Row("7 = 5 + freezing", "", "real",              (24.52, .9141, .0870, 141.20, .0118, 199.39, .0290, .2675)),
        Row("8 = 7, shifted", "", "shifted",             (24.78, .9153, .0865, 141.90, .0121, 200.24, .0291, .2674))]),
    "table3": ("text", [Row(label, *BASELINES[label], paper) for label, paper in PAPER3.items()]),
}


def trained(row, task, args):
    """Path of the row's model; train_stage2.py trains it first where it is missing, or goes on where it stopped."""
    name = "-".join([task, *row.flags.replace("--", "").replace(" ", "_").split(), f"{args.steps}_steps"])
    out = args.folder if args.seed == 0 else f"{args.folder}/seed{args.seed}"
    path = f"{out}/{name}.safetensors"
    if not os.path.isfile(path):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_stage2.py")
        command = ["--task", task, *row.flags.split(), "--name", name, "--out", out, "--seed", args.seed, "--steps",
                   args.steps, "--sample_every", args.steps + 1, *args.train_flags.split()]
        command += ["--threads", args.threads] if args.threads else []
        print(f"{row.label}: python train_stage2.py {' '.join(map(str, command))}", flush=True)
        if subprocess.run([sys.executable, script, *map(str, command)]).returncode:
            raise ValueError(f"the training of '{row.label}' stopped; the same command goes on from there")
    return path


def sampled(row, path, task, held, args, device):
    """The row's grids of the held-out objects, uint8 (N, V, 3, H, W), kept beside the model."""
    num = len(held["text"])
    key = dict(model=sample.file_id(path), mode=row.mode, num=num, steps=args.num_steps, cfg=args.cfg_scale,
               seed=args.seed)

    def draw():
        network, options = sample.load_network(path, device), dict(num_steps=args.num_steps, cfg_scale=args.cfg_scale)
        with tqdm(total=4 * num, desc=row.label, unit="image", bar_format=sample.BAR) as progress:
            images = sample.sample_images(network, held["text"], "real" if row.mode == "sdedit" else row.mode, 4,
                                          held["control"] if task == "texturing" else None, seed=args.seed, batch=16,
                                          progress=progress, **options)
        if row.mode == "sdedit":
            base = sample.load_network(sample.default_base("toy", args.folder), device)
            images = sample.sdedit(base, images, base_prompts(num).view(num, 4, -1), seed=args.seed, **options)
        return dict(image=data.to_uint8(images))
    return data.cached(Path(f"{path.removesuffix('.safetensors')}-{row.mode}.samples"), key, draw)["image"]


def table(args):
    """Trains what is missing, samples and measures every row of one of the paper's tables, and prints the toy's values
    beside the paper's. Writes results/TABLE.json after each row, and two pictures at the end."""
    device = launch(args.threads)[0]
    task, rows = TABLES[args.command]
    folder, net = f"{args.folder}/sets", train_feature_net(f"{args.folder}/sets")
    held = data.evaluation_set(args.num, folder=folder, device=device)
    photos = net.features(data.photo_set(1000, folder=folder, device=device)["image"][:, 0] / 255)
    base = net.features(base_images(sample.default_base("toy", args.folder), args.num, folder, device, args.seed,
                                    args.num_steps) / 255)
    out, results, grids = f"{args.results}/{args.command}", {}, {}
    print(f"{len(rows)} rows, of which {sum(row.flags is not None for row in rows)} on {args.num} held-out objects, "
          f"models of {args.steps} steps, seed {args.seed}; into {out}.json")
    for row in rows:
        results[row.label] = dict(paper=dict(zip(PAPER_COLUMNS, row.paper)))
        if row.flags is None:
            continue
        grids[row.label] = sampled(row, trained(row, task, args), task, held, args, device)
        toy = measure(grids[row.label] / 255, held, photos, net, base, task)
        results[row.label] |= dict(flags=row.flags, mode=row.mode, toy=toy)
        write_json(f"{out}.json", dict(settings=settings(args), commit=commit(), rows=results))
    print_table(results)
    points = {label: (row["toy"]["KD_I"], row["toy"]["psnr"]) for label, row in results.items() if "toy" in row}
    sample.save_points(f"{out}.png", points, "kernel distance to photos x1000 (left: realistic)",
                       "re-rendered PSNR (up: consistent)")
    sample.save_picture(f"{out}_sheet.png", [("renders", held["image"][:6].flatten(0, 1))] + [
        (label, images[:6].flatten(0, 1)) for label, images in grids.items()], column_titles=data.VIEWS * 6)
    print(f"wrote {out}.json, {out}.png and {out}_sheet.png")


PAPER_COLUMNS = ("PSNR", "SSIM", "LPIPS", "FID_B", "KID_B", "FID_I", "KID_I", "CLIP")


def print_table(results):
    """The toy's values, the paper's beside them, and how alike the two order the methods."""
    columns = {"iou": 3, "psnr": 2, "psnr_loo": 2, "ssim": 4, "photo": 2, "FD_B": 1, "KD_B": 0, "FD_I": 1, "KD_I": 0,
               "caption": 3}
    digits = {"PSNR": 2, "SSIM": 4, "FID_B": 1, "FID_I": 1, "KID_I": 4}
    print(f"{'':28}{''.join(f'{name:>9}' for name in columns)}  | paper {''.join(f'{name:>9}' for name in digits)}")
    for label, row in results.items():
        toy = row.get("toy", {})
        print(f"{label:28}{''.join(f'{number(toy.get(name), d):>9}' for name, d in columns.items())}  |       "
              + "".join(f"{number(row['paper'][name], d):>9}" for name, d in digits.items()))
    both = [row for row in results.values() if "toy" in row]
    for what, ours, theirs in (("consistency", "psnr", "PSNR"), ("realism", "KD_I", "KID_I")):
        rho = spearmanr([row["toy"][ours] for row in both], [row["paper"][theirs] for row in both]).statistic
        print(f"Spearman correlation of the order by {what} ({ours} here, {theirs} in the paper): {rho:.2f}")


def settings(args):
    """The flags, for a results file."""
    return {key: value for key, value in vars(args).items() if key != "run"}


def commit():
    """The repository's commit, None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def write_json(path, value):
    """Writes to a temporary name and moves it into place."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(f"{path}.tmp", path)


def print_oracle(args):
    """Prints what `oracle` measures, each number beside its target."""
    print(f"{'':32}{'photos':>10}{'renders':>10}  target    ({args.num} held-out objects, four views)")
    for name, (photos, renders, target) in oracle(args.folder, args.num).items():
        print(f"{name:32}{photos:10.3f}{renders:10.3f}  {target}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("oracle", help="perfect photos and renders through every toy measure")
    sub.set_defaults(run=print_oracle)
    sub.add_argument("--num", type=int, default=64, help="held-out objects")
    sub.add_argument("--folder", default=FOLDER, help="where sets and the feature net are kept")
    sub = commands.add_parser("toy", help="control, domain and leakage of the trained models")
    sub.set_defaults(run=toy)
    sub.add_argument("--num", type=int, default=40, help="held-out objects")
    sub.add_argument("--folder", default=FOLDER, help="where sets and the feature net are kept")
    sub.add_argument("--model", help="realiz3d checkpoint (default: the run folder's, else the shipped one)")
    sub.add_argument("--syn_only", help="checkpoint of python train_stage2.py --method syn_only (default likewise)")
    sub.add_argument("--base", help="base model (default likewise)")
    sub.add_argument("--num_steps", type=int, default=50, help="DDIM steps")
    sub.add_argument("--cfg_scale", type=float, default=sample.CFG_SCALE, help="guidance on the text, 1 = none")
    sub.add_argument("--seed", type=int, default=0, help="decides the noise")
    sub.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    sub.add_argument("--out", default="runs/toy/evaluate.png", help="picture to write; its numbers: .json")
    for name, (task, rows) in TABLES.items():
        sub = commands.add_parser(name, help=f"the paper's Table {name[-1]} on the toy world ({len(rows)} rows, task "
                                  f"{task}): trains what is missing, about ten minutes a model; run again to go on")
        sub.set_defaults(run=table)
        sub.add_argument("--num", type=int, default=40, help="held-out objects")
        sub.add_argument("--folder", default="runs/toy", help="run folder: sets, models, samples")
        sub.add_argument("--results", default="results", help="where the table and its pictures go")
        sub.add_argument("--steps", type=int, default=1600, help="training steps of every model")
        sub.add_argument("--num_steps", type=int, default=50, help="DDIM steps")
        sub.add_argument("--cfg_scale", type=float, default=sample.CFG_SCALE, help="guidance on the text, 1 = none")
        sub.add_argument("--seed", type=int, default=0, help="decides training and noise")
        sub.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
        sub.add_argument("--train_flags", default="", help="more flags for train_stage2.py, in quotes")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
