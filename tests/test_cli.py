"""Every program as its command at a tiny size, torchrun too, with values checked; and bad input, one clear line each.

In this process where nothing of the process itself is tested, as importing torch takes seconds.
"""

import json

import torch
from conftest import ROOT, TINY_STAGE2, one_line_error, refuses, run_main, script
from PIL import Image

import data
import sample
import train_stage1
import train_stage2
from dit import PRESETS, DiT, load_model
from domain_shifter import load_shifters
from support.files import load_tensors
from toy import pretrain
from toy.world import sample_assets, tokenize


def test_the_whole_pipeline_leaves_models_logs_and_pictures(tiny_run):
    base = load_model(str(tiny_run / "base.safetensors"), config=PRESETS["toy"])
    model = load_model(str(tiny_run / "realiz3d_texturing.safetensors"), config=PRESETS["toy"])
    shifters, inside = (
        load_shifters(str(tiny_run / name)) for name in ("shifters.safetensors", "realiz3d_texturing.safetensors")
    )
    assert shifters.W_left.abs().max() > 0 and torch.equal(shifters.W_left, inside.W_left)  # frozen in stage 2
    assert base.control_embedder.weight.abs().max() == 0 < model.control_embedder.weight.abs().max()
    assert torch.equal(base.view_encoding, DiT(PRESETS["toy"]).view_encoding.half().float())
    assert (model.view_encoding - base.view_encoding).abs().max() > 0
    metadata = load_tensors(str(tiny_run / "realiz3d_texturing.safetensors"))[1]
    assert metadata["settings"]["steps"] == 3 and metadata["settings"]["task"] == "texturing"
    flags = " ".join(map(str, TINY_STAGE2))
    assert metadata["command"] == f"python train_stage2.py --out {tiny_run} {flags}"
    made = load_tensors(str(tiny_run / "base.safetensors"))[1]
    assert made["command"].startswith("python -m toy.pretrain --num_base_images 16 --steps 2")
    log = [json.loads(line) for line in open(tiny_run / "realiz3d_texturing" / "log.jsonl")]
    assert [(line["step"], line["domain"]) for line in log] == [(1, "real"), (2, "syn"), (3, "real")]
    assert all(0 < line["loss"] < 2 and line["images_per_s"] > 0 for line in log)
    real, _ = load_tensors(str(tiny_run / "sets" / "real_4.safetensors"))
    drawn = tokenize(data.real_captions(sample_assets(4, data.SEEDS["synthetic"]))[1])
    assert real["image"].shape == (16, 1, 3, 32, 32) and torch.equal(real["text"], drawn)
    for picture, width in (
        ("realiz3d_texturing.png", 12 * 98),
        ("realiz3d_texturing/loss.png", 600),
        ("stage1.png", 12 * 98),
        ("base.png", 6 * 98),
    ):
        assert Image.open(tiny_run / picture).width > width


