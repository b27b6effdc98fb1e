"""The camera: its axes, projection there and back, what is read between pixels."""

import torch

from geometry.camera import AZIMUTHS, EXTENT, bilinear, camera, project


def test_camera_axes_are_orthonormal_and_look_at_the_named_sides():
    axes = torch.stack(camera(torch.tensor([0.0, 37, 90, 180, 270]), 20), dim=1)  # (5, 3, 3)
    assert torch.allclose(axes @ axes.mT, torch.eye(3).expand(5, 3, 3), atol=1e-6)
    right, up, forward = camera(torch.tensor(AZIMUTHS), 0)
    front_right_back_left = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0]])
    assert torch.allclose(-forward, front_right_back_left, atol=1e-6)  # where the camera stands
    assert torch.allclose(right[0], torch.tensor([1.0, 0, 0])) and torch.allclose(up, torch.tensor([[0.0, 1, 0]] * 4))
    assert camera(0, 20)[2][1] < 0  # from above


def test_points_are_projected_to_where_the_axes_say():
    """The middle to the middle; a point made of the axes to its column, row and depth, whatever the image's size."""
    for turn in (*AZIMUTHS, 37):
        right, up, forward = camera(turn, 20)
        points = torch.stack([0 * right, EXTENT * right / 2 - EXTENT * up / 4 + 0.3 * forward], dim=1)[:, None]
        column, row, depth = project(points, turn, 20, size=64)
        assert torch.allclose(column, torch.tensor([[32.0, 48.0]]), atol=1e-4)
        assert torch.allclose(row, torch.tensor([[32.0, 40.0]]), atol=1e-4)
        assert torch.allclose(depth, torch.tensor([[0.0, 0.3]]), atol=1e-6)
        assert torch.allclose(project(points, turn, 20)[0], column / 32, atol=1e-5)     # of an image as wide as the map


def test_bilinear_reads_pixels_at_their_centres_and_means_between():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    column, row = torch.tensor([[[0.5, 2.5, 1.0, 2.0]]]), torch.tensor([[[0.5, 1.5, 0.5, 1.0]]])
    assert torch.allclose(bilinear(maps, column, row), torch.tensor([[[[0.0, 6.0, 0.5, 3.5]]]]), atol=1e-5)
    assert bilinear(maps, torch.tensor([[[9.0]]]), torch.tensor([[[9.0]]])) == 0          # outside
