"""Measures of control and realism (Sec. 5), calibrated on what no paper has: perfect photos of the same objects.

    python evaluate.py toy                          # the trained models beside the oracle: control, domain, leakage
    python evaluate.py oracle                       # perfect photos and perfect renders through every measure
    python evaluate.py select                       # B_max and t_max of a model, for sample.py to find (Sec. 4.3)
    python evaluate.py dial                         # between the domains: e(s) from render to photograph
    python evaluate.py table1                       # Table 1 (table2, table3) on the toy world; hours on a CPU
    python evaluate.py findings                     # the paper's claims against the tables in results/
    python evaluate.py folders OURS THEIRS --inception inception-2015-12-05.pt      # any images: FID, KID
    python evaluate.py curate FOLDER OUT --clip DIR # the photographs of FID_I: CLIP's best of every class
    python evaluate.py benchmark                    # FID by the nuclear norm against the square root of a matrix

Each measure is a plain function of images in [0, 1], (B, V, 3, H, W). In the toy world distances are taken on the
features of a small network trained here, so they are called Frechet and kernel distance (FD, KD), not FID and KID.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.linalg import sqrtm
from scipy.stats import spearmanr
from tqdm import tqdm

import data
import sample
from dit import T, launch, load_tensors, run_cli

FOLDER = "runs/toy/sets"                                                # where the toy's sets are kept


# ---------------------------------------------------------------------------------------------------------------------
# Shape: is the object where the control says?

def silhouette_iou(image, mask):
    """Images (B, V, 3, H, W) in [0, 1], coverage (B, V, 1, H, W) in [0, 1] -> IoU per object (B,).

    Pixels covered in part are left out of the count: they may rightly be read either way.
    """
    seen, there = data.silhouette(image), mask == 1
    counted = there | (mask == 0)
    both = (seen & there & counted).flatten(1).sum(dim=1)
    either = ((seen | there) & counted).flatten(1).sum(dim=1)
    return both / either.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# 3D consistency: the views back-projected on the surface and rendered again (Sec. 5), all of them or all others

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
            color, point, valid = data.bilinear(maps, column, row).split([3, 3, 1], dim=1)
            forward = data.camera(azimuth[j], elevation)[2].to(image)
            cosine = -(normal[:, i] * forward[:, None, None]).sum(dim=1, keepdim=True)
            same = (point - position[:, i]).norm(dim=1, keepdim=True) < near
            weight = (cosine.clamp(min=0)**2) * (cosine > 0.2) * same * (valid > 0.999) * whole[:, i]
            total, weights = total + weight * color, weights + weight
        again[:, i], seen[:, i] = total / weights.clamp(min=1e-9), weights > 0
    return again, seen


def consistency(image, position, normal, mask, near=0.2, outline=None, lpips_weights=None, **cameras):
    """3D consistency per object (Sec. 5), inputs as in `rerender`: dict of (B,) psnr and ssim of the views against
    their re-rendering, the paper's form (and lpips, given its weights); psnr_loo leave-one-out, and covered, the share
    of the surface it can judge.

    outline: bool (B, V, 1, H, W), what the views show, where the surface itself was lifted from them: what it leaves
    out is white when rendered again, and counts.
    """
    again, seen = rerender(image, position, normal, mask, near=near, **cameras)
    other, twice = rerender(image, position, normal, mask, leave_one_out=True, near=near, **cameras)
    again = torch.where(seen, again, image)                             # SSIM's windows reach over the edge
    if outline is not None:
        again, seen = torch.where(outline & (mask == 0), 1.0, again), seen | outline
    where = seen[..., 5:-5, 5:-5].flatten(2).any(2)                     # views in which SSIM can judge the object
    each = torch.where(where, ssim(again, image, seen).nan_to_num(), 0.0)
    joined = lambda views: views.transpose(1, 2).flatten(2, 3)          # an object's views as one tall image
    row = dict(psnr=psnr(joined(again), joined(image), joined(seen)).clamp(max=100), ssim=each.sum(1) / where.sum(1),
               psnr_loo=psnr(joined(other), joined(image), joined(twice)).clamp(max=100),
               covered=twice.flatten(1).sum(1) / (mask == 1).flatten(1).sum(1).clamp(min=1))
    return row | (dict(lpips=lpips(again, image, lpips_weights).mean(1)) if lpips_weights else {})


def visual_hull(seen, size=64, azimuth=data.AZIMUTHS, elevation=data.ELEVATION, steps=192):
    """Lifts silhouettes to 3D for views that have no mesh (text to multiview): the largest shape that fits them all.

    seen: (B, V, 1, H, W) bool, from data.silhouette. Marches each pixel's ray to what data.carve leaves of size^3
    cells.
    Returns position, normal (B, V, 3, H, W) and mask (B, V, 1, H, W), 1 where the ray hits, as `consistency` takes
    them. The paper lifts with a pretrained reconstruction network.
    """
    B, V, _, H, W = seen.shape
    solid = data.carve(seen, size, azimuth, elevation)                                              # (B, 1, x, y, z)
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
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64)**2 / (2 * 1.5**2)).to(a.device)
    rows, columns = (g / g.sum()).view(1, 1, 11, 1), (g / g.sum()).view(1, 1, 1, 11)
    x, y = (z.double().reshape(-1, 1, *z.shape[-2:]) for z in (a, b))
    mean = lambda z: F.conv2d(F.conv2d(z, rows), columns).view(*a.shape[:-2], a.shape[-2] - 10, a.shape[-1] - 10)
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

    weights: {name: tensor} of `lpips.LPIPS(net="alex").state_dict()`, from `load_lpips`.
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


def train_feature_net(folder=FOLDER, num=3000, steps=1500, size=32, seed=11, backgrounds=("white",)):
    """FeatureNet trained on photos and renders of num objects before these backgrounds (about two minutes on one core),
    kept in folder."""
    def build():
        assets = data.sample_assets(num, seed)
        azimuth = 90. * torch.arange(num)[:, None].remainder(4)
        behind = [backgrounds[k // 4 % len(backgrounds)] for k in range(num)]       # the azimuth turns with k % 4
        images = torch.cat([data.render(assets, azimuth, style, behind, size, geometry=False, seed=seed).rgb[:, 0]
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
    name = f"features_{num}_{steps}_{size}_{seed}"
    if len(backgrounds) > 1:
        key, name = key | dict(each_four=list(backgrounds)), f"{name}_backgrounds"
    net, threads = FeatureNet(), torch.get_num_threads()
    torch.set_num_threads(1)                    # more would round otherwise, and train a network of other verdicts
    net.load_state_dict(data.cached(Path(folder) / f"{name}.safetensors", key, build))
    torch.set_num_threads(threads)
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
    a, b = (np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x for x in (a, b))    # a rotation changes no norm
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
# Images on disk: any folder against any other. The networks are files that the user has; nothing is downloaded.


def load_inception(path, device="cpu"):
    """Everybody's FID network: images (N, 3, H, W) in [0, 1] -> features (N, 2048), resizing them itself.

    path: inception-2015-12-05.pt, the TorchScript file that StyleGAN's repositories name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no Inception network at {path}: get inception-2015-12-05.pt from nvlabs-fi-cdn.nvidia"
                                ".com/stylegan2-ada-pytorch/pretrained/metrics/ and name it with --inception")
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        raise ValueError(f"{path} is not a TorchScript file; --inception wants inception-2015-12-05.pt") from None

    @torch.no_grad()
    def features(images):
        return net((images * 255).round().byte().to(device), return_features=True).float().cpu()
    return features


