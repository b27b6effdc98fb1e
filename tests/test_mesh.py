"""Meshes: the rasteriser against brute force and the analytic renderer, files byte by byte, textures there and back."""

import io
import json
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error, script
from PIL import Image

import data
import sample


def one_asset(category):
    """The first held-out object of a category."""
    assets = data.sample_assets(300, data.SEEDS["evaluation"])
    return data.take(assets, (assets.category == data.CATEGORIES.index(category)).nonzero()[:1, 0])


def box(x, y, z):
    """Twelve triangles of a box with these half sides, counter-clockwise from outside."""
    corners = torch.tensor([[i, j, k] for i in (-x, x) for j in (-y, y) for k in (-z, z)])
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = torch.tensor([[q[0], q[i], q[i + 1]] for q in quads for i in (1, 2)])
    return data.Mesh(corners, faces)


def volume(mesh):
    p = mesh.vertices[mesh.faces]
    return (p[:, 0] * torch.linalg.cross(p[:, 1], p[:, 2])).sum() / 6


# ---- the rasteriser


def test_rasterizer_by_brute_force():
    """Random triangles that pierce each other and leave the image, one pixel and one triangle at a time."""
    generator = torch.Generator().manual_seed(0)
    mesh = data.Mesh(torch.rand(36, 3, generator=generator) * 1.4 - 0.7, torch.arange(36).view(12, 3))
    size, turn = 20, 30
    face, place = data.rasterize(mesh, size, (turn,))
    right, up, forward = (axis.double().numpy() for axis in data.camera(turn))
    p = mesh.vertices.double().numpy()
    x, y, z = (p @ right / data.EXTENT + 1) * size / 2, (1 - p @ up / data.EXTENT) * size / 2, p @ forward
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
    small = data.rasterize_view(mesh.vertices[mesh.faces].double(), size, *data.camera(turn), chunk=50)  # many chunks
    assert torch.equal(small[0], face[0]) and torch.equal(small[1], place[0])


@pytest.mark.parametrize("category", ["ball", "cone", "cube", "chair", "mug"])
def test_mesh_maps_are_those_of_the_analytic_renderer(category, monkeypatch):
    asset = one_asset(category)
    got, trace = data.mesh_views(data.asset_mesh(asset, 128), 128), data.trace
    # as it draws, the tracer also counts rays that pass within 0.0015 of the surface, a fifth of a pixel: not here
    monkeypatch.setattr(data, "trace", lambda *args: trace(*args, steps=400, tolerance=1e-5))
    truth = data.render(asset, style="render", size=128)
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
    mesh = data.Mesh(crate.vertices, crate.faces[[*range(4, 12), *range(4)]])  # the side at -x comes last
    views = data.mesh_views(mesh, 32)
    assert all(maps.isfinite().all() for maps in (views.position, views.normal, views.mask))


def test_open_meshes_show_both_sides_with_normals_to_the_camera():
    square = data.Mesh(torch.tensor([[-0.3, -0.3, 0], [0.3, -0.3, 0], [0.3, 0.3, 0], [-0.3, 0.3, 0]]),
                       torch.tensor([[0, 1, 2], [0, 2, 3]]))
    views = data.mesh_views(square, 32)
    for v, sign in ((0, 1), (2, -1)):
        inside = views.mask[0, v, 0] == 1
        assert inside.sum() > 250 and torch.allclose(views.normal[0, v, 2][inside], torch.tensor(float(sign)))


# ---- meshing


@pytest.mark.parametrize("category", ["ball", "donut", "chair"])
def test_asset_meshes_are_closed_welded_and_face_outwards(category):
    asset = one_asset(category)
    mesh = data.asset_mesh(asset, 48)
    edges = torch.cat([mesh.faces[:, [i, (i + 1) % 3]] for i in range(3)])
    there, back = ({tuple(edge) for edge in way.tolist()} for way in (edges, edges.flip(1)))
    assert there == back and volume(mesh) > 0  # each edge is passed once in each direction
    assert len(mesh.vertices.unique(dim=0)) > 0.999 * len(mesh.vertices)
    distance = data.nearest(data.SHAPES[category](mesh.vertices.T.unbind(), *asset.shape[0][:, None].unbind()))
    assert distance.abs().median() < 1e-3 and distance.abs().max() < 0.02


