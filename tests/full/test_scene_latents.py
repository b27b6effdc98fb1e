"""full/scenes.py: scenes of RefAny3D on disk, in shards, trained on and drawn with at full shapes."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from full_stand_ins import CONFIG, ENCODERS, full_run, stand_in_text_encoder, stand_in_vae  # noqa: F401
from PIL import Image

import full.scenes
from data import LATENT_SCALE
from dit import PRESETS, DiT
from full.scenes import VIEWS, SceneLatents, read_scene_folder
from related import refany3d
from related.refany3d import RefAny3D, References
from support.files import load_tensors, save_tensors

TRAIN = ("--preset", "full", "--base", "pixart.pth", "--synthetic", "shards", "--out", ".")
SHORT = ("--batch", 2, "--steps", 2, "--lr", 0.1, "--warmup", 0, "--ema", 0, "--log_every", 1)


def test_scenes_are_encoded_trained_on_and_drawn(full_run, monkeypatch):
    run, out = full_run
    run(full.scenes, "toy", "scenes", "--num", 3, "--size", 128)
    run(full.scenes, "encode", "scenes", "shards", *ENCODERS, "--size", 128, "--shard", 2)
    caption, pictures = read_scene_folder(out / "scenes" / "0001", 128)
    assert caption.startswith("a ") and caption.endswith(" background")
    tensors, metadata = load_tensors(str(out / "shards" / "0000.safetensors"))
    assert metadata["shard"]["captions"]["0001"] == caption
    scenes = SceneLatents("shards", CONFIG, num_references=4)
    rows = scenes.rows(torch.tensor([1, 2]))
    assert scenes.shape == (3, 2) and rows["image"].shape == (2, 2, 2, 4, 16, 16)
    assert rows["control"].shape == (2, 2, 4, 4, 16, 16) and rows["text_mask"][0].sum() == len(caption.split()) + 1
    for kind in range(2):                               # the stand-in's latents are mean colours
        small = F.avg_pool2d(pictures[kind], 8)
        assert (rows["image"][0, kind, 0, :3] * LATENT_SCALE - small[0]).abs().max() < 2e-3
        assert (rows["control"][0, kind, :, :3] - small[1::2]).abs().max() < 2e-3
    alone = SceneLatents("shards", CONFIG, num_references=1, points=False)
    assert alone.shape == (3, 1) and alone.sample(0)["control"].shape == (1, 1, 4, 16, 16)
    # trained on, and drawn with a mesh
    run(refany3d, *TRAIN, *SHORT)
    tensors, metadata = load_tensors("refany3d.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("W_left"))
    assert metadata["config"]["channels"] == 4 and metadata["settings"]["num_references"] == 8
    for name, stand_in in (("load_vae", stand_in_vae), ("load_text_encoder", stand_in_text_encoder)):
        monkeypatch.setattr(refany3d, name, stand_in)
    monkeypatch.setattr(refany3d, "mesh_references", lambda path, size: torch.full((1, 2, VIEWS, 3, size, size), 90,
                                                                                   dtype=torch.uint8))
    drawing = ("--preset", "full", "--base", "pixart.pth", "--out", ".", "--prompt", "a mug, at sunset")
    run(refany3d, *drawing, "--mesh", "mug.glb", *ENCODERS, "--num_steps", 2)
    assert Image.open("refany3d_drawn.png").height > 2 * 128
    refuses(refany3d, (*drawing, "--mesh", "mug.glb"), 2, "needs PixArt's --vae and --text_encoder")
    refuses(refany3d, TRAIN[:4], 2, "--preset full needs --synthetic DIR")
    refuses(refany3d, (*TRAIN, "--renders"), 2, "--renders would do nothing")
    refuses(full.scenes, ("toy", "scenes"), 1, "scenes is there already")           # as of other folders of output
    for command in (("toy", "vae/config.json"), ("encode", "scenes", "vae/config.json", *ENCODERS)):
        refuses(full.scenes, command, 2, "out 'vae/config.json/", "must be the name of a file")
    refuses(full.scenes, ("encode", "scenes", "more", *ENCODERS, "--size", 100), 2, "--size must be a multiple of 8")
    tensors, metadata = load_tensors(str(out / "shards" / "0000.safetensors"))
    for name, value in (("0001.points", tensors["0001.points"][:4]), ("0001.text", tensors["0001.text"][:0])):
        save_tensors("damaged/0000.safetensors", tensors | {name: value}, shard=metadata["shard"])
        with pytest.raises(ValueError, match="object 0001 lacks color"):
            SceneLatents("damaged", CONFIG, num_references=8)


def test_full_shapes():
    """PixArt's width, latents and text at depth 1; what trains at its depth, counted by hand."""
    full, rank = PRESETS["full"], 8
    dit = DiT(replace(full, depth=1, control_channels=0, num_views=0))
    network = RefAny3D(dit, References(num_references=1, rank=rank))
    x, control = torch.randn(1, 2, 4, 64, 64), torch.randn(1, 2, 1, 4, 64, 64)
    text, mask = torch.randn(1, 120, 4096), torch.arange(120)[None] < 9
    with torch.no_grad():
        assert network(x, torch.tensor([500]), text, control, text_mask=mask).shape == x.shape
    d, two = full.width, 2 * rank                               # two LoRAs
    block = two * (d + 3 * d) + two * 2 * d + two * 5 * d               # queries to values, projection, MLP
    around = two * (4 * 4 + d) + two * 7 * d + 2 * 256 + 257 * d + (d + 1) * d          # patches, adaLN, switcher
    trains = [p.numel() for p in network.parameters() if p.requires_grad]
    assert sum(trains) == block + around and 28 * block + around == 7_449_600


def test_bad_scenes_are_named(full_run):
    run, out = full_run
    run(full.scenes, "toy", "scenes", "--num", 1, "--size", 64)
    with pytest.raises(ValueError, match="color_000.png is of 64 x 64 pixels, not 128"):
        read_scene_folder(out / "scenes" / "0000", 128)
    (out / "scenes" / "0000" / "meta.json").write_text(json.dumps({"caption": ""}))
    with pytest.raises(ValueError, match="meta.json has no caption"):
        read_scene_folder(out / "scenes" / "0000", 64)
    (out / "scenes" / "0000" / "meta.json").write_text(json.dumps({"caption": "a mug"}))
    (out / "scenes" / "0000" / "points_003.png").unlink()
    with pytest.raises(FileNotFoundError, match="points_003"):
        read_scene_folder(out / "scenes" / "0000", 64)
    objects = {f"a.{name}": torch.zeros(4, 2, 4, 16, 16).half() for name in ("color", "normal", "position")}
    objects |= {"a.text": torch.zeros(3, 32).half(), "null_text": torch.zeros(1, 32).half()}
    key = dict(scale=LATENT_SCALE, text_encoder="t5")
    save_tensors("objects/a.safetensors", objects, shard=dict(key=key, captions={"a": "a mug"}))
    with pytest.raises(ValueError, match="objects holds no scenes"):
        SceneLatents("objects", CONFIG, num_references=8)
