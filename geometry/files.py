"""
Meshes in and out: users' own in several formats, scaled to fit the views, and textured ones as GLB and OBJ (D.4).

GLB, glTF, PLY and STL are read by trimesh (pip install trimesh). OBJ is read here: trimesh (5.2) cuts a concave polygon
as if it were convex, counts a negative index from the end of the file, and makes something of lines that are damaged.
"""
import io
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from geometry.camera import AZIMUTHS, EXTENT, camera
from geometry.mesh import Mesh, corner_normals, turned_outwards, weld
from support.files import write_bytes
from support.pictures import save_image

FARTHEST = 1e30                         # that a vertex may lie: more cannot be scaled
MOST_CORNERS = 4096                     # of a concave polygon: each is tried, which takes a second
MESH_KINDS = (".glb", ".gltf", ".obj", ".ply", ".stl")
UNREADABLE = {                          # in a file, what trimesh would misread or leave out without a word
    rb"KHR_draco_mesh_compression|EXT_meshopt_compression|KHR_mesh_quantization":
        "it is compressed: export it without mesh compression",
    rb'"mode"\s*:\s*6\b': "it holds fans of triangles: export it as triangles",
}

UNREADABLE_COLORS = {                   # likewise, where colours matter
    rb"KHR_texture_transform": "its texture is scaled or moved by KHR_texture_transform: bake it on export",
    rb"KHR_materials_pbrSpecularGlossiness": "its colours are of KHR_materials_pbrSpecularGlossiness: export others",
    rb"property (ushort|short|int|uint|u?int16|u?int32) (diffuse_)?red": "its colours are not in 8 bits",
}

# ---------------------------------------------------------------------------------------------------------------------
# In


def read_mesh(path):
    """Mesh of a file of one of MESH_KINDS, y up: all its parts together, centred and scaled to fit the cube and the
    four views.

    Normals, colours and textures in the file are not read: normals follow from the shape (`corner_normals`), and faces
    wound the wrong way are turned round. A sheet without thickness has one colour for both its sides. Lines and points
    are left out. Raises FileNotFoundError or ValueError with one line: another format, damaged, empty, compressed, not
    finite, polygons that cannot be cut, or trimesh missing.
    """
    vertices, faces = read_checked(path, lambda: read_obj(path) if path.lower().endswith(".obj") else read_scene(path))
    if len(faces) == 0:
        raise ValueError(f"{path} holds no triangles")
    if not (vertices[faces].abs() < FARTHEST).all():
        raise ValueError(f"{path} holds vertices that are not finite, or farther than {FARTHEST:g}")
    vertices, faces = weld(vertices, faces)
    if len(faces) == 0:
        raise ValueError(f"{path} holds only triangles without area")
    return turned_outwards(Mesh(fitted(vertices, AZIMUTHS), faces))


