"""Training states: an exact resume after a kill, and which states are refused."""

import json
import os
import subprocess
import sys
import time
from glob import glob

import pytest
import torch
import train_worker
from conftest import ROOT, random_model
from train_worker import tiny_args, train_tiny

from support.files import checksum, load_tensors, save_tensors
from training.states import Trained, check_ranks, hold, save_state, training_settings

WORKER = "tests/training/train_worker.py"


def states(out):
    return sorted(glob(f"{out}/tiny/state_*.safetensors"))


@pytest.mark.parametrize("muon", ["--no-muon", "--muon"])
def test_resume_after_kill_9_equals_not_having_stopped(tmp_path, muon):
    flags = ("--steps", 40, "--batch", 2, "--save_every", 4, "--ema", 0.9, muon)
    whole = train_tiny(tmp_path / "whole", "mixed", *flags)
    command = [sys.executable, WORKER, str(tmp_path / "cut"), "mixed", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not states(tmp_path / "cut") and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert states(tmp_path / "cut") and not (tmp_path / "cut" / "rank_0.safetensors").exists(), "killed too late"
    newest = states(tmp_path / "cut")[-1]  # the newest state is also cut off: the one before is taken
    if len(states(tmp_path / "cut")) > 1:
        os.truncate(newest, os.path.getsize(newest) // 2)
    cut = train_tiny(tmp_path / "cut", "mixed", *flags)
    assert all(torch.equal(p, cut[name]) for name, p in whole.items())
    whole, cut = (load_tensors(states(tmp_path / name)[-1])[0] for name in ("whole", "cut"))
    assert (
        sum(name.startswith("exp_avg.") for name in whole) > 20 and sum(name.startswith("ema.") for name in whole) > 20
    )
    assert (sum(name.startswith("momentum_buffer.") for name in whole) > 20) == (muon == "--muon")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [[json.loads(line) for line in open(tmp_path / name / "tiny" / "log.jsonl")] for name in ("whole", "cut")]
    assert [(line["step"], line["domain"], line["loss"]) for line in logs[0]] == [
        (line["step"], line["domain"], line["loss"]) for line in logs[1]
    ]


def test_a_damaged_state_is_skipped_and_said(tmp_path, capsys):
    flags = ("--steps", 3, "--batch", 1, "--save_every", 1)
    whole = train_tiny(tmp_path, "mixed", *flags)
    for damaged, size in ((1, 40), (1, 0), (2, 40)):  # the newest of two, then both: it starts anew
        for path in states(tmp_path)[-damaged:]:
            os.truncate(path, size)
        assert all(torch.equal(p, whole[name]) for name, p in train_tiny(tmp_path, "mixed", *flags).items())
        assert capsys.readouterr().err.count("skipping a damaged state") == damaged


def test_other_settings_are_not_resumed(tmp_path):
    train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1)
    with pytest.raises(ValueError, match=r"other settings: lr 0.001 \(now 0.5\); use another --out or --name"):
        train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1, "--lr", 0.5)
    train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1, "--log_every", 2)  # does not decide the result
    for path in states(tmp_path):  # nor does a setting that there is no more
        kept, metadata = load_tensors(path)
        save_tensors(path, kept, **metadata | {"settings": metadata["settings"] | {"images_per_sample": 4}})
    train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1)


def test_other_files_are_not_resumed(tmp_path, monkeypatch):
    """A base model, stage 1 or a set that was replaced under its name; the name itself does not matter."""
    flags = ("--steps", 2, "--batch", 1)
    train_tiny(tmp_path, "mixed", *flags)
    train_tiny(tmp_path, "mixed", *flags, "--base", "another spelling of its path")
    sets, shifters = train_worker.tiny_sets(), train_worker.trained_shifters()
    with torch.no_grad():
        shifters.W_left[1] *= 1.001
    sets["real"]["text"][0, 0] += 1
    for name, other, what in (("random_model", random_model(seed=1), "another network"),
                              ("trained_shifters", shifters, "another network"),
                              ("tiny_sets", sets, "another real set")):
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=rf"other settings: {what}; use another"):
            patched.setattr(train_worker, name, lambda: other)
            train_tiny(tmp_path, "mixed", *flags)


