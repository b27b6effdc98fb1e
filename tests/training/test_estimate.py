"""What a training's trial chooses, and that a run which is resumed goes on as it computed."""
import pytest
import torch
from conftest import ALONE, random_model
from train_worker import tiny_args, train_tiny

import dit
import training.estimate
from train_stage2 import parse_args
from training.estimate import Pace, choose, choose_processes, launch_training, try_compiling
from training.flags import fill_defaults
from training.states import stored_speed


def stage2_args(tmp_path, *flags):
    return fill_defaults(parse_args(["--out", str(tmp_path), *map(str, flags)]), "stage2", ALONE)


@pytest.fixture
def trial(monkeypatch):
    """A trial without a clock, which finds a hundredth of a second an image: {"asked": (threads, dtype)}."""
    seen = {}

    def choose_speed(work, images, device, threads, dtype):
        seen["asked"] = threads, dtype
        return dtype or "bfloat16", 0.01, "the others"
    monkeypatch.setattr(training.estimate, "choose_speed", choose_speed)
    return seen


def test_open_flags_are_completed_and_given_ones_kept(tmp_path, trial, capsys):
    args = stage2_args(tmp_path, "--no-compile")
    assert (args.dtype, args.threads, args.compile) == (None, None, False)
    assert choose(args, ALONE).step == 0.01 and trial["asked"] == (0, None)
    assert (args.dtype, args.threads, args.compile) == ("bfloat16", None, False)    # open threads may change later
    assert capsys.readouterr().out == "the others; --dtype, --threads, --compile override\n"
    args = stage2_args(tmp_path, "--dtype", "float32", "--threads", torch.get_num_threads(), "--no-compile")
    choose(args, ALONE)
    assert trial["asked"] == (torch.get_num_threads(), "float32") and args.dtype == "float32"


def test_a_resumed_run_computes_as_it_did(tmp_path, trial, monkeypatch):
    """The newest state that can be read says how, of stage 2 or else of stage 1; flags override it."""
    train_tiny(tmp_path, "mixed", "--steps", 2, "--batch", 1, "--dtype", "bfloat16", "--save_every", 1, "--no-compile")
    folder = tmp_path / "tiny"
    made = dict(dtype="bfloat16", threads=torch.get_num_threads(), compile=False, processes=1)
    assert stored_speed([tmp_path / "none", folder]) == made and stored_speed([tmp_path / "none"]) == {}
    newest = sorted(folder.glob("state_*"))[-1]
    for names in (("tiny",), ("none", "tiny")):
        args = tiny_args(tmp_path)
        choose(args, ALONE, *names)
        assert trial["asked"] == (made["threads"], "bfloat16") and args.compile is False
    choose(tiny_args(tmp_path, "--dtype", "float32"), ALONE, "tiny")
    assert trial["asked"] == (made["threads"], "float32")
    newest.write_bytes(b"damaged")
    assert stored_speed([folder]) == made
    monkeypatch.setattr(training.estimate, "stored_speed", lambda folders: made | {"threads": 64})
    choose(tiny_args(tmp_path), ALONE, "tiny")
    assert trial["asked"][0] == training.estimate.MOST_THREADS                      # fewer cores than there were


@pytest.mark.parametrize("cores, batch, seconds, chosen", [
    (2, 4, {1: .20, 2: .15}, (2, 1)),               # 145 images/s in two processes, 107 in one
    (2, 4, {1: .20, 2: .12}, (1, 2)),               # 145 and 133: not worth it
    (2, 3, {1: .20, 2: .15}, (1, 2)),               # three grids cannot be halved
    (8, 4, {1: .20, 2: .11, 4: .08, 8: .3}, (4, 2)),    # 533; 364 in two of 4, 290 in four of 1 beside four idle cores
    (2, 4, {1: .20}, (2, 1)),                       # two threads were hopeless
    (1, 4, {1: .20}, (1, 1))])