def read_checked(path, read):
    """read(), a file of one of MESH_KINDS. Raises FileNotFoundError or ValueError with one line that names it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    kind = os.path.splitext(path)[1].lower()
    if kind not in MESH_KINDS:
        raise ValueError(f"{path}: meshes are read from {', '.join(MESH_KINDS)} files")
    try:
        return read()
    except Exception as error:          # trimesh raises whatever the bytes of a damaged file lead it to
        if isinstance(error, ImportError) and error.name == "trimesh":
            raise ValueError(f"reading {path} needs trimesh: pip install trimesh") from None
        if isinstance(error, ImportError) and error.name == "charset_normalizer":
            error = ValueError("its text is not UTF-8")
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is not a readable {kind[1:].upper()} file: {reason}") from None


def fitted(vertices, azimuth):
    """Vertices (M, 3) centred, and scaled to fit the cube and the views from each azimuth (degrees): float32."""
    low, high = vertices.amin(dim=0), vertices.amax(dim=0)
    vertices = (vertices - (low + high) / 2) / (high - low).max()
    axes = [axis.double() for turn in azimuth for axis in camera(turn)[:2]]         # right and up
    reach = max(float((vertices @ axis).abs().max()) for axis in axes)
    return (vertices * min(1., 0.9 * EXTENT / reach)).float()


def read_scene(path):
    """Vertices (M, 3) float64 and triangles (F, 3) of all meshes in a file's scene, each moved to its place, by
    trimesh. Raises ImportError where it is missing, ValueError or another error where the file is damaged."""
    whole = load_scene(path, skip_materials=True).to_mesh()
    return torch.from_numpy(np.array(whole.vertices, dtype=np.float64)), torch.from_numpy(np.array(whole.faces))


def load_scene(path, skip_materials):
    """A file as a scene of trimesh's, checked for what it would misread. Raises as `read_scene`."""
    import trimesh
    content = Path(path).read_bytes()
    for pattern, reason in (UNREADABLE if skip_materials else UNREADABLE | UNREADABLE_COLORS).items():
        if re.search(pattern, content):
            raise ValueError(reason)
    polygons = [int(number) for number in re.findall(rb"element face (\d+)", content)[:1]]      # PLY's
    polygons = polygons or [len(re.findall(rb"^f\s", content, re.MULTILINE))]                   # OBJ's
    scene = trimesh.load_scene(path, process=False, skip_materials=skip_materials)
    parts = [part for part in scene.geometry.values() if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    are_cut = 0 < polygons[0] < sum(len(part.faces) for part in parts)          # else all are triangles
    for part in parts:
        if part.faces.min() < 0 or part.faces.max() >= len(part.vertices):
            raise ValueError("it has a face with a corner that is not there")
        if are_cut and is_folded(part):
            raise ValueError("it has a concave polygon: triangulate on export")
    return scene


def is_folded(part):
    """Whether triangles of a trimesh that share an edge lie on each other, as where it cut a concave polygon as if it
    were convex; but not where they are the two sides of one triangle."""
    folded = part.face_adjacency_angles > np.radians(179.5)
    first, second = part.face_adjacency_unshared[folded].T              # the corners off the edge
    return bool((first != second).any())


def read_obj(path):
    """Vertices (M, 3) float64 and triangles (F, 3) of an OBJ file. Raises ValueError naming a line."""
    vertices, faces = [], []
    with open(path, errors="replace") as file:
        for number, line in enumerate(file, start=1):
            words = line.split()
            try:
                if words[:1] == ["v"]:
                    x, y, z = map(float, words[1:4])
                    vertices.append((x, y, z))
                elif words[:1] == ["f"]:
                    index = [int(word.split("/")[0]) for word in words[1:]]
                    index = [k - 1 if k > 0 else len(vertices) + k for k in index]      # -1 is the latest vertex
                    if not all(0 <= k < len(vertices) for k in index):
                        raise ValueError("a corner that is not there")
                    faces += fan(index, np.array([vertices[k] for k in index]))
            except ValueError as error:
                raise ValueError(f"line {number} cannot be read ({error}): {line.strip()[:60]}") from None
    return torch.tensor(vertices, dtype=torch.float64).view(-1, 3), torch.tensor(faces, dtype=torch.long).view(-1, 3)


def fan(index, p):
    """Cuts a polygon, the numbers of its n vertices and where they are (n, 3), into triangles around the first of its
    corners from which none lies the wrong way round; beyond MOST_CORNERS only its first is tried. Raises ValueError
    where there is no such corner."""
    n = len(index)
    if n == 3:
        return [index]
    whole = np.cross(p, np.roll(p, -1, axis=0)).sum(axis=0)             # twice the area, along the normal
    for first in range(n if n <= MOST_CORNERS else 1):
        ring = np.roll(p - p[first], -first, axis=0)                    # from the corner around to the one before it
        areas = np.cross(ring[1:-1], ring[2:]) @ whole
        if (areas >= -1e-9 * (whole @ whole)).all():
            turned = [*index[first:], *index[:first]]
            return [[turned[0], a, b] for a, b in zip(turned[1:], turned[2:])]
    raise ValueError("a polygon too concave for a fan, or of too many corners: triangulate on export")


# ---------------------------------------------------------------------------------------------------------------------
# Out


def write_glb(path, mesh, texture, uv):
    """Writes a textured mesh as GLB (glTF 2.0): y up, picture inside as PNG, its origin top left, colours as they are
    (unlit, as the light is in them). texture, uv: of `texture_mesh`."""
    picture = io.BytesIO()
    Image.fromarray(texture.numpy()).save(picture, "PNG")
    corners = [t.reshape(-1, t.shape[-1]).numpy().astype("<f4") for t in
               (mesh.vertices[mesh.faces], corner_normals(mesh), uv / texture.shape[0])]
    points, count = corners[0], len(corners[0])
    blobs = [array.tobytes() for array in (*corners, np.arange(count, dtype="<u4"))] + [picture.getvalue()]
    views, binary = [], b""
    for blob in blobs:
        views.append(dict(buffer=0, byteOffset=len(binary), byteLength=len(blob)))
        binary += blob + b"\0" * (-len(blob) % 4)

    def floats(view, kind):
        return dict(bufferView=view, componentType=5126, count=count, type=kind)
    gltf = dict(
        asset=dict(version="2.0", generator="Realiz3D reference"), scene=0, scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0)], extensionsUsed=["KHR_materials_unlit"],
        meshes=[dict(primitives=[dict(attributes=dict(POSITION=0, NORMAL=1, TEXCOORD_0=2), indices=3, material=0)])],
        materials=[dict(pbrMetallicRoughness=dict(baseColorTexture=dict(index=0), metallicFactor=0.),
                        extensions=dict(KHR_materials_unlit={}), doubleSided=True)],
        textures=[dict(source=0)], images=[dict(bufferView=4, mimeType="image/png")], bufferViews=views,
        buffers=[dict(byteLength=len(binary))],
        accessors=[floats(0, "VEC3") | dict(min=points.min(0).tolist(), max=points.max(0).tolist()), floats(1, "VEC3"),
                   floats(2, "VEC2"), dict(bufferView=3, componentType=5125, count=count, type="SCALAR")])
    header = json.dumps(gltf, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 4)
    content = struct.pack("<4sII", b"glTF", 2, 28 + len(header) + len(binary))
    content += struct.pack("<I4s", len(header), b"JSON") + header + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    write_bytes(path, content)


def write_obj(path, mesh, texture, uv):
    """Writes a textured mesh as NAME.obj, NAME.mtl and NAME.png. texture, uv: of `texture_mesh`."""
    stem = path.removesuffix(".obj")
    name, size = os.path.basename(stem), texture.shape[0]
    lines = [f"mtllib {name}.mtl", "usemtl views"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"vt {u / size:.6f} {1 - v / size:.6f}" for u, v in uv.view(-1, 2).tolist()]          # origin bottom left
    lines += [f"vn {x:.4f} {y:.4f} {z:.4f}" for x, y, z in corner_normals(mesh).view(-1, 3).tolist()]
    for k, face in enumerate(mesh.faces.tolist()):
        corner = 3 * k + 1                                              # they are counted from 1
        lines.append("f " + " ".join(f"{v + 1}/{corner + i}/{corner + i}" for i, v in enumerate(face)))
    save_image(f"{stem}.png", Image.fromarray(texture.numpy()))
    write_bytes(f"{stem}.mtl", f"newmtl views\nKa 1 1 1\nKd 1 1 1\nillum 0\nmap_Kd {name}.png\n".encode())
    write_bytes(path, ("\n".join(lines) + "\n").encode())
