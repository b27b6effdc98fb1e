"""Meshes in and out: users' files, good and bad; ours, byte by byte."""

import io
import json
import struct
import sys
import time

import numpy as np
import pytest
import torch
from conftest import one_line_error, script
from PIL import Image
from shapes import box, textured_chair, volume

from geometry.camera import AZIMUTHS
from geometry.files import MOST_CORNERS, read_mesh, read_obj, read_scene, write_glb, write_obj
from geometry.mesh import Mesh, mesh_views, rasterize
from geometry.texture import turntable


@pytest.fixture
def trimesh():
    return pytest.importorskip("trimesh", reason="GLB, glTF, PLY and STL are read by trimesh: pip install trimesh")


@pytest.fixture(scope="module")
def chair():
    return textured_chair()


def refused(path, words, content=None):
    """Asserts that read_mesh says in one line which file it is and what is wrong with it."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=words) as caught:
        read_mesh(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---- OBJ


def test_obj_with_polygons_parts_and_negative_indices(tmp_path):
    path = tmp_path / "box.obj"
    path.write_text(
        "# a unit box, first three sides by numbers, the rest counted from the end\no first\n"
        + "".join(f"v {i} {j} {k}\n" for i in (0, 2) for j in (0, 2) for k in (0, 2))
        + "vt 0 0\nvn 0 0 1\ng a\nf 1/1/1 2/1/1 4/1/1 3/1/1\nf 5//1 7//1 8//1 6//1\nf 1 5 6 2\ng b\n"
        + "f -6 -5 -1 -2\nf -8 -6 -2 -4\nf -7 -3 -1 -5\n"
    )
    mesh = read_mesh(str(path))
    assert len(mesh.vertices) == 8 and len(mesh.faces) == 12
    side = mesh.vertices.amax(dim=0) - mesh.vertices.amin(dim=0)
    assert torch.allclose(side, side[:1].expand(3)) and volume(mesh) == pytest.approx(float(side[0]) ** 3, rel=1e-5)
    assert mesh.vertices.abs().max() <= 0.5
    assert mesh_views(mesh).mask[..., 0, :].max() == 0  # all of it lies in the picture


def test_negative_indices_count_from_the_line_they_stand_in(tmp_path):
    """Two parts, each written after its own vertices."""
    part = "v {0} 0 0\nv {0} 1 0\nv {0} 0 1\nf -3 -2 -1\n"
    (tmp_path / "two.obj").write_text(part.format(0) + part.format(3))
    _, faces = read_obj(str(tmp_path / "two.obj"))
    assert faces.tolist() == [[0, 1, 2], [3, 4, 5]]


# The letter E: no corner sees all the others
E = ((0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (1, 3), (1, 4), (3, 4), (3, 5), (0, 5))
LETTER = "".join(f"v {x} {y} 0\n" for x, y in E) + "f " + " ".join(str(k + 1) for k in range(12)) + "\n"


def test_concave_polygons_are_cut_from_a_corner_that_can(tmp_path):
    """An L: from its first corner a fan would leave it."""
    (tmp_path / "l.obj").write_text("v 1 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nv 0 1 0\nv 1 1 0\nf 1 2 3 4 5 6\n")
    vertices, faces = read_obj(str(tmp_path / "l.obj"))
    p = vertices[faces]
    area = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])[:, 2] / 2
    assert area.min() > -1e-9 and area.sum() == pytest.approx(3.0)


def polygon(radius):
    """An OBJ of one polygon around the origin, its corners at these distances."""
    turns = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
    corners = np.stack([np.cos(turns), np.sin(turns)], axis=1) * np.array(radius)[:, None]
    return "".join(f"v {x} {y} 0\n" for x, y in corners) + "f " + " ".join(map(str, range(1, 1 + len(corners)))) + "\n"


@pytest.mark.parametrize("radius, faces, why", [
    ([1, 1.5] * 750, 0, "a star: every corner is tried, which took a minute"),
    ([1] * (MOST_CORNERS + 2), MOST_CORNERS, "a circle: of any number of corners"),
    ([1] * 99 + [0.5], 98, "a dent: its own corner sees all others"),
    ([1] * MOST_CORNERS + [0.5], 0, "too many of them to try"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_polygons_of_many_corners_take_no_time(radius, faces, why, tmp_path):
    began, path = time.process_time(), tmp_path / "a.obj"
    if not faces:
        refused(path, f"line {len(radius) + 1} cannot be read .a polygon too concave", polygon(radius))
    else:
        path.write_text(polygon(radius))
        assert len(read_obj(str(path))[1]) == faces
    assert time.process_time() - began < 10


def test_wrong_winding_and_stray_vertices_do_not_matter(tmp_path):
    """Every face, or every other one, turned round, and a vertex far off that no face uses."""
    crate = box(1.0, 0.7, 0.5)
    for step in (0, 1, 2):
        faces = [face[::-1] if step and k % step == 0 else face for k, face in enumerate(crate.faces.tolist())]
        lines = [f"v {x} {y} {z}" for x, y, z in crate.vertices.tolist() + [[50, 50, 50]]]
        lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
        (tmp_path / "crate.obj").write_text("\n".join(lines) + "\n")
        mesh = read_mesh(str(tmp_path / "crate.obj"))
        seen = rasterize(mesh, 64)[0].unique()
        p = mesh.vertices[mesh.faces]
        outwards = (torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]) * p.mean(dim=1)).sum(dim=1) > 0
        assert outwards[seen[seen >= 0]].all() and mesh.vertices.abs().max() > 0.3


def test_bad_obj_files_are_refused_in_one_line(tmp_path):
    cases = {
        "empty": ("v 0 0 0\n", "holds no triangles"),
        "nothing": ("", "holds no triangles"),
        "lines": ("v 0 0 0\nv 1 0 0\nl 1 2\n", "holds no triangles"),
        "word": ("v 0 0 0\nv 1 0 zero\n", "line 2 cannot be read .*: v 1 0 zero"),
        "short": ("v 0 0\nf 1 1 1\n", "line 1 cannot be read"),
        "index": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "line 4 cannot be read"),
        "before": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 -4\n", "line 4 cannot be read"),
        "zero": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 1\nf 0 1 2 3\n", "line 5 cannot be read"),
        "letter": (LETTER, "line 13 cannot be read .a polygon too concave"),
        "nan": ("v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n", "not finite"),
        "flat": ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "without area"),
    }
    for name, (text, words) in cases.items():
        refused(tmp_path / f"{name}.obj", words, text)
    refused(tmp_path / "some.off", "read from .glb, .gltf, .obj, .ply, .stl files", "OFF")
    with pytest.raises(FileNotFoundError, match="no such file: .*none.obj"):
        read_mesh(str(tmp_path / "none.obj"))


# ---- by trimesh


def test_without_trimesh_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trimesh", None)
    for kind in ("glb", "gltf", "ply", "stl"):
        refused(tmp_path / f"a.{kind}", "needs trimesh: pip install trimesh", "any")


def triangle_gltf():
    """Two instances of one triangle with 8-bit indices and a stride, one turned and moved, one a mirrored child: JSON
    as a dict, and the binary chunk."""
    points = np.array([[0, 0, 0, 9], [1, 0, 0, 9], [0, 1, 0, 9]], "<f4").tobytes()  # 16 bytes a row, 12 used
    binary = points + bytes([0, 1, 2, 0])
    return dict(
        asset=dict(version="2.0"), scene=0, scenes=[dict(nodes=[0])], buffers=[dict(byteLength=len(binary))],
        nodes=[dict(mesh=0, translation=[5, 0, 0], rotation=[0, 0, 2**-0.5, 2**-0.5], children=[1]),
               dict(mesh=0, scale=[-1, 2, 1])],
        meshes=[dict(primitives=[dict(attributes=dict(POSITION=0), indices=1)])],
        bufferViews=[dict(buffer=0, byteLength=48, byteStride=16), dict(buffer=0, byteOffset=48, byteLength=3)],
        accessors=[dict(bufferView=0, componentType=5126, count=3, type="VEC3"),
                   dict(bufferView=1, componentType=5121, count=3, type="SCALAR")]), binary


def glb_bytes(gltf, binary):
    header = json.dumps(gltf).encode()
    header += b" " * (-len(header) % 4)
    return (struct.pack("<4sII", b"glTF", 2, 28 + len(header) + len(binary))
            + struct.pack("<I4s", len(header), b"JSON") + header + struct.pack("<I4s", len(binary), b"BIN\0") + binary)


def test_gltf_parts_stand_where_their_nodes_put_them(trimesh, tmp_path):
    """In one file, and as text beside its binary file; with a matrix in place of turn and move."""
    gltf, binary = triangle_gltf()
    (tmp_path / "a.glb").write_bytes(glb_bytes(gltf, binary))
    (tmp_path / "a.bin").write_bytes(binary)
    (tmp_path / "a.gltf").write_text(json.dumps(gltf | dict(buffers=[dict(byteLength=len(binary), uri="a.bin")])))
    place = dict(mesh=0, matrix=[0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 1, 0, 5, 0, 0, 1], children=[1])     # by columns
    (tmp_path / "b.glb").write_bytes(glb_bytes(gltf | dict(nodes=[place, gltf["nodes"][1]]), binary))
    mirrored = ((3, 0, 0), (5, -1, 0), (5, 0, 0))  # its corners turned round, so that it still faces outwards
    for name in ("a.glb", "a.gltf", "b.glb"):
        vertices, faces = read_scene(str(tmp_path / name))
        found = {tuple(map(tuple, vertices[face].round(decimals=5).add(0.0).tolist())) for face in faces}
        assert found == {((5, 0, 0), (5, 1, 0), (4, 0, 0)), mirrored}
    (tmp_path / "a.bin").unlink()
    refused(tmp_path / "a.gltf", "not a readable GLTF file: .*a.bin")


def test_bad_gltf_files_are_refused_in_one_line(trimesh, tmp_path):
    gltf, binary = triangle_gltf()
    whole = glb_bytes(gltf, binary)
    part = gltf["meshes"][0]["primitives"][0]
    drawn = lambda **changes: gltf | dict(meshes=[dict(primitives=[part | changes])])
    circle = [gltf["nodes"][0], gltf["nodes"][1] | dict(children=[0])]
    longer = [gltf["accessors"][0] | dict(count=9), gltf["accessors"][1]]
    cases = {
        "text": ("solid and more text here", "not a readable GLB"),
        "nothing": (b"", "not a readable GLB"),
        "magic": ("glTF", "not a readable GLB"),
        "cut": (whole[:-9], "not a readable GLB"),
        "cut in its header": (whole[:200], "not a readable GLB"),
        "old": (whole[:4] + b"\1" + whole[5:], "not a readable GLB"),
        "no scene": (glb_bytes(dict(asset=dict(version="2.0")), b""), "holds no triangles"),
        "lines": (glb_bytes(drawn(mode=1), binary), "holds no triangles"),
        "points": (glb_bytes(drawn(mode=0), binary), "holds no triangles"),
        "fans": (glb_bytes(drawn(mode=6), binary), "export it as triangles"),
        "index": (glb_bytes(gltf, binary[:-2] + b"\7\0"), "corner that is not there"),
        "count": (glb_bytes(gltf | dict(accessors=longer), binary), "not a readable GLB"),
        "circle": (glb_bytes(gltf | dict(nodes=circle), binary), "not a readable GLB"),
        "nan": (glb_bytes(gltf, np.full(12, np.nan, "<f4").tobytes() + binary[-4:]), "not finite"),
        "flat": (glb_bytes(gltf, bytes(48) + binary[-4:]), "without area"),
    }
    for name, (content, words) in cases.items():
        refused(tmp_path / f"{name}.glb", words, content)
    for name in ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_mesh_quantization"):
        packed = glb_bytes(gltf | dict(extensionsRequired=[name]), binary)
        refused(tmp_path / "packed.glb", "without mesh compression", packed)


def ply(vertices, faces):
    """A PLY file as text."""
    head = (f"ply\nformat ascii 1.0\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\n"
            f"property float z\nelement face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n")
    rows = [*vertices, *([len(face), *face] for face in faces)]
    return head + "".join(" ".join(map(str, row)) + "\n" for row in rows)


def test_every_format_gives_the_same_mesh(trimesh, tmp_path):
    """A crate: of triangles, of squares, in bytes, as text; STL has each triangle's corners for itself."""
    crate = box(3.0, 2.0, 1.0)
    squares = [[a, b, c, d] for (a, b, c), (_, _, d) in crate.faces.view(6, 2, 3).tolist()]
    (tmp_path / "crate.ply").write_text(ply(crate.vertices.tolist(), squares))
    lines = [f"v {x} {y} {z}" for x, y, z in crate.vertices.tolist()]
    (tmp_path / "crate.obj").write_text("\n".join(lines + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in crate.faces]))
    loaded = trimesh.Trimesh(crate.vertices.numpy(), crate.faces.numpy(), process=False)
    for name, kind in (("bytes.ply", "ply"), ("bytes.stl", "stl"), ("text.stl", "stl_ascii"), ("crate.glb", "glb")):
        loaded.export(tmp_path / name, file_type=kind)
    truth = mesh_views(read_mesh(str(tmp_path / "crate.obj")), 32)
    for name in ("crate.ply", "bytes.ply", "bytes.stl", "text.stl", "crate.glb"):
        mesh = read_mesh(str(tmp_path / name))
        assert len(mesh.vertices) == 8 and len(mesh.faces) == 12 and volume(mesh) > 0
        views = mesh_views(mesh, 32)
        assert torch.allclose(views.position, truth.position, atol=1e-5), name
        assert torch.allclose(views.normal, truth.normal, atol=1e-5), name


