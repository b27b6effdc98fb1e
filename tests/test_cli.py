"""Every script as a process at a tiny size, torchrun too, with values checked; and bad input, one clear line each."""

import json

import pytest
import torch
from conftest import TINY_STAGE2, one_line_error, script
from PIL import Image

import data
import sample
import train_stage2
from dit import PRESETS, load_model, load_tensors
from domain_shifter import load_adapter, load_shifters
from sample import load_network


def test_the_whole_pipeline_leaves_models_logs_and_pictures(tiny_run):
    base = load_model(str(tiny_run / "base.safetensors"), config=PRESETS["toy"])
    model = load_model(str(tiny_run / "realiz3d_texturing.safetensors"), config=PRESETS["toy"])
    shifters, inside = (
        load_shifters(str(tiny_run / name)) for name in ("shifters.safetensors", "realiz3d_texturing.safetensors")
    )
    assert shifters.W_left.abs().max() > 0 and torch.equal(shifters.W_left, inside.W_left)  # frozen in stage 2
    assert base.control_embedder.weight.abs().max() == 0 < model.control_embedder.weight.abs().max()
    assert model.view_encoding.abs().max() > 0
    settings = load_tensors(str(tiny_run / "realiz3d_texturing.safetensors"))[1]["settings"]
    assert settings["steps"] == 3 and settings["task"] == "texturing"
    log = [json.loads(line) for line in open(tiny_run / "realiz3d_texturing" / "log.jsonl")]
    assert [(line["step"], line["domain"]) for line in log] == [(1, "real"), (2, "syn"), (3, "real")]
    assert all(0 < line["loss"] < 2 and line["images_per_s"] > 0 for line in log)
    real, _ = load_tensors(str(tiny_run / "sets" / "real_4.safetensors"))
    drawn = data.tokenize(data.real_captions(data.sample_assets(4, data.SEEDS["synthetic"]))[1])
    assert real["image"].shape == (16, 1, 3, 32, 32) and torch.equal(real["text"], drawn)
    for picture, width in (
        ("realiz3d_texturing.png", 12 * 98),
        ("realiz3d_texturing/loss.png", 600),
        ("stage1.png", 12 * 98),
        ("base.png", 6 * 98),
    ):
        assert Image.open(tiny_run / picture).width > width


def test_stage_2_again_has_nothing_left_to_train(tiny_run):
    before = (tiny_run / "realiz3d_texturing.safetensors").read_bytes()
    done = script("train_stage2.py", "--out", tiny_run, *TINY_STAGE2)
    assert done.returncode == 0 and "0 of 3 steps" in done.stdout
    after = load_model(str(tiny_run / "realiz3d_texturing.safetensors")).state_dict()
    (tiny_run / "before.safetensors").write_bytes(before)
    assert all(
        torch.equal(tensor, after[name])
        for name, tensor in load_model(str(tiny_run / "before.safetensors")).state_dict().items()
    )


def test_two_process_pipeline(tiny_run, tmp_path):
    """torchrun: stage 1 on the way, then stage 2; the real set is the one that a single process draws."""
    done = script(
        "train_stage2.py", "--out", tmp_path, "--base", tiny_run / "base.safetensors", *TINY_STAGE2, torchrun=2
    )
    assert done.returncode == 0, done.stderr
    assert "8 images" not in done.stdout and "4 images x 2 process(es) = 8" in done.stdout
    one, two = (
        load_tensors(str(folder / "sets" / "real_4.safetensors"))[0]["image"] for folder in (tiny_run, tmp_path)
    )
    assert (one.int() - two.int()).abs().max() <= 1
    assert load_shifters(str(tmp_path / "shifters.safetensors")).W_left.abs().max() > 0


def test_sample_py_draws_an_object_in_every_mode(tiny_run, tmp_path):
    out = tmp_path / "s.png"
    done = script(
        "sample.py",
        "--model",
        tiny_run / "realiz3d_texturing.safetensors",
        "--object",
        1,
        "--num_steps",
        2,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and Image.open(out).height == 16 + 5 * 98  # 2 maps and 3 modes
    done = script(
        "sample.py",
        "--model",
        tiny_run / "base.safetensors",
        "--prompt",
        "photo of a red wooden mug",
        "--num_steps",
        2,
        "--out",
        out,
    )
    assert done.returncode == 0 and Image.open(out).height == 98


def test_text_task_and_syn_only(tiny_run, tmp_path, monkeypatch):
    def run(module, *flags):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags), "--threads", "1"])
        module.main()

    flags = ("--out", tiny_run, *TINY_STAGE2)
    run(train_stage2, "--task", "text", *flags)
    text_model = str(tiny_run / "realiz3d_text.safetensors")
    model = load_model(text_model)
    assert model.control_embedder.weight.abs().max() == 0 < model.view_encoding.abs().max()
    run(sample, "--model", text_model, "--prompt", "a red wooden mug", "--domain", "real", "--num_steps", 2,
        "--out", tmp_path / "t.png")
    assert (tmp_path / "t.png").exists()
    run(train_stage2, "--method", "syn_only", *flags)
    assert load_shifters(str(tiny_run / "syn_only_texturing.safetensors")) is None
    assert all(json.loads(line)["domain"] == "syn" for line in open(tiny_run / "syn_only_texturing" / "log.jsonl"))
    run(train_stage2, "--joint", *flags)
    joint, stage1 = (
        load_shifters(str(tiny_run / name))
        for name in ("realiz3d_texturing-joint.safetensors", "shifters.safetensors")
    )
    assert joint.W_left.abs().max() > 0 and not torch.equal(joint.W_left, stage1.W_left)


