"""The paper's tables on the toy: trained, sampled and measured as a whole, gone on with, printed."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALONE, TINY, TINY_STAGE2, random_model, refuses

import data
import train_stage2
from dit import PRESETS, save_model
from experiments import tables
from experiments.paper import PAPER1, PAPER_COLUMNS, TABLES
from experiments.results import (ORACLE, comparable, left_out, seed_folder, seed_mean, seed_noise, table_lines,
                                 table_rows)
from geometry.camera import VIEWS
from sample import Sampling
from support.files import file_id, save_tensors
from support.pictures import to_uint8
from toy.world import WORLD_VERSION, asset_captions, sample_assets, tokenize
from training.flags import fill_defaults
from training.states import training_settings


def test_table_2_trains_samples_measures_and_goes_on(tmp_path, shipped_judges, monkeypatch, capsys):
    """All eight rows from five trainings; run again, it trains and samples nothing and prints the same numbers."""
    small, run = replace(TINY, image_size=32, depth=2), tmp_path / "run"
    monkeypatch.setitem(PRESETS, "toy", small)
    save_model(str(run / "base.safetensors"), small, random_model(small))
    train, started = train_stage2.main, []
    monkeypatch.setattr(tables, "load_judges", lambda *args: shipped_judges)

    def counted(flags):
        started.append(flags)
        train(flags)
    monkeypatch.setattr(train_stage2, "main", counted)
    monkeypatch.setattr(train_stage2, "object_sheet", lambda *args, **options: None)  # no pictures, no estimate
    monkeypatch.setattr(train_stage2, "announce", lambda *args: None)
    rest = " ".join(map(str, TINY_STAGE2)) + " --no-compile"
    command = ["table2", *"--num 2 --num_steps 2 --cfg_scale 1 --threads 1".split(), "--results", str(tmp_path)]
    command += ["--folder", str(run), "--train_flags", rest]
    tables.main(command)
    first = json.loads((tmp_path / "table2.json").read_text())["rows"]
    assert len(started) == 5 and len(first) == 9  # eight rows and the oracle
    assert first["8 = 7, shifted"]["paper"]["PSNR"] == 24.78 and first["1 joint"]["toy"]["0"]["FD_B"] > 0
    modes = [path.name.rsplit("-", 1)[1] for path in run.glob("texturing-*.samples")]
    assert sorted(modes) == ["real.samples"] * 5 + ["shifted.samples"] * 3
    assert (tmp_path / "table2.png").exists() and (tmp_path / "table2_sheet.png").exists()
    assert capsys.readouterr().out.count("Spearman") == 2
    # again, and then on another machine, to which only the results came: nothing is trained, all rows are drawn
    drawn = (tmp_path / "table2_sheet.png").read_bytes()
    for elsewhere in (False, True):
        if elsewhere:
            for path in run.glob("texturing-*"):
                path.rename(tmp_path / path.name)
        tables.main(command)
        assert len(started) == 5 and json.loads((tmp_path / "table2.json").read_text())["rows"] == first
        assert (tmp_path / "table2_sheet.png").read_bytes() == drawn
    for path in tmp_path.glob("texturing-*"):
        path.rename(run / path.name)
    # another seed trains anew and stands beside the first
    tables.main([*command, "--seed", "1", "--rows", "3 real data", "4 = 3, shifted"])
    both, text = json.loads((tmp_path / "table2.json").read_text())["rows"], (tmp_path / "table2.md").read_text()
    assert len(started) == 6 and "`python -m experiments.tables table2 --num 2 " in text
    assert "Not counted until all rows have it: seed 1 of 3 real data, 4 = 3, shifted" in text and "2 seeds" not in text
    row = both["3 real data"]["toy"]
    assert row["0"] == first["3 real data"]["toy"]["0"] and row["1"]["KD_I"] != row["0"]["KD_I"]
    assert list(both["1 joint"]["toy"]) == ["0"]
    with pytest.raises(ValueError, match="no row '9'"):
        tables.main([*command, "--rows", "9"])
    with pytest.raises(ValueError, match="made with .*--results"):
        tables.main([*command, "--num_steps", "3"])
    with pytest.raises(ValueError, match="trained by 'python train_stage2.py .*without --clip 9: .*--folder"):
        tables.main([*command[:-1], f"{rest} --clip 9", "--results", str(tmp_path / "others")])
    assert len(started) == 6


def test_rows_in_processes_of_their_own(tmp_path, tiny_run):
    """Two rows that train the same stage 1, and one that fails: the others are kept, the error names it."""
    flags = " ".join(map(str, TINY_STAGE2)) + " --no-compile"
    command = ["table2", *"--num 2 --num_steps 2 --cfg_scale 1 --seed 3 --processes 3".split(), f"--train_flags={flags}"]
    command += ["--results", str(tmp_path), "--folder", str(tiny_run)]
    few = data.photo_set(40, folder=tmp_path)                           # the thousand that each process would render
    key = dict(kind="photos", num=1000, seed=data.SEEDS["photos"], size=32, version=WORLD_VERSION)
    photos = {name: value.repeat(25, *[1] * (value.dim() - 1)) for name, value in few.items()}
    kept = tiny_run / "sets" / f"photos_1000_32_{key['seed']}.safetensors"
    save_tensors(str(kept), photos, key=key)
    (tiny_run / "seed3").mkdir()
    (tiny_run / "seed3" / "texturing-no_real_data.safetensors").write_bytes(b"damaged")
    rows = ["3 real data", "2 no real data", "5 = 3 + reassignment"]
    with pytest.raises(ValueError, match="rows that failed: 2 no real data; the same command goes on"):
        tables.main([*command, "--rows", *rows])
    table = json.loads((tmp_path / "table2.json").read_text())["rows"]
    assert [label for label, row in table.items() if row["toy"]] == [rows[0], rows[2], ORACLE]
    log = (tiny_run / "table2_3_2_no_real_data.log").read_text()
    assert "texturing-no_real_data.safetensors is not a readable safetensors file" in log and "Traceback" not in log
    made = [(tiny_run / f"table2_3_{label.replace(' ', '_')}.log").read_text() for label in (rows[0], rows[2])]
    assert sum("shifters.safetensors, trained for" in text for text in made) == 2
    assert sum("stage1: done" in text for text in made) == 1                # the other one waited
    kept.unlink()


def test_sdedit_starts_from_the_images_of_syn_only(tmp_path, monkeypatch):
    """Table 1's row: the base model denoises each view alone, asked what all methods are asked."""
    row = next(row for row in TABLES["table1"][1] if row.label == "SDEdit")
    held, seen = data.evaluation_set(2, folder=tmp_path), {}

    def sample_images(network, inputs, sampling, views, progress):
        seen["mode"] = sampling.mode
        return torch.full((2, views, 3, 32, 32), 0.5)

    def sdedit(network, images, text, sampling):
        seen.update(images=images, text=text, seed=sampling.seed)
        return -images
    for name, stand_in in (("sample_images", sample_images), ("sdedit", sdedit), ("load_toy", lambda *args: None)):
        monkeypatch.setattr(tables, name, stand_in)
    model, base = (str(tmp_path / f"{name}.safetensors") for name in ("syn_only", "base"))
    for path in (model, base):
        save_tensors(path, {"w": torch.ones(1)})
    images = tables.row_samples(row, model, "texturing", held, Sampling(seed=3), base, "cpu")
    assert seen["mode"] == "real" and seen["seed"] == 3 and abs(seen["images"] - 0.5).max() < 0.01
    assert (images == to_uint8(-seen["images"])).all() and images.shape == (2, 4, 3, 32, 32)
    captions = [caption for caption in asset_captions(sample_assets(2, data.SEEDS["evaluation"])) for _ in VIEWS]
    assert torch.equal(seen["text"].flatten(0, 1), tokenize(captions))


