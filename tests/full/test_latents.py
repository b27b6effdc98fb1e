"""full/latents.py and full/real_set.py: shards are written whole, read as they are, refused where they do not fit."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_line_error, script
from full_stand_ins import CONFIG, DRAW, ENCODERS, full_run  # noqa: F401
from safetensors.torch import save_file

import full.latents
import full.real_set
from data import LATENT_SCALE, control_maps
from full.latents import MAPS, LatentSet, benchmark_reading
from full.objects import read_object, write_toy_objects
from support.files import load_tensors, save_tensors
from training.batches import with_noise
from training.loop import Iteration


def test_encode_is_resumable_and_refuses_another_making(full_run):
    run, out = full_run
    write_toy_objects("objects", 3, 128)
    encode = ("encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 1)
    run(full.latents, *encode)
    first = {path.name: path.read_bytes() for path in (out / "latents").glob("*")}
    (out / "latents" / "0001.safetensors").unlink()
    run(full.latents, *encode)
    assert {path.name: path.read_bytes() for path in (out / "latents").glob("*")} == first
    tensors, metadata = load_tensors(str(out / "latents" / "0001.safetensors"))
    caption, views = read_object(out / "objects" / "0001")
    assert metadata["shard"]["captions"] == {"0001": caption}
    mean = tensors["0001.normal"][:, 0].float() * LATENT_SCALE
    assert (mean[:, :3] - F.avg_pool2d(control_maps(views)[0, :, :3], 8)).abs().max() < 2e-3
    assert tensors["0001.text"].shape == (len(caption.split()) + 1, 32) and tensors["0001.color"].dtype == torch.float16
    (out / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="0000.safetensors was made otherwise: vae"):
        run(full.latents, *encode)
    (out / "vae" / "config.json").write_text(json.dumps({"part": "vae"}))
    write_toy_objects("objects", 4, 128)
    with pytest.raises(ValueError, match="holds other objects"):
        run(full.latents, *encode[:-1], 2)


@pytest.fixture
def shards(tmp_path):
    """Two shards of three objects, every number different."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).half()  # noqa: E731
    objects = {f"{k}.{part}": draw(4, 2, 4, 16, 16) for k in range(3) for part in MAPS}
    objects |= {f"{k}.text": draw(3 + k, 32) for k in range(3)}
    key = dict(scale=LATENT_SCALE, text_encoder="t5")
    for name, ids in (("0", "01"), ("more/2", "2")):
        null_text = draw(1, 32) if ids == "01" else torch.ones(1, 32).half()
        tensors = {n: tensor for n, tensor in objects.items() if n[0] in ids} | {"null_text": null_text}
        save_tensors(f"{tmp_path}/{name}.safetensors", tensors, shard=dict(key=key, captions=dict.fromkeys(ids, "a")))
    return tmp_path, objects


def test_rows_of_shards_are_the_tensors_that_were_written(shards):
    folder, objects = shards
    grids = LatentSet(folder, CONFIG, control=True)
    rows = grids.rows(torch.tensor([2, 0]))
    assert grids.shape == (3, 4) and torch.equal(rows["image"][0], objects["2.color"])
    means = torch.cat([objects["0.normal"][:, 0], objects["0.position"][:, 0]], dim=1)
    assert torch.equal(rows["control"][1], means * LATENT_SCALE)
    assert rows["text_mask"].sum(1).tolist() == [5, 3] and torch.equal(rows["text"][0, :5], objects["2.text"])
    assert rows["text"].shape == (2, 120, 32) and not rows["text"][0, 5:].any()
    single = LatentSet(folder, CONFIG, views=False)
    rows = single.rows(torch.arange(12))
    assert single.shape == (12, 1) and set(rows) == {"image", "text", "text_mask"}
    for k in range(12):
        assert torch.equal(rows["image"][k, 0], objects[f"{k // 4}.color"][k % 4])
    assert single.null["text_mask"].sum() == 1


def test_shards_that_do_not_fit_are_refused(shards):
    folder, objects = shards
    with pytest.raises(ValueError, match="width 32, the model takes .* 16"):
        LatentSet(folder, replace(CONFIG, text_dim=16))
    extra = {name: tensor for name, tensor in objects.items() if name[0] == "2"}
    extra |= {"null_text": torch.ones(1, 32).half()}
    key = dict(scale=LATENT_SCALE, text_encoder="t5")
    save_tensors(f"{folder}/more/3.safetensors", extra, shard=dict(key=key, captions={"2": "a"}))
    with pytest.raises(ValueError, match="object 2 twice"):
        LatentSet(folder, CONFIG)
    for other, match in ((dict(scale=1), "for latents times 1, here"), (dict(text_encoder="clip"), "made otherwise")):
        save_tensors(f"{folder}/more/3.safetensors", extra, shard=dict(key=key | other, captions={"3": "a"}))
        with pytest.raises(ValueError, match=match):
            LatentSet(folder, CONFIG)
    save_file({"x": torch.ones(1)}, folder / "a.safetensors")
    with pytest.raises(ValueError, match="no shard of python -m full.latents encode"):
        LatentSet(folder, CONFIG)


