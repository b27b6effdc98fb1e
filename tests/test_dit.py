"""dit.py: the network and its inputs, the noise process, checkpoints. (Against PixArt's weights: full/test_pixart.py.)
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import TINY, random_inputs, random_model

from dit import (
    NEW_INPUTS,
    PRESETS,
    DiT,
    add_noise,
    alphas_cumprod,
    epsilon_loss,
    load_model,
    position_embedding,
    save_model,
)
from support.files import save_tensors
from support.generators import seeded_generator


def num_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())


def test_parameter_counts_are_pinned():
    assert {name: num_parameters(config) for name, config in PRESETS.items()} == {
        "toy": 6_372_464,
        "small": 29_938_608,
        "full": 610_856_096 + 1152 * 8 * 2 * 2 + 4 * 1152,
    }
    assert num_parameters(replace(PRESETS["full"], control_channels=0, num_views=0)) == 610_856_096


def test_positions_first_half_is_the_column():
    table, size, width = position_embedding(16, 3, scale=2.0), 3, 16
    for row in range(size):
        for column in range(size):
            for k in range(width // 4):
                omega = 10000 ** (-k / (width // 4)) / 2
                got = table[row * size + column][[k, k + 4, k + 8, k + 12]]
                want = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
                assert np.allclose(got, want, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# What Realiz3D adds to the base model: control and views


def starting_model():
    """A model as training finds it, but for the last layer, whose zeros would hide everything."""
    torch.manual_seed(0)
    model = DiT(TINY)
    torch.nn.init.normal_(model.final_linear.weight)
    return model


@torch.no_grad()
def test_control_starts_without_effect_and_a_single_image_is_the_base_models():
    """The base model is the same one without control and view encodings."""
    model, (x, t, text) = starting_model(), random_inputs()
    control = torch.randn(2, 4, 6, 8, 8)
    assert torch.equal(model(x, t, text), model(x, t, text, control=control))
    base = DiT(replace(TINY, control_channels=0, num_views=0))
    base.load_state_dict({name: w for name, w in model.state_dict().items() if name not in NEW_INPUTS})
    assert torch.equal(model(x[:, :1], t, text, control=control[:, :1]), base(x[:, :1], t, text))


def test_control_and_views_move_the_output_after_one_step():
    model, (x, t, text) = starting_model(), random_inputs()
    control, before = torch.randn(2, 4, 6, 8, 8), model.view_encoding.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, t, text, control=control).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        base = model(x, t, text)
        assert (model(x, t, text, control=control) - base).abs().max() > 1e-4
        model.view_encoding.copy_(before)
        assert (model(x, t, text) - base).abs().max() > 1e-4


def test_view_encodings_start_apart_and_everywhere_alike():
    """So that PixArt's weights, which have none, give the same model on every rank and with every seed."""
    encoding = DiT(TINY).view_encoding
    torch.manual_seed(7)
    assert torch.equal(encoding, DiT(TINY).view_encoding)
    assert torch.pdist(encoding).min() > 0.3 * TINY.width**0.5  # two random ones: 0.3 sqrt(2 d)


@torch.no_grad()
def test_view_v_of_several_gets_encoding_v_and_a_single_image_none():
    model, (x, _, _) = random_model(), random_inputs()
    grid = model.embed_tokens(x, None).view(2, 4, 4, 16)  # views, tokens of one
    for v in range(4):
        alone = model.embed_tokens(x[:, v : v + 1], None)
        assert torch.allclose(grid[:, v], alone + model.view_encoding[v], atol=1e-5)
    pair = model.embed_tokens(x[:, 2:], None).view(2, 2, 4, 16)
    assert torch.allclose(pair - grid[:, 2:], (model.view_encoding[:2] - model.view_encoding[2:])[:, None], atol=1e-5)


@torch.no_grad()
def test_a_grid_in_single_image_mode_is_four_base_forwards():
    """Bit for bit as one batch of the model without control and views; one by one up to the rounding of a matrix
    product, which depends on how many rows it has."""
    model, (x, t, text) = random_model(dtype=torch.float64), random_inputs(views=4, batch=1, dtype=torch.float64)
    base = DiT(replace(TINY, control_channels=0, num_views=0)).double()
    base.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in base.state_dict()})
    images, t, text = x[0][:, None], t.expand(4), text.expand(4, -1)
    grid = model(images, t, text)
    assert torch.equal(grid, base(images, t, text))
    assert torch.equal(grid, model(images, t, text, control=torch.zeros(4, 1, 6, 8, 8)))
    alone = torch.cat([base(images[k : k + 1], t[:1], text[:1]) for k in range(4)])
    assert torch.allclose(grid, alone, rtol=0, atol=1e-5)  # the sinusoid of t is fp32, its last place may differ


@torch.no_grad()
def test_joint_attention_couples_the_views():
    model, (x, t, text) = random_model(), random_inputs()
    other = x.clone()
    other[:, 3] += 1
    moved = (model(x, t, text) - model(other, t, text)).abs().amax((2, 3, 4))[:, :3]
    assert moved.min() > 1e-5
    alone = model(x[:, :1], t, text)
    assert (alone - model(x, t, text)[:, :1]).abs().max() > 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The network