def load_lpips(path):
    """The weights `lpips` takes, from a file of torch.save or safetensors. Raises where one is missing."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no LPIPS weights at {path}: pip install lpips, then python -c \"import lpips, torch; "
                                f"torch.save(lpips.LPIPS(net='alex').state_dict(), '{path}')\"")
    weights = load_tensors(path)[0]
    names = [f"{name}.{part}" for name, _, _ in LPIPS_LAYERS for part in ("weight", "bias")]
    missing = set(names + [f"lin{k}.model.1.weight" for k in range(5)]) - set(weights)
    if missing:
        raise ValueError(f"{path} lacks {min(missing)}: --lpips wants the state_dict of lpips.LPIPS(net='alex')")
    return weights


def load_clip(folder, device="cpu"):
    """score(images (N, 3, H, W) in [0, 1], captions) -> (N,), `clip_score` of a CLIP model.

    folder: as Hugging Face has it (openai/clip-vit-base-patch32: config.json, model.safetensors, tokenizer and
    preprocessor files). Needs the transformers package.
    """
    if not os.path.isfile(f"{folder}/config.json"):
        raise FileNotFoundError(f"no CLIP model in {folder}: get the files of huggingface.co/openai/clip-vit-base-"
                                "patch32 into a folder and name it with --clip")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise ValueError("--clip needs the transformers package: pip install transformers") from None
    model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def score(images, captions):
        inputs = processor(text=captions, images=list((images * 255).round().byte()), return_tensors="pt", padding=True,
                           truncation=True).to(device)
        embedded = model(**inputs)
        return clip_score(embedded.image_embeds, embedded.text_embeds).cpu()
    return score


def find_images(folder, pattern="*"):
    """Paths of the images under a folder whose names fit, relative to it and sorted. Raises where there are none."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}")
    paths = [path for path in Path(folder).rglob(pattern) if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    if not paths:
        raise ValueError(f"{folder} holds no PNG, JPEG or WebP image called {pattern}")
    return sorted(str(path.relative_to(folder)) for path in paths)


def read_image(path):
    """(3, H, W) in [0, 1]; what is transparent lies before white. Raises ValueError naming a file it cannot read."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGBA")
    except (OSError, SyntaxError) as error:                             # PIL's for a broken PNG is a SyntaxError
        raise ValueError(f"cannot read the image {path}: {error}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def read_caption(path):
    """The caption of an image: NAME.txt beside it, or of its folder: "caption" in meta.json, or caption.txt."""
    text, meta, of_all = os.path.splitext(path)[0] + ".txt", *(os.path.join(os.path.dirname(path), name)
                                                               for name in ("meta.json", "caption.txt"))
    if not os.path.isfile(text) and os.path.isfile(meta):
        with open(meta) as file:
            caption = json.load(file).get("caption")
        if caption:
            return caption
    for name in (text, of_all):
        if os.path.isfile(name):
            with open(name) as file:
                return file.read().strip()
    raise FileNotFoundError(f"no caption for {path}: --clip wants {text}, or a 'caption' in {meta}")


def in_batches(paths, work, size=64):
    """torch.cat of work(images (n, 3, H, W), their paths) over the images of a folder, read a batch at a time."""
    done, batch = [], []
    for path in tqdm(paths, desc=os.path.dirname(paths[0]) or ".", unit="image", leave=False):
        image = read_image(path)
        if batch and (len(batch) == size or image.shape != batch[0][0].shape):
            done.append(work(torch.stack([image for image, _ in batch]), [path for _, path in batch]))
            batch = []
        batch.append((image, path))
    done.append(work(torch.stack([image for image, _ in batch]), [path for _, path in batch]))
    return torch.cat(done)


def surface_normals(position):
    """Unit normals (..., 3, H, W) of position maps (..., 3, H, W) with NaN off the object, towards the camera: the
    cross product of the mean differences to the neighbours below and above, right and left, those that are there."""
    def slope(dim):
        step = position.diff(dim=dim)
        gap = torch.full_like(step.narrow(dim, 0, 1), torch.nan)
        return torch.stack([torch.cat([step, gap], dim), torch.cat([gap, step], dim)]).nanmean(dim=0)
    return F.normalize(torch.linalg.cross(slope(-2), slope(-1), dim=-3), dim=-3).nan_to_num()


def folder_consistency(images, positions, azimuths, elevation, extent, lpips_weights=None):
    """`consistency` of IMAGES/ID/color_000.png, .. on POSITIONS/ID/position_000.npy, .., a view per azimuth.

    Positions p + 0.5 (H, W, 3) lie in the object's frame (y up, see data.py), NaN off the object; an orthographic image
    spans extent units to each side. Returns a dict of means over the objects. Raises ValueError where a map does not
    fit its camera.
    """
    rows = []
    for folder in tqdm(sorted(path for path in Path(positions).glob("*") if path.is_dir()), desc="consistency",
                       leave=False):
        try:
            image = torch.stack([read_image(f"{images}/{folder.name}/color_{v:03}.png") for v in range(len(azimuths))])
            position = torch.stack([torch.from_numpy(np.load(folder / f"position_{v:03}.npy")).float().permute(2, 0, 1)
                                    for v in range(len(azimuths))]).sub(0.5) * data.EXTENT / extent
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{folder.name}: its views or maps are not of one size, or damaged: {error}") from None
        if image.shape != position.shape:
            raise ValueError(f"{folder} has maps of {tuple(position.shape[-2:])}, its images {tuple(image.shape[-2:])}")
        mask = position.isfinite().all(dim=1, keepdim=True)
        column, row, _ = data.project(position, torch.tensor(azimuths), elevation)
        places = torch.meshgrid(*(torch.arange(n) + 0.5 for n in position.shape[-2:]), indexing="ij")
        for v in range(len(azimuths)):
            gap = torch.stack([row[v] - places[0], column[v] - places[1]]).norm(dim=0)[mask[v, 0]]
            if len(gap) and gap.median() > 1:
                raise ValueError(f"{folder}/position_{v:03}.npy lies {gap.median():.1f} pixels off its camera: see "
                                 "--azimuths, --elevation and --extent")
        normal = surface_normals(position)
        rows.append(consistency(image[None], position.nan_to_num()[None], normal[None], mask[None].float(),
                                lpips_weights=lpips_weights, azimuth=azimuths, elevation=elevation))
    if not rows:
        raise ValueError(f"{positions} has no folder of position maps, ID/position_000.npy, ..")
    return {name: torch.cat([row[name] for row in rows]).nanmean().item() for name in rows[0]}


def folders(args):
    """Measures one folder of images against another and prints one line: distances of features always; PSNR, SSIM (and
    LPIPS) where the two hold the same names; CLIP score and consistency of the first folder where asked for."""
    device = launch(args.threads)[0]
    ours, theirs = (find_images(folder, args.pattern) for folder in (args.ours, args.theirs))
    weights = load_lpips(args.lpips) if args.lpips else None
    if args.inception:
        names, features = ("FID", "KID"), load_inception(args.inception, device)
    else:
        print("without --inception: FD and KD on the toy's own network at 32 pixels, which knows nothing but the toy "
              "world (trained first where it is missing, two minutes)", flush=True)
        names, net = ("FD", "KD"), train_feature_net(args.folder)
        features = lambda images: net.features(F.interpolate(images, 32, mode="bilinear", antialias=True))
    paths = [[f"{folder}/{path}" for path in found] for folder, found in ((args.ours, ours), (args.theirs, theirs))]
    a, b = (in_batches(found, lambda images, _: features(images)) for found in paths)
    line = [f"{len(a)} images against {len(b)}:", f"{names[0]} {fid(a, b):.3f}",
            f"{names[1]}x1000 {1000 * kid(a, b):.3f}"]
    if min(len(a), len(b)) > 100:                                       # else the subsets are the sets
        line.append("(subsets of 100: {:.3f} +- {:.3f})".format(*(1000 * value for value in kid_spread(a, b))))
    if ours == theirs:
        metrics = {"PSNR": psnr, "SSIM": ssim} | ({"LPIPS": lambda x, y: lpips(x, y, weights)} if weights else {})

        def compare(images, found):
            others = [read_image(args.theirs + path.removeprefix(args.ours)) for path in found]
            for path, image in zip(found, others):
                if image.shape != images.shape[1:]:
                    raise ValueError(f"{path} is of another size than its counterpart in {args.theirs}")
            return torch.stack([metric(images, torch.stack(others)) for metric in metrics.values()], dim=1)
        line += [f"{name} {value:.4f}" for name, value in zip(metrics, in_batches(paths[0], compare).mean(dim=0))]
    if args.clip:
        score = load_clip(args.clip, device)
        line.append(f"CLIP {in_batches(paths[0], lambda x, found: score(x, [*map(read_caption, found)])).mean():.4f}")
    if args.positions:
        views = folder_consistency(args.ours, args.positions, args.azimuths, args.elevation, args.extent, weights)
        line += ["re-rendered"] + [f"{name} {value:.4f}" for name, value in views.items()]
    print(" ".join(line))


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


def curate(args):
    """Picks the photographs that FID_I and KID_I are taken against (C.1: ImageNet val, 42 classes, 4 images of each by
    CLIP, background removed).

    FOLDER holds a folder of images per class, named by the words that CLIP shall look for: the images (or a link to
    them) in photos/coffee_mug are scored against "a photo of a coffee mug". Type

        python evaluate.py curate photos chosen --clip clip-vit-base-patch32

    and the best four of each class are chosen/coffee_mug/NAME.png, ..; look at them in chosen.png, their scores are in
    chosen.json. To remove the background, make a grey mask of each with any tool, masks/coffee_mug/NAME.png (255 on the
    object, 0 around it), and type the same again with --masks masks: they now stand on white. Then

        python evaluate.py folders OURS chosen --inception inception-2015-12-05.pt
    """
    device, out, stem = launch(args.threads)[0], Path(args.out), lambda image: os.path.splitext(image)[0]
    if args.k < 1 or (args.size is not None and args.size < 1):
        raise ValueError(f"--k and --size must be at least 1, not {args.k} and {args.size}")
    if "{}" not in args.prompt:
        raise ValueError(f"--prompt wants {{}} where the class goes, as 'a photo of a {{}}', not '{args.prompt}'")
    for folder in filter(None, (args.source, args.masks)):
        if out.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{out} lies in {folder}: name a folder outside it for the chosen images")
    classes = {path.name: find_images(path) for path in sorted(Path(args.source).glob("*")) if path.is_dir()}
    if not classes:
        raise FileNotFoundError(f"{args.source} holds no folder of images per class, as {args.source}/coffee_mug")
    for name, images in classes.items():
        if len(images) < args.k:
            raise ValueError(f"{args.source}/{name} has {len(images)} image(s), fewer than --k {args.k}")
        names = [*map(stem, images)]
        if len(set(names)) < len(names):
            raise ValueError(f"{args.source}/{name} has two images called {max(names, key=names.count)}: rename one")
    score, chosen = load_clip(args.clip, device), {}
    for name, images in tqdm(classes.items(), desc="CLIP", unit="class"):
        caption = args.prompt.replace("{}", name.replace("_", " "))
        scores = in_batches([f"{args.source}/{name}/{image}" for image in images], lambda x, _: score(x, [caption]),
                            size=1)                 # one by one: a score must not hang on what shares the batch
        ranked = sorted(zip(images, scores.double().numpy().round(6).tolist()), key=lambda pair: -pair[1])
        chosen[name] = dict(ranked[:args.k])        # the sort is stable: equals stay ordered by name
    left = set(out.rglob("*.png")) - {out / name / f"{stem(image)}.png" for name in chosen for image in chosen[name]}
    if left:
        raise ValueError(f"{min(left)} is not among the chosen images: empty {out}, or name another folder")
    rows = []
    for name in tqdm(chosen, desc=str(out), unit="class"):
        tiles = []
        for image in chosen[name]:
            pixels = read_image(f"{args.source}/{name}/{image}")
            if args.masks:
                pixels = cut_out(pixels, f"{args.masks}/{name}/{stem(image)}.png")
            picture = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
            if args.size:
                picture = ImageOps.fit(picture, (args.size, args.size))
            sample.save_image(f"{out}/{name}/{stem(image)}.png", picture)
            tiles.append(torch.from_numpy(np.array(ImageOps.fit(picture, (96, 96)))).permute(2, 0, 1))
        rows.append((name.replace("_", " "), torch.stack(tiles)))
    sample.save_picture(f"{out}.png", rows, scale=1)                    # beside OUT: `folders` reads all that is in it
    write_json(f"{out}.json", dict(settings=settings(args), classes=chosen))
    print(f"wrote {args.k} images of each of {len(chosen)} classes to {out}, their scores to {out}.json, all on one "
          f"sheet to {out}.png")


def benchmark(args):
    """Times `fid` against the route by the square root of a matrix, in turn, on the same features; then the
    rasteriser of data.py."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {args.rounds}")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((args.num, args.width)) * scale + scale for scale in (1.0, 1.2))

    def by_root(a, b):
        (m1, c1), (m2, c2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
        return (m1 - m2) @ (m1 - m2) + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    print(f"FID of 2 x {args.num} images with {args.width} features each, {args.rounds} rounds in turn; some "
          "ten seconds a round at the default size", flush=True)
    times, values = {fid: [], by_root: []}, {}
    for _ in range(args.rounds):
        for route in times:
            start = time.perf_counter()
            values[route] = route(a, b)
            times[route].append(time.perf_counter() - start)
    nuclear, root = (float(np.median(times[route])) for route in (fid, by_root))
    print(f"nuclear norm {nuclear:.2f} s ({values[fid]:.6f}), scipy.linalg.sqrtm {root:.2f} s ({values[by_root]:.6f}): "
          f"{nuclear / root:.3f} of the time")
    ball = torch.stack(torch.meshgrid(*[torch.linspace(-0.5, 0.5, 66)] * 3, indexing="ij")).norm(dim=0) - 0.46
    mesh, start = data.surface_mesh(ball), time.perf_counter()
    data.rasterize(mesh, 512)
    print(f"rasteriser: {len(mesh.faces)} triangles at 4 x 512 x 512 in {time.perf_counter() - start:.2f} s on "
          f"{torch.get_num_threads()} thread(s)")


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
    rows["kernel distance x1000"] = (*(1000 * kid(features[0], x) for x in features[1:]), "small, large")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The trained models: does control hold, does the domain follow its switch, has the domain leaked?

def measure(images, held, photos, net, base=None, task="texturing", lpips_weights=None):
    """Control, consistency and realism of grids of images.

    images: (B, V, 3, H, W) in [0, 1], of the objects `held` (data.evaluation_set). photos: (N, F) features of held-out
    photographs; base: of the base model's images of the same prompts. task "text": there are no maps, so consistency
    is taken on the visual hull. Returns a dict of floats: silhouette IoU with the control mask; PSNR (dB) and SSIM of
    the views re-rendered (and LPIPS, given its weights), PSNR leave-one-out; share called a photo; Frechet and kernel
    (x 1000) distance to base and to photos; caption, how surely the heads read category, colour and material off the
    image (in place of CLIP).
    """
    mask, flat = held["mask"] / 255, images.flatten(0, 1)
    if task == "text":
        outline = data.silhouette(images)
        views = consistency(images, *visual_hull(outline), near=0.5, outline=outline, lpips_weights=lpips_weights)
    else:
        views = consistency(images, held["position"], held["normal"], mask, lpips_weights=lpips_weights)
    features, labels = net.features(flat), held["labels"].repeat_interleave(images.shape[1], dim=0)
    with torch.no_grad():
        heads = net(flat)
    said = [heads[name].softmax(1).gather(1, labels[:, k:k + 1]) for k, name in enumerate(("category", "color",
                                                                                           "material"))]
    row = dict(iou=silhouette_iou(images, mask).mean().item() if task == "texturing" else None,
               **{name: value.nanmean().item() for name, value in views.items() if name != "covered"},
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


def world_features(net, folder, device="cpu"):
    """FeatureNet's features (1000, F) of the photographs that realism is measured against."""
    return net.features(data.photo_set(1000, folder=folder, device=device)["image"][:, 0] / 255)


def load_toy(path, device):
    """`sample.load_network` of a model that draws pixels of the toy's size, which is what the feature network knows."""
    network = sample.load_network(path, device)
    config = network.dit.config
    if not config.vocab_size or config.image_size != 32:
        raise ValueError(f"{path} is a model of {config.image_size} x {config.image_size} "
                         f"{'pixels' if config.vocab_size else 'latents'}: the toy's measures are for 32 x 32 pixels")
    return network


def toy(args):
    """Samples the held-out objects with syn_only and with realiz3d in each mode, prints the table beside the rows of
    the oracle and of the base model, which knows no control, and writes it with a picture; returns {row: measures}."""
    device = launch(args.threads)[0]
    realiz3d = args.model or sample.default_model("toy", "texturing")
    syn_only = args.syn_only or sample.default_model("toy", "texturing", "syn_only")
    network = load_toy(realiz3d, device)
    held = data.evaluation_set(args.num, folder=args.folder, device=device)
    net = train_feature_net(args.folder)
    photos = world_features(net, args.folder, device)
    options = dict(seed=args.seed, num_steps=args.num_steps, cfg_scale=args.cfg_scale)
    B_max, t_max = sample.selected_shift(realiz3d)
    runs = [("syn_only", load_toy(syn_only, device), "real"), ("realiz3d, synthetic mode", network, "syn"),
            ("realiz3d, real mode", network, "real"), ("realiz3d, shifted", network, "shifted")]
    base = base_images(args.base or sample.default_base(), args.num, args.folder, device, **options)
    images = {"oracle photos": held["photo"] / 255, "oracle renders": held["image"] / 255,
              "base model, no control": base.view(held["image"].shape) / 255}
    with tqdm(total=len(runs) * args.num * 4, desc="sampling", bar_format=sample.BAR) as progress:
        for name, model, mode in runs:
            drawn = sample.sample_images(model, held["text"], mode, 4, held["control"], progress=progress, batch=16,
                                         B_max=B_max, t_max=t_max, **options)
            images[name] = data.to_uint8(drawn) / 255
    rows = {name: measure(grids, held, photos, net) for name, grids in images.items()}
    print(f"{args.num} held-out objects, four views, {args.num_steps} steps, seed {args.seed}; {realiz3d}, {syn_only}; "
          f"shifted: B_max {B_max}, t_max {t_max}")
    rows["base model, no control"].update(iou=None, psnr_loo=None)          # free shapes, not views of one object
    columns = {"iou": 3, "psnr_loo": 2, "photo": 3, "FD_I": 1, "KD_I": 0}
    print(f"{'':28}{'IoU':>10}{'LOO dB':>10}{'photo':>10}{'FD':>10}{'KD x1000':>10}")
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{number(row[key], digits):>10}" for key, digits in columns.items()))
    print("IoU: silhouette with the control mask; LOO: leave-one-out consistency; photo: share called a photo; FD, KD: "
          f"to {len(photos)} held-out photos")
    out = args.out.removesuffix(".png")
    sample.save_picture(f"{out}.png", [(name, (grids[:6] * 255).round().byte().flatten(0, 1)) for name, grids in
                                       images.items()], column_titles=data.VIEWS * min(6, args.num))
    write_json(f"{out}.json", dict(settings=settings(args) | dict(seed=args.seed), rows=rows))
    print(f"wrote {out}.png and {out}.json")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# How far to shift at sampling time (Sec. 4.3): once per model, on objects that are not evaluated on


def select(args):
    """Tries B_max over 0, 10, .. 40 % of the blocks, then t_max over 800, 850, .. 1000, on validation objects; of those
    whose kernel distance to photos exceeds the unshifted model's by no more than the share --max_loss, the one with the
    highest re-rendered PSNR wins. Writes the choice beside the model, for sample.py, and a picture of the trade-off."""
    device = launch(args.threads)[0]
    path = args.model or sample.default_model("toy", "texturing")
    network, task = load_toy(path, device), sample.trained_task(path)
    if network.shifters is None or task is None:
        raise ValueError(f"{path} is not a Realiz3D model of stage 2: there is no domain to shift")
    held = data.evaluation_set(args.num, data.SEEDS["validation"], folder=args.folder, device=device)
    net = train_feature_net(args.folder)
    photos = world_features(net, args.folder, device)
    tried = {}

    def score(B_max, t_max):
        images = sample.sample_images(network, held["text"], "shifted", 4, held["control"] if task == "texturing" else
                                      None, seed=args.seed, num_steps=args.num_steps, cfg_scale=args.cfg_scale,
                                      B_max=B_max, t_max=t_max, batch=16, progress=progress)
        row = tried[B_max, t_max] = measure(data.to_uint8(images) / 255, held, photos, net, task=task)
        progress.write(f"B_max {B_max:.1f}  t_max {t_max:4d}  " + "  ".join(
            f"{name} {number(row[name], COLUMNS[name])}" for name in ("psnr", "psnr_loo", "iou", "photo", "KD_I")))

    def limit():
        return tried[0.0, T]["KD_I"] + args.max_loss * abs(tried[0.0, T]["KD_I"])

    def best():
        within = [shift for shift in tried if tried[shift]["KD_I"] <= limit()]
        return max(within, key=lambda shift: tried[shift]["psnr"])
    with tqdm(total=9 * 4 * args.num, desc="select", unit="image", bar_format=sample.BAR) as progress:
        for B_max in (0.0, 0.1, 0.2, 0.3, 0.4):
            score(B_max, T)
        by_layer, _ = best()
        for t_max in (950, 900, 850, 800):
            score(by_layer, t_max)
    choice = dict(zip(("B_max", "t_max"), best()))
    out = path.removesuffix(".safetensors")
    name = lambda B_max, t_max: f"B_max {B_max:.1f}" + (f", t_max {t_max}" if t_max < T else "")
    points = {name(*shift): (row["KD_I"], row["psnr"]) for shift, row in tried.items()}
    sample.save_image(f"{out}.shift.png", sample.draw_points(
        points, "KD_I x1000 (left: realistic; the line: as much as may be lost)", "re-rendered PSNR (up: consistent)",
        limit=limit(), highlight=(name(*best()),)))
    write_json(f"{out}.shift.json", choice | dict(model=sample.file_id(path), settings=settings(args) | dict(
        seed=args.seed), tried=[dict(B_max=B_max, t_max=t_max, **row) for (B_max, t_max), row in tried.items()]))
    print(f"B_max {choice['B_max']}, t_max {choice['t_max']} -> {out}.shift.json, where sample.py finds it; the "
          f"trade-off: {out}.shift.png")


# ---------------------------------------------------------------------------------------------------------------------
# The dial, beyond the paper: the shift is linear in e_domain, so e(s) = (1 - s) e_syn + s e_real lies in between


def dial(args):
    """Turns s from render to photograph in e(s) = (1 - s) e_syn + s e_real: the same objects, control and noise at
    seven settings, and below them the share called a photo and how well the silhouette follows the control."""
    device = launch(args.threads)[0]
    path = args.model or sample.default_model("toy", "texturing")
    network = load_toy(path, device)
    if not network.knows_domains() or sample.trained_task(path) != "texturing":
        raise ValueError(f"{path} is not a texturing model with Domain Shifters: there is no dial to turn")
    held = data.evaluation_set(args.num, folder=args.folder, device=device)
    net, settings_of_s, rows = train_feature_net(args.folder), (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25), {}
    photos = world_features(net, args.folder, device)
    pictures = []
    with tqdm(total=len(settings_of_s) * 4 * args.num, desc="dial", unit="image", bar_format=sample.BAR) as progress:
        for s in settings_of_s:
            images = data.to_uint8(sample.sample_images(network, held["text"], s, 4, held["control"], seed=args.seed,
                                                        num_steps=args.num_steps, cfg_scale=args.cfg_scale, batch=16,
                                                        progress=progress))
            rows[s] = measure(images / 255, held, photos, net)
            pictures.append((f"s = {s}", images[:3].flatten(0, 1)))
    for s, row in rows.items():
        print(f"s {s:5.2f}  " + "  ".join(f"{name} {number(row[name], COLUMNS[name])}" for name in
                                          ("photo", "iou", "psnr", "psnr_loo", "KD_I")))
    curves = {"called a photo": [(s, row["photo"]) for s, row in rows.items()],
              "silhouette IoU": [(s, row["iou"]) for s, row in rows.items()]}
    out = args.out.removesuffix(".png")
    sample.save_picture(f"{out}.png", pictures, scale=2, column_titles=data.VIEWS * 3,
                        below=sample.draw_plot(curves, "s: 0 synthetic, 1 real", "", size=(880, 300), y_range=(0, 1)))
    write_json(f"{out}.json", dict(settings=settings(args) | dict(seed=args.seed), rows=rows))
    print(f"wrote {out}.png and {out}.json")


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
    """Path of the row's model; train_stage2.py trains it first where it is missing, or goes on where it stopped.

    Another seed trains stage 1 and 2 anew, on the same sets.
    """
    name = "-".join([task, *row.flags.replace("--", "").replace(" ", "_").split(), f"{args.steps}_steps"])
    out = args.folder if args.seed == 0 else f"{args.folder}/seed{args.seed}"
    if args.seed and not os.path.exists(f"{out}/sets"):
        os.makedirs(out, exist_ok=True)
        os.symlink(os.path.abspath(f"{args.folder}/sets"), f"{out}/sets")
    path, base = f"{out}/{name}.safetensors", sample.default_base("toy", args.folder)
    flags = ["--task", task, *row.flags.split(), "--name", name, "--seed", str(args.seed), "--steps", str(args.steps),
             *args.train_flags.split()]
    if not os.path.isfile(path):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_stage2.py")
        command = [*flags, "--out", out, "--base", base, "--sample_every", str(args.steps + 1)]
        command += ["--threads", str(args.threads)] if args.threads else []
        print(f"{row.label}: python train_stage2.py {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, script, *command]).returncode or not os.path.isfile(path):
            raise ValueError(f"the training of '{row.label}' stopped; the same command goes on from there")
    made = sample.load_tensors(path)[1]["command"].split()
    if set(flags) - set(made):
        raise ValueError(f"{path} was trained by '{' '.join(made)}', without {' '.join(set(flags) - set(made))}: name "
                         "another --folder, or delete it")
    return path


def sampled(row, path, task, held, args, device):
    """The row's grids of the held-out objects, uint8 (N, V, 3, H, W), kept beside the model."""
    num, base = len(held["text"]), sample.default_base("toy", args.folder)
    key = dict(model=sample.file_id(path), mode=row.mode, num=num, steps=args.num_steps, cfg=args.cfg_scale,
               seed=args.seed) | (dict(base=sample.file_id(base)) if row.mode == "sdedit" else {})

    def draw():
        options = dict(seed=args.seed, num_steps=args.num_steps, cfg_scale=args.cfg_scale)
        if row.mode == "sdedit":
            images = data.to_pixels(sampled(row._replace(mode="real"), path, task, held, args, device))
            images = sample.sdedit(load_toy(base, device), images, base_prompts(num).view(num, 4, -1), **options)
            return dict(image=data.to_uint8(images))
        with tqdm(total=4 * num, desc=row.label, unit="image", bar_format=sample.BAR) as progress:
            images = sample.sample_images(load_toy(path, device), held["text"], row.mode, 4, held["control"] if task ==
                                          "texturing" else None, batch=16, progress=progress, **options)
        return dict(image=data.to_uint8(images))
    return data.cached(Path(f"{path.removesuffix('.safetensors')}-{row.mode}.samples"), key, draw)["image"]


def table(args):
    """Trains what is missing, samples and measures every row of one of the paper's tables, and prints the toy's values
    beside the paper's. Writes results/TABLE.json after each row, and at the end TABLE.md and two pictures.

    Other seeds than 0 add to the file: what is printed is the mean over the seeds of a row.
    """
    device = launch(args.threads)[0]
    task, rows = TABLES[args.command]
    unknown = set(args.rows or []) - {row.label for row in rows}
    if unknown:
        raise ValueError(f"{args.command} has no row {', '.join(map(repr, unknown))}; its rows: "
                         + ", ".join(repr(row.label) for row in rows))
    out, folder = f"{args.results}/{args.command}", f"{args.folder}/sets"
    results, grids = read_results(f"{out}.json", args), {}
    results = {row.label: dict(paper=dict(zip(PAPER_COLUMNS, row.paper)), flags=row.flags, mode=row.mode,
                               toy=results.get(row.label, {}).get("toy", {})) for row in rows} | {
        ORACLE: dict(paper=dict.fromkeys(PAPER_COLUMNS), flags=None, mode="", toy={})}
    net, weights = train_feature_net(folder), load_lpips(args.lpips) if args.lpips else None
    held = data.evaluation_set(args.num, folder=folder, device=device)
    photos = world_features(net, folder, device)
    base = net.features(base_images(sample.default_base("toy", args.folder), args.num, folder, device, args.seed,
                                    args.num_steps, args.cfg_scale) / 255)
    results[ORACLE]["toy"]["-"] = measure(held["photo"] / 255, held, photos, net, base, task, weights)
    todo = [row for row in rows if row.flags is not None and row.label in (args.rows or results)]
    print(f"{len(todo)} rows on {args.num} held-out objects, models of {args.steps} steps, seed {args.seed}; into "
          f"{out}.json; about eight minutes a model of 1,200 steps where it is missing", flush=True)
    for row in todo:
        grids[row.label] = sampled(row, trained(row, task, args), task, held, args, device)
        toy = measure(grids[row.label] / 255, held, photos, net, base, task, weights)
        results[row.label]["toy"][str(args.seed)] = toy | dict(commit=commit())
        write_json(f"{out}.json", dict(settings=settings(args), rows=results))
    write_table(out, results, args)
    if not args.rows:
        sample.save_picture(f"{out}_sheet.png", [("renders", held["image"][:6].flatten(0, 1))] + [
            (label, images[:6].flatten(0, 1)) for label, images in grids.items()], column_titles=data.VIEWS * 6)
    print(f"wrote {out}.json, {out}.md, {out}.png" + ("" if args.rows else f" and {out}_sheet.png"))


LEGEND = """psnr, ssim: generated views against their re-rendering (up: consistent); psnr_loo: on surface seen by two
views, each from the other. FD, KD x1000: distances of a small network's features to the base model's images (B) and to
held-out photographs (I) (down: realistic), not on the paper's scale of FID and KID. caption: how surely that network
reads kind, colour and material; iou: silhouette against the control's; photo: share it calls a photo."""


def write_table(out, results, args):
    """Prints a table and writes it as OUT.md, and realism against consistency as OUT.png, a point a method."""
    lines = "\n".join(table_lines(results))
    print(lines)
    flags = " ".join(f"--{name} '{value}'" if " " in str(value) else f"--{name} {value}"
                     for name, value in settings(args).items() if value is not None)
    write_text(f"{out}.md", f"# {args.command.replace('table', 'Table ')} on the toy world, beside the paper's\n\n"
               f"{LEGEND}\n\n{lines}\n\n`python evaluate.py {args.command} {flags}`; "
               "a further seed: `--seed 1 --rows ..`\n")
    points = {label: [mean(row, name) for name in ("KD_I", "psnr")] for label, row in trained_rows(results).items()}
    papers = {label: (results[label]["paper"]["KID_I"], results[label]["paper"]["PSNR"]) for label in points}
    sample.save_image(f"{out}.png", sample.side_by_side([
        sample.draw_points(points, "KD_I x1000 (left: realistic)", "the toy: re-rendered PSNR (up: consistent)",
                           highlight=("Realiz3D", "8 = 7, shifted")),
        sample.draw_points(papers, "KID_I (left: realistic)", "the paper: PSNR (up: consistent)",
                           highlight=("Realiz3D", "8 = 7, shifted"))]))


ORACLE = "perfect photos (oracle)"                                     # a row of every table: the best there is
PAPER_COLUMNS = ("PSNR", "SSIM", "LPIPS", "FID_B", "KID_B", "FID_I", "KID_I", "CLIP")
COLUMNS = {"psnr": 2, "ssim": 4, "lpips": 4, "FD_B": 1, "KD_B": 0, "FD_I": 1, "KD_I": 0, "caption": 3, "iou": 3,
           "psnr_loo": 2, "photo": 2}                                   # of the toy, with digits to print


def read_results(path, args):
    """The rows of a results file, {} where there is none. Raises ValueError if it was made with other settings."""
    if not os.path.isfile(path):
        return {}
    stored, now = read_json(path), settings(args)
    other = [f"--{name} {stored['settings'].get(name)} (now {value})" for name, value in now.items()
             if stored["settings"].get(name) != value]
    if other:
        raise ValueError(f"{path} was made with {', '.join(other)}: name another folder with --results")
    return stored["rows"]


def read_json(path):
    """A JSON file of this script. Raises ValueError naming it where it is damaged."""
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or take it from git") from None


def mean(row, name):
    """A row's measure, averaged over its seeds; None where it has none."""
    values = [toy[name] for toy in row["toy"].values() if toy.get(name) is not None]
    return float(np.mean(values)) if values else None


def trained_rows(results):
    """The rows that have values of the toy and of the paper."""
    return {label: row for label, row in results.items() if row["toy"] and label != ORACLE}


def seed_noise(results, name):
    """Standard deviation of a measure between seeds, pooled over the rows trained with two or more; None: no such."""
    several = [[toy[name] for toy in row["toy"].values()] for row in results.values() if len(row["toy"]) > 1]
    several = [values for values in several if None not in values]
    return float(np.sqrt(np.mean([np.var(values, ddof=1) for values in several]))) if several else None


def table_lines(results):
    """The toy's values and the paper's beside them as lines of Markdown, then how alike the two order the methods."""
    columns = {name: digits for name, digits in COLUMNS.items() if any(name in t for r in results.values() for t in
                                                                        r["toy"].values())}
    cells = [["", *columns, *(f"paper {name}" for name in PAPER_COLUMNS)]]
    for label, row in results.items():
        cells.append([label + (f" ({len(row['toy'])} seeds)" if len(row["toy"]) > 1 else ""),
                      *(number(mean(row, name), digits) for name, digits in columns.items()),
                      *(number(value, 2 if value and value > 10 else 4) for value in row["paper"].values())])
    noise = [seed_noise(results, name) for name in columns]
    if any(noise):
        cells.append(["deviation between seeds", *(number(sd, digits) for sd, digits in zip(noise, columns.values())),
                      *[""] * len(PAPER_COLUMNS)])
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths)))
             + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if k else "-") for k, w in enumerate(widths)) + "|")
    both = trained_rows(results).values()
    for what, ours, theirs in (("consistency", "psnr", "PSNR"), ("realism", "KD_I", "KID_I")):
        rho = spearmanr([mean(row, ours) for row in both], [row["paper"][theirs] for row in both]).statistic
        lines += ["", f"Spearman correlation of the order by {what} ({ours} here, {theirs} in the paper): {rho:.2f}"]
    return lines


