"""From outlines to shapes."""

import pytest
import torch
from shapes import one_asset

from evaluate import Surface, consistency
from geometry.camera import AZIMUTHS, camera, project
from geometry.hull import hull_mesh, silhouette, visual_hull
from geometry.mesh import mesh_views
from toy.render import Look, render
from toy.world import CATEGORIES, Assets, sample_assets


def test_hull_mesh_fits_the_silhouettes_it_was_carved_from():
    seen = render(one_asset("snowman"), Look("render")).mask[0] > 0.5
    again = mesh_views(hull_mesh(seen), 32).mask[0] > 0.5
    assert (seen & again).sum() / (seen | again).sum() > 0.95


def test_the_hull_of_a_sphere_lies_around_it_and_projects_back():
    """Four silhouettes of a ball: the hull holds the ball, touches its outline, and each map lies on its own pixels."""
    ball = Assets(torch.tensor([CATEGORIES.index("ball")]), *(f[:1] for f in sample_assets(1, 0)[1:]))
    maps = render(ball, Look("render"))
    position, normal, mask = visual_hull(maps.mask > 0.5)
    there = mask[:, :, 0] > 0
    assert ((maps.mask[:, :, 0] > 0.5) == there).float().mean() > 0.98
    for v, azimuth in enumerate(AZIMUTHS):
        column, row, depth = project(position[:, v], torch.tensor([float(azimuth)]))
        rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
        on = there[:, v]
        assert (column[0] - columns)[on[0]].abs().max() < 1e-3 and (row[0] - rows)[on[0]].abs().max() < 1e-3
        both = on & (maps.mask[:, v, 0] == 1)
        truth = project(maps.position[:, v], torch.tensor([float(azimuth)]))[2]
        assert (truth - depth)[both].quantile(0.02) > -0.03  # not behind the ball's surface, but for its steep rim
        forward = camera(azimuth)[2]
        assert ((normal[:, v] * forward[:, None, None]).sum(1)[both] < 0.1).float().mean() > 0.97  # towards the camera
    colors = torch.where(there[:, :, None], 0.5 + 0.4 * position, torch.ones(()))
    assert consistency(colors, Surface(position, normal, mask), near=0.5)["psnr"] > 35


def test_near_white_is_background_and_pale_is_not():
    image = torch.tensor([1.0, 0.97, 0.85]).view(3, 1, 1, 1).repeat(1, 3, 1, 1)
    assert silhouette(image).flatten().tolist() == [False, False, True]


def test_outlines_that_no_shape_fits_are_refused():
    seen = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    seen[0, :, 8:24, 8:24] = True
    with pytest.raises(ValueError, match="nothing lies inside"):
        hull_mesh(seen)
