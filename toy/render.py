"""
The toy world drawn: where rays hit an object (toy/trace.py) it is shaded (Sec. 5).

A photo (the real domain) shows the material as it grew, the light, the shadow, the grain; a render (the synthetic
domain) is evenly lit and shows the pattern that an artist painted for the material. With either come the control maps,
normals and positions. The frame and the cameras are those of geometry/camera.py.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from geometry.camera import AZIMUTHS, ELEVATION, Views, camera
from geometry.mesh import surface_mesh
from toy.trace import Cameras, gradient, nearest, trace
from toy.world import BACKDROPS, BACKGROUNDS, CATEGORIES, MATERIALS, PALETTE, SHAPES, STYLES, Assets, length, maximum


def asset_mesh(assets, resolution=96):
    """Mesh of one object of the toy world, Assets of length 1, from its distance function."""
    distance, abc = SHAPES[CATEGORIES[int(assets.category[0])]], assets.shape[0][:, None]
    line = torch.linspace(-0.55, 0.55, resolution)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).flatten(1)
    value = nearest(distance(points.unbind(), *abc.expand(3, points.shape[1]).unbind()))

    def normal(p):
        return gradient(distance, p, abc.expand(3, p.shape[1]))
    return surface_mesh(value.view((resolution,) * 3), 0.55, normal)


# ---------------------------------------------------------------------------------------------------------------------
# Materials and light


def texture(p, normal, color, material):
    """Solid textures: points, normals, colours (3, M) and material (M,) -> colours (3, M).

    Periods are at least five pixels of a 32-pixel view, so that one view predicts another (the 30 dB of the oracle).
    """
    x, y, z = p
    rings = wave(length(x + .12, z - .16) + .25 * y, .22)
    veins = wave(x + .6 * y - .5 * z + .08 * torch.sin(8 * y + 5 * z), .46)**2
    row = torch.floor(y / .22)
    mortar = maximum(joint(y / .22 + .5), joint((x + z) / .4 + .5 * row) * .8)
    spots = soft(wave(x + .3 * y, .3) + wave(y - .3 * z, .3) + wave(z + .3 * x, .3) - 1.9, 7)
    stripes = soft(wave(y + .45 * x - .2 * z, .26) - .5, 6)
    sheen = (.5 + .5 * normal[1])**2
    white, dark = torch.ones_like(color), color * .42
    choices = [mix(color, color * .5 + .03, rings),                            # in the order of MATERIALS
               mix(mix(color, white * .72, .4), dark, veins),
               mix(color, white * .68, mortar * .8),
               mix(color, dark, spots),
               mix(color, white * .7, stripes * .8),
               mix(mix(color, white * .5, .35) * .55, mix(color, white * .72, .45), sheen)]
    return torch.stack(choices).gather(0, material.expand(1, 3, -1))[0]


def painted(p, color, material):
    """What an asset's artist paints for a material: coarse, of two flat tones, unlike the real one in pattern and hue.

    So what tells a render from a photograph depends on the material. Arguments and result as of `texture`.
    """
    x, y, z = p
    light, dark = mix(color, torch.ones_like(color), .45), color * .6
    plank = mix(color, torch.tensor([.62, .44, .26], device=color.device)[:, None], .5)
    planks = soft(wave(x + .5 * z, .3) - .5, 20)
    clouds = soft(wave(x + .4 * y, .7) + wave(y - .5 * z, .6) - 1, 6)
    blocks = maximum(joint(y / .34), joint((x - z) / .5 + .5 * torch.floor(y / .34 + .5)))
    dots = soft(wave(x + .2 * z, .4) + wave(y + .2 * x, .4) + wave(z + .2 * y, .4) - 1.8, 12)
    bands = soft(wave(x - z, .44) - .5, 20)
    halves = soft(y, 20)
    choices = [mix(color, plank, planks),                      # in the order of MATERIALS
               mix(color, light, clouds),
               mix(light, color, blocks),
               mix(color, light, dots),
               mix(color, dark, bands),
               mix(color, light, halves)]
    return torch.stack(choices).gather(0, material.expand(1, 3, -1))[0]


def wave(value, period):
    """Between 0 and 1 and back, each period."""
    return 0.5 + 0.5 * torch.sin(2 * math.pi / period * value)


def soft(value, sharp):
    """A step at 0, from 0 to 1."""
    return torch.sigmoid(sharp * value)


def joint(u):
    """1 halfway between two whole numbers, 0 away from there: the mortar between bricks of length 1."""
    return torch.exp(-((u - u.floor() - .5) / .16)**2)


def mix(a, b, share):
    """From a to b."""
    return a + (b - a) * share


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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


LOOKS = (*STYLES, "render")             # the last is the synthetic domain's


@dataclass(frozen=True)
class Look:
    """How N objects are drawn."""
    style: str | list = "photo"         # of LOOKS, one word or a list of N
    background: str | list = "white"    # of BACKGROUNDS, one word or a list of N
    seed: int = 0                       # of the photos' grain: that of object n is a function of seed + n alone
    frame: torch.Tensor | None = None   # (N, 3), where in the image they stand, see `Cameras`
    supersample: int = 2                # rays a pixel to each side


@torch.no_grad()
def render(assets, look=Look(), azimuth=AZIMUTHS, size=32, geometry=True, elevation=ELEVATION, device="cpu"):
    """Draw N objects in V views -> Views on the CPU, without normal and position where geometry is False.

    azimuth: V degrees for all or a tensor (N, V); elevation: degrees, one number or a tensor (N,); size: pixels to a
    side. Raises ValueError where they do not fit the assets, or for an unknown style or background.
    """
    n = len(assets.category)
    azimuth = torch.as_tensor(azimuth, dtype=torch.float32)
    azimuth = azimuth.expand(n, -1) if azimuth.ndim == 1 else azimuth
    if azimuth.ndim != 2 or len(azimuth) != n:
        raise ValueError(f"azimuth has shape {tuple(azimuth.shape)}, give V numbers or a tensor ({n}, V)")
    style = one_each(look.style, n, LOOKS, "style")
    background = one_each(look.background, n, BACKGROUNDS, "background")
    views = azimuth.shape[1]
    rgb, mask = torch.empty(n, views, 3, size, size), torch.empty(n, views, 1, size, size)
    normal = torch.zeros(n, views, 3, size, size) if geometry else None
    position = torch.zeros(n, views, 3, size, size) if geometry else None
    groups = {}
    for k in range(n):
        groups.setdefault((int(assets.category[k]), style[k]), []).append(k)
    rays = 1 << (17 if torch.device(device).type == "cpu" else 23)          # a chunk's tensors stay in the CPU's cache
    chunk = max(1, rays // (views * (size * look.supersample)**2))
    for (category, word), members in groups.items():
        distance = SHAPES[CATEGORIES[category]]
        for part in torch.tensor(members).split(chunk):
            few = Assets(*(field[part].repeat_interleave(views, dim=0).to(device) for field in assets))     # (B, ...)
            cameras = Cameras(azimuth[part].flatten().to(device), one_a_view(elevation, part, views, device),
                              one_a_view(look.frame, part, views, device))
            behind = [background[k] for k in part for _ in range(views)]
            color, cover = paint(distance, few, replace(look, style=word, background=behind), cameras, size)
            rgb[part] = color.cpu().view(-1, views, 3, size, size)
            mask[part] = cover.cpu().view(-1, views, 1, size, size)
            if geometry:
                hits = trace(distance, few.shape, cameras, size)
                for maps, values in ((normal, hits.normal), (position, hits.point)):
                    grid = pixel_grid(values, hits.pixel, len(few.shape), size)
                    maps[part] = grid.cpu().view(-1, views, 3, size, size)
    for k in range(n):
        if style[k] == "photo":                                         # film grain on what the object covers
            grain = torch.randn(views, 1, size, size, generator=torch.Generator().manual_seed(look.seed + k))
            rgb[k] += 0.010 * mask[k] * grain
    return Views(rgb.clamp_(0, 1), mask, normal, position)


def one_a_view(values, part, views, device):
    """Of values (N, ...), those of the objects `part`, one for each of their views; another value as it is."""
    return values[part].repeat_interleave(views, dim=0).to(device) if torch.is_tensor(values) else values


def one_each(value, n, known, what):
    """One word or a list of n -> list of n known words."""
    value = [value] * n if isinstance(value, str) else list(value)
    for word in value:
        if word not in known:
            raise ValueError(f"unknown {what} '{word}', choose from: {', '.join(known)}")
    if len(value) != n:
        raise ValueError(f"{len(value)} {what}s for {n} objects, give one or one each")
    return value


def pixel_grid(values, pixel, num, size):
    """Values (C, M) at places (M,) in the flattened (num, size, size) grid -> (num, C, size, size), 0 elsewhere."""
    grid = torch.zeros(len(values), num * size**2, device=values.device).index_copy(1, pixel, values)
    return grid.view(len(values), num, size, size).movedim(1, 0)


def paint(distance, assets, look, cameras, size):
    """Colours (B, 3, H, W) and coverage (B, 1, H, W) of B objects of one category, with a camera and a background each
    and one style."""
    device, times, fine = assets.shape.device, look.supersample, size * look.supersample
    hits = trace(distance, assets.shape, cameras, fine)
    forward = camera(cameras.azimuth, cameras.elevation)[2].to(device)
    color = shade(distance, assets, look, hits, forward, fine)
    flat = torch.cat([color, torch.ones_like(color[:1]), hits.normal, hits.accent[None].float()])
    grid = pixel_grid(flat, hits.pixel, len(assets.shape), fine)
    image, cover = grid[:, :3], grid[:, 3:4]
    if look.style in ("cartoon", "sketch"):                             # lines where the surface ends or bends
        highest, lowest = [F.max_pool2d(z, 2 * (times // 2) + 1, stride=1, padding=times // 2)
                           for z in (grid[:, 3:], -grid[:, 3:])]
        line = ((highest + lowest).amax(dim=1, keepdim=True) > .7) * cover
        image = image * (1 - line) + line * (.1 if look.style == "cartoon" else .3)
    image = image * cover + backdrops(look.background, fine, device) * (1 - cover)
    if look.style == "watercolor":                                      # colours run
        image = F.avg_pool2d(F.pad(image, (times,) * 4, mode="replicate"), 2 * times + 1, stride=1)
    return F.avg_pool2d(image, times), F.avg_pool2d(cover, times)


def backdrops(names, size, device="cpu"):
    """What lies behind the objects: (B, 3, size, 1), from top to bottom, of B BACKGROUNDS."""
    colors = torch.tensor([BACKDROPS[name] for name in names], device=device)[..., None, None]
    top, bottom = colors.unbind(dim=1)                                                               # (B, 3, 1, 1)
    return top + (bottom - top) * torch.linspace(0, 1, size, device=device)[:, None]


def accent_color(color):
    """Of an object's accented parts (a table's legs, a mug's handle), beside its colour (3, M)."""
    return torch.where(color.mean(dim=0) > .42, color * .5, color * .55 + .3)


