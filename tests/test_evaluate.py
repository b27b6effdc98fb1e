"""Measures: against brute force, closed forms, independent libraries (tests/golden), and the oracle."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_STAGE2, tiny_clip
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


def test_views_are_weighed_by_the_squared_cosine_and_only_where_they_show_the_same_point():
    """A sheet that view 0 sees at 30 degrees (and 20 of elevation) and view 1 at 60, in two greys."""
    turn, azimuth = np.radians(30), (0, 90)
    right, up = torch.tensor([np.cos(turn), 0, -np.sin(turn)]), torch.tensor([0.0, 1, 0])
    corners = torch.stack([i * right + j * up for i, j in ((-0.3, -0.3), (0.3, -0.3), (0.3, 0.3), (-0.3, 0.3))]).float()
    maps = data.mesh_views(data.Mesh(corners, torch.tensor([[0, 1, 2], [0, 2, 3]])), 32, azimuth)
    image = torch.tensor([0.2, 0.8]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 32, 32)
    again, seen = evaluate.rerender(image, maps.position, maps.normal, maps.mask, near=1.0, azimuth=azimuth)
    a, b = (np.cos(np.radians(20)) * np.cos(np.radians(angle)) for angle in (30, 60))
    middle = again[0, 0, 0, 14:18, 14:18]
    assert torch.allclose(middle, torch.tensor((0.2 * a * a + 0.8 * b * b) / (a * a + b * b)).float(), atol=1e-4)
    normal = torch.tensor([np.sin(turn), 0, np.cos(turn)]).float().view(3, 1, 1)
    moved = maps.position.clone()
    moved[0, 1] += 1.5 * (2 * data.EXTENT / 32) * normal  # view 1 says that the sheet lies 1.5 pixels nearer
    alone, _ = evaluate.rerender(image, moved, maps.normal, maps.mask, near=1.0, azimuth=azimuth)
    assert torch.allclose(alone[0, 0, 0, 14:18, 14:18], torch.tensor(0.2))


def test_text_to_views_is_judged_on_the_hull_and_on_what_it_leaves_out(oracle):
    """The views of one object fit together; those of four objects do not, and the misfit counts."""
    maps, photo, _ = oracle
    mixed = torch.stack([photo[:, v].roll(v, dims=0) for v in range(4)], dim=1)
    held = dict(mask=maps.mask * 255, labels=torch.zeros(len(photo), 3, dtype=torch.long))
    net = evaluate.FeatureNet().eval()
    one, four = (evaluate.measure(images, held, torch.rand(9, 64), net, task="text") for images in (photo, mixed))
    assert one["iou"] is None and one["psnr"] > four["psnr"] + 4 and one["ssim"] > four["ssim"]
    blank = torch.ones(1, 4, 3, 32, 32)
    blank[0, 0, :, 4:9, 4:9] = 0.0  # seen by one view alone: no hull, and black against white is 0 dB
    outline = data.silhouette(blank)
    nothing = evaluate.consistency(blank, *evaluate.visual_hull(outline), outline=outline)
    assert nothing["psnr"].item() == pytest.approx(0, abs=1e-6) and nothing["covered"] == 0


def test_consistency_has_lpips_where_its_weights_are_given(oracle, golden):
    maps, photo, _ = oracle
    weights, few = golden_lpips_weights(golden[1]), slice(0, 2)
    views = [photo[few], maps.position[few], maps.normal[few], maps.mask[few]]
    again, seen = evaluate.rerender(*views)
    wanted = evaluate.lpips(torch.where(seen, again, photo[few]), photo[few], weights).mean(dim=1)
    assert torch.equal(evaluate.consistency(*views, lpips_weights=weights)["lpips"], wanted)
    assert "lpips" not in evaluate.consistency(*views)


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
    assert data.silhouette(image).flatten().tolist() == [False, False, True]


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


def golden_lpips_weights(values):
    """The random weights that tests/golden/README.md describes."""
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
    return weights


def test_golden_lpips(golden):
    tensors, values = golden
    weights = golden_lpips_weights(values)
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


def test_select_picks_the_most_consistent_shift_within_the_loss(tmp_path, tiny_run, monkeypatch, capsys):
    """With measures that are a known function of the shift, through the command and back into sample.py."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny_run / "realiz3d_texturing.safetensors").read_bytes())
    shifts = []

    def sample_images(network, text, mode, views, control, B_max, t_max, **options):
        shifts.append((B_max, t_max))
        return torch.zeros(len(text), 4, 3, 32, 32)

    def measure(images, *rest, **options):
        B_max, t_max = shifts[-1]
        return dict(KD_I=100 + 60 * B_max + (1000 - t_max) / 10, psnr=20 + 10 * B_max + (1000 - t_max) / 100) | dict(
            psnr_loo=1.0, iou=1.0, photo=1.0
        )

    monkeypatch.setattr(evaluate, "train_feature_net", lambda folder: types.SimpleNamespace(features=lambda x: x))
    monkeypatch.setattr(data, "photo_set", lambda num, **options: {"image": torch.zeros(2, 1, 3, 32, 32)})
    monkeypatch.setattr(evaluate.sample, "sample_images", sample_images)
    monkeypatch.setattr(evaluate, "measure", measure)
    command = ["evaluate.py", "select", "--model", str(path), "--num", "2", "--folder", str(tmp_path), "--max_loss"]
    assert evaluate.sample.selected_shift(str(path)) == (0.3, 950)
    for max_loss, expected in (("0.25", (0.4, 1000)), ("0.3", (0.4, 950)), ("0", (0.0, 1000)), ("9", (0.4, 800))):
        shifts.clear()
        monkeypatch.setattr("sys.argv", [*command, max_loss])
        evaluate.main()
        assert evaluate.sample.selected_shift(str(path)) == expected
        assert shifts[:5] == [(b, 1000) for b in (0.0, 0.1, 0.2, 0.3, 0.4)]
        assert shifts[5:] == [(0.0 if max_loss == "0" else 0.4, t) for t in (950, 900, 850, 800)]
    assert (tmp_path / "model.shift.png").exists() and "where sample.py finds it" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command[:3], str(tiny_run / "base.safetensors")])
    with pytest.raises(ValueError, match="no domain to shift"):
        evaluate.main()
    path.write_bytes((tiny_run / "base.safetensors").read_bytes())
    with pytest.raises(ValueError, match="chosen for another model"):
        evaluate.sample.selected_shift(str(path))


