"""Measures of RefAny3D (related/refany3d.py) on the toy world, where the truth is known: is it *this* asset, is the
point map one of its surface, and is the rest as asked?

What the paper has judged by GPT, CLIP and DINO is asked of each pixel here: the point map names a place on the asset,
and there its colour and its surface are known.
"""
import torch
import torch.nn.functional as F

from support.pictures import to_pixels
from toy.render import backdrops, texture
from toy.trace import gradient, nearest
from toy.world import BACKGROUNDS, CATEGORIES, PALETTE, SHAPES, VOCAB

LEAST = 12                              # pixels of an object below which it counts as not drawn


def named_places(maps):
    """Point maps uint8 (N, 3, H, W) -> the places they name (N, 3, H, W) in [-0.5, 0.5], and where they do (N, H, W):
    where they are not white."""
    return to_pixels(maps) / 2, maps.amin(dim=1) < 235


def measure_scenes(drawn, scenes, assets):
    """{measure: mean over N scenes} of what was drawn, uint8 (N, 2, 3, H, W), image and point map.

    scenes: as from `scene_set`, one of each of the N Assets. drawn: share of the scenes in which map and image show an
    object at all; the other measures are of these.
    surface: how far the named places lie off the asset's surface, in its units; pose: how far, in pixels, the map is
    from a picture that an orthographic camera takes; outline: IoU of the map's silhouette with the image's.
    hue: degrees between the image's chroma and the asset's at the place that is named; tone: correlation of
    brightness, over the object, with the asset's pattern there.
    background: share of the scenes whose background is nearest to the one asked for.
    """
    images, (places, on) = drawn[:, 0] / 255, named_places(drawn[:, 1])
    asked = [BACKGROUNDS.index(name) for name in background_names(scenes["text"])]
    far = background_distances(images)                                                              # (N, 8, H, W)
    shown = far[torch.arange(len(far)), asked] > 0.12                                               # (N, H, W)
    rows = []
    for k in range(len(drawn)):
        off = ~on[k] & ~shown[k] if (~on[k] & ~shown[k]).sum() >= LEAST else ~on[k]
        row = dict(background=float(far[k][:, off].mean(dim=1).argmin() == asked[k]),
                   drawn=float(min(on[k].sum(), shown[k].sum()) >= LEAST))
        if row["drawn"]:
            point = places[k][:, on[k]]                                                             # (3, M)
            row |= surface_measures(point, on[k], assets, k)
            row["outline"] = float((on[k] & shown[k]).sum() / (on[k] | shown[k]).sum())
            row |= color_measures(images[k][:, on[k]], point, assets, k)
        rows.append(row)
    names = sorted({name for row in rows for name in row})
    return {name: mean_of([row[name] for row in rows if name in row]) for name in names}


def mean_of(values):
    """The mean of numbers, without those that are not finite; None if none is left."""
    values = torch.tensor(values)
    values = values[values.isfinite()]
    return float(values.mean()) if len(values) else None


def background_names(text):
    """The backgrounds that captions (N, L) ask for."""
    return [next(VOCAB[word] for word, following in zip(row, row[1:]) if VOCAB[following] == "background")
            for row in text.tolist()]


def background_distances(images):
    """How far each pixel of images (N, 3, H, W) in [0, 1] is from each of BACKGROUNDS, (N, 8, H, W)."""
    size = images.shape[-1]
    plain = F.avg_pool2d(backdrops(BACKGROUNDS, 2 * size).expand(-1, -1, -1, 2 * size), 2)          # (8, 3, H, W)
    return (images[:, None] - plain).abs().amax(dim=2)


def surface_measures(point, on, assets, k):
    """surface and pose, see `measure_scenes`, of the places (3, M) that a map names where `on` (H, W) says."""
    distance, abc = SHAPES[CATEGORIES[int(assets.category[k])]], assets.shape[k][:, None].expand_as(point)
    off = nearest(distance(point.unbind(), *abc.unbind())).abs().mean()
    pixel = on.nonzero().float()                                                                    # (M, 2)
    known = torch.cat([point.T, torch.ones(len(pixel), 1)], dim=1)
    fitted = known @ torch.linalg.lstsq(known, pixel, driver="gelsd").solution          # any affine camera
    return dict(surface=float(off), pose=float((fitted - pixel).square().sum(dim=1).mean().sqrt()))


def color_measures(color, point, assets, k):
    """hue and tone, see `measure_scenes`, of an object's pixels (3, M) whose places (3, M) are named."""
    distance, abc = SHAPES[CATEGORIES[int(assets.category[k])]], assets.shape[k][:, None].expand_as(point)
    paint = torch.tensor(list(PALETTE.values()))[assets.color[k]][:, None].expand_as(point)
    material = assets.material[k].expand(point.shape[1])
    truth = texture(point, gradient(distance, point, abc), paint, material)                         # (3, M)
    chroma, true_chroma = color - color.mean(dim=0), truth - truth.mean(dim=0)
    weight = true_chroma.norm(dim=0)
    angle = torch.rad2deg(F.cosine_similarity(chroma, true_chroma, dim=0).clamp(-1, 1).acos())
    hue = (weight * angle).sum() / weight.sum() if weight.mean() > 0.05 else torch.tensor(float("nan"))    # gray: none
    brightness = torch.stack([color.mean(dim=0), truth.mean(dim=0)])
    varies = brightness[1].std() > 0.03                                                     # else there is no pattern
    tone = torch.corrcoef(brightness)[0, 1] if varies else torch.tensor(float("nan"))
    return dict(hue=float(hue), tone=float(tone))
