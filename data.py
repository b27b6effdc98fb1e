"""
The toy world: procedural objects seen as photos (the real domain) and as flat renders (the synthetic domain), Sec. 5.

    python data.py                                  # a contact sheet in assets/world.png, and views/s
    python data.py --size 64 --out sheet.png
    python data.py export objects --num 8           # toy objects on disk, in the format that real renders come in
    torchrun --nproc_per_node=8 data.py encode objects latents --vae pixart/vae --text_encoder pixart/text_encoder

An object is a category with random proportions, a colour, a material and a light; twenty signed distance functions of
a few primitives say where its surface is, and orthographic rays are sphere-traced. A photo shows the material, the
light, the shadow, the grain; a render shows the plain colour and nothing else. Control maps are normals and positions;
of a mesh, the toy's or a user's OBJ or GLB, a rasteriser draws the same; of objects rendered elsewhere, files hold it.

Frame of the object (and of the world): y up, z to the front; the camera of azimuth 0 stands at +z and sees the front
with x to the right of the image; the camera of azimuth 90 stands at +x and sees the side that was on the right.
Everything lies in the cube [-0.5, 0.5]^3; an image spans [-EXTENT, EXTENT]; pixel (row i, column j) is centred at
(j + 0.5, i + 0.5). Images are (B, V, C, H, W).
"""
import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from dit import PRESETS, launch, load_tensors, read_metadata, run_cli, save_tensors, up_to_date

WORLD_VERSION = 1                       # raise it when pixels or captions change: cached sets are then made again
VIEWS = ("front", "right", "back", "left")
AZIMUTHS = (0, 90, 180, 270)            # degrees, one per word in VIEWS
ELEVATION = 20                          # degrees
EXTENT = 0.55                           # half the width of the image in the object's units
SEEDS = dict(base=1, synthetic=2, evaluation=3, validation=4, photos=5)     # held-out objects are never trained on

STYLES = ("photo", "render", "cartoon", "sketch", "watercolor")
MATERIALS = ("wooden", "marble", "brick", "spotted", "striped", "metal")
PALETTE = {"red": (.80, .13, .12), "yellow": (.90, .72, .10), "green": (.15, .58, .20), "blue": (.15, .32, .80),
           "purple": (.48, .18, .62), "pink": (.90, .45, .62), "brown": (.45, .27, .13), "gray": (.50, .50, .52)}
COLORS = tuple(PALETTE)
BACKDROPS = {"white": ((1., 1., 1.),) * 2, "gray": ((.72, .72, .72),) * 2, "black": ((.06, .06, .06),) * 2,
             "blue": ((.62, .74, .92),) * 2, "green": ((.66, .86, .66),) * 2, "beige": ((.93, .86, .72),) * 2,
             "sky": ((.35, .60, .92), (.88, .94, .98)), "sunset": ((.35, .25, .50), (.98, .65, .35))}   # top, bottom
BACKGROUNDS = tuple(BACKDROPS)

# ---------------------------------------------------------------------------------------------------------------------
# Signed distances. A point p is a tuple (x, y, z) of tensors (M,). Flat-sided shapes are a maximum over their sides,
# which never exceeds the true distance, so marching is safe, and it is the cheapest form.

def length(*xs):
    return sum(x * x for x in xs).sqrt()


def at(p, x=0., y=0., z=0.):
    return p[0] - x, p[1] - y, p[2] - z


def maximum(first, *rest):
    for other in rest:
        first = torch.maximum(first, other)
    return first


def minimum(first, *rest):
    for other in rest:
        first = torch.minimum(first, other)
    return first


def sphere(p, r):
    return length(*p) - r


def box(p, x, y, z):
    """Half sizes x, y, z."""
    return maximum(p[0].abs() - x, p[1].abs() - y, p[2].abs() - z)


def ellipsoid(p, x, y, z):
    """Half axes x, y, z; first order near the surface."""
    a, b = length(p[0] / x, p[1] / y, p[2] / z), length(p[0] / x**2, p[1] / y**2, p[2] / z**2)
    return a * (a - 1) / b.clamp(min=1e-6)


def cone(p, y0, y1, r0, r1):
    """Upright, from radius r0 at height y0 to radius r1 at height y1; r0 = r1 is a cylinder."""
    slope = (r0 - r1) / (y1 - y0)
    side = (length(p[0], p[2]) - r0 + (p[1] - y0) * slope) / (1 + slope**2)**.5
    return maximum(side, p[1] - y1, y0 - p[1])


def torus(p, radius, r):
    """Around the y axis; along_x(p) or along_z(p) in place of p turns it."""
    return length(length(p[0], p[2]) - radius, p[1]) - r


def along_x(p):
    return p[1], p[0], p[2]


def along_z(p):
    return p[0], p[2], p[1]


# One short function per category: points and proportions a, b, c in [0, 1] -> distance to the body and to the accented
# parts (a darker or lighter tone of the colour, so that a flat render still shows them), None if there are none.
# Nothing is thinner than two pixels of a 32-pixel view (0.08).

def ball(p, a, b, c):
    return sphere(p, .34 + .1 * a), None


def cube(p, a, b, c):
    return box(p, .27 + .08 * a, .27 + .08 * b, .27 + .08 * c), None


def cylinder(p, a, b, c):
    r, h = .2 + .14 * a, .28 + .14 * b
    return cone(p, -h, h, r, r), None


def cone_(p, a, b, c):
    h = .34 + .1 * b
    return cone(p, -h, h, .28 + .12 * a, .02 + .05 * c), None


def donut(p, a, b, c):
    dough = torus(along_z(p), .28, .11 + .05 * a)
    return dough, maximum(dough - .015, .02 - p[2])                     # icing on the front


def snowman(p, a, b, c):
    low, top = .2 + .05 * a, .13 + .03 * b
    body = minimum(sphere(at(p, y=-.25), low), sphere(at(p, y=.1), top + .01))
    hat = minimum(cone(p, .3, .47, .11, .11), cone(p, .27, .32, .18, .18))
    return minimum(body, sphere(at(p, y=.1), top + .03)), minimum(hat, sphere(at(p, y=.1, z=top + .05), .055))


def mushroom(p, a, b, c):
    cap = maximum(ellipsoid(at(p, y=.02), .34 + .1 * a, .3 + .1 * b, .34 + .1 * a), .02 - p[1])
    return cap, cone(p, -.42, .05, .13 + .06 * c, .1 + .05 * c)


def legs(p, x, z, y0, y1, half=.05):
    return box((p[0].abs() - x, p[1] - (y0 + y1) / 2, p[2].abs() - z), half, (y1 - y0) / 2, half)


def table(p, a, b, c):
    x, z, top = .34 + .1 * a, .24 + .1 * b, .12 + .1 * c
    return box(at(p, y=top), x, .055, z), legs(p, x - .06, z - .06, -.38, top)


def lamp(p, a, b, c):
    foot = minimum(cone(p, -.45, -.35, .18 + .06 * b, .16), cone(p, -.4, .2, .05, .05))
    return cone(p, 0., .42, .24 + .1 * a, .12 + .06 * c), foot


def rocket(p, a, b, c):
    r, top = .13 + .04 * a, .12 + .08 * b
    fins = box(at((p[0].abs(), p[1], p[2]), x=r + .05, y=-.3), .08 + .03 * c, .13, .045)
    window = sphere(at(p, y=top - .12, z=r), .075)
    return minimum(cone(p, -.4, top, r, r), fins), minimum(cone(p, top, .48, r, .02), window)


def tree(p, a, b, c):
    r = .28 + .1 * a
    leaves = minimum(cone(p, -.25, .2, r, .08), cone(p, .02 + .06 * b, .47, r * .78, .02))
    return leaves, cone(p, -.45, -.2, .08 + .04 * c, .08 + .04 * c)


def house(p, a, b, c):
    x, z, eave = .26 + .07 * a, .26 + .07 * b, .0
    roof = maximum((p[0].abs() - x - .06 + p[1] - eave) * .7071, p[2].abs() - z - .04, eave - p[1])
    chimney = box(at(p, x=x * .62, y=.22, z=-z * .4), .06, .16, .06)
    door = box(at(p, x=-.08 + .16 * c, y=-.28, z=z), .07, .12, .02)
    return minimum(box(at(p, y=(eave - .4) / 2), x, .2, z), chimney), minimum(roof, door)


def mug(p, a, b, c):
    r, h = .22 + .06 * a, .27 + .08 * b
    q = at(p, x=-.06)
    cup = maximum(cone(q, -h, h, r, r), -cone(q, -h + .08, h + .1, r - .07, r - .07))
    handle = torus(along_z(at(p, x=r - .04)), .14 + .02 * c, .045)
    return cup, maximum(handle, r - .02 - q[0])


def dumbbell(p, a, b, c):
    q, r = along_x(p), .17 + .06 * a
    ends = cone((q[0], q[1].abs(), q[2]), .22, .42, r, r - .06 * b)
    return ends, cone(q, -.3, .3, .065 + .02 * c, .065 + .02 * c)


def stool(p, a, b, c):
    r, top = .2 + .07 * a, .18 + .1 * b
    return cone(p, top, top + .12, r, r), legs(p, r * .62, r * .62, -.42, top + .02)


def tower(p, a, b, c):
    r, top = .15 + .05 * a, .14 + .08 * b
    crown = maximum(cone(p, top, top + .16, r + .07, r + .07), -box(at(p, y=top + .17), .06, .09, .6))
    door = cone(along_z(at(p, y=-.33)), 0., r + .09, .08, .08)
    flag = box(at(p, x=.3, y=.0), .12, .07, .045)
    return minimum(cone(p, -.46, top, r + .07, r), maximum(crown, -box(at(p, y=top + .17), .6, .09, .06))), \
        minimum(maximum(door, -.46 - p[1]), flag)


def chair(p, a, b, c):
    x, seat = .2 + .07 * a, -.1 + .1 * b
    back = box(at(p, y=(seat + .42) / 2, z=-x + .05), x, (.42 - seat) / 2, .05)
    return minimum(box(at(p, y=seat), x, .055, x), back), legs(p, x - .05, x - .05, -.44, seat)


