"""The judges of the toy world: small networks trained here on perfect photographs and renders.

    python -m toy.judge                             # makes those in weights/judges, under an hour on one core

FeatureNet stands where the paper has Inception and CLIP (Sec. 5): distances are taken on its features, its heads say
how surely an image shows what its caption names, and whether it looks like a photograph. A second one of another seed
says how far to trust that verdict. NormalNet reads the surface off an image of either domain: whether control holds,
whatever the image looks like.
"""
import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from geometry.camera import AZIMUTHS, ELEVATION, camera
from support.files import cached, up_to_date
from support.launch import run_cli
from toy.render import Look, render
from toy.scenes import frames
from toy.world import (BACKGROUNDS, CATEGORIES, COLORS, MATERIALS, WORLD_VERSION, exaggerated, sample_assets,
                       uniforms)

SECOND = 13                             # seed of the second judge
SHIPPED = Path(__file__).parent.parent / "weights" / "judges"


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


def disturb(images, generator, shift=True):
    """Shift, blur, gain and noise, the same kinds in both domains, so that neither grain nor sharpness tells them.

    images: (N, 3, H, W) in [0, 1]; returns the same; what moves leaves white behind. shift: whether they may move.
    """
    n, size = len(images), images.shape[-1]

    def draw(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)
    if shift:
        down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
        images = F.pad(images, (2, 2, 2, 2), value=1.)[..., down:down + size, right:right + size]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + draw(-.5, .4).clamp(min=0) * (blurred - images)
    noise = torch.randn(images.shape, generator=generator) * draw(-.02, .04).clamp(min=0)
    return (1 - (1 - images) * draw(.9, 1.1) + noise).clamp(0, 1)


