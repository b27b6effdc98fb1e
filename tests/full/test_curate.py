"""The photographs of FID_I: chosen as brute force chooses, cut out exactly, and the same again on a second run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_clip
from PIL import Image

from full import curate
from support.folders import find_images
from support.launch import UsageError


def run(folder, out, *flags):
    curate.main([*map(str, (folder, out, "--clip", "clip", *flags))])


@pytest.fixture
def stand_in(monkeypatch):
    """In CLIP's place: how red an image is, or blue, as the caption asks. Yields the captions it was given."""
    captions = set()

    def load_clip(folder, device):
        def embed(images, texts):
            assert images.shape[0] == len(texts) == 1 and 0 <= images.min() <= images.max() <= 1
            captions.add(texts[0])
            score = images[:, 0 if "red" in texts[0] else 2].double().mean(dim=(1, 2))
            return torch.stack([score, (1 - score**2).sqrt()], dim=1), torch.tensor([[1.0, 0.0]])
        return embed
    monkeypatch.setattr(curate, "load_clip", load_clip)
    yield captions


def save(path, color, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = color if isinstance(color, Image.Image) else Image.new("RGB", size, color)
    image.save(path, **options)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


@pytest.fixture
def photos(tmp_path):
    """Two classes of plain images in all kinds of files and sizes; the redder an image, the less blue it is."""
    shades = np.random.default_rng(0).permutation(256)[:14]
    for k, (shade, ending) in enumerate(zip(shades, ("png", "jpg", "JPEG", "webp", "PNG", "JPG", "WEBP") * 2)):
        color, size = (int(shade), 60, 255 - int(shade)), (9 + 3 * (k % 3), 7 + k % 2)
        save(tmp_path / "photos" / ("red_mug", "blue_car")[k % 2] / f"{k:02}.{ending}", color, size, format="PNG")
    return tmp_path / "photos"


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_best_of_each_class_are_those_that_fewer_than_k_beat(tmp_path, photos, stand_in, capsys):
    run(photos, f"{tmp_path / 'out'}/", "--k", 3)
    assert stand_in == {"a photo of a red mug", "a photo of a blue car"}
    stored, written = json.loads((tmp_path / "out.json").read_text()), []
    assert list(stored["classes"]) == ["blue_car", "red_mug"] and len(stored["classes"]["red_mug"]) == 3
    for name, channel in (("blue_car", 2), ("red_mug", 0)):
        value = {path.name: pixels(path)[..., channel].mean() / 255 for path in (photos / name).iterdir()}
        assert len(value) == 7
        best = {image for image in value if sum(other > value[image] for other in value.values()) < 3}
        scores = stored["classes"][name]
        assert set(scores) == best and list(scores.values()) == sorted(scores.values(), reverse=True)
        assert scores == pytest.approx({image: value[image] for image in best}, abs=1e-6)
        for image in best:
            written.append(f"{name}/{Path(image).stem}.png")
            assert (pixels(tmp_path / "out" / written[-1]) == pixels(photos / name / image)).all()
    assert stored["settings"] == dict(source=str(photos), clip="clip", k=3, masks=None, prompt="a photo of a {}",
                                      size=None)
    assert find_images(tmp_path / "out") == sorted(tree(tmp_path / "out")) == sorted(written)
    sheet = pixels(tmp_path / "out.png")
    left, step = 8 + 6 * len("blue car"), 96 + 2
    for row, (name, scores) in enumerate(stored["classes"].items()):
        for column, image in enumerate(scores):
            tile = sheet[row * step:row * step + 96, left + column * step:left + column * step + 96]
            assert tile.shape == (96, 96, 3) and (tile == pixels(photos / name / image)[0, 0]).all()
    assert "3 images of each of 2 classes" in capsys.readouterr().out
    before = tree(tmp_path)
    (tmp_path / "out" / written[0]).unlink()  # as if the first run had been stopped
    run(photos, f"{tmp_path / 'out'}/", "--k", 3)
    assert tree(tmp_path) == before


def test_of_equals_the_first_names_are_taken(tmp_path, stand_in):
    for name, red in (("d", 90), ("c", 90), ("e", 200), ("b", 90), ("a", 10)):
        save(tmp_path / "photos" / "red" / f"{name}.png", (red, 0, 0))
    run(tmp_path / "photos", tmp_path / "out", "--k", 3)
    assert list(json.loads((tmp_path / "out.json").read_text())["classes"]["red"]) == ["e.png", "b.png", "c.png"]


def test_the_object_stands_on_white_exactly(tmp_path, stand_in):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 9, 3))
    mask = rng.integers(0, 256, (6, 9))
    mask[:2], mask[-2:] = 255, 0
    save(tmp_path / "photos" / "red" / "a.png", Image.fromarray(image.astype(np.uint8)))
    save(tmp_path / "masks" / "red" / "a.png", Image.fromarray(mask.astype(np.uint8)))
    save(tmp_path / "photos" / "red" / "b.png", (0, 0, 0))  # not chosen, so it needs no mask
    run(tmp_path / "photos", tmp_path / "out", "--k", 1, "--masks", tmp_path / "masks")
    got = pixels(tmp_path / "out" / "red" / "a.png")
    assert (got[:2] == image[:2]).all() and (got[-2:] == 255).all()
    total = mask[..., None] * image + (255 - mask[..., None]) * 255  # over 255, rounded; a half never occurs
    assert (got == (2 * total + 255) // 510).all()


def test_size_crops_the_centre(tmp_path, stand_in):
    image = Image.new("RGB", (12, 6), "blue")
    image.paste((255, 0, 0), (3, 0, 9, 6))
    save(tmp_path / "photos" / "red" / "a.png", image)
    for size in (6, 3):
        run(tmp_path / "photos", tmp_path / "out", "--k", 1, "--size", size)
        got = pixels(tmp_path / "out" / "red" / "a.png")
        assert got.shape == (size, size, 3) and (got[:, 1:-1] == (255, 0, 0)).all()
        assert size == 3 or (got == (255, 0, 0)).all()  # resizing blurs the edge


def test_what_cannot_be_done_is_refused_by_name(tmp_path, photos, stand_in):
    out, masks = tmp_path / "out", tmp_path / "masks"
    small, empty, twice, cars = (tmp_path / name for name in ("small", "empty", "twice", "cars"))
    save(small / "mug" / "a.png", "red")
    (empty / "mug").mkdir(parents=True)
    for name in ("a.png", "a.webp"):
        save(twice / "mug" / name, "red")
    save(cars / "car" / "a.png", "red", (4, 2))

    def refused(error, words, folder, target, *flags):
        with pytest.raises(error, match=words):
            run(folder, target, *flags)
        assert not out.exists() and not Path(f"{out}.json").exists()

    refused(ValueError, "small/mug has 1 image.*--k 2", small, out, "--k", 2)
    refused(ValueError, "empty/mug holds no", empty, out)
    refused(FileNotFoundError, "small/mug holds no folder of images per class", small / "mug", out)
    refused(FileNotFoundError, "nowhere holds no folder", tmp_path / "nowhere", out)
    refused(ValueError, "twice/mug has two images called a:", twice, out, "--k", 1)
    refused(ValueError, "photos/out lies in .*photos", photos, photos / "out")
    refused(ValueError, "masks lies in .*masks", cars, masks, "--k", 1, "--masks", masks)
    refused(SystemExit, "2", photos, out, "--k", 0)
    refused(SystemExit, "2", photos, out, "--k", 1, "--size", 0)
    refused(ValueError, "--prompt wants {}", photos, out, "--prompt", "a mug")
    cut = (cars, out, "--k", 1, "--masks", masks)
    refused(FileNotFoundError, "masks/car has 0 mask.s. of the images in .*cars/car, fewer than --k 1", *cut)
    file = masks.parent / "file"
    file.touch()
    for target, words in ((file, "file/car/x"), (file / "below", "below.json")):
        refused(UsageError, f"OUT '.*{words}' must be the name of a file", cars, target, "--k", 1)
    for ending in ("json", "png"):
        (tmp_path / "taken" / f"o.{ending}").mkdir(parents=True)
        refused(UsageError, f"taken/o.{ending}' must be the name of a file", cars, tmp_path / "taken" / "o", "--k", 1)
        (tmp_path / "taken" / f"o.{ending}").rmdir()
    assert not stand_in  # all this before the first score
    for wrong, words in (
        (Image.new("L", (2, 4), 255), "masks/car/a.png has 2 x 4 pixels, its image 4 x 2"),
        (Image.new("RGB", (4, 2), "red"), "masks/car/a.png is no mask"),
        (Image.new("L", (4, 2), 1), "masks/car/a.png is no mask"),  # 0 and 1, not 0 and 255
    ):
        save(masks / "car" / "a.png", wrong)
        refused(ValueError, words, *cut)
    save(tmp_path / "full" / "car" / "z.png", "red")
    with pytest.raises(ValueError, match="full/car/z.png is not among the chosen"):
        run(cars, tmp_path / "full", "--k", 1)
    assert list(tree(tmp_path / "full")) == ["car/z.png"]


def test_nothing_is_written_where_one_mask_is_missing(tmp_path, stand_in):
    """That of one of the chosen: it takes scores to find it."""
    for name in ("blue", "red"):
        for k in range(2):
            save(tmp_path / "photos" / name / f"{k}.png", (90 + k, 0, 90 + k))
            if (name, k) != ("red", 1):
                save(tmp_path / "masks" / name / f"{k}.png", Image.new("L", (8, 8), 255))
    with pytest.raises(FileNotFoundError, match="no mask .*masks/red/1.png"):
        run(tmp_path / "photos", tmp_path / "out", "--k", 1, "--masks", tmp_path / "masks")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.png").exists()


def test_a_clip_model_on_disk_chooses(tmp_path):
    """Images of several sizes, against the model's own embeddings of what its processor makes of the files."""
    clip = tmp_path / "clip"
    clip.mkdir()
    model, tokenizer, resize = tiny_clip(clip)
    rng = np.random.default_rng(0)
    for k, size in enumerate(((32, 32), (40, 56), (56, 40), (90, 33), (32, 32))):
        for name in ("mug", "red_mug"):
            noise = rng.integers(0, 256, (2 + k, 3, 3), dtype=np.uint8)
            save(tmp_path / "photos" / name / f"{k}.png", Image.fromarray(noise).resize(size))
    run(tmp_path / "photos", tmp_path / "out", "--k", 2, "--clip", clip, "--prompt", "a {}")
    vector = lambda out: out if torch.is_tensor(out) else out.pooler_output
    for name, caption in (("mug", "a mug"), ("red_mug", "a red mug")):
        wanted = {}
        for path in (tmp_path / "photos" / name).iterdir():
            with torch.no_grad(), Image.open(path) as image:
                a = vector(model.get_image_features(**resize(image, return_tensors="pt")))[0]
                b = vector(model.get_text_features(**tokenizer(caption, return_tensors="pt")))[0]
            wanted[path.name] = float(a @ b / (a.norm() * b.norm()))
        got = json.loads((tmp_path / "out.json").read_text())["classes"][name]
        assert list(got) == sorted(wanted, key=wanted.get)[:-3:-1]
        assert got == pytest.approx({image: wanted[image] for image in got}, abs=1e-5)