def car(p, a, b, c):
    z = .38 + .07 * a
    cabin = box(at(p, y=.08, z=-.08 - .05 * c), .17, .12 + .04 * b, .2)
    wheels = cone(along_x(at((p[0].abs(), p[1], p[2].abs()), x=.2, y=-.2, z=.25)), -.06, .06, .1, .1)
    return minimum(box(at(p, y=-.1), .22, .1, z), cabin), wheels


def duck(p, a, b, c):
    body = ellipsoid(at(p, y=-.16, z=-.06), .23 + .05 * a, .2 + .04 * b, .34 + .03 * c)
    beak = ellipsoid(at(p, y=.17, z=.36), .09, .05, .11)
    wings = ellipsoid(at((p[0].abs(), p[1], p[2]), x=.23 + .05 * a, y=-.12, z=-.1), .05, .09, .16)
    return minimum(body, sphere(at(p, y=.2, z=.18), .16 + .02 * a)), minimum(beak, wings)


def teapot(p, a, b, c):
    r = .24 + .04 * a
    spout = cone((p[0] - .22 - .25 * (p[1] + .1), p[1], p[2]), -.16, .2, .09, .055) * .9
    handle = maximum(torus(along_z(at(p, x=-r, y=.02)), .13 + .02 * b, .045), p[0] + r - .06)
    lid = minimum(cone(p, r * .62, r * .62 + .07, .17, .13), sphere(at(p, y=r * .62 + .12), .07))
    return minimum(ellipsoid(at(p, y=-.05), r, r * (.85 + .1 * c), r), spout), minimum(handle, lid)


SHAPES = dict(ball=ball, cube=cube, cylinder=cylinder, cone=cone_, donut=donut, snowman=snowman, mushroom=mushroom,
              table=table, lamp=lamp, rocket=rocket, tree=tree, house=house, mug=mug, dumbbell=dumbbell, stool=stool,
              tower=tower, chair=chair, car=car, duck=duck, teapot=teapot)
CATEGORIES = tuple(SHAPES)

# ---------------------------------------------------------------------------------------------------------------------
# Captions: "photo of a red wooden mug, front view, white background".

TEXT_LENGTH = 14
VOCAB = tuple(dict.fromkeys(("<pad>", "<end>", "a", "of", "view", "background",
                             *STYLES, *COLORS, *MATERIALS, *CATEGORIES, *VIEWS, *BACKGROUNDS)))
WORDS = {word: i for i, word in enumerate(VOCAB)}


def caption(style, color, material, category, view=None, background=None):
    """The words of one image; style, view and background are left out where None: "a red wooden mug"."""
    text = f"{style} of " if style else ""
    text += f"a {color} {material} {category}"
    text += f", {view} view" if view else ""
    return text + (f", {background} background" if background else "")


def tokenize(captions):
    """list of N captions -> (N, TEXT_LENGTH) int64, ended by <end> and padded with 0. "" is the null caption.

    Raises ValueError for an unknown word (with the nearest known ones) and for a caption that is too long.
    """
    tokens = torch.zeros(len(captions), TEXT_LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, captions):
        words = text.lower().replace(",", " ").split()
        for word in words:
            if word not in WORDS:
                near = difflib.get_close_matches(word, VOCAB[2:], n=3, cutoff=0.5)
                near = f"; did you mean {' or '.join(near)}?" if near else f"; known words: {' '.join(VOCAB[2:])}"
                raise ValueError(f"unknown word '{word}' in caption '{text}'{near}")
        if len(words) >= TEXT_LENGTH:
            raise ValueError(f"caption '{text}' has {len(words)} words, the toy world reads at most {TEXT_LENGTH - 1}")
        ids = [WORDS[word] for word in words] + [WORDS["<end>"]]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Objects.

class Assets(NamedTuple):
    """N objects: what decides their shape and their looks."""
    category: torch.Tensor              # (N,)   index into CATEGORIES
    color: torch.Tensor                 # (N,)   index into COLORS
    material: torch.Tensor              # (N,)   index into MATERIALS
    shape: torch.Tensor                 # (N, 3) proportions in [0, 1]
    light: torch.Tensor                 # (N, 3) unit vector towards the light, in the object's frame


def uniforms(num, seed, width, first=0):
    """(num, width) float64 in [0, 1), rows first to first + num; row k depends on (seed, k) alone."""
    rows = [np.random.default_rng([seed, k]).random(width) for k in range(first, first + num)]
    return torch.from_numpy(np.stack(rows))


def sample_assets(num, seed):
    """num random objects; object k depends on (seed, k) alone, not on num."""
    if num < 1:
        raise ValueError(f"num={num}: ask for at least one object")
    u = uniforms(num, seed, 8)
    pick = lambda column, choices: (u[:, column] * len(choices)).long()
    azimuth, elevation = 2 * math.pi * u[:, 6], torch.deg2rad(35 + 40 * u[:, 7])
    light = [elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()]
    return Assets(pick(0, CATEGORIES), pick(1, COLORS), pick(2, MATERIALS), u[:, 3:6].float(),
                  torch.stack(light, dim=1).float())


def take(assets, index):
    """The objects at index (slice or tensor)."""
    return Assets(*(field[index] for field in assets))


def asset_captions(assets, style=None, view=None, background=None):
    """One caption per object; style, view and background are None, one word for all, or a list of N."""
    n = len(assets.category)
    style, view, background = ([x] * n if x is None or isinstance(x, str) else x for x in (style, view, background))
    return [caption(style[k], COLORS[assets.color[k]], MATERIALS[assets.material[k]], CATEGORIES[assets.category[k]],
                    view[k], background[k]) for k in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# The camera and the tracer.

def camera(azimuth, elevation=ELEVATION):
    """Degrees, numbers or tensors (...,) -> right, up, forward: three unit axes (..., 3) in the object's frame."""
    a, e = torch.deg2rad(torch.as_tensor(azimuth, dtype=torch.float32)), math.radians(elevation)
    sin, cos, se, ce = a.sin(), a.cos(), math.sin(e), math.cos(e)
    right = torch.stack([cos, 0 * a, -sin], dim=-1)
    up = torch.stack([-se * sin, ce + 0 * a, -se * cos], dim=-1)
    return right, up, torch.stack([-ce * sin, -se + 0 * a, -ce * cos], dim=-1)


def project(position, azimuth, elevation=ELEVATION, size=None):
    """Positions (..., 3, H, W) seen from azimuth (...,) -> column, row in pixels of an image of `size` (default W), and
    depth, each (..., H, W)."""
    right, up, forward = (axis.to(position)[..., None, None] for axis in camera(azimuth, elevation))
    size = size or position.shape[-1]
    x, y, depth = ((axis * position).sum(dim=-3) for axis in (right, up, forward))
    return (x / EXTENT + 1) * size / 2, (1 - y / EXTENT) * size / 2, depth


def bilinear(maps, column, row):
    """Bilinear values of maps (B, C, H, W) at pixel coordinates (B, H', W'), centres at + 0.5 -> (B, C, H', W')."""
    height, width = maps.shape[-2:]
    grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], dim=-1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def trace(distance, shape, azimuth, size, elevation=ELEVATION, steps=64, tolerance=3e-4):
    """Sphere-trace size x size orthographic rays, one per pixel centre, for each of B views.

    distance(p, a, b, c) -> (body, accent or None); shape (B, 3); azimuth (B,). Returns the rays that hit: their place
    in the flattened (B, size, size) grid (M,), points (3, M), unit normals (3, M), and whether they hit an accent (M,).
    """
    device = shape.device
    right, up, forward = (axis.to(device) for axis in camera(azimuth, elevation))                   # (B, 3)
    s = ((torch.arange(size, device=device) + 0.5) / size * 2 - 1) * EXTENT
    origin = right[:, :, None, None] * s - up[:, :, None, None] * s[:, None]                         # (B, 3, S, S)
    way = forward.where(forward.abs() > 1e-6, torch.tensor(1e-6, device=device))[:, :, None, None]
    near = ((-0.5 * way.sign() - origin) / way).amax(dim=1).flatten()       # where a ray enters and leaves the cube
    far = ((0.5 * way.sign() - origin) / way).amin(dim=1).flatten()
    ray = (near < far).nonzero()[:, 0]
    view = ray // size**2
    origin = origin.movedim(1, 0).reshape(3, -1)[:, ray]
    state = torch.cat([origin + forward.T[:, view] * near[ray], forward.T[:, view], shape.T[:, view],
                       near[None, ray], far[None, ray]])                                             # (11, M)
    found, found_ray = [], []
    for _ in range(steps):
        p, d, abc, t, end = state[:3], state[3:6], state[6:9], state[9], state[10]
        step = nearest(distance(p.unbind(), *abc.unbind()))
        hit = step < tolerance
        step = step * ~hit                                          # a ray that hit stays, whenever it is taken out
        p.addcmul_(d, step)
        t.add_(step)
        gone = hit | (t > end)
        if gone.sum() > 0.2 * len(gone):                            # go on with the rays that can still hit, alone
            found.append(state[:9, hit])
            found_ray.append(ray[hit])
            state, ray = state[:, ~gone], ray[~gone]
        if len(ray) == 0:
            break
    else:
        hit = nearest(distance(state[:3].unbind(), *state[6:9].unbind())) < 5 * tolerance
        found.append(state[:9, hit & (state[9] <= state[10])])
        found_ray.append(ray[hit & (state[9] <= state[10])])
    ray, order = torch.cat(found_ray).sort()
    state = torch.cat(found, dim=1)[:, order]
    p, forward, abc = state[:3], state[3:6], state[6:9]
    p = p + forward * nearest(distance(p.unbind(), *abc.unbind()))
    normal = gradient(distance, p, abc)
    normal = normal - forward * (normal * forward).sum(dim=0).clamp(min=0)  # at an edge the difference may look away
    body, accent = distance(p.unbind(), *abc.unbind())
    accented = torch.zeros_like(body, dtype=torch.bool) if accent is None else accent < body
    return ray, p, F.normalize(normal, dim=0), accented


def nearest(parts):
    """Distance (M,) to an object from its distances to (body, accent or None)."""
    return parts[0] if parts[1] is None else torch.minimum(*parts)


