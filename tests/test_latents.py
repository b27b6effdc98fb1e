"""The full preset on latents: objects on disk, encode, real set, both stages, samples, measures; here with the golden
tiny PixArt at full shapes but depth and width, and a stand-in for the VAE and the T5, or tiny random ones where the
packages are.
"""

import json
import os
import random
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file, save_file

import data
import evaluate
import sample
import train_stage1
import train_stage2
from dit import (PIXART_BLOCK_NAMES, PIXART_NAMES, PRESETS, Config, DiT, load_model, load_pixart, load_tensors,
                 save_tensors)
from domain_shifter import load_shifters

FULL = PRESETS["full"]
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


def stand_in_vae(folder, device="cpu"):
    """Latents are the mean colour of each 8 x 8 pixels and its spread: enough to tell images apart and decode them."""

    def encode(images):
        mean = F.avg_pool2d(images, 8)
        mean = torch.cat([mean, mean.mean(dim=1, keepdim=True)], dim=1) / data.LATENT_SCALE
        return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)

    return encode, lambda latents: F.interpolate(latents[:, :3].float(), scale_factor=8).clamp(-1, 1)


def stand_in_text_encoder(folder, device="cpu", length=120):
    """A random vector for each word, and one for the end."""

    def vector(word):
        return torch.randn(PRESETS["full"].text_dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))

    return lambda captions: [torch.stack([vector(word) for word in [*caption.split(), "</s>"]]) for caption in captions]


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
    """run(script module, *flags) with the preset full made tiny, PixArt's weights and folders for its encoders."""
    monkeypatch.setitem(PRESETS, "full", CONFIG)
    monkeypatch.setattr(data, "load_vae", stand_in_vae)
    monkeypatch.setattr(data, "load_text_encoder", stand_in_text_encoder)
    torch.save({"state_dict": tiny_pixart()}, tmp_path / "pixart.pth")
    for part in ("vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"part": part}))
    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        module.main()

    return run, tmp_path


ENCODERS = ("--vae", "vae", "--text_encoder", "text_encoder")
TRAIN = ("--preset", "full", "--base", "pixart.pth", "--synthetic", "latents", "--real", "real", "--out", ".",
         "--batch", 1)


def test_the_whole_pipeline_from_renders_to_measures(full_run, capsys):
    """Export, encode, real set, stage 1, stage 2, sample, decode, evaluate, each as its command."""
    run, out = full_run
    run(data, "export", "objects", "--num", 3, "--size", 128)
    run(data, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 2)
    assert sorted(path.name for path in (out / "latents").glob("*")) == ["0000.safetensors", "0002.safetensors"]
    run(sample, "--base", "pixart.pth", "--preset", "full", "--real_set", "real", "--synthetic", "latents",
        "--text_encoder", "text_encoder", "--num_steps", 2)
    with pytest.raises(FileNotFoundError, match="train_stage1.py --preset full"):
        run(train_stage2, *TRAIN, "--steps", 2)
    run(train_stage1, *TRAIN, "--steps", 4, "--lr", 0.01, "--warmup", 1)
    run(train_stage2, *TRAIN, "--steps", 8, "--real_warmup", 1, "--lr", 0.01, "--warmup", 1, "--ema", 0.5)
    shifters = load_shifters("shifters.safetensors", config=CONFIG)
    assert shifters.W_left.abs().max() > 1e-3
    base = load_pixart("pixart.pth", 2, 16)
    model = load_model("realiz3d_texturing.safetensors", config=CONFIG)
    assert model.control_embedder.weight.abs().max() > 1e-3 and model.view_encoding.abs().max() > 1e-3
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
    run(train_stage2, *TRAIN, "--steps", 1, "--task", "text", "--method", "syn_only")
    run(sample, "--model", "syn_only_text.safetensors", "--prompt", "a red mug", *ENCODERS, "--num_steps", 2,
        "--out", "text.png")
    assert (out / "text.png").exists()
    capsys.readouterr()


def test_the_pipeline_at_full_shapes(full_run, monkeypatch):
    """The same commands with 512-px views, 4,096 tokens, width 1152 and text of width 4096; only the depth is 2."""
    run, out = full_run
    config = replace(FULL, depth=2)
    monkeypatch.setitem(PRESETS, "full", config)
    torch.save(random_pixart(config), "pixart.pth")
    run(data, "export", "objects", "--num", 1)
    run(data, "encode", "objects", "latents", *ENCODERS)
    run(sample, "--base", "pixart.pth", "--real_set", "real", "--synthetic", "latents", "--text_encoder",
        "text_encoder", "--num_steps", 1)
    run(train_stage1, *TRAIN, "--steps", 1, "--dtype", "bfloat16")
    run(train_stage2, *TRAIN, "--steps", 2, "--dtype", "bfloat16", "--real_warmup", 1, "--accumulate", 4,
        "--grad_checkpointing")
    run(sample, "--model", "realiz3d_texturing.safetensors", "--objects", "objects/0000", *ENCODERS, "--domain",
        "shifted", "--num_steps", 1, "--cfg_scale", 1, "--views", "views", "--out", "sample.png")
    measured = evaluate.folder_consistency("views/shifted", "objects", [0, 90, 180, 270], 20, 0.55)
    assert measured["psnr"] > 0 and evaluate.read_image("views/shifted/0000/color_000.png").shape == (3, 512, 512)


def test_encode_is_resumable_and_refuses_another_making(full_run):
    run, out = full_run
    run(data, "export", "objects", "--num", 3, "--size", 128)
    encode = ("encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 1)
    run(data, *encode)
    first = {path.name: path.read_bytes() for path in (out / "latents").glob("*")}
    (out / "latents" / "0001.safetensors").unlink()
    run(data, *encode)
    assert {path.name: path.read_bytes() for path in (out / "latents").glob("*")} == first
    tensors, metadata = load_tensors(str(out / "latents" / "0001.safetensors"))
    caption, views = data.read_object(out / "objects" / "0001")
    assert metadata["shard"]["captions"] == {"0001": caption}
    mean = tensors["0001.normal"][:, 0].float() * data.LATENT_SCALE
    assert (mean[:, :3] - F.avg_pool2d(data.control_maps(views)[0, :, :3], 8)).abs().max() < 2e-3
    assert tensors["0001.text"].shape == (len(caption.split()) + 1, 32) and tensors["0001.color"].dtype == torch.float16
    (out / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="0000.safetensors was made otherwise: vae"):
        run(data, *encode)
    (out / "vae" / "config.json").write_text(json.dumps({"part": "vae"}))
    run(data, "export", "objects", "--num", 4, "--size", 128)
    with pytest.raises(ValueError, match="holds other objects"):
        run(data, *encode[:-1], 2)


@pytest.fixture
def shards(tmp_path):
    """Two shards of three objects, every number different."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).half()  # noqa: E731
    objects = {f"{k}.{part}": draw(4, 2, 4, 16, 16) for k in range(3) for part in data.MAPS}
    objects |= {f"{k}.text": draw(3 + k, 32) for k in range(3)}
    key = dict(scale=data.LATENT_SCALE, text_encoder="t5")
    for name, ids in (("0", "01"), ("more/2", "2")):
        null_text = draw(1, 32) if ids == "01" else torch.ones(1, 32).half()
        tensors = {n: tensor for n, tensor in objects.items() if n[0] in ids} | {"null_text": null_text}
        save_tensors(f"{tmp_path}/{name}.safetensors", tensors, shard=dict(key=key, captions=dict.fromkeys(ids, "a")))
    return tmp_path, objects


def test_rows_of_shards_are_the_tensors_that_were_written(shards):
    folder, objects = shards
    grids = data.LatentSet(folder, CONFIG, control=True)
    rows = grids.rows(torch.tensor([2, 0]))
    assert grids.shape == (3, 4) and torch.equal(rows["image"][0], objects["2.color"])
    means = torch.cat([objects["0.normal"][:, 0], objects["0.position"][:, 0]], dim=1)
    assert torch.equal(rows["control"][1], means * data.LATENT_SCALE) and rows["view"].tolist() == [[0, 1, 2, 3]] * 2
    assert rows["text_mask"].sum(1).tolist() == [5, 3] and torch.equal(rows["text"][0, :5], objects["2.text"])
    assert rows["text"].shape == (2, 120, 32) and not rows["text"][0, 5:].any()
    single = data.LatentSet(folder, CONFIG, views=False)
    rows = single.rows(torch.arange(12))
    assert single.shape == (12, 1) and set(rows) == {"image", "text", "text_mask"}
    for k in range(12):
        assert torch.equal(rows["image"][k, 0], objects[f"{k // 4}.color"][k % 4])
    assert single.null["text_mask"].sum() == 1


def test_shards_that_do_not_fit_are_refused(shards):
    folder, objects = shards
    with pytest.raises(ValueError, match="width 32, the model takes .* 16"):
        data.LatentSet(folder, CONFIG.__class__(**vars(CONFIG) | dict(text_dim=16)))
    extra = {name: tensor for name, tensor in objects.items() if name[0] == "2"}
    extra |= {"null_text": torch.ones(1, 32).half()}
    key = dict(scale=data.LATENT_SCALE, text_encoder="t5")
    save_tensors(f"{folder}/more/3.safetensors", extra, shard=dict(key=key, captions={"2": "a"}))
    with pytest.raises(ValueError, match="object 2 twice"):
        data.LatentSet(folder, CONFIG)
    for other, match in ((dict(scale=1), "for latents times 1, here"), (dict(text_encoder="clip"), "made otherwise")):
        save_tensors(f"{folder}/more/3.safetensors", extra, shard=dict(key=key | other, captions={"3": "a"}))
        with pytest.raises(ValueError, match=match):
            data.LatentSet(folder, CONFIG)
    save_file({"x": torch.ones(1)}, folder / "a.safetensors")
    with pytest.raises(ValueError, match="no shard of data.py encode"):
        data.LatentSet(folder, CONFIG)


def test_latents_are_drawn_from_their_distribution():
    """x0 of the loss is scale (mean + deviation z): with no deviation exactly the mean, else spread by it."""
    from train_stage1 import Iteration, denoising_loss

    seen = []

    class Network(torch.nn.Module):
        class dit:
            config = CONFIG

        def forward(self, x, t, text, domains, frozen_blocks):
            seen.append((x, t))
            return torch.zeros_like(x)

    mean = torch.randn(64, 1, 4, 16, 16)
    for deviation in (0.0, 3.0):
        image = torch.stack([mean, torch.full_like(mean, deviation)], dim=2)
        batch = {"image": image, "text": torch.zeros(64, 2, 32)}
        denoising_loss(Network(), batch, Iteration("real", 0, timesteps=(0, 1)), {}, 0, 5, 0, 0.0)
    (exact, _), (spread, _) = seen
    assert (exact - data.LATENT_SCALE * mean).std() < 0.011  # only the noise of t = 0, 0.01
    assert ((spread - exact) / data.LATENT_SCALE).std() == pytest.approx(3, rel=0.02)


def test_real_latents_are_a_function_of_caption_and_seed(full_run):
    run, out = full_run
    run(data, "export", "objects", "--num", 3, "--size", 128)
    run(data, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 2)
    run(data, "encode", "objects", "single", *ENCODERS, "--size", 128, "--shard", 1)
    draw = ("--base", "pixart.pth", "--text_encoder", "text_encoder", "--num_steps", 2, "--real_set")
    run(sample, *draw, "real", "--synthetic", "latents")
    run(sample, *draw, "again", "--synthetic", "single")
    a, b = load_tensors("real/0000.safetensors")[0], load_tensors("again/0001.safetensors")[0]
    assert torch.allclose(a["0001.color"], b["0001.color"], atol=0.02) and a["0001.color"].float().std() > 0.1
    assert not a["0001.color"][:, 1].any() and torch.equal(a["0001.text"], b["0001.text"])
    assert (a["0001.color"][0, 0] - a["0001.color"][1, 0]).abs().max() > 0.1  # another view phrase and noise
    with pytest.raises(ValueError, match="seed 0 .now 1."):
        run(sample, *draw, "real", "--synthetic", "latents", "--seed", 1)


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes minutes: KILLS=10 pytest tests/test_latents.py -k killed")
@pytest.mark.parametrize("what", ["encode", "real set", "training"])
def test_killed_and_started_again_ends_with_the_same_tensors(full_run, what):
    """kill -9 at KILLS random moments of work, the same command each time; then the files of a run left alone."""
    run, out = full_run
    run(data, "export", "objects", "--num", 24, "--size", 128)
    run(data, "encode", "objects", "latents", *ENCODERS, "--size", 128, "--shard", 2)
    draw = ("--base", "pixart.pth", "--synthetic", "latents", "--text_encoder", "text_encoder", "--num_steps", 20)
    run(sample, *draw, "--real_set", "real")
    train = (*TRAIN, "--joint", "--steps", 150, "--save_every", 5)
    command, whole = {
        "encode": (("data", "encode", "objects", "cut", *ENCODERS, "--size", 128, "--shard", 2), "latents"),
        "real set": (("sample", *draw, "--real_set", "cut"), "real"),
        "training": (("train_stage2", *train, "--name", "cut"), "whole"),
    }[what]
    if what == "training":
        run(train_stage2, *train, "--name", "whole")
    worker = [sys.executable, str(ROOT / "tests" / "latents_worker.py"), *map(str, command)]
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


def test_encoders_of_diffusers_and_transformers(tmp_path):
    """Tiny random AutoencoderKL and T5 from disk: latents as their own code has them, each caption alone."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "mug": 4, "a": 5},
                                       unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                                         ).save_pretrained(tmp_path / "tokenizer")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=2,
                                                           num_heads=2)).eval()
    t5.save_pretrained(tmp_path / "text_encoder")
    encode, decode = data.load_vae(f"{tmp_path}/vae")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = encode(images).unbind(1)
    with torch.no_grad():
        wanted = vae.encode(images).latent_dist
        assert torch.equal(mean, wanted.mean) and torch.equal(deviation, wanted.std) and mean.shape == (2, 4, 4, 4)
        assert torch.allclose(decode(mean * data.LATENT_SCALE), vae.decode(mean).sample, atol=1e-5)
        encode_text = data.load_text_encoder(f"{tmp_path}/text_encoder")
        long, short, empty = encode_text(["A red mug ", "mug", ""])
        assert (len(long), len(short), len(empty)) == (4, 2, 1)
        assert torch.allclose(long, t5(torch.tensor([[5, 3, 4, 1]])).last_hidden_state[0], atol=1e-6)
        batch = t5(torch.tensor([[4, 1, 0, 0]]), attention_mask=torch.tensor([[1, 1, 0, 0]])).last_hidden_state
        assert torch.allclose(short, batch[0, :2], atol=1e-5)


def test_missing_encoders_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no AutoencoderKL in nowhere"):
        data.load_vae("nowhere")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        data.load_vae(str(tmp_path))
