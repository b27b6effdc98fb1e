"""CAD: poses, the prior, refinement, pruning, and one reference from the samples to the generator."""
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, random_model, refuses, run_main
from PIL import Image

from dit import PRESETS, save_model
from domain_shifter import DomainShifters, ShiftedDiT
from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, project
from geometry.hull import silhouette
from geometry.mesh import mesh_views
from related import cad, cad_samples, view_prior
from related.cad import Batch, field_mesh, gan_batch, invert, read_reference, stage1_losses, stage2_losses, turned
from related.cad_samples import agree_with_others, load_models, prior_path, reference_samples, refine, view_phrase
from related.triplanes import SIZE, WINDOW, Discriminator, Generator, Z
from related.view_prior import draw_views, load_prior, new_prior, poses_around, ray_map
from sample import Sampling
from support.files import load_tensors, read_metadata, save_tensors
from support.pictures import to_pixels
from toy.judge import FeatureNet
from toy.poses import BAND, VIEWS_EACH, pose_numbers, pose_set, view_control
from toy.render import Look, render
from toy.world import VOCAB, WORLD_VERSION, exaggerated, sample_assets, take, uniforms

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
    """The reference is a view of the asset from the front, the pose is between the two."""
    got = pose_set(3, folder=tmp_path)
    num, assets = 3 * VIEWS_EACH, exaggerated(sample_assets(3, 2))
    assert got["image"].shape == (num, 1, 3, 32, 32) and got["control"].shape == (num, 1, 7, 32, 32)
    assert got["text"].unique().tolist() == [0, 1]                      # an end and padding
    u = uniforms(3, 2 + 4000, 1 + 2 * VIEWS_EACH).float()
    for k in (0, 5, 15, 23):
        asset, view = divmod(k, VIEWS_EACH)
        reference, pose = got["control"][k, 0].split([3, 4])
        turn, up, low = float(u[asset, 1 + view]), float(u[asset, 1 + VIEWS_EACH + view]), float(u[asset, 0])
        angle = torch.tensor(2 * torch.pi * turn)
        want = torch.stack([angle.sin(), angle.cos(), torch.tensor(2 * up - 1), torch.tensor(2 * low - 1)])
        assert (pose.float() - want[:, None, None]).abs().max() < 2e-3
        for image, azimuth, height in ((reference, 0.0, low), (to_pixels(got["image"][k, 0]), 360 * turn, up)):
            one = render(take(assets, torch.tensor([asset])), Look("render"), (azimuth,),
                         elevation=BAND[0] + (BAND[1] - BAND[0]) * height)
            assert (image.float() - (2 * one.rgb[0, 0] - 1)).abs().mean() < 0.01


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


def test_the_prior_sees_the_ray_of_each_pixel():
    """A point of the cube lies on the ray of the pixel that it is seen in; without a pose there are zeros."""
    torch.manual_seed(0)
    azimuth, elevation = torch.tensor([30.0, 200.0, 300.0]), torch.tensor([12.0, 25.0, 18.0])
    maps = ray_map(pose_numbers(azimuth, elevation, elevation), 32)
    points = 0.7 * (torch.rand(20, 3) - 0.5)
    for b in range(3):
        column, row, depth = project(points.T[:, None], azimuth[b], float(elevation[b]), 32)        # (1, 20) each
        pixel = maps[b][:, row[0].long(), column[0].long()].T                                       # (20, 6)
        off = pixel[:, :3] + depth[0][:, None] * pixel[:, 3:] - points
        assert off.norm(dim=1).max() < 2 ** 0.5 * EXTENT / 32           # half a pixel's diagonal
    assert ray_map(torch.zeros(2, 4), 8).abs().max() == 0
    prior = new_prior(random_model())
    torch.nn.init.normal_(prior.dit.control_embedder.weight)
    control = view_control(torch.randn(1, 3, 8, 8), pose_numbers(*torch.tensor([[30.0], [20], [20]]))).float()
    x, t, text = torch.randn(1, 1, 3, 8, 8), torch.tensor([7]), torch.randint(2, 50, (1, 14))
    turned = control.clone()
    turned[:, :, 3] *= -1                                               # at the start the pose comes by the rays alone
    assert (prior(x, t, text, control) - prior(x, t, text, turned)).abs().max() > 1e-3


