"""Measures: against brute force, closed forms, independent libraries (tests/golden), and the oracle."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

import data
import evaluate
from evaluate import Surface
from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, camera
from geometry.hull import silhouette, visual_hull
from geometry.mesh import Mesh, mesh_views
from sample import Sampling, default_base, default_model, save_views
from support.files import file_id, save_tensors
from support.networks import load_lpips
from support.pictures import to_uint8
from toy.render import Look, render
from toy.world import CATEGORIES, WORLD_VERSION, Assets, sample_assets


@pytest.fixture(scope="module")
def views():
    """24 held-out objects: their maps, and their perfect photographs and renders (24, 4, 3, 32, 32), of 8 bits."""
    assets = sample_assets(24, data.SEEDS["evaluation"])
    maps = render(assets)
    pictures = [maps.rgb, render(assets, Look("render"), geometry=False).rgb]
    return maps, *((rgb * 255).round() / 255 for rgb in pictures)


def surface(maps):
    return Surface(maps.position, maps.normal, maps.mask)


def consistency(images, maps):
    values = evaluate.consistency(images, surface(maps))
    return values["psnr_loo"], values["covered"]


# ---- perfect photographs and renders


def test_perfect_views_have_the_right_silhouette(views):
    maps, photo, render = views
    for images in (photo, render):
        assert evaluate.silhouette_iou(images, maps.mask).min() >= 0.98


def test_perfect_views_are_consistent(views):
    maps, photo, render = views
    (psnr, share), (flat, _) = consistency(photo, maps), consistency(render, maps)
    assert psnr.mean() >= 30 and flat.mean() >= 40
    assert share.min() > 0.02 and 0.3 < share.mean() < 0.6


def test_inconsistent_views_score_low(views):
    maps, photo, _ = views
    mixed = torch.cat([photo[:, :1], photo[:, 1:].roll(1, dims=0)], dim=1)  # the other views of another object
    assert consistency(mixed, maps)[0].nanmean() < 20
    tinted = photo.clone()
    tinted[:, 0] = (tinted[:, 0] - 0.1).clamp(0, 1)  # one view darker by 0.1: about 20 dB there
    assert consistency(tinted, maps)[0].mean() < consistency(photo, maps)[0].mean() - 4


def test_consistency_of_a_known_error(views):
    maps, photo, _ = views
    views = torch.tensor([0.0, 0.1, 0.0, 0.1])[
        None, :, None, None, None
    ]  # neighbours differ by 0.1, opposite views by 0
    psnr, _ = consistency(views.expand_as(photo), maps)
    assert psnr.min() > 19.99 and psnr.max() < 30  # 20 dB where a neighbour alone predicts


def test_consistency_reads_the_positions(views):
    maps, photo, _ = views
    function = lambda p: 0.5 + 0.4 * torch.sin(4 * p)  # colour as a smooth function of the 3D point
    smooth = torch.where(maps.mask > 0, function(maps.position), torch.ones(()))
    assert consistency(smooth, maps)[0].nanmean() > 30
    assert consistency(smooth.flip(-1), maps)[0].nanmean() < 22


def test_colour_that_is_a_function_of_the_point_is_consistent_and_a_shift_by_one_pixel_costs_what_it_must():
    """On cubes, whose flat top all four views see alike: each view errs by d, or makes three others err by d / 3."""
    cube = Assets(torch.tensor([CATEGORIES.index("cube")]), *(f[:1] for f in sample_assets(1, 0)[1:]))
    maps = render(cube, Look("render"), size=64)
    inside = (maps.normal.norm(dim=2, keepdim=True) > 0.5).float()
    right, _, _ = camera(0)
    color = lambda p: 0.5 + 0.4 * (p * right[:, None, None]).sum(2, keepdim=True).expand_as(p)  # linear in the point
    exact = color(maps.position) * inside + 1 - inside
    values = evaluate.consistency(exact, surface(maps))
    assert values["psnr"] > 70 and values["psnr_loo"] > 70 and values["ssim"] > 0.9999
    pixel = 2 * EXTENT / 64
    shifted = exact.clone()
    shifted[:, 0] += 0.4 * pixel * inside[:, 0]
    want = -10 * np.log10((0.4 * pixel) ** 2 / 3)
    got = evaluate.consistency(shifted, surface(maps))
    assert got["psnr_loo"].item() == pytest.approx(want, abs=0.6)  # along edges fewer views predict
    assert got["psnr"] > got["psnr_loo"]


def test_views_are_weighed_by_the_squared_cosine_and_only_where_they_show_the_same_point():
    """A sheet that view 0 sees at 30 degrees (and 20 of elevation) and view 1 at 60, in two greys."""
    turn, azimuth = np.radians(30), (0, 90)
    right, up = torch.tensor([np.cos(turn), 0, -np.sin(turn)]), torch.tensor([0.0, 1, 0])
    corners = torch.stack([i * right + j * up for i, j in ((-0.3, -0.3), (0.3, -0.3), (0.3, 0.3), (-0.3, 0.3))]).float()
    maps = mesh_views(Mesh(corners, torch.tensor([[0, 1, 2], [0, 2, 3]])), 32, azimuth)
    image = torch.tensor([0.2, 0.8]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 32, 32)
    sheet = Surface(maps.position, maps.normal, maps.mask, azimuth)
    again, seen = evaluate.rerender(image, sheet, near=1.0)
    a, b = (np.cos(np.radians(20)) * np.cos(np.radians(angle)) for angle in (30, 60))
    middle = again[0, 0, 0, 14:18, 14:18]
    assert torch.allclose(middle, torch.tensor((0.2 * a * a + 0.8 * b * b) / (a * a + b * b)).float(), atol=1e-4)
    normal = torch.tensor([np.sin(turn), 0, np.cos(turn)]).float().view(3, 1, 1)
    moved = maps.position.clone()
    moved[0, 1] += 1.5 * (2 * EXTENT / 32) * normal  # view 1 says that the sheet lies 1.5 pixels nearer
    alone, _ = evaluate.rerender(image, sheet._replace(position=moved), near=1.0)
    assert torch.allclose(alone[0, 0, 0, 14:18, 14:18], torch.tensor(0.2))


def test_text_to_views_is_judged_on_the_hull_and_on_what_it_leaves_out(views, shipped_judges):
    """The views of one object fit together; those of four objects do not, and the misfit counts."""
    maps, photo, _ = views
    mixed = torch.stack([photo[:, v].roll(v, dims=0) for v in range(4)], dim=1)
    held = dict(mask=maps.mask * 255, labels=torch.zeros(len(photo), 3, dtype=torch.long), photo=photo * 255,
                image=photo * 255)
    one, four = (evaluate.measure(images, held, shipped_judges, task="text") for images in (photo, mixed))
    assert one["loo_gap"] == pytest.approx(0) and four["loo_gap"] > 1 and one["normals"] is None
    assert one["iou"] is None and one["psnr"] > four["psnr"] + 4 and one["ssim"] > four["ssim"]
    blank = torch.ones(1, 4, 3, 32, 32)
    blank[0, 0, :, 4:9, 4:9] = 0.0  # seen by one view alone: no hull, and black against white is 0 dB
    outline = silhouette(blank)
    nothing = evaluate.consistency(blank, Surface(*visual_hull(outline)), outline=outline)
    assert nothing["psnr"].item() == pytest.approx(0, abs=1e-6) and nothing["covered"] == 0


def test_consistency_has_lpips_where_its_weights_are_given(views, golden):
    maps, photo, _ = views
    weights, few = golden_lpips_weights(golden[1]), slice(0, 2)
    shown = photo[few], Surface(maps.position[few], maps.normal[few], maps.mask[few])
    again, seen = evaluate.rerender(*shown)
    wanted = evaluate.lpips(torch.where(seen, again, photo[few]), photo[few], weights).mean(dim=1)
    assert torch.equal(evaluate.consistency(*shown, lpips_weights=weights)["lpips"], wanted)
    assert "lpips" not in evaluate.consistency(*shown)


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
    assert evaluate.lpips(a, b, weights).tolist() == pytest.approx(values["lpips_alex"], rel=1e-5)
    assert evaluate.lpips(a, a, weights).abs().max() < 1e-6
    assert evaluate.lpips(a[None], b[None], weights).shape == (1, 2)


def test_lpips_weights_that_are_none_are_named_part_by_part(golden, tmp_path):
    path, weights = str(tmp_path / "lpips.safetensors"), golden_lpips_weights(golden[1])
    save_tensors(path, weights)
    assert load_lpips(path).keys() == weights.keys()
    for name in ("net.slice1.0.weight", "net.slice5.10.bias", "lin2.model.1.weight"):
        for broken in (weights[name] * torch.nan, weights[name][:1, None]):
            save_tensors(path, weights | {name: broken})
            with pytest.raises(ValueError, match=f"lpips.safetensors lacks {name} "):
                load_lpips(path)


# ---- folders of images


class PatchMeans(torch.nn.Module):
    """Called as the Inception file is: uint8 images in, features out."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and images.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_folders_of_views_measure_as_the_tensors_do(tmp_path, views, capsys):
    maps, photo, render = views
    for name, images in (("photo", photo), ("render", render)):
        objects = {"position": maps.position, "mask": to_uint8(maps.mask * 2 - 1)}
        save_views(str(tmp_path), {name: images * 2 - 1}, objects, range(len(images)))
    torch.jit.script(PatchMeans()).save(str(tmp_path / "inception.pt"))
    flags = ["--inception", tmp_path / "inception.pt", "--positions", tmp_path / "positions"]
    evaluate.main(["folders", *map(str, (tmp_path / "photo", tmp_path / "render", *flags))])
    line = capsys.readouterr().out.split()
    value = lambda name: float(line[line.index(name) + 1])
    a, b = (PatchMeans()((x.flatten(0, 1) * 255).round().byte(), True) for x in (photo, render))
    assert line[:4] == ["96", "images", "against", "96:"]
    assert value("FID") == pytest.approx(evaluate.fid(a, b), abs=6e-4)
    assert value("KIDx1000") == pytest.approx(1000 * evaluate.kid(a, b), abs=6e-4)
    assert value("PSNR") == pytest.approx(evaluate.psnr(photo, render).mean().item(), abs=6e-5)
    assert value("SSIM") == pytest.approx(evaluate.ssim(photo, render).mean().item(), abs=6e-5)
    names = sorted(str(path.relative_to(tmp_path / "photo")) for path in (tmp_path / "photo").glob("*/*"))
    assert evaluate.paired_metrics(f"{tmp_path}/photo", f"{tmp_path}/photo", names)["PSNR"] == 100     # not inf
    direct = evaluate.consistency(photo, surface(maps))
    # the command has the normals from the positions' differences
    assert value("psnr_loo") == pytest.approx(direct["psnr_loo"].nanmean().item(), abs=0.5)
    assert value("covered") == pytest.approx(direct["covered"].mean().item(), abs=0.02)