def test_dial_turns_from_one_domain_to_the_other(tmp_path, tiny_run, monkeypatch, capsys):
    """Seven settings in order, each passed to the sampler as it is; 0 and 1 are the domains themselves."""
    small_net, photos, drawn = evaluate.train_feature_net, data.photo_set, {}
    monkeypatch.setattr(evaluate, "train_feature_net", lambda folder: small_net(folder, num=20, steps=2))
    monkeypatch.setattr(data, "photo_set", lambda num, **options: photos(20, **options))
    sample_images = evaluate.sample.sample_images

    def watched(network, text, mode, *rest, **options):
        drawn[mode] = sample_images(network, text, mode, *rest, **options)
        return drawn[mode]

    monkeypatch.setattr(evaluate.sample, "sample_images", watched)
    model = str(tiny_run / "realiz3d_texturing.safetensors")
    flags = f"--num 3 --num_steps 1 --threads 1 --folder {tmp_path} --out {tmp_path}/dial.png --model {model}"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "dial", *flags.split()])
    evaluate.main()
    assert list(drawn) == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    network, held = evaluate.sample.load_network(model), data.evaluation_set(3, folder=tmp_path)
    for mode, s in (("syn", 0.0), ("real", 1.0)):
        alone = sample_images(network, held["text"], mode, 4, held["control"], num_steps=1, batch=16)
        assert torch.equal(alone, drawn[s])
    assert (drawn[0.0] != drawn[1.0]).any() and (tmp_path / "dial.png").exists()
    assert len(json.loads((tmp_path / "dial.json").read_text())["rows"]) == 7
    monkeypatch.setattr("sys.argv", ["evaluate.py", "dial", "--model", str(tiny_run / "base.safetensors")])
    with pytest.raises(ValueError, match="no dial to turn"):
        evaluate.main()


# ---- folders of images


