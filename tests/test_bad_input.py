"""What a user may get wrong, a table a kind: one line that names the flag or file, 2 for usage and 1 for failure, and
nothing written."""
import shutil

import pytest
import torch
from conftest import TINY, random_model, refuses, trained_shifters

import evaluate
import pca_features
import sample
import train_stage1
import train_stage2
from baselines.adapters import ADAPTERS
from dit import save_model
from domain_shifter import DomainShifters
from experiments import benchmark, shift
from toy import pretrain

NUMBERS = [
    (train_stage2, ("--lr", "nan"), "--lr"), (train_stage2, ("--lr", "-1"), "--lr"),
    (train_stage2, ("--lr", "inf"), "--lr"), (train_stage2, ("--real_steps", "1001"), "--real_steps"),
    (train_stage1, ("--clip", "-1"), "--clip"), (train_stage2, ("--stage1_steps", "0"), "--stage1_steps"),
    (train_stage2, ("--real_warmup", "-5"), "--real_warmup"), (train_stage2, ("--seed", 2 ** 64), "--seed"),
    (train_stage2, ("--picture_steps", "1001"), "--picture_steps"),
    (train_stage2, ("--p_B", "nan"), "--p_B"), (train_stage2, ("--tau_B", "1.1"), "--tau_B"),
    (train_stage2, ("--weight_decay", "-0.1"), "--weight_decay"), (train_stage2, ("--threads", "0"), "--threads"),
    (pretrain, ("--num_base_images", "0"), "--num_base_images"), (pretrain, ("--preset", "full"), "preset full"),
    (benchmark, ("--tau_B", "nan"), "--tau_B"), (sample, ("--cfg_scale", "inf"), "--cfg_scale"),
    (sample, ("--B_max", "nan"), "--B_max"), (pca_features, ("--cfg_scale", "nan"), "--cfg_scale"),
    (evaluate, ("toy", "--cfg_scale", "nan"), "--cfg_scale"), (shift, ("select", "--max_loss", "nan"), "--max_loss"),
    (evaluate, ("folders", "a", "b", "--elevation", "nan"), "--elevation"),
    (evaluate, ("folders", "a", "b", "--extent", "nan"), "--extent"),
    (evaluate, ("folders", "a", "b", "--azimuths", "nan", "0"), "--azimuths"),
]
NAMES = ["base", "shifters", "sets", "sets/real_4", "../elsewhere", ".", ".."]


@pytest.mark.parametrize("program, flags, word", NUMBERS)
def test_numbers_out_of_range_name_their_flag(program, flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(program, flags, 2, word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_training_does_not_take_another_files_name(name, tiny_toy):
    out, _ = tiny_toy
    before = sorted(out.rglob("*"))
    refuses(train_stage2, ("--out", out, "--name", name), 2, "--name")
    assert sorted(out.rglob("*")) == before


def test_stage_1_must_be_of_this_method_and_rank(tiny_toy):
    out, _ = tiny_toy
    files = {"base": dict(model=random_model()), "rank 3": dict(shifters=trained_shifters()),
             "lora": dict(adapter=ADAPTERS["lora"](TINY, 8))}
    for name, parts in files.items():
        save_model(f"{out}/{name}.safetensors", TINY, **parts, adapter_kind=name)
        refuses(train_stage2, ("--out", out, "--num_assets", 4, "--shifters", f"{out}/{name}.safetensors"), 1, name,
                "takes shifters of rank 8")
    save_model(f"{out}/shifters_8.safetensors", TINY, shifters=DomainShifters(TINY))
    refuses(train_stage2, ("--out", out, "--joint", "--shifters", f"{out}/shifters_8.safetensors"), 2, "--joint")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_whatever_reads_them(number, tiny_toy):
    out, _ = tiny_toy
    model, shifters, path = random_model(), trained_shifters(), f"{out}/broken.safetensors"
    with torch.no_grad():
        model.blocks[1].mlp[0].weight[0, 0] = number
    save_model(path, TINY, model, shifters)
    for program, flags in ((sample, ("--model", path)), (train_stage1, ("--base", path, "--out", out)),
                           (sample, ("--model", path, "--real_set", f"{out}/set.safetensors")),
                           (pca_features, ("--model", path))):
        refuses(program, flags, 1, path, "not finite", "blocks.1.mlp.0.weight")
    assert not (out / "set.safetensors").exists()


def test_a_rank_without_a_world_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    refuses(train_stage2, ("--threads", 1), 1, "RANK is 1 and WORLD_SIZE 1")


def test_the_real_set_replaces_no_other_file(tiny_toy):
    out, _ = tiny_toy
    shutil.copy(out / "base.safetensors", out / "kept.safetensors")
    (out / "notes.txt").write_text("kept")
    for name in ("kept.safetensors", "notes.txt"):
        before = (out / name).read_bytes()
        refuses(sample, ("--base", out / "base.safetensors", "--real_set", out / name), 2, "--real_set", name)
        assert (out / name).read_bytes() == before