def test_mesh_of_a_sphere_has_its_volume_and_of_a_box_its_edges():
    line = torch.linspace(-0.5, 0.5, 41)
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    ball = data.surface_mesh((x * x + y * y + z * z).sqrt() - 0.4, 0.5, lambda p: F.normalize(p, dim=0))
    assert volume(ball) == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.01)
    sides = torch.stack([x.abs() - 0.31, y.abs() - 0.22, z.abs() - 0.27])
    face = lambda p: F.one_hot((p.abs() - torch.tensor([[0.31], [0.22], [0.27]])).argmax(dim=0), 3).T * p.sign()
    mesh = data.surface_mesh(sides.amax(dim=0), 0.5, face)
    assert torch.allclose(mesh.vertices.amax(dim=0), torch.tensor([0.31, 0.22, 0.27]), atol=2e-3)
    assert volume(mesh) == pytest.approx(8 * 0.31 * 0.22 * 0.27, rel=0.01)  # blunt edges would lose several percent
    with pytest.raises(ValueError, match="nothing lies inside"):
        data.surface_mesh(torch.ones(5, 5, 5))


def test_hull_mesh_fits_the_silhouettes_it_was_carved_from():
    seen = data.render(one_asset("snowman"), style="render").mask[0] > 0.5
    again = data.mesh_views(data.hull_mesh(seen), 32).mask[0] > 0.5
    assert (seen & again).sum() / (seen | again).sum() > 0.95


def test_normals_are_smooth_on_a_ball_and_sharp_on_a_box():
    ball = data.asset_mesh(one_asset("ball"), 48)
    normal, point = data.corner_normals(ball), F.normalize(ball.vertices[ball.faces], dim=2)
    assert (normal * point).sum(dim=2).min() > 0.99
    cube = box(0.3, 0.2, 0.1)
    normal = data.corner_normals(cube)
    assert torch.allclose(normal, normal[:, :1].expand(-1, 3, -1)) and (normal.abs().amax(dim=2) > 0.999).all()
    assert ((normal[:, 0] * cube.vertices[cube.faces].mean(dim=1)).sum(dim=1) > 0).all()  # outwards


# ---- reading


def test_obj_with_polygons_parts_and_negative_indices(tmp_path):
    path = tmp_path / "box.obj"
    path.write_text(
        "# a unit box, first three sides by numbers, the rest counted from the end\no first\n"
        + "".join(f"v {i} {j} {k}\n" for i in (0, 2) for j in (0, 2) for k in (0, 2))
        + "vt 0 0\nvn 0 0 1\ng a\nf 1/1/1 2/1/1 4/1/1 3/1/1\nf 5//1 7//1 8//1 6//1\nf 1 5 6 2\ng b\n"
        + "f -6 -5 -1 -2\nf -8 -6 -2 -4\nf -7 -3 -1 -5\n"
    )
    mesh = data.read_mesh(str(path))
    assert len(mesh.vertices) == 8 and len(mesh.faces) == 12
    side = mesh.vertices.amax(dim=0) - mesh.vertices.amin(dim=0)
    assert torch.allclose(side, side[:1].expand(3)) and volume(mesh) == pytest.approx(float(side[0]) ** 3, rel=1e-5)
    assert mesh.vertices.abs().max() <= 0.5
    assert data.mesh_views(mesh).mask[..., 0, :].max() == 0  # all of it lies in the picture