# The paper's claims: the table, the measure, and the row that has less of it than the other
FINDINGS = (
    ("renders alone forget realism",               "table1", "KD_I", "Realiz3D", "syn only"),
    ("mixing in real data softens that",           "table1", "KD_I", "syn + real", "syn only"),
    ("... and only softens it",                    "table1", "KD_I", "Realiz3D", "syn + real"),
    ("two stages are more realistic than joint",   "table2", "KD_I", "3 real data", "1 joint"),
    ("real data in stage 2 gives realism",         "table2", "KD_I", "3 real data", "2 no real data"),
    ("... and costs consistency",                  "table2", "psnr", "3 real data", "2 no real data"),
    ("reassignment wins consistency back",         "table2", "psnr", "3 real data", "5 = 3 + reassignment"),
    ("layer-aware training wins more back",        "table2", "psnr", "5 = 3 + reassignment", "7 = 5 + freezing"),
    ("shifted sampling wins more back",            "table2", "psnr", "7 = 5 + freezing", "8 = 7, shifted"),
    ("shifted, the two still win consistency",     "table2", "psnr", "4 = 3, shifted", "8 = 7, shifted"),
    ("... and silhouettes (ours, exact control)",  "table2", "iou",  "4 = 3, shifted", "8 = 7, shifted"),
    ("real data costs silhouettes (ours)",         "table2", "iou",  "3 real data", "2 no real data"),
    ("Realiz3D is more realistic than no real data", "table2", "KD_I", "8 = 7, shifted", "2 no real data"),
    ("text task: renders alone forget realism",    "table3", "KD_I", "Realiz3D", "syn only"),
    ("... and mixing in real data only softens it", "table3", "KD_I", "Realiz3D", "syn + real"),
)