@torch.no_grad()
def test_text_matters_and_padding_does_not():
    model, (x, t, text) = random_model(), random_inputs()
    short, padded = text[:, :5], torch.cat([text[:, :5], torch.zeros(2, 6, dtype=torch.long)], 1)
    assert torch.allclose(model(x, t, short), model(x, t, padded), atol=1e-5)
    assert (model(x, t, short) - model(x, t, text)).abs().max() > 1e-4
    assert (model(x, t, text.flip(1)) - model(x, t, text)).abs().max() > 1e-4  # word order is read


@torch.no_grad()
def test_output_skip_is_its_formula():
    model, (x, t, text) = random_model(), random_inputs()
    bare = DiT(replace(TINY, output_skip=False))
    bare.load_state_dict(model.state_dict())
    alpha_bar = alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
    assert torch.allclose(
        model(x, t, text), (1 - alpha_bar).sqrt() * x + alpha_bar.sqrt() * bare(x, t, text), atol=1e-6
    )


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_blocks_get_no_gradient(frozen):
    model, (x, t, text) = random_model(), random_inputs()
    control = torch.randn(2, 4, 6, 8, 8)
    out = model(x, t, text, control=control, frozen_blocks=frozen)
    out.square().mean().backward()
    assert torch.equal(out, model(x, t, text, control=control))
    below = ("x_embedder", "control_embedder", "view_encoding", *(f"blocks.{k}." for k in range(frozen)))
    for name, p in model.named_parameters():
        assert (p.grad is None) == (frozen > 0 and name.startswith(below)), name


def test_gradient_checkpointing_changes_no_gradient():
    x, t, text = random_inputs()
    grads = []
    for recompute in (False, True):
        model = random_model()
        model.grad_checkpointing = recompute
        model(x, t, text, frozen_blocks=1).square().mean().backward()
        grads.append([p.grad for p in model.blocks[1:].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    "name, change",
    [
        ("control", dict(control=torch.zeros(2, 4, 3, 8, 8))),
        ("x has 5 views, the model knows 4", dict(x=torch.zeros(2, 5, 3, 8, 8))),
        ("domain_shift", dict(domain_shift=torch.zeros(3, 2, 16))),
        ("x", dict(x=torch.zeros(2, 4, 3, 8, 4))),
        ("frozen_blocks", dict(frozen_blocks=5)),
        ("text", dict(text=torch.ones(2, 17, dtype=torch.long))),
    ],
)
def test_a_wrong_shape_is_named(name, change):
    x, t, text = random_inputs()
    with pytest.raises(ValueError, match=name):
        random_model()(**(dict(x=x, t=t, text=text) | change))


# ---------------------------------------------------------------------------------------------------------------------
# Noise process


def test_alphas_cumprod_by_hand():
    product = 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        if step in (0, 1, 500, 999):
            assert abs(float(alphas_cumprod[step]) - product) < 1e-13


def test_add_noise_and_its_moments():
    x0, noise, t = torch.randn(3, 1, 3, 4, 4), torch.randn(3, 1, 3, 4, 4), torch.tensor([0, 500, 999])
    x = add_noise(x0, noise, t)
    for k in range(3):
        alpha_bar = float(alphas_cumprod[t[k]])
        assert torch.allclose(x[k], alpha_bar**0.5 * x0[k] + (1 - alpha_bar) ** 0.5 * noise[k], atol=1e-6)


def test_epsilon_loss_and_its_bins():
    prediction, noise, t = torch.randn(5, 1, 3, 4, 4), torch.randn(5, 1, 3, 4, 4), torch.tensor([0, 249, 250, 750, 999])
    loss, (sums, counts) = epsilon_loss(prediction, noise, t)
    each = [float(((prediction[k] - noise[k]) ** 2).mean()) for k in range(5)]
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-5)
    assert counts.tolist() == [2, 1, 0, 2]
    assert sums.tolist() == pytest.approx([each[0] + each[1], each[2], 0, each[3] + each[4]], rel=1e-5)


def test_even_loss_is_the_error_of_x0_weighed_by_signal_to_noise():
    x0, noise, prediction = (torch.randn(4, 1, 3, 4, 4, generator=seeded_generator(k)).double() for k in range(3))
    t = torch.tensor([0, 10, 300, 900])
    a = alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    guess = (x_t - (1 - a).sqrt() * prediction) / a.sqrt()
    weight = torch.minimum(a / (1 - a) + 1, torch.tensor(50.0))
    want = (weight * (guess - x0) ** 2).mean()
    assert float(epsilon_loss(prediction, noise, t, even=True)[0]) == pytest.approx(float(want), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_rebuilds_its_model_alone(tmp_path):
    model, path, inputs = random_model(), tmp_path / "sub" / "m.safetensors", random_inputs()
    save_model(path, TINY, model)
    again = load_model(path)
    assert again.config == TINY
    assert torch.equal(model(*inputs), again(*inputs))
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_bad_checkpoints_are_one_clear_line(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="m.safetensors"):
        load_model(path)
    save_model(path, TINY, random_model())
    with pytest.raises(ValueError, match=r"another configuration: .*depth 4 \(expected 10\)"):
        load_model(path, config=PRESETS["toy"])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"not a checkpoint at all, but text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_model(path)
    save_tensors(path, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(path)
    weights = random_model().state_dict()
    del weights["final_table"]
    save_tensors(path, weights, config=asdict(TINY))
    with pytest.raises(ValueError, match="final_table missing"):
        load_model(path)
