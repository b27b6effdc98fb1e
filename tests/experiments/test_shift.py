"""Shifted sampling: how far is chosen as the measures say; the dial between the domains."""

import json

import pytest
import torch
from conftest import refuses

import data
from experiments import shift
from sample import CFG_SCALE, Sampling, load_network, selected_shift


def test_select_picks_the_most_consistent_shift_within_the_loss(tmp_path, tiny_run, monkeypatch, capsys):
    """With measures that are a known function of the shift, through the command and back into sample.py."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny_run / "realiz3d_texturing.safetensors").read_bytes())
    shifts = []

    def sample_images(network, inputs, sampling, views, progress):
        assert "control" in inputs and sampling.mode == "shifted"
        shifts.append((sampling.B_max, sampling.t_max))
        return torch.zeros(len(inputs["text"]), views, 3, 32, 32)

    def measure(images, *rest, **options):
        B_max, t_max = shifts[-1]
        return dict(KD_I=100 + 60 * B_max + (1000 - t_max) / 10, psnr=20 + 10 * B_max + (1000 - t_max) / 100) | dict(
            psnr_loo=1.0, iou=1.0, normals=9.0, photo=1.0
        )

    monkeypatch.setattr(shift, "load_judges", lambda *args: None)
    monkeypatch.setattr(shift, "sample_images", sample_images)
    monkeypatch.setattr(shift, "measure", measure)
    command = ["select", "--model", str(path), "--num", "2", "--folder", str(tmp_path), "--max_loss"]
    assert selected_shift(str(path)) == (0.3, 950)
    for max_loss, expected in (("0.25", (0.4, 1000)), ("0.3", (0.4, 950)), ("0", (0.0, 1000)), ("9", (0.4, 800))):
        shifts.clear()
        shift.main([*command, max_loss])
        assert selected_shift(str(path)) == expected
        assert shifts[:5] == [(b, 1000) for b in (0.0, 0.1, 0.2, 0.3, 0.4)]
        assert shifts[5:] == [(0.0 if max_loss == "0" else 0.4, t) for t in (950, 900, 850, 800)]
    assert (tmp_path / "model.shift.png").exists() and "where sample.py finds it" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no domain to shift"):
        shift.main(["select", "--model", str(tiny_run / "base.safetensors")])
    path.write_bytes((tiny_run / "base.safetensors").read_bytes())
    with pytest.raises(ValueError, match="chosen for another model"):
        selected_shift(str(path))


def test_dial_turns_from_one_domain_to_the_other(tmp_path, tiny_run, shipped_judges, monkeypatch, capsys):
    """Seven settings in order, each passed to the sampler as it is; 0 and 1 are the domains themselves."""
    sample_images, drawn = shift.sample_images, {}
    monkeypatch.setattr(shift, "load_judges", lambda *args: shipped_judges)

    def watched(network, inputs, sampling, **options):
        drawn[sampling.mode] = sample_images(network, inputs, sampling, **options)
        return drawn[sampling.mode]

    monkeypatch.setattr(shift, "sample_images", watched)
    model = str(tiny_run / "realiz3d_texturing.safetensors")
    flags = f"--num 3 --num_steps 1 --threads 1 --folder {tmp_path} --out {tmp_path}/dial.png --model {model}"
    shift.main(["dial", *flags.split()])
    assert list(drawn) == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    network, held = load_network(model), data.evaluation_set(3, folder=tmp_path)
    for mode, s in (("syn", 0.0), ("real", 1.0)):
        alone = sample_images(network, held, Sampling(mode, cfg_scale=CFG_SCALE, num_steps=1, batch=16), views=4)
        assert torch.equal(alone, drawn[s])
    assert (drawn[0.0] != drawn[1.0]).any() and (tmp_path / "dial.png").exists()
    assert len(json.loads((tmp_path / "dial.json").read_text())["rows"]) == 7
    with pytest.raises(ValueError, match="no dial to turn"):
        shift.main(["dial", "--model", str(tiny_run / "base.safetensors")])


@pytest.mark.parametrize("flags, word", [
    (("select", "--max_loss", -5), "--max_loss: -5 does not lie in [0, 1000]"),
    (("select", "--model", "m.safetensors"), "--model 'm.shift.json'"),
    (("select", "--model", "n.safetensors"), "--model 'n.shift.png'"),
    (("dial", "--out", "e3"), "--out 'e3.png'"), (("dial", "--out", "b.png"), "--out 'b.json'"),
])
def test_what_cannot_be_chosen_or_written_is_refused_before_any_work(flags, word, tmp_path, monkeypatch):
    monkeypatch.setattr(shift, "launch", None)
    monkeypatch.chdir(tmp_path)
    for name in ("m.shift.json", "n.shift.png", "e3.png", "b.json"):
        (tmp_path / name).mkdir()
    refuses(shift, flags, 2, word)