def test_normals_of_position_maps_are_those_of_the_surface(views):
    maps = views[0]
    normal = evaluate.surface_normals(maps.position.masked_fill(maps.mask < 1, torch.nan))
    cosine = (normal * maps.normal).sum(2)[maps.mask[:, :, 0] == 1]
    assert cosine.median() > 0.99 and (cosine > 0.9).float().mean() > 0.88  # 32 pixels: many edges


def test_position_maps_of_another_camera_or_size_are_refused(tmp_path, views):
    maps, photo, _ = views
    objects = {"position": maps.position[:1], "mask": to_uint8(maps.mask[:1] * 2 - 1)}
    save_views(str(tmp_path), {"photo": photo[:1] * 2 - 1}, objects, ["mug"])
    cameras = (AZIMUTHS, ELEVATION, EXTENT)
    folders = (str(tmp_path / "photo"), str(tmp_path / "positions"))
    assert evaluate.folder_consistency(*folders, *cameras)["psnr"] > 30
    with pytest.raises(ValueError, match="position_000.npy lies .* pixels off its camera"):
        evaluate.folder_consistency(*folders, AZIMUTHS, -ELEVATION, EXTENT)
    save_views(str(tmp_path), {"photo": photo[:1, ..., :16, :16] * 2 - 1}, {}, ["mug"])
    with pytest.raises(ValueError, match="mug has maps of"):
        evaluate.folder_consistency(*folders, *cameras)


