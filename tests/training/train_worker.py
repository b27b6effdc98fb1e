"""Trains a tiny model with the project's own loop and stage-2 plan: for the tests here, and alone or under torchrun.

    python tests/training/train_worker.py OUT MODE [flags of train_stage2.py]

MODE "mixed": the plan of stage 2. "frozen": three synthetic steps, then a real one with two blocks frozen. Writes
OUT/rank_R.safetensors, the parameters each rank ends with.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # on the CPU wherever it runs: what the tests compare bit for bit is from one kind of device
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # conftest.py, which puts the project on the path

import torch  # noqa: E402
from conftest import ALONE, NULL, TINY, random_model, tiny_sets, trained_shifters  # noqa: E402

from domain_shifter import ShiftedDiT  # noqa: E402
from support.files import save_tensors  # noqa: E402
from support.launch import launch, run_cli  # noqa: E402
from train_stage2 import parse_args, stage2_plan  # noqa: E402
from training.flags import fill_defaults  # noqa: E402
from training.loop import Iteration, train  # noqa: E402

def tiny_args(out, *flags, launched=ALONE):
    """The arguments of a training called "tiny" below the folder out."""
    args = parse_args(["--out", str(out), "--name", "tiny", "--log_every", "1", *map(str, flags)])
    return fill_defaults(args, "stage2", launched)


def frozen_plan(step):
    """Three synthetic steps, then a real one with two blocks frozen."""
    return Iteration("syn", step, views=4, control=True) if step < 3 else Iteration("real", 0, frozen_blocks=2)


def train_tiny(out, mode, *flags, launched=ALONE):
    """Trains into out/tiny; returns {name: parameter} of the network afterwards."""
    args = tiny_args(out, *flags, launched=launched)
    network = ShiftedDiT(random_model(), trained_shifters().requires_grad_(False))
    plan = frozen_plan if mode == "frozen" else stage2_plan(args, TINY.depth)
    train(network, tiny_sets(), NULL, plan, args, launched)
    return {name: p.detach() for name, p in network.named_parameters()}


def main():
    out, mode, *flags = sys.argv[1:]
    launched = launch(1)._replace(device=torch.device("cpu"))
    save_tensors(f"{out}/rank_{launched.rank}.safetensors", train_tiny(out, mode, *flags, launched=launched))


if __name__ == "__main__":
    run_cli(main)