def test_concave_polygons_of_ply_are_refused_and_sheets_with_two_sides_are_not(trimesh, tmp_path):
    """trimesh cuts every polygon as if it were convex."""
    corner = [(1, 0, 0), (2, 0, 0), (2, 2, 0), (0, 2, 0), (0, 1, 0), (1, 1, 0)]
    refused(tmp_path / "l.ply", "a concave polygon: triangulate", ply(corner, [range(6)]))
    refused(tmp_path / "dart.ply", "a concave polygon: triangulate",
            ply([(2, -1, 0), (0.5, 0, 0), (2, 1, 0), (0, 0, 0)], [range(4)]))
    (tmp_path / "hexagon.ply").write_text(ply([(2, 0, 0), (1, 2, 0), (-1, 2, 0), (-2, 0, 0), (-1, -2, 0), (1, -2, 0)],
                                              [range(6)]))
    assert len(read_mesh(str(tmp_path / "hexagon.ply")).faces) == 4
    square, front = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)], [(0, 1, 2), (0, 2, 3)]
    for back in ([(2, 1, 0), (3, 2, 0)], [(3, 2, 1), (3, 1, 0)]):       # cut along the same diagonal, or the other
        (tmp_path / "sheet.ply").write_text(ply(square, [*front, *back]))
        assert len(read_mesh(str(tmp_path / "sheet.ply")).faces) == 4


