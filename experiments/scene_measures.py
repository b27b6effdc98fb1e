"""What is measured of RefAny3D (related/refany3d.py) where the truth is known: is it *this* asset, is the point map one
of its surface, and is the background as asked?

What the paper has judged by GPT, CLIP and DINO is asked of each pixel: the point map names a place on the asset, and
there its colour and its surface are known. experiments/references.py makes the table.
"""
import math

import torch
import torch.nn.functional as F

from experiments.results import mean_of
from geometry.camera import EXTENT
from support.pictures import to_pixels
from toy.render import Look, accent_color, backdrops, render, texture
from toy.trace import gradient, nearest
from toy.world import BACKGROUNDS, CATEGORIES, PALETTE, SHAPES, VOCAB

LEAST = 12                              # pixels of an object below which it counts as not drawn
LEAST_SCALE = 0.45                      # of an object in a scene, a little less than the scenes have


def named_places(maps):
    """Point maps uint8 (N, 3, H, W) -> the places they name (N, 3, H, W) in [-0.5, 0.5], and where they do (N, H, W):
    where they are not white."""
    return to_pixels(maps) / 2, maps.amin(dim=1) < 235


def measure_scenes(drawn, scenes, assets, sides):
    """{measure: mean over N scenes} of what was drawn, uint8 (N, K, 3, H, W), image and (K = 2) point map.

    scenes: as from `scene_set`, one of each of the N Assets; sides: their `silhouettes`. Of the image alone:
    background: share of the scenes whose background is nearest to the one asked for.
    shape: IoU of the object's silhouette with the most alike of the asset's from all sides, see `framed`.
    matches: how many patches of the image are found again in the references, see `matched_patches`.
    Of image and map, over the scenes in which both show an object at all, whose share is `drawn`:
    surface: how far the named places lie off the asset's surface; pose: how far, on the asset, the map is from a
    picture that an orthographic camera takes; both in the asset's units, its cube has side 1. outline: IoU of the
    map's silhouette with the image's.
    hue: degrees between the image's chroma and the asset's, which has the same everywhere; tone: correlation of
    brightness, over the object, with the asset's pattern at the places that are named. The asset's colours are unlit,
    so only the distance to perfect scenes counts.
    """
    images = drawn[:, 0] / 255
    places, on = named_places(drawn[:, -1])
    truth, truly_on = named_places(scenes["image"][:, 1])
    asked = [BACKGROUNDS.index(name) for name in background_names(scenes["text"])]
    shown, behind = find_objects(images)                                                           # (N, H, W), (N,)
    rows = []
    for k in range(len(drawn)):
        row = dict(background=float(behind[k] == asked[k]), shape=most_alike(shown[k], sides[k]),
                   matches=matched_patches(images[k], shown[k], scenes["references"][k, 0]))
        if drawn.shape[1] == 2:
            row["drawn"] = float(min(on[k].sum(), shown[k].sum()) >= LEAST)
        if row.get("drawn"):
            point, true_point = places[k][:, on[k]], truth[k][:, truly_on[k]]                       # (3, M)
            row |= surface_measures(point, on[k], assets, k)
            row["outline"] = float((on[k] & shown[k]).sum() / (on[k] | shown[k]).sum())
            row |= color_measures(images[k][:, on[k]], point, true_point, assets, k)
        rows.append(row)
    names = sorted({name for row in rows for name in row})
    return {name: mean_of([row[name] for row in rows if name in row]) for name in names}


def background_names(text):
    """The backgrounds that captions (N, L) ask for."""
    return [next(VOCAB[word] for word, following in zip(row, row[1:]) if VOCAB[following] == "background")
            for row in text.tolist()]


def find_objects(images):
    """Where images (N, 3, H, W) in [0, 1] differ from their own background, (N, H, W), and which of BACKGROUNDS that is
    most alike, (N,). It may be a little lighter or darker throughout."""
    size = images.shape[-1]
    plain = F.avg_pool2d(backdrops(BACKGROUNDS, 2 * size).expand(-1, -1, -1, 2 * size), 2)          # (8, 3, H, W)
    rim = torch.ones(size, size, dtype=torch.bool)
    rim[3:-3, 3:-3] = False                                             # where objects seldom are
    apart = images[:, None] - plain                                                                 # (N, 8, 3, H, W)
    behind = apart[..., rim].abs().amax(dim=2).median(dim=-1).values.argmin(dim=1)                  # (N,)
    apart = apart[torch.arange(len(images)), behind]
    apart = apart - apart[..., rim].median(dim=-1).values[..., None, None]
    return apart.abs().amax(dim=1) > 0.12, behind


def silhouettes(assets):
    """What each of N Assets looks like in outline from 24 sides at four elevations: (N, 96, 24, 24), `framed`."""
    look, parts = Look("render", supersample=1), []
    for elevation in (0, 15, 30, 45):
        masks = render(assets, look, range(0, 360, 15), geometry=False, elevation=elevation).mask[:, :, 0] > 0.5
        parts.append(torch.stack([framed(mask) for mask in masks.flatten(0, 1)]).unflatten(0, (len(masks), -1)))
    return torch.cat(parts, dim=1)