def difference_noise(rows, what, a, b):
    """Standard deviation that the noise between seeds gives the difference of two rows' means; None: no two seeds."""
    noise = seed_noise(rows, what)
    return noise and float(noise * np.sqrt(1 / len(rows[a]["toy"]) + 1 / len(rows[b]["toy"])))


def findings(args):
    """Prints each of the paper's claims with the toy's numbers, the noise between seeds and a verdict: confirmed where
    the difference has the right sign and exceeds twice its noise. Table 3 may be missing."""
    tables = {}
    for name in ("table1", "table2", "table3"):
        path = f"{args.results}/{name}.json"
        if os.path.isfile(path):
            tables[name] = read_json(path)["rows"]
        elif name != "table3":
            raise FileNotFoundError(f"no {path} yet: python evaluate.py {name} makes it")
    lines = ["| the paper's finding | measured | should be less | should be more | noise of the difference | verdict |",
             "|---|---|---|---|---|---|"]
    for claim, name, what, low, high in (finding for finding in FINDINGS if finding[1] in tables):
        rows, digits = tables[name], COLUMNS[what]
        a, b, noise = mean(rows[low], what), mean(rows[high], what), seed_noise(rows, what)
        if a is None or b is None or noise is None:
            raise ValueError(f"{name} lacks '{low}', '{high}' or a row of two seeds: run python evaluate.py {name}, "
                             "and again with --seed 1 (and --rows for some)")
        noise = difference_noise(rows, what, low, high)
        verdict = "confirmed" if b - a > 2 * noise else "not confirmed" if b - a < -2 * noise else "within the noise"
        lines.append(f"| {claim} | {what} | {low}: {a:.{digits}f} | {high}: {b:.{digits}f} | {noise:.{digits}f} | "
                     f"{verdict} |")
    for name in sorted({"table1", "table3"} & set(tables)):
        rows, ahead = trained_rows(tables[name]), []
        if "Realiz3D" not in rows:
            raise ValueError(f"{name} lacks 'Realiz3D': python evaluate.py {name} goes on with it")
        for label in rows:
            gain = [sign * (mean(rows[label], what) - mean(rows["Realiz3D"], what)) / (
                difference_noise(rows, what, label, "Realiz3D") or 1e-9) for what, sign in (("KD_I", -1), ("psnr", 1))]
            ahead += [label] if min(gain) > 2 else [f"{label} (within the noise)"] if min(gain) > 0 else []
        verdict = "not confirmed" if set(ahead) & set(rows) else "within the noise" if ahead else "confirmed"
        lines.append(f"| no baseline beats Realiz3D on both axes ({name}) | KD_I, psnr | | "
                     f"{', '.join(ahead) or 'none'} | | {verdict} |")
    print("\n".join(lines))
    write_text(f"{args.results}/findings.md", "# The paper's findings on the toy (python evaluate.py findings)\n\n"
               + "\n".join(lines) + "\n")


