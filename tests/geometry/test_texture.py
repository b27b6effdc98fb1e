"""Textures there and back."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shapes import box, painted, textured_chair

from geometry.camera import AZIMUTHS
from geometry.mesh import Mesh, mesh_views
from geometry.texture import atlas, save_meshes, texture_mesh, turntable


def test_atlas_gives_each_triangle_its_own_texels():
    uv, face, place = atlas(7, 32)
    assert face.max() == 6 and (face.unique() == torch.arange(-1, 7)).all()
    for k in range(7):
        for corner in range(3):
            column, row = uv[k, corner].long().tolist()
            assert face[row, column] == k
            assert torch.allclose(place[row, column], F.one_hot(torch.tensor(corner), 3).float())
        own = place[face == k]
        assert torch.allclose(own.sum(dim=1), torch.ones(len(own))) and own.min() >= 0
    with pytest.raises(ValueError, match="--texture_size"):
        atlas(200, 32)


@pytest.fixture(scope="module")
def chair():
    return textured_chair()


def test_texture_renders_back_to_the_views_it_came_from(chair):
    mesh, views, images, texture, uv, covered = chair
    assert 0.5 < covered < 1
    again = turntable(mesh, texture, uv, 64, AZIMUTHS, supersample=1) / 255
    inside = views.mask[0] == 1
    error = (again - images).square()[inside.expand_as(images)].mean()
    assert -10 * error.log10() > 35
    assert (again[(views.mask[0] == 0).expand_as(again)] == 1).all()


def test_texels_hold_the_colour_of_their_point(chair):
    mesh, views, images, texture, uv, covered = chair
    _, face, place = atlas(len(mesh.faces), 512)
    points = (mesh.vertices[mesh.faces][face] * place[..., None]).sum(dim=2)
    error = (texture / 255 - painted(points)).abs().amax(dim=2)[face >= 0]
    assert (error < 0.03).float().mean() > 0.8 * covered and error.median() < 0.01
    assert error.mean() < 0.1  # what no view sees has the colour of the nearest seen point


def test_an_outline_that_misses_the_meshs_leaves_no_pale_seam():
    """Views drawn two pixels too small: no texel but those of the colour, and a white middle stays white."""
    crate = box(0.25, 0.25, 0.25)
    images = torch.ones(4, 3, 32, 32)
    views = mesh_views(crate, 32)
    inner = -torch.nn.functional.max_pool2d(-(views.mask[0] == 1).float(), 5, 1, 2)
    images = torch.where(inner == 1, torch.tensor([0.2, 0.4, 0.6])[:, None, None], images)
    texture, uv, _ = texture_mesh(crate, images, 128)
    _, face, _ = atlas(len(crate.faces), 128)
    assert (texture[face >= 0].float() / 255 - torch.tensor([0.2, 0.4, 0.6])).abs().max() < 0.01
    texture, uv, _ = texture_mesh(crate, torch.ones(4, 3, 32, 32), 128)
    assert (texture == 255).all()


def test_a_mesh_that_no_view_sees_is_refused():
    crate = box(0.3, 0.2, 0.1)
    far = Mesh(crate.vertices + 5, crate.faces)
    with pytest.raises(ValueError, match="no view sees any of the mesh"):
        texture_mesh(far, torch.zeros(4, 3, 16, 16), 64)


def test_meshes_are_saved_with_a_turntable_and_outlines_without_a_shape_named(tmp_path, capsys):
    """A known mesh, and the hull of outlines that fit; a row of white views has no hull."""
    images = {"a": torch.ones(2, 4, 3, 32, 32), "b": torch.ones(2, 4, 3, 32, 32)}
    images["a"][:, :, :, 8:24, 8:24] = -0.5
    tmp_path = tmp_path / "a folder"  # with a space, unlike the files in it
    save_meshes(tmp_path, {"crate": box(0.2, 0.2, 0.2), "lifted": None}, images | {"a b": images["a"]}, 512)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"crate_a.glb", "crate_b.obj", "crate_a_b.obj", "lifted_a.glb", "lifted_a.png", "turntable.png"} <= written
    moving = Image.open(tmp_path / "turntable.gif")
    assert moving.n_frames == 24 and moving.info["loop"] == 0
    assert "lifted_b.glb" not in written and "lifted b: no shape fits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no mesh to show"):
        save_meshes(tmp_path, {"lifted": None}, {"b": images["b"][1:]})
