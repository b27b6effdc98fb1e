"""Users' meshes with their colours: textures, vertex, face and material colours, scenes of several parts."""

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import box, textured_chair

from geometry.camera import ELEVATION
from geometry.colors import draw_colors, look_up, read_colored_mesh
from geometry.files import write_glb, write_obj
from geometry.mesh import coverage
from geometry.texture import turntable

trimesh = pytest.importorskip("trimesh", reason="GLB, glTF, PLY and OBJ with colours are read by trimesh")
RED, BLUE = (255, 0, 0, 255), (0, 0, 255, 255)


def drawn(path, size=32, azimuth=(0, 90, 180, 270)):
    return draw_colors(*read_colored_mesh(str(path), azimuth), size, azimuth)


def cube(**visual):
    mesh = box(0.4, 0.4, 0.4)
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False, **visual)


@pytest.mark.parametrize("kind, write", [("glb", write_glb), ("obj", write_obj)])
def test_a_texture_comes_back_as_it_was_written(tmp_path, kind, write):
    """What `turntable` draws of a textured mesh of ours is what is drawn of its file."""
    chair = textured_chair()
    write(str(tmp_path / f"chair.{kind}"), chair.mesh, chair.texture, chair.uv)
    mesh, _ = read_colored_mesh(str(tmp_path / f"chair.{kind}"), (0, 90))
    known = turntable(chair.mesh._replace(vertices=mesh.vertices, faces=mesh.faces), chair.texture, chair.uv, 32,
                      (0, 90), 4) / 255
    assert (drawn(tmp_path / f"chair.{kind}", azimuth=(0, 90)) - known).abs().mean() < 0.0005


def test_colors_of_vertices_vary_over_a_face_and_those_of_faces_do_not(tmp_path):
    corners = np.array(cube().vertices)
    by_height = np.where(corners[:, 1:2] > 0, RED, BLUE)
    cube(vertex_colors=by_height).export(tmp_path / "vertices.ply")
    image = drawn(tmp_path / "vertices.ply", azimuth=(0,))[0]
    column = image[:, 12:26, 16]                                    # down the front: red above blue
    assert (column[0].diff() < 0).all() and (column[2].diff() > 0).all() and (column[1] == 0).all()
    front = np.array(cube().face_normals)[:, 2] > 0.5
    cube(face_colors=np.where(front[:, None], RED, BLUE)).export(tmp_path / "faces.ply")
    image = drawn(tmp_path / "faces.ply")
    assert torch.equal(image[0, :, 18, 16], torch.tensor([1.0, 0, 0]))
    assert torch.equal(image[2, :, 18, 16], torch.tensor([0, 0, 1.0]))


def test_a_scene_keeps_each_parts_place_and_color(tmp_path):
    """Two materials, one of them moved by its node; a third part without colours is white."""
    def material(color):
        pbr = trimesh.visual.material.PBRMaterial(baseColorFactor=color)
        return trimesh.visual.TextureVisuals(material=pbr)
    scene = trimesh.Scene()
    scene.add_geometry(cube(visual=material(RED)))
    scene.add_geometry(cube(visual=material(BLUE)), transform=trimesh.transformations.translation_matrix((1.2, 0, 0)))
    scene.add_geometry(cube(), transform=trimesh.transformations.translation_matrix((2.4, 0, 0)))
    scene.export(tmp_path / "three.glb")
    image = drawn(tmp_path / "three.glb", 64, azimuth=(0,))[0]
    middle = image[:, 32]                                           # left to right
    assert [middle[:, column].tolist() for column in (12, 32, 52)] == [[1, 0, 0], [0, 0, 1], [1, 1, 1]]


def test_texels_lie_at_their_centres_and_the_texture_repeats():
    """Of swatches side by side, each is its own colour in its middle; halfway it is the mean; beyond 1 it starts anew."""
    swatches = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 1]]).T[:, None]                         # (3, 1, 3)
    u = torch.tensor([0.5, 1.5, 2.5, 2.0, 0.0, 4.5]) / 3
    seen = look_up(swatches, torch.stack([u, torch.full((6,), 0.5)], dim=1).numpy())
    expected = [[1, 0, 0], [1, 1, 1], [0, 0, 1], [0.5, 0.5, 1], [0.5, 0, 0.5], [1, 1, 1]]
    assert np.allclose(seen, expected, atol=1e-6)
    rows = look_up(swatches.transpose(1, 2), np.array([[0.5, 1 / 6], [0.5, 5 / 6]]))                # v is up
    assert np.allclose(rows, [[0, 0, 1], [1, 0, 0]], atol=1e-6)


