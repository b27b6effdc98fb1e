"""The flags of every training: defaults by preset and stage, the paper's length at full, what is refused."""

import math

import pytest
import torch
from conftest import random_model

import train_stage1
import train_stage2
from baselines.adapters import new_network
from baselines.methods import METHODS
from related import refany3d
from support.launch import Launched
from toy import pretrain
from train_stage2 import stage2_plan
from training.flags import DEFAULTS, fill_defaults


def filled(program, stage, *flags, world=1):
    """The arguments of a program after `fill_defaults`, on the CPU, as one of `world` processes."""
    return fill_defaults(program.parse_args([str(flag) for flag in flags]), stage,
                         Launched(torch.device("cpu"), 0, world))


def turns(args):
    """How many synthetic and real iterations a stage-2 training takes."""
    plan = stage2_plan(args, 28)
    domains = [plan(step).domain for step in range(args.steps)]
    return domains.count("syn"), domains.count("real")


# ---------------------------------------------------------------------------------------------------------------------
# The paper's length (C.2): ten epochs of the assets for every method, three of what is trained alone

ASSETS_AND_GRIDS = {"toy": (400, 4), "small": (4000, 16), "full": (120_000, 512)}


@pytest.mark.parametrize("world, batch, parts", [(1, 512, 64), (8, 64, 8), (64, 8, 1)])
def test_full_takes_512_grids_a_step_in_parts_of_8(world, batch, parts):
    for program, stage in ((train_stage1, "stage1"), (train_stage2, "stage2")):
        args = filled(program, stage, "--preset", "full", world=world)
        assert (args.batch, args.accumulate) == (batch, parts)
        assert args.batch * world == 512 and args.batch / args.accumulate == 8


@pytest.mark.parametrize("preset, worlds", [("toy", (1, 2, 4)), ("small", (1, 8)), ("full", (1, 8, 64))])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_ten_epochs_of_the_synthetic_set(method, preset, worlds):
    assets, grids = ASSETS_AND_GRIDS[preset]
    for world in worlds:
        args = filled(train_stage2, "stage2", "--preset", preset, "--method", method, world=world)
        synthetic, real = turns(args)
        assert args.batch * world == grids and synthetic == math.ceil(10 * assets / grids)
        assert real == (synthetic + args.real_warmup if METHODS[method].real_data else 0)


def test_training_without_real_data_is_as_long_in_renders():
    assert turns(filled(train_stage2, "stage2", "--preset", "full", "--no_real_data")) == (2344, 0)
    longer = ("--preset", "full", "--real_warmup", 5)
    assert turns(filled(train_stage2, "stage2", *longer)) == (2344, 2349)


@pytest.mark.parametrize("adapter, domains", [("shifters", 2), ("switcher", 2), ("lora", 1), ("linear", 1)])
def test_stage_1_sees_three_epochs_of_each_of_its_domains(adapter, domains):
    for preset, (assets, grids) in ASSETS_AND_GRIDS.items():
        args = filled(train_stage1, "stage1", "--preset", preset, "--adapter", adapter)
        assert args.steps == domains * math.ceil(3 * assets / grids)
    sees_real = new_network(random_model(), adapter, 2).knows_domains  # what `run_stage1` asks
    assert domains == (2 if sees_real else 1)


def test_more_processes_than_a_step_has_grids_take_fewer_steps():
    """Any number of processes starts; the epochs stay, rounded up to whole steps."""
    args = filled(train_stage2, "stage2", "--preset", "full", world=7)
    assert args.batch == 74 and turns(args)[0] == math.ceil(1_200_000 / 518)
    args = filled(train_stage2, "stage2", world=8)
    assert args.batch == 1 and turns(args)[0] == 500


def test_a_smaller_batch_takes_more_steps_so_that_the_epochs_stay():
    args = filled(train_stage2, "stage2", "--preset", "full", "--batch", 8, world=8)
    assert args.accumulate == 1 and turns(args) == (18_750, 18_770)
    assert 18_750 * 8 * 8 == 10 * 120_000
    args = filled(train_stage2, "stage2", "--preset", "full", "--batch", 8, "--steps", 7, "--accumulate", 2, world=8)
    assert (args.steps, args.accumulate) == (7, 2)  # what is named stays
    assert turns(filled(train_stage2, "stage2", "--num_assets", 40))[0] == 100


