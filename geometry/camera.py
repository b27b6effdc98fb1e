"""
The one camera: four orthographic views of an object, as the benchmark asks for them (Sec. 5).

Frame of the object (and of the world): y up, z to the front; the camera of azimuth 0 stands at +z and sees the front
with x to the right of the image; the camera of azimuth 90 stands at +x and sees the side that was on the right.
Everything lies in the cube [-0.5, 0.5]^3; an image spans [-EXTENT, EXTENT]; pixel (row i, column j) is centred at
(j + 0.5, i + 0.5). Images of several views are (N, V, C, H, W).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

VIEWS = ("front", "right", "back", "left")
AZIMUTHS = (0, 90, 180, 270)            # degrees, one per word in VIEWS
ELEVATION = 20                          # degrees
EXTENT = 0.55                           # half the width of an image in the object's units


class Views(NamedTuple):
    """N objects drawn in V views, with their maps."""
    rgb: torch.Tensor                   # (N, V, 3, H, W) in [0, 1]; None where there are no colours
    mask: torch.Tensor                  # (N, V, 1, H, W) share of the pixel that the object covers, in [0, 1]
    normal: torch.Tensor                # (N, V, 3, H, W) unit, object's frame, 0 off the object, at the pixel centre
    position: torch.Tensor              # (N, V, 3, H, W) in [-0.5, 0.5], likewise; both None where not drawn


def camera(azimuth, elevation=ELEVATION):
    """Degrees, numbers or tensors (...,) -> right, up, forward: three unit axes (..., 3) in the object's frame."""
    a = torch.deg2rad(torch.as_tensor(azimuth, dtype=torch.float32))
    if torch.is_tensor(elevation):
        e = torch.deg2rad(elevation)
        se, ce = e.sin(), e.cos()
    else:
        se, ce = math.sin(math.radians(elevation)), math.cos(math.radians(elevation))
    sin, cos = a.sin(), a.cos()
    right = torch.stack([cos, 0 * a, -sin], dim=-1)
    up = torch.stack([-se * sin, ce + 0 * a, -se * cos], dim=-1)
    return right, up, torch.stack([-ce * sin, -se + 0 * a, -ce * cos], dim=-1)


def project(position, azimuth, elevation=ELEVATION, size=None):
    """Positions (..., 3, H, W) seen from azimuth (...,) -> column, row in pixels of an image of `size` (default W), and
    depth, each (..., H, W)."""
    axes = [axis.to(position)[..., None, None] for axis in camera(azimuth, elevation)]
    x, y, depth = [(axis * position).sum(dim=-3) for axis in axes]
    size = size or position.shape[-1]
    return (x / EXTENT + 1) * size / 2, (1 - y / EXTENT) * size / 2, depth


def bilinear(maps, column, row):
    """Bilinear values of maps (B, C, H, W) at pixel coordinates (B, H', W'), centres at + 0.5 -> (B, C, H', W')."""
    height, width = maps.shape[-2:]
    grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], dim=-1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
