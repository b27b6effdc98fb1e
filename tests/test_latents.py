"""Both stages as the full preset runs them: PixArt weights, latents, text vectors; here with the golden tiny PixArt."""

import sys

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import train_stage1
import train_stage2
from dit import PRESETS, Config, load_model, load_pixart, load_tensors
from domain_shifter import load_shifters

CONFIG = Config(
    image_size=16,
    patch_size=2,
    channels=4,
    out_channels=8,
    control_channels=8,
    num_views=4,
    depth=3,
    width=32,
    heads=2,
    text_dim=32,
    text_length=120,
    vocab_size=0,
    output_skip=False,
    qk_norm=False,
)


@pytest.fixture
def full_run(tmp_path, monkeypatch):
    """run(script module, *flags) with the preset full made tiny, and its files on disk."""
    monkeypatch.setitem(PRESETS, "full", CONFIG)
    torch.manual_seed(0)
    pixart = {
        name.removeprefix("official."): tensor
        for name, tensor in load_file(GOLDEN / "pixart.safetensors").items()
        if name.startswith("official.")
    }
    save_file(pixart, tmp_path / "pixart.safetensors")
    words = torch.arange(120) < 9
    text = lambda n: {"text": torch.randn(n, 120, 32).half(), "text_mask": words.repeat(n, 1)}  # noqa: E731
    null = {f"null_{key}": value for key, value in text(1).items()}
    save_file(
        {
            "image": torch.randn(5, 4, 4, 16, 16).half(),
            "control": torch.randn(5, 4, 8, 16, 16).half(),
            **text(5),
            **null,
        },
        tmp_path / "syn.safetensors",
    )
    save_file({"image": torch.randn(20, 1, 4, 16, 16).half(), **text(20)}, tmp_path / "real.safetensors")

    def run(module, *flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                f"{module.__name__}.py",
                "--preset",
                "full",
                "--base",
                str(tmp_path / "pixart.safetensors"),
                "--synthetic",
                str(tmp_path / "syn.safetensors"),
                "--real",
                str(tmp_path / "real.safetensors"),
                "--out",
                str(tmp_path),
                "--batch",
                "1",
                *flags,
            ],
        )
        module.main()

    return run, tmp_path


def test_both_stages_train_pixart_on_latents(full_run):
    run, out = full_run
    with pytest.raises(FileNotFoundError, match="train_stage1.py --preset full"):
        run(train_stage2, "--steps", "2")
    run(train_stage1, "--steps", "4", "--lr", "0.01", "--warmup", "1")
    run(train_stage2, "--steps", "8", "--real_warmup", "1", "--lr", "0.01", "--warmup", "1", "--ema", "0.5")
    shifters = load_shifters(str(out / "shifters.safetensors"), config=CONFIG)
    assert shifters.W_left.abs().max() > 1e-3
    base = load_pixart(str(out / "pixart.safetensors"), 2, 16)
    model = load_model(str(out / "realiz3d_texturing.safetensors"), config=CONFIG)
    assert model.control_embedder.weight.abs().max() > 1e-3 and model.view_encoding.abs().max() > 1e-3
    for (name, a), b in zip(base.state_dict().items(), model.state_dict().values()):
        assert (a - b).abs().max() > 1e-4, name
    half = base.final_linear.weight.view(2, 2, 8, 32)[:, :, 4:], model.final_linear.weight.view(2, 2, 8, 32)[:, :, 4:]
    assert (half[0] - half[1]).abs().max() < 0.02 * half[0].abs().max()  # the variance half only decays: eps trains


def test_a_set_without_the_empty_caption_is_refused(full_run):
    run, out = full_run
    tensors = {key: value for key, value in load_tensors(str(out / "syn.safetensors"))[0].items() if "null" not in key}
    save_file(tensors, out / "syn.safetensors")
    with pytest.raises(ValueError, match="null_text"):
        run(train_stage1, "--steps", "1")
