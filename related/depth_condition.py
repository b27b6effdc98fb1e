"""Refinement under a depth condition (CAD, related/cad.py): the object keeps its shape, however strong the noise.

Where the paper has a ControlNet for depth and its photographic model beside it, Realiz3D's texturing model is both: it
follows normal and position maps, and in real mode it draws photographs. A small network reads those maps off each
sample, as a depth estimator does in the paper.
"""
import torch
import torch.nn.functional as F

from baselines.sdedit import denoised_again
from data import control_maps
from dit import T
from geometry.camera import Views, camera, project
from related.triplanes import rays
from toy.judge import UNet, fit_surface_net, in_camera, kept_net
from toy.poses import BAND
from toy.render import Look, render
from toy.world import exaggerated, sample_assets, tokenize


class SurfaceNet(UNet):
    """Reads the surface off images (N, 3, H, W) in [0, 1]: unit normals in the camera's frame (right, up, towards it)
    (N, 3, H, W), how far behind the plane through the middle it lies (N, 1, H, W), and whether it is there, positive
    where a pixel's centre shows it (N, 1, H, W)."""

    def __init__(self):
        super().__init__(outputs=5)

    def forward(self, images):
        normal, depth, there = super().forward(images).split([3, 1, 1], dim=1)
        return F.normalize(normal, dim=1), depth, there


def train_surface_net(folder="runs/toy/sets", num=4000, steps=4000, seed=14):
    """SurfaceNet trained on renders and photographs of num assets from poses in BAND, kept in folder."""
    def build():
        assets, generator = exaggerated(sample_assets(num, seed)), torch.Generator().manual_seed(seed)
        azimuth = 360 * torch.rand(num, 1, generator=generator)
        elevation = BAND[0] + (BAND[1] - BAND[0]) * torch.rand(num, generator=generator)
        plain, photo = (render(assets, Look(style, seed=seed), azimuth, elevation=elevation)
                        for style in ("render", "photo"))
        normal = in_camera(photo.normal, azimuth, elevation[:, None])[:, 0]                         # (N, 3, H, W)
        depth = project(photo.position, azimuth, elevation[:, None])[2]                             # (N, 1, H, W)
        there = (photo.normal[:, 0] != 0).any(dim=1, keepdim=True)

        def loss_of(shown, pick):
            cosine = (shown[0] * normal[pick]).sum(dim=1).mean()        # 0 off the object
            off = ((shown[1] - depth[pick]).abs() * there[pick]).mean()
            return 10 * off - cosine + F.binary_cross_entropy_with_logits(shown[2], there[pick].float())
        return fit_surface_net(SurfaceNet, torch.stack([plain.rgb, photo.rgb])[:, :, 0], loss_of, steps, seed)
    return kept_net(folder, f"surface_{num}_{steps}_{seed}", SurfaceNet(), build)


@torch.no_grad()
def read_control(net, images, azimuth, elevation):
    """What a SurfaceNet reads off images (N, 3, H, W) in [-1, 1], seen from azimuth, elevation (N,) degrees, as control
    maps (N, 1, 6, H, W), and whose of the four views each of them is, (N,).

    The texturing model knows cameras at 0, 90, 180 and 270 degrees alone: the maps are what the nearest of them would
    see if the object were turned by the rest. It also knows an elevation of 20 degrees alone; that is left as it is.
    """
    place = (azimuth / 90).round().long() % 4
    parts = [net((few + 1) / 2) for few in images.split(256)]
    normal, depth, there = (torch.cat(maps) for maps in zip(*parts))
    axes = camera(90.0 * place, elevation)                                                          # (N, 3) each
    axes = torch.stack([axes[0], axes[1], -axes[2]], dim=2)                                         # (N, 3, 3)
    origins, forward = rays(90.0 * place, elevation, images.shape[-1])
    position = origins.mT.unflatten(2, depth.shape[2:]) + depth * forward[:, :, None, None]         # (N, 3, H, W)
    mask = there[:, None] > 0                                                                       # (N, 1, 1, H, W)
    normal = torch.einsum("nij,njhw->nihw", axes, normal)[:, None] * mask
    return control_maps(Views(None, mask, normal, position[:, None].clamp(-0.5, 0.5))), place


def refine_by_depth(texturing, images, noise, maps, prompt, strength, sampling):
    """Images (N, 3, H, W) in [-1, 1] with noise like them, noised to `strength` of the steps and denoised by a
    texturing model of Realiz3D in real mode, under the maps that a SurfaceNet reads off them (`read_control`)."""
    control, place = [part.to(texturing.dit.positions.device) for part in maps]
    text, passes = tokenize([prompt]).expand(len(images), -1), 1 if sampling.cfg_scale == 1 else 2
    with texturing.dit.in_grid(place.repeat(passes)):                   # guidance doubles the batch
        return denoised_again(texturing, images, noise, text, strength * T, sampling, control=control)