@pytest.mark.parametrize(
    "method, domains, adapter",
    [
        ("syn_real", ["real", "syn"], None),
        ("lora", ["syn"], "lora"),
        ("linear_adapter", ["syn"], "linear"),
        ("domain_adapter", ["syn"], None),  # removed at sampling
        ("spatial_adapter", ["syn"], None),
        ("domain_switcher", ["real", "syn"], "switcher"),
    ],
)
def test_every_baseline_trains_what_it_should(tiny_run, monkeypatch, method, domains, adapter):
    flags = ["--method", method, "--rank", "2", "--threads", "1", "--out", tiny_run, *TINY_STAGE2]
    monkeypatch.setattr("sys.argv", ["train_stage2.py", *map(str, flags)])
    train_stage2.main()
    network = load_network(str(tiny_run / f"{method}_texturing-rank2.safetensors"))
    assert getattr(network.adapter, "kind", None) == adapter and network.shifters is None
    assert network.dit.control_embedder.weight.abs().max() > 0
    base = load_model(str(tiny_run / "base.safetensors")).blocks[3].mlp[0].weight
    assert torch.equal(network.dit.blocks[3].mlp[0].weight, base) == (method in ("lora", "linear_adapter"))
    if adapter in ("lora", "linear"):
        learnt = [layer.W_left.abs().max() > 0 for layer in network.adapter.layers]
        assert sum(learnt) >= len(learnt) / 2  # cross-attention of a base of two steps passes no gradient yet
    log = [json.loads(line) for line in open(tiny_run / f"{method}_texturing-rank2" / "log.jsonl")]
    assert sorted({line["domain"] for line in log}) == domains
    first_stage = {"domain_adapter": "lora_2", "spatial_adapter": "linear_2", "domain_switcher": "switcher_2"}
    if method in first_stage:  # fitted first, and frozen then
        assert load_adapter(str(tiny_run / f"{first_stage[method]}.safetensors")) is not None
    if method == "domain_switcher":
        fitted = load_adapter(str(tiny_run / "switcher_2.safetensors")).domain_embeddings
        assert torch.equal(network.adapter.domain_embeddings, fitted) and fitted.abs().max() > 0


def test_benchmark_prints_measured_beside_counted(tiny_run):
    done = script("train_stage2.py", "--benchmark", "--batch", 1, "--rounds", 1, "--out", tiny_run)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert float(rows["0"][1]) == 1 and 0.7 < float(rows["4"][1]) < 0.8 and float(rows["average"][0]) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_unknown_preset_and_flag():
    for name in ("train_stage1.py", "train_stage2.py"):
        one_line_error(script(name, "--preset", "huge"), 2, "huge", "toy")
    one_line_error(script("sample.py", "--colour", "red"), 2, "--colour")


def test_unknown_word_names_the_nearest():
    one_line_error(script("sample.py", "--prompt", "a red woden mug"), 2, "woden", "wooden")


def test_missing_truncated_and_foreign_checkpoints(tiny_run, tmp_path):
    one_line_error(script("sample.py", "--model", "nowhere.safetensors"), 1, "nowhere.safetensors")
    one_line_error(
        script("train_stage2.py", "--base", "nowhere.safetensors", "--out", tmp_path), 1, "nowhere.safetensors"
    )
    whole = (tiny_run / "base.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    one_line_error(script("sample.py", "--model", tmp_path / "cut.safetensors"), 1, "cut.safetensors", "cut off")
    one_line_error(
        script("train_stage1.py", "--preset", "small", "--base", tiny_run / "base.safetensors", "--out", tmp_path),
        1,
        "base.safetensors",
        "another configuration",
        "image_size 32 (expected 64)",
    )
    one_line_error(script("sample.py", "--model", tiny_run / "shifters.safetensors"), 1, "Domain Shifters only")


def test_full_asks_for_what_it_needs(tiny_run):
    one_line_error(script("train_stage2.py", "--preset", "full"), 1, "--base")
    one_line_error(script("train_stage1.py", "--preset", "full", "--stage", "base"), 1, "--base")


def test_a_task_the_model_was_not_trained_for(tiny_run):
    one_line_error(
        script("sample.py", "--model", tiny_run / "realiz3d_texturing.safetensors", "--task", "text"), 1, "texturing"
    )


def test_more_processes_than_data(tiny_run, tmp_path):
    done = script(
        "train_stage2.py",
        "--out",
        tmp_path,
        "--base",
        tiny_run / "base.safetensors",
        *TINY_STAGE2,
        "--batch",
        3,
        torchrun=2,
    )
    assert done.returncode == 1 and "one step of 2 process(es) takes" in done.stderr


def test_a_path_that_cannot_be_written(tiny_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = script(
        "sample.py",
        "--model",
        tiny_run / "base.safetensors",
        "--prompt",
        "a red wooden mug",
        "--num_steps",
        1,
        "--out",
        tmp_path / "file" / "s.png",
    )
    one_line_error(done, 1, "file")
    done = script(
        "train_stage1.py", "--base", tiny_run / "base.safetensors", "--num_assets", 2, "--out", tmp_path / "file"
    )
    one_line_error(done, 1, "file")


@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py", "sample.py", "evaluate.py", "data.py"])
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0 and "usage" in done.stdout