def gradient(distance, p, abc, h=1e-3):
    """Unit gradient (3, M) by four differences at the corners of a tetrahedron."""
    corners = torch.tensor([[1., -1, -1, 1], [-1, -1, 1, 1], [-1, 1, -1, 1]], device=p.device)      # (3, 4)
    points = (p[:, None] + h * corners[:, :, None]).flatten(1)                                       # (3, 4 M)
    d = nearest(distance(points.unbind(), *abc.repeat(1, 4).unbind())).view(4, -1)
    return F.normalize(corners @ d, dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Shading.

def texture(p, normal, color, material):
    """Solid textures: points, normals, colours (3, M) and material (M,) -> colours (3, M).

    Periods are at least five pixels of a 32-pixel view, so that one view predicts another (the 30 dB of the oracle).
    """
    x, y, z = p
    wave = lambda value, period: 0.5 + 0.5 * torch.sin(2 * math.pi / period * value)
    soft = lambda value, sharp: torch.sigmoid(sharp * value)
    rings = wave(length(x + .12, z - .16) + .25 * y, .22)
    veins = wave(x + .6 * y - .5 * z + .08 * torch.sin(8 * y + 5 * z), .46)**2
    row = torch.floor(y / .22)
    joint = lambda u: torch.exp(-((u - u.floor() - .5) / .16)**2)
    mortar = maximum(joint(y / .22 + .5), joint((x + z) / .4 + .5 * row) * .8)
    spots = soft(wave(x + .3 * y, .3) + wave(y - .3 * z, .3) + wave(z + .3 * x, .3) - 1.9, 7)
    stripes = soft(wave(y + .45 * x - .2 * z, .26) - .5, 6)
    sheen = (.5 + .5 * normal[1])**2
    white, dark = torch.ones_like(color), color * .42
    mix = lambda a, b, w: a + (b - a) * w
    choices = [mix(color, color * .5 + .03, rings),                            # in the order of MATERIALS
               mix(mix(color, white * .72, .4), dark, veins),
               mix(color, white * .68, mortar * .8),
               mix(color, dark, spots),
               mix(color, white * .7, stripes * .8),
               mix(mix(color, white * .5, .35) * .55, mix(color, white * .72, .45), sheen)]
    return torch.stack(choices).gather(0, material.expand(1, 3, -1))[0]


def light_up(distance, p, normal, abc, light, forward):
    """Ambient occlusion, light that arrives (with the shadow the object casts on itself), highlight; each (M,)."""
    occlusion = 0
    for h in (.06, .14, .24):
        d = nearest(distance((p + h * normal).unbind(), *abc.unbind()))
        occlusion = occlusion + (h - d).clamp(min=0) / h / 3
    facing = (normal * light).sum(dim=0)
    lit = (facing > 0).nonzero()[:, 0]
    start, toward, q = (p + .015 * normal)[:, lit], light[:, lit], abc[:, lit]
    t, free = torch.full_like(facing[lit], .02), torch.ones_like(facing[lit])
    for _ in range(9):                                                  # soft shadow: how near does the ray pass by?
        d = nearest(distance((start + toward * t).unbind(), *q.unbind()))
        free = torch.minimum(free, 5 * (d + .005) / t)
        t = t + d.clamp(.04, .2)
    arrives = torch.zeros_like(facing).index_copy(0, lit, free.clamp(0, 1) * facing[lit])
    half = F.normalize(light - forward, dim=0)
    return 1 - .75 * occlusion, arrives, (normal * half).sum(dim=0).clamp(min=0)**12 * (arrives > 0) * arrives


class Views(NamedTuple):
    """N objects drawn in V views, with their maps."""
    rgb: torch.Tensor                   # (N, V, 3, H, W) in [0, 1]
    mask: torch.Tensor                  # (N, V, 1, H, W) share of the pixel's supersamples that hit, in [0, 1]
    normal: torch.Tensor                # (N, V, 3, H, W) unit, object's frame, 0 off the object, at the pixel centre
    position: torch.Tensor              # (N, V, 3, H, W) in [-0.5, 0.5], likewise; both None with geometry=False


def one_each(value, n, known, what):
    """One word or a list of n -> list of n known words."""
    value = [value] * n if isinstance(value, str) else list(value)
    for word in value:
        if word not in known:
            raise ValueError(f"unknown {what} '{word}', choose from: {', '.join(known)}")
    if len(value) != n:
        raise ValueError(f"{len(value)} {what}s for {n} objects, give one or one each")
    return value


@torch.no_grad()
def render(assets, azimuth=AZIMUTHS, style="photo", background="white", size=32, supersample=2, geometry=True, seed=0,
           elevation=ELEVATION, device="cpu"):
    """Draw N objects in V views -> Views on the CPU.

    azimuth: V degrees for all or a tensor (N, V); style, background: one word or a list of N. The grain of object n is
    a function of seed + n alone.
    """
    n = len(assets.category)
    azimuth = torch.as_tensor(azimuth, dtype=torch.float32)
    azimuth = azimuth.expand(n, -1) if azimuth.ndim == 1 else azimuth
    if azimuth.ndim != 2 or len(azimuth) != n:
        raise ValueError(f"azimuth has shape {tuple(azimuth.shape)}, give V numbers or a tensor ({n}, V)")
    style, background = one_each(style, n, STYLES, "style"), one_each(background, n, BACKGROUNDS, "background")
    views = azimuth.shape[1]
    rgb, mask = torch.empty(n, views, 3, size, size), torch.empty(n, views, 1, size, size)
    normal, position = (torch.zeros(n, views, 3, size, size) if geometry else None for _ in range(2))
    groups = {}
    for k in range(n):
        groups.setdefault((int(assets.category[k]), style[k]), []).append(k)
    rays = 1 << (17 if torch.device(device).type == "cpu" else 23)          # a chunk's tensors stay in the CPU's cache
    chunk = max(1, rays // (views * (size * supersample)**2))
    for (category, look), members in groups.items():
        distance = SHAPES[CATEGORIES[category]]
        for part in torch.tensor(members).split(chunk):
            few = Assets(*(field[part].repeat_interleave(views, dim=0).to(device) for field in assets))     # (B, ...)
            turn = azimuth[part].flatten().to(device)
            backdrops = [background[k] for k in part for _ in range(views)]
            color, cover = paint(distance, few, turn, look, backdrops, size, supersample, elevation)
            rgb[part] = color.cpu().view(-1, views, 3, size, size)
            mask[part] = cover.cpu().view(-1, views, 1, size, size)
            if geometry:
                ray, p, nrm, _ = trace(distance, few.shape, turn, size, elevation)
                for out, values in ((normal, nrm), (position, p)):
                    grid = torch.zeros(3, len(turn) * size**2, device=device).index_copy(1, ray, values)
                    out[part] = grid.view(3, -1, views, size, size).permute(1, 2, 0, 3, 4).cpu()
    for k in (k for k in range(n) if style[k] == "photo"):                  # film grain on what the object covers
        grain = torch.randn(views, 1, size, size, generator=torch.Generator().manual_seed(seed + k))
        rgb[k] += 0.010 * mask[k] * grain
    return Views(rgb.clamp_(0, 1), mask, normal, position)


def paint(distance, assets, azimuth, style, backgrounds, size, supersample, elevation):
    """Colours (B, 3, H, W) and coverage (B, 1, H, W) of B objects of one category, in one view and one style each."""
    device, views, fine = azimuth.device, len(azimuth), size * supersample
    ray, p, normal, accent = trace(distance, assets.shape, azimuth, fine, elevation)
    owner = ray // fine**2
    palette = torch.tensor(list(PALETTE.values()), device=device)[assets.color].T                    # (3, B)
    tone = torch.where(palette.mean(dim=0) > .42, palette * .5, palette * .55 + .3)       # of accents
    color = torch.where(accent, tone[:, owner], palette[:, owner])                                   # (3, M)
    light, forward = assets.light.T[:, owner], camera(azimuth, elevation)[2].to(device).T[:, owner]
    lambert = (normal * light).sum(dim=0).clamp(min=0)
    if style == "photo":
        abc, material = assets.shape.T[:, owner], assets.material[owner]
        ambient, arrives, shine = light_up(distance, p, normal, abc, light, forward)
        color = texture(p, normal, color, material)
        color = color * (.66 * ambient * (.9 + .1 * normal[1]) + .58 * arrives)
        color = (color + shine * torch.where(material == 5, .08, .05)).clamp(max=.9)    # never white
    elif style == "cartoon":
        color = (color * 1.15 + .03).clamp(max=.95) * (.62 + .2 * (lambert > .25) + .18 * (lambert > .65))
    elif style == "sketch":
        column, line = ray % fine, ray // fine % fine
        hatch = ((column + line) // supersample % 4 < 2) & (lambert < .55)
        color = (.88 - .3 * hatch - .15 * accent).expand(3, -1)
    elif style == "watercolor":
        x, y, z = p
        wash = .12 * torch.sin(7 * x + 5 * y + 3) * torch.sin(6 * y - 7 * z + 1)
        color = .42 + .52 * color + wash - .12 * (1 - lambert)
    flat = torch.cat([color, torch.ones_like(color[:1]), normal, accent[None].float()])
    grid = torch.zeros(8, views * fine**2, device=device).index_copy(1, ray, flat)
    grid = grid.view(8, views, fine, fine).movedim(1, 0)
    image, cover = grid[:, :3], grid[:, 3:4]
    if style in ("cartoon", "sketch"):                                          # lines where the surface ends or bends
        pool = lambda z: F.max_pool2d(z, 2 * (supersample // 2) + 1, stride=1, padding=supersample // 2)
        line = ((pool(grid[:, 3:]) + pool(-grid[:, 3:])).amax(dim=1, keepdim=True) > .7) * cover
        image = image * (1 - line) + line * (.1 if style == "cartoon" else .3)
    top, bottom = torch.tensor([BACKDROPS[word] for word in backgrounds], device=device).movedim(1, 0)[..., None, None]
    down = torch.linspace(0, 1, fine, device=device)[:, None]
    image = image * cover + (top + (bottom - top) * down) * (1 - cover)
    if style == "watercolor":                                               # colours run
        image = F.avg_pool2d(F.pad(image, (supersample,) * 4, mode="replicate"), 2 * supersample + 1, stride=1)
    return F.avg_pool2d(image, supersample), F.avg_pool2d(cover, supersample)


# ---------------------------------------------------------------------------------------------------------------------
# Meshes: the toy's objects and users' own (D.4), drawn as control maps without a renderer's help.

class Mesh(NamedTuple):
    """Triangles in the object's frame, counter-clockwise as seen from outside."""
    vertices: torch.Tensor              # (M, 3) float32
    faces: torch.Tensor                 # (F, 3) int64


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
    place = lambda p: ((cells + p) / (n - 1) * 2 - 1) * extent           # of p in [0, 1]^3 in each cell
    cuts = []
    for a in range(8):
        for b in (a | bit for bit in (1, 2, 4) if not a & bit):
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
    vertices = place(p)
    number = torch.full((n, n, n), -1)
    number[tuple(cells.unbind(-1))] = torch.arange(len(cells))
    squares = []
    for a in range(3):
        b, c = (a + 1) % 3, (a + 2) % 3
        here, there = inside.narrow(a, 0, n - 1), inside.narrow(a, 1, n - 1)
        edge = (here != there).nonzero()                                # the four cells around it, seen from +a
        step = torch.eye(3, dtype=torch.long)
        square = torch.stack([number[tuple((edge - i * step[b] - j * step[c]).unbind(-1))]
                              for i, j in ((1, 1), (0, 1), (0, 0), (1, 0))], dim=1)
        squares.append(torch.where(here[tuple(edge.unbind(-1))][:, None], square, square.flip(1)))
    squares = torch.cat(squares)
    return Mesh(vertices, torch.cat([squares[:, [0, 1, 2]], squares[:, [0, 2, 3]]]))


def carve(seen, size=64, azimuth=AZIMUTHS, elevation=ELEVATION):
    """The largest shape that fits the silhouettes seen (B, V, 1, H, W) bool, as a share of matter in each of size^3
    cells of the cube [-0.5, 0.5]^3: (B, 1, size, size, size) [x, y, z] in [0, 1], smoothed over 3 cells."""
    B, V = seen.shape[:2]
    line = (torch.arange(size) + 0.5) / size - 0.5
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).view(3, size, size * size)    # a tall "image"
    solid = torch.ones(B, 1, size, size * size)
    for v in range(V):
        right, up, _ = (axis.view(3, 1, 1) for axis in camera(azimuth[v], elevation))
        place = torch.stack([(points * right).sum(0), -(points * up).sum(0)], -1) / EXTENT          # in [-1, 1]
        solid *= F.grid_sample(seen[:, v].float(), place.expand(B, -1, -1, -1), align_corners=False)
    return F.avg_pool3d(F.pad(solid.view(B, 1, size, size, size), (1,) * 6), 3, 1)


def hull_mesh(seen, size=64):
    """Mesh of the shape that `carve` finds for the silhouettes of one object, (V, 1, H, W) bool. Raises ValueError
    where no shape fits them."""
    solid = F.pad(carve(seen[None], size)[0, 0], (1,) * 6)              # nothing lies outside the cube
    return surface_mesh(0.5 - solid, 0.5 * (size + 1) / size)


def asset_mesh(assets, resolution=96):
    """Mesh of one object of the toy world, Assets of length 1, from its distance function."""
    distance, abc = SHAPES[CATEGORIES[int(assets.category[0])]], assets.shape[0][:, None]
    line = torch.linspace(-0.55, 0.55, resolution)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).flatten(1)
    value = nearest(distance(points.unbind(), *abc.expand(3, points.shape[1]).unbind()))
    return surface_mesh(value.view((resolution,) * 3), 0.55, lambda p: gradient(distance, p, abc.expand(3, p.shape[1])))


def corner_normals(mesh, crease=40):
    """Unit normals (F, 3 corners, 3): the mean of the faces around the corner, weighed by area, that lie within
    `crease` degrees of the corner's own face, so that smooth surfaces are smooth and edges stay sharp."""
    p = mesh.vertices[mesh.faces]                                                                   # (F, 3, 3)
    area = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])
    flat = F.normalize(area, dim=1, eps=1e-20)
    order = mesh.faces.flatten().argsort(stable=True)                   # corners (face, k), those of a vertex in a row
    owner, face = mesh.faces.flatten()[order], order // 3
    total, limit = area[face].clone(), math.cos(math.radians(crease))
    for shift in range(1, min(int(owner.bincount().max()), 64)):        # each corner meets (64) others of its vertex
        for a, b in ((slice(None, -shift), slice(shift, None)), (slice(shift, None), slice(None, -shift))):
            near = (owner[a] == owner[b]) & ((flat[face[a]] * flat[face[b]]).sum(dim=1) > limit)
            total[a] += near[:, None] * area[face[b]]
    return F.normalize(torch.empty_like(total).index_copy_(0, order, total), dim=1, eps=1e-20).view(-1, 3, 3)


def rasterize(mesh, size=32, azimuth=AZIMUTHS, elevation=ELEVATION):
    """Which triangle each pixel centre sees, orthographically: face (V, H, W), -1 for none, and its place in it,
    barycentric (V, H, W, 3), 0 for none. A z-buffer; of two triangles at one depth the first in the list wins.

    size: pixels to a side; azimuth: degrees, one a view; elevation: degrees.
    """
    views = [rasterize_view(mesh.vertices[mesh.faces].double(), size, *camera(turn, elevation)) for turn in azimuth]
    return tuple(torch.stack(part) for part in zip(*views))


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
    (x0, x1), (y0, y1) = (((v.amin(dim=1) - 0.5).ceil().clamp(0, size).long(),
                           (v.amax(dim=1) - 0.5).floor().clamp(-1, size - 1).long()) for v in (x, y))
    wide, high = (x1 - x0 + 1).clamp(min=0), (y1 - y0 + 1).clamp(min=0)
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
        column, row = x0[f] + k % wide[f], y0[f] + k // wide[f]
        affine = lambda c: c[f, 0] * (column + 0.5) + c[f, 1] * (row + 0.5) + c[f, 2]
        hit = (affine(plane[:, 0]) >= -1e-9) & (affine(plane[:, 1]) >= -1e-9) & (affine(plane[:, 2]) >= -1e-9)
        key = ((affine(depth) + 4) * 2**27).long() << 32 | f            # the nearest triangle has the smallest key
        front.scatter_reduce_(0, (row * size + column)[hit], key[hit], "amin")
        start = stop
    face = torch.where(front == nothing, -1, front & 0xffffffff).view(size, size)
    place = torch.zeros(size, size, 3)
    row, column = (face >= 0).nonzero(as_tuple=True)
    at = torch.stack([column + 0.5, row + 0.5, torch.ones_like(row)], dim=1).double()
    place[row, column] = (plane[face[row, column]] @ at[:, :, None])[..., 0].float()
    return face, place


def coverage(mesh, size=32, azimuth=AZIMUTHS, elevation=ELEVATION, supersample=4):
    """Share of each pixel that a mesh covers, (V, 1, size, size) in [0, 1], by supersample^2 points a pixel."""
    return F.avg_pool2d((rasterize(mesh, size * supersample, azimuth, elevation)[0] >= 0).float()[:, None], supersample)


def mesh_views(mesh, size=32, azimuth=AZIMUTHS, elevation=ELEVATION):
    """A mesh's maps as `render` gives them for an object: Views of one object, without colours.

    Normals of surfaces seen from behind are turned round, so that open meshes work too.
    """
    face, place = rasterize(mesh, size, azimuth, elevation)
    there = (face >= 0)[:, None]
    mix = lambda corners: (corners[face] * place[..., None]).sum(dim=-2).permute(0, 3, 1, 2) * there    # (V, 3, H, W)
    normal = F.normalize(mix(corner_normals(mesh)), dim=1)
    forward = torch.stack([camera(turn, elevation)[2] for turn in azimuth])[:, :, None, None]
    normal = torch.where((normal * forward).sum(dim=1, keepdim=True) > 0, -normal, normal)
    return Views(None, coverage(mesh, size, azimuth, elevation)[None], normal[None],
                 mix(mesh.vertices[mesh.faces])[None])


def read_mesh(path):
    """Mesh of an OBJ or GLB file, all its parts together, centred and scaled to fit the cube and the four views.

    Normals, colours and textures in the file are not read: normals follow from the shape (`corner_normals`), and faces
    wound the wrong way are turned round. A sheet without thickness has one colour for both its sides. Raises
    FileNotFoundError or ValueError with one line: another format, damaged, empty, compressed, or not finite.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".obj", ".glb"):
        raise ValueError(f"{path}: meshes are read from .obj and .glb files")
    try:
        vertices, faces = (read_obj if kind == ".obj" else read_glb)(path)
    except (KeyError, IndexError, TypeError, AttributeError, struct.error, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is not a readable {kind[1:].upper()} file: {reason}") from None
    if len(faces) == 0:
        raise ValueError(f"{path} holds no triangles")
    if faces.min() < 0 or faces.max() >= len(vertices) or not vertices[faces].isfinite().all():
        raise ValueError(f"{path} holds vertices that are not finite, or faces of vertices that are not there")
    vertices, faces = weld(vertices.double(), faces)
    if len(faces) == 0:
        raise ValueError(f"{path} holds only triangles without area")
    low, high = vertices.amin(dim=0), vertices.amax(dim=0)
    vertices = (vertices - (low + high) / 2) / (high - low).max()
    views = torch.cat([vertices @ axis.double() for turn in AZIMUTHS for axis in camera(turn)[:2]])
    return turned_outwards(Mesh((vertices * min(1., 0.9 * EXTENT / float(views.abs().max()))).float(), faces))


def weld(vertices, faces):
    """Joins vertices (M, 3) at the same place; leaves out faces (F, 3) without area, and vertices without a face."""
    p = vertices[faces]
    p = p[torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]).norm(dim=1) > 0]
    vertices, index = p.flatten(0, 1).unique(dim=0, return_inverse=True)
    return vertices, index.view(-1, 3)


def turned_outwards(mesh):
    """Turns round each face that the four views see more from behind, and those they do not see if most are."""
    face, _ = rasterize(mesh, 128)
    p = mesh.vertices[mesh.faces]
    normal = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])
    votes = torch.zeros(len(mesh.faces))
    for seen, turn in zip(face, AZIMUTHS):
        pixels = seen[seen >= 0].bincount(minlength=len(votes))
        votes += pixels * (normal @ camera(turn)[2]).sign()             # above 0: from behind
    behind = torch.where(votes == 0, votes.sum() > 0, votes > 0)
    return Mesh(mesh.vertices, torch.where(behind[:, None], mesh.faces.flip(1), mesh.faces))


def read_obj(path):
    """Vertices (M, 3) and triangles (F, 3) of an OBJ file. Raises ValueError or IndexError naming a line."""
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
                    faces += fan(index, vertices)
            except (ValueError, IndexError) as error:
                raise ValueError(f"line {number} cannot be read ({error}): {line.strip()[:60]}") from None
    return torch.tensor(vertices, dtype=torch.float64).view(-1, 3), torch.tensor(faces, dtype=torch.long).view(-1, 3)


def fan(index, vertices):
    """Cuts a polygon, the numbers of its vertices, into triangles around the first of its corners from which none lies
    the wrong way round. Raises ValueError where there is no such corner."""
    p, n = np.array([vertices[k] for k in index]), len(index)
    if n == 3:
        return [index]
    whole = np.cross(p, np.roll(p, -1, axis=0)).sum(axis=0)             # twice the area, along the normal
    for first in range(n):
        ring = [(first + k) % n for k in range(n)]
        parts = [(ring[0], a, b) for a, b in zip(ring[1:], ring[2:])]
        if all(np.cross(p[a] - p[o], p[b] - p[o]) @ whole >= -1e-9 * (whole @ whole) for o, a, b in parts):
            return [[index[k] for k in part] for part in parts]
    raise ValueError("a polygon too concave for a fan: triangulate on export")


GLB_TYPES = {5121: "<u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
GLB_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def read_glb_chunks(path):
    """(JSON as a dict, binary chunk) of a GLB file (glTF 2.0, section 4.4)."""
    content = Path(path).read_bytes()
    magic, version, _ = struct.unpack_from("<4sII", content)
    if magic != b"glTF" or version != 2:
        raise ValueError("it is not binary glTF 2")
    length, = struct.unpack_from("<I", content, 12)
    return json.loads(content[20:20 + length]), content[20 + length + 8:]


def glb_accessor(gltf, binary, number):
    """The array of an accessor (n, width)."""
    accessor = gltf["accessors"][number]
    view, kind, width = gltf["bufferViews"][accessor["bufferView"]], GLB_TYPES[accessor["componentType"]], \
        GLB_WIDTHS[accessor["type"]]
    item = np.dtype(kind).itemsize
    start, stride = view.get("byteOffset", 0) + accessor.get("byteOffset", 0), view.get("byteStride", item * width)
    return np.ndarray((accessor["count"], width), kind, binary, start, (stride, item)).copy()


def read_glb(path):
    """Vertices (M, 3) and triangles (F, 3) of all meshes in a GLB file's scene, each moved to its place."""
    gltf, binary = read_glb_chunks(path)
    packed = {"KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_mesh_quantization"}
    if packed & set(gltf.get("extensionsRequired", ())):
        raise ValueError("it is compressed: export it without mesh compression")
    vertices, faces, base, visits = [], [], 0, 0
    scene = gltf.get("scenes", [{"nodes": range(len(gltf.get("nodes", ())))}])[gltf.get("scene", 0)]
    stack = [(number, np.eye(4)) for number in scene.get("nodes", ())]
    while stack:
        number, above = stack.pop()
        visits += 1
        if visits > 10**6:
            raise ValueError("its nodes form a circle")
        node = gltf["nodes"][number]
        place = above @ node_matrix(node)
        stack += [(child, place) for child in node.get("children", ())]
        for part in gltf["meshes"][node["mesh"]]["primitives"] if "mesh" in node else ():
            if part.get("mode", 4) != 4:
                raise ValueError("it holds lines, points or strips: export it as triangles")
            points = glb_accessor(gltf, binary, part["attributes"]["POSITION"]).astype(np.float64)
            index = glb_accessor(gltf, binary, part["indices"]).astype(np.int64) if "indices" in part else \
                np.arange(len(points))
            vertices.append(points @ place[:3, :3].T + place[:3, 3])
            faces.append(index.reshape(-1, 3)[:, ::1 if np.linalg.det(place[:3, :3]) > 0 else -1] + base)
            base += len(points)
    if not faces:
        return torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)
    return torch.from_numpy(np.concatenate(vertices)), torch.from_numpy(np.concatenate(faces))


