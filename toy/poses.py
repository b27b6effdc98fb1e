"""Pairs of views of an asset: what a view-conditioned model is trained on (CAD, related/cad.py), from the toy world."""
import torch
import torch.nn.functional as F

from data import SEEDS, build_set
from support.pictures import to_pixels, to_uint8
from toy.render import Look, render
from toy.world import exaggerated, take, tokenize, uniforms

BAND = (10, 30)         # elevations of all poses, degrees: about 20, from where all photographs of the base model are
VIEWS_EACH = 8                          # of an asset in `pose_set`


def pose_numbers(azimuth, *elevations):
    """A pose as a network takes it, (N, 3) or (N, 4): sine and cosine of the azimuth, and one elevation or two, each in
    [-1, 1] over BAND. Degrees, (N,) each."""
    turn, middle = torch.deg2rad(azimuth), sum(BAND) / 2
    heights = [(elevation - middle) / (BAND[1] - middle) for elevation in elevations]
    return torch.stack([turn.sin(), turn.cos(), *heights], dim=1)


def view_control(reference, pose):
    """Reference images in [-1, 1] (N, 3, H, W) and poses (N, 4), `pose_numbers` of the azimuth relative to the
    reference's and both elevations -> what a set keeps for the control channels, float16 (N, 1, 7, H, W): the
    reference, and the pose in each pixel."""
    planes = pose[:, :, None, None].expand(-1, -1, *reference.shape[2:])
    return torch.cat([reference, planes], dim=1)[:, None].half()


def pose_set(num, seed=SEEDS["synthetic"], size=32, folder="runs/toy/sets", device="cpu"):
    """VIEWS_EACH renders of each of num assets from poses in BAND -> image uint8 (N, 1, 3, H, W), control float16
    (N, 1, 7, H, W), see `view_control`, with a view of the asset from the front as the reference, text (N, L): no
    words. (Of references from anywhere a network learns how far it is turned, but not to which side: docs/cad.md.)"""
    def draw(assets, first):
        n, each = len(assets.category), VIEWS_EACH
        repeated = take(exaggerated(assets), torch.arange(n).repeat_interleave(1 + each))
        u = uniforms(n, seed + 4000, 1 + 2 * each, first).float()
        azimuth = 360 * F.pad(u[:, 1:1 + each], (1, 0))                 # of the reference 0; (n, 1 + each)
        elevation = BAND[0] + (BAND[1] - BAND[0]) * torch.cat([u[:, :1], u[:, 1 + each:]], dim=1)
        views = render(repeated, Look("render"), azimuth.reshape(-1, 1), size, False, elevation.flatten(), device)
        image = to_uint8(2 * views.rgb - 1).unflatten(0, (n, 1 + each))                             # (n, 9, 1, 3, H, W)
        reference = to_pixels(image[:, 0, 0]).repeat_interleave(each, dim=0)
        low = elevation[:, 0].repeat_interleave(each)
        pose = pose_numbers(azimuth[:, 1:].flatten(), elevation[:, 1:].flatten(), low)
        return dict(image=image[:, 1:].flatten(0, 1), control=view_control(reference, pose),
                    text=tokenize([""]).expand(n * each, -1).clone())
    return build_set("turns", num, seed, size, folder, draw)
