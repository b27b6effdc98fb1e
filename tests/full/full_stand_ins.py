"""The full preset made tiny, stand-ins for PixArt's weights and encoders: for the tests here and latents_worker.py.

The golden tiny PixArt has full shapes but depth and width; the VAE and the T5 are a few lines each.
"""

import json
import zlib

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from safetensors.torch import load_file

import full.encoders
import full.latents
import full.real_set
from data import LATENT_SCALE
from dit import PRESETS, Config, DiT
from full.pixart import PIXART_BLOCK_NAMES, PIXART_NAMES

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

ENCODERS = ("--vae", "vae", "--text_encoder", "text_encoder")
DRAW = ("--base", "pixart.pth", "--synthetic", "latents", "--text_encoder", "text_encoder")
TRAIN = ("--preset", "full", "--base", "pixart.pth", "--synthetic", "latents", "--real", "real", "--out", ".",
         "--batch", 1)


def stand_in_vae(folder, device="cpu"):
    """Latents are the mean colour of each 8 x 8 pixels and its spread: enough to tell images apart and decode them."""

    def encode(images):
        mean = F.avg_pool2d(images, 8)
        mean = torch.cat([mean, mean.mean(dim=1, keepdim=True)], dim=1) / LATENT_SCALE
        return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)

    return encode, lambda latents: F.interpolate(latents[:, :3].float(), scale_factor=8).clamp(-1, 1)


def stand_in_text_encoder(folder, device="cpu", length=120):
    """A random vector for each word, and one for the end."""

    def vector(word):
        return torch.randn(PRESETS["full"].text_dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))

    return lambda captions: [torch.stack([vector(word) for word in [*caption.split(), "</s>"]]) for caption in captions]


def use_stand_ins(replace_attribute, vae=stand_in_vae):
    """Puts the stand-ins in the encoders' place, wherever they are called; replace_attribute(module, name, value)."""
    for module in (full.encoders, full.latents):
        replace_attribute(module, "load_vae", vae)
    for module in (full.encoders, full.latents, full.real_set):
        replace_attribute(module, "load_text_encoder", stand_in_text_encoder)


def tiny_pixart():
    """The golden case's weights, under PixArt's own names."""
    golden = load_file(GOLDEN / "pixart.safetensors").items()
    return {name.removeprefix("official."): tensor for name, tensor in golden if name.startswith("official.")}


def random_pixart(config):
    """Weights of this configuration, under PixArt's own names."""
    torch.manual_seed(0)
    model = DiT(config)
    torch.nn.init.normal_(model.final_linear.weight, std=0.02)
    names = {ours: theirs for ours, (theirs, _) in PIXART_NAMES.items()}
    names |= {f"blocks.{k}.{ours}": f"blocks.{k}.{theirs}" for k in range(config.depth)
              for ours, (theirs, _) in PIXART_BLOCK_NAMES.items()}
    return {name.replace(ours, names[ours]): tensor for name, tensor in model.state_dict().items() for ours in names
            if name in (ours, f"{ours}.weight", f"{ours}.bias")}


@pytest.fixture
def full_run(tmp_path, monkeypatch):
    """run(program, *flags) with the preset full made tiny, PixArt's weights and folders for its encoders."""
    monkeypatch.setitem(PRESETS, "full", CONFIG)
    use_stand_ins(monkeypatch.setattr)
    torch.save({"state_dict": tiny_pixart()}, tmp_path / "pixart.pth")
    for part in ("vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"part": part}))
    monkeypatch.chdir(tmp_path)

    def run(program, *flags):
        program.main([str(flag) for flag in flags])

    return run, tmp_path
