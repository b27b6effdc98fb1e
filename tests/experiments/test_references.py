"""The table of RefAny3D: its cases, its rows, and what it refuses."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, refuses, run_main

from data import SEEDS
from dit import PRESETS, save_model
from experiments import references
from experiments.references import PERFECT, evaluation_cases
from experiments.scene_measures import background_names
from support.files import file_id, save_tensors
from toy.scenes import SCENES, scene_set
from training.states import training_settings

def test_cases_are_new_assets_and_known_ones_before_a_new_background(tmp_path):
    scenes, assets = evaluation_cases(9, tmp_path)
    assert len(scenes["text"]) == len(assets.category) == 9 and len(scenes["image"]) == 9
    assert torch.equal(scenes["labels"], torch.stack(assets[:3], dim=1))
    known = scene_set(4, SEEDS["synthetic"], folder=tmp_path)              # what is trained on
    assert torch.equal(scenes["labels"][5:], known["labels"][::SCENES])
    for k, name in enumerate(background_names(scenes["text"][5:])):
        assert name not in background_names(known["text"][SCENES * k:SCENES * (k + 1)])


def test_rows_are_trained_drawn_measured_and_not_made_again(tmp_path, monkeypatch, capsys):
    small = replace(TINY, image_size=32, depth=1)
    monkeypatch.setitem(PRESETS, "toy", small)
    save_model(str(tmp_path / "scenes.safetensors"), small, random_model(small))
    net = references.train_feature_net
    monkeypatch.setattr(references, "train_feature_net",
                        lambda *a, **options: net(*a, **options | dict(num=20, steps=4)))
    scenes = references.scene_set
    monkeypatch.setattr(references, "scene_set", lambda num, *a, **options: scenes(min(num, 6), *a, **options))
    flags = ["--num", 12, "--num_steps", 2, "--threads", 1, "--folder", tmp_path, "--results", tmp_path,
             "--train_flags=--num_assets 3 --steps 2 --batch 1 --picture_steps 2"]
    rows = ["--rows", "text only", "RefAny3D", "one reference, no point maps"]
    run_main(references, *flags, *rows)
    made = (tmp_path / "refany3d-RefAny3D.safetensors").read_bytes()
    run_main(references, *flags, "--seed", 1, "--rows", "text only")
    run_main(references, *flags, *rows)
    assert made == (tmp_path / "refany3d-RefAny3D.safetensors").read_bytes()
    stored = json.loads((tmp_path / "refany3d.json").read_text())["rows"]
    assert set(stored) == {PERFECT, "text only", "RefAny3D", "one reference, no point maps"}
    assert set(stored["text only"]["toy"]) == {"0", "1"} and set(stored["RefAny3D"]["toy"]) == {"0"}
    assert "drawn" in stored["RefAny3D"]["toy"]["0"] and "drawn" not in stored["text only"]["toy"]["0"]
    assert (tmp_path / "refany3d_sheet.png").exists() and "+-" in (tmp_path / "refany3d.md").read_text()


@pytest.mark.parametrize("flags, word", [
    (("--train_flags=--bogus 3",), "--train_flags '--bogus 3': unrecognized arguments"),
    (("--train_flags=--prompt mug",), "--train_flags must not name --prompt"),
    (("--train_flags=--num_references=4",), "--train_flags must not name --num_references"),
    (("--train_flags=--num_ref 4",), "--train_flags '--num_ref 4': unrecognized arguments"),
    (("--train_flags=--steps 0",), "--train_flags '--steps 0': --steps must lie in"),
    (("--results", "file"), "--results 'file/refany3d.json'"), (("--results", "."), "--results './refany3d.md'"),
    (("--folder", "file"), "--folder 'file/"),
])
def test_flags_are_refused_at_once(flags, word, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "launch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "refany3d.md").mkdir()
    refuses(references, flags, 2, word)


@pytest.mark.parametrize("stored, word", [
    *((text, "is no file of results") for text in ("[]", "null", '{"text only": {"toy": {}}}')),
    (10 ** 5 * "[", "is damaged"),
    *(('{"settings": {}, "rows": {"text only": %s}}' % row, "is no file of results")
      for row in ("{}", "[]", '{"toy": {"0": {"hue": "a"}}}')),
    (dict(settings=dict(num_steps=9)), "made with --num_steps 9 (now 50): name another folder with --results"),
    (dict(settings=dict(base=["scenes.safetensors", 1])), "made with --base ['scenes.safetensors', 1] (now "),
    (dict(settings=dict(train_flags="--steps 9")), "made with --train_flags --steps 9 (now "),
    (dict(rows={"another": {"toy": {}}}), "made with a row 'another'"),
])
def test_results_that_are_none_or_others_are_found_before_any_work(stored, word, tiny_toy, monkeypatch):
    out, _ = tiny_toy
    (out / "base.safetensors").rename(out / "scenes.safetensors")
    monkeypatch.setattr(references, "launch", None)
    flags = ("--folder", str(out), "--results", str(out))
    if isinstance(stored, dict):
        settings = references.settings_of_cases(references.parse_args(flags)) | stored.get("settings", {})
        stored = json.dumps(dict(settings=settings, rows=stored.get("rows", {})))
    (out / "refany3d.json").write_text(stored)
    refuses(references, flags, 1, "refany3d.json", word)


@pytest.mark.parametrize("change, word", [
    ({}, None), (dict(dtype="float32"), None), (dict(base_file=None), None),
    (dict(renders=True), "refany3d-RefAny3D.safetensors was trained with renders True (now False): name another"),
    (dict(num_references=1), "trained with num_references 1 (now 8)"), (dict(seed=3), "trained with seed 3 (now 0)"),
    (dict(steps=9), "trained with steps 9 (now 2)"), (dict(base_file=5), "trained with base_file 5 (now "),
    (None, "refany3d-RefAny3D.safetensors holds no RefAny3D"),
])
def test_a_model_that_other_flags_have_trained_is_no_row_s(change, word, tiny_toy, monkeypatch):
    """Found before any work. None in place of base_file: an adapter of an earlier commit."""
    out, _ = tiny_toy
    (out / "base.safetensors").rename(out / "scenes.safetensors")
    monkeypatch.setattr(references, "launch", None)
    flags = ("--folder", str(out), "--results", str(out), "--train_flags=--steps 2", "--rows", "RefAny3D")
    args = references.parse_args(flags)
    path, of_the_row = references.row_training("RefAny3D", args)
    made = training_settings(references.parse_row(of_the_row))
    made |= {"base_file": file_id(str(out / "scenes.safetensors"))[1]} | (change or {})
    made = {name: value for name, value in made.items() if name != "base_file" or value is not None}
    save_tensors(path, {"x": torch.zeros(1)}, **({} if change is None else {"settings": made}))
    if word is None:
        references.check_row("RefAny3D", args)
    else:
        refuses(references, flags, 1, word)
