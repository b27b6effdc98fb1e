"""What a training's trial chooses, and that a run which is resumed goes on as it computed."""
import pytest
import torch
from conftest import ALONE
from train_worker import tiny_args, train_tiny

import training.estimate
from support.files import load_tensors
from train_stage2 import parse_args
from training.estimate import Pace, choose, try_compiling
from training.flags import fill_defaults
from training.states import stored_speed


def stage2_args(tmp_path, *flags):
    return fill_defaults(parse_args(["--out", str(tmp_path), *map(str, flags)]), "stage2", ALONE)


@pytest.fixture
def trial(monkeypatch):
    """A trial that asks for nothing: {"asked": (threads, dtype)}; it finds a hundredth of a second an image."""
    seen = {}

    def choose_speed(work, images, device, threads, dtype):
        seen["asked"] = threads, dtype
        return threads or torch.get_num_threads(), dtype or "bfloat16", 0.01
    monkeypatch.setattr(training.estimate, "choose_speed", choose_speed)
    return seen


def test_open_flags_are_completed_and_given_ones_kept(tmp_path, trial):
    args = stage2_args(tmp_path, "--no-compile")
    assert (args.dtype, args.threads, args.compile) == (None, None, False)
    pace = choose(args, ALONE)
    assert pace.step == 0.01 and args.dtype == "bfloat16" and not args.compile
    assert args.threads == torch.get_num_threads()
    args = stage2_args(tmp_path, "--dtype", "float32", "--threads", torch.get_num_threads(), "--no-compile")
    choose(args, ALONE)
    assert trial["asked"] == (torch.get_num_threads(), "float32") and args.dtype == "float32"


def test_a_resumed_run_computes_as_it_did(tmp_path, trial):
    """The newest state that can be read says how; flags override it."""
    train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1, "--dtype", "bfloat16", "--save_every", 1, "--no-compile")
    made = dict(dtype="bfloat16", threads=torch.get_num_threads(), compile=False)
    assert stored_speed(tmp_path / "tiny") == made and stored_speed(tmp_path / "none") == {}
    newest = sorted((tmp_path / "tiny").glob("state_*"))[-1]
    assert load_tensors(newest)[1]["speed"] == made
    args = tiny_args(tmp_path)
    choose(args, ALONE)
    assert trial["asked"] == (made["threads"], "bfloat16") and args.compile is False
    newest.write_bytes(b"damaged")
    assert stored_speed(tmp_path / "tiny") == made


def test_compilation_pays_in_long_runs_only_and_never_fails(tmp_path, trial, monkeypatch, capsys):
    tried = []

    def trying(model, step, images, pace, args):
        tried.append(images)
        return Pace(0.005, pace.forward, 10.0), True
    monkeypatch.setattr(training.estimate, "try_compiling", trying)
    args = stage2_args(tmp_path, "--steps", 500, "--batch", 1)              # 20 seconds
    assert choose(args, ALONE).step == 0.01 and not args.compile and not tried
    args = stage2_args(tmp_path, "--steps", 5000, "--batch", 1)             # 200
    assert choose(args, ALONE).step == 0.005 and args.compile and tried == [20000]

    class Blocks:
        """A model whose compiler is missing."""
        blocks = [torch.nn.Linear(1, 1)]

        def parameters(self):
            return iter(self.blocks[0].parameters())
    monkeypatch.setattr(torch.nn.Linear, "compile", broken, raising=False)
    pace = Pace(0.01, 0.001)
    assert try_compiling(Blocks(), None, 20000, pace, args) == (pace, False)
    assert "not compiled: no working C++ compiler" in capsys.readouterr().out


def broken(*args, **options):
    raise RuntimeError("no working C++ compiler found\nmore lines")