class PatchMeans(torch.nn.Module):
    """Called as the Inception file is: uint8 images in, features out."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and images.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_folders_of_views_measure_as_the_tensors_do(tmp_path, oracle, monkeypatch, capsys):
    maps, photo, render = oracle
    for name, images in (("photo", photo), ("render", render)):
        objects = {"position": maps.position, "mask": data.to_uint8(maps.mask * 2 - 1)}
        evaluate.sample.save_views(str(tmp_path), {name: images * 2 - 1}, objects, range(len(images)))
    torch.jit.script(PatchMeans()).save(str(tmp_path / "inception.pt"))
    command = [tmp_path / "photo", tmp_path / "render", "--inception", tmp_path / "inception.pt", "--positions"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "folders", *map(str, command), str(tmp_path / "positions")])
    evaluate.main()
    line = capsys.readouterr().out.split()
    value = lambda name: float(line[line.index(name) + 1])
    a, b = (PatchMeans()((x.flatten(0, 1) * 255).round().byte(), True) for x in (photo, render))
    assert line[:4] == ["96", "images", "against", "96:"]
    assert value("FID") == pytest.approx(evaluate.fid(a, b), abs=6e-4)
    assert value("KIDx1000") == pytest.approx(1000 * evaluate.kid(a, b), abs=6e-4)
    assert value("PSNR") == pytest.approx(evaluate.psnr(photo, render).mean().item(), abs=6e-5)
    assert value("SSIM") == pytest.approx(evaluate.ssim(photo, render).mean().item(), abs=6e-5)
    direct = evaluate.consistency(photo, maps.position, maps.normal, maps.mask)
    # the command has the normals from the positions' differences
    assert value("psnr_loo") == pytest.approx(direct["psnr_loo"].nanmean().item(), abs=0.5)
    assert value("covered") == pytest.approx(direct["covered"].mean().item(), abs=0.02)


def test_normals_of_position_maps_are_those_of_the_surface(oracle):
    maps = oracle[0]
    normal = evaluate.surface_normals(maps.position.masked_fill(maps.mask < 1, torch.nan))
    cosine = (normal * maps.normal).sum(2)[maps.mask[:, :, 0] == 1]
    assert cosine.median() > 0.99 and (cosine > 0.9).float().mean() > 0.88  # 32 pixels: many edges


def test_position_maps_of_another_camera_or_size_are_refused(tmp_path, oracle):
    maps, photo, _ = oracle
    objects = {"position": maps.position[:1], "mask": data.to_uint8(maps.mask[:1] * 2 - 1)}
    evaluate.sample.save_views(str(tmp_path), {"photo": photo[:1] * 2 - 1}, objects, ["mug"])
    cameras = (data.AZIMUTHS, data.ELEVATION, data.EXTENT)
    folders = (str(tmp_path / "photo"), str(tmp_path / "positions"))
    assert evaluate.folder_consistency(*folders, *cameras)["psnr"] > 30
    with pytest.raises(ValueError, match="position_000.npy lies .* pixels off its camera"):
        evaluate.folder_consistency(*folders, data.AZIMUTHS, -data.ELEVATION, data.EXTENT)
    evaluate.sample.save_views(str(tmp_path), {"photo": photo[:1, ..., :16, :16] * 2 - 1}, {}, ["mug"])
    with pytest.raises(ValueError, match="mug has maps of"):
        evaluate.folder_consistency(*folders, *cameras)


def test_images_of_any_kind_are_read_and_bad_ones_named(tmp_path):
    half = evaluate.Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 2))
    half.save(tmp_path / "a.png")
    evaluate.Image.new("L", (4, 2), 51).save(tmp_path / "b.webp", lossless=True)
    assert evaluate.find_images(tmp_path) == ["a.png", "b.webp"] and evaluate.find_images(tmp_path, "b*") == ["b.webp"]
    image = evaluate.read_image(tmp_path / "a.png")
    assert image[:, 0].T.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]]  # blue, then white, not red
    assert evaluate.read_image(tmp_path / "b.webp").unique().tolist() == pytest.approx([0.2])
    (tmp_path / "c.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot read the image .*c.png"):
        evaluate.read_image(tmp_path / "c.png")
    with pytest.raises(ValueError, match="holds no PNG"):
        evaluate.find_images(tmp_path, "z*")
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate.find_images(tmp_path / "elsewhere")


def test_batches_hold_images_of_one_size_and_keep_their_order(tmp_path):
    for k, size in enumerate((3, 3, 5, 3, 3, 3)):
        evaluate.Image.new("L", (size, size), 10 * k).save(tmp_path / f"{k}.png")
    seen = []

    def work(images, paths):
        seen.append(len(paths))
        return images.mean(dim=(1, 2, 3))

    values = evaluate.in_batches([str(tmp_path / f"{k}.png") for k in range(6)], work, size=2)
    assert seen == [2, 1, 2, 1] and (values * 255).tolist() == pytest.approx([0, 10, 20, 30, 40, 50])


def test_captions_stand_beside_the_image_or_in_its_meta_json(tmp_path):
    (tmp_path / "a.txt").write_text("a red mug\n")
    assert evaluate.read_caption(str(tmp_path / "a.png")) == "a red mug"
    with pytest.raises(FileNotFoundError, match="no caption for .*b.png"):
        evaluate.read_caption(str(tmp_path / "b.png"))
    (tmp_path / "meta.json").write_text(json.dumps({"caption": "a blue mug"}))
    assert evaluate.read_caption(str(tmp_path / "b.png")) == "a blue mug"
    (tmp_path / "meta.json").write_text("{}")  # as in Objaverse-Ortho10View
    (tmp_path / "caption.txt").write_text("a green mug\n")
    assert evaluate.read_caption(str(tmp_path / "b.png")) == "a green mug"


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_missing_or_wrong_networks_say_what_to_get(tmp_path):
    for load, words in (
        (evaluate.load_inception, "inception-2015-12-05.pt"),
        (evaluate.load_lpips, "pip install lpips"),
        (evaluate.load_clip, "clip-vit-base-patch32"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            load(str(tmp_path / "none"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        evaluate.load_inception(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="is not a readable"):
        evaluate.load_lpips(str(tmp_path / "text"))
    torch.save({"lin0.model.1.weight": torch.zeros(1)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="lacks lin1.model.1.weight"):
        evaluate.load_lpips(str(tmp_path / "part.pt"))


def test_clip_score_of_a_model_on_disk(tmp_path):
    """Against the model's own embeddings."""
    model, tokenizer, resize = tiny_clip(tmp_path)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = ["a red mug", "a mug", "a red mug"]
    got = evaluate.load_clip(str(tmp_path))(images, captions)
    pixels = ((images * 255).round() / 255 - torch.tensor(resize.image_mean)[:, None, None])
    with torch.no_grad():
        image = model.eval().get_image_features(pixels / torch.tensor(resize.image_std)[:, None, None])
        each = [model.get_text_features(**tokenizer(caption, return_tensors="pt")) for caption in captions]
    vector = lambda out: out if torch.is_tensor(out) else out.pooler_output
    wanted = evaluate.clip_score(vector(image), torch.cat([vector(text) for text in each]))
    assert got.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_fid_benchmark_agrees_on_the_value(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "benchmark", "--num", "60", "--width", "24", "--rounds", "1"])
    evaluate.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if "of the time" in line)
    values = [float(part.split(")")[0]) for part in line.split("(")[1:]]
    assert values[0] == pytest.approx(values[1], abs=2e-6) and values[0] > 1


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
    monkeypatch.setattr(train_stage2.sample, "object_sheet", lambda *args, **options: None)  # no pictures, no estimate
    monkeypatch.setattr(train_stage2, "announce", lambda *args: None)
    tiny = ("--num", "2", "--num_steps", "2", "--steps", "3", "--threads", "1", "--results", str(tmp_path))
    at = TINY_STAGE2.index("--steps")
    rest = " ".join(map(str, TINY_STAGE2[:at] + TINY_STAGE2[at + 2 :]))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "table2", *tiny, "--folder", str(tiny_run), "--train_flags", rest])
    evaluate.main()
    first = json.loads((tmp_path / "table2.json").read_text())["rows"]
    assert len(started) == 5 and len(first) == 9  # eight rows and the oracle
    assert first["8 = 7, shifted"]["paper"]["PSNR"] == 24.78 and first["1 joint"]["toy"]["0"]["FD_B"] > 0
    modes = [path.name.rsplit("-", 1)[1] for path in tiny_run.glob("texturing-*.samples")]
    assert sorted(modes) == ["real.samples"] * 5 + ["shifted.samples"] * 3
    assert (tmp_path / "table2.png").exists() and (tmp_path / "table2_sheet.png").exists()
    assert capsys.readouterr().out.count("Spearman") == 2
    evaluate.main()
    assert len(started) == 5 and json.loads((tmp_path / "table2.json").read_text())["rows"] == first
    # another seed trains anew and stands beside the first
    command = ["evaluate.py", "table2", *tiny, "--folder", str(tiny_run), "--train_flags", rest]
    monkeypatch.setattr("sys.argv", [*command, "--seed", "1", "--rows", "3 real data", "4 = 3, shifted"])
    evaluate.main()
    both = json.loads((tmp_path / "table2.json").read_text())["rows"]
    assert len(started) == 6 and "2 seeds" in (tmp_path / "table2.md").read_text()
    row = both["3 real data"]["toy"]
    assert row["0"] == first["3 real data"]["toy"]["0"] and row["1"]["KD_I"] != row["0"]["KD_I"]
    assert list(both["1 joint"]["toy"]) == ["0"]
    monkeypatch.setattr("sys.argv", [*command, "--rows", "9"])
    with pytest.raises(ValueError, match="no row '9'"):
        evaluate.main()
    monkeypatch.setattr("sys.argv", [*command, "--steps", "4"])
    with pytest.raises(ValueError, match="made with .*--results"):
        evaluate.main()