def node_matrix(node):
    """The 4 x 4 transform of a glTF node, from its matrix or its scale, rotation (x, y, z, w) and translation."""
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    turn = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                     [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                     [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn * np.array(node.get("scale", (1, 1, 1)))
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


# ---------------------------------------------------------------------------------------------------------------------
# Rendered objects on disk: a folder each, with square images of one size. Two layouts are read; v numbers the views.
#
# Our own: four views, 000 .. 003.
#   meta.json       {"caption": "a red mug", "azimuths": [0, 90, 180, 270], "elevation": 20, "extent": 0.55}: cameras
#                   as in `camera`, orthographic; extent is half the width of an image in the object's units
#   color_v.png     RGBA, alpha = coverage; or RGB before white
#   normal_v.png    n / 2 + 0.5, n in the object's frame (see the top of this file); of 16 bits the upper 8 are read
#   position_v.npy  p + 0.5 for p in [-0.5, 0.5], float (H, W, 3), NaN off the object; or .png, white off it
#
# Objaverse-Ortho10View (of MV-Adapter), z up: any number of views, of which the four at AZIMUTHS are taken.
#   meta.json       "locations", each with "index" (v = 0000 ..), "transform_matrix" (4 x 4, camera to world; the camera
#                   looks along its -z, y is up), "ortho_scale" (an image's width in the world's units), and perhaps
#                   "projection_type"
#   color_v.webp    as above; normal_v.webp likewise, n in the world's frame
#   depth_v.exr     or .npy, (H, W): distance from the camera's plane; 0, huge or not finite off the object
#
# A caption that meta.json lacks is read from caption.txt.

def object_folders(root):
    """Sorted list of the folders (Path) in root that hold a meta.json. Raises FileNotFoundError where root is no
    folder, ValueError where it has none of them."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no such folder: {root}")
    found = sorted(path.parent for path in Path(root).glob("*/meta.json") if path.parent.suffix != ".tmp")
    if not found:
        raise ValueError(f"{root} has no folder of a rendered object, ID/meta.json with its images (see data.py)")
    return found


def read_object(folder):
    """(caption, Views) of one rendered object in either layout: N = 1, V = 4 at AZIMUTHS, rgb before white.

    Positions are scaled so that an image spans EXTENT to each side, as `project` has it. A pixel at an edge whose
    normal or position is mostly background does not count as object. Raises FileNotFoundError or ValueError, naming
    the file, where one is missing, damaged, of another size, or does not fit its camera.
    """
    folder = Path(folder)
    path = first_of(folder / "meta", ".json")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        text = meta.get("caption")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not readable JSON, an object {{..}}: {error}") from None
    if text is None and (folder / "caption.txt").is_file():
        text = (folder / "caption.txt").read_text(encoding="utf-8", errors="replace").strip()
    if not text or not isinstance(text, str):
        raise ValueError(f'{path} has no caption: add "caption": "a red mug", or a file caption.txt beside it')
    elevation, extent, views = (read_ortho10view if "locations" in meta else read_own)(folder, meta)
    size, maps = views[0][1].shape[-1], []
    for azimuth, (files, color, normal, position, step) in zip(AZIMUTHS, views):
        for file, values in zip(files, (color[:3], normal, position)):
            if values.shape != (3, size, size):
                raise ValueError(f"{file} has the shape {tuple(values.shape)}, not (3, {size}, {size}): images are "
                                 f"square and as wide as {views[0][0][0].name}")
        scale = EXTENT / extent
        maps.append(checked_maps(files, color, normal, position * scale, step * scale, azimuth, elevation))
    views = Views(*(torch.stack(part)[None] for part in zip(*maps)))
    if not views.normal.any():
        raise ValueError(f"{folder}: no view shows an object")
    return text, views


def checked_maps(files, color, normal, position, step, azimuth, elevation):
    """One view's rgb (3, H, W), mask (1, H, W), normal and position (3, H, W) as in `Views`.

    files: color's, normal's and position's, which a ValueError names; color (3 or 4, H, W); position: NaN off the
    object, exact to `step`. All checks but the last are of pixels that the object fills, as others are mixtures.
    """
    known = position.isfinite().all(dim=0)
    mask = color[3] if len(color) == 4 else known.float()
    full = known & (mask > 0.99)
    norm, reach, limit = normal.norm(dim=0), position.abs().amax(dim=0), 0.505 + step   # half floats are off by 0.002
    if full.any():
        gap = float((norm - 1).abs()[full].median())
        if gap > 0.05:                  # 8 bits give 0.01 and edges are few; a forgotten gamma gives 0.2
            raise ValueError(f"{files[1]}: its normals are off unit length by {gap:.2f} (median): n / 2 + 0.5 is read")
        forward = camera(azimuth, elevation)[2][:, None, None]
        if (normal * forward).sum(dim=0)[full].median() > 0:
            raise ValueError(f"{files[1]}: most of its normals look away from the camera: are they in another frame?")
        if reach[full].max() > limit:
            raise ValueError(f"{files[2]}: a position is {reach[full].max():.3f} from the middle, more than 0.5 (where "
                             f"an image spans {EXTENT}): make the object smaller, or the image wider")
        column, row, _ = project(position, azimuth, elevation)
        line = torch.arange(color.shape[-1]) + 0.5
        gap = float(torch.hypot(column - line, row - line[:, None])[full].median())
        if gap > 1 + step * len(line) / (2 * EXTENT):
            raise ValueError(f"{files[2]} lies {gap:.1f} pixels off its camera (median), azimuth {azimuth}, elevation "
                             f"{elevation:g}: do the cameras in meta.json fit?")
    apart = (known & (mask == 0)) | (~known & (mask > 0.99))
    if apart.sum() > 0.25 * known.sum():                                # edges alone: 0.12 at 16 pixels, 0.01 at 64
        raise ValueError(f"{files[2]}: the object is not where {files[0].name} is opaque, {int(apart.sum())} pixels "
                         f"differ and {int(known.sum())} have a position")
    there = known & ((norm - 1).abs() < 0.5) & (reach <= limit)
    return (color[:3] * mask + 1 - mask if len(color) == 4 else color, mask[None],
            F.normalize(normal, dim=0).masked_fill(~there, 0), position.clamp(-0.5, 0.5).masked_fill(~there, 0))


def read_own(folder, meta):
    """Elevation, extent and, for each of the four views of a folder in our own layout, the files of colour, normal and
    position, what they hold (3 or 4, H, W), and the position's step."""
    path, turns, elevation, extent = folder / "meta.json", *(meta.get(k) for k in ("azimuths", "elevation", "extent"))
    if turns != list(AZIMUTHS):
        raise ValueError(f"{path} has the azimuths {turns}, the model takes {list(AZIMUTHS)}")
    for name, value, low, high in (("elevation", elevation, -90, 90), ("extent", extent, 0, math.inf)):
        if not isinstance(value, (int, float)) or not low < value < high:
            raise ValueError(f"{path}: {name} must be a number between {low} and {high}, not {value}")
    views = []
    for v in range(len(AZIMUTHS)):
        files = [first_of(folder / f"{name}_{v:03}", *kinds) for name, *kinds in
                 (("color", ".png"), ("normal", ".png"), ("position", ".npy", ".png"))]
        color, normal, position = (read_pixels(file).movedim(-1, 0) for file in files)
        exact, position = files[2].suffix == ".npy", position[:3] - 0.5
        if not exact:
            position = position.masked_fill((position == 0.5).all(dim=0), math.nan)
        elif (~position.isfinite().all(dim=0) & ~position.isnan().all(dim=0)).any():
            raise ValueError(f"{files[2]} holds infinite values, or pixels that are NaN in part")
        views.append((files, color, 2 * normal[:3] - 1, position, 0 if exact else 1 / 255))
    return elevation, extent, views


def read_ortho10view(folder, meta):
    """What `read_own` gives, of a folder in Ortho10View's layout: of the elevations with views at all of AZIMUTHS, to
    within 1 degree, the one nearest to ELEVATION."""
    path, cameras = folder / "meta.json", []
    try:
        for place in meta["locations"]:
            index, kind = int(place["index"]), place.get("projection_type", meta.get("projection_type", "orthographic"))
            if str(kind).lower() not in ("ortho", "orthographic") or "ortho_scale" not in place:
                raise ValueError(f"view {index} is not orthographic with an ortho_scale")
            matrix = torch.tensor(place["transform_matrix"], dtype=torch.float64)
            turn = matrix[:3, :3]
            if matrix.shape != (4, 4) or not (turn.T @ turn - torch.eye(3)).abs().max() < 1e-3:
                raise ValueError(f"the transform_matrix of view {index} is no camera's, 4 x 4 and without scale")
            x, y, z = y_up(turn[:, 2]).tolist()                         # from the object towards the camera
            cameras.append((math.degrees(math.atan2(x, z)), math.degrees(math.atan2(y, math.hypot(x, z))), index,
                            matrix, float(place["ortho_scale"])))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path}: its locations cannot be read: {reason}") from None
    apart = lambda view, azimuth: abs((view[0] - azimuth + 180) % 360 - 180)
    for elevation in sorted((view[1] for view in cameras), key=lambda e: abs(e - ELEVATION)):
        ring = [view for view in cameras if abs(view[1] - elevation) <= 1]
        four = [min(ring, key=lambda view: apart(view, azimuth)) for azimuth in AZIMUTHS]
        if all(apart(view, azimuth) <= 1 for view, azimuth in zip(four, AZIMUTHS)):
            break
    else:
        raise ValueError(f"{folder} has no four views at the azimuths {list(AZIMUTHS)} and one elevation")
    scale = four[0][4]
    if not 0 < scale < math.inf or any(abs(view[4] - scale) > 1e-4 * scale for view in four):
        raise ValueError(f"{path}: ortho_scale must be above 0 and the same in all views")
    views = []
    for _, _, index, matrix, _ in four:
        files = [first_of(folder / f"{name}_{index:04}", *kinds) for name, *kinds in
                 (("color", ".webp"), ("normal", ".webp"), ("depth", ".exr", ".npy"))]
        color, normal, depth = (read_pixels(file) for file in files)
        if depth.ndim != 2:
            raise ValueError(f"{files[2]} has the shape {tuple(depth.shape)}, not (H, W)")
        height, width = depth.shape
        x = ((torch.arange(width) + 0.5) / width - 0.5) * scale
        y = (0.5 - (torch.arange(height)[:, None] + 0.5) / height) * scale
        right, up, back, origin = matrix[:3].T[:, :, None, None]
        off = ~((depth > 0) & (depth < 1000 * scale))
        if color.shape == (height, width, 4):
            off |= color[..., 3] == 0
        position = y_up(origin + x * right + y * up - depth * back).float().masked_fill(off, math.nan)
        views.append((files, color.movedim(-1, 0), y_up(2 * normal.movedim(-1, 0) - 1), position, 0))
    return elevation, scale / 2, views


def y_up(vectors):
    """(3, ...) in a frame with z up -> in ours; what looks along y from -y looks from our +z, at azimuth 0."""
    return torch.stack([vectors[0], vectors[2], -vectors[1]])


def first_of(path, *endings):
    """The first of the files path + ending that is there. Raises FileNotFoundError where none is."""
    files = [path.with_name(path.name + ending) for ending in endings]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"no such file: {' or '.join(map(str, files))}")