# ---- the trained models


def test_toy_table_of_untrained_models(tmp_path, tiny_run, shipped_judges, monkeypatch, capsys):
    """The command as a whole: the oracle rows score nearly perfectly, models of three steps do not."""
    monkeypatch.setattr(evaluate, "load_judges", lambda *args: shipped_judges)
    model = tiny_run / "realiz3d_texturing.safetensors"
    flags = f"--num 2 --num_steps 2 --threads 1 --model {model} --syn_only {model} --base {tiny_run}/base.safetensors"
    evaluate.main(["toy", *flags.split(), "--folder", str(tmp_path), "--out", str(tmp_path / "e.png")])
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
    share = rows["oracle photos"]["photo"]
    mixed = share * rows["oracle photos"]["psnr_loo"] + (1 - share) * rows["oracle renders"]["psnr_loo"]
    assert rows["oracle photos"]["loo_gap"] == pytest.approx(mixed - rows["oracle photos"]["psnr_loo"], abs=1e-6)
    assert rows["syn_only"]["loo_gap"] > 3 and 0 <= rows["syn_only"]["normals"] <= 180
    assert rows["base model, no control"]["normals"] is None
    assert rows["base model, no control"]["iou"] is None and rows["base model, no control"]["FD_I"] > 0
    assert (tmp_path / "e.png").exists() and "KD x1000" in capsys.readouterr().out