# The letter E: no corner sees all the others
E = ((0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (1, 3), (1, 4), (3, 4), (3, 5), (0, 5))
LETTER = "".join(f"v {x} {y} 0\n" for x, y in E) + "f " + " ".join(str(k + 1) for k in range(12)) + "\n"


def test_concave_polygons_are_cut_from_a_corner_that_can(tmp_path):
    """An L: from its first corner a fan would leave it."""
    (tmp_path / "l.obj").write_text("v 1 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nv 0 1 0\nv 1 1 0\nf 1 2 3 4 5 6\n")
    vertices, faces = data.read_obj(str(tmp_path / "l.obj"))
    p = vertices[faces]
    area = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])[:, 2] / 2
    assert area.min() > -1e-9 and area.sum() == pytest.approx(3.0)


def test_wrong_winding_and_stray_vertices_do_not_matter(tmp_path):
    """Every face, or every other one, turned round, and a vertex far off that no face uses."""
    crate = box(1.0, 0.7, 0.5)
    for step in (0, 1, 2):
        faces = [face[::-1] if step and k % step == 0 else face for k, face in enumerate(crate.faces.tolist())]
        lines = [f"v {x} {y} {z}" for x, y, z in crate.vertices.tolist() + [[50, 50, 50]]]
        lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
        (tmp_path / "crate.obj").write_text("\n".join(lines) + "\n")
        mesh = data.read_mesh(str(tmp_path / "crate.obj"))
        seen = data.rasterize(mesh, 64)[0].unique()
        p = mesh.vertices[mesh.faces]
        outwards = (torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]) * p.mean(dim=1)).sum(dim=1) > 0
        assert outwards[seen[seen >= 0]].all() and mesh.vertices.abs().max() > 0.3