def read_pixels(path):
    """float32 (H, W, C) in [0, 1] of an image, C = 3 or, where it has transparency, 4; (H, W) of the first channel of
    an OpenEXR file; the array of a .npy file. Raises ValueError where it cannot be read."""
    try:
        if path.suffix == ".npy":
            pixels = np.load(path)
        elif path.suffix == ".exr":
            import OpenEXR
            pixels = next(iter(OpenEXR.File(str(path)).channels().values())).pixels
            pixels = pixels.reshape(*pixels.shape[:2], -1)[..., 0]      # R, G and B come as one
        else:
            with Image.open(path) as image:
                alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                pixels = np.float32(image.convert("RGBA" if alpha else "RGB")) / 255
        return torch.from_numpy(pixels.astype(np.float32))
    except ImportError:
        raise ValueError(f"{path} needs the package OpenEXR: pip install OpenEXR") from None
    except (OSError, SyntaxError, RuntimeError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def write_object(folder, caption, views, k=0, elevation=ELEVATION, extent=EXTENT):
    """Writes object k of Views at AZIMUTHS, before white, as a new folder in our own layout.

    elevation: degrees; extent: half the width of an image in the units of views.position. Raises ValueError where it
    cannot be written, or where the folder holds something already.
    """
    folder = Path(folder)
    if any(part is None or part.shape[1] != len(AZIMUTHS) for part in views):
        raise ValueError(f"{folder}: an object is written with colours and maps of {len(AZIMUTHS)} views")
    rgb, mask, normal, position = (part[k].float().cpu() for part in views)                         # (V, C, H, W)
    off = (normal == 0).all(dim=1, keepdim=True)
    color = torch.where(mask > 0, (rgb + mask - 1) / mask, 1)           # without the white
    pictures = {"color": torch.cat([color, mask], dim=1), "normal": (normal / 2 + 0.5).masked_fill(off, 1)}
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for v in range(len(AZIMUTHS)):
            for name, maps in pictures.items():
                pixels = (maps[v].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(partial / f"{name}_{v:03}.png")
            place = (position[v] + 0.5).masked_fill(off[v], math.nan)
            np.save(partial / f"position_{v:03}.npy", place.permute(1, 2, 0))
        meta = dict(caption=caption, azimuths=AZIMUTHS, elevation=elevation, extent=extent)
        (partial / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror or error}), choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Sets, kept as safetensors.

def silhouette(image, threshold=0.08):
    """Images (..., 3, H, W) in [0, 1] -> bool (..., 1, H, W): pixels that differ from the white background."""
    return (1 - image).amax(dim=-3, keepdim=True) > threshold


def to_uint8(images):
    """[-1, 1] -> uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pixels(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def cached(path, key, build):
    """The dict of tensors in the file at path if it was made from key; else build() it and keep it there."""
    key = dict(key, version=WORLD_VERSION)
    if up_to_date(path, key):
        return load_tensors(path)[0]
    tensors = build()
    save_tensors(path, tensors, key=key)
    return tensors


def in_chunks(num, name, draw, chunk=256):
    """draw(first, last) -> dict of tensors, over 0..num, joined, with a progress bar."""
    bar, parts = tqdm(total=num, desc=name, unit="obj", leave=False), []
    for first in range(0, num, chunk):
        parts.append(draw(first, min(first + chunk, num)))
        bar.update(min(first + chunk, num) - first)
    bar.close()
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def build_set(kind, num, seed, size, folder, device, draw):
    """draw(assets, first) -> dict of tensors, cached in folder under a name that tells kind, num, seed and size."""
    key = dict(kind=kind, num=num, seed=seed, size=size)

    def build():
        assets = sample_assets(num, seed)
        return in_chunks(num, kind, lambda first, last: draw(take(assets, slice(first, last)), first))
    return cached(Path(folder) / f"{kind}_{num}_{size}_{seed}.safetensors", key, build)


def base_set(num, seed=SEEDS["base"], size=32, folder="runs/toy/sets", device="cpu"):
    """The base model's wide world -> image uint8 (N, 1, 3, H, W), text int64 (N, L).

    About 65 % photos, 15 % renders, 20 % other styles; three quarters before white; half with a view phrase (and then
    within 8 degrees of it). A photo goes without its style phrase one time in five: "a red wooden mug" is a photo.
    """
    def draw(assets, first):
        u = uniforms(len(assets.category), seed + 1000, 8, first)
        style = [STYLES[int(k)] for k in torch.bucketize(u[:, 0].contiguous(), torch.tensor([.65, .80, .87, .93]))]
        background = ["white" if a < .75 else BACKGROUNDS[1 + int(b * (len(BACKGROUNDS) - 1))] for a, b in u[:, 1:3]]
        view = (u[:, 3] * 4).long()
        named = u[:, 4] < .5
        azimuth = torch.where(named, 90 * view + 16 * (u[:, 5] - .5), 360 * u[:, 5])
        image = render(assets, azimuth[:, None], style, background, size, geometry=False, seed=seed * 10**6 + first,
                       device=device).rgb
        say_style = [None if s == "photo" and a < .2 else s for s, a in zip(style, u[:, 6])]
        say_background = [None if b == "white" and a < .2 else b for b, a in zip(background, u[:, 7])]
        say_view = [VIEWS[v] if say else None for v, say in zip(view, named)]
        text = tokenize(asset_captions(assets, say_style, say_view, say_background))
        return dict(image=to_uint8(2 * image - 1), text=text)
    return build_set("base", num, seed, size, folder, device, draw)


def control_maps(views):
    """Views -> (N, V, 6, H, W) in [-1, 1]: normals, then twice the positions; 1 (white) off the object.

    Not 0 there, as that is the empty control: real iterations teach that it allows an object anywhere.
    """
    background = (views.normal == 0).all(dim=2, keepdim=True)
    return torch.cat([views.normal, 2 * views.position], dim=2).masked_fill(background, 1)


def synthetic_set(num, seed=SEEDS["synthetic"], size=32, folder="runs/toy/sets", device="cpu"):
    """Renders -> image uint8 (N, 4, 3, H, W), control float16 (N, 4, 6, H, W), text (N, L): "a red wooden mug"."""
    def draw(assets, first):
        views = render(assets, style="render", size=size, device=device)
        return dict(image=to_uint8(2 * views.rgb - 1), control=control_maps(views).half(),
                    text=tokenize(asset_captions(assets)))
    return build_set("synthetic", num, seed, size, folder, device, draw)


def evaluation_set(num, seed=SEEDS["evaluation"], size=32, folder="runs/toy/sets", device="cpu"):
    """synthetic_set of held-out objects, with what no paper has: the same views as photos under the object's one light.

    Adds photo uint8 (N, 4, 3, H, W), mask uint8 (N, 4, 1, H, W) = 255 x coverage, position and normal float32
    (N, 4, 3, H, W), labels int64 (N, 3) = category, color, material.
    """
    def draw(assets, first):
        views = render(assets, style="render", size=size, device=device)
        photo = render(assets, size=size, geometry=False, seed=seed * 10**6 + first, device=device).rgb
        return dict(image=to_uint8(2 * views.rgb - 1), control=control_maps(views).half(),
                    text=tokenize(asset_captions(assets)), photo=to_uint8(2 * photo - 1),
                    mask=to_uint8(2 * views.mask - 1), position=views.position, normal=views.normal,
                    labels=torch.stack(assets[:3], dim=1))
    return build_set("evaluation", num, seed, size, folder, device, draw)


def selective_set(num, style, seed, size=32, folder="runs/toy/sets", device="cpu"):
    """A set of layer-selective training (A.2), one view of each object -> image uint8 (N, 1, 3, H, W), text (N, L).

    Renders lie before white ("a red wooden mug"), photos before anything else, which the caption names ("a red wooden
    mug, sunset background"): so one sees from which of the two sets a model has the look of an object, and from which
    the background.
    """
    def draw(assets, first):
        u = uniforms(len(assets.category), seed + 1000, 2, first)
        others = BACKGROUNDS[1:]
        background = ["white" if style == "render" else others[int(b * len(others))] for b in u[:, 0]]
        view = 90. * (u[:, 1] * 4).long()
        image = render(assets, view[:, None], style, background, size, geometry=False, seed=seed * 10**6 + first,
                       device=device).rgb
        text = tokenize(asset_captions(assets, background=None if style == "render" else background))
        return dict(image=to_uint8(2 * image - 1), text=text)
    return build_set(f"selective_{style}", num, seed, size, folder, device, draw)


def photo_set(num, seed=SEEDS["photos"], size=32, folder="runs/toy/sets", device="cpu"):
    """Held-out photos before white, one view each -> image uint8 (N, 1, 3, H, W), text (N, L), labels int64 (N, 3)."""
    def draw(assets, first):
        view = (uniforms(len(assets.category), seed + 1000, 1, first)[:, 0] * 4).long()
        photo = render(assets, 90. * view[:, None], size=size, geometry=False, seed=seed * 10**6 + first,
                       device=device).rgb
        text = tokenize(asset_captions(assets, "photo", [VIEWS[v] for v in view], "white"))
        return dict(image=to_uint8(2 * photo - 1), text=text, labels=torch.stack(assets[:3], dim=1))
    return build_set("photos", num, seed, size, folder, device, draw)


def real_captions(assets):
    """What the base model is asked to draw for the real set (C.1), and what is trained on: lists of 4 N captions,
    object by object, view by view.

    The second are the assets' own captions, as the renders have them: where "photo of" told the domain, e_real had
    nothing to learn.
    """
    four = Assets(*(field.repeat_interleave(4, dim=0) for field in assets))
    return asset_captions(four, "photo", list(VIEWS) * len(assets.category), "white"), asset_captions(four)


# ---------------------------------------------------------------------------------------------------------------------
# Latents on disk, what the full model trains on: rendered objects through a VAE (Sec. 4) and a T5, in shards

LATENT_SCALE = 0.18215                  # of PixArt's VAE: the model sees its latents times this
MAPS = ("color", "normal", "position")


def load_vae(folder, device="cpu"):
    """PixArt's VAE -> (encode, decode). folder: a diffusers AutoencoderKL. Needs the diffusers package.

    encode(images (N, 3, H, W) in [-1, 1]) -> mean and deviation (N, 2, C, H / 8, W / 8), unscaled, of the latents;
    decode(latents (N, C, h, w), scaled) -> images in [-1, 1]. Both on the CPU.
    """
    AutoencoderKL = optional_class("diffusers", "AutoencoderKL", folder, "vae")
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).to(device).eval()

    @torch.no_grad()
    def encode(images):
        latents = vae.encode(images.to(device)).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1).cpu()

    @torch.no_grad()
    def decode(latents):
        return torch.cat([vae.decode(few.to(device) / LATENT_SCALE).sample.cpu() for few in latents.float().split(1)])
    return encode, decode


def load_text_encoder(folder, device="cpu", length=120):
    """PixArt's T5 -> encode(captions) -> a list of (n, D) vectors, one for each of the n tokens of a caption, the last
    being the end of the sentence; n is cut at length.

    folder: a T5EncoderModel; its tokenizer lies there too, or beside it in "tokenizer". Needs the transformers package.
    """
    T5EncoderModel = optional_class("transformers", "T5EncoderModel", folder, "text_encoder")
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder), local_files_only=True)
    except ImportError:
        raise ValueError("T5's tokenizer needs more packages: pip install sentencepiece protobuf") from None
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32        # in float16 T5 overflows
    t5 = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype).to(device).eval()

    @torch.no_grad()
    def encode(captions):
        ids = [tokenizer(caption.lower().strip(), truncation=True, max_length=length).input_ids for caption in captions]
        return [t5(torch.tensor([words], device=device)).last_hidden_state[0].float().cpu() for words in ids]
    return encode


def tokenizer_folder(text_encoder):
    """PixArt's folder "tokenizer" beside the text encoder, or the text encoder's own."""
    beside = os.path.join(os.path.dirname(os.path.abspath(text_encoder)), "tokenizer")
    return beside if os.path.isdir(beside) else text_encoder


def optional_class(package, name, folder, part):
    """A class of an optional package that reads a model folder. Raises with what to install or where to get it."""
    if not os.path.isfile(f"{folder}/config.json"):
        raise FileNotFoundError(f"no {name} in {folder}: get the files of huggingface.co/PixArt-alpha/PixArt-XL-2-"
                                f"512x512 and name its folder {part}")
    try:
        return getattr(__import__(package), name)
    except ImportError:
        raise ValueError(f"{name} needs the {package} package: pip install {package}") from None


def encoder_id(folder):
    """Name of a model folder and a checksum of the sizes and first bytes of its configuration, weights, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({*Path(folder).glob("*"), *Path(tokenizer_folder(folder)).glob("*")}):
        if path.suffix in (".json", ".safetensors", ".bin", ".model") and path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return f"{os.path.basename(os.path.abspath(folder))} {digest.hexdigest()[:12]}"


def encode_objects(objects, out, vae, text_encoder, size=512, shard=64, launched=None):
    """Encodes every rendered object below `objects` into OUT/FIRST_ID.safetensors, `shard` objects a file.

    vae, text_encoder: folders, see `load_vae` and `load_text_encoder`. size: pixels to a side that the views must have.
    An object ID becomes ID.color, ID.normal, ID.position (V, 2, C, h, w), mean and deviation of the unscaled latents,
    and ID.text (n, D), its valid tokens, all float16; null_text is the empty caption's. The header says under "shard"
    how they were made and holds the captions. Shards are spread over the ranks of torchrun; each is a pure function of
    its objects and written whole, so that a run that was stopped goes on. Raises ValueError where `out` holds shards
    made otherwise or of other objects, and naming the file of a bad object.
    """
    device, rank, world = launched or launch()
    folders = object_folders(objects)
    key = dict(vae=encoder_id(vae), text_encoder=encoder_id(text_encoder), size=size, scale=LATENT_SCALE,
               dtype="float16")
    shards = {Path(out) / f"{folders[k].name}.safetensors": folders[k:k + shard] for k in range(0, len(folders), shard)}
    for path in sorted(Path(out).glob("*.safetensors")):
        check_shard(path, key, [folder.name for folder in shards.get(path, ())])
    mine = {str(path): folders for path, folders in list(shards.items())[rank::world] if not path.exists()}
    if mine:                                                            # T5 takes its time to load
        encode_image, encode_text = load_vae(vae, device)[0], load_text_encoder(text_encoder, device)
        null_text = encode_text([""])[0].half()
    with tqdm(total=sum(map(len, mine.values())), desc="encoding", unit="object", disable=rank > 0) as progress:
        for path, members in mine.items():
            tensors, captions = {"null_text": null_text}, {}
            for folder in members:
                caption, views = read_object(folder)
                if views.rgb.shape[-1] != size or views.rgb.shape[-2] != size:
                    raise ValueError(f"{folder} has views of {tuple(views.rgb.shape[-2:])} pixels, not {size} x {size} "
                                     "(--size)")
                maps = torch.cat([2 * views.rgb[0] - 1, *control_maps(views)[0].split(3, dim=1)])   # (3 V, 3, H, W)
                for name, latents in zip(MAPS, encode_image(maps).half().chunk(3)):
                    tensors[f"{folder.name}.{name}"] = latents
                tensors[f"{folder.name}.text"], captions[folder.name] = encode_text([caption])[0].half(), caption
                progress.update()
            save_tensors(path, tensors, shard=dict(key=key, captions=captions))    # one entry: several have no order
    if world > 1:
        torch.distributed.barrier()


def check_shard(path, key, ids):
    """Raises ValueError unless the shard at path was made with this key and holds the objects `ids`."""
    metadata = read_metadata(path).get("shard") or {}
    was = metadata.get("key", {})
    other = [f"{name} {was.get(name)} (now {key[name]})" for name in key if was.get(name) != key[name]]
    if other:
        raise ValueError(f"{path} was made otherwise: {', '.join(other)}; choose another folder, or delete this one")
    if list(metadata["captions"]) != ids:
        raise ValueError(f"{path} holds other objects, or in another order, than one would write now: encode new ones "
                         "into a folder of their own inside this one, or delete it")


VIEW_PHRASES = ("front", "right side", "back", "left side")


def real_prompt(caption, view=None):
    """What the base model is asked for to draw a real image (C.1), and without the view what is trained on."""
    return f"a realistic photograph of {caption}, {f'{view} view, ' if view else ''}white background, highly detailed"


class LatentSet:
    """The shards of `encode_objects`, or of sample.py --real_set, in a folder and those inside it: memory-mapped, so
    that a set of any size takes no memory.

    views: False makes every view a sample of its own. control: whether to give the maps. config: the model's, which the
    shapes must fit. Then shape is (samples, views a sample), null the empty caption as `train` takes it, and key says
    how the shards were made. Raises ValueError where they do not fit, or one another.
    """

    def __init__(self, folder, config, views=True, control=False):
        self.config, self.control, self.places, self.key = config, control, [], None
        for path in sorted(Path(folder).rglob("*.safetensors")):
            key, ids = ((read_metadata(str(path)).get("shard") or {}).get(part) for part in ("key", "captions"))
            if not key or not ids:
                raise ValueError(f"{path} is no shard of data.py encode or sample.py --real_set")
            if key["scale"] != LATENT_SCALE:
                raise ValueError(f"{path} is for latents times {key['scale']}, here they are times {LATENT_SCALE}")
            if (self.key or key) != key:
                raise ValueError(f"{path} was made otherwise than the shards before it: {key}, not {self.key}")
            self.key, file = key, safe_open(path, "pt")
            self.places += [(file, name) for name in ids]
        names = [name for _, name in self.places]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{folder} holds " + (f"object {max(names, key=names.count)} twice" if names else
                             "no shards: write them with python data.py encode or sample.py --real_set"))
        file, name = self.places[0]
        self.grid, _, *latent = file.get_slice(f"{name}.color").get_shape()     # how many views an object has
        if control and f"{name}.normal" not in file.keys():
            raise ValueError(f"task texturing needs control maps, but {folder} has none: use --task text")
        words = file.get_tensor("null_text")
        c = config
        if latent != [c.channels, c.image_size, c.image_size] or words.shape[1] != c.text_dim:
            raise ValueError(f"{folder} has latents of {latent} and text of width {words.shape[1]}, the model takes "
                             f"{[c.channels, c.image_size, c.image_size]} and {c.text_dim}")
        self.shape = (len(names), self.grid) if views else (len(names) * self.grid, 1)
        self.null = dict(zip(("text", "text_mask"), (tensor[None] for tensor in padded(words, c.text_length))))

    def rows(self, index):
        """The samples `index` (B,) -> "image" (B, V, 2, C, h, w), mean and deviation, unscaled, "text" (B, L, D) and
        "text_mask" (B, L); of grids also "view" (B, V), and with control "control" (B, V, 2 C, h, w), scaled."""
        samples = []
        for k in index.tolist():
            file, name = self.places[k // self.grid if self.shape[1] == 1 else k]
            views = slice(k % self.grid, k % self.grid + 1) if self.shape[1] == 1 else slice(None)
            text, mask = padded(file.get_tensor(f"{name}.text"), self.config.text_length)
            sample = dict(image=file.get_slice(f"{name}.color")[views], text=text, text_mask=mask)
            if self.shape[1] > 1:
                sample["view"] = torch.arange(self.grid)
            if self.control:
                maps = [file.get_slice(f"{name}.{part}")[:, 0] for part in MAPS[1:]]                # (V, C, h, w) each
                sample["control"] = torch.cat(maps, dim=1) * LATENT_SCALE
            samples.append(sample)
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def padded(words, length):
    """Tokens (n, D) -> (length, D), zeros at the end, and a mask (length,), True where there were any."""
    return F.pad(words, (0, 0, 0, length - len(words))), torch.arange(length) < len(words)


def set_shape(dataset):
    """(samples, views a sample) of a set: a dictionary of tensors with "image" (N, V, ...), or a LatentSet."""
    return tuple(dataset["image"].shape[:2]) if isinstance(dataset, dict) else dataset.shape


def rows(dataset, index):
    """The samples `index` (B,) of such a set, as a dictionary of tensors."""
    return {key: value[index] for key, value in dataset.items()} if isinstance(dataset, dict) else dataset.rows(index)


def benchmark_reading(folder, config, workers, batch=8, rounds=1000):
    """Prints how many grids of four views with control a second a LatentSet gives: from `folder`, or from shards of
    full size that it writes there first, of random numbers."""
    if not os.path.isdir(folder):
        shape, c = (4, 2, config.channels, config.image_size, config.image_size), config
        for first in range(0, 128, 64):
            ids = [f"{k:04}" for k in range(first, first + 64)]
            tensors = {f"{name}.{part}": torch.randn(shape).half() for name in ids for part in MAPS}
            tensors |= {f"{name}.text": torch.randn(20, c.text_dim).half() for name in ids}
            save_tensors(f"{folder}/{ids[0]}.safetensors", tensors | {"null_text": torch.randn(1, c.text_dim).half()},
                         shard=dict(key=dict(scale=LATENT_SCALE), captions=dict.fromkeys(ids, "")))
    grids = LatentSet(folder, config, control=True)
    batches = torch.randint(grids.shape[0], (rounds, batch), generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(workers) as pool:
        for warm in (True, False):                                      # the first time the pages come from the disk
            start = time.perf_counter()
            for _ in pool.map(grids.rows, batches):
                pass
    speed = rounds * batch / (time.perf_counter() - start)
    print(f"{speed:.0f} grids/s in batches of {batch}, {workers} thread(s), from {grids.shape[0]} objects in the disk "
          "cache")


def contact_sheet(out, size=32, seed=0):
    """Draws one object of each category, four views of each in every look, and prints the views drawn a second."""
    assets = sample_assets(400, seed)
    first = [int((assets.category == k).nonzero()[0]) for k in range(len(CATEGORIES))]       # one of each category
    assets = take(assets, torch.tensor(first))
    start = time.time()
    photo = render(assets, size=size)
    print(f"{len(first) * 4 / (time.time() - start):.0f} photo views/s with maps, {torch.get_num_threads()} thread(s)")
    looks = ("cartoon", "white"), ("sketch", "white"), ("watercolor", "white"), ("photo", "sunset")
    others = [render(assets, (30,), *look, size, geometry=False).rgb for look in looks]
    columns = [render(assets, style="render", size=size, geometry=False).rgb, photo.rgb, photo.normal / 2 + .5,
               photo.position + .5, *others]
    sheet = torch.cat([c.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1) for c in columns], dim=1)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(out)
    print(f"wrote {out}")


def export(out, num, size=512, seed=0):
    """Writes `num` toy objects as rendered objects on disk: an example of the format, to try the full pipeline on."""
    assets = sample_assets(num, seed)
    for k in tqdm(range(num), desc="rendering", unit="object"):
        if os.path.isdir(f"{out}/{k:04}"):
            continue
        one = take(assets, slice(k, k + 1))
        write_object(f"{out}/{k:04}", asset_captions(one)[0], render(one, style="render", size=size))
    print(f"wrote {num} objects to {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets/world.png", help="the contact sheet to write, without a command")
    parser.add_argument("--size", type=int, default=32, help="its pixels a view")
    parser.add_argument("--seed", type=int, default=0, help="its objects")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    sub = commands.add_parser("export", help="write toy objects as rendered objects on disk, to try encode on")
    sub.add_argument("out", help="folder to write a folder for each object to")
    sub.add_argument("--num", type=int, default=8, help="how many objects")
    sub.add_argument("--size", type=int, default=512, help="pixels to a side")
    sub.add_argument("--seed", type=int, default=0, help="which objects")
    sub = commands.add_parser("encode", help="VAE latents and T5 tokens of rendered objects, the synthetic set of "
                                             "--preset full; also under torchrun")
    sub.add_argument("objects", help="folder of object folders")
    sub.add_argument("out", help="folder to write shards to")
    sub.add_argument("--vae", required=True, metavar="DIR", help="PixArt's vae folder (needs diffusers)")
    sub.add_argument("--text_encoder", required=True, metavar="DIR", help="PixArt's text_encoder folder, with "
                     "tokenizer beside it (needs transformers)")
    sub.add_argument("--size", type=int, default=512, help="pixels to a side of the views")
    sub.add_argument("--shard", type=int, default=64, help="objects a file")
    sub = commands.add_parser("read", help="time the reading of shards for --preset full")
    sub.add_argument("folder", help="of data.py encode; if it is not there, it is made, of random numbers (120 MB)")
    sub.add_argument("--workers", type=int, default=2, help="threads")
    args = parser.parse_args()
    for name in ("size", "num", "shard", "workers"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.command == "read":
        benchmark_reading(args.folder, PRESETS["full"], args.workers)
    elif args.command == "export":
        export(args.out, args.num, args.size, args.seed)
    elif args.command == "encode":
        encode_objects(args.objects, args.out, args.vae, args.text_encoder, args.size, args.shard)
        print(f"the shards are in {args.out}")
    else:
        contact_sheet(args.out, args.size, args.seed)


if __name__ == "__main__":
    run_cli(main)
