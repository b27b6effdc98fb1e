"""
From outlines to shapes: the largest shape that fits the silhouettes of an object in several views.

It stands in for what the paper lifts with a pretrained reconstruction network, for views that have no mesh (text to
multiview): `visual_hull` gives the maps that consistency is measured on, `hull_mesh` a mesh to texture.
"""
import torch
import torch.nn.functional as F

from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, camera
from geometry.mesh import surface_mesh


def silhouette(image, threshold=0.08):
    """Images (..., 3, H, W) in [0, 1] -> bool (..., 1, H, W): pixels that differ from the white background."""
    return (1 - image).amax(dim=-3, keepdim=True) > threshold


def carve(seen, size=64, azimuth=AZIMUTHS, elevation=ELEVATION):
    """The largest shape that fits the silhouettes seen (B, V, 1, H, W) bool, as a share of matter in each of size^3
    cells of the cube [-0.5, 0.5]^3: (B, 1, size, size, size) [x, y, z] in [0, 1], smoothed over 3 cells."""
    B, V = seen.shape[:2]
    line = (torch.arange(size) + 0.5) / size - 0.5
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).view(3, size, size * size)    # a tall "image"
    solid = torch.ones(B, 1, size, size * size)
    for v in range(V):
        right, up, _ = [axis.view(3, 1, 1) for axis in camera(azimuth[v], elevation)]
        place = torch.stack([(points * right).sum(0), -(points * up).sum(0)], -1) / EXTENT          # in [-1, 1]
        solid *= F.grid_sample(seen[:, v].float(), place.expand(B, -1, -1, -1), align_corners=False)
    return F.avg_pool3d(F.pad(solid.view(B, 1, size, size, size), (1,) * 6), 3, 1)


def hull_mesh(seen, size=64):
    """Mesh of the shape that `carve` finds for the silhouettes of one object, (V, 1, H, W) bool. Raises ValueError
    where no shape fits them."""
    solid = F.pad(carve(seen[None], size)[0, 0], (1,) * 6)              # nothing lies outside the cube
    return surface_mesh(0.5 - solid, 0.5 * (size + 1) / size)


def visual_hull(seen, size=64, azimuth=AZIMUTHS, elevation=ELEVATION, steps=192):
    """What the views see of the shape that `carve` finds in size^3 cells for the silhouettes seen (B, V, 1, H, W) bool.

    Marches each pixel's ray, `steps` points long, to the shape. Returns position, normal (B, V, 3, H, W) and mask
    (B, V, 1, H, W), 1 where the ray hits, each 0 elsewhere, as `evaluate.Surface` takes them.
    """
    B, V, _, H, W = seen.shape
    solid = carve(seen, size, azimuth, elevation)                                                   # (B, 1, x, y, z)
    slope = torch.stack(torch.gradient(solid[:, 0], dim=(1, 2, 3)), 1)                              # (B, 3, x, y, z)
    column, row = [((torch.arange(n) + 0.5) / n * 2 - 1) * EXTENT for n in (W, H)]
    depth = torch.linspace(-0.87, 0.87, steps)
    position, normal, mask = torch.zeros(B, V, 3, H, W), torch.zeros(B, V, 3, H, W), torch.zeros(B, V, 1, H, W)
    for v in range(V):
        right, up, forward = camera(azimuth[v], elevation)
        plane = column[None, :, None] * right - row[:, None, None] * up                             # (H, W, 3)
        ray = plane + depth[:, None, None, None] * forward                                          # (steps, H, W, 3)
        inside = torch.cat([trilinear(solid[b:b + 1], ray[None]) for b in range(B)])[:, 0]          # (B, steps, H, W)
        k = (inside > 0.5).float().argmax(1, keepdim=True).clamp(min=1)                             # first hit
        before, after = inside.gather(1, k - 1), inside.gather(1, k)
        s = depth[k] - (depth[1] - depth[0]) * ((after - 0.5) / (after - before).clamp(min=1e-6)).clamp(0, 1)
        p = plane + s[..., None] * forward                                                          # (B, 1, H, W, 3)
        hit = (after > 0.5).float()
        mask[:, v] = hit
        position[:, v] = p[:, 0].movedim(-1, 1) * hit
        normal[:, v] = -F.normalize(trilinear(slope, p)[:, :, 0], dim=1) * hit
    return position, normal, mask


def trilinear(volume, points):
    """Trilinear values of volume (B, C, x, y, z) over the cube [-0.5, 0.5]^3 at points (B, D, H, W, 3) ->
    (B, C, D, H, W)."""
    return F.grid_sample(volume, 2 * points.flip(-1), align_corners=False)
