"""The judge of the toy world: a small network that knows photographs from renders, trained here on perfect examples.

It stands where the paper has Inception and CLIP (Sec. 5): distances are taken on its features, its heads say how surely
an image shows what its caption names, and whether it looks like a photograph.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from support.files import cached
from toy.render import Look, render
from toy.world import CATEGORIES, COLORS, MATERIALS, WORLD_VERSION, sample_assets


def conv_stage(inputs, outputs):
    """Convolution, normalisation, ReLU, half the size."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


class FeatureNet(nn.Module):
    """Reads category, colour, material and domain (0 render, 1 photo) off images (N, 3, H, W) in [0, 1]."""
    heads = dict(category=len(CATEGORIES), color=len(COLORS), material=len(MATERIALS), domain=2)

    def __init__(self, width=64):
        super().__init__()
        self.body = nn.Sequential(conv_stage(3, 32), conv_stage(32, 64), conv_stage(64, 64),
                                  nn.Conv2d(64, width, 3, padding=1))
        self.head = nn.Linear(width, sum(self.heads.values()))

    def pool(self, images):
        maps = self.body(images * 2 - 1)                                                            # (N, width, h, w)
        pooled = maps.relu().mean(dim=(2, 3)) + maps.amax(dim=(2, 3))                               # (N, width)
        return pooled * pooled.square().mean(dim=1, keepdim=True).add(1e-6).rsqrt()     # scale tells nothing

    def forward(self, images):
        """-> dict of logits (N, number of classes), one per head."""
        logits = self.head(self.pool(images)).split(list(self.heads.values()), dim=1)
        return dict(zip(self.heads, logits))

    @torch.no_grad()
    def features(self, images, batch=512):
        """(N, 3, H, W) in [0, 1] -> (N, F) float32."""
        return torch.cat([self.pool(part) for part in images.split(batch)])

    @torch.no_grad()
    def photo_probability(self, images):
        """(N, 3, H, W) in [0, 1] -> (N,): how surely each is a photo and not a render."""
        return self.head(self.features(images))[:, -2:].softmax(dim=1)[:, 1]


def disturb(images, generator):
    """Shift, blur, gain and noise, the same kinds in both domains, so that neither grain nor sharpness tells them.

    images: (N, 3, H, W) in [0, 1] before white; returns the same.
    """
    n, size = len(images), images.shape[-1]

    def draw(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2), value=1.)[..., down:down + size, right:right + size]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + draw(-.5, .4).clamp(min=0) * (blurred - images)
    noise = torch.randn(images.shape, generator=generator) * draw(-.02, .04).clamp(min=0)
    return (1 - (1 - images) * draw(.9, 1.1) + noise).clamp(0, 1)


def domain_examples(num, size, seed, backgrounds):
    """num objects as renders and then as photographs, one view each, before these backgrounds in turn.

    Returns images (2 num, 3, size, size) in [0, 1] and labels (2 num, 4): category, colour, material, domain; -100,
    which the loss leaves out, for a render's material, which it does not show.
    """
    assets = sample_assets(num, seed)
    azimuth = 90. * torch.arange(num)[:, None].remainder(4)
    behind = [backgrounds[k // 4 % len(backgrounds)] for k in range(num)]           # the azimuth turns with k % 4
    images = torch.cat([render(assets, Look(style, behind, seed), azimuth, size, geometry=False).rgb[:, 0]
                        for style in ("render", "photo")])
    domain = torch.arange(2).repeat_interleave(num)
    labels = torch.stack([*(field.repeat(2) for field in assets[:3]), domain], dim=1)
    labels[:num, 2] = -100
    return images, labels


def fit_feature_net(images, labels, steps, seed):
    """A FeatureNet trained on images (N, 3, H, W) with labels (N, 4), see `domain_examples`; a function of seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="feature net", leave=False):
        pick = torch.randint(0, len(images), (96,), generator=generator)
        logits = net(disturb(images[pick], generator))
        loss = sum(F.cross_entropy(z, labels[pick, k]) for k, z in enumerate(logits.values()))
        loss = loss + 2 * F.cross_entropy(logits["domain"], labels[pick, 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def train_feature_net(folder="runs/toy/sets", num=3000, steps=1500, size=32, seed=11, backgrounds=("white",)):
    """FeatureNet trained on photos and renders of num objects before these backgrounds (about two minutes on one core),
    kept in folder. It is ready to judge: in eval mode, without gradients."""
    key = dict(kind="feature net", num=num, steps=steps, size=size, seed=seed, net=str(FeatureNet()),
               version=WORLD_VERSION)
    name = f"features_{num}_{steps}_{size}_{seed}"
    if len(backgrounds) > 1:
        key, name = key | dict(each_four=list(backgrounds)), f"{name}_backgrounds"

    def build():
        return fit_feature_net(*domain_examples(num, size, seed, backgrounds), steps, seed).state_dict()
    net, threads = FeatureNet(), torch.get_num_threads()
    torch.set_num_threads(1)                    # more would round otherwise, and train a network of other verdicts
    try:
        net.load_state_dict(cached(Path(folder) / f"{name}.safetensors", key, build))
    finally:
        torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)


def world_features(net, folder="runs/toy/sets", device="cpu"):
    """FeatureNet's features (1000, F) of the photographs that realism is measured against (FID_I's place)."""
    return net.features(data.photo_set(1000, folder=folder, device=device)["image"][:, 0] / 255)