def test_rows_are_compared_in_the_seeds_that_all_have():
    rows = {"a": dict(toy={"0": dict(psnr=1.0), "2": dict(psnr=9.0)}), "b": dict(toy={"0": dict(psnr=2.0)}),
            "none": dict(toy={}), ORACLE: dict(toy={"0": {}, "1": {}, "2": {}})}
    kept = comparable(rows)
    assert {label: list(row["toy"]) for label, row in kept.items()} == {"a": ["0"], "b": ["0"], "none": [], ORACLE: ["0"]}
    assert left_out(rows) == "seed 2 of a" and left_out(kept) == "" and seed_mean(kept["a"], "psnr") == 1.0
    apart = {"a": rows["a"], "b": dict(toy={"1": dict(psnr=2.0)})}
    assert comparable(apart) == apart and comparable({}) == {}


def test_every_table_prints_before_and_after_its_rows_are_there():
    """TRELLIS has no consistency numbers, the oracle none of the paper's."""
    for _, rows in TABLES.values():
        results = {row.label: dict(paper=dict(zip(PAPER_COLUMNS, row.paper)), toy={}) for row in rows}
        for k, row in enumerate(rows):
            results[row.label]["toy"] = {"0": dict(KD_I=float(k), psnr=20.0 + k)} if row.flags is not None else {}
        oracle = dict(paper=dict.fromkeys(PAPER_COLUMNS), toy={"-": dict(KD_I=1.0, psnr=40.0)})
        lines = table_lines(results | {ORACLE: oracle})
        assert len(lines) == len(rows) + 9 and ORACLE in lines[len(rows) + 2]


