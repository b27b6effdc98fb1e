"""
Meshes: made from a distance on a grid, and drawn as control maps without a renderer's help (D.4).

The rasteriser gives for a mesh, the toy's or a user's, the maps that a renderer gives for an object: normals and
positions in the frame and the four views of geometry/camera.py.
"""
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, Views, camera


class Mesh(NamedTuple):
    """Triangles in the object's frame, counter-clockwise as seen from outside."""
    vertices: torch.Tensor              # (M, 3) float32
    faces: torch.Tensor                 # (F, 3) int64


# ---------------------------------------------------------------------------------------------------------------------
# Meshing


def surface_mesh(value, extent=0.5, normal=None):
    """Mesh of the zero level of a grid value (n, n, n) [x, y, z], negative inside, that spans [-extent, extent]^3.

    Surface nets (Gibson 1998): one vertex for each cell that the surface passes, the mean of where it cuts the cell's
    edges, and one square for each grid edge that it cuts; so the vertices are shared. With normal, a function of points
    (3, M) to unit normals (3, M), the vertex goes where the tangent planes at those cuts meet (dual contouring, Ju et
    al. 2002), so that edges stay sharp. The grid's outermost points must lie outside. Raises ValueError where nothing
    lies inside.
    """
    n, inside = len(value), value < 0
    corners = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    part = sum(inside[i:n - 1 + i, j:n - 1 + j, k:n - 1 + k].long() for i, j, k in corners.tolist())
    cells = ((part > 0) & (part < 8)).nonzero()                                                     # (M, 3)
    if len(cells) == 0:
        raise ValueError("there is no surface to mesh: nothing lies inside")
    at_corner = value[tuple((cells[:, None] + corners).unbind(-1))]                                 # (M, 8)

    def place(p):                                                       # of p in [0, 1]^3 in each cell
        return ((cells + p) / (n - 1) * 2 - 1) * extent
    cuts = []
    for a, b in itertools.combinations(range(8), 2):
        if a ^ b in (1, 2, 4):                                          # the two ends of an edge of the cell
            va, vb = at_corner[:, a:a + 1], at_corner[:, b:b + 1]
            cut = (va < 0) != (vb < 0)
            share = va / (va - vb).where(cut, torch.ones(()))
            cuts.append((cut, corners[a] + share * (corners[b] - corners[a])))
    count = sum(cut for cut, _ in cuts)
    p = sum(cut * p for cut, p in cuts) / count                                                     # (M, 3)
    if normal is not None:
        planes = [(cut * normal(place(q).T).T, q - p) for cut, q in cuts]                           # n, n (q - p) = 0
        left = sum(normals[:, :, None] * normals[:, None] for normals, _ in planes) + 0.05 * torch.eye(3)
        right = sum(normals * (normals * q).sum(dim=1, keepdim=True) for normals, q in planes)
        p = (p + torch.linalg.solve(left, right)).clamp(0, 1)
    number = torch.full((n, n, n), -1)
    number[tuple(cells.unbind(-1))] = torch.arange(len(cells))
    squares = grid_squares(inside, number)
    return Mesh(place(p), torch.cat([squares[:, [0, 1, 2]], squares[:, [0, 2, 3]]]))


def grid_squares(inside, number):
    """The squares (S, 4) of a surface net: one around each edge of the grid inside (n, n, n) bool that leaves the
    inside, through the vertices of the four cells that meet there; number (n, n, n): the vertex of each cell."""
    n, squares = len(inside), []
    for a in range(3):
        b, c = (a + 1) % 3, (a + 2) % 3
        here, there = inside.narrow(a, 0, n - 1), inside.narrow(a, 1, n - 1)
        edge = (here != there).nonzero()                                # the four cells around it, seen from +a
        step = torch.eye(3, dtype=torch.long)
        around = [edge - i * step[b] - j * step[c] for i, j in ((1, 1), (0, 1), (0, 0), (1, 0))]
        square = torch.stack([number[tuple(cell.unbind(-1))] for cell in around], dim=1)
        squares.append(torch.where(here[tuple(edge.unbind(-1))][:, None], square, square.flip(1)))
    return torch.cat(squares)


