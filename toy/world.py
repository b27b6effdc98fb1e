"""
The toy world: procedural objects and the words for them, a stand-in for renders, photographs and captions (Sec. 5).

An object is a category with random proportions, a colour, a material and a light. Twenty signed distance functions of a
few primitives say where its surface is; toy/render.py draws it. Its frame is that of geometry/camera.py.
"""
import difflib
import math
from typing import NamedTuple

import numpy as np
import torch

from geometry.camera import VIEWS

WORLD_VERSION = 2                       # raise it when pixels or captions change: cached sets are then made again

STYLES = ("photo", "cartoon", "sketch", "watercolor")   # the base model's world: it has never seen a render
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
    """Of the vectors with these coordinates."""
    return sum(x * x for x in xs).sqrt()


def at(p, x=0., y=0., z=0.):
    """The points as a shape sees them that is moved to (x, y, z)."""
    return p[0] - x, p[1] - y, p[2] - z


def maximum(first, *rest):
    """Distance to the intersection of shapes, from their distances."""
    for other in rest:
        first = torch.maximum(first, other)
    return first


def minimum(first, *rest):
    """Distance to the union of shapes, from their distances."""
    for other in rest:
        first = torch.minimum(first, other)
    return first


def sphere(p, r):
    """Of radius r."""
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
    """Around the y axis."""
    return length(length(p[0], p[2]) - radius, p[1]) - r


def along_x(p):
    """The points as a shape sees them whose y axis is turned to x."""
    return p[1], p[0], p[2]


def along_z(p):
    """Likewise, turned to z."""
    return p[0], p[2], p[1]


# One short function per category: points and proportions a, b, c in [0, 1] -> distance to the body and to the accented
# parts (a darker or lighter tone of the colour, so that they show in any look), None if there are none.
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
    """Four, at +-x and +-z, from height y0 to y1, twice `half` thick."""
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
# Captions: "photo of a red wooden mug, front view, white background"

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


def captions_of(text):
    """The words of token ids (N, L), a list of N."""
    return [" ".join(VOCAB[word] for word in row if word > 1) for row in text]


def tokenize(captions):
    """list of N captions -> (N, TEXT_LENGTH) int64, ended by <end> and padded with 0. "" is the null caption.

    Raises ValueError for an unknown word (with the nearest known ones) and for a caption that is too long.
    """
    tokens = torch.zeros(len(captions), TEXT_LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, captions):
        words = text.lower().replace(",", " ").split()
        for word in words:
            if word not in VOCAB[2:]:
                near = difflib.get_close_matches(word, VOCAB[2:], n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known words: {' '.join(VOCAB[2:])}"
                raise ValueError(f"unknown word '{word}' in caption '{text}'; {hint}")
        if len(words) >= TEXT_LENGTH:
            raise ValueError(f"caption '{text}' has {len(words)} words, the toy world reads at most {TEXT_LENGTH - 1}")
        ids = [WORDS[word] for word in words] + [WORDS["<end>"]]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def refuse_unknown_words(parser, captions):
    """Ends with a line of usage at captions, of --prompt, that `tokenize` does not take."""
    try:
        tokenize(captions)
    except ValueError as error:
        parser.error(f"--prompt: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Objects


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
    category, color, material = [(u[:, column] * len(choices)).long()
                                 for column, choices in enumerate((CATEGORIES, COLORS, MATERIALS))]
    return Assets(category, color, material, u[:, 3:6].float(), lights(u[:, 6:]).float())


def lights(u):
    """Uniform numbers (N, 2) -> unit vectors towards the light (N, 3), 35 to 75 degrees high."""
    azimuth, elevation = 2 * math.pi * u[:, 0], torch.deg2rad(35 + 40 * u[:, 1])
    light = [elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()]
    return torch.stack(light, dim=1)


def exaggerated(assets):
    """The objects as an asset artist shapes them: of each proportion, half lie at an end of the real objects' range."""
    return assets._replace(shape=(2 * assets.shape - .5).clamp(0, 1))


def take(assets, index):
    """The objects at index (slice or tensor)."""
    return Assets(*(field[index] for field in assets))


def asset_captions(assets, style=None, view=None, background=None):
    """One caption per object; style, view and background are None, one word for all, or a list of N."""
    n = len(assets.category)

    def each(words):
        return [words] * n if words is None or isinstance(words, str) else words
    style, view, background = each(style), each(view), each(background)
    return [caption(style[k], COLORS[assets.color[k]], MATERIALS[assets.material[k]], CATEGORIES[assets.category[k]],
                    view[k], background[k]) for k in range(n)]