def test_fid_b_compares_with_base_images_of_the_prompts_that_the_models_get(tmp_path, monkeypatch):
    """Four images of each caption of the evaluation, in the order of the grids; older caches are drawn again."""
    asked, path = [], default_base()

    def sample_images(network, inputs, sampling, progress):
        asked.append((inputs["text"], sampling))
        return torch.zeros(len(inputs["text"]), 1, 3, 32, 32)
    monkeypatch.setattr(evaluate, "sample_images", sample_images)
    held = data.evaluation_set(3, folder=tmp_path)
    older = dict(model=file_id(path), num=3, steps=4, cfg=1.0, seed=5, version=WORLD_VERSION)
    save_tensors(tmp_path / "base_images_3_5.safetensors", {"image": torch.ones(1)}, key=older)
    options = (path, 3, tmp_path, "cpu", Sampling("shifted", num_steps=4, seed=5))
    assert evaluate.base_images(*options).shape == evaluate.base_images(*options).shape == (12, 3, 32, 32)
    (text, sampling), = asked  # the second time from the file
    assert torch.equal(text.view(3, 4, -1), held["text"][:, None].expand(3, 4, -1))
    assert sampling == Sampling("real", num_steps=4, seed=5, batch=32)


def test_oracle_prints_each_measure_beside_its_target(tmp_path, shipped_judges, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_judges", lambda *args: shipped_judges)
    evaluate.main(["oracle", "--num", "3", "--folder", str(tmp_path)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert "3 held-out objects" in head and len(lines) == 12
    for line in lines:
        photos, renders = (float(word) for word in line[32:].split()[:2])
        for target, low in ((">= 0.98", 0.98), (">= 30", 30)):
            assert target not in line or min(photos, renders) >= low
        assert "small, large" not in line or photos < renders


def test_a_missing_model_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train_stage2.py --preset small --task text --method syn_only"):
        default_model("small", "text", "syn_only")
