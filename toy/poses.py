"""Pairs of views of an asset: what a view-conditioned model is trained on (CAD, related/cad.py), from the toy world."""
import torch

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
    reference's and both elevations -> what stands in the control channels, float16 (N, 1, 7, H, W): the reference, and
    the pose in each pixel."""
    planes = pose[:, :, None, None].expand(-1, -1, *reference.shape[2:])
    return torch.cat([reference, planes], dim=1)[:, None].half()


def pose_set(num, seed=SEEDS["synthetic"], size=32, folder="runs/toy/sets", device="cpu"):
    """VIEWS_EACH renders of each of num assets from poses in BAND -> image uint8 (N, 1, 3, H, W), control float16
    (N, 1, 7, H, W), see `view_control`, with another view of the asset as the reference, text (N, L): no words."""
    def draw(assets, first):
        n, each = len(assets.category), VIEWS_EACH
        repeated = take(exaggerated(assets), torch.arange(n).repeat_interleave(each))
        u = uniforms(n, seed + 4000, 2 * each, first).float()
        azimuth, elevation = 360 * u[:, :each], BAND[0] + (BAND[1] - BAND[0]) * u[:, each:]
        views = render(repeated, Look("render"), azimuth.reshape(-1, 1), size, False, elevation.flatten(), device)
        image = to_uint8(2 * views.rgb - 1).unflatten(0, (n, each))                                 # (n, 8, 1, 3, H, W)
        turn, low = azimuth - azimuth.roll(1, 1), elevation.roll(1, 1)
        pose = pose_numbers(turn.flatten(), elevation.flatten(), low.flatten())
        control = view_control(to_pixels(image.roll(1, 1)[:, :, 0].flatten(0, 1)), pose)
        return dict(image=image.flatten(0, 1), control=control, text=tokenize([""]).expand(n * each, -1).clone())
    return build_set("poses", num, seed, size, folder, draw)
