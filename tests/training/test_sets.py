"""What stages 1 and 2 start from."""

import pytest
import torch
from conftest import ALONE, TINY, random_model, tiny_sets

from dit import PRESETS, save_model
from support.files import checksum, save_tensors
from train_stage2 import parse_args
from training.sets import base_model, read_set, training_sets


def test_a_base_model_of_view_encodings_that_cannot_learn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    path, model = str(tmp_path / "base.safetensors"), random_model()
    save_model(path, TINY, model)
    args = parse_args(["--base", path])
    assert torch.equal(base_model(args, "cpu").view_encoding, model.view_encoding)
    torch.nn.init.zeros_(model.view_encoding)
    save_model(path, TINY, model)
    with pytest.raises(ValueError, match="base.safetensors has view encodings of zero"):
        base_model(args, "cpu")


def test_renders_of_ones_own_take_real_images_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    paths = [str(tmp_path / f"{domain}.safetensors") for domain in ("syn", "real")]
    for path, tensors in zip(paths, tiny_sets().values()):
        save_tensors(path, tensors)
    alone = parse_args(["--synthetic", paths[0]])
    assert set(training_sets(alone, ALONE, views=4, needs_real=False)) == {"syn"}
    with pytest.raises(ValueError, match="--synthetic names renders of your own: .* with --real"):
        training_sets(alone, ALONE, views=4)
    both = training_sets(parse_args(["--synthetic", paths[0], "--real", paths[1]]), ALONE, views=4)
    assert {domain: len(made["image"]) for domain, made in both.items()} == {"syn": 6, "real": 24}


def test_a_file_that_is_no_set_is_named(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_model(path, TINY, random_model())
    with pytest.raises(ValueError, match="model.safetensors is no set of images"):
        read_set(path, 8, views=1)


@pytest.mark.parametrize("name, tensor, message", [
    ("image", torch.ones(2, 1, 3, 8, 8), "'image' must be torch.uint8 (2, 1, 3, 8, 8), not torch.float32"),
    ("image", torch.ones(2, 1, 3, 9, 9, dtype=torch.uint8), "not torch.uint8 (2, 1, 3, 9, 9)"),
    ("image", torch.ones(2, 2, 3, 8, 8, dtype=torch.uint8), "not torch.uint8 (2, 2, 3, 8, 8)"),
    ("image", torch.ones(0, 1, 3, 8, 8, dtype=torch.uint8), "not torch.uint8 (0, 1, 3, 8, 8)"),
    ("image", torch.tensor(1, dtype=torch.uint8), "not torch.uint8 ()"),
    ("text", torch.ones(2, 14), "'text' must be torch.int64 (2, 14), not torch.float32"),
    ("text", torch.ones(1, 14, dtype=torch.int64), "not torch.int64 (1, 14)"),
    ("text", torch.ones(2, 20, dtype=torch.int64), "not torch.int64 (2, 20)"),
    ("text", torch.full((2, 14), 64), "holds word ids 64 to 64"),
    ("text", -torch.ones(2, 14, dtype=torch.int64), "holds word ids -1 to -1"),
    ("control", torch.ones(2, 1, 6, 8, 8), "'control' must be torch.float16"),
    ("control", torch.ones(1, 1, 6, 8, 8).half(), "not torch.float16 (1, 1, 6, 8, 8)"),
    ("control", torch.full((2, 1, 6, 8, 8), torch.nan).half(), "not finite")])
def test_a_set_that_cannot_be_is_named_with_what_is_wrong(name, tensor, message, tmp_path):
    path = str(tmp_path / "set.safetensors")
    whole = {"image": torch.ones(2, 1, 3, 8, 8, dtype=torch.uint8), "text": torch.ones(2, 14, dtype=torch.int64)}
    save_tensors(path, whole)
    assert read_set(path, 8, views=1)["image"].shape == (2, 1, 3, 8, 8)
    save_tensors(path, whole | {name: tensor})
    with pytest.raises(ValueError) as refused:
        read_set(path, 8, views=1)
    assert str(refused.value).startswith(path) and message in str(refused.value)


def test_a_set_whose_bytes_have_changed_is_named(tmp_path):
    path, real = str(tmp_path / "set.safetensors"), tiny_sets()["real"]
    save_tensors(path, real, checksum=checksum(real))
    assert read_set(path, 8, views=1)["image"].shape == (24, 1, 3, 8, 8)
    save_tensors(path, real | {"image": real["image"] ^ 1}, checksum=checksum(real))
    with pytest.raises(ValueError, match="set.safetensors is damaged, its bytes have changed"):
        read_set(path, 8, views=1)
