"""CAD's measures: perfect views reach their best, and each kind of mistake shows in its own measure."""
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, refuses, run_main

from data import SEEDS
from dit import PRESETS, save_model
from experiments import distillation
from experiments.distillation import AZIMUTHS, PERFECT, lifted_surface, measure_objects, paired_cells, sampled_views
from geometry.camera import ELEVATION, camera
from related import cad, cad_samples, view_prior
from related.view_prior import poses_around
from support.files import save_tensors
from toy.render import Look, render
from toy.world import exaggerated, sample_assets, take


@pytest.fixture(scope="module")
def ducks():
    """A duck and a car from eight sides."""
    assets = exaggerated(sample_assets(15, SEEDS["evaluation"]))
    return render(take(assets, torch.tensor([14, 4])), Look("photo"), AZIMUTHS)


def test_depth_is_lifted_to_the_surface(ducks):
    """From the renderer's own positions: the same places, and normals that agree with its."""
    forward = camera(torch.tensor(AZIMUTHS), ELEVATION)[2]                      # (8, 3)
    depth = (ducks.position * forward[:, :, None, None]).sum(dim=2, keepdim=True)
    known = (ducks.normal.norm(dim=2, keepdim=True) > 0.5).float()
    surface = lifted_surface(known, depth)
    on = known.expand(-1, -1, 3, -1, -1) > 0
    assert (surface.position - ducks.position)[on].abs().max() < 1e-4 and torch.equal(surface.mask, known)
    cosine = (surface.normal * ducks.normal).sum(dim=2)[known[:, :, 0] > 0]
    assert cosine.median() > 0.97


