"""Assets and the scenes that they are put into: what RefAny3D (arXiv 2601.22094) is trained on, from the toy world.

An asset is known by photographs before white from eight sides, as those of a finished, textured mesh, each with its
point map; a scene is a photograph of the same object, seen from elsewhere, smaller and off the centre, in another
light, before a background, with its own point map. The caption names category and background alone, so that colour and
material can be learned from the asset only.
"""
import torch

from data import SEEDS, build_set
from geometry.colors import draw_colors, read_colored_mesh
from geometry.mesh import mesh_views
from support.pictures import to_uint8
from toy.render import Look, render
from toy.world import BACKGROUNDS, CATEGORIES, exaggerated, lights, take, tokenize, uniforms

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
        look = Look(style, names, 10 ** 6 * seed + SCENES * first, frame=frames(u[:, 1:4]))
        views = render(repeated._replace(light=lights(u[:, 4:6])), look, 360 * u[:, 6:7], size, elevation=45 * u[:, 7],
                       device=device)
        text = tokenize([f"a {CATEGORIES[k]}, {name} background" for k, name in zip(repeated.category, names)])
        return dict(image=torch.cat([to_uint8(2 * views.rgb - 1), point_map(views)], dim=1), text=text,
                    references=references.repeat_interleave(SCENES, 0), labels=torch.stack(repeated[:3], dim=1))
    kind = "scenes" + "_unseen" * unseen + "_renders" * renders
    return build_set(kind, num, seed, size, folder, draw)


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