def test_every_table_prints_before_and_after_its_rows_are_there():
    """TRELLIS has no consistency numbers, the oracle none of the paper's."""
    for _, rows in evaluate.TABLES.values():
        results = {row.label: dict(paper=dict(zip(evaluate.PAPER_COLUMNS, row.paper)), toy={}) for row in rows}
        for k, row in enumerate(rows):
            results[row.label]["toy"] = {"0": dict(KD_I=float(k), psnr=20.0 + k)} if row.flags is not None else {}
        oracle = dict(paper=dict.fromkeys(evaluate.PAPER_COLUMNS), toy={"-": dict(KD_I=1.0, psnr=40.0)})
        lines = evaluate.table_lines(results | {evaluate.ORACLE: oracle})
        assert len(lines) == len(rows) + 7 and evaluate.ORACLE in lines[len(rows) + 2]


def some_results(**values):
    """A table of rows with these (KD_I, psnr), a tuple of pairs for several seeds."""
    rows = {}
    for label, pairs in values.items():
        pairs = pairs if isinstance(pairs[0], tuple) else (pairs,)
        toy = {str(seed): dict(KD_I=kd, psnr=psnr, iou=0.9) for seed, (kd, psnr) in enumerate(pairs)}
        paper = dict.fromkeys(evaluate.PAPER_COLUMNS, 1.0) | dict(PSNR=float(len(rows)), KID_I=-float(len(rows)))
        rows[label] = dict(paper=paper, toy=toy)
    return rows