def domain_examples(num, size, seed, backgrounds, in_scenes=False):
    """num objects as renders and then as photographs, one view each, before these backgrounds in turn; in_scenes: as
    assets are put into scenes (toy/scenes.py), smaller, off the centre and from anywhere.

    Returns images (2 num, 3, size, size) in [0, 1] and labels (2 num, 4): category, colour, material, domain.
    """
    assets = sample_assets(num, seed)
    azimuth, elevation, frame = 90. * torch.arange(num)[:, None].remainder(4), ELEVATION, None
    if in_scenes:
        u = uniforms(num, seed + 1000, 5).float()
        assets, azimuth, elevation, frame = exaggerated(assets), 360 * u[:, :1], 45 * u[:, 1], frames(u[:, 2:])
    behind = [backgrounds[k // 4 % len(backgrounds)] for k in range(num)]           # the azimuth turns with k % 4
    images = torch.cat([render(assets, Look(style, behind, seed, frame), azimuth, size, False, elevation).rgb[:, 0]
                        for style in ("render", "photo")])
    domain = torch.arange(2).repeat_interleave(num)
    return images, torch.stack([*(field.repeat(2) for field in assets[:3]), domain], dim=1)


def fit_feature_net(images, labels, steps, seed):
    """A FeatureNet trained on images (N, 3, H, W) with labels (N, 4), see `domain_examples`; a function of seed."""
    def loss_of(net, generator):
        pick = torch.randint(0, len(images), (96,), generator=generator)
        logits = net(disturb(images[pick], generator))
        loss = sum(F.cross_entropy(z, labels[pick, k]) for k, z in enumerate(logits.values()))
        return loss + 2 * F.cross_entropy(logits["domain"], labels[pick, 3])
    return fit(FeatureNet, loss_of, steps, seed)


def fit(new_net, loss_of, steps, seed):
    """A network new_net() trained to make loss_of(network, generator) of random examples small; a function of seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = new_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc=new_net.__name__, leave=False):
        loss = loss_of(net, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def train_feature_net(folder="runs/toy/sets", num=8000, steps=5000, size=32, seed=11, world="white"):
    """FeatureNet trained on photos and renders of num objects, shipped, or else kept in folder (some twenty minutes on
    one core). It is ready to judge: in eval mode, without gradients. world: where the objects are: "white", before it;
    "backgrounds", before any; "scenes", see `domain_examples`, before any."""
    name = f"features_{num}_{steps}_{size}_{seed}" + (f"_{world}" if world != "white" else "")
    backgrounds = BACKGROUNDS if world != "white" else ("white",)

    def build():
        return fit_feature_net(*domain_examples(num, size, seed, backgrounds, world == "scenes"), steps, seed)
    return kept_net(folder, name, FeatureNet(), build)


def kept_net(folder, name, net, build):
    """build()'s weights in the network `net`, ready to judge: those shipped under this name, else trained on one thread
    and kept in folder."""
    shapes = {part: list(weight.shape) for part, weight in net.state_dict().items()}
    key = dict(net=shapes, name=name, version=WORLD_VERSION)        # not str(net), in which versions of torch differ:
                                                                    # raise the version with what shapes do not show
    shipped, path = SHIPPED / f"{name}.safetensors", Path(folder) / f"{name}.safetensors"
    path = shipped if up_to_date(shipped, key) else path
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # more would round otherwise, and train a network of other verdicts
    try:
        net.load_state_dict(cached(path, key, lambda: build().state_dict()))
    finally:
        torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The surface, read off an image


def conv(inputs, outputs):
    """Convolution, normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Reads maps (N, outputs, H, W) off images (N, 3, H, W) in [0, 1], at three scales."""

    def __init__(self, outputs, width=16):
        super().__init__()
        w = width
        self.down = nn.ModuleList(nn.Sequential(conv(a, b), conv(b, b))
                                  for a, b in ((3, w), (w, 2 * w), (2 * w, 4 * w)))
        self.up = nn.ModuleList([conv(4 * w + 2 * w, 2 * w), conv(2 * w + w, w)])
        self.head = nn.Conv2d(w, outputs, 1)

    def forward(self, images):
        x, scales = images * 2 - 1, []
        for k, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if k else x)
            scales.append(x)
        for stage, skip in zip(self.up, (scales[1], scales[0])):
            x = stage(torch.cat([F.interpolate(x, skip.shape[-2:]), skip], dim=1))
        return self.head(x)


class NormalNet(UNet):
    """Reads unit normals in the camera's frame (right, up, towards it) off images: (N, 3, H, W) in [0, 1] -> the same
    shape."""

    def __init__(self):
        super().__init__(outputs=3)

    def forward(self, images):
        return F.normalize(super().forward(images), dim=1)

    @torch.no_grad()
    def angular_error(self, images, normal, azimuth=AZIMUTHS):
        """Mean angle in degrees, over each object's surface, between the normals that images (B, V, 3, H, W) show and
        those of the object's frame that the control asked for, normal (B, V, 3, H, W), 0 off the object: (B,)."""
        turned = in_camera(normal, torch.tensor(azimuth).expand(len(images), -1))
        shown = torch.cat([self(few) for few in images.flatten(0, 1).split(256)]).view_as(images)
        angle = torch.rad2deg((shown * turned).sum(dim=2).clamp(-1, 1).acos())                      # (B, V, H, W)
        surface = normal.square().sum(dim=2) > 0.5
        return (angle * surface).flatten(1).sum(1) / surface.flatten(1).sum(1).clamp(min=1)


def in_camera(normal, azimuth, elevation=ELEVATION):
    """Normals (B, V, 3, H, W) of the object's frame in that of cameras at azimuth (B, V) degrees: right, up, to it.
    elevation: degrees, one number or (B, V)."""
    right, up, forward = camera(azimuth, elevation)
    axes = torch.stack([right, up, -forward], dim=-2).to(normal)                                    # (B, V, 3, 3)
    return torch.einsum("bvij,bvjhw->bvihw", axes, normal)


def train_normal_net(folder="runs/toy/sets", num=8000, steps=4000, size=32, seed=12):
    """NormalNet trained on photos and renders of num objects from all sides, as `train_feature_net`."""
    def build():
        assets, generator = sample_assets(num, seed), torch.Generator().manual_seed(seed)
        azimuth = 360 * torch.rand(num, 1, generator=generator)
        photo, plain = (render(assets, Look(style, seed=seed), azimuth, size) for style in ("photo", "render"))
        images, normal = torch.stack([plain.rgb, photo.rgb])[:, :, 0], in_camera(photo.normal, azimuth)[:, 0]

        def loss_of(shown, pick):
            return -(shown * normal[pick]).sum(dim=1).mean()            # the cosine of the angle; 0 off the object
        return fit_surface_net(NormalNet, images, loss_of, steps, seed)
    return kept_net(folder, f"normals_{num}_{steps}_{size}_{seed}", NormalNet(), build)


def fit_surface_net(new_net, images, loss_of, steps, seed):
    """A network new_net() trained on images (2, N, 3, H, W), renders and photos of the same N objects, to make
    loss_of(what it gives of some, their numbers) small; a function of seed."""
    def of_disturbed(net, generator):
        pick, domain = (torch.randint(0, n, (32,), generator=generator) for n in (images.shape[1], 2))
        return loss_of(net(disturb(images[domain, pick], generator, shift=False)), pick)
    return fit(new_net, of_disturbed, steps, seed)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


class Judges(NamedTuple):
    """What images are measured with (evaluate.measure)."""
    net: FeatureNet
    second: FeatureNet                  # of another seed
    normals: NormalNet
    photos: torch.Tensor                # (1000, F) features of photographs that no training sees (FID_I's place)


def read(images, labels, judges):
    """What the judges read off images (N, 3, H, W) in [0, 1] whose category, colour and material should be labels
    (N, 3): a dict of the share read right of each; caption, how surely, over all three; photo and photo_2, the share
    that each of the two judges calls photographs."""
    with torch.no_grad():
        heads = judges.net(images)
    named, surely = dict(zip(("category", "color", "material"), labels.T)), []
    row = {name: (heads[name].argmax(1) == truth).double().mean().item() for name, truth in named.items()}
    for name, truth in named.items():
        surely.append(heads[name].softmax(1).gather(1, truth[:, None]))
    for name, net in (("photo", judges.net), ("photo_2", judges.second)):
        row[name] = (net.photo_probability(images) > 0.5).double().mean().item()
    return row | dict(caption=torch.cat(surely).mean().item())


def load_judges(folder="runs/toy/sets", device="cpu"):
    """The toy's Judges, trained first where they are missing (see `train_feature_net`)."""
    net = train_feature_net(folder)
    second, normals = train_feature_net(folder, seed=SECOND), train_normal_net(folder)
    return Judges(net, second, normals, world_features(net, folder, device))


def world_features(net, folder="runs/toy/sets", device="cpu"):
    """FeatureNet's features (1000, F) of the photographs that realism is measured against (FID_I's place)."""
    return net.features(data.photo_set(1000, folder=folder, device=device)["image"][:, 0] / 255)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    train_feature_net(SHIPPED)
    train_feature_net(SHIPPED, seed=SECOND)
    train_normal_net(SHIPPED)
    print(f"the judges are in {SHIPPED}")


if __name__ == "__main__":
    run_cli(main)
