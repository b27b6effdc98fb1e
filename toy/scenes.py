"""Assets and the scenes that they are put into: what RefAny3D (arXiv 2601.22094) is trained on, from the toy world.

An asset is known by photographs before white from eight sides, as those of a finished, textured mesh, each with its
point map; a scene is a photograph of the same object, seen from elsewhere, smaller and off the centre, in another
light, before a background, with its own point map. The caption names category and background alone, so that colour and
material can be learned from the asset only.

The toy's base model knows objects in the middle of the image, as large as it, seen from 20 degrees. The base model of
RefAny3D's paper has seen photographs of all kinds; ours first learns what scenes are (`scene_world`, toy/pretrain.py).
"""
from dataclasses import replace

import torch

from data import SEEDS, build_set
from geometry.colors import draw_colors, read_colored_mesh
from geometry.mesh import mesh_views
from support.pictures import to_uint8
from toy.render import Look, render
from toy.world import BACKGROUNDS, CATEGORIES, asset_captions, exaggerated, lights, take, tokenize, uniforms

SIDES = tuple(range(0, 360, 45))        # azimuths of an asset's views, degrees
SCENES = 4                              # of an asset


def scene_set(num, seed=SEEDS["synthetic"], unseen=False, renders=False, size=32, folder="runs/toy/sets", device="cpu"):
    """SCENES scenes of each of num assets -> image uint8 (N, 2, 3, H, W), photograph and point map; references uint8
    (N, 2, 8, 3, H, W), photographs and point maps of SIDES; text int64 (N, L); labels int64 (N, 3) = category, color,
    material; N = num SCENES, the scenes of an asset in a row.

    unseen: other scenes of the same assets, before the one background that each asset otherwise never has. renders:
    scenes and references are drawn as an asset artist would, not as photographs.
    """
    style = "render" if renders else "photo"

    def draw(assets, first):
        assets = exaggerated(assets)
        sides = render(assets, Look(style, seed=10 ** 6 * seed + first), SIDES, size, device=device)
        references = torch.stack([to_uint8(2 * sides.rgb - 1), point_map(sides)], dim=1)         # (n, 2, 8, 3, H, W)
        repeated = take(assets, torch.arange(len(assets.category)).repeat_interleave(SCENES))
        u = uniforms(len(repeated.category), seed + (3000 if unseen else 2000), 8, SCENES * first).float()
        backgrounds = BACKGROUNDS[1:]                                       # not white
        kept_out = (first + torch.arange(len(u)) // SCENES) % len(backgrounds)
        other = (kept_out + 1 + (u[:, 0] * (len(backgrounds) - 1)).long()) % len(backgrounds)
        names = [backgrounds[k] for k in (kept_out if unseen else other)]
        views = in_scenes(repeated, Look(style, names, 10 ** 6 * seed + SCENES * first), u[:, 1:], size, device)
        text = tokenize([f"a {CATEGORIES[k]}, {name} background" for k, name in zip(repeated.category, names)])
        return dict(image=torch.cat([to_uint8(2 * views.rgb - 1), point_map(views)], dim=1), text=text,
                    references=references.repeat_interleave(SCENES, 0), labels=torch.stack(repeated[:3], dim=1))
    kind = "scenes" + "_unseen" * unseen + "_renders" * renders
    return build_set(kind, num, seed, size, folder, draw)


def scene_world(num, seed=SEEDS["scenes"], size=32, folder="runs/toy/sets", device="cpu"):
    """What a base model learns scenes from: photographs of num other assets in them, image uint8 (N, 1, 3, H, W), text
    int64 (N, L). Two captions in five name colour and material too, and one of these in two says that it is a photo."""
    def draw(assets, first):
        assets = exaggerated(assets)
        u = uniforms(len(assets.category), seed + 2000, 10, first).float()
        backgrounds = BACKGROUNDS[1:]                                       # not white
        names = [backgrounds[int(k)] for k in u[:, 0] * len(backgrounds)]
        image = in_scenes(assets, Look("photo", names, 10 ** 6 * seed + first), u[:, 1:8], size, device).rgb
        full = asset_captions(assets, ["photo" if a < 0.5 else None for a in u[:, 8]], None, names)
        text = [long if a < 0.4 else f"a {CATEGORIES[k]}, {name} background"
                for long, a, k, name in zip(full, u[:, 9], assets.category, names)]
        return dict(image=to_uint8(2 * image - 1), text=tokenize(text))
    return build_set("scene_world", num, seed, size, folder, draw)


def in_scenes(assets, look, u, size, device):
    """Views of assets (N) in scenes: where, how large, in what light and from which side the uniform numbers u (N, 7)
    say."""
    assets, look = assets._replace(light=lights(u[:, 3:5])), replace(look, frame=frames(u[:, :3]))
    return render(assets, look, 360 * u[:, 5:6], size, elevation=45 * u[:, 6], device=device)


def spread_views(num):
    """Numbers of `num` of an asset's views, as evenly around it as they can be: of 6 in 8, 0 1 3 4 5 7."""
    return [round(k * len(SIDES) / num) for k in range(num)]


def point_map(views):
    """Views -> uint8 (N, V, 3, H, W): position + 0.5 as a colour, the same for a place on the object in every view;
    white off the object."""
    off = (views.normal == 0).all(dim=2, keepdim=True)
    return to_uint8((2 * views.position).masked_fill(off, 1))


def mesh_references(path, size=32):
    """A user's textured mesh, unlit, as the "references" of an asset: colours and point maps of SIDES, uint8 (1, 2, 8,
    3, H, W)."""
    mesh, paint = read_colored_mesh(path, SIDES)
    colors = to_uint8(2 * draw_colors(mesh, paint, size, SIDES) - 1)
    return torch.stack([colors, point_map(mesh_views(mesh, size, SIDES))[0]])[None]


def frames(u):
    """Uniform numbers (N, 3) -> where the objects stand, (N, 3) as in `Cameras`: at 0.5 to 1 times their size, as far
    off the centre as leaves them whole."""
    scale = .5 + .5 * u[:, 2:]
    return torch.cat([(1 - scale) * (2 * u[:, :2] - 1), scale], dim=1)