def settings(args):
    """The flags that decide the numbers, for a results file; its seeds stand beside them."""
    ignored = ("run", "command", "seed", "rows", "threads", "folder", "results", "out")
    return {key: value for key, value in vars(args).items() if key not in ignored}


def commit():
    """The repository's commit, None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def write_json(path, value):
    """Writes a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path, text):
    """Writes text, as `sample.write_bytes`."""
    sample.write_bytes(path, text.encode())


def print_oracle(args):
    """Prints what `oracle` measures, each number beside its target."""
    print(f"{'':32}{'photos':>10}{'renders':>10}  target    ({args.num} held-out objects, four views)")
    for name, (photos, renders, target) in oracle(args.folder, args.num).items():
        print(f"{name:32}{photos:10.3f}{renders:10.3f}  {target}")


FLAGS = {                                                               # that several commands share
    "num": dict(type=int, default=40, help="objects (default %(default)s)"),
    "model": dict(help="realiz3d checkpoint (default: the run folder's, else the shipped one)"),
    "num_steps": dict(type=int, default=50, help="DDIM steps (default %(default)s)"),
    "cfg_scale": dict(type=float, default=sample.CFG_SCALE, help="guidance on the text, 1 = none (default "
                      "%(default)s)"),
    "seed": dict(type=int, default=0, help="decides the noise (tables: and the training; default 0)"),
    "threads": dict(type=int, help="CPU threads (default: PyTorch's choice)"),
    "folder": dict(default=FOLDER, help="where the toy's sets and the feature net are kept (default %(default)s)"),
    "results": dict(default="results", help="where the tables and their pictures are (default %(default)s)"),
    "lpips": dict(metavar="FILE", help="state_dict of lpips.LPIPS(net='alex'), to measure LPIPS too"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, what, *flags):
        sub = commands.add_parser(name, help=what, description=run.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        for flag in flags:
            sub.add_argument(f"--{flag}", **FLAGS[flag])
        return sub
    command("oracle", print_oracle, "perfect photos and renders through every toy measure", "num",
            "folder").set_defaults(num=64)
    sampling = ("num", "num_steps", "cfg_scale", "seed", "threads")
    sub = command("toy", toy, "control, domain and leakage of the trained models", "model", *sampling, "folder")
    sub.add_argument("--syn_only", help="checkpoint of python train_stage2.py --method syn_only (default likewise)")
    sub.add_argument("--base", help="base model (default likewise)")
    sub.add_argument("--out", default="runs/toy/evaluate.png", help="picture to write; its numbers: .json")
    sub = command("select", select, "how far to shift: B_max and t_max of a model, kept where sample.py finds them",
                  "model", *sampling, "folder")
    sub.set_defaults(num=20)
    sub.add_argument("--max_loss", type=float, default=0.25, help="share by which the kernel distance may grow "
                     "(default %(default)s)")
    sub = command("dial", dial, "mix the two domains: e(s) from render to photograph", "model", *sampling, "folder")
    sub.set_defaults(num=20)
    sub.add_argument("--out", default="runs/toy/dial.png", help="picture to write; its numbers: .json")
    for name, (task, rows) in TABLES.items():
        sub = command(name, table, f"the paper's Table {name[-1]} on the toy world ({len(rows)} rows, task {task}): "
                      "trains what is missing, about eight minutes a model; run again to go on", *sampling, "results",
                      "lpips")
        sub.add_argument("--folder", default="runs/toy", help="run folder: sets, models, samples")
        sub.add_argument("--steps", type=int, default=1200, help="training steps of every model (default 1200)")
        sub.add_argument("--rows", nargs="+", metavar="LABEL", help="only these rows (default all)")
        sub.add_argument("--train_flags", default="--dtype bfloat16 --compile", help="more flags for train_stage2.py, "
                         "as --train_flags='%(default)s', the default")
        sub.set_defaults(num_steps=25)
    command("findings", findings, "the paper's claims, confirmed by the tables or not", "results")
    sub = command("folders", folders, "measure a folder of images against another", "lpips", "threads", "folder")
    sub.add_argument("ours", help="folder of images to measure")
    sub.add_argument("theirs", help="folder of images to measure them against")
    sub.add_argument("--pattern", default="*", help="which files, as color_*")
    sub.add_argument("--inception", metavar="FILE", help="TorchScript Inception, for FID and KID (without: the toy's "
                     "own network, FD and KD)")
    sub.add_argument("--clip", metavar="DIR", help="CLIP model as Hugging Face has it, for the caption score")
    sub.add_argument("--positions", metavar="DIR", help="position maps DIR/ID/position_000.npy, .. of the views "
                     "OURS/ID/color_000.png, .., for 3D consistency")
    sub.add_argument("--azimuths", type=float, nargs="+", default=data.AZIMUTHS, help="of the views, degrees")
    sub.add_argument("--elevation", type=float, default=data.ELEVATION, help="of the views, degrees")
    sub.add_argument("--extent", type=float, default=data.EXTENT, help="half the width of a view in the maps' units")
    sub = command("curate", curate, "the photographs of FID_I: those of each class that CLIP likes best", "threads")
    sub.add_argument("source", metavar="FOLDER", help="folder of images per class: FOLDER/coffee_mug/..")
    sub.add_argument("out", metavar="OUT", help="folder to write to: OUT/coffee_mug/NAME.png, OUT.json, OUT.png")
    sub.add_argument("--clip", metavar="DIR", required=True, help="CLIP model as Hugging Face has it")
    sub.add_argument("--k", type=int, default=4, help="images to take of each class (default 4)")
    sub.add_argument("--masks", metavar="DIR", help="grey masks DIR/coffee_mug/NAME.png of the images' own size, 255 = "
                     "object: what is around it becomes white")
    sub.add_argument("--prompt", default="a photo of a {}", help="caption that images are scored "
                     "against, {} being the class (default '%(default)s')")
    sub.add_argument("--size", type=int, metavar="N", help="centre-crop and resize to N x N (default: as they are)")
    sub = command("benchmark", benchmark, "time FID against scipy.linalg.sqrtm")
    sub.add_argument("--num", type=int, default=1000, help="images a set")
    sub.add_argument("--width", type=int, default=2048, help="features an image")
    sub.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
