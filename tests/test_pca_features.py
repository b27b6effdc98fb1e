"""Features of the blocks (A.1): PCA against an SVD, recorded tokens against a forward by hand, linear readings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, random_model, refuses, run_main
from PIL import Image

import pca_features
from dit import save_model
from domain_shifter import ShiftedDiT
from sample import Sampling, sample_images
from toy.world import tokenize


def test_pca_against_an_independent_svd():
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8.0) + 5
    components, scores, share = pca_features.pca(x)
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    for k in range(3):
        sign = np.sign(vt[k][np.abs(vt[k]).argmax()])
        assert np.allclose(components[k], sign * vt[k], atol=1e-10)
        assert np.allclose(scores[:, k], sign * (centred @ vt[k]), atol=1e-9)
    assert np.allclose(share, (s**2 / (s**2).sum())[:3])
    flipped, _, _ = pca_features.pca(-x)  # a sign that only the data's could decide would turn here
    assert np.allclose(flipped, components, atol=1e-10)


def test_colors_span_each_component_and_keep_the_map_upright():
    scores = torch.arange(32.0).view(-1, 1) * torch.tensor([1.0, -1.0, 100.0])
    maps = pca_features.as_colors(scores, 4)
    assert maps.shape == (2, 3, 4, 4) and maps.min() == 0 and maps.max() == 255
    assert (maps[0, 0, 0].diff() > 0).all() and (maps[0, 0, :, 1].diff() > 0).all() and maps[1, 0, 3, 3] == 255
    red, green, blue = maps.int().unbind(1)
    assert (red - blue).abs().max() <= 1 and (red + green - 255).abs().max() <= 1


def test_recorded_tokens_are_those_of_the_blocks():
    model = random_model()
    x, t, text = torch.randn(2, 1, 3, 8, 8), torch.tensor([5, 700]), torch.tensor([[3, 4, 1], [5, 1, 0]])
    with torch.no_grad(), pca_features.recorded(model, range(5)) as features:
        model(x, t, text)
    assert sorted(features) == [0, 1, 2, 3, 4]
    seen = []
    with torch.no_grad():
        original = model.blocks[2].forward
        model.blocks[2].forward = lambda h, *rest: seen.append(h) or original(h, *rest)
        model(x, t, text)
    assert torch.equal(features[2], seen[0])  # after two blocks is before the third
    with torch.no_grad():
        assert torch.equal(features[0], model.embed_tokens(x, None))
    features.clear()
    with torch.no_grad():
        model(x, t, text)
    assert not features  # recording has ended


def test_sampling_keeps_the_figures_steps_and_its_images():
    network = ShiftedDiT(random_model())
    inputs = {"text": tokenize(["a red mug", "photo of a blue metal mug"]), "null": {"text": tokenize([""])}}
    sampling = Sampling(cfg_scale=2.0, num_steps=20)
    images, features = pca_features.sampled_features(network, inputs, sampling)
    assert list(features) == [(t, block) for t in (799, 699, 499, 199) for block in (1, 2, 4)]
    assert all(tokens.shape == (2, 4, 16) for tokens in features.values())
    several, parts = pca_features.sampled_features(network, inputs, replace(sampling, batch=1))
    assert torch.allclose(several, images, atol=1e-3)  # twenty guided steps magnify the last place
    for key, tokens in features.items():
        assert (parts[key] - tokens).abs().max() < 1e-3 * tokens.abs().max()
    _, leading = pca_features.sampled_features(network, inputs, Sampling(num_steps=20, spacing="leading"))
    assert sorted({t for t, _ in leading}) == [200, 500, 700, 800]
    unwatched = sample_images(network, inputs, sampling)
    assert torch.allclose(images, unwatched[:, 0], atol=1e-3)


def test_what_is_linear_reads_off_and_what_is_not_there_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=generator)
    fit = torch.arange(4000) % 2 == 0
    linear = x[:, :2] @ torch.randn(2, 3, generator=generator) + 7
    assert pca_features.read_off(x, linear, fit) > 0.999
    noisy = linear + linear.std(dim=0) * torch.randn(4000, 3, generator=generator)  # half of the variance is noise
    assert pca_features.read_off(x, noisy, fit) == pytest.approx(0.5, abs=0.04)
    assert abs(pca_features.read_off(x, torch.randn(4000, 1, generator=generator), fit)) < 0.03


def test_readability_targets_fit_the_tokens(tmp_path):
    """Through a model whose features are the noised image's patches: the silhouette shows in them, more so later."""
    config = replace(TINY, image_size=32)
    found = pca_features.readability(ShiftedDiT(random_model(config)), num=48)
    assert set(found) == {"silhouette", "normals", "domain"}
    assert all(list(by_step) == [800, 700, 500, 200] for by_step in found.values())
    assert all(len(values) == 5 for f in found.values() for values in f.values())
    first = {t: values[0] for t, values in found["silhouette"].items()}
    assert first[200] > 0.6 and first[200] > first[500] > first[800] > 0
    pca_features.readability_plot(str(tmp_path / "plot.png"), found)
    assert Image.open(tmp_path / "plot.png").size == (4 * 380, 300)


def test_latents_with_caption_vectors_make_the_figure(tmp_path, monkeypatch, capsys):
    config = replace(TINY, channels=4, out_channels=8, vocab_size=0, text_dim=6, text_length=5, output_skip=False)
    save_model(str(tmp_path / "latent.safetensors"), config, random_model(config))

    def load_text_encoder(folder, device):
        return lambda captions: [torch.full((1 + len(caption) % 5, 6), len(caption) / 9) for caption in captions]

    monkeypatch.setattr(pca_features, "load_text_encoder", load_text_encoder)
    flags = ("--model", tmp_path / "latent.safetensors", "--out", tmp_path / "pca.png", "--threads", 1)
    refuses(pca_features, flags, 2, "--text_encoder")
    run_main(pca_features, *flags, "--text_encoder", "t5", "--prompt", "a mug", "a cat", "two")
    assert f"wrote {tmp_path / 'pca.png'}" in capsys.readouterr().out
    assert Image.open(tmp_path / "pca.png").height > 13 * 64


def test_pixels_make_the_figure_and_the_readings_as_a_command(tmp_path, capsys):
    config = replace(TINY, image_size=16)
    save_model(str(tmp_path / "base.safetensors"), config, random_model(config))
    flags = ("--base", tmp_path / "base.safetensors", "--out", tmp_path / "pca.png", "--threads", 1)
    refuses(pca_features, (*flags, "--num", 9), 2, "--num: 9 does not lie in [10, 100000]")
    run_main(pca_features, *flags, "--num", 10, "--num_objects", 12, "--num_steps", 4)
    printed = capsys.readouterr().out
    assert "variance explained" in printed and "blocks until 90 %" in printed
    assert (tmp_path / "pca.png").exists() and (tmp_path / "pca_readable.png").exists()
