"""CAD: poses, the prior, refinement, pruning, and one reference from the samples to the generator."""
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model, refuses, run_main
from PIL import Image

from dit import PRESETS, save_model
from domain_shifter import ShiftedDiT
from geometry.hull import silhouette
from related import cad, view_prior
from related.cad import agree_with_others, poses_around, read_reference, refine, view_word, windows
from related.view_prior import load_prior, new_prior
from sample import Sampling
from support.files import load_tensors
from support.pictures import to_pixels
from toy.poses import BAND, VIEWS_EACH, pose_numbers, pose_set, view_control
from toy.render import Look, render
from toy.world import exaggerated, sample_assets, take, uniforms

PROMPT = "a red wooden mug"


def test_poses_cover_the_band_evenly():
    """In every quarter of the azimuth, and in slices of equal area of the band, as many."""
    azimuth, elevation = poses_around(400)
    assert elevation.min() > BAND[0] and elevation.max() < BAND[1] and azimuth.min() >= 0 and azimuth.max() < 360
    low, high = (torch.deg2rad(torch.tensor(float(end))).sin() for end in BAND)
    area = (torch.deg2rad(elevation).sin() - low) / (high - low)
    for part, ends in ((azimuth / 360, 4), (area, 4)):
        assert (part * ends).long().bincount(minlength=ends).sub(100).abs().max() <= 2


def test_pairs_are_views_of_one_asset(tmp_path):
    """The reference is the next view of the asset, the pose is between the two."""
    got = pose_set(3, folder=tmp_path)
    num, assets = 3 * VIEWS_EACH, exaggerated(sample_assets(3, 2))
    assert got["image"].shape == (num, 1, 3, 32, 32) and got["control"].shape == (num, 1, 7, 32, 32)
    assert got["text"].unique().tolist() == [0, 1]                      # an end and padding
    u = uniforms(3, 2 + 4000, 2 * VIEWS_EACH).float()
    for k in (0, 5, 15, 23):
        asset, view = divmod(k, VIEWS_EACH)
        before = asset * VIEWS_EACH + (view - 1) % VIEWS_EACH
        reference, pose = got["control"][k, 0].split([3, 4])
        assert torch.equal(reference, to_pixels(got["image"][before, 0]).half())
        turn = 2 * torch.pi * (u[asset, view] - u[asset, (view - 1) % VIEWS_EACH])
        heights = [2 * u[asset, VIEWS_EACH + v % VIEWS_EACH] - 1 for v in (view, view - 1)]
        want = torch.stack([turn.sin(), turn.cos(), *heights])
        assert (pose.float() - want[:, None, None]).abs().max() < 2e-3
        one = render(take(assets, torch.tensor([asset])), Look("render"), (360 * float(u[asset, view]),),
                     elevation=BAND[1] * float(u[asset, VIEWS_EACH + view]))
        assert (to_pixels(got["image"][k]) - (2 * one.rgb[0] - 1)).abs().mean() < 0.01


def test_before_training_the_prior_is_the_base_model():
    base = random_model()
    prior = new_prior(base)
    x, t, text = torch.randn(2, 1, 3, 8, 8), torch.tensor([7, 903]), torch.randint(2, 50, (2, 14))
    poses = torch.tensor([[30.0, 200], [5, 35], [20, 20]])
    control = view_control(torch.randn(2, 3, 8, 8), pose_numbers(*poses)).float()
    assert torch.equal(prior(x, t, text, control), base(x, t, text))
    torch.nn.init.normal_(prior.adapter.layers[2].weight)
    poses[0, 0] = 90
    turned = view_control(control[:, 0, :3], pose_numbers(*poses)).float()
    changed = (prior(x, t, text, control) - prior(x, t, text, turned)).abs().flatten(1).amax(1)
    assert changed[0] > 1e-4 and changed[1] == 0                        # of the first alone the pose is another
    torch.nn.init.normal_(prior.dit.control_embedder.weight)
    assert (prior(x, t, text, control) - prior(x, t, text, 0 * control)).abs().max() > 1e-3


def test_refinement_names_the_view_and_starts_where_it_is_told(monkeypatch):
    assert [view_word(angle) for angle in (0, 44, 46, 90, 181, 269, 314, 316, 359)] == [
        "front", "front", "right", "right", "back", "left", "left", "front", "front"]
    base, images, seen = ShiftedDiT(random_model()), torch.rand(3, 3, 8, 8) * 2 - 1, []
    sampling = Sampling(num_steps=10)
    assert torch.equal(refine(base, images, torch.zeros(3), PROMPT, 0.0, sampling), images)
    base.register_forward_pre_hook(lambda module, given, named: seen.append((given[1].tolist(), named["text"])),
                                   with_kwargs=True)
    refine(base, images, torch.tensor([0.0, 90, 180]), PROMPT, 0.5, sampling)
    assert [t[0] for t, _ in seen] == [499, 399, 299, 199, 99]
    assert len(seen[0][1].unique(dim=0)) == 3                           # three views, three captions