def framed(mask, size=24):
    """A silhouette (H, W) wherever and however large it is -> (size, size): cut out, and in the middle of a square as
    wide as its longer side. Pixels with fewer than two others beside them are left out."""
    beside = F.avg_pool2d(mask[None].float(), 3, stride=1, padding=1, divisor_override=1)[0] - mask.float()
    rows, columns = (mask & (beside > 1.5)).nonzero(as_tuple=True)
    if not len(rows):
        return torch.zeros(size, size, dtype=torch.bool)
    cut = mask[rows.min():rows.max() + 1, columns.min():columns.max() + 1].float()
    height, width = cut.shape
    more = max(height, width) - height, max(height, width) - width
    cut = F.pad(cut, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2))
    return F.interpolate(cut[None, None], (size, size), mode="bilinear", antialias=True)[0, 0] > 0.5


def most_alike(mask, sides):
    """The best IoU of a silhouette (H, W) with framed ones (n, 24, 24)."""
    ours = framed(mask)
    return float(((ours & sides).sum(dim=(1, 2)) / (ours | sides).sum(dim=(1, 2))).max())


def surface_measures(point, on, assets, k):
    """surface and pose, see `measure_scenes`, of the places (3, M) that a map names where `on` (H, W) says."""
    distance, abc = SHAPES[CATEGORIES[int(assets.category[k])]], assets.shape[k][:, None].expand_as(point)
    off = nearest(distance(point.unbind(), *abc.unbind())).abs().mean()
    pixel = on.nonzero().float()                                                    # (M, 2), down and to the right
    pixel, place = pixel - pixel.mean(dim=0), (point - point.mean(dim=1, keepdim=True)).T           # (M, 2), (M, 3)
    fitted = torch.linalg.lstsq(place, pixel, driver="gelsd").solution                              # any affine camera
    U, scales, Vh = torch.linalg.svd(fitted, full_matrices=False)
    camera = U @ Vh                                                                 # (3, 2): the nearest orthographic
    faces = (gradient(distance, point, abc) * torch.linalg.cross(*camera.T)[:, None]).sum(dim=0).mean() > 0
    seen = pixel / scales.mean().clamp(min=LEAST_SCALE * len(on) / (2 * EXTENT))    # in the asset's units
    apart = place @ camera - seen if faces else seen                                # of a mirrored asset: no camera
    return dict(surface=float(off), pose=float(apart.square().sum(dim=1).mean().sqrt()))


def asset_colors(point, assets, k):
    """Colours (3, M) of asset k at places (3, M), unlit."""
    distance, abc = SHAPES[CATEGORIES[int(assets.category[k])]], assets.shape[k][:, None].expand_as(point)
    color = torch.tensor(list(PALETTE.values()))[assets.color[k]][:, None].expand_as(point)
    body, accent = distance(point.unbind(), *abc.unbind())
    if accent is not None:
        color = torch.where(accent < body, accent_color(color), color)
    return texture(point, gradient(distance, point, abc), color, assets.material[k].expand(point.shape[1]))


def color_measures(color, point, true_point, assets, k):
    """hue and tone, see `measure_scenes`, of an object's pixels (3, M) whose places (3, M) are named; true_point: the
    places that a true photograph shows, which decide whether the asset has a pattern to be found."""
    named, whole = asset_colors(point, assets, k), asset_colors(true_point, assets, k)
    chroma, true_chroma = color - color.mean(dim=0), named - named.mean(dim=0)
    weight = true_chroma.norm(dim=0)
    angle = torch.rad2deg(F.cosine_similarity(chroma, true_chroma, dim=0).clamp(-1, 1).acos())
    hue = (weight * angle).sum() / weight.sum() if weight.mean() > 0.05 else math.nan              # gray has none
    if whole.mean(dim=0).std() <= 0.03:                                                             # there is none
        return dict(hue=float(hue), tone=math.nan)
    brightness = torch.stack([color.mean(dim=0), named.mean(dim=0)])
    found = brightness.std(dim=1).min() > 1e-3
    return dict(hue=float(hue), tone=float(torch.corrcoef(brightness)[0, 1]) if found else 0.0)


def matched_patches(image, shown, references, size=5, least=0.8):
    """How many of an object's patches are found again in the references: mutual nearest neighbours of correlation
    above `least`, a toy form of the paper's count of matches (GIM).

    image: (3, H, W) in [0, 1]; shown: (H, W), where the object is; references: uint8 (V, 3, H, W) before white. Patches
    lie on the object as a whole: at its rim all objects are alike.
    """
    def patches(images, where):                                         # (n, 3, H, W), (n, H, W) -> (P, 3 size size)
        where = -F.max_pool2d(-where.float(), size, stride=1, padding=size // 2) > 0
        cut = F.unfold(F.pad(images, 4 * [size // 2], mode="replicate"), size)                      # (n, 3 size^2, H W)
        cut = cut.transpose(1, 2).flatten(0, 1)[where.flatten()].unflatten(1, (3, -1))
        return F.normalize((cut - cut.mean(dim=2, keepdim=True)).flatten(1), dim=1)        # so plain ones match none
    references = references / 255
    ours, theirs = patches(image[None], shown[None]), patches(references, references.amin(dim=1) < 0.95)
    if not len(ours) or not len(theirs):
        return 0.0
    alike = ours @ theirs.T
    best, back = alike.max(dim=1), alike.argmax(dim=0)
    mutual = back[best.indices] == torch.arange(len(ours))
    return float((mutual & (best.values > least)).sum())
