"""Shared by all tests: one thread (the machine is small), the path, a tiny model and a tiny trained run."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from dit import Config, DiT  # noqa: E402

torch.set_num_threads(1)
GOLDEN = ROOT / "tests" / "golden"
TINY = Config(
    image_size=8,
    patch_size=4,
    channels=3,
    out_channels=3,
    control_channels=6,
    num_views=4,
    depth=4,
    width=16,
    heads=2,
    text_dim=16,
    text_length=16,
    vocab_size=64,
    output_skip=True,
    qk_norm=True,
)


def random_model(config=TINY, seed=0, dtype=torch.float32):
    """A DiT whose every weight is random, the zero-initialised ones too, so that each input matters."""
    torch.manual_seed(seed)
    model = DiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def random_inputs(config=TINY, batch=2, views=4, dtype=torch.float32):
    """x, t and text that fit the config."""
    torch.manual_seed(1)
    x = torch.randn(batch, views, config.channels, config.image_size, config.image_size, dtype=dtype)
    return x, torch.tensor([7, 903, 400, 650])[:batch], torch.randint(1, 50, (batch, 14))


def script(*command, torchrun=0, env=None, timeout=300):
    """Runs a script of the project in a process of its own; returns the CompletedProcess, output as text."""
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
        if torchrun
        else [sys.executable]
    )
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )


def one_line_error(result, code, *words):
    """Asserts that a script ended with this exit code and one line of error with the words, no traceback."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in last, last
    for word in words:
        assert str(word) in last, last


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with a base model, shifters and a stage-2 model of the toy preset, each trained for two steps."""
    out = tmp_path_factory.mktemp("run")
    done = script(
        "train_stage1.py", "--stage", "base", "--num_base_images", 16, "--steps", 2, "--batch", 4, "--out", out,
        "--picture_steps", 1,
    )
    assert done.returncode == 0, done.stderr
    done = script("train_stage2.py", "--out", out, *TINY_STAGE2)
    assert done.returncode == 0, done.stderr
    return out


TINY_STAGE2 = (
    "--num_assets",
    4,
    "--real_steps",
    2,
    "--steps",
    3,
    "--batch",
    1,
    "--stage1_steps",
    2,
    "--real_warmup",
    1,
    "--log_every",
    1,
    "--picture_steps",
    1,
)
