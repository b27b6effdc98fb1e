"""Measures: against brute force, closed forms, independent libraries (tests/golden), and the oracle."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_STAGE2
from safetensors.torch import load_file

import data
import evaluate
import train_stage2

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def oracle():
    assets = data.sample_assets(24, data.SEEDS["evaluation"])
    quantised = lambda views: (views.rgb * 255).round() / 255
    photo = data.render(assets)
    return photo, quantised(photo), quantised(data.render(assets, style="render", geometry=False))


def consistency(images, maps):
    values = evaluate.consistency(images, maps.position, maps.normal, maps.mask)
    return values["psnr_loo"], values["covered"]


# ---- the oracle


def test_perfect_views_have_the_right_silhouette(oracle):
    maps, photo, render = oracle
    for images in (photo, render):
        assert evaluate.silhouette_iou(images, maps.mask).min() >= 0.98


def test_perfect_views_are_consistent(oracle):
    maps, photo, render = oracle
    (psnr, share), (flat, _) = consistency(photo, maps), consistency(render, maps)
    assert psnr.mean() >= 30 and flat.mean() >= 40
    assert share.min() > 0.02 and 0.3 < share.mean() < 0.6


def test_inconsistent_views_score_low(oracle):
    maps, photo, _ = oracle
    mixed = torch.cat([photo[:, :1], photo[:, 1:].roll(1, dims=0)], dim=1)  # the other views of another object
    assert consistency(mixed, maps)[0].nanmean() < 20
    tinted = photo.clone()
    tinted[:, 0] = (tinted[:, 0] - 0.1).clamp(0, 1)  # one view darker by 0.1: about 20 dB there
    assert consistency(tinted, maps)[0].mean() < consistency(photo, maps)[0].mean() - 4


def test_consistency_of_a_known_error(oracle):
    maps, photo, _ = oracle
    views = torch.tensor([0.0, 0.1, 0.0, 0.1])[
        None, :, None, None, None
    ]  # neighbours differ by 0.1, opposite views by 0
    psnr, _ = consistency(views.expand_as(photo), maps)
    assert psnr.min() > 19.99 and psnr.max() < 30  # 20 dB where a neighbour alone predicts


def test_consistency_reads_the_positions(oracle):
    maps, photo, _ = oracle
    function = lambda p: 0.5 + 0.4 * torch.sin(4 * p)  # colour as a smooth function of the 3D point
    smooth = torch.where(maps.mask > 0, function(maps.position), torch.ones(()))
    assert consistency(smooth, maps)[0].nanmean() > 30
    assert consistency(smooth.flip(-1), maps)[0].nanmean() < 22


def test_colour_that_is_a_function_of_the_point_is_consistent_and_a_shift_by_one_pixel_costs_what_it_must():
    """On cubes, whose flat top all four views see alike: each view errs by d, or makes three others err by d / 3."""
    cube = data.Assets(torch.tensor([data.CATEGORIES.index("cube")]), *(f[:1] for f in data.sample_assets(1, 0)[1:]))
    maps = data.render(cube, style="render", size=64)
    inside = (maps.normal.norm(dim=2, keepdim=True) > 0.5).float()
    right, _, _ = data.camera(0)
    color = lambda p: 0.5 + 0.4 * (p * right[:, None, None]).sum(2, keepdim=True).expand_as(p)  # linear in the point
    exact = color(maps.position) * inside + 1 - inside
    values = evaluate.consistency(exact, maps.position, maps.normal, maps.mask)
    assert values["psnr"] > 70 and values["psnr_loo"] > 70 and values["ssim"] > 0.9999
    pixel = 2 * data.EXTENT / 64
    shifted = exact.clone()
    shifted[:, 0] += 0.4 * pixel * inside[:, 0]
    want = -10 * np.log10((0.4 * pixel) ** 2 / 3)
    got = evaluate.consistency(shifted, maps.position, maps.normal, maps.mask)
    assert got["psnr_loo"].item() == pytest.approx(want, abs=0.6)  # along edges fewer views predict
    assert got["psnr"] > got["psnr_loo"]


# ---- silhouettes


def test_silhouette_iou_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 5, (3, 4, 1, 8, 8), generator=generator) / 4
    image = torch.where(torch.rand(3, 4, 1, 8, 8, generator=generator) < 0.6, 0.85, 1.0).repeat(1, 1, 3, 1, 1)
    image[:, :, 1:] = 1.0  # one channel is enough to be seen
    for k, value in enumerate(evaluate.silhouette_iou(image, mask)):
        both = either = 0
        for v in range(4):
            for i in range(8):
                for j in range(8):
                    m, seen = mask[k, v, 0, i, j].item(), image[k, v, 0, i, j].item() < 0.9
                    if m in (0, 1):
                        both += m == 1 and seen
                        either += m == 1 or seen
        assert value.item() == pytest.approx(both / either)


def test_near_white_is_background_and_pale_is_not():
    image = torch.tensor([1.0, 0.97, 0.85]).view(3, 1, 1, 1).repeat(1, 3, 1, 1)
    assert evaluate.silhouette(image).flatten().tolist() == [False, False, True]


# ---- distances


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "metrics.safetensors"), json.loads((GOLDEN / "metrics.json").read_text())


def test_golden_fid(golden):
    tensors, values = golden
    assert evaluate.fid(tensors["fid.a"], tensors["fid.b"]) == pytest.approx(values["fid"], rel=1e-8)
    deficient = evaluate.fid(tensors["fid.c"], tensors["fid.d"])
    assert deficient == pytest.approx(values["fid_rank_deficient"], rel=1e-5)


def test_golden_kid(golden):
    tensors, values = golden
    a, b = tensors["fid.a"], tensors["fid.b"]
    assert evaluate.kid(a[:100], b) == pytest.approx(values["kid_100"], rel=1e-8)
    assert evaluate.kid(a, b) == pytest.approx(values["kid_unequal"], rel=1e-8)


def test_fid_of_scaled_and_shifted_features():
    x = np.random.default_rng(0).standard_normal((500, 6))
    shift = np.arange(6.0)
    assert evaluate.fid(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    trace = np.trace(np.cov(x.T))
    assert evaluate.fid(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * trace, rel=1e-9)


def test_distances_need_two_images():
    with pytest.raises(ValueError, match="at least two"):
        evaluate.fid(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least two"):
        evaluate.kid(np.zeros((5, 3)), np.zeros((1, 3)))


def test_kid_over_subsets_spreads_around_the_full_estimate(golden):
    a, b = golden[0]["fid.a"], golden[0]["fid.b"]
    mean, deviation = evaluate.kid_spread(a, b, subset_size=60, num_subsets=200)
    assert mean == pytest.approx(evaluate.kid(a, b), abs=4 * deviation / 200**0.5) and deviation > 0
    assert evaluate.kid_spread(a, b, 60, 5, seed=1) == evaluate.kid_spread(a, b, 60, 5, seed=1)
    assert evaluate.kid_spread(a[:100], b, subset_size=1000, num_subsets=2)[1] == pytest.approx(0, abs=1e-12)


def test_features_must_fit_and_be_finite():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        evaluate.fid(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="finite"):
        evaluate.kid(np.full((5, 3), np.nan), np.zeros((5, 3)))


def test_clip_score_is_a_cosine():
    image, text = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, -5.0]])
    assert evaluate.clip_score(image, text).tolist() == pytest.approx([1, -(0.5**0.5)])


# ---- image against image


def test_golden_psnr_and_ssim(golden):
    tensors, values = golden
    a, b = tensors["images.a"] / 2 + 0.5, tensors["images.b"] / 2 + 0.5
    assert evaluate.psnr(a, b).tolist() == pytest.approx(values["psnr_per_image"], rel=1e-8)
    assert evaluate.ssim(a, b).mean().item() == pytest.approx(values["ssim_mean"], rel=1e-8)


def test_psnr_and_ssim_of_equal_images_and_of_some_pixels():
    a = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    b, left = a.clone(), torch.zeros(2, 4, 1, 16, 16, dtype=torch.bool)
    b[..., 8:] += 0.1
    left[..., :8] = True
    assert evaluate.psnr(a, a).isinf().all() and torch.allclose(evaluate.ssim(a, a), torch.ones(2, 4).double())
    assert evaluate.psnr(a, b, left).isinf().all()
    assert torch.allclose(evaluate.psnr(a, b, ~left), torch.full((2, 4), 20.0).double(), atol=1e-4)
    here = torch.zeros(1, 16, 16, dtype=torch.bool)
    here[..., 5, 5] = True  # its window ends with column 10, so the whole image agrees where b is changed beyond that
    c = a.clone()
    c[..., 11:] = 0
    assert torch.allclose(evaluate.ssim(a, c, here.expand(2, 4, 1, 16, 16)), torch.ones(2, 4).double())
    with pytest.raises(ValueError, match="11 x 11"):
        evaluate.ssim(a[..., :8], a[..., :8])


def test_golden_lpips(golden):
    tensors, values = golden
    shapes = {n: s for n, s in values["lpips_alex_shapes"].items() if n.startswith(("lin", "net"))}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.startswith("lin"):
            weights[name] = torch.rand(shape, generator=generator)
        elif len(shape) == 1:
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
    a, b = tensors["images.a"] / 2 + 0.5, tensors["images.b"] / 2 + 0.5
    assert evaluate.lpips(a, b, weights).tolist() == pytest.approx(values["lpips_alex"], abs=1e-6)
    assert evaluate.lpips(a, a, weights).abs().max() == 0
    assert evaluate.lpips(a[None], b[None], weights).shape == (1, 2)


# ---- the feature network


def test_feature_net_learns_the_domain_and_is_kept(tmp_path, oracle):
    net = evaluate.train_feature_net(tmp_path, num=100, steps=60)
    again = evaluate.train_feature_net(tmp_path, num=100, steps=60)
    _, photo, render = oracle
    photo, render = photo.flatten(0, 1), render.flatten(0, 1)
    features = net.features(photo)
    assert features.shape == (96, 64) and torch.equal(features, again.features(photo))
    assert torch.allclose(features[:7], net.features(photo[:7], batch=3), atol=1e-5)
    assert net.photo_probability(photo).mean() - net.photo_probability(render).mean() > 0.3
    other = net.features(render)
    assert evaluate.fid(features, other) > 2 * evaluate.fid(features[::2], features[1::2])


# ---- the trained models


def test_toy_table_of_untrained_models(tmp_path, tiny_run, monkeypatch, capsys):
    """The command as a whole: the oracle rows score nearly perfectly, models of three steps do not."""
    small_net = evaluate.train_feature_net
    monkeypatch.setattr(evaluate, "train_feature_net", lambda folder: small_net(folder, num=60, steps=40))
    photos = data.photo_set
    monkeypatch.setattr(data, "photo_set", lambda num, **options: photos(40, **options))
    model = str(tiny_run / "realiz3d_texturing.safetensors")
    monkeypatch.setattr(
        "sys.argv",
        [
            "evaluate.py",
            "toy",
            "--num",
            "2",
            "--num_steps",
            "2",
            "--model",
            model,
            "--syn_only",
            model,
            "--base",
            str(tiny_run / "base.safetensors"),
            "--folder",
            str(tmp_path),
            "--out",
            str(tmp_path / "e.png"),
            "--threads",
            "1",
        ],
    )
    evaluate.main()
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert list(rows) == [
        "oracle photos",
        "oracle renders",
        "base model, no control",
        "syn_only",
        "realiz3d, synthetic mode",
        "realiz3d, real mode",
        "realiz3d, shifted",
    ]
    assert rows["oracle photos"]["iou"] >= 0.98 and rows["oracle renders"]["iou"] >= 0.98
    assert rows["oracle photos"]["psnr_loo"] > 25 and rows["realiz3d, real mode"]["iou"] < 0.9
    assert rows["oracle renders"]["FD_I"] > rows["oracle photos"]["FD_I"] > 0
    assert rows["syn_only"] == rows["realiz3d, real mode"]  # here both are the same model
    assert rows["base model, no control"]["iou"] is None and rows["base model, no control"]["FD_I"] > 0
    assert (tmp_path / "e.png").exists() and "KD x1000" in capsys.readouterr().out


def test_a_missing_model_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train_stage2.py --preset small --task text --method syn_only"):
        evaluate.sample.default_model("small", "text", "syn_only")


# ---- lifting


def test_the_hull_of_a_sphere_lies_around_it_and_projects_back():
    """Four silhouettes of a ball: the hull holds the ball, touches its outline, and each map lies on its own pixels."""
    ball = data.Assets(torch.tensor([data.CATEGORIES.index("ball")]), *(f[:1] for f in data.sample_assets(1, 0)[1:]))
    maps = data.render(ball, style="render")
    position, normal, mask = evaluate.visual_hull(maps.mask > 0.5)
    there = mask[:, :, 0] > 0
    assert ((maps.mask[:, :, 0] > 0.5) == there).float().mean() > 0.98
    for v, azimuth in enumerate(data.AZIMUTHS):
        column, row, depth = data.project(position[:, v], torch.tensor([float(azimuth)]))
        rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
        on = there[:, v]
        assert (column[0] - columns)[on[0]].abs().max() < 1e-3 and (row[0] - rows)[on[0]].abs().max() < 1e-3
        both = on & (maps.mask[:, v, 0] == 1)
        truth = data.project(maps.position[:, v], torch.tensor([float(azimuth)]))[2]
        assert (truth - depth)[both].quantile(0.02) > -0.03  # not behind the ball's surface, but for its steep rim
        forward = data.camera(azimuth)[2]
        assert ((normal[:, v] * forward[:, None, None]).sum(1)[both] < 0.1).float().mean() > 0.97  # towards the camera
    colors = torch.where(there[:, :, None], 0.5 + 0.4 * position, torch.ones(()))
    assert evaluate.consistency(colors, position, normal, mask, near=0.5)["psnr"] > 35


# ---- the paper's tables


def test_table_2_trains_samples_measures_and_goes_on(tmp_path, tiny_run, monkeypatch, capsys):
    """All eight rows from five trainings; run again, it trains and samples nothing and prints the same numbers."""
    small_net, photos, started = evaluate.train_feature_net, data.photo_set, []
    monkeypatch.setattr(evaluate, "train_feature_net", lambda folder: small_net(folder, num=60, steps=40))
    monkeypatch.setattr(data, "photo_set", lambda num, **options: photos(40, **options))

    def run(command, **options):
        if command[0] == "git":
            return types.SimpleNamespace(stdout="abc\n")
        started.append(command)
        with monkeypatch.context() as inside:
            inside.setattr("sys.argv", command[1:])
            train_stage2.main()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(evaluate.subprocess, "run", run)
    tiny = ("--num", "2", "--num_steps", "2", "--steps", "3", "--threads", "1", "--results", str(tmp_path))
    at = TINY_STAGE2.index("--steps")
    rest = " ".join(map(str, TINY_STAGE2[:at] + TINY_STAGE2[at + 2 :]))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "table2", *tiny, "--folder", str(tiny_run), "--train_flags", rest])
    evaluate.main()
    first = json.loads((tmp_path / "table2.json").read_text())["rows"]
    assert len(started) == 5 and len(first) == 8
    assert first["8 = 7, shifted"]["paper"]["PSNR"] == 24.78 and first["1 joint"]["toy"]["FD_B"] > 0
    modes = [path.name.rsplit("-", 1)[1] for path in tiny_run.glob("texturing-*.samples")]
    assert sorted(modes) == ["real.samples"] * 5 + ["shifted.samples"] * 3
    assert (tmp_path / "table2.png").exists() and (tmp_path / "table2_sheet.png").exists()
    assert capsys.readouterr().out.count("Spearman") == 2
    evaluate.main()
    assert len(started) == 5 and json.loads((tmp_path / "table2.json").read_text())["rows"] == first


def test_the_papers_numbers_are_complete():
    for task, rows in evaluate.TABLES.values():
        assert all(len(row.paper) == 8 for row in rows) and task in ("texturing", "text")
    assert len(evaluate.TABLES["table1"][1]) == 14 and len(evaluate.TABLES["table3"][1]) == 15
    syn, ours = evaluate.PAPER1["syn only"], evaluate.PAPER1["Realiz3D"]
    assert syn[0] > ours[0] and syn[6] > ours[6]  # it trades some consistency for realism