# ---------------------------------------------------------------------------------------------------------------------
# Normals, and the order of the corners


def face_areas(mesh):
    """Twice the area of each triangle, along its normal: (F, 3)."""
    p = mesh.vertices[mesh.faces]                                                                   # (F, 3, 3)
    return torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])


def corner_normals(mesh, crease=40):
    """Unit normals (F, 3 corners, 3): the mean of the faces around the corner, weighed by area, that lie within
    `crease` degrees of the corner's own face, so that smooth surfaces are smooth and edges stay sharp."""
    area = face_areas(mesh)
    flat = F.normalize(area, dim=1, eps=1e-20)
    order = mesh.faces.flatten().argsort(stable=True)                   # corners (face, k), those of a vertex in a row
    owner, face = mesh.faces.flatten()[order], order // 3
    total, limit = area[face].clone(), math.cos(math.radians(crease))
    for shift in range(1, min(int(owner.bincount().max()), 64)):        # each corner meets (64) others of its vertex
        for a, b in ((slice(None, -shift), slice(shift, None)), (slice(shift, None), slice(None, -shift))):
            near = (owner[a] == owner[b]) & ((flat[face[a]] * flat[face[b]]).sum(dim=1) > limit)
            total[a] += near[:, None] * area[face[b]]
    return F.normalize(torch.empty_like(total).index_copy_(0, order, total), dim=1, eps=1e-20).view(-1, 3, 3)


def weld(vertices, faces):
    """Joins vertices (M, 3) at the same place; leaves out faces (F, 3) without area, and vertices without a face."""
    p = vertices[faces][face_areas(Mesh(vertices, faces)).norm(dim=1) > 0]
    vertices, index = p.flatten(0, 1).unique(dim=0, return_inverse=True)
    return vertices, index.view(-1, 3)


def turned_outwards(mesh):
    """Turns round each face that the four views see more from behind, and those they do not see if most are."""
    face, _ = rasterize(mesh, 128)
    normal = face_areas(mesh)
    votes = torch.zeros(len(mesh.faces))
    for seen, turn in zip(face, AZIMUTHS):
        pixels = seen[seen >= 0].bincount(minlength=len(votes))
        votes += pixels * (normal @ camera(turn)[2]).sign()             # above 0: from behind
    behind = torch.where(votes == 0, votes.sum() > 0, votes > 0)
    return Mesh(mesh.vertices, torch.where(behind[:, None], mesh.faces.flip(1), mesh.faces))


# ---------------------------------------------------------------------------------------------------------------------
# The rasteriser


def rasterize(mesh, size=32, azimuth=AZIMUTHS, elevation=ELEVATION):
    """Which triangle each pixel centre sees, orthographically: face (V, H, W), -1 for none, and its place in it,
    barycentric (V, H, W, 3), 0 for none. A z-buffer; of two triangles at one depth the first in the list wins.

    size: pixels to a side; azimuth: degrees, one a view; elevation: degrees.
    """
    corners = mesh.vertices[mesh.faces].double()
    faces, places = zip(*[rasterize_view(corners, size, *camera(turn, elevation)) for turn in azimuth])
    return torch.stack(faces), torch.stack(places)