def test_latents_are_drawn_from_their_distribution():
    """x0 of the loss is scale (mean + deviation z): with no deviation exactly the mean, else spread by it."""
    mean, drawn = torch.randn(64, 1, 4, 16, 16), {}
    for deviation in (0.0, 3.0):
        image = torch.stack([mean, torch.full_like(mean, deviation)], dim=2)
        batch = with_noise({"image": image, "text": torch.zeros(64, 2, 32)}, Iteration("real", 0), 0, 5, 0)
        drawn[deviation] = batch["x0"]
    assert torch.allclose(drawn[0.0], LATENT_SCALE * mean)
    assert ((drawn[3.0] - drawn[0.0]) / LATENT_SCALE).std() == pytest.approx(3, rel=0.02)
    assert (drawn[3.0] - drawn[0.0] - 3 * LATENT_SCALE * batch["noise"]).std() > 0.5  # z is not the noise of x_t


def test_real_latents_are_a_function_of_caption_and_seed(full_run):
    """Whatever shard, and so batch, an object comes in."""
    run, out = full_run
    write_toy_objects("objects", 3, 128)
    run(full.latents, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 2)
    run(full.latents, "encode", "objects", "single", *ENCODERS, "--size", 128, "--shard", 1)
    run(full.real_set, "real", *DRAW, "--num_steps", 2)
    run(full.real_set, "again", *DRAW, "--num_steps", 2, "--synthetic", "single")
    a, b = load_tensors("real/0000.safetensors")[0], load_tensors("again/0001.safetensors")[0]
    latents, others = a["0001.color"].float(), b["0001.color"].float()
    # Random weights make latents of several hundreds, where fp16, which has 11 bits, goes in steps of up to 2^-10 of
    # the value. fp32's last places depend on the batch and on the CPU's kernels, and so does the step it is rounded to.
    scale = latents.abs().max()
    assert (latents - others).abs().max() <= 2**-9 * scale
    assert (latents[0, 0] - latents[1, 0]).abs().max() > 0.1 * scale  # another view phrase and noise
    assert not latents[:, 1].any() and torch.equal(a["0001.text"], b["0001.text"])
    with pytest.raises(ValueError, match="seed 0 .now 1."):
        run(full.real_set, "real", *DRAW, "--num_steps", 2, "--seed", 1)


def test_two_processes_write_the_shards_that_one_writes(full_run):
    run, out = full_run
    write_toy_objects("objects", 3, 128)
    run(full.latents, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 1)
    run(full.real_set, "real", *DRAW, "--num_steps", 2)
    flags = [out / flag if (out / flag).exists() else flag for flag in DRAW]
    done = script("tests/full/latents_worker.py", "full.real_set", out / "two", *flags, "--num_steps", 2, torchrun=2)
    assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (out / name).iterdir()} for name in ("real", "two"))
    assert one == two and len(one) == 3


def test_the_programs_refuse_bad_input_in_one_line(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    encode = ["encode", nowhere, str(tmp_path), "--vae", "vae", "--text_encoder", "text_encoder"]
    with pytest.raises(FileNotFoundError, match=f"no such folder: {nowhere}"):
        full.latents.main(encode)
    with pytest.raises(SystemExit):
        full.latents.main([*encode, "--shard", "0"])
    assert "--shard: 0 does not lie in [1, 1000000]" in capsys.readouterr().err
    toy = ROOT / "weights" / "toy_base.safetensors"
    done = script("-m", "full.real_set", tmp_path, "--base", toy, "--synthetic", nowhere, "--text_encoder", tmp_path)
    one_line_error(done, 1, "toy_base.safetensors is of the toy world")


def test_reading_is_timed_on_random_shards(tmp_path, capsys):
    benchmark_reading(str(tmp_path / "latents"), CONFIG, workers=2, batch=2, rounds=4)
    assert "grids/s in batches of 2, 2 thread(s), from 128 objects" in capsys.readouterr().out
    assert LatentSet(tmp_path / "latents", CONFIG, control=True).rows(torch.tensor([5]))["control"].shape == (
        1, 4, 8, 16, 16)
