"""Runs a script's main() as test_latents.py has it, the preset full tiny and the encoders stand-ins: a process to kill.

python tests/latents_worker.py MODULE [its flags]
"""

import importlib
import sys
import time

import test_latents  # also puts the project on the path

import data
from dit import PRESETS, run_cli

if __name__ == "__main__":
    PRESETS["full"] = test_latents.CONFIG
    data.load_text_encoder = test_latents.stand_in_text_encoder
    encode, decode = test_latents.stand_in_vae("")
    data.load_vae = lambda folder, device: (lambda images: time.sleep(0.05) or encode(images), decode)  # takes its time
    module, sys.argv = importlib.import_module(sys.argv[1]), sys.argv[1:]
    run_cli(module.main)
