"""Trains a tiny model with the project's own loop and stage-2 plan; run alone or under torchrun by test_train.py.

    python tests/train_worker.py OUT MODE [flags of train_stage2.py]

MODE "mixed": the plan of stage 2. "frozen": three synthetic steps, then a real one with two blocks frozen. "bad": the
loss turns NaN at step 5. Writes OUT/rank_R.safetensors, the parameters each rank ends with.
"""

import sys

from conftest import TINY, random_model  # noqa: F401  (also puts the project on the path)

import torch
from test_domain_shifter import trained_shifters

import train_stage1
import train_stage2
from dit import launch, run_cli, save_tensors
from domain_shifter import ShiftedDiT


def main():
    out, mode = sys.argv[1:3]
    args = train_stage2.parse_args(["--out", out, "--name", "tiny", "--log_every", "1", *sys.argv[3:]])
    launched = launch(1)
    train_stage1.fill_defaults(args, "stage2", launched[0])
    generator = torch.Generator().manual_seed(5)
    pixels = lambda *shape: torch.randint(256, shape, generator=generator, dtype=torch.uint8)  # noqa: E731
    words = lambda n: torch.randint(2, 50, (n, 14), generator=generator)  # noqa: E731
    syn = {
        "image": pixels(6, 4, 3, 8, 8),
        "text": words(6),
        "view": torch.arange(4).expand(6, 4),
        "control": torch.randn(6, 4, 6, 8, 8, generator=generator).half(),
    }
    real = {"image": pixels(24, 1, 3, 8, 8), "text": words(24)}
    network = ShiftedDiT(random_model(), trained_shifters().requires_grad_(False))
    plan = train_stage2.stage2_plan(args, TINY.depth)
    if mode == "frozen":
        plan = lambda step: (
            train_stage1.Iteration("syn", step)
            if step < 3
            # noqa: E731
            else train_stage1.Iteration("real", 0, frozen_blocks=2)
        )
    if mode == "bad":
        original = train_stage1.epsilon_loss

        def nan_at_step_5(*inputs):
            loss, bins = original(*inputs)
            nan_at_step_5.calls += 1
            return (loss * float("nan") if nan_at_step_5.calls == 6 else loss), bins

        nan_at_step_5.calls = 0
        train_stage1.epsilon_loss = nan_at_step_5
    null = {"text": torch.tensor([[1] + [0] * 13])}
    train_stage1.train(network, {"syn": syn, "real": real}, null, plan, args, f"{out}/tiny", launched)
    save_tensors(f"{out}/rank_{launched[1]}.safetensors", dict(network.named_parameters()))


if __name__ == "__main__":
    run_cli(main)