def test_views_are_drawn_from_the_poses(monkeypatch):
    """What stands in the control channels, sample by sample; guidance drops the reference."""
    prior, given = new_prior(random_model()), []

    def sample(network, inputs, sampling, keys, progress):
        given.append(inputs)
        return torch.zeros(len(inputs["text"]), 1, 3, 8, 8)
    monkeypatch.setattr(view_prior, "sample_images", sample)
    reference = torch.rand(3, 8, 8)
    poses = torch.tensor([0.0, 90]).repeat_interleave(3), torch.tensor([10.0, 30]).repeat_interleave(3)
    assert draw_views(prior, reference, 20.0, poses, Sampling()).shape == (6, 3, 8, 8)
    control = given[0]["control"].float()
    assert torch.allclose(control[:, 0, :3], reference.half().float().expand(6, -1, -1, -1))
    want = torch.tensor([[0.0, 1, -1, 0]] * 3 + [[1.0, 0, 1, 0]] * 3)
    assert torch.allclose(control[:, 0, 3:, 4, 4], want, atol=1e-3) and given[0]["null"]["control"].abs().max() == 0


def test_refinement_names_the_view_and_starts_where_it_is_told():
    words = {0: "front", 8: "front", 355: "front", 90: "right", 183: "back", 270: "left", 20: "", 45: "", 340: ""}
    assert {angle: view_phrase(angle) for angle in words} == {
        angle: f", {word} view" if word else "" for angle, word in words.items()}
    base, images, seen = ShiftedDiT(random_model()), torch.rand(3, 3, 8, 8) * 2 - 1, []
    sampling, noise = Sampling(num_steps=10), torch.randn(3, 3, 8, 8)
    assert torch.equal(refine(base, images, noise, torch.zeros(3), PROMPT, 0.0, sampling), images)
    base.register_forward_pre_hook(lambda module, given, named: seen.append((given[1].tolist(), named["text"])),
                                   with_kwargs=True)
    refine(base, images, noise, torch.tensor([0.0, 90, 200]), PROMPT, 0.5, sampling)
    assert [t[0] for t, _ in seen] == [499, 399, 299, 199, 99]
    captions = [" ".join(VOCAB[word] for word in row if word > 1) for row in seen[0][1]]
    assert captions == [f"photo of {PROMPT} {view}white background" for view in ("front view ", "right view ", "")]


def test_the_shipped_generator_is_of_the_shipped_prior_and_todays_flags(tmp_path):
    """Else the documented command would make it anew."""
    args = cad.parse_args(["--object", "9", "--prompt", "a blue metal teapot", "--out", str(tmp_path)])
    path = cad.fitting_generator(cad.generator_key(read_reference(args), args), args)
    G, front = cad.load_generator(path), torch.tensor([[0.0], [20]])
    assert G.draw_lifted(G.style(torch.ones(1, Z)), *front)[0].isfinite().all()
    assert load_prior(prior_path(None, str(tmp_path))).dit.config.world == WORLD_VERSION


def test_the_mesh_of_the_shipped_generator_is_what_it_draws():
    G = cad.load_generator(str(ROOT / "weights/toy_cad_9.safetensors"))
    w, azimuth = G.style(cad.gan_noise(G, 1, 0, 4)), torch.tensor(AZIMUTHS).float()
    with torch.no_grad():
        _, opacity, _ = G.draw_lifted(w.expand(4, -1, -1), azimuth, torch.full((4,), float(ELEVATION)))
    drawn, meshed = opacity > 0.5, mesh_views(field_mesh(G, w), SIZE).mask[0] > 0.5                 # (4, 1, H, W)
    overlap = (drawn & meshed).sum(dim=(1, 2, 3)) / (drawn | meshed).sum(dim=(1, 2, 3))
    assert overlap.min() > 0.85, overlap


