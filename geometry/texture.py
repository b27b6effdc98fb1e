"""
Textured meshes (D.4): the views of an object back-projected on its surface, as GLB and OBJ, and drawn all round.
"""
import math

import torch
import torch.nn.functional as F

from geometry.camera import AZIMUTHS, ELEVATION, bilinear, camera, project
from geometry.files import write_glb, write_obj
from geometry.hull import hull_mesh, silhouette
from geometry.mesh import corner_normals, coverage, face_areas, rasterize
from support.pictures import save_animation, save_picture, to_uint8

ALL_ROUND = tuple(range(0, 360, 15))    # degrees


def atlas(num_faces, size):
    """A place in a square texture for each triangle: two to a cell, each with all the texels of its half.

    Returns uv (F, 3, 2) in texels, and of each texel its face (size, size), -1 for none, and its barycentric place
    (size, size, 3), which lies on the triangle's rim for the texels beside it, so that bilinear filters find no foreign
    colour. Raises ValueError where the cells would be smaller than 4 texels.
    """
    columns = math.ceil(math.sqrt((num_faces + 1) // 2))
    cell = size // columns
    if cell < 4:
        raise ValueError(f"{num_faces} triangles do not fit a texture of {size} x {size}: use a larger --texture_size")
    face, half = torch.arange(num_faces), torch.arange(num_faces) % 2
    corner = torch.stack([face // 2 % columns, face // 2 // columns], dim=1) * cell                 # (F, 2) column, row
    low, high = 0.5, cell - 2.5
    lower = torch.tensor([[low, low], [high, low], [low, high]])        # the other half is turned round in its cell
    uv = corner[:, None] + torch.where(half[:, None, None] == 0, lower, cell - lower)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    x, y = column % cell + 0.5, row % cell + 0.5
    second = x + y > cell
    number = 2 * (row // cell * columns + column // cell) + second
    number = torch.where((column // cell < columns) & (number < num_faces), number, -1)
    b = (torch.where(second, cell - x, x) - low) / (high - low)
    c = (torch.where(second, cell - y, y) - low) / (high - low)
    place = torch.stack([1 - b - c, b, c], dim=-1).clamp(min=0)
    return uv, number, place / place.sum(dim=-1, keepdim=True)


def texture_mesh(mesh, images, size=1024, power=4, azimuth=AZIMUTHS, elevation=ELEVATION):
    """Back-projects views on a mesh (D.4): (texture uint8 (size, size, 3), uv (F, 3, 2) in texels, covered share).

    images: (V, 3, H, W) in [0, 1]. A texel takes the mean of the views that see it, weighed by the cosine of the angle
    to the power `power`; one that no view sees has the colour of the nearest on the surface that is seen. Covered is
    the share of the surface's area that is seen. Raises ValueError where no view sees any of it.
    """
    from scipy.spatial import cKDTree               # here, as it takes half a second of every program's start
    uv, face, place = atlas(len(mesh.faces), size)
    used = face >= 0
    face, place = face[used], place[used][:, :, None]
    points = (mesh.vertices[mesh.faces][face] * place).sum(dim=1)                                   # (texels, 3)
    normals = F.normalize((corner_normals(mesh)[face] * place).sum(dim=1), dim=1)
    fine = 8 * images.shape[-1]                                         # to see what hides what
    seen_face, seen_place = rasterize(mesh, fine, azimuth, elevation)
    surface = (mesh.vertices[mesh.faces][seen_face] * seen_place[..., None]).sum(dim=3)             # (V, fine, fine, 3)
    trust = trusted_pixels(images, coverage(mesh, images.shape[-1], azimuth, elevation))
    total, weights = torch.zeros(len(points), 3), torch.zeros(len(points), 1)
    for v, turn in enumerate(azimuth):
        column, row, _ = project(points.T[:, None], turn, elevation, size=1)                        # (1, texels)
        x, y = [(z[0] * fine).long().clamp(0, fine - 1) for z in (column, row)]
        visible = ((surface[v, y, x] - points).norm(dim=1) < 0.02) & (seen_face[v, y, x] >= 0)
        cosine = -(normals @ camera(turn, elevation)[2])
        inside = seen_at(trust[v], column, row)
        color = seen_at(images[v] * trust[v], column, row) / inside.clamp(min=1e-6)
        weight = (cosine.clamp(min=0)**power * visible * (cosine > 0.1))[:, None] * inside * (inside > 1e-3)
        total, weights = total + weight * color, weights + weight
    seen = weights[:, 0] > 0
    if not seen.any():
        raise ValueError("no view sees any of the mesh")
    colors = total / weights.clamp(min=1e-12)
    near = seen.nonzero()[::4, 0]                                       # a quarter of them: texels lie close together
    colors[~seen] = colors[near[cKDTree(points[near]).query(points[~seen])[1]]]
    area = face_areas(mesh).norm(dim=1)
    area = (area / face.bincount(minlength=len(area)))[face]            # of each texel
    texture = torch.full((size, size, 3), 255, dtype=torch.uint8)
    texture[used] = (colors * 255).round().byte()
    return texture, uv, float(area[seen].sum() / area.sum())


def trusted_pixels(images, covered):
    """How much the colours of pixels count, (V, 1, H, W) in [0, 1]: of images (V, 3, H, W) of a mesh that covers the
    share `covered` (V, 1, H, W) of each. A generated outline may miss the mesh's by a pixel or two: there the rim of
    what is drawn counts little, and white, which would show as pale seams, not at all."""
    def inner(mask, width):
        return 1 - F.max_pool2d(1 - mask, 2 * width + 1, 1, width)
    whole = (covered == 1).float()
    drawn = whole * silhouette(images)
    sure = torch.maximum(inner(whole, 2), inner(drawn, 1))
    return sure + 0.02 * (drawn - sure).clamp(min=0)


def seen_at(maps, column, row):
    """Bilinear values (P, C) of maps (C, H, W) at column and row, (1, P) in widths of the image."""
    width = maps.shape[-1]
    return bilinear(maps[None], column[None] * width, row[None] * width)[0, :, 0].T


def turntable(mesh, texture, uv, size=128, azimuth=ALL_ROUND, supersample=2):
    """Draws a mesh with what `texture_mesh` returned from each azimuth (degrees) before white: uint8 (n, 3, size,
    size)."""
    face, place = rasterize(mesh, size * supersample, azimuth)
    at = (uv[face] * place[..., None]).sum(dim=3)                                                   # (n, H, W, 2)
    column, row = [at[..., k].long().clamp(0, texture.shape[0] - 1) for k in (0, 1)]
    image = torch.where((face >= 0)[..., None], texture[row, column], torch.tensor(255, dtype=torch.uint8))
    image = F.avg_pool2d(image.permute(0, 3, 1, 2).float(), supersample)
    return image.round().byte()


def save_meshes(folder, meshes, images, texture_size=1024):
    """Textures N meshes with the views of each row of images: FOLDER/NAME_ROW.glb and .obj, and a turntable of all, as
    a picture and as an animation.

    meshes: {name: Mesh, or None where the hull of the views is the mesh}; images: {row: (N, V, 3, H, W) in [-1, 1]}.
    Raises ValueError where there is no mesh at all, as no shape fits the outlines.
    """
    rows = {row: [] for row in images}
    for k, (name, known) in enumerate(meshes.items()):
        for row, grids in images.items():
            views = to_uint8(grids[k]) / 255
            try:
                mesh = known or hull_mesh(silhouette(views))
            except ValueError:
                print(f"{name} {row}: no shape fits the outlines of the four views, so there is no mesh")
                continue
            texture, uv, covered = texture_mesh(mesh, views, texture_size)
            path = f"{folder}/" + f"{name}_{row}".replace(" ", "_")
            write_glb(f"{path}.glb", mesh, texture, uv)
            write_obj(f"{path}.obj", mesh, texture, uv)
            print(f"{path}.glb and .obj: {len(mesh.faces)} triangles, {covered:.0%} of the surface seen")
            rows[row].append((name, turntable(mesh, texture, uv)))
    rows = {row: objects for row, objects in rows.items() if objects}
    if not rows:
        raise ValueError("there is no mesh to show")
    still = [(f"{name} {row}", turning[::3]) for row, objects in rows.items() for name, turning in objects]
    titles = [f"{turn} degrees" for turn in ALL_ROUND[::3]]
    save_picture(f"{folder}/turntable.png", still, scale=1, column_titles=titles)
    save_animation(f"{folder}/turntable.gif", [(str(row), torch.stack([turning for _, turning in objects], 1))
                                               for row, objects in rows.items()])
    print(f"{folder}/turntable.png and .gif show them")
