"""Runs a program's main() as the tests here do, the preset full tiny, the encoders stand-ins: a process to kill.

python tests/full/latents_worker.py full.latents encode [its flags]
"""

import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # conftest.py, which puts the project on the path

import full_stand_ins  # noqa: E402

from dit import PRESETS  # noqa: E402
from support.launch import run_cli  # noqa: E402


def slow_vae(folder, device):
    """The stand-in, but it takes its time."""
    encode, decode = full_stand_ins.stand_in_vae(folder)

    def encode_slowly(images):
        time.sleep(0.05)
        return encode(images)

    return encode_slowly, decode


if __name__ == "__main__":
    PRESETS["full"] = full_stand_ins.CONFIG
    full_stand_ins.use_stand_ins(setattr, vae=slow_vae)
    program = importlib.import_module(sys.argv[1])
    run_cli(lambda: program.main(sys.argv[2:]))