def test_a_state_with_one_flipped_bit_is_skipped(tmp_path, capsys):
    whole = train_tiny(tmp_path, "mixed", "--steps", 3, "--batch", 1, "--save_every", 1)
    content = bytearray(open(states(tmp_path)[-1], "rb").read())
    content[-100] ^= 1
    open(states(tmp_path)[-1], "wb").write(content)
    again = train_tiny(tmp_path, "mixed", "--steps", 3, "--batch", 1, "--save_every", 1)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert "have changed" in capsys.readouterr().err


def test_a_state_of_another_version_is_refused_and_kept(tmp_path):
    """Training anew would write states with lower numbers; it must not remove this one."""
    train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1)
    kept, metadata = load_tensors(states(tmp_path)[-1])
    save_tensors(states(tmp_path)[-1], kept, step=metadata["step"], settings=metadata["settings"])
    with pytest.raises(ValueError, match="is no state of this version of the code: use another --out"):
        train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1)
    assert len(states(tmp_path)) == 1


def test_new_states_outlive_damaged_ones_with_higher_numbers(tmp_path):
    """A kill right after the first new state must not start from nothing again."""
    flags = ("--steps", 8, "--batch", 1, "--save_every", 2)
    train_tiny(tmp_path, "mixed", *flags)
    for path in states(tmp_path):
        os.truncate(path, 40)
    args, trained = tiny_args(tmp_path, *flags), Trained({}, {}, [])
    save_state(f"{tmp_path}/tiny", 2, trained, args, 1, {})
    assert [os.path.basename(path) for path in states(tmp_path)] == ["state_00000002.safetensors"]


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    command = [sys.executable, WORKER, str(tmp_path), "mixed", "--steps", "100000", "--batch", "1"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not states(tmp_path) and first.poll() is None:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process trains into .*tiny: let it end, or use another"):
        train_tiny(tmp_path, "mixed", "--steps", 100000, "--batch", 1)
    first.kill()
    first.wait()
    hold(tmp_path / "tiny")                     # a lock ends with its process


def test_settings_are_what_decides_the_result(tmp_path):
    settings = training_settings(tiny_args(tmp_path, "--accumulate", 2, "--workers", 1, "--compile"))
    assert not settings.keys() & {"out", "accumulate", "workers", "compile", "command", "log_every"}
    assert settings.keys() >= {"lr", "batch", "steps", "seed", "tau_B", "p_B", "method", "loss", "dtype", "name"}


def test_processes_that_found_different_states_are_refused(monkeypatch):
    check_ranks(4, "runs", 1)
    for other, refused in ((4, False), (0, True)):
        monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, own: found.__setitem__(1, other))
        if refused:
            with pytest.raises(ValueError, match=r"different steps, \[4, 0\]: all nodes must see the same runs"):
                check_ranks(4, "runs", 2)
        else:
            check_ranks(4, "runs", 2)


@pytest.mark.parametrize("change", [
    lambda tensors, made: tensors.pop(next(name for name in tensors if name.startswith("ema."))),
    lambda tensors, made: tensors.update({"exp_avg.dit.nothing": torch.zeros(1)}),
    lambda tensors, made: tensors.update({"nothing": torch.zeros(1)}),
    lambda tensors, made: tensors.update({name: torch.full_like(tensors[name], float("nan")) for name in tensors
                                          if name.startswith("param.")}),
    lambda tensors, made: made.update(step=10 ** 9), lambda tensors, made: made.update(step="a"),
    lambda tensors, made: made.update(settings=[]), lambda tensors, made: made.update(made_from=None)])
def test_a_state_that_does_not_fit_is_named(change, tmp_path):
    """Whose checksum is right, so that it is no damage of a disk."""
    flags = ("mixed", "--steps", 2, "--batch", 1, "--ema", 0.5)
    train_tiny(tmp_path, *flags)
    path = str(tmp_path / "tiny" / "state_00000002.safetensors")
    tensors, made = load_tensors(path)
    change(tensors, made)
    save_tensors(path, tensors, **made | dict(checksum=checksum(tensors)))
    with pytest.raises(ValueError, match="state_00000002.safetensors (does not fit|is no state of)"):
        train_tiny(tmp_path, *flags)
