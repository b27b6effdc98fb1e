"""Shapes that several tests need: a box of triangles, an object of the toy world, a textured chair."""

from typing import NamedTuple

import torch

from geometry.camera import Views
from geometry.mesh import Mesh, mesh_views
from geometry.texture import texture_mesh
from toy.render import asset_mesh
from toy.world import CATEGORIES, sample_assets, take


def one_asset(category):
    """The first held-out object of a category."""
    assets = sample_assets(300, 3)
    return take(assets, (assets.category == CATEGORIES.index(category)).nonzero()[:1, 0])


def box(x, y, z):
    """Twelve triangles of a box with these half sides, counter-clockwise from outside."""
    corners = torch.tensor([[i, j, k] for i in (-x, x) for j in (-y, y) for k in (-z, z)])
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = torch.tensor([[q[0], q[i], q[i + 1]] for q in quads for i in (1, 2)])
    return Mesh(corners, faces)


def volume(mesh):
    """What a closed mesh holds; negative where its faces look inwards."""
    p = mesh.vertices[mesh.faces]
    return (p[:, 0] * torch.linalg.cross(p[:, 1], p[:, 2])).sum() / 6


class Textured(NamedTuple):
    """A mesh whose colour is a function of the point, seen in four views and textured from them."""
    mesh: Mesh
    views: Views
    images: torch.Tensor  # (4, 3, 64, 64)
    texture: torch.Tensor  # (512, 512, 3)
    uv: torch.Tensor
    covered: float


def painted(position):
    """The colour of a point."""
    return 0.5 + 0.8 * position


def textured_chair():
    mesh = asset_mesh(one_asset("chair"), 48)
    views = mesh_views(mesh, 64)
    images = torch.where((views.normal != 0).any(dim=2, keepdim=True), painted(views.position), torch.ones(()))[0]
    return Textured(mesh, views, images, *texture_mesh(mesh, images, 512))
