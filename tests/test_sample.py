"""sample.py: DDIM against diffusers and a closed form, guidance, domain modes, one generator per sample."""

import pytest
import torch
from conftest import GOLDEN, random_model
from safetensors.torch import load_file
from test_domain_shifter import trained_shifters

import sample
from dit import alphas_cumprod, load_tensors, save_model, seeded_generator
from domain_shifter import REAL, ShiftedDiT, uniform_domains
from sample import ddim_sample, ddim_timesteps, domain_mode, guided_noise, sample_images


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_ddim_golden(spacing, num_steps):
    golden = load_file(GOLDEN / "ddim.safetensors")
    assert torch.equal(ddim_timesteps(num_steps, spacing), golden[f"{spacing}.{num_steps}.timesteps"])
    x = ddim_sample(lambda x, t: x.tanh() * torch.cos(t.double() / 1000), golden["x_T"], num_steps, spacing)
    assert (x - golden[f"{spacing}.{num_steps}.final"]).abs().max() < 1e-10


def test_three_of_fifty_steps_are_time_shifted():
    assert int((ddim_timesteps(50) >= 950).sum()) == 3
    assert int((ddim_timesteps(50, "leading") >= 950).sum()) == 2


@pytest.mark.parametrize("num_steps", [1, 7, 30, 999, 1000])
def test_any_number_of_steps(num_steps):
    for spacing in ("trailing", "leading", "linspace"):
        steps = ddim_timesteps(num_steps, spacing)
        assert len(steps) == num_steps and (steps.diff() < 0).all() and 0 <= steps.min() and steps.max() < 1000


def test_ddim_refuses_nonsense():
    with pytest.raises(ValueError, match="num_steps"):
        ddim_timesteps(0)
    with pytest.raises(ValueError, match="spacing"):
        ddim_timesteps(10, "middling")


def test_gaussian_data_has_a_closed_form():
    """For data N(0.5, 0.3^2) the perfect epsilon is linear in x: 50 leading steps end at these moments."""

    def predict_noise(x, t):
        alpha_bar = alphas_cumprod[t]
        variance = alpha_bar * 0.3**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * 0.5) / variance

    ends = ddim_sample(predict_noise, torch.tensor([0.0, 1.0], dtype=torch.float64), 50, "leading")
    mean, deviation = float(ends[0]), float(ends[1] - ends[0])  # the map from noise to image is affine
    assert mean == pytest.approx(0.4989, abs=5e-5) and deviation == pytest.approx(0.2750, abs=5e-5)


@pytest.mark.parametrize("num_steps", [60, 150, 600])
def test_steps_that_do_not_divide_a_thousand_lose_no_noise(num_steps):
    """Each step goes to the next one visited: the more of them, the closer to the deviation of the data, 0.3."""

    def predict_noise(x, t):
        alpha_bar = alphas_cumprod[t]
        return (1 - alpha_bar).sqrt() * x / (alpha_bar * 0.3**2 + 1 - alpha_bar)

    deviation = float(ddim_sample(predict_noise, torch.ones(1, dtype=torch.float64), num_steps))
    assert deviation == pytest.approx(0.3, rel=6 / num_steps)


def test_clipping_bounds_the_image():
    wild = lambda x, t: 5 * x.sin()  # noqa: E731
    assert ddim_sample(wild, torch.randn(4, 8), 10).abs().max() > 1
    assert ddim_sample(wild, torch.randn(4, 8), 10, clip_x0=True).abs().max() <= 1


@pytest.fixture
def network():
    return ShiftedDiT(random_model(), trained_shifters()).eval()


def some_inputs():
    torch.manual_seed(3)
    x, text, null = torch.randn(2, 4, 3, 8, 8), torch.randint(2, 50, (2, 14)), torch.tensor([[1] + [0] * 13])
    return x, text, null, dict(control=torch.randn(2, 4, 6, 8, 8), view=torch.arange(4).expand(2, 4))


@torch.no_grad()
def test_guidance_is_on_the_text_alone(network):
    x, text, null, inputs = some_inputs()
    t, domains = torch.tensor(400), domain_mode("real", 4)
    with_text = network(x, t.expand(2), text, domains(t.expand(2)), **inputs)
    without = network(x, t.expand(2), null.expand(2, -1), domains(t.expand(2)), **inputs)
    guided = guided_noise(network, {"text": null}, domains, 2.5, text=text, **inputs)(x, t)
    assert torch.allclose(guided, without + 2.5 * (with_text - without), atol=1e-4)
    assert torch.equal(guided_noise(network, {"text": null}, domains, 1, text=text, **inputs)(x, t), with_text)
    assert (guided - with_text).abs().max() > 1e-3


def test_modes_differ_and_shifting_has_the_right_borders(network):
    _, text, _, inputs = some_inputs()
    draw = lambda mode, **shift: sample_images(
        network,
        text,
        mode,
        4,
        inputs["control"],
        num_steps=4,  # noqa: E731
        cfg_scale=1,
        **shift,
    )
    real, syn, shifted = (draw(mode) for mode in ("real", "syn", "shifted"))
    assert min((a - b).abs().max() for a, b in ((real, syn), (real, shifted), (syn, shifted))) > 1e-3
    assert torch.equal(draw("shifted", B_max=0, t_max=1000), real)
    assert torch.equal(draw("shifted", B_max=0, t_max=0), syn)
    assert torch.equal(draw("shifted", B_max=1, t_max=1000), syn)


