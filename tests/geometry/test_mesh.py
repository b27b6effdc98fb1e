"""Meshing and the rasteriser, against brute force and the analytic renderer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shapes import box, one_asset, volume

import toy.render
from geometry.camera import EXTENT, camera
from geometry.mesh import Mesh, corner_normals, mesh_views, rasterize, rasterize_view, surface_mesh
from toy.render import Look, asset_mesh, render


def test_rasterizer_by_brute_force():
    """Random triangles that pierce each other and leave the image, one pixel and one triangle at a time."""
    generator = torch.Generator().manual_seed(0)
    mesh = Mesh(torch.rand(36, 3, generator=generator) * 1.4 - 0.7, torch.arange(36).view(12, 3))
    size, turn = 20, 30
    face, place = rasterize(mesh, size, (turn,))
    right, up, forward = (axis.double().numpy() for axis in camera(turn))
    p = mesh.vertices.double().numpy()
    x, y, z = (p @ right / EXTENT + 1) * size / 2, (1 - p @ up / EXTENT) * size / 2, p @ forward
    for i in range(size):
        for j in range(size):
            best, depth = -1, np.inf
            for f, (a, b, c) in enumerate(mesh.faces.tolist()):
                matrix = np.array([[x[a], x[b], x[c]], [y[a], y[b], y[c]], [1, 1, 1]])
                weights = np.linalg.solve(matrix, [j + 0.5, i + 0.5, 1])
                if weights.min() >= 0 and weights @ z[[a, b, c]] < depth:
                    best, depth, at = f, weights @ z[[a, b, c]], weights
            assert face[0, i, j] == best
            if best >= 0:
                assert np.allclose(place[0, i, j], at, atol=1e-6)
    small = rasterize_view(mesh.vertices[mesh.faces].double(), size, *camera(turn), chunk=50)  # many chunks
    assert torch.equal(small[0], face[0]) and torch.equal(small[1], place[0])


@pytest.mark.parametrize("category", ["ball", "cone", "cube", "chair", "mug"])
def test_mesh_maps_are_those_of_the_analytic_renderer(category, monkeypatch):
    asset = one_asset(category)
    got, trace = mesh_views(asset_mesh(asset, 128), 128), toy.render.trace
    # as it draws, the tracer also counts rays that pass within 0.0015 of the surface, a fifth of a pixel: not here
    monkeypatch.setattr(toy.render, "trace", lambda *args: trace(*args, steps=400, tolerance=1e-5))
    truth = render(asset, Look("render"), size=128)
    there, found = ((views.normal != 0).any(dim=2) for views in (truth, got))
    assert (there & found).sum() >= 0.99 * (there | found).sum()
    # inner pixels: away from outline and edges, where the 25 pixels around have one normal within 20 degrees
    around = F.unfold(truth.normal[0], 5, padding=2).view(4, 3, 25, 128, 128)
    same = (around * around[:, :, 12:13]).sum(dim=1).amin(dim=1) > np.cos(np.radians(20))
    inner = same & found[0]
    cosine = (truth.normal[0] * got.normal[0]).sum(dim=1)[inner]
    assert inner.sum() > 300 and (cosine > np.cos(np.radians(2))).float().mean() >= 0.99
    assert (truth.position - got.position)[0].norm(dim=1)[inner].max() < 0.01
    assert (truth.mask - got.mask).abs().mean() < 0.02


def test_a_last_triangle_seen_edge_on_leaves_no_nan():
    """Its plane is not finite, and -1, no triangle, would look it up."""
    crate = box(0.3, 0.2, 0.1)
    mesh = Mesh(crate.vertices, crate.faces[[*range(4, 12), *range(4)]])  # the side at -x comes last
    views = mesh_views(mesh, 32)
    assert all(maps.isfinite().all() for maps in (views.position, views.normal, views.mask))


def test_open_meshes_show_both_sides_with_normals_to_the_camera():
    square = Mesh(torch.tensor([[-0.3, -0.3, 0], [0.3, -0.3, 0], [0.3, 0.3, 0], [-0.3, 0.3, 0]]),
                  torch.tensor([[0, 1, 2], [0, 2, 3]]))
    views = mesh_views(square, 32)
    for v, sign in ((0, 1), (2, -1)):
        inside = views.mask[0, v, 0] == 1
        assert inside.sum() > 250 and torch.allclose(views.normal[0, v, 2][inside], torch.tensor(float(sign)))


# ---- meshing


def test_mesh_of_a_sphere_has_its_volume_and_of_a_box_its_edges():
    line = torch.linspace(-0.5, 0.5, 41)
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    ball = surface_mesh((x * x + y * y + z * z).sqrt() - 0.4, 0.5, lambda p: F.normalize(p, dim=0))
    assert volume(ball) == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.01)
    sides = torch.stack([x.abs() - 0.31, y.abs() - 0.22, z.abs() - 0.27])
    face = lambda p: F.one_hot((p.abs() - torch.tensor([[0.31], [0.22], [0.27]])).argmax(dim=0), 3).T * p.sign()
    mesh = surface_mesh(sides.amax(dim=0), 0.5, face)
    assert torch.allclose(mesh.vertices.amax(dim=0), torch.tensor([0.31, 0.22, 0.27]), atol=2e-3)
    assert volume(mesh) == pytest.approx(8 * 0.31 * 0.22 * 0.27, rel=0.01)  # blunt edges would lose several percent
    with pytest.raises(ValueError, match="nothing lies inside"):
        surface_mesh(torch.ones(5, 5, 5))


def test_normals_are_smooth_on_a_ball_and_sharp_on_a_box():
    ball = asset_mesh(one_asset("ball"), 48)
    normal, point = corner_normals(ball), F.normalize(ball.vertices[ball.faces], dim=2)
    assert (normal * point).sum(dim=2).min() > 0.99
    cube = box(0.3, 0.2, 0.1)
    normal = corner_normals(cube)
    assert torch.allclose(normal, normal[:, :1].expand(-1, 3, -1)) and (normal.abs().amax(dim=2) > 0.999).all()
    assert ((normal[:, 0] * cube.vertices[cube.faces].mean(dim=1)).sum(dim=1) > 0).all()  # outwards