def rasterize_view(corners, size, right, up, forward, chunk=1 << 20):
    """`rasterize` for one view of triangles with corners (F, 3, 3): every pair of a triangle and a pixel centre in its
    bounding box is tested, a chunk of pairs at a time."""
    x, y = (corners @ right.double() / EXTENT + 1) * size / 2, (1 - corners @ up.double() / EXTENT) * size / 2  # (F, 3)
    double_area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    i, j = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])             # a corner's opposite edge
    # barycentric coordinates are affine in the pixel: coefficients (F, 3 corners, 3) for column, row, 1; so is depth
    plane = torch.stack([y[:, i] - y[:, j], x[:, j] - x[:, i], x[:, i] * y[:, j] - x[:, j] * y[:, i]], dim=2)
    plane = plane / double_area[:, None, None]
    depth = (plane * (corners @ forward.double())[:, :, None]).sum(dim=1)                           # (F, 3)
    first_column, wide = pixels_between(x, size)
    first_row, high = pixels_between(y, size)
    todo = ((wide * high > 0) & (double_area != 0)).nonzero()[:, 0]
    count = (wide * high)[todo]
    nothing = torch.iinfo(torch.int64).max
    front, ends, start = torch.full((size * size,), nothing), count.cumsum(0), 0
    while start < len(todo):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + chunk)))
        n = count[start:stop]
        f, k = todo[start:stop].repeat_interleave(n), torch.arange(int(n.sum()))
        k = k - (n.cumsum(0) - n).repeat_interleave(n)                  # number of the pixel in its bounding box
        column, row = first_column[f] + k % wide[f], first_row[f] + k // wide[f]
        hit = torch.ones(len(f), dtype=torch.bool)
        for corner in range(3):
            hit &= affine(plane[:, corner], f, column, row) >= -1e-9
        key = ((affine(depth, f, column, row) + 4) * 2**27).long() << 32 | f    # the nearest has the smallest key
        front.scatter_reduce_(0, (row * size + column)[hit], key[hit], "amin")
        start = stop
    face = torch.where(front == nothing, -1, front & 0xffffffff).view(size, size)
    place = torch.zeros(size, size, 3)
    row, column = (face >= 0).nonzero(as_tuple=True)
    at = torch.stack([column + 0.5, row + 0.5, torch.ones_like(row)], dim=1).double()
    place[row, column] = (plane[face[row, column]] @ at[:, :, None])[..., 0].float()
    return face, place


def pixels_between(x, size):
    """The first pixel in [0, size) whose centre lies between the smallest and the largest of x (F, 3), and how many."""
    first = (x.amin(dim=1) - 0.5).ceil().clamp(0, size).long()
    last = (x.amax(dim=1) - 0.5).floor().clamp(-1, size - 1).long()
    return first, (last - first + 1).clamp(min=0)


def affine(coefficients, face, column, row):
    """At the centres of pixels (P,), of the faces (P,) with the coefficients (F, 3)."""
    return coefficients[face, 0] * (column + 0.5) + coefficients[face, 1] * (row + 0.5) + coefficients[face, 2]


def coverage(mesh, size=32, azimuth=AZIMUTHS, elevation=ELEVATION, supersample=4):
    """Share of each pixel that a mesh covers, (V, 1, size, size) in [0, 1], by supersample^2 points a pixel."""
    return F.avg_pool2d((rasterize(mesh, size * supersample, azimuth, elevation)[0] >= 0).float()[:, None], supersample)


def mesh_views(mesh, size=32, azimuth=AZIMUTHS, elevation=ELEVATION):
    """A mesh's maps as a renderer gives them for an object: Views of one object, without colours.

    Normals of surfaces seen from behind are turned round, so that open meshes work too.
    """
    face, place = rasterize(mesh, size, azimuth, elevation)
    there = (face >= 0)[:, None]

    def drawn(corners):                                                 # (F, 3 corners, 3) -> (V, 3, H, W)
        return (corners[face] * place[..., None]).sum(dim=-2).permute(0, 3, 1, 2) * there
    normal = F.normalize(drawn(corner_normals(mesh)), dim=1)
    forward = torch.stack([camera(turn, elevation)[2] for turn in azimuth])[:, :, None, None]
    normal = torch.where((normal * forward).sum(dim=1, keepdim=True) > 0, -normal, normal)
    return Views(None, coverage(mesh, size, azimuth, elevation)[None], normal[None],
                 drawn(mesh.vertices[mesh.faces])[None])
