"""What stages 1 and 2 start from."""

import pytest
import torch
from conftest import TINY, random_model

from dit import save_model
from support.files import save_tensors
from training.sets import read_set


def test_a_file_that_is_no_set_is_named(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_model(path, TINY, random_model())
    with pytest.raises(ValueError, match="model.safetensors is no set of images"):
        read_set(path, 8)


@pytest.mark.parametrize("image, text, message", [
    (torch.ones(2, 1, 3, 8, 8), None, "'image' must be uint8 (N, V, 3, 8, 8), not torch.float32"),
    (torch.ones(2, 1, 3, 9, 9, dtype=torch.uint8), None, "'image' must be uint8"),
    (torch.ones(2, 0, 3, 8, 8, dtype=torch.uint8), None, "'image' must be uint8"),
    (torch.ones(6, dtype=torch.uint8), None, "'image' must be uint8"),
    (None, torch.ones(2, 14), "'text' must be int64 (2, 14), not torch.float32"),
    (None, torch.ones(1, 14, dtype=torch.int64), "not torch.int64 (1, 14)"),
    (None, torch.ones(2, 20, dtype=torch.int64), "not torch.int64 (2, 20)"),
    (None, torch.full((2, 14), 64), "holds word ids 64 to 64"),
    (None, -torch.ones(2, 14, dtype=torch.int64), "holds word ids -1 to -1")])
def test_a_set_that_cannot_be_is_named_with_what_is_wrong(image, text, message, tmp_path):
    path = str(tmp_path / "set.safetensors")
    whole = {"image": torch.ones(2, 1, 3, 8, 8, dtype=torch.uint8), "text": torch.ones(2, 14, dtype=torch.int64)}
    save_tensors(path, whole)
    assert read_set(path, 8)["image"].shape == (2, 1, 3, 8, 8)
    save_tensors(path, whole | {name: value for name, value in (("image", image), ("text", text)) if value is not None})
    with pytest.raises(ValueError) as refused:
        read_set(path, 8)
    assert str(refused.value).startswith(path) and message in str(refused.value)
