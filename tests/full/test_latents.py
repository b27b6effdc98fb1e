"""full/latents.py and full/real_set.py: shards are written whole, read as they are, refused where they do not fit."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, ROOT, one_line_error, refuses, script
from full_stand_ins import CONFIG, DRAW, ENCODERS, full_run  # noqa: F401
from safetensors.torch import save_file

import full.latents
import full.real_set
from data import LATENT_SCALE, control_maps, real_prompt
from dit import PRESETS
from full.latents import MAPS, LatentSet, benchmark_reading, is_current, left_to_write, save_shard, source_files
from full.objects import read_object, write_toy_objects
from support.files import load_tensors, save_tensors
from training.batches import with_noise
from training.loop import Iteration
from training.sets import latent_sets
from training.states import made_from


def test_encode_is_resumable_and_refuses_another_making(full_run, capsys):
    run, out = full_run
    write_toy_objects("objects", 3, 128)
    encode = ("encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 1)
    run(full.latents, *encode)
    first = {path.name: path.read_bytes() for path in (out / "latents").glob("*")}
    (out / "latents" / "0001.safetensors").unlink()
    run(full.latents, *encode)
    assert {path.name: path.read_bytes() for path in (out / "latents").glob("*")} == first
    meta = out / "objects" / "0002" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(caption="another caption")))
    capsys.readouterr()
    run(full.latents, *encode)
    assert capsys.readouterr().out.startswith("latents/0002.safetensors: what it is made of has changed, making it")
    changed = {path.name: path.read_bytes() for path in (out / "latents").glob("*")}
    assert {name for name in first if changed[name] != first[name]} == {"0002.safetensors"}
    assert load_tensors("latents/0002.safetensors")[1]["shard"]["captions"] == {"0002": "another caption"}
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


OLD, NEW = (10**9, 10**9), (4 * 10**9, 4 * 10**9)  # of 2001 and of 2096


def replace_file(path, content, times=OLD):
    path.write_text(content)
    os.utime(path, times)


@pytest.mark.parametrize("change, current", [
    (lambda folder: None, True),
    (lambda folder: (folder / "notes").mkdir(), True),
    (lambda folder: replace_file(folder / "meta.json", "{}", NEW), False),
    (lambda folder: replace_file(folder / "meta.json", "{ }"), False),
    (lambda folder: replace_file(folder / "caption.txt", "a mug"), False),
    (lambda folder: (folder / "meta.json").rename(folder / "meta2.json"), False),
], ids=("nothing", "a folder", "newer", "other size", "one more", "other name"))
def test_a_shard_is_of_the_files_that_are_there(change, current, tmp_path):
    folder, shard = tmp_path / "a", tmp_path / "a.safetensors"
    folder.mkdir()
    replace_file(folder / "meta.json", "{}")
    key = dict(scale=LATENT_SCALE, text_encoder="t5")
    save_shard(shard, {"null_text": torch.zeros(1)}, key, {"a": "a mug"}, files=source_files([folder])[0])
    change(folder)
    left = left_to_write({str(shard): [folder], "new": [folder]}, ALONE, is_current)
    assert set(left) == {"new"} | ({str(shard)} if not current else set())


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="not finite, in 0.color"):
            save_shard(tmp_path / "a", {"0.text": torch.zeros(1), "0.color": torch.tensor([1, value]).half()}, {}, {})
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ValueError, match="width 32 in float16, the model takes .* 16"):
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


LACKS = "object 0 lacks color .* or a text or null_text of the model's width and length, in float16"


@pytest.mark.parametrize("name, tensor, words", [
    ("null_text", torch.zeros(32).half(), LACKS),
    ("null_text", torch.zeros(121, 32).half(), LACKS),
    ("null_text", torch.zeros(0, 32).half(), LACKS),
    ("null_text", torch.full((1, 32), torch.nan).half(), "null_text holds numbers that are not finite"),
    ("1.color", torch.zeros(4, 2, 4, 16, 16, dtype=torch.int8), LACKS.replace("0", "1")),
    ("1.color", torch.zeros(4, 2, 4, 16, 16), LACKS.replace("0", "1")),
    ("1.color", torch.full((4, 2, 4, 16, 16), torch.nan).half(), "object 1 holds numbers that are not finite"),
    ("1.text", torch.full((3, 32), torch.inf).half(), "object 1 holds numbers that are not finite"),
    ("0.color", torch.zeros(0, 2, 4, 16, 16).half(), "has latents of"),
], ids=lambda value: "" if torch.is_tensor(value) else value[:20])
@pytest.mark.parametrize("views", [True, False])
def test_tensors_that_cannot_be_trained_on_are_named(name, tensor, words, views, shards):
    path = str(shards[0] / "0.safetensors")
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors | {name: tensor}, **metadata)
    with pytest.raises(ValueError, match=words):
        latents = LatentSet(shards[0], CONFIG, views)
        latents.rows(torch.arange(latents.shape[0]))


@pytest.mark.parametrize("change", [dict(captions={"0": None, "1": "a"}), dict(captions={"0": ["a"], "1": "a"}),
                                    dict(captions={}), dict(captions=["0"]), dict(key=dict(scale=LATENT_SCALE))])
def test_headers_that_name_no_captions_or_encoder_are_refused(change, shards):
    path = shards[0] / "0.safetensors"
    tensors, metadata = load_tensors(str(path))
    save_tensors(path, tensors, shard=metadata["shard"] | change)
    for read in (lambda: LatentSet(shards[0], CONFIG), lambda: full.real_set.shards_to_draw("out", shards[0])):
        with pytest.raises(ValueError, match="0.safetensors is no shard of .*: its header lacks"):
            read()


def test_latents_of_other_renders_with_the_same_ids_are_another_set(shards):
    """What a state is made from, for shards in place of others: of the same tensors, and of others."""
    folder, objects = shards
    key, network = dict(scale=LATENT_SCALE, text_encoder="t5"), torch.nn.Linear(1, 1)
    made = []
    for color in (objects["2.color"], objects["2.color"], objects["2.color"] + 1):
        tensors = {name: tensor for name, tensor in objects.items() if name[0] == "2"} | {"2.color": color}
        tensors["null_text"] = torch.ones(1, 32).half()
        save_shard(folder / "more" / "2.safetensors", tensors, key, {"2": "a"})
        made.append(made_from(network, {"syn": LatentSet(folder, CONFIG)}))
    assert made[0] == made[1] and made[0]["network"] == made[2]["network"] and made[0]["syn set"] != made[2]["syn set"]


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


def test_real_latents_are_a_function_of_name_caption_and_seed(full_run):
    """Whatever shard, and so batch, an object comes in; two of one caption differ."""
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
    same = load_tensors("real/0000.safetensors")[1]["shard"]["captions"]["0001"]
    tensors, metadata = load_tensors("latents/0002.safetensors")            # as if encoded again with another caption
    save_tensors("latents/0002.safetensors", tensors, shard=metadata["shard"] | dict(captions={"0002": same}))
    before = [path.stat().st_mtime_ns for path in sorted((out / "real").iterdir())]
    run(full.real_set, "real", *DRAW, "--num_steps", 2)
    after = [path.stat().st_mtime_ns for path in sorted((out / "real").iterdir())]
    assert [time == other for time, other in zip(before, after)] == [True, False]
    c, metadata = load_tensors("real/0002.safetensors")
    assert metadata["shard"]["captions"] == {"0002": same} and torch.equal(c["0002.text"], a["0001.text"])
    assert len(c["0002.text"]) == len(real_prompt(same).split()) + 1
    assert (c["0002.color"][0, 0] - latents[0, 0]).abs().max() > 0.1 * scale


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
    (tmp_path / "objects" / "a").mkdir(parents=True)
    (tmp_path / "objects" / "a" / "meta.json").touch()
    (tmp_path / "p.pth").touch()
    (tmp_path / "out" / "a.safetensors").mkdir(parents=True)
    header = dict(key=dict(scale=LATENT_SCALE, text_encoder="t5"), captions={"a": "a"})
    save_tensors(tmp_path / "shards" / "a.safetensors", {"null_text": torch.zeros(1)}, shard=header)
    for out in (tmp_path / "p.pth", tmp_path / "p.pth" / "below", tmp_path / "out"):
        words = (f"out '{out}/a.safetensors' must be the name of a file", )
        refuses(full.latents, ("encode", tmp_path / "objects", out, *encode[3:]), 2, *words)
        refuses(full.real_set, (out, "--base", tmp_path / "p.pth", "--synthetic", tmp_path / "shards",
                                "--text_encoder", nowhere), 2, *words)
    toy = ROOT / "weights" / "toy_base.safetensors"
    done = script("-m", "full.real_set", tmp_path, "--base", toy, "--synthetic", nowhere, "--text_encoder", tmp_path)
    one_line_error(done, 1, "toy_base.safetensors is of the toy world")


def test_reading_is_timed_on_random_shards(tmp_path, capsys, monkeypatch):
    benchmark_reading(str(tmp_path / "latents"), CONFIG, workers=2, batch=2, rounds=4)
    assert "grids/s in batches of 2, 2 thread(s), from 128 objects" in capsys.readouterr().out
    monkeypatch.setitem(PRESETS, "full", CONFIG)
    args = SimpleNamespace(preset="full", synthetic=tmp_path / "latents", real=tmp_path / "latents")
    both = latent_sets(args, 4, needs_real=True, control=True)              # they can be trained on, to time it
    assert {domain: latents.shape for domain, latents in both.items()} == {"syn": (128, 4), "real": (512, 1)}
    assert LatentSet(tmp_path / "latents", CONFIG, control=True).rows(torch.tensor([5]))["control"].shape == (
        1, 4, 8, 16, 16)