def some_results(**values):
    """A table of rows with these (KD_I, psnr), a tuple of pairs for several seeds."""
    rows = {}
    for label, pairs in values.items():
        pairs = pairs if isinstance(pairs[0], tuple) else (pairs,)
        toy = {str(seed): dict(KD_I=kd, psnr=psnr, iou=0.9) for seed, (kd, psnr) in enumerate(pairs)}
        paper = dict.fromkeys(PAPER_COLUMNS, 1.0) | dict(PSNR=float(len(rows)), KID_I=-float(len(rows)))
        rows[label] = dict(paper=paper, toy=toy)
    return rows


def test_seed_noise_is_the_pooled_deviation_and_the_order_is_compared():
    rows = some_results(a=((1.0, 5.0), (3.0, 5.5)), b=((4.0, 6.0), (8.0, 6.5)), c=(9.0, 6.1))
    assert seed_mean(rows["a"], "KD_I") == 2 and seed_mean(rows["c"], "lpips") is None
    assert seed_noise(rows, "KD_I") == pytest.approx(np.sqrt((2 + 8) / 2))  # variances 2 and 8
    assert seed_noise(some_results(a=(1.0, 2.0)), "KD_I") is None
    lines = table_lines(rows)
    assert lines[0].split("|")[2].strip() == "psnr" and "a (2 seeds)" in lines[2] and "5.25 +- 0.35" in lines[2]
    assert lines[5].startswith("| deviation between seeds")
    perfect = dict(paper=rows["c"]["paper"], toy={seed: dict(KD_I=7.0, psnr=40.0, iou=1.0) for seed in "01"})
    noise = [line for line in table_lines(rows | {ORACLE: perfect}) if line.startswith("| deviation")]
    assert noise[0].split() == lines[5].split()                             # perfect photographs are not trained
    assert lines[-5].endswith(": 0.50") and lines[-3].endswith(": -1.00") and lines[-1].endswith("than 0.05: none")


def test_rows_on_which_the_two_judges_differ_are_named():
    rows = some_results(a=((1.0, 5.0), (3.0, 5.5)), b=(4.0, 6.0))
    for seed, second in (("0", 0.8), ("1", 0.88)):
        rows["a"]["toy"][seed] |= dict(photo=0.9, photo_2=second)
    rows["b"]["toy"]["0"] |= dict(photo=0.9, photo_2=0.86)
    assert table_lines(rows)[-1].endswith("than 0.05: a (0.90 and 0.84)")


def test_the_papers_numbers_are_complete():
    for task, rows in TABLES.values():
        assert all(len(row.paper) == 8 for row in rows) and task in ("texturing", "text")
    assert len(TABLES["table1"][1]) == 14 and len(TABLES["table3"][1]) == 15
    syn, ours = PAPER1["syn only"], PAPER1["Realiz3D"]
    assert syn[0] > ours[0] and syn[6] > ours[6]  # it trades some consistency for realism