def test_bad_meshes_are_refused_in_one_line(tmp_path):
    cases = {
        "empty.obj": ("v 0 0 0\n", "holds no triangles"),
        "word.obj": ("v 0 0 0\nv 1 0 zero\n", "line 2 cannot be read .*: v 1 0 zero"),
        "short.obj": ("v 0 0\nf 1 1 1\n", "line 1 cannot be read"),
        "index.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "line 4 cannot be read"),
        "zero.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 1\nf 0 1 2 3\n", "line 5 cannot be read"),
        "letter.obj": (LETTER, "line 13 cannot be read .a polygon too concave"),
        "nan.obj": ("v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n", "not finite"),
        "flat.obj": ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "without area"),
        "some.stl": ("solid", "read from .obj and .glb"),
        "text.glb": ("solid and more text here", "not binary glTF 2"),
        "cut.glb": ("glTF", "not a readable GLB"),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            data.read_mesh(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.read_mesh(str(tmp_path / "none.obj"))


def test_glb_parts_stand_where_their_nodes_put_them(tmp_path):
    """Two instances of one triangle with 8-bit indices and a stride: one turned and moved, one a mirrored child."""
    points = np.array([[0, 0, 0, 9], [1, 0, 0, 9], [0, 1, 0, 9]], "<f4").tobytes()  # 16 bytes a row, 12 used
    binary = points + bytes([0, 1, 2, 0])
    gltf = dict(
        asset=dict(version="2.0"), scene=0, scenes=[dict(nodes=[0])], buffers=[dict(byteLength=len(binary))],
        nodes=[dict(mesh=0, translation=[5, 0, 0], rotation=[0, 0, 2**-0.5, 2**-0.5], children=[1]),
               dict(mesh=0, scale=[-1, 2, 1])],
        meshes=[dict(primitives=[dict(attributes=dict(POSITION=0), indices=1)])],
        bufferViews=[dict(buffer=0, byteLength=48, byteStride=16), dict(buffer=0, byteOffset=48, byteLength=3)],
        accessors=[dict(bufferView=0, componentType=5126, count=3, type="VEC3"),
                   dict(bufferView=1, componentType=5121, count=3, type="SCALAR")])

    def write(gltf):
        header = json.dumps(gltf).encode()
        header += b" " * (-len(header) % 4)
        (tmp_path / "a.glb").write_bytes(
            struct.pack("<4sII", b"glTF", 2, 28 + len(header) + len(binary))
            + struct.pack("<I4s", len(header), b"JSON") + header
            + struct.pack("<I4s", len(binary), b"BIN\0") + binary)
        return str(tmp_path / "a.glb")

    vertices, faces = data.read_glb(write(gltf))
    found = {tuple(map(tuple, vertices[face].round(decimals=5).add(0.0).tolist())) for face in faces}
    mirrored = ((3, 0, 0), (5, -1, 0), (5, 0, 0))  # its corners turned round, so that it still faces outwards
    assert found == {((5, 0, 0), (5, 1, 0), (4, 0, 0)), mirrored}
    gltf["meshes"][0]["primitives"][0]["mode"] = 1
    with pytest.raises(ValueError, match="export it as triangles"):
        data.read_mesh(write(gltf))
    with pytest.raises(ValueError, match="without mesh compression"):
        data.read_mesh(write(gltf | dict(extensionsRequired=["KHR_draco_mesh_compression"])))


# ---- texturing


def test_atlas_gives_each_triangle_its_own_texels():
    uv, face, place = sample.atlas(7, 32)
    assert face.max() == 6 and (face.unique() == torch.arange(-1, 7)).all()
    for k in range(7):
        for corner in range(3):
            column, row = uv[k, corner].long().tolist()
            assert face[row, column] == k
            assert torch.allclose(place[row, column], F.one_hot(torch.tensor(corner), 3).float())
        own = place[face == k]
        assert torch.allclose(own.sum(dim=1), torch.ones(len(own))) and own.min() >= 0
    with pytest.raises(ValueError, match="--texture_size"):
        sample.atlas(200, 32)


@pytest.fixture(scope="module")
def textured():
    """A chair whose colour is a function of the point, seen in four views and textured from them."""
    mesh = data.asset_mesh(one_asset("chair"), 48)
    views = data.mesh_views(mesh, 64)
    paint = lambda position: 0.5 + 0.8 * position
    images = torch.where((views.normal != 0).any(dim=2, keepdim=True), paint(views.position), torch.ones(()))[0]
    return mesh, views, images, paint, *sample.texture_mesh(mesh, images, 512)


def test_texture_renders_back_to_the_views_it_came_from(textured):
    mesh, views, images, paint, texture, uv, covered = textured
    assert 0.5 < covered < 1
    again = sample.turntable(mesh, texture, uv, 64, data.AZIMUTHS, supersample=1) / 255
    inside = views.mask[0] == 1
    error = (again - images).square()[inside.expand_as(images)].mean()
    assert -10 * error.log10() > 35
    assert (again[(views.mask[0] == 0).expand_as(again)] == 1).all()


def test_texels_hold_the_colour_of_their_point(textured):
    mesh, views, images, paint, texture, uv, covered = textured
    _, face, place = sample.atlas(len(mesh.faces), 512)
    points = (mesh.vertices[mesh.faces][face] * place[..., None]).sum(dim=2)
    error = (texture / 255 - paint(points)).abs().amax(dim=2)[face >= 0]
    assert (error < 0.03).float().mean() > 0.8 * covered and error.median() < 0.01
    assert error.mean() < 0.1  # what no view sees has the colour of the nearest seen point


def glb_parts(path):
    """JSON and binary chunk of a GLB, read here by the specification alone."""
    content = path.read_bytes()
    assert content[:4] == b"glTF" and struct.unpack("<II", content[4:12]) == (2, len(content))
    length, kind = struct.unpack("<I4s", content[12:20])
    assert kind == b"JSON" and length % 4 == 0
    size, kind = struct.unpack("<I4s", content[20 + length : 28 + length])
    assert kind == b"BIN\0" and size % 4 == 0 and 28 + length + size == len(content)
    return json.loads(content[20 : 20 + length]), content[28 + length :]


def test_glb_bytes_hold_the_mesh_its_uv_and_its_picture(textured, tmp_path):
    mesh, _, _, _, texture, uv, _ = textured
    sample.write_glb(str(tmp_path / "chair.glb"), mesh, texture, uv)
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
    back, faces = data.read_glb(str(tmp_path / "chair.glb"))  # and our own reader
    assert np.allclose(back[faces], mesh.vertices[mesh.faces], atol=1e-6)


def test_obj_of_a_textured_mesh_reads_back(textured, tmp_path):
    mesh, _, _, _, texture, uv, _ = textured
    sample.write_obj(str(tmp_path / "chair.obj"), mesh, texture, uv)
    vertices, faces = data.read_obj(str(tmp_path / "chair.obj"))
    assert np.allclose(vertices, mesh.vertices, atol=1e-6) and torch.equal(faces, mesh.faces)
    lines = (tmp_path / "chair.obj").read_text().splitlines()
    places = [list(map(float, line.split()[1:])) for line in lines if line.startswith("vt ")]
    assert np.allclose(places, [(u / 512, 1 - v / 512) for u, v in uv.view(-1, 2).tolist()], atol=1e-6)
    assert "map_Kd chair.png" in (tmp_path / "chair.mtl").read_text() and lines[0] == "mtllib chair.mtl"
    assert np.array_equal(np.array(Image.open(tmp_path / "chair.png")), texture.numpy())


def test_trimesh_loads_the_glb(textured, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    mesh, views, images, _, texture, uv, _ = textured
    sample.write_glb(str(tmp_path / "chair.glb"), mesh, texture, uv)
    loaded = trimesh.load(tmp_path / "chair.glb", force="mesh", process=False)
    assert np.allclose(loaded.vertices[loaded.faces], mesh.vertices[mesh.faces], atol=1e-6)
    picture = torch.from_numpy(np.array(loaded.visual.material.baseColorTexture.convert("RGB")))
    uv = torch.from_numpy(loaded.visual.uv[loaded.faces]).float()  # trimesh turns v round: its origin is bottom left
    uv = torch.stack([uv[..., 0], 1 - uv[..., 1]], dim=-1) * len(picture)
    back = data.Mesh(torch.from_numpy(loaded.vertices).float(), torch.from_numpy(loaded.faces).long())
    again = sample.turntable(back, picture, uv, 64, data.AZIMUTHS, supersample=1) / 255
    error = (again - images).square()[(views.mask[0] == 1).expand_as(images)].mean()
    assert -10 * error.log10() > 35
    loaded.merge_vertices(merge_tex=True, merge_norm=True)
    assert loaded.is_watertight and loaded.volume == pytest.approx(float(volume(mesh)), rel=1e-4)


# ---- the command


def test_own_mesh_through_the_command(tiny_run, tmp_path):
    blank = torch.zeros(8, 8, 3, dtype=torch.uint8)
    sample.write_obj(str(tmp_path / "crate.obj"), box(3.0, 2.0, 1.0), blank, torch.zeros(12, 3, 2))
    command = ("sample.py", "--model", tiny_run / "realiz3d_texturing.safetensors", "--mesh", tmp_path / "crate.obj",
               "--num_steps", 1, "--domain", "0.5", "--threads", 1, "--out", tmp_path / "a.png")
    done = script(*command, "--prompt", "a blue metal cube", "--textured", tmp_path / "out", "--texture_size", 64)
    assert done.returncode == 0, done.stderr
    assert "crate_0.5.glb and .obj: 12 triangles" in done.stdout and (tmp_path / "out" / "turntable.png").exists()
    assert (tmp_path / "out" / "crate_0.5.obj").exists() and Image.open(tmp_path / "a.png").width > 400
    one_line_error(script(*command), 1, "--prompt")
    one_line_error(script(*command[:-4], "--domain", "fake"), 2, "'fake' is not")