def test_planted_bad_samples_are_dropped():
    """Of each pose one sample of another object, and one moved by half the image."""
    assets, azimuth = sample_assets(2, 5), (0, 90, 180, 270)
    good, bad = (render(take(assets, torch.tensor([k])), Look("photo"), azimuth).rgb[0] for k in (0, 1))
    noise = 0.02 * torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.cat([(good[:, None] + noise).clamp(0, 1), bad[:, None], good[:, None].roll(16, -1)], dim=1)
    color = images.mean(dim=(3, 4))                                     # some features
    keep = agree_with_others(images, color)
    assert keep[:, :4].all() and not keep[:, 4:].any() and silhouette(images).any()
    features = torch.ones(4, 6, 2)
    features[:, 2] = torch.tensor([1.0, -1])                            # the same outline, another meaning
    alike = good[:, None].expand(-1, 6, -1, -1, -1)
    assert agree_with_others(alike, features).tolist() == 4 * [[True, True, False, True, True, True]]
    apart = torch.eye(3).expand(1, -1, -1)
    assert agree_with_others(alike[:1, :3], apart).tolist() == [[True, False, False]]      # one of each pose stays


def samples_and_flags(num=6):
    """Samples of random numbers, and the flags of a step."""
    image = torch.randint(256, (num, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    poses = dict(azimuth=torch.linspace(0, 300, num), elevation=torch.linspace(12, 28, num))
    return dict(image=image, **poses), Namespace(seed=3, batch=4, gamma=2.0, branch_weight=0.5)


def test_a_steps_random_numbers_are_its_own():
    samples, args = samples_and_flags()
    one, again, next_step, stage2 = (gan_batch(samples, stage, step, args) for stage, step in
                                     ((1, 5), (1, 5), (1, 6), (2, 5)))
    assert torch.equal(one.z, again.z) and torch.equal(one.real, again.real) and isinstance(one, Batch)
    assert not torch.equal(one.z, next_step.z) and not torch.equal(one.z, stage2.z)
    picked = [int((samples["image"] == real.add(1).mul(127.5).round().byte()).flatten(1).all(1).nonzero()) for real in
              one.real]
    assert torch.equal(one.pose, pose_numbers(samples["azimuth"][picked], samples["elevation"][picked]))
    assert torch.equal(one.fake_pose, pose_numbers(one.azimuth, one.elevation))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_losses_of_a_stage(stage, shipped_judges):
    """Who learns from what, and R1 at some steps only, weighed up for the others."""
    samples, args = samples_and_flags()
    torch.manual_seed(0)
    G, D = Generator(), Discriminator(6, SIZE) if stage == 1 else Discriminator(3, WINDOW)
    nets = dict(generator=G, discriminator=D, judge=shipped_judges.net)
    losses = (stage1_losses, stage2_losses)[stage - 1]
    loss_G, loss_D, real_scores = losses(nets, samples, cad.R1_EVERY, 0.0, args)
    at = {(gamma, step): losses(nets, samples, step, 0.0, Namespace(**{**vars(args), "gamma": gamma}))[1].item()
          for gamma in (0.0, 2.0, 2e3, 4e3) for step in (1, cad.R1_EVERY)}
    r1_term = at[2e3, cad.R1_EVERY] - at[0.0, cad.R1_EVERY]             # of a new network it is small
    assert loss_D.item() == at[2.0, cad.R1_EVERY] and r1_term > 0 and at[2.0, 1] == at[0.0, 1]
    assert at[4e3, cad.R1_EVERY] - at[0.0, cad.R1_EVERY] == pytest.approx(2 * r1_term, rel=1e-3)
    assert real_scores.shape == (4,)
    own = {name: p for name, p in G.named_parameters() if name.startswith("lift") == (stage == 2)}
    others = {name: p for name, p in G.named_parameters() if name not in own}
    reached = torch.autograd.grad(loss_G, list(others.values()), allow_unused=True, retain_graph=True)
    assert (stage == 1) == all(gradient is None for gradient in reached)        # the planes are not enlarged yet
    assert all(gradient is not None for gradient in torch.autograd.grad(loss_G, list(own.values()), retain_graph=True))
    assert all(gradient is None for gradient in torch.autograd.grad(loss_D, list(own.values()), allow_unused=True,
                                                                    retain_graph=True))
    with torch.no_grad():
        D.score.bias += 9                                               # all looks real: G is content, D is not
    sure = losses(nets, samples, 1, 0.0, args)
    assert sure[0] < loss_G and sure[1] > 5 and sure[2].mean() > 5


@pytest.mark.parametrize("stage", [1, 2])
def test_each_weight_moves_by_its_own_gradient(stage, shipped_judges):
    """The gradients of convolutions may lie otherwise in memory than the weights, which the fused Adam does not heed:
    the discriminators of this file once learned from transposed ones. Adam's first step is lr g / (|g| + eps)."""
    samples, args = samples_and_flags()
    torch.manual_seed(0)
    G, D = Generator(), Discriminator(6, SIZE) if stage == 1 else Discriminator(3, WINDOW)
    parts = ({name: p for name, p in G.named_parameters() if name.startswith("lift") == (stage == 2)},
             dict(D.named_parameters()))
    optimizers = [torch.optim.Adam(part.values(), lr=1e-3, betas=(0.0, 0.99), eps=1e-3, fused=True) for part in parts]
    nets, losses = dict(generator=G, discriminator=D, judge=shipped_judges.net), (stage1_losses, stage2_losses)[stage - 1]
    loss_and_part = list(zip(losses(nets, samples, cad.R1_EVERY, 0.0, args), parts))
    expected = [p.detach() - 1e-3 * g / (g.abs() + 1e-3) for loss, part in loss_and_part
                for p, g in zip(part.values(), torch.autograd.grad(loss, list(part.values()), retain_graph=True))]
    cad.gan_step([loss for loss, _ in loss_and_part], parts, optimizers)
    moved = [p for part in parts for p in part.values()]
    for p, should_be in zip(moved, expected, strict=True):
        torch.testing.assert_close(p.detach(), should_be, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_stays_on_the_device_of_the_samples(stage):
    """Checked on PyTorch's device without data, which refuses what lies elsewhere as a GPU does."""
    samples, args = samples_and_flags()
    samples = {name: part.to("meta") for name, part in samples.items()}
    D = Discriminator(6, SIZE) if stage == 1 else Discriminator(3, WINDOW)
    nets = dict(generator=Generator(), discriminator=D, judge=FeatureNet().eval())
    losses = (stage1_losses, stage2_losses)[stage - 1]
    for loss in losses({name: net.to("meta") for name, net in nets.items()}, samples, cad.R1_EVERY, 0.5, args):
        assert loss.is_meta
    with pytest.raises(RuntimeError, match="device"):
        losses(nets, samples | {"azimuth": torch.zeros(6)}, 1, 0.5, args)


def test_stage_2_is_compared_with_stage_1_in_the_same_window():
    samples, args = samples_and_flags()
    torch.manual_seed(0)
    G, seen = Generator(), []
    judge = Namespace(body=lambda images: seen.append(images) or images)
    stage2_losses(dict(generator=G, discriminator=Discriminator(3, WINDOW), judge=judge), samples, 1, 0.0, args)
    drawn, branch = seen
    assert drawn.shape == branch.shape == (4, 3, WINDOW, WINDOW)
    apart = torch.cdist(drawn.flatten(1), branch.flatten(1))                    # (4, 4), each with each
    assert torch.equal(apart.argmin(dim=1), torch.arange(4)) and apart.diag().max() < 0.5 * apart.mean()


def test_an_image_is_inverted_and_its_matter_meshed(shipped_judges):
    torch.manual_seed(0)
    G = Generator().requires_grad_(False)
    with torch.no_grad():
        target, _, _ = G.draw_lifted(G.style(torch.randn(1, Z)), torch.zeros(1), torch.full((1,), 20.0))
        off = {}
        for steps in (0, 30):
            with torch.enable_grad():
                w = invert(G, target[0], (0.0, 20.0), shipped_judges.net, steps)
            off[steps] = (G.draw_lifted(w, torch.zeros(1), torch.full((1,), 20.0))[0] - target).square().mean()
    assert off[30] < 0.7 * off[0]
    image, depth = turned(G, w)
    assert image.shape == depth.shape == (8, 3, SIZE, SIZE)

    def ball(planes):
        return lambda points: (20.0 * (points.norm(dim=-1) < 0.3), points)
    G.field = ball
    mesh = field_mesh(G, w, size=48)
    assert (mesh.vertices.norm(dim=1) - 0.3).abs().max() < 0.03


@pytest.fixture
def prior_and_base(tmp_path, monkeypatch, shipped_judges):
    """A run folder with a small base model and the prior that two steps of training make of it."""
    small = replace(TINY, image_size=32, depth=2)
    monkeypatch.setitem(PRESETS, "toy", small)
    monkeypatch.setattr(cad, "train_feature_net", lambda *args: shipped_judges.net)
    monkeypatch.setattr(cad, "R1_EVERY", 2)
    save_model(str(tmp_path / "base.safetensors"), small, random_model(small))
    flags = ("--out", tmp_path, "--num_assets", 2, "--steps", 2, "--batch", 2, "--picture_steps", 1, "--threads", 1)
    run_main(view_prior, *flags)
    return tmp_path


def test_one_reference_from_samples_to_generator_and_a_run_that_was_stopped(prior_and_base, monkeypatch, capsys):
    out = prior_and_base
    prior = load_prior(str(out / "view_prior.safetensors"))
    assert prior.dit.config.control_channels == 9 and (out / "view_prior.png").exists()
    flags = ("--out", out, "--object", 1, "--prompt", PROMPT, "--num_poses", 8, "--each", 3, "--num_steps", 2,
             "--steps", 4, "--lift_steps", 4, "--batch", 2, "--save_every", 2, "--invert_steps", 2, "--threads", 1)
    run_main(cad, *flags)
    first, metadata = load_tensors(str(out / "cad_1.safetensors"))
    assert metadata["made"]["samples"]["prompt"] == PROMPT and (out / "cad_1.png").exists()
    assert (out / "cad_1" / "samples.png").exists() and " of 24 samples stay; dropped: " in capsys.readouterr().out
    samples, _ = load_tensors(str(out / "cad_1" / "samples.safetensors"))
    assert samples["image"].shape == (8, 3, 3, 32, 32)
    # stopped after two steps of a stage: the same command ends with the same bits
    for stage in (2, 1):
        (out / "cad_1.safetensors").unlink()
        for later in range(stage, 3):
            (out / "cad_1" / f"stage{later}" / "state_00000004.safetensors").unlink()
        if stage == 1:
            (out / "cad_1" / "stage2" / "state_00000002.safetensors").unlink()
        run_main(cad, *flags)
        again, _ = load_tensors(str(out / "cad_1.safetensors"))
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    states = [load_tensors(str(out / "cad_1" / "stage1" / f"state_0000000{step}.safetensors"))[0] for step in (2, 4)]
    assert {"param.share", "exp_avg_sq.discriminator.score.weight"} <= states[0].keys()
    assert not torch.equal(states[0]["param.generator.start"], states[1]["param.generator.start"])
    trained = {name.removeprefix("param.average.generator."): tensor for name, tensor in states[1].items()
               if name.startswith("param.average")}
    assert torch.equal(first["start"], trained["start"].half())         # what is kept is the running average
    # samples that were damaged are made again; those of another prompt are kept
    (out / "cad_1.safetensors").unlink()
    path = out / "cad_1" / "samples.safetensors"
    metadata = read_metadata(str(path))
    save_tensors(str(path), samples | {"image": 255 - samples["image"]}, **metadata)
    run_main(cad, *flags)
    assert "samples.safetensors is damaged, making it again" in capsys.readouterr().out
    again, _ = load_tensors(str(out / "cad_1.safetensors"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    (out / "cad_1.safetensors").rename(out / "kept.safetensors")
    before = path.read_bytes()
    refuses(cad, (*flags, "--prompt", "a blue mug"), 1, "samples.safetensors was made with other settings: prompt a r")
    assert path.read_bytes() == before
    # a generator that comes with the repository serves in place of a training
    (out / "cad_1.png").unlink()
    with monkeypatch.context() as shipped:
        shipped.setattr(cad, "run_or_shipped", lambda *asked: str(out / "kept.safetensors"))
        run_main(cad, *flags)
    assert (out / "cad_1.png").exists() and not (out / "cad_1.safetensors").exists()
    (out / "kept.safetensors").rename(out / "cad_1.safetensors")
    # what does not fit
    another = ("--out", out, "--name", "cad_1", "--num_assets", 2, "--steps", 1, "--batch", 2, "--threads", 1)
    refuses(view_prior, another, 1, "cad_1.safetensors is there, and no state of this training")
    refuses(cad, ("--reference", out / "cad_1.png", "--prompt", PROMPT, "--out", out, "--name", "cad_1"), 2,
            "--reference would be overwritten")
    refuses(cad, (*flags, "--prompt", " ,"), 2, "--prompt: it has no words")
    refuses(cad, (*flags, "--elevation", 12), 2, "--elevation would do nothing")
    refuses(cad, (*flags, "--num_poses", 10 ** 5), 2, "more than 100,000 samples")
    refuses(cad, (*flags, "--mesh", out / "base.safetensors"), 2, "--mesh")
    refuses(cad, (*flags, "--gamma", 1), 1, "cad_1.safetensors", "with other flags")
    refuses(cad, (*flags, "--prompt", "a red woden mug"), 2, "--prompt: unknown word 'woden'")
    refuses(cad, (*flags, "--prompt", " ".join(12 * ["a"])), 2, "--prompt: caption")
    refuses(cad, flags[:2], 2, "--prompt")
    refuses(cad, (*flags[:2], "--prompt", PROMPT), 2, "--object NUMBER, or --reference FILE")
    refuses(cad, (*flags, "--each", 2), 2, "--each must be at least 3")
    refuses(cad, (*flags[:2], "--prompt", PROMPT, "--reference", out / "none.png"), 1, "none.png")
    refuses(cad, (*flags, "--prior", out / "base.safetensors", "--name", "x"), 1, "no view-conditioned model")
    refuses(cad, (*flags, "--prior", out / "none.safetensors", "--name", "x"), 1, "none.safetensors (--prior)")
    refuses(cad, (*flags, "--name", "base"), 2, "--name 'base'")
    refuses(cad, (*flags, "--name", "view_prior"), 1, "view_prior.safetensors is no generator")


def test_samples_refined_under_a_depth_condition(prior_and_base, monkeypatch):
    """The same samples of the prior; refined by the texturing model, which comes with its shifters."""
    out, small = prior_and_base, PRESETS["toy"]
    save_model(f"{out}/texturing.safetensors", small, random_model(small, seed=1), shifters=DomainShifters(small),
               settings={"task": "texturing"})
    seen = []

    def net(images):
        seen.append(len(images))
        return images, images[:, :1], images[:, :1]
    monkeypatch.setattr(cad_samples, "train_surface_net", lambda folder: net)
    drawn, draw_views = [], cad_samples.draw_views
    monkeypatch.setattr(cad_samples, "draw_views", lambda *args: drawn.append(args[5]) or draw_views(*args))
    judge, reference = cad.train_feature_net(""), torch.full((3, SIZE, SIZE), 0.5)
    flags = ["--object", "1", "--prompt", PROMPT, "--out", str(out), "--num_poses", "8", "--each", "3", "--num_steps",
             "2", "--no-pruning"]
    made = {}
    for name, more in (("a", []), ("b", ["--depth", "--depth_model", f"{out}/texturing.safetensors"])):
        args = cad.parse_args([*flags, "--name", name, *more])
        assert args.strength == (0.8 if more else 0.5)
        reference_samples(load_models(args), reference, judge, args)
        made[name], metadata = load_tensors(f"{out}/{name}/samples.safetensors")
        assert metadata["key"]["refiner"][0] == ("texturing.safetensors" if more else "base.safetensors")
    assert seen == [24] and torch.equal(made["a"]["drawn"], made["b"]["drawn"])
    assert drawn == [range(24)]                                                 # by the prior once, for both names
    assert not torch.equal(made["b"]["drawn"], made["b"]["image"])
    assert not torch.equal(made["a"]["image"], made["b"]["image"])


@pytest.mark.parametrize("stopped", ["draw_views", "refine"])
def test_samples_that_were_stopped_go_on(stopped, prior_and_base, monkeypatch):
    """Ctrl-C in the second part of 64: the first is not made again, the end is the same, and no part is left. Another
    name of the same flags has it all."""
    judge, reference = cad.train_feature_net(""), torch.full((3, SIZE, SIZE), 0.5)
    flags = ["--object", "1", "--prompt", PROMPT, "--num_poses", "22", "--each", "3", "--num_steps", "2"]
    made, asked, draw = {}, [], getattr(cad_samples, stopped)
    for name in ("at_once", "in_two"):
        args = cad.parse_args([*flags, "--out", str(prior_and_base), "--name", name, "--seed", "3"])
        if name == "in_two":
            def until_stopped(*given):
                asked.append(len(given[3][0]) if stopped == "draw_views" else len(given[1]))
                if len(asked) == 2:
                    raise KeyboardInterrupt
                return draw(*given)
            for path in (prior_and_base / "sets").glob("cad_*"):
                path.unlink()
            monkeypatch.setattr(cad_samples, stopped, until_stopped)
            with pytest.raises(KeyboardInterrupt):
                reference_samples(load_models(args), reference, judge, args)
        reference_samples(load_models(args), reference, judge, args)
        made[name], _ = load_tensors(f"{prior_and_base}/{name}/samples.safetensors")
    args = cad.parse_args([*flags, "--out", str(prior_and_base), "--name", "another", "--seed", "3"])
    reference_samples(load_models(args), reference, judge, args)
    assert asked == [64, 2, 2] and not list(prior_and_base.rglob("*.parts"))
    for name in ("drawn", "image"):
        assert torch.equal(made["at_once"][name], made["in_two"][name])


def test_a_picture_as_reference(tmp_path):
    """Padded with white to a square."""
    Image.new("RGB", (64, 32), (255, 0, 0)).save(tmp_path / "a.png")
    args = cad.parse_args(["--reference", str(tmp_path / "a.png"), "--prompt", PROMPT])
    image = read_reference(args)
    assert args.name == "cad" and image.shape == (3, SIZE, SIZE)
    assert image[:, 16, 5].tolist() == [1, -1, -1] and image[:, 3, 5].tolist() == [1, 1, 1]
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--reference .* shows no object"):
        read_reference(args)
    Image.new("I;16", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than 8 bits a colour"):
        read_reference(args)


@pytest.mark.parametrize("flags, word", [
    (("--name", " "), "--name ' ' is no plain name"), (("--obj", 3), "unrecognized arguments: --obj 3"),
    (("--out", "file"), "--out 'file/cad_1"), (("--depth", "--base", "a"), "--base would do nothing with --depth"),
    (("--depth_model", "a"), "--depth_model would do nothing without --depth"),
])
def test_flags_are_refused_at_once(flags, word, tmp_path, monkeypatch):
    monkeypatch.setattr(cad, "launch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    refuses(cad, ("--object", 1, "--prompt", PROMPT, *flags), 2, word)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("flag, name, word", [
    ("--prior", "base", "base.safetensors holds no view-conditioned model"), ("--prior", "none", "(--prior): train it"),
    ("--base", "shifters", "shifters.safetensors holds Domain Shifters only"), ("--base", "none", "(--base)"),
    ("--depth_model", "base", "(--depth_model) is no texturing model"),
])
def test_wrong_models_are_named_before_any_work(flag, name, word, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    monkeypatch.setattr(cad, "launch", None)
    base, prior = random_model(), new_prior(random_model())
    save_model(f"{tmp_path}/base.safetensors", TINY, base)
    save_model(f"{tmp_path}/shifters.safetensors", TINY, shifters=DomainShifters(TINY))
    save_model(f"{tmp_path}/prior.safetensors", prior.dit.config, prior.dit, adapter=prior.adapter, adapter_kind="pose")
    given = {"--prior": "prior", "--base": "base"} | {flag: name}
    more = []
    if flag == "--depth_model":
        more = ["--depth"]
        del given["--base"]
    flags = [word for flag, name in given.items() for word in (flag, f"{tmp_path}/{name}.safetensors")] + more
    refuses(cad, ("--object", 1, "--prompt", PROMPT, "--out", tmp_path / "run", *flags), 1, word)
    assert not (tmp_path / "run").exists()