def test_a_preset_has_one_learning_rate():
    others = ("base", "refany3d", "selective")
    rates = {preset: {values[0] for (name, stage), values in DEFAULTS.items() if name == preset and stage not in others}
             for preset in ASSETS_AND_GRIDS}
    assert rates == {"toy": {1e-3}, "small": {1e-4}, "full": {5e-5}}


# ---------------------------------------------------------------------------------------------------------------------
# Every preset


def test_every_default_is_one_that_is_allowed():
    programs = dict(base=pretrain, scenes=pretrain, stage1=train_stage1, stage2=train_stage2)
    for preset, stage in DEFAULTS:
        if stage in programs:
            args = filled(programs[stage], stage, "--preset", preset)
            assert None not in (args.steps, args.batch, args.lr, args.warmup, args.weight_decay, args.ema, args.loss)
            assert args.out == f"runs/{preset}" and args.workers == 0 and args.dtype is None
            assert args.images_per_grid == (1 if stage in ("base", "scenes") else 4)
    assert filled(refany3d, "refany3d").images_per_grid == 18                # eight views and what is drawn, with maps
    assert filled(refany3d, "refany3d", "--num_references", 1, "--no-points").images_per_grid == 2
    with pytest.raises(ValueError, match="preset full has no base training"):
        filled(pretrain, "base", "--preset", "full")


def test_the_blocks_matrices_train_by_muon_at_toy_and_small():
    for preset in ("toy", "small"):
        assert filled(train_stage2, "stage2", "--preset", preset).muon
        assert filled(pretrain, "base", "--preset", preset).muon
    assert filled(pretrain, "scenes").muon
    assert not filled(train_stage2, "stage2", "--preset", "full").muon
    assert not filled(train_stage2, "stage2", "--no-muon").muon and not filled(train_stage1, "stage1").muon
    assert not filled(train_stage2, "stage2", "--method", "lora").muon      # the blocks are frozen


def test_a_named_flag_stays_and_the_name_says_what_is_trained():
    args = filled(train_stage2, "stage2", "--steps", 7, "--lr", 0.5, "--ema", 0, "--no_freezing", "--rank", 4)
    assert (args.steps, args.lr, args.ema) == (7, 0.5, 0)
    assert args.name == "realiz3d_texturing-no_freezing-rank4"
    assert filled(train_stage1, "stage1").name == "stage1"
    assert filled(train_stage1, "stage1", "--adapter", "lora").name == "stage1_lora_5"  # 32, scaled to the toy's width
    assert filled(train_stage1, "stage1", "--rank", 4).name == "stage1_shifters_4"


def test_pixels_weigh_their_loss_and_latents_have_the_papers():
    assert filled(train_stage2, "stage2").loss == filled(train_stage2, "stage2", "--preset", "small").loss == "even"
    assert filled(train_stage2, "stage2", "--preset", "full").loss == "epsilon"


@pytest.mark.parametrize("flag, value, message", [
    ("rank", 0, "--rank must lie in .1, 8192."), ("picture_steps", 0, "--picture_steps must lie in .1, 1000."),
    ("p_B", 7, r"--p_B must lie in .0, 1."), ("ema", 1.5, "--ema must lie in"), ("tau_B", -1, "--tau_B must lie in"),
    ("batch", 0, "--batch must lie in .1,"), ("preset=full --batch", 0, "--batch must lie in .1,")])
def test_settings_out_of_range_are_refused_before_any_work(flag, value, message):
    with pytest.raises(ValueError, match=message):
        filled(train_stage2, "stage2", *f"--{flag}={value}".split())


def test_how_the_flags_were_typed_is_kept():
    flags = ["--steps", "3", "--task", "text"]
    assert train_stage2.parse_args(flags).command == "python train_stage2.py --steps 3 --task text"
    assert train_stage1.parse_args(["--rank", "4"]).command == "python train_stage1.py --rank 4"
    assert pretrain.parse_args([]).command == "python -m toy.pretrain"
