"""
The tracer of the toy world: orthographic rays are sphere-traced to the surface of an object, given by its distance
function. The frame and the cameras are those of geometry/camera.py.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from geometry.camera import EXTENT, camera


class Rays(NamedTuple):
    """M rays on their way to an object."""
    pixel: torch.Tensor                 # (M,)   its place in the flattened (B, size, size) grid
    point: torch.Tensor                 # (3, M) where the ray is
    way: torch.Tensor                   # (3, M) unit vector
    shape: torch.Tensor                 # (3, M) proportions of the object that it looks at
    run: torch.Tensor                   # (M,)   how far it has come
    end: torch.Tensor                   # (M,)   where it leaves the cube

    def select(self, index):
        """The rays with the numbers `index` (K,), in that order."""
        return Rays(*(field[..., index] for field in self))

    def where(self, which):
        """The rays for which `which` (M,) is True."""
        return self.select(which.nonzero()[:, 0])

    def distance(self, shape_distance):
        """(M,) from each ray's point to its object."""
        return nearest(shape_distance(self.point.unbind(), *self.shape.unbind()))


class Hits(NamedTuple):
    """The M rays that hit, in the order of their pixels."""
    pixel: torch.Tensor                 # (M,)   place in the flattened (B, size, size) grid
    point: torch.Tensor                 # (3, M)
    normal: torch.Tensor                # (3, M) unit
    accent: torch.Tensor                # (M,)   bool: an accented part, not the body


class Cameras(NamedTuple):
    """From where B objects are seen, and where in the image they stand."""
    azimuth: torch.Tensor               # (B,)   degrees
    elevation: torch.Tensor | float     # (B,)   or one number, degrees
    frame: torch.Tensor | None = None   # (B, 3) middle x (to the right) and y (up) in [-1, 1], size; None: (0, 0, 1)


def trace(distance, shape, cameras, size, steps=64, tolerance=3e-4):
    """Sphere-trace size x size orthographic rays, one per pixel centre, for each of B Cameras -> Hits.

    distance(p, a, b, c) -> (body, accent or None); shape (B, 3): proportions.
    """
    rays, found = rays_into_the_cube(shape, cameras, size), []
    for _ in range(steps):
        step = rays.distance(distance)
        hit = step < tolerance
        step = step * ~hit                                          # a ray that hit stays, whenever it is taken out
        rays.point.addcmul_(rays.way, step)
        rays.run.add_(step)
        gone = hit | (rays.run > rays.end)
        if gone.sum() > 0.2 * len(gone):                            # go on with the rays that can still hit, alone
            found.append(rays.where(hit))
            rays = rays.where(~gone)
        if len(rays.pixel) == 0:
            break
    else:
        found.append(rays.where((rays.distance(distance) < 5 * tolerance) & (rays.run <= rays.end)))
    rays = Rays(*(torch.cat(field, dim=-1) for field in zip(*found)))
    rays = rays.select(rays.pixel.argsort())
    way, abc = rays.way, rays.shape
    p = rays.point + way * rays.distance(distance)
    normal = gradient(distance, p, abc)
    normal = normal - way * (normal * way).sum(dim=0).clamp(min=0)  # at an edge the difference may look away
    body, accent = distance(p.unbind(), *abc.unbind())
    accented = torch.zeros_like(body, dtype=torch.bool) if accent is None else accent < body
    return Hits(rays.pixel, p, F.normalize(normal, dim=0), accented)


def rays_into_the_cube(shape, cameras, size):
    """The Rays of `trace` that meet the cube, where they enter it."""
    device = shape.device
    right, up, forward = [axis.to(device) for axis in camera(cameras.azimuth, cameras.elevation)]   # (B, 3)
    s = ((torch.arange(size, device=device) + 0.5) / size * 2 - 1) * EXTENT
    across, down = s, s[:, None]
    if cameras.frame is not None:
        x, y, scale = cameras.frame.T[..., None, None, None]                                        # (B, 1, 1, 1) each
        across, down = (across - EXTENT * x) / scale, (down + EXTENT * y) / scale
    origin = right[:, :, None, None] * across - up[:, :, None, None] * down                          # (B, 3, S, S)
    way = forward.where(forward.abs() > 1e-6, torch.tensor(1e-6, device=device))[:, :, None, None]
    near = ((-0.5 * way.sign() - origin) / way).amax(dim=1).flatten()
    far = ((0.5 * way.sign() - origin) / way).amin(dim=1).flatten()
    pixel = (near < far).nonzero()[:, 0]
    view, near, far = pixel // size**2, near[pixel], far[pixel]
    way = forward.T[:, view]
    return Rays(pixel, origin.movedim(1, 0).reshape(3, -1)[:, pixel] + way * near, way, shape.T[:, view], near, far)


def nearest(parts):
    """Distance (M,) to an object from its distances to (body, accent or None)."""
    return parts[0] if parts[1] is None else torch.minimum(*parts)


def gradient(distance, p, abc, h=1e-3):
    """Unit gradient (3, M) by four differences at the corners of a tetrahedron."""
    corners = torch.tensor([[1., -1, -1, 1], [-1, -1, 1, 1], [-1, 1, -1, 1]], device=p.device)      # (3, 4)
    points = (p[:, None] + h * corners[:, :, None]).flatten(1)                                       # (3, 4 M)
    d = nearest(distance(points.unbind(), *abc.repeat(1, 4).unbind())).view(4, -1)
    return F.normalize(corners @ d, dim=0)
