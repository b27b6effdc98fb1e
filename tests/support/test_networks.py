"""The networks that a user brings: what is said where one is missing, and CLIP's embeddings."""

import pytest
import torch
from conftest import tiny_clip

from evaluate import clip_score
from support.networks import load_clip, load_inception, load_lpips


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_missing_or_wrong_networks_say_what_to_get(tmp_path):
    for load, words in (
        (load_inception, "inception-2015-12-05.pt"),
        (load_lpips, "pip install lpips"),
        (load_clip, "clip-vit-base-patch32"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            load(str(tmp_path / "none"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        load_inception(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="is not a readable"):
        load_lpips(str(tmp_path / "text"))
    torch.save({"lin0.model.1.weight": torch.zeros(1)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="lacks net.slice1.0.weight"):
        load_lpips(str(tmp_path / "part.pt"))


def test_clip_score_of_a_model_on_disk(tmp_path):
    """Against the model's own embeddings."""
    model, tokenizer, resize = tiny_clip(tmp_path)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = ["a red mug", "a mug", "a red mug"]
    got = clip_score(*load_clip(str(tmp_path))(images, captions))
    pixels = ((images * 255).round() / 255 - torch.tensor(resize.image_mean)[:, None, None])
    with torch.no_grad():
        image = model.eval().get_image_features(pixels / torch.tensor(resize.image_std)[:, None, None])
        each = [model.get_text_features(**tokenizer(caption, return_tensors="pt")) for caption in captions]
    vector = lambda out: out if torch.is_tensor(out) else out.pooler_output
    wanted = clip_score(vector(image), torch.cat([vector(text) for text in each]))
    assert got.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