def test_processes_are_chosen_by_what_they_would_compute(cores, batch, seconds, chosen, tmp_path, monkeypatch, capsys):
    """Here a share of 16 images takes a tenth longer than its share of the time."""
    monkeypatch.setattr(training.estimate, "MOST_THREADS", cores)
    monkeypatch.setattr(training.estimate, "thread_counts", lambda: list(seconds))
    monkeypatch.setattr(training.estimate, "promising_dtypes", lambda: ["float32", "bfloat16"])
    monkeypatch.setattr(training.estimate, "trial", lambda args, device, images, processes=1: (None, images, None))

    def time_choices(images, counts, dtypes):
        more = 1 if images == 16 else 1.1
        return {(n, d): more * seconds[n] * images / 16 * (2 if d == "float32" else 1) for n in counts for d in dtypes}
    monkeypatch.setattr(training.estimate, "time_choices", time_choices)
    assert choose_processes(stage2_args(tmp_path, "--batch", batch), ["none"]) == chosen
    said = capsys.readouterr().out
    assert (f"{chosen[0]} processes of {chosen[1]} thread(s) in bfloat16, up to" in said) == (chosen[0] > 1)
    for threads, kept in ((1, 1), (64, max(1, cores // 4))):    # as the stopped run, on the cores there are
        monkeypatch.setattr(training.estimate, "stored_speed", lambda folders: dict(threads=threads, processes=4))
        assert choose_processes(stage2_args(tmp_path), ["a"]) == (4, kept)


@pytest.mark.parametrize("flags", [["--threads", "1"], ["--batch", "4"], []])
def test_a_training_spreads_only_where_flags_are_open_and_nobody_called_it(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(training.estimate, "choose_processes", lambda args, names: (2, 1))
    monkeypatch.setattr(training.estimate, "with_others", lambda count, threads: ALONE._replace(world=count))
    args = parse_args([*flags, "--out", str(tmp_path)])
    assert launch_training(args, "stage2", True).world == (1 if flags else 2)
    assert args.threads == (None if "--batch" in flags else 1)
    assert args.batch == (4 if flags else 2) and args.steps == 2020             # 4 grids a step either way
    args = parse_args([*flags, "--out", str(tmp_path)])
    assert launch_training(args, "stage2", False).world == 1
    monkeypatch.setenv("WORLD_SIZE", "1")                                       # torchrun decides
    assert launch_training(parse_args([*flags, "--out", str(tmp_path)]), "stage2", True).world == 1


def test_compilation_is_tried_in_long_runs_only(tmp_path, trial, monkeypatch):
    tried = []

    def trying(model, step, images, pace, dtype):
        tried.append(images)
        return Pace(0.005, pace.forward, 10.0), True, "compiled"
    monkeypatch.setattr(training.estimate, "try_compiling", trying)
    args = stage2_args(tmp_path, "--steps", 500, "--batch", 1)              # 20 seconds
    assert choose(args, ALONE).step == 0.01 and not args.compile and not tried
    args = stage2_args(tmp_path, "--steps", 5000, "--batch", 1)             # 200
    assert choose(args, ALONE).step == 0.005 and args.compile and tried == [(training.estimate.IMAGES, 20000)]


@pytest.mark.parametrize("images, pays", [(700, False), (900, True)])
def test_compilation_pays_where_it_saves_more_than_it_takes(images, pays, monkeypatch):
    """Here twice 2 seconds, for 5 milliseconds an image."""
    times = iter([2.0, 0.09, 0.08])
    monkeypatch.setattr(training.estimate, "seconds_of", lambda work, device: next(times))
    monkeypatch.setattr(dit.Block, "compile", lambda block, dynamic: None)
    pace = Pace(0.01, 0.001)
    got, compiled, said = try_compiling(random_model(), None, (16, images), pace, "float32")
    assert compiled == pays and got == (Pace(0.005, 0.001, 4.0) if pays else pace)
    assert "compiled 200 images/s, after 4 s" in said


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    def broken(block, dynamic):
        raise RuntimeError("no working C++ compiler found\nmore lines")
    monkeypatch.setattr(dit.Block, "compile", broken)
    pace = Pace(0.01, 0.001)
    got, compiled, said = try_compiling(random_model(), None, (16, 20000), pace, "float32")
    assert (got, compiled) == (pace, False) and "no working C++ compiler" in said and "\n" not in said


def test_a_trial_of_two_processes_makes_half_of_muons_updates(tmp_path):
    """And moves no other matrix of the blocks. (By weight decay: a new model has no gradient there yet.)"""
    model, step, _ = training.estimate.trial(tiny_args(tmp_path, "--lr", 0.1), torch.device("cpu"), 4, 2)
    matrices = {name: p for name, p in model.named_parameters()
                if name.startswith("blocks.") and p.ndim == 2 and name.endswith("weight") and p.any()}
    before = {name: p.detach().clone() for name, p in matrices.items()}
    step()
    moved = sum(not torch.equal(p, before[name]) for name, p in matrices.items())
    assert abs(moved - len(matrices) / 2) <= 1
