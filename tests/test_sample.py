"""sample.py: DDIM against diffusers and a closed form, guidance, domain modes, one generator per sample."""

from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, random_inputs, random_model, trained_shifters
from safetensors.torch import load_file

import sample
from baselines.adapters import new_network
from dit import PRESETS, DiT, alphas_cumprod, save_model
from domain_shifter import ShiftedDiT
from sample import Sampling, ddim_sample, ddim_timesteps, domain_mode, guided_noise, sample_images
from support.files import load_tensors
from support.launch import Launched


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
    def wild(x, t):
        return 5 * x.sin()

    assert ddim_sample(wild, torch.randn(4, 8), 10).abs().max() > 1
    assert ddim_sample(wild, torch.randn(4, 8), 10, clip_x0=True).abs().max() <= 1


@pytest.fixture
def network():
    return ShiftedDiT(random_model(), trained_shifters()).eval()


def some_inputs():
    """x, the empty caption, and text with control."""
    torch.manual_seed(3)
    x, text, null = torch.randn(2, 4, 3, 8, 8), torch.randint(2, 50, (2, 14)), torch.tensor([[1] + [0] * 13])
    return x, {"text": null}, dict(text=text, control=torch.randn(2, 4, 6, 8, 8))


@torch.no_grad()
def test_guidance_is_on_the_text_alone(network):
    x, null, inputs = some_inputs()
    t, domains = torch.tensor(400), domain_mode("real", 4)
    table, control = domains(t.expand(2)), inputs["control"]
    with_text = network(x, t.expand(2), inputs["text"], table, control=control)
    without = network(x, t.expand(2), null["text"].expand(2, -1), table, control=control)
    guided = guided_noise(network, null, domains, 2.5, **inputs)(x, t)
    assert torch.allclose(guided, without + 2.5 * (with_text - without), atol=1e-4)
    assert torch.equal(guided_noise(network, null, domains, 1, **inputs)(x, t), with_text)
    assert (guided - with_text).abs().max() > 1e-3


def test_modes_differ_and_shifting_has_the_right_borders(network):
    _, _, inputs = some_inputs()

    def draw(mode, **shift):
        return sample_images(network, inputs, Sampling(mode, num_steps=4, **shift), views=4)

    real, syn, shifted = (draw(mode) for mode in ("real", "syn", "shifted"))
    assert min((a - b).abs().max() for a, b in ((real, syn), (real, shifted), (syn, shifted))) > 1e-3
    assert torch.equal(draw("shifted", B_max=0, t_max=1000), real)
    assert torch.equal(draw("shifted", B_max=0, t_max=0), syn)
    assert torch.equal(draw("shifted", B_max=1, t_max=1000), syn)
    assert torch.equal(draw(0.0), syn) and torch.equal(draw(1.0), real)


def test_control_is_empty_where_it_is_absent_and_one_view_is_one_image(network):
    _, _, inputs = some_inputs()
    sampling = Sampling(num_steps=3)
    bare = sample_images(network, {"text": inputs["text"]}, sampling, views=4)
    empty = sample_images(network, inputs | dict(control=torch.zeros(2, 4, 6, 8, 8)), sampling, views=4)
    assert torch.allclose(bare, empty, atol=1e-5)
    assert (sample_images(network, inputs, sampling, views=4) - bare).abs().max() > 1e-2
    assert sample_images(network, {"text": inputs["text"]}, sampling).shape == (2, 1, 3, 8, 8)


def test_sample_k_does_not_depend_on_its_batch(network):
    network, (_, _, inputs) = network.double(), some_inputs()
    inputs = dict(text=inputs["text"].repeat(3, 1), control=inputs["control"].repeat(3, 1, 1, 1, 1))
    sampling = Sampling(num_steps=3)
    whole = sample_images(network, inputs, sampling, views=4)
    one_by_one = sample_images(network, inputs, replace(sampling, batch=1), views=4)
    last_two = {key: value[4:] for key, value in inputs.items()}
    tail = sample_images(network, last_two, sampling, views=4, keys=range(4, 6))
    assert torch.allclose(whole, one_by_one, atol=1e-5) and torch.allclose(whole[4:], tail, atol=1e-5)
    assert (whole[0] - whole[2]).abs().max() > 1e-2  # same caption and control, another number


def test_real_set_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    base, whole, resumed = (str(tmp_path / name) for name in ("base.safetensors", "a.safetensors", "b.safetensors"))
    save_model(base, PRESETS["toy"], DiT(PRESETS["toy"]))

    def write(path, seed=0):
        sample.write_real_set(path, base, 3, Sampling(num_steps=1, seed=seed), Launched(torch.device("cpu")), chunk=4)

    write(whole)
    calls, real = [], sample.sample_images

    def dies_at_the_second_chunk(*args, **kwargs):
        calls.append(kwargs["keys"][0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "sample_images", dies_at_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        write(resumed)
    write(resumed)
    assert calls == [0, 4, 4, 8]  # the first chunk was kept, the second made again
    tensors, metadata = load_tensors(whole)
    again, same = load_tensors(resumed)
    assert same == metadata and all(torch.equal(tensors[name], again[name]) for name in tensors | again)
    assert tensors["image"].shape == (12, 1, 3, 32, 32) and tensors["text"].shape == (12, 14)
    write(resumed)
    assert len(calls) == 4  # up to date: nothing is drawn
    write(resumed, seed=1)
    assert len(calls) == 7  # another seed: drawn again


@pytest.mark.parametrize("options, message", [
    (dict(num_steps=0), "num_steps must lie in 1..1000"), (dict(B_max=3), "must lie in .0, 1."),
    (dict(t_max=5000), "t_max must lie in 0..1000"), (dict(cfg_scale=float("nan")), "cfg_scale must be a finite"),
    (dict(seed=-1), "seed must lie in 0"), (dict(seed=2 ** 64), "seed must lie in 0"),
    (dict(spacing="middling"), "spacing must be trailing")])
def test_sampling_refuses_what_is_out_of_range_before_it_begins(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


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
    adapted = new_network(model, "lora", rank=2)
    save_model(str(tmp_path / "lora.safetensors"), model.config, model, adapter=adapted.adapter, adapter_kind="lora")
    with pytest.raises(ValueError, match="lora.safetensors has a baseline's adapter"):
        sample.load_network(str(tmp_path / "lora.safetensors"), shifters=path)


def test_compiled_sampling_draws_the_same(monkeypatch):
    """A grid of two views, with shifters; compilation costs seconds, so by the backend that only traces."""
    compiled = []

    def traced(block, **options):
        compiled.append(block)
        nn_compile(block, backend="aot_eager", **options)
    nn_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    network = ShiftedDiT(random_model(), trained_shifters()).eval()
    text = {"text": random_inputs()[2]}
    plain, same = (sample_images(network, text, Sampling("shifted", 1.5, 2, compile=compiles), 2)
                   for compiles in (False, True))
    assert compiled == list(network.dit.blocks) and (plain - same).abs().max() < 1e-4 < plain.std()
    for kind in (None, "lora", "linear"):  # an adapter is hooks, which what was compiled for another model lacks
        network = new_network(random_model(), kind, 2).eval()
        for p in network.adapter.parameters() if kind else ():
            torch.nn.init.normal_(p)
        want, got = (sample_images(network, text, Sampling("real", 1.5, 2, compile=compiles), 2)
                     for compiles in (False, True))
        assert (want - got).abs().max() < 1e-3, kind