def test_colors_in_gltf_are_linear_light_and_textures_are_not(tmp_path):
    """The gray #808080 is .2159 in linear light, which 8 bits hold as 55; half as much light is #5c5c5c, 92."""
    gray = (55, 55, 55, 255)
    picture = Image.new("RGB", (2, 2), (128, 128, 128))
    uv = np.full((len(cube().vertices), 2), 0.25)
    for name, value, visual in (
            ("factor", 128, dict(baseColorFactor=gray)),
            ("texture", 128, dict(baseColorTexture=picture)),
            ("both", 92, dict(baseColorTexture=picture, baseColorFactor=(128, 128, 128, 255)))):
        material = trimesh.visual.material.PBRMaterial(**visual)
        cube(visual=trimesh.visual.TextureVisuals(uv=uv, material=material)).export(tmp_path / f"{name}.glb")
        assert (drawn(tmp_path / f"{name}.glb", azimuth=(0,))[0, :, 17, 16] * 255 - value).abs().max() < 0.7, name
    for kind, value in (("glb", 128), ("ply", 55)):
        cube(vertex_colors=gray).export(tmp_path / f"vertices.{kind}")
        assert (drawn(tmp_path / f"vertices.{kind}", azimuth=(0,))[0, :, 17, 16] * 255 - value).abs().max() < 0.7


def test_the_mesh_lies_within_every_view_and_white_around_it(tmp_path):
    cube(vertex_colors=RED).export(tmp_path / "cube.glb")
    turns = tuple(range(0, 360, 45))
    mesh, paint = read_colored_mesh(str(tmp_path / "cube.glb"), turns)
    image, covered = draw_colors(mesh, paint, 32, turns), coverage(mesh, 32, turns)
    assert covered[..., 0].max() == covered[..., -1].max() == covered[..., 0, :].max() == 0
    assert torch.allclose(image[:, 1:2], 1 - covered) and ELEVATION == 20


def refused(path, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_colored_mesh(str(path), (0,))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_meshes_without_colors_and_damaged_ones_get_one_line(tmp_path):
    cube().export(tmp_path / "plain.stl")
    refused(tmp_path / "plain.stl", "holds no colours")
    cube().export(tmp_path / "plain.obj")
    refused(tmp_path / "plain.obj", "holds no colours")
    (tmp_path / "cut.glb").write_bytes(b"glTF\2\0\0\0")
    refused(tmp_path / "cut.glb", "not a readable GLB file")
    arrow = ((0, 0), (2, 1), (4, 0), (2, 4))                        # red
    (tmp_path / "concave.obj").write_text("".join(f"v {x} {y} 0 1 0 0\n" for x, y in arrow) + "f 1 2 3 4\n")
    refused(tmp_path / "concave.obj", "concave polygon")
    Image.new("RGB", (2, 2)).save(tmp_path / "no.png")
    refused(tmp_path / "no.png", "meshes are read from")
    triangle = "mtllib {0}\nusemtl a\n" + "v 0 0 0\nv {1} 0 0\nv 0 1 0\nvt 0 0\nvt {2} 0\nvt 0 1\nf 1/1 2/2 3/3\n"
    Image.new("I;16", (2, 2)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for name in ("no", "deep", "broken", "missing"):
        (tmp_path / f"{name}.mtl").write_text(f"newmtl a\nmap_Kd {name}.png\n")
    (tmp_path / "red.mtl").write_text("newmtl a\nKd 1 0 0\n")
    (tmp_path / "nan.mtl").write_text("newmtl a\nKd 1 0 nan\n")
    cases = [("gone.mtl", "1", "1", "materials are not there"), ("missing.mtl", "1", "1", "texture cannot be read"),
             ("broken.mtl", "1", "1", "texture cannot be read"), ("deep.mtl", "1", "1", "16 bits"),
             ("no.mtl", "1", "nan", "not finite"), ("no.mtl", "1e308", "1", "farther than"),
             ("no.mtl", "0", "1", "without area"), ("nan.mtl", "1", "1", "has the colour")]
    for k, (library, x, u, words) in enumerate(cases):
        (tmp_path / f"{k}.obj").write_text(triangle.format(library, x, u))
        refused(tmp_path / f"{k}.obj", words)
    (tmp_path / "red.obj").write_text(triangle.format("red.mtl", "1", "1"))
    assert torch.equal(drawn(tmp_path / "red.obj", azimuth=(0,))[0, :, 17, 12], torch.tensor([1.0, 0, 0]))