def test_sample_k_does_not_depend_on_its_batch(network):
    network, (_, text, _, inputs) = network.double(), some_inputs()
    text, control = text.repeat(3, 1), inputs["control"].repeat(3, 1, 1, 1, 1)
    options = dict(mode="real", views=4, num_steps=3)
    whole = sample_images(network, text, control=control, **options)
    one_by_one = sample_images(network, text, control=control, batch=1, **options)
    tail = sample_images(network, text[4:], control=control[4:], keys=range(4, 6), **options)
    assert torch.allclose(whole, one_by_one, atol=1e-5) and torch.allclose(whole[4:], tail, atol=1e-5)
    assert (whole[0] - whole[2]).abs().max() > 1e-2  # same caption and control, another number


def test_sdedit_denoises_each_view_alone_from_one_noise(network):
    """Against a loop over single views by hand; equal views stay equal, as all views of a grid share the noise."""
    base, (c, size) = ShiftedDiT(network.dit), (3, network.dit.config.image_size)
    images = torch.rand(2, 4, c, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    images[1] = images[1, :1]
    text = torch.tensor([[[5, 6, v] for v in range(1, 5)], [[7, 8, 1]] * 4])
    got = sample.sdedit(base, images, text, t=500, num_steps=10, seed=4)
    assert (got[1] == got[1, :1]).all() and not torch.equal(got[0, 0], got[0, 1])
    alone = sample.sdedit(base, images[1:], text[1:], t=500, num_steps=10, seed=4, first=1)
    assert torch.equal(alone[0], got[1])
    steps = ddim_timesteps(10)
    steps = steps[steps <= 500]
    assert steps[0] == 499
    noise = torch.randn(c, size, size, generator=seeded_generator(sample.SAMPLES, 4, 0))
    a = alphas_cumprod[499]
    x = (a.sqrt() * images[0, 2] + (1 - a).sqrt() * noise).float()[None, None]
    with torch.no_grad():
        for t in steps:
            eps = base(x, t.expand(1), text[0, 2:3], uniform_domains(REAL, base.dit.config.depth, 1))
            a, b = alphas_cumprod[t], alphas_cumprod[t - 100] if t >= 100 else torch.tensor(1.0).double()
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            x = (b.sqrt() * x0 + (1 - b).sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt()).float()
    assert torch.allclose(got[0, 2], x[0, 0], atol=1e-4)


def test_real_set_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    from dit import PRESETS, DiT

    torch.manual_seed(0)
    base, whole, resumed = (str(tmp_path / name) for name in ("base.safetensors", "a.safetensors", "b.safetensors"))
    save_model(base, PRESETS["toy"], DiT(PRESETS["toy"]))
    options = dict(num_assets=3, num_steps=1, chunk=4)
    sample.write_real_set(whole, base, **options)
    calls, real = [], sample.sample_images

    def dies_at_the_second_chunk(*args, **kwargs):
        calls.append(kwargs["keys"][0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "sample_images", dies_at_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        sample.write_real_set(resumed, base, **options)
    sample.write_real_set(resumed, base, **options)
    assert calls == [0, 4, 4, 8]  # the first chunk was kept, the second made again
    assert open(whole, "rb").read() == open(resumed, "rb").read()
    tensors, _ = load_tensors(whole)
    assert tensors["image"].shape == (12, 1, 3, 32, 32) and tensors["text"].shape == (12, 14)
    sample.write_real_set(resumed, base, **options)
    assert len(calls) == 4  # up to date: nothing is drawn
    sample.write_real_set(resumed, base, **(options | {"seed": 1}))
    assert len(calls) == 7  # another seed: drawn again


@pytest.mark.parametrize("options, message", [
    (dict(num_steps=0), "num_steps must lie in 1..1000"), (dict(B_max=3), "must lie in .0, 1."),
    (dict(t_max=5000), "t_max must lie in 0..1000"), (dict(cfg_scale=float("nan")), "cfg_scale must be a finite"),
    (dict(seed=-1), "seed must be 0 or more")])
def test_sampling_refuses_what_is_out_of_range_before_it_begins(options, message):
    with pytest.raises(ValueError, match=message):
        sample_images(ShiftedDiT(random_model()), torch.ones(1, 14, dtype=torch.long), **options)


def test_a_damaged_choice_of_shift_is_named(tmp_path):
    (tmp_path / "m.shift.json").write_text("{}")
    with pytest.raises(ValueError, match="m.shift.json is damaged: delete it"):
        sample.selected_shift(str(tmp_path / "m.safetensors"))


def test_shifters_that_are_none_are_refused(tmp_path):
    path = str(tmp_path / "m.safetensors")
    model = random_model()
    save_model(path, model.config, model, trained_shifters())
    save_model(str(tmp_path / "none.safetensors"), model.config, model)
    assert sample.load_network(path).shifters is not None
    with pytest.raises(ValueError, match="none.safetensors holds no Domain Shifters"):
        sample.load_network(path, shifters=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.04, 0.9, [0, 0.2, 0.4, 0.6, 0.8]), (360.1, 561, [400, 450, 500, 550]),
    (17.3, 19.9, [17.5, 18, 18.5, 19, 19.5])])
def test_ticks_of_plots_are_round_numbers(low, high, expected):
    assert sample.round_numbers(low, high) == pytest.approx(expected)