def shade(distance, assets, look, hits, forward, size):
    """Colours (3, M) of the Hits on B assets of one category in one style; forward (B, 3): the cameras' axes."""
    owner = hits.pixel // size**2
    palette = torch.tensor(list(PALETTE.values()), device=owner.device)[assets.color].T              # (3, B)
    color = torch.where(hits.accent, accent_color(palette)[:, owner], palette[:, owner])             # (3, M)
    light = assets.light.T[:, owner]
    lambert = (hits.normal * light).sum(dim=0).clamp(min=0)
    if look.style == "photo":
        abc, material = assets.shape.T[:, owner], assets.material[owner]
        ambient, arrives, shine = light_up(distance, hits.point, hits.normal, abc, light, forward.T[:, owner])
        color = texture(hits.point, hits.normal, color, material)
        color = color * (.66 * ambient * (.9 + .1 * hits.normal[1]) + .58 * arrives)
        metal = material == MATERIALS.index("metal")
        return (color + shine * torch.where(metal, .08, .05)).clamp(max=.9)     # never white
    if look.style == "cartoon":
        return (color * 1.15 + .03).clamp(max=.95) * (.62 + .2 * (lambert > .25) + .18 * (lambert > .65))
    if look.style == "sketch":
        column, line = hits.pixel % size, hits.pixel // size % size
        hatch = ((column + line) // look.supersample % 4 < 2) & (lambert < .55)
        return (.88 - .3 * hatch - .15 * hits.accent).expand(3, -1)
    if look.style == "watercolor":
        x, y, z = hits.point
        wash = .12 * torch.sin(7 * x + 5 * y + 3) * torch.sin(6 * y - 7 * z + 1)
        return .42 + .52 * color + wash - .12 * (1 - lambert)
    return painted(hits.point, color, assets.material[owner])           # a render
