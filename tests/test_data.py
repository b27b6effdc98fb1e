"""The toy's sets, and files that keep them."""

import re

import pytest
import torch

import data
from data import SEEDS, evaluation_set, held_objects, photo_set, real_captions, synthetic_set
from geometry.camera import VIEWS
from support.files import cached, read_metadata
from support.pictures import to_pixels, to_uint8
from toy.pretrain import base_set
from toy.render import Look, render
from toy.world import (CATEGORIES, COLORS, MATERIALS, VOCAB, WORLD_VERSION, asset_captions, exaggerated, sample_assets,
                       tokenize)


def test_real_captions_draw_photos_and_train_on_the_assets_own_words():
    assets = sample_assets(3, 1)
    draw, train = real_captions(assets)
    name = asset_captions(assets)
    assert len(draw) == len(train) == 12
    assert draw[:4] == [f"photo of {name[0]}, {view} view, white background" for view in VIEWS]
    assert train[4:8] == [name[1]] * 4


def test_evaluation_set_agrees_with_its_maps_captions_and_labels(tmp_path):
    got = evaluation_set(4, folder=tmp_path)
    assets = exaggerated(sample_assets(4, SEEDS["evaluation"]))
    views = render(assets, Look("render"))
    on = got["normal"].norm(dim=2, keepdim=True) > 0.5
    maps = torch.cat([got["normal"], 2 * got["position"]], dim=2).half()
    assert torch.equal(got["control"], torch.where(on, maps, torch.ones_like(maps)))  # white, and not the empty control
    assert torch.equal(got["position"], views.position) and got["control"].abs().max() <= 1
    assert (got["control"][(got["mask"] == 0).expand_as(maps)] == 1).float().mean() > 0.999
    assert ((got["control"] == 1).all(dim=2)[got["mask"][:, :, 0] == 255]).float().mean() < 0.001
    assert torch.equal(got["mask"], (views.mask * 255).round().byte())
    assert (got["image"] - views.rgb * 255).abs().max() < 0.51
    want = [f"a {COLORS[c]} {MATERIALS[m]} {CATEGORIES[k]}" for k, c, m in got["labels"]]
    assert torch.equal(got["text"], tokenize(want))
    assert (got["photo"].float() - got["image"].float()).abs().mean() > 3
    some = held_objects([2, 0])                                             # bit for bit as drawn among the others
    assert some.keys() == got.keys() and all(torch.equal(some[name], got[name][[2, 0]]) for name in got)
    synthetic = synthetic_set(4, SEEDS["evaluation"], folder=tmp_path)
    assert all(torch.equal(synthetic[name], got[name]) for name in ("image", "control", "text"))


def test_base_set_is_the_wide_world(tmp_path):
    got = base_set(300, folder=tmp_path)
    texts = [" ".join(VOCAB[i] for i in row if i > 1) for row in got["text"]]
    assert got["image"].shape == (300, 1, 3, 32, 32) and got["image"].dtype == torch.uint8
    share = lambda pattern: sum(bool(re.search(pattern, text)) for text in texts) / 300
    assert 0.5 < share("^photo") < 0.75 and 0.08 < share("^a ") < 0.25 and share("render") == 0
    assert 0.1 < share("^(cartoon|sketch|watercolor)") < 0.3 and 0.4 < share(" view") < 0.6
    assert 0.45 < share("white background") < 0.75
    corner = got["image"][:, 0, :, 0, 0].float().mean(dim=1)
    for text, value in zip(texts, corner):
        assert "white background" not in text or value == 255
        assert "black background" not in text or value < 40


def test_photo_set(tmp_path):
    got = photo_set(6, folder=tmp_path)
    assert got["image"].shape == (6, 1, 3, 32, 32) and got["labels"].shape == (6, 3)
    text = " ".join(VOCAB[i] for i in got["text"][0] if i > 1)
    category, color, material = (int(i) for i in got["labels"][0])
    assert re.fullmatch(
        f"photo of a {COLORS[color]} {MATERIALS[material]} {CATEGORIES[category]} "
        r"(front|right|back|left) view white background",
        text,
    )


def test_a_chunk_does_not_change_the_set(tmp_path, monkeypatch):
    whole = base_set(12, folder=tmp_path / "a")
    chunks = data.in_chunks
    monkeypatch.setattr(data, "in_chunks", lambda num, name, draw: chunks(num, name, draw, chunk=5))
    parts = base_set(12, folder=tmp_path / "b")
    assert torch.equal(whole["text"], parts["text"])
    assert ((whole["image"].int() - parts["image"].int()).abs() <= 1).float().mean() > 0.9999


def test_cached_sets_are_read_rebuilt_and_repaired(tmp_path, capsys):
    made = []

    def build():
        made.append(1)
        return {"x": torch.arange(1000)}

    path = tmp_path / "deep" / "set.safetensors"
    for _ in range(2):
        assert torch.equal(cached(path, {"num": 1}, build)["x"], torch.arange(1000))
    assert len(made) == 1  # the second call read the file
    cached(path, {"num": 2}, build)
    assert len(made) == 2  # another key
    path.write_bytes(path.read_bytes()[:500])
    assert torch.equal(cached(path, {"num": 2}, build)["x"], torch.arange(1000))
    assert len(made) == 3 and "damaged" in capsys.readouterr().out
    cached(path, {"num": 2}, build)
    assert len(made) == 3 and [p.name for p in path.parent.iterdir()] == ["set.safetensors"]  # nothing left over


def test_world_version_is_part_of_the_key(tmp_path, monkeypatch):
    """A set of another version of the world is made again."""
    for version in (WORLD_VERSION, WORLD_VERSION + 1):
        monkeypatch.setattr(data, "WORLD_VERSION", version)
        photo_set(2, folder=tmp_path)
        (path,) = tmp_path.iterdir()
        assert read_metadata(path)["key"]["version"] == version


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file"):
        cached(tmp_path / "file" / "set.safetensors", {}, lambda: {"x": torch.zeros(1)})


def test_uint8_and_pixels_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(levels)
    assert pixels.min() == -1 and pixels.max() == 1 and torch.equal(to_uint8(pixels), levels)
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))
