"""The toy world: objects and words."""

import re

import pytest
import torch

from geometry.camera import VIEWS
from toy.world import (BACKGROUNDS, CATEGORIES, COLORS, MATERIALS, STYLES, TEXT_LENGTH, VOCAB, asset_captions, caption, exaggerated,
                       sample_assets, tokenize)


def test_asset_k_depends_on_seed_and_k_alone():
    few, many, other = sample_assets(5, 3), sample_assets(50, 3), sample_assets(5, 4)
    assert all(torch.allclose(a, b[:5], rtol=0, atol=1e-6) for a, b in zip(few, many))
    assert not torch.equal(few.shape, other.shape)


def test_light_comes_from_above_and_from_everywhere():
    light = sample_assets(500, 3).light
    assert torch.allclose(light.norm(dim=1), torch.ones(500), atol=1e-5)
    elevation = torch.rad2deg(light[:, 1].asin())
    assert elevation.min() > 34.9 and elevation.max() < 75.1
    quadrant = (light[:, 0] > 0).long() * 2 + (light[:, 2] > 0).long()
    assert quadrant.bincount(minlength=4).min() > 90


def test_an_artists_proportions_lie_half_at_the_ends():
    assets = sample_assets(2000, 3)
    shape = exaggerated(assets).shape
    assert shape.min() == 0 and shape.max() == 1
    for end in (0, 1):
        assert ((shape == end).float().mean(dim=0) - 0.25).abs().max() < 0.04
    inside = (shape > 0) & (shape < 1)
    assert torch.equal(shape[inside], (2 * assets.shape - 0.5)[inside])
    assert all(torch.equal(a, b) for name, a, b in zip(assets._fields, assets, exaggerated(assets)) if name != "shape")


def test_caption_grammar():
    assert (
        caption("photo", "red", "wooden", "mug", "front", "white")
        == "photo of a red wooden mug, front view, white background"
    )
    assert caption(None, "red", "wooden", "mug") == "a red wooden mug"
    assets = sample_assets(20, 5)
    pattern = re.compile(r"(\w+) of a (\w+) (\w+) (\w+), (\w+) view, (\w+) background")
    for k, text in enumerate(asset_captions(assets, "sketch", ["back"] * 20, "white")):
        assert pattern.fullmatch(text).groups() == (
            "sketch",
            COLORS[assets.color[k]],
            MATERIALS[assets.material[k]],
            CATEGORIES[assets.category[k]],
            "back",
            "white",
        )


def test_tokens_read_back():
    assert len(set(VOCAB)) == len(VOCAB) and VOCAB[:2] == ("<pad>", "<end>")
    texts = ["Photo of a RED wooden mug, front view, white background", "a red wooden mug", ""]
    tokens = tokenize(texts)
    assert tokens.shape == (3, TEXT_LENGTH) and tokens.dtype == torch.int64
    back = [" ".join(VOCAB[i] for i in row if i) for row in tokens]
    assert back == ["photo of a red wooden mug front view white background <end>", "a red wooden mug <end>", "<end>"]
    every = [
        caption(s, c, m, k, v, b)
        for s, c, m, k, v, b in zip(
            STYLES * 4, COLORS * 3, MATERIALS * 4, CATEGORIES, VIEWS * 5, BACKGROUNDS * 3
        )
    ]
    tokenize(every)


def test_unknown_word_names_the_nearest():
    with pytest.raises(ValueError, match="unknown word 'woden'.*wooden"):
        tokenize(["a red woden mug"])
    with pytest.raises(ValueError, match="unknown word '<pad>'|unknown word 'zzz'"):
        tokenize(["zzz"])
    with pytest.raises(ValueError, match="20 words"):
        tokenize(["a " * 20])
