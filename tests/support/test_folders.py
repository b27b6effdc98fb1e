"""Images in folders: which are found, how they are read, in which batches."""

import json

import pytest
from PIL import Image

from support.folders import find_images, in_batches, read_caption, read_image


def test_images_of_any_kind_are_read_and_bad_ones_named(tmp_path):
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 2))
    half.save(tmp_path / "a.png")
    Image.new("L", (4, 2), 51).save(tmp_path / "b.webp", lossless=True)
    assert find_images(tmp_path) == ["a.png", "b.webp"] and find_images(tmp_path, "b*") == ["b.webp"]
    image = read_image(tmp_path / "a.png")
    assert image[:, 0].T.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]]  # blue, then white, not red
    assert read_image(tmp_path / "b.webp").unique().tolist() == pytest.approx([0.2])
    (tmp_path / "c.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot read the image .*c.png"):
        read_image(tmp_path / "c.png")
    with pytest.raises(ValueError, match="holds no PNG"):
        find_images(tmp_path, "z*")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_images(tmp_path / "elsewhere")


def test_batches_hold_images_of_one_size_and_keep_their_order(tmp_path):
    for k, size in enumerate((3, 3, 5, 3, 3, 3)):
        Image.new("L", (size, size), 10 * k).save(tmp_path / f"{k}.png")
    seen = []

    def work(images, paths):
        seen.append(len(paths))
        return images.mean(dim=(1, 2, 3))

    values = in_batches([str(tmp_path / f"{k}.png") for k in range(6)], work, size=2)
    assert seen == [2, 1, 2, 1] and (values * 255).tolist() == pytest.approx([0, 10, 20, 30, 40, 50])


def test_captions_stand_beside_the_image_or_in_its_meta_json(tmp_path):
    (tmp_path / "a.txt").write_text("a red mug\n")
    assert read_caption(str(tmp_path / "a.png")) == "a red mug"
    with pytest.raises(FileNotFoundError, match="no caption for .*b.png"):
        read_caption(str(tmp_path / "b.png"))
    (tmp_path / "meta.json").write_text(json.dumps({"caption": "a blue mug"}))
    assert read_caption(str(tmp_path / "b.png")) == "a blue mug"
    (tmp_path / "meta.json").write_text("{}")  # as in Objaverse-Ortho10View
    (tmp_path / "caption.txt").write_text("a green mug\n")
    assert read_caption(str(tmp_path / "b.png")) == "a green mug"