@pytest.mark.parametrize("flags, word", [
    (("--results", "file"), "--results 'file/table1.json'"), (("--folder", "file"), "--folder 'file/"),
    *((("--results", ending), f"--results '{ending}/table1{ending}'")
      for ending in (".json", ".md", ".png", "_sheet.png", ".samples")),
])
def test_places_that_take_no_table_are_named_before_any_work(flags, word, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "launch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for ending in (".json", ".md", ".png", "_sheet.png", ".samples"):
        (tmp_path / ending / f"table1{ending}").mkdir(parents=True)
    refuses(tables, ("table1", *flags), 2, word)


def test_a_model_without_its_command_is_no_row_s(tmp_path):
    save_tensors(f"{tmp_path}/texturing-method_syn_only.safetensors", {"w": torch.ones(1)})
    (row,) = [row for row in TABLES["table1"][1] if row.label == "syn only"]
    with pytest.raises(ValueError, match="syn_only.safetensors was trained by 'None', without --task"):
        tables.trained_row(row, "texturing", tables.parse_args(["table1", "--folder", str(tmp_path)]), ALONE)


def test_a_model_trained_otherwise_is_no_row_s(tmp_path, monkeypatch):
    """Nor is one beside shifters trained otherwise; what was trained as the row says is taken."""
    (row,) = [row for row in TABLES["table1"][1] if row.label == "Realiz3D"]
    command = f"--task texturing --name texturing --seed 0 --base {tmp_path}/base"
    save_tensors(f"{tmp_path}/base", {"w": torch.ones(1)})
    asked = fill_defaults(train_stage2.parse_args(command.split()), "stage2", ALONE)
    monkeypatch.setattr(tables, "default_base", lambda *_: f"{tmp_path}/base")

    def row_with(steps=asked.steps, stage1_lr=asked.lr, base=file_id(f"{tmp_path}/base")):
        settings = training_settings(asked)
        stage1 = training_settings(train_stage2.stage1_flags(asked, ALONE)) | dict(lr=stage1_lr)
        save_tensors(f"{tmp_path}/texturing.safetensors", {"w": torch.ones(1)}, command=command, base=base,
                     settings=settings | dict(steps=steps))
        save_tensors(f"{tmp_path}/shifters.safetensors", {"w": torch.ones(1)}, command=command, base=base,
                     settings=stage1)
        return tables.trained_row(row, "texturing", tables.parse_args(["table1", "--folder", str(tmp_path)]), ALONE)
    assert row_with() == row_with(base=None) == f"{tmp_path}/texturing.safetensors"
    for otherwise, words in ((dict(steps=5), "texturing.safetensors was trained with steps 5"),
                             (dict(stage1_lr=9.0), "shifters.safetensors was trained with lr 9.0"),
                             (dict(base=("mine", 1)), "another base model, mine")):
        with pytest.raises(ValueError, match=words):
            row_with(**otherwise)


def test_results_of_a_row_that_was_made_otherwise_are_refused():
    (row,) = [row for row in TABLES["table1"][1] if row.label == "LoRA 32"]
    stored = {"LoRA 32": dict(flags="--method lora --rank 6", mode="real", toy={"0": dict(psnr=1.0)})}
    with pytest.raises(ValueError, match="the results of 'LoRA 32' are of '--method lora --rank 6', real, not of"):
        table_rows([row], stored)
    kept = table_rows([row], {"LoRA 32": stored["LoRA 32"] | dict(flags=row.flags)})
    assert kept["LoRA 32"]["toy"] == {"0": dict(psnr=1.0)}


def test_another_seed_has_a_folder_of_its_own_with_the_same_sets(tmp_path):
    (tmp_path / "sets").mkdir()
    first, second = (seed_folder(Namespace(seed=seed, folder=str(tmp_path))) for seed in (0, 1))
    assert first == str(tmp_path) and seed_folder(Namespace(seed=1, folder=first)) == second != first
    assert (tmp_path / "seed1" / "sets").samefile(tmp_path / "sets")
