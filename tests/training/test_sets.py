"""What stages 1 and 2 start from."""

import pytest
import torch
from conftest import TINY, random_model

from dit import save_model
from support.files import save_tensors
from training.sets import read_set


def test_a_file_that_is_no_set_is_named(tmp_path):
    save_model(str(tmp_path / "model.safetensors"), TINY, random_model())
    with pytest.raises(ValueError, match="model.safetensors is no set of images"):
        read_set(str(tmp_path / "model.safetensors"))
    save_tensors(str(tmp_path / "set.safetensors"), {"image": torch.ones(2), "text": torch.zeros(2)})
    assert read_set(str(tmp_path / "set.safetensors"))["image"].tolist() == [1, 1]