def test_stage_2_again_has_nothing_left_to_train(tiny_toy, capsys):
    out, _ = tiny_toy
    run_main(train_stage2, "--out", out, *TINY_STAGE2)
    assert "3 of 3 steps" in capsys.readouterr().out
    before = load_model(str(out / "realiz3d_texturing.safetensors")).state_dict()
    run_main(train_stage2, "--out", out, *TINY_STAGE2)
    assert "0 of 3 steps" in capsys.readouterr().out
    after = load_model(str(out / "realiz3d_texturing.safetensors")).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_two_process_pipeline(tiny_run, tmp_path):
    """torchrun: stage 1 on the way, then stage 2; the real set is the one that a single process draws."""
    done = script(
        "train_stage2.py", "--out", tmp_path, "--base", tiny_run / "base.safetensors", *TINY_STAGE2, torchrun=2
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.partition("stage1: trains")[2]
    assert " 8 images" not in said and "4 images x 2 process(es) = 8" in said
    one, two = (
        load_tensors(str(folder / "sets" / "real_4.safetensors"))[0]["image"] for folder in (tiny_run, tmp_path)
    )
    assert (one.int() - two.int()).abs().max() <= 1
    assert load_shifters(str(tmp_path / "shifters.safetensors")).W_left.abs().max() > 0


def test_sample_py_draws_an_object_in_every_mode(tiny_run, tmp_path):
    out, model = tmp_path / "s.png", tiny_run / "realiz3d_texturing.safetensors"
    done = script("sample.py", "--model", model, "--object", 1, "--num_steps", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and Image.open(out).height == 16 + 6 * 98  # 2 maps, 3 modes, the photo
    base = tiny_run / "base.safetensors"
    flags = ("--object", 1, "--domain", "real", "--num_steps", 2, "--beside", f"the base={base}", "--out", out)
    run_main(sample, "--model", model, *flags)
    assert Image.open(out).height == 16 + 5 * 98  # another model's row above its own
    prompt = ("--prompt", "photo of a red wooden mug", "--num_steps", 2, "--out", out)
    run_main(sample, "--model", tiny_run / "base.safetensors", *prompt)
    assert Image.open(out).height == 98


def test_a_text_model_draws_four_views_of_a_prompt(tiny_toy):
    out, _ = tiny_toy
    tiny = [flag for flag in TINY_STAGE2 if flag not in ("--steps", 3)]
    run_main(train_stage2, "--task", "text", "--out", out, "--steps", 3, *tiny)
    model = out / "realiz3d_text.safetensors"
    run_main(sample, "--model", model, "--prompt", "a red wooden mug", "a blue metal duck", "--domain", "real",
             "--num_steps", 2, "--out", out / "t.png", "--views", out / "views")
    assert Image.open(out / "t.png").height == 16 + 26  # one mode, eight views of 8 pixels side by side
    assert len(list((out / "views" / "real").rglob("color_*.png"))) == 8
    refuses(sample, ("--model", model, "--task", "texturing"), 1, "was trained for text, not for texturing")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_the_process_itself_ends_in_one_line_with_its_code(tmp_path):
    one_line_error(script("train_stage2.py", "--preset", "huge"), 2, "huge", "toy")
    one_line_error(script("-m", "toy.pretrain", "--preset", "full", "--out", tmp_path), 2, "preset full has no base")


def test_unknown_preset_and_flag():
    for program in (train_stage1, train_stage2, pretrain):
        refuses(program, ("--preset", "huge"), 2, "huge", "toy")
    refuses(sample, ("--colour", "red"), 2, "--colour")


def test_unknown_word_names_the_nearest():
    refuses(sample, ("--prompt", "a red woden mug"), 2, "woden", "wooden")


def test_missing_truncated_and_foreign_checkpoints(tiny_run, tmp_path):
    refuses(sample, ("--model", "nowhere.safetensors"), 1, "nowhere.safetensors")
    refuses(train_stage2, ("--base", "nowhere.safetensors", "--out", tmp_path), 1, "nowhere.safetensors")
    whole = (tiny_run / "base.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refuses(sample, ("--model", tmp_path / "cut.safetensors"), 1, "cut.safetensors", "cut off")
    flags = ("--preset", "small", "--base", tiny_run / "base.safetensors", "--out", tmp_path)
    words = ("base.safetensors", "another configuration", "image_size 32 (expected 64)")
    refuses(train_stage1, flags, 1, *words)
    refuses(sample, ("--model", tiny_run / "shifters.safetensors"), 1, "Domain Shifters only")


def test_full_asks_for_what_it_needs():
    refuses(train_stage2, ("--preset", "full"), 1, "--base")
    refuses(train_stage1, ("--preset", "full"), 1, "--base")


def test_a_task_the_model_was_not_trained_for(tiny_run):
    flags = ("--model", tiny_run / "realiz3d_texturing.safetensors", "--task", "text")
    refuses(sample, flags, 1, "was trained for texturing, not for text")


def test_more_processes_than_data(tiny_run, tmp_path):
    (tmp_path / "sets").symlink_to(tiny_run / "sets")
    flags = ("--out", tmp_path, "--base", tiny_run / "base.safetensors", *TINY_STAGE2, "--batch", 3)
    done = script("train_stage2.py", *flags, torchrun=2)
    assert done.returncode == 1 and "one step of 2 process(es) takes" in done.stderr


def test_a_path_that_cannot_be_written(tiny_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    base, out = tiny_run / "base.safetensors", tmp_path / "file" / "s.png"
    flags = ("--model", base, "--prompt", "a red wooden mug", "--num_steps", 1, "--out", out)
    refuses(sample, flags, 2, "--out", "file")
    refuses(train_stage1, ("--base", base, "--num_assets", 2, "--out", tmp_path / "file"), 2, "--out", "file")


def test_help_of_every_program():
    """Each in a process that imported nothing else of the project: what one forgets to import, another may have
    imported."""
    files = [str(path.relative_to(ROOT)) for pattern in ("*.py", "*/*.py") for path in sorted(ROOT.glob(pattern))
             if path.parent.name != "tests" and '__name__ == "__main__"' in path.read_text()]
    assert len(files) >= 16
    done = script("tests/help_worker.py", *files)
    said = json.loads(done.stdout)
    for path in files:
        code, output = said[path]
        assert code == 0 and output.startswith("usage: "), (path, output)
        first = (ROOT / path).read_text().partition("\n")[0].strip('"')
        assert first[:40] in output, path  # what the program says it is