def test_mistakes_show_where_they_should(ducks, shipped_judges):
    views = ducks.rgb

    def measured(images, category=None):
        read = shipped_judges.net(images[:, 0])["category"].argmax(1)[0] if category is None else category
        return measure_objects(images, None, torch.tensor([int(read), 0, 0]), views[0], shipped_judges)
    same = measured(views[:1].expand(2, -1, -1, -1, -1))
    assert same["diversity"] == pytest.approx(0, abs=1e-3) and same["likeness"] == pytest.approx(1, abs=1e-5)
    assert measured(views)["likeness"] < same["likeness"] and same["two_fronts"] == 0 and same["drawn"] == 1
    other = (views[:1] + 0.02 * torch.randn(views[:1].shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert measured(torch.cat([views[:1], other]))["diversity"] > 1e-3
    assert math.isnan(measured(views, 99)["diversity"])                         # none is of the category
    other = views[:1].clone()
    other[:, 1::2] = views[1:, 1::2]                                            # between the four sides nothing counts
    assert measured(torch.cat([views[:1], other]))["diversity"] == pytest.approx(0, abs=1e-3)
    for faces in ([4], range(8)):                                               # two, and one to every side
        faced = views[:1].clone()
        faced[:, faces] = views[:1, :1]
        assert measured(faced)["two_fronts"] == 1
    assert measured(torch.ones(1, 8, 3, 32, 32))["drawn"] == 0
    gray = views[:1].mean(dim=2, keepdim=True).expand(-1, -1, 3, -1, -1)
    assert measured(gray)["chroma"] < 1e-6 < measured(views[:1])["chroma"]
    red = torch.ones(1, 8, 3, 32, 32)
    red[..., 1:, 8:24, 8:24] = 0                                                # (1, 0, 0) is sqrt(2 / 3) from gray
    assert measured(red)["chroma"] == pytest.approx((2 / 3) ** 0.5, abs=1e-5)


def test_a_table_of_four_rows(tmp_path, monkeypatch, shipped_judges):
    small = replace(TINY, image_size=32, depth=2)
    monkeypatch.setitem(PRESETS, "toy", small)
    monkeypatch.setattr(cad, "train_feature_net", lambda *args: shipped_judges.net)
    monkeypatch.setattr(distillation, "load_judges", lambda *args: shipped_judges)
    monkeypatch.setattr(distillation, "EACH", 2)
    save_model(str(tmp_path / "base.safetensors"), small, random_model(small))
    run_main(view_prior, "--out", tmp_path, "--num_assets", 2, "--steps", 1, "--batch", 2, "--picture_steps", 1,
             "--threads", 1)
    rows = ["samples", "CAD", "stage 1 alone", "score distillation"]
    short = "--each 3 --num_steps 1 --steps 1 --lift_steps 1 --batch 2 --invert_steps 1"
    monkeypatch.setattr(cad_samples, "poses_around", lambda num: poses_around(8))
    command = ["--objects", 1, "--rows", *rows, "--sds_steps", 2, "--threads", 1, "--folder", tmp_path, "--results",
               tmp_path / "results", f"--train_flags={short}"]
    run_main(distillation, *command)
    table = json.loads((tmp_path / "results" / "cad.json").read_text())["rows"]
    assert list(table) == [PERFECT, *rows] and (tmp_path / "results" / "cad_sheet.png").exists()
    assert all("diversity" in table[label]["toy"]["0, 1"] for label in rows)   # they have several objects to show
    assert "diversity" not in table[PERFECT]["toy"]["0, 1"] and table[PERFECT]["toy"]["0, 1"]["covered"] > 0.9
    assert table[PERFECT]["toy"]["0, 1"]["psnr_loo"] > 20 and "psnr_loo" not in table["samples"]["toy"]["0, 1"]
    assert "| score distillation" in (tmp_path / "results" / "cad.md").read_text()
    before = (tmp_path / "cad_1.safetensors").read_bytes()
    run_main(distillation, *command)                                            # nothing is made again
    again = json.loads((tmp_path / "results" / "cad.json").read_text())["rows"]
    assert table["CAD"]["toy"]["0, 1"]["device"] == "cpu"
    for label, row in table.items():                                            # None: no pair is of the right category
        row["toy"]["0, 1"] = {name: value for name, value in row["toy"]["0, 1"].items() if isinstance(value, float)}
        again[label]["toy"]["0, 1"] = {name: again[label]["toy"]["0, 1"][name] for name in row["toy"]["0, 1"]}
        assert again[label]["toy"]["0, 1"] == pytest.approx(row["toy"]["0, 1"], rel=1e-4)
    assert (tmp_path / "cad_1.safetensors").read_bytes() == before
    run_main(distillation, *command, "--objects", 2, "--rows", "score distillation")        # another is added
    added = json.loads((tmp_path / "results" / "cad.json").read_text())["rows"]
    assert {label: list(row["toy"]) for label, row in added.items()} == \
        {PERFECT: ["0, 1", "0, 2"], "samples": ["0, 1"], "CAD": ["0, 1"], "stage 1 alone": ["0, 1"],
         "score distillation": ["0, 1", "0, 2"]}
    refuses(distillation, [*command, "--sds_steps", 3], 1, "cad.json was made with")
    longer = [*command[:-1], "--results", tmp_path / "other"]
    refuses(distillation, longer, 1, "samples.safetensors was made with other settings", "each 3 (now 4)")
    refuses(distillation, [*longer, "--rows", "CAD"], 1, "cad_1.safetensors is no generator")
    model = (tmp_path / "base.safetensors").read_bytes()
    save_model(str(tmp_path / "base.safetensors"), small, random_model(small, seed=1))
    refuses(distillation, [*command, "--rows", "CAD"], 1, "cad_1.safetensors is no generator", "refining model")
    (tmp_path / "base.safetensors").write_bytes(model)
    refuses(distillation, [*command, "--train_flags=--bogus 3"], 2, "--train_flags '--bogus 3'")
    refuses(distillation, [*command, "--train_flags=--object 3"], 2, "--train_flags must not name --object")
    refuses(distillation, [*command, "--prior", tmp_path / "none.safetensors"], 1, "none.safetensors")
    (tmp_path / "results" / "cad.json").write_text("[]")
    refuses(distillation, command, 1, "cad.json is no file of results")


def test_the_samples_nearest_to_each_side():
    """Five rounds of eight samples, up to 4 degrees beside the sides; the second, seen from above, is the farthest."""
    azimuth = torch.cat([torch.arange(8) * 45.0 + k for k in (0.0, 1.0, -2.0, 3.0, 4.0)]) % 360
    samples = dict(image=torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1), azimuth=azimuth,
                   elevation=torch.tensor([ELEVATION] * 8 + [ELEVATION + 9.0] * 8 + [ELEVATION] * 24))
    image = sampled_views(samples)["image"][..., 0, 0, 0]                       # (4, 8)
    assert torch.equal(image, torch.arange(8)[None] + 8 * torch.tensor([0, 2, 3, 4])[:, None])


def test_rows_are_compared_with_cad_case_by_case():
    cases = {"0, 1": 0.5, "0, 2": 0.1, "1, 1": 0.3}
    table = {"CAD": {"toy": {case: dict(photo=value) for case, value in cases.items()}},
             "other": {"toy": {"0, 1": dict(photo=0.6), "0, 2": dict(photo=0.4), "7, 7": dict(photo=0.5)}},
             "one": {"toy": {"0, 2": dict(photo=0.1), "1, 1": dict(photo=None)}}}
    head, *rows = paired_cells(table)
    assert [row[:2] for row in rows] == [["CAD", "3"], ["other", "3"], ["one", "2"]]
    # .1 and .3 above CAD: .2 on average, with the standard error of two numbers, half of their distance
    assert [row[head.index("photo")] for row in rows] == ["0.30", "0.50 (+0.20 +- 0.10)", "0.10 (+0.00)"]
    assert rows[1][head.index("KD")] == "-" and paired_cells({"one": table["one"]})[1][3] == "0.10"


@pytest.mark.parametrize("flags, word", [
    (("--train_flags=--obj 3",), "--train_flags '--obj 3': unrecognized arguments"),
    (("--train_flags=--na x",), "--train_flags '--na x': unrecognized arguments"),
    (("--results", "file"), "--results 'file/cad.json'"), (("--results", "."), "--results './cad.md'"),
    (("--folder", "file"), "--folder 'file/"),
])
def test_flags_are_refused_at_once(flags, word, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "launch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "cad.md").mkdir()
    refuses(distillation, flags, 2, word)


@pytest.mark.parametrize("measures", ['"a"', '["a"]', '{"likeness": "a"}', '{"likeness": [1]}', '{"likeness": NaN}',
                                      '{"likeness": 1%s}' % (400 * "0")])
def test_values_that_are_no_numbers_are_found_before_any_work(measures, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "load_judges", None)
    save_tensors(str(tmp_path / "prior"), {"weight": torch.ones(1)})
    flags = ["--prior", tmp_path / "prior", "--threads", 1, "--results", tmp_path]
    settings = json.dumps(distillation.table_settings_of(distillation.parse_args([str(flag) for flag in flags])))
    (tmp_path / "cad.json").write_text('{"settings": %s, "rows": {"CAD": {"toy": {"0": %s}}}}' % (settings, measures))
    refuses(distillation, flags, 1, "cad.json is no file of results")