def test_bad_ply_and_stl_files_are_refused_in_one_line(trimesh, tmp_path):
    points, face = [(0, 0, 0), (1, 0, 0), (0, 1, 0)], (0, 1, 2)
    crate = box(0.3, 0.2, 0.1)
    loaded = trimesh.Trimesh(crate.vertices.numpy(), crate.faces.numpy(), process=False)
    stl, packed = loaded.export(file_type="stl"), loaded.export(file_type="ply")
    text = loaded.export(file_type="stl_ascii")
    cases = {
        "text.ply": ("solid", "not a readable PLY"),
        "nothing.ply": ("", "not a readable PLY"),
        "head.ply": (ply(points, [face])[:60], "not a readable PLY"),
        "cut.ply": (packed[:-5], "not a readable PLY"),
        "points.ply": (ply(points, []), "holds no triangles"),
        "index.ply": (ply(points, [(0, 1, 7)]), "corner that is not there"),
        "before.ply": (ply(points, [(0, 1, -1)]), "corner that is not there"),
        "nan.ply": (ply([*points[:2], (0, "nan", 0)], [face]), "not finite"),
        "flat.ply": (ply([*points[:2], (2, 0, 0)], [face]), "without area"),
        "word.stl": ("solid", "holds no triangles"),
        "nothing.stl": ("", "holds no triangles"),
        "cut.stl": (stl[:-30], "holds no triangles|not a readable STL"),  # read as text, by what trimesh finds installed
        "half.stl": (text[:len(text) // 2], "holds no triangles"),
        "zero.stl": (text.replace("0.1", "zero", 1), "not a readable STL"),
    }
    for name, (content, words) in cases.items():
        refused(tmp_path / name, words, content)


# ---- writing


def glb_parts(path):
    """JSON and binary chunk of a GLB, read here by the specification alone."""
    content = path.read_bytes()
    assert content[:4] == b"glTF" and struct.unpack("<II", content[4:12]) == (2, len(content))
    length, kind = struct.unpack("<I4s", content[12:20])
    assert kind == b"JSON" and length % 4 == 0
    size, kind = struct.unpack("<I4s", content[20 + length : 28 + length])
    assert kind == b"BIN\0" and size % 4 == 0 and 28 + length + size == len(content)
    return json.loads(content[20 : 20 + length]), content[28 + length :]


def test_glb_bytes_hold_the_mesh_its_uv_and_its_picture(chair, tmp_path):
    mesh, texture, uv = chair.mesh, chair.texture, chair.uv
    write_glb(str(tmp_path / "chair.glb"), mesh, texture, uv)
    gltf, binary = glb_parts(tmp_path / "chair.glb")
    part, count = gltf["meshes"][0]["primitives"][0], 3 * len(mesh.faces)

    def read(number, kind, width):
        accessor = gltf["accessors"][number]
        view = gltf["bufferViews"][accessor["bufferView"]]
        assert accessor["count"] == count and view["byteOffset"] % 4 == 0
        return np.frombuffer(binary, kind, count * width, view["byteOffset"]).reshape(count, width)

    assert np.array_equal(read(part["attributes"]["POSITION"], "<f4", 3), mesh.vertices[mesh.faces].view(-1, 3).numpy())
    assert np.allclose(read(part["attributes"]["TEXCOORD_0"], "<f4", 2) * 512, uv.view(-1, 2).numpy(), atol=1e-3)
    assert np.allclose(np.linalg.norm(read(part["attributes"]["NORMAL"], "<f4", 3), axis=1), 1, atol=1e-5)
    assert read(part["indices"], "<u4", 1).ravel().tolist() == list(range(count))
    view = gltf["bufferViews"][gltf["images"][0]["bufferView"]]
    picture = Image.open(io.BytesIO(binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))
    assert np.array_equal(np.array(picture), texture.numpy())
    assert gltf["accessors"][0]["max"] == mesh.vertices[mesh.faces].amax(dim=(0, 1)).tolist()


def test_obj_of_a_textured_mesh_reads_back(chair, tmp_path):
    mesh, texture, uv = chair.mesh, chair.texture, chair.uv
    write_obj(str(tmp_path / "chair.obj"), mesh, texture, uv)
    vertices, faces = read_obj(str(tmp_path / "chair.obj"))
    assert np.allclose(vertices, mesh.vertices, atol=1e-6) and torch.equal(faces, mesh.faces)
    lines = (tmp_path / "chair.obj").read_text().splitlines()
    places = [list(map(float, line.split()[1:])) for line in lines if line.startswith("vt ")]
    assert np.allclose(places, [(u / 512, 1 - v / 512) for u, v in uv.view(-1, 2).tolist()], atol=1e-6)
    assert "map_Kd chair.png" in (tmp_path / "chair.mtl").read_text() and lines[0] == "mtllib chair.mtl"
    assert np.array_equal(np.array(Image.open(tmp_path / "chair.png")), texture.numpy())


def test_trimesh_loads_the_glb(trimesh, chair, tmp_path):
    mesh, views, images, texture, uv, _ = chair
    write_glb(str(tmp_path / "chair.glb"), mesh, texture, uv)
    vertices, faces = read_scene(str(tmp_path / "chair.glb"))
    assert np.allclose(vertices[faces], mesh.vertices[mesh.faces], atol=1e-6)
    loaded = trimesh.load(tmp_path / "chair.glb", force="mesh", process=False)
    assert np.allclose(loaded.vertices[loaded.faces], mesh.vertices[mesh.faces], atol=1e-6)
    picture = torch.from_numpy(np.array(loaded.visual.material.baseColorTexture.convert("RGB")))
    uv = torch.from_numpy(loaded.visual.uv[loaded.faces]).float()  # trimesh turns v round: its origin is bottom left
    uv = torch.stack([uv[..., 0], 1 - uv[..., 1]], dim=-1) * len(picture)
    back = Mesh(torch.from_numpy(loaded.vertices).float(), torch.from_numpy(loaded.faces).long())
    again = turntable(back, picture, uv, 64, AZIMUTHS, supersample=1) / 255
    error = (again - images).square()[(views.mask[0] == 1).expand_as(images)].mean()
    assert -10 * error.log10() > 35
    loaded.merge_vertices(merge_tex=True, merge_norm=True)
    assert loaded.is_watertight and loaded.volume == pytest.approx(float(volume(mesh)), rel=1e-4)


# ---- the command


def test_own_mesh_through_the_command(tiny_run, tmp_path):
    blank = torch.zeros(8, 8, 3, dtype=torch.uint8)
    write_obj(str(tmp_path / "crate.obj"), box(3.0, 2.0, 1.0), blank, torch.zeros(12, 3, 2))
    command = ("sample.py", "--model", tiny_run / "realiz3d_texturing.safetensors", "--mesh", tmp_path / "crate.obj",
               "--num_steps", 1, "--domain", "0.5", "--threads", 1, "--out", tmp_path / "a.png")
    done = script(*command, "--prompt", "a blue metal cube", "--textured", tmp_path / "out", "--texture_size", 64)
    assert done.returncode == 0, done.stderr
    assert "crate_0.5.glb and .obj: 12 triangles" in done.stdout and (tmp_path / "out" / "turntable.png").exists()
    assert (tmp_path / "out" / "crate_0.5.obj").exists() and Image.open(tmp_path / "a.png").width > 400
    one_line_error(script(*command), 1, "--prompt")
    one_line_error(script(*command[:-4], "--domain", "fake"), 2, "'fake' is not")