def test_planted_bad_samples_are_dropped():
    """Of each pose one sample of another object, and one moved by half the image."""
    assets, azimuth = sample_assets(2, 5), (0, 90, 180, 270)
    good, bad = (render(take(assets, torch.tensor([k])), Look("photo"), azimuth).rgb[0] for k in (0, 1))
    noise = 0.02 * torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.cat([(good[:, None] + noise).clamp(0, 1), bad[:, None], good[:, None].roll(16, -1)], dim=1)
    color = images.mean(dim=(3, 4))                                     # some features
    keep = agree_with_others(images, color)
    assert keep[:, :4].all() and not keep[:, 5].any() and silhouette(images).any()
    features = torch.ones(4, 6, 2)
    features[:, 2] = torch.tensor([1.0, -1])                            # the same outline, another meaning
    alike = good[:, None].expand(-1, 6, -1, -1, -1)
    assert agree_with_others(alike, features).tolist() == 4 * [[True, True, False, True, True, True]]
    apart = torch.eye(3).expand(1, -1, -1)
    assert agree_with_others(alike[:1, :3], apart).any()                # one of each pose stays


def test_windows():
    images = torch.arange(2 * 36.0).view(2, 1, 6, 6)
    got = windows(images, torch.tensor([[1, 2], [3, 0]]), 3)
    assert torch.equal(got[0], images[0, :, 1:4, 2:5]) and torch.equal(got[1], images[1, :, 3:6, 0:3])


@pytest.fixture
def prior_and_base(tmp_path, monkeypatch, quick_judges):
    """A run folder with a small base model and the prior that two steps of training make of it."""
    small = replace(TINY, image_size=32, depth=2)
    monkeypatch.setitem(PRESETS, "toy", small)
    monkeypatch.setattr(cad, "load_judges", lambda *args: quick_judges)
    save_model(str(tmp_path / "base.safetensors"), small, random_model(small))
    flags = ("--out", tmp_path, "--num_assets", 2, "--steps", 2, "--batch", 2, "--picture_steps", 1, "--threads", 1)
    run_main(view_prior, *flags)
    return tmp_path


def test_one_reference_from_samples_to_generator_and_a_run_that_was_stopped(prior_and_base):
    out = prior_and_base
    prior = load_prior(str(out / "view_prior.safetensors"))
    assert prior.dit.config.control_channels == 3 and (out / "view_prior.png").exists()
    flags = ("--out", out, "--object", 1, "--prompt", PROMPT, "--num_poses", 8, "--each", 2, "--num_steps", 2,
             "--steps", 4, "--lift_steps", 2, "--batch", 2, "--save_every", 2, "--invert_steps", 2, "--threads", 1)
    run_main(cad, *flags)
    first, metadata = load_tensors(str(out / "cad_1.safetensors"))
    assert metadata["settings"]["prompt"] == PROMPT and (out / "cad_1.png").exists()
    assert (out / "cad_1" / "samples.png").exists()
    samples, _ = load_tensors(str(out / "cad_1" / "samples.safetensors"))
    assert samples["image"].shape == (8, 2, 3, 32, 32) and samples["keep"].any(dim=1).all()
    # stopped after two steps of stage 1: the same command ends with the same bits
    (out / "cad_1.safetensors").unlink()
    (out / "cad_1" / "stage1" / "state_00000004.safetensors").unlink()
    for path in (out / "cad_1" / "stage2").glob("state_*"):
        path.unlink()
    run_main(cad, *flags)
    again, _ = load_tensors(str(out / "cad_1.safetensors"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    # what does not fit
    refuses(cad, (*flags, "--gamma", 1), 1, "cad_1.safetensors was made otherwise: gamma 3.0 (now 1.0)")
    refuses(cad, (*flags, "--name", "other", "--prompt", "a red woden mug"), 1, "woden")
    refuses(cad, flags[:2], 2, "--prompt")
    refuses(cad, (*flags[:2], "--prompt", PROMPT), 2, "--object NUMBER, or --reference FILE")
    refuses(cad, (*flags[:2], "--prompt", PROMPT, "--reference", out / "none.png"), 1, "none.png")
    refuses(cad, (*flags, "--prior", out / "base.safetensors", "--name", "x"), 1, "no view-conditioned model")
    refuses(cad, (*flags, "--prior", out / "none.safetensors", "--name", "x"), 1, "train one with")
    refuses(cad, (*flags, "--name", "base"), 2, "--name 'base'")


def test_a_picture_as_reference(tmp_path):
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "a.png")
    args = cad.parse_args(["--reference", str(tmp_path / "a.png"), "--prompt", PROMPT])
    assert args.name == "cad" and read_reference(args).shape == (3, 32, 32)
    assert read_reference(args)[:, 5, 5].tolist() == [1, -1, -1]
