"""The full preset, each step as its program: objects on disk, encode, real set, both stages, samples, measures; with
full_stand_ins.py in place of PixArt and its encoders.
"""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from full_stand_ins import CONFIG, DRAW, ENCODERS, TRAIN, full_run, random_pixart  # noqa: F401

import evaluate
import full.latents
import full.real_set
import sample
import train_stage1
import train_stage2
from dit import PRESETS, load_model
from domain_shifter import load_shifters
from full.objects import write_object, write_toy_objects
from full.pixart import load_pixart
from support.files import load_tensors
from support.speed import promising_dtypes
from toy.render import Look, render
from toy.world import asset_captions, sample_assets

FULL = PRESETS["full"]
DTYPE = promising_dtypes()[-1]          # bfloat16, but on a CPU without instructions for it, which takes many minutes


def test_the_whole_pipeline_from_renders_to_measures(full_run, capsys):
    """Renders on disk, encode, real set, stage 1, stage 2, sample, decode, evaluate, each as its command."""
    run, out = full_run
    write_toy_objects("objects", 3, 128)
    run(full.latents, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 2)
    assert sorted(path.name for path in (out / "latents").glob("*")) == ["0000.safetensors", "0002.safetensors"]
    run(full.real_set, "real", *DRAW, "--num_steps", 2)
    with pytest.raises(FileNotFoundError, match="train_stage1.py --preset full"):
        run(train_stage2, *TRAIN, "--steps", 2, "--real_warmup", 1)
    run(train_stage1, *TRAIN, "--steps", 4, "--lr", 0.01, "--warmup", 1)
    run(train_stage2, *TRAIN, "--steps", 8, "--real_warmup", 1, "--lr", 0.01, "--warmup", 1, "--ema", 0.5)
    shifters = load_shifters("shifters.safetensors", config=CONFIG)
    assert shifters.W_left.abs().max() > 1e-3
    base = load_pixart("pixart.pth", 2, 16)
    model = load_model("realiz3d_texturing.safetensors", config=CONFIG)
    assert model.control_embedder.weight.abs().max() > 1e-3
    for (name, a), b in zip(base.state_dict().items(), model.state_dict().values()):
        assert (a - b).abs().max() > 1e-4, name
    half = base.final_linear.weight.view(2, 2, 8, 32)[:, :, 4:], model.final_linear.weight.view(2, 2, 8, 32)[:, :, 4:]
    assert (half[0] - half[1]).abs().max() < 0.02 * half[0].abs().max()  # the variance half only decays: eps trains
    run(sample, "--model", "realiz3d_texturing.safetensors", "--objects", "objects/0000", "objects/0002", *ENCODERS,
        "--domain", "shifted", "--num_steps", 2, "--views", "views", "--out", "sample.png")
    images = [evaluate.read_image(out / f"views/shifted/{name}/color_{v:03}.png") for name in ("0000", "0002") for v in
              range(4)]
    assert all(image.shape == (3, 128, 128) and image.std() > 0.01 for image in images)
    assert (out / "sample.png").exists()
    measured = evaluate.folder_consistency("views/shifted", "views/positions", [0, 90, 180, 270], 20, 0.55)
    assert 0 < measured["psnr"] < 40
    without_real = [flag for flag in TRAIN if flag not in ("--real", "real")]
    run(train_stage2, *without_real, "--steps", 1, "--task", "text", "--method", "syn_only")
    run(sample, "--model", "syn_only_text.safetensors", "--prompt", "a red mug", *ENCODERS, "--num_steps", 2,
        "--out", "text.png")
    assert (out / "text.png").exists()
    capsys.readouterr()


def test_the_pipeline_at_full_shapes(full_run, monkeypatch):
    """The same commands with 512-px views, 4,096 tokens, width 1152 and text of width 4096; only the depth is 1."""
    run, out = full_run
    config = replace(FULL, depth=1)
    monkeypatch.setitem(PRESETS, "full", config)
    torch.save(random_pixart(config), "pixart.pth")
    asset = sample_assets(1, 0)
    views = render(asset, Look("render", supersample=1), size=512)  # four times as fast as write_toy_objects
    write_object("objects/0000", asset_captions(asset)[0], views)
    run(full.latents, "encode", "objects", "latents", *ENCODERS)
    run(full.real_set, "real", *DRAW, "--num_steps", 1, "--cfg_scale", 1)
    run(train_stage1, *TRAIN, "--steps", 1, "--dtype", DTYPE)
    run(train_stage2, *TRAIN, "--steps", 2, "--dtype", DTYPE, "--real_warmup", 1, "--accumulate", 4,
        "--grad_checkpointing")
    run(sample, "--model", "realiz3d_texturing.safetensors", "--objects", "objects/0000", *ENCODERS, "--domain",
        "shifted", "--num_steps", 1, "--cfg_scale", 1, "--views", "views", "--out", "sample.png")
    assert evaluate.read_image("views/shifted/0000/color_000.png").shape == (3, 512, 512)


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes minutes: KILLS=10 pytest tests/full -k killed")
@pytest.mark.parametrize("what", ["encode", "real set", "training"])
def test_killed_and_started_again_ends_with_the_same_tensors(full_run, what):
    """kill -9 at KILLS random moments of work, the same command each time; then the files of a run left alone."""
    run, out = full_run
    write_toy_objects("objects", 24, 128)
    run(full.latents, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 2)
    run(full.real_set, "real", *DRAW, "--num_steps", 20)
    train = (*TRAIN, "--joint", "--no_freezing", "--steps", 150, "--save_every", 5)
    command, whole = {
        "encode": (("full.latents", "encode", "objects", "cut", *ENCODERS, "--size", 128, "--shard", 2), "latents"),
        "real set": (("full.real_set", "cut", *DRAW, "--num_steps", 20), "real"),
        "training": (("train_stage2", *train, "--name", "cut"), "whole"),
    }[what]
    if what == "training":
        run(train_stage2, *train, "--name", "whole")
    worker = [sys.executable, str(ROOT / "tests" / "full" / "latents_worker.py"), *map(str, command)]
    generator, kills = random.Random(0), int(os.environ["KILLS"])
    for kill in range(kills):
        process = subprocess.Popen(worker, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = set(out.glob("cut/*"))
        while process.poll() is None and set(out.glob("cut/*")) == before:
            time.sleep(0.005)  # from here on it works
        time.sleep(generator.random() * 0.1)
        assert process.poll() is None, f"finished before kill {kill}"
        process.kill()
        process.wait()
    done = subprocess.run(worker, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if what == "training":
        a, b = (load_tensors(f"{name}.safetensors")[0] for name in ("whole", "cut"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    else:
        whole, cut = ({path.name: path.read_bytes() for path in out.glob(f"{folder}/*.safetensors")}
                      for folder in (whole, "cut"))
        assert whole == cut and len(cut) == 12
