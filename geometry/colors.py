"""
Meshes with the colours they come with, drawn from all sides: users' own finished assets.

Read by trimesh (pip install trimesh), whose formats are those of geometry/files.py.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from geometry.camera import ELEVATION, bilinear
from geometry.files import FARTHEST, fitted, load_scene, read_checked
from geometry.mesh import Mesh, face_areas, rasterize


def read_colored_mesh(path, azimuth):
    """(Mesh, paint) of a file of one of MESH_KINDS, scaled to fit the views from each azimuth (degrees). paint(face,
    place): colours (P, 3) in [0, 1], sRGB, at barycentric places (P, 3) of faces (P,); textures, colours of vertices,
    faces or materials, unlit; white for parts without any. In glTF files colours, but not textures, are linear light,
    as its standard has it; in the other formats all are sRGB.

    Raises FileNotFoundError or ValueError with one line, as `read_mesh`, or where no part has colours.
    """
    linear = path.lower().endswith((".glb", ".gltf"))

    def read():
        if path.lower().endswith(".obj"):
            check_textures(path)
        parts = [part for part in load_scene(path, skip_materials=False).dump() if len(getattr(part, "faces", ()))]
        return parts, [part_colors(part, linear) for part in parts]
    parts, colors = read_checked(path, read)
    if not parts:
        raise ValueError(f"{path} holds no triangles")
    if not any(colors):
        raise ValueError(f"{path} holds no colours that can be read: export the mesh with its texture (PNG, JPEG) or "
                         "with its vertex colours")
    corners = torch.cat([torch.from_numpy(np.array(part.triangles, dtype=np.float64)) for part in parts])
    if not (corners.abs() < FARTHEST).all():
        raise ValueError(f"{path} holds vertices that are not finite, or farther than {FARTHEST:g}")
    vertices = corners.flatten(0, 1)                                                                # (3 F, 3)
    faces = torch.arange(len(vertices)).view(-1, 3)
    if not face_areas(Mesh(vertices, faces)).norm(dim=1).any():
        raise ValueError(f"{path} holds only triangles without area")
    ends = np.cumsum([len(part.faces) for part in parts])

    def paint(face, place):
        color = torch.ones(len(face), 3)
        for of_part, end, part in zip(colors, ends, parts):
            mine = (face < end) & (face >= end - len(part.faces))
            if of_part and mine.any():
                inside = (face[mine] - (end - len(part.faces))).numpy()
                color[mine] = torch.from_numpy(of_part(inside, place[mine].numpy())).float()
        return color
    return Mesh(fitted(vertices, azimuth), faces), paint


def check_textures(path):
    """Raises ValueError where an OBJ names materials or textures that cannot be read, which trimesh passes over."""
    folder = Path(path).parent
    for line in Path(path).read_text(errors="replace").splitlines():
        if not line.startswith("mtllib "):
            continue
        library = folder / line.split(maxsplit=1)[1].strip()
        if not library.is_file():
            raise ValueError(f"its materials are not there: {library}")
        for setting in library.read_text(errors="replace").splitlines():
            if setting.lower().split()[:1] == ["map_kd"]:
                texture = folder / setting.split(maxsplit=1)[-1].strip()
                try:
                    Image.open(texture).load()
                except Exception as error:          # Pillow raises whatever the bytes lead it to
                    raise ValueError(f"its texture cannot be read: {texture} ({error!r:.60})") from None


def part_colors(part, linear):
    """colors(face (P,), place (P, 3)) -> (P, 3) in [0, 1] of a trimesh, None where it comes without. linear: its
    colours, but not its texture, are linear light, as in glTF. Raises ValueError where they are damaged."""
    visual, shown = part.visual, srgb if linear else np.asarray
    if visual.kind == "vertex":
        at_corner = visual.vertex_colors[part.faces][..., :3] / 255                                 # (F, 3 corners, 3)
        return lambda face, place: shown(np.einsum("pkc,pk->pc", at_corner[face], place))
    if visual.kind == "face":
        return lambda face, place: shown(visual.face_colors[face][:, :3] / 255)
    image, color = material_colors(getattr(visual, "material", None))
    if image is not None and visual.uv is not None:
        if image.mode.startswith("I"):
            raise ValueError("its texture has 16 bits a colour: save it with 8")
        if not (np.abs(visual.uv) < 1e6).all():
            raise ValueError("its places on the texture are not finite, or far off it")
        texture = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255           # (3, H, W)
        uv = np.asarray(visual.uv)[part.faces]                                                      # (F, 3 corners, 2)

        def colors(face, place):
            texels = look_up(texture, np.einsum("pkc,pk->pc", uv[face], place))
            return texels if color is None else srgb(linear_light(texels) * color)
        return colors
    if color is None:
        return None
    return lambda face, place: np.tile(shown(color), (len(face), 1))


def material_colors(material):
    """What a material of trimesh colours with: (texture, its one colour (3,) in [0, 1]), None what it has not. Of a
    texture the colour is a factor."""
    from trimesh.visual.material import SimpleMaterial
    image, color = getattr(material, "baseColorTexture", None), getattr(material, "baseColorFactor", None)      # glTF
    if isinstance(material, SimpleMaterial):                                    # OBJ; without either, trimesh's is grey
        image = material.image if "file_path" in getattr(material.image, "info", {}) else None
        color = np.array(material.kwargs["kd"]) * 255 if "kd" in material.kwargs else None
        color = None if image is not None else color                            # Kd beside a texture is often 0
    if color is not None and (np.shape(color) not in ((3,), (4,)) or not np.isfinite(color).all()):
        raise ValueError(f"a material has the colour {color}")
    return image, None if color is None else np.asarray(color)[:3] / 255


def look_up(texture, uv):
    """Colours (P, 3) of a texture (3, H, W) that repeats, at uv (P, 2), v up: bilinear between the texels' centres."""
    H, W = texture.shape[1:]
    padded = F.pad(texture[None], (1, 1, 1, 1), mode="circular")                                    # (1, 3, H+2, W+2)
    u, v = torch.from_numpy(uv % 1).float().T[:, None, None]                                        # (1, 1, P)
    return bilinear(padded, u * W + 1, (1 - v) * H + 1)[0, :, 0].T.numpy()


def srgb(light):
    """Linear light in [0, 1] as pictures hold it (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055)


def linear_light(color):
    """`srgb` undone."""
    return np.where(color <= 0.04045, color / 12.92, np.power((color + 0.055) / 1.055, 2.4))


def draw_colors(mesh, paint, size=32, azimuth=(0,), elevation=ELEVATION, supersample=4):
    """What `read_colored_mesh` returned, before white from each azimuth (degrees): (V, 3, size, size) in [0, 1]."""
    face, place = rasterize(mesh, size * supersample, azimuth, elevation)
    image, there = torch.ones(*face.shape, 3), face >= 0
    image[there] = paint(face[there], place[there])
    return F.avg_pool2d(image.permute(0, 3, 1, 2), supersample)