def test_seed_noise_is_the_pooled_deviation_and_the_order_is_compared():
    rows = some_results(a=((1.0, 5.0), (3.0, 5.5)), b=((4.0, 6.0), (8.0, 6.5)), c=(9.0, 6.1))
    assert evaluate.mean(rows["a"], "KD_I") == 2 and evaluate.mean(rows["c"], "lpips") is None
    assert evaluate.seed_noise(rows, "KD_I") == pytest.approx(np.sqrt((2 + 8) / 2))  # variances 2 and 8
    assert evaluate.seed_noise(some_results(a=(1.0, 2.0)), "KD_I") is None
    lines = evaluate.table_lines(rows)
    assert lines[0].split("|")[2].strip() == "psnr" and "a (2 seeds)" in lines[2] and "5.25" in lines[2]
    assert lines[5].startswith("| deviation between seeds")
    assert lines[-3].endswith(": 0.50") and lines[-1].endswith(": -1.00")


def test_findings_hold_against_the_noise(tmp_path, monkeypatch, capsys):
    """Differences beyond twice their noise are confirmed or not, smaller ones are neither."""
    for name, (_, rows) in evaluate.TABLES.items():
        values = {row.label: (500.0, 20.0) for row in rows}
        values |= {"syn only": ((1000.0, 21.0), (1010.0, 21.0)), "syn + real": (1001.0, 21.0)}
        values |= {"Realiz3D": (100.0, 22.0)}
        values |= {"3 real data": ((100.0, 20.0), (101.0, 20.1)), "2 no real data": (50.0, 21.0)}
        results = {label: row for label, row in some_results(**values).items()}
        if name == "table3":
            results["LoRA 32"] = some_results(x=(50.0, 23.0))["x"]
        evaluate.write_json(f"{tmp_path}/{name}.json", dict(settings={}, rows=results))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "findings", "--results", str(tmp_path)])
    evaluate.main()
    verdicts = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert verdicts[:3] == ["confirmed", "within the noise", "confirmed"]
    assert verdicts[4:6] == ["not confirmed", "confirmed"] and verdicts[13:] == ["confirmed"] * 3 + ["not confirmed"]
    assert verdicts[9:13] == ["within the noise"] * 3 + ["not confirmed"]
    assert (tmp_path / "findings.md").exists()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "findings", "--results", str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="python evaluate.py table1 makes it"):
        evaluate.main()


def test_the_papers_numbers_are_complete():
    for task, rows in evaluate.TABLES.values():
        assert all(len(row.paper) == 8 for row in rows) and task in ("texturing", "text")
    assert len(evaluate.TABLES["table1"][1]) == 14 and len(evaluate.TABLES["table3"][1]) == 15
    syn, ours = evaluate.PAPER1["syn only"], evaluate.PAPER1["Realiz3D"]
    assert syn[0] > ours[0] and syn[6] > ours[6]  # it trades some consistency for realism
