"""A script that starts itself again: what the processes share, and how one of them ends the others."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = """
import argparse, os, signal, sys, time, torch
from support.beside import end_beside, with_others
from support.launch import launch, run_cli

signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs ignore it
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ends")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    second = os.environ.get("RANK") == "1"
    end_beside()
    if second and args.ends == "early":
        raise ValueError("no room")
    launched = launch(args.threads) if second else with_others(2, 1)
    total = torch.tensor(launched.rank + 1)
    torch.distributed.all_reduce(total)
    pids = torch.tensor([0, 0])
    pids[launched.rank] = os.getpid()
    torch.distributed.all_reduce(pids)
    print(launched.device, launched.world, int(total), args.threads, int(pids[1]), flush=True)
    if second and args.ends == "late":
        os._exit(9)
    if second and args.ends == "full":
        raise OSError("cannot write state: no space left")
    if args.ends == "waits":
        time.sleep(60)
    torch.distributed.barrier()
run_cli(main)
"""


def start(tmp_path, ends):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen([sys.executable, tmp_path / "script.py", ends], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("ends, code, said", [
    ("not", 0, ""), ("late", 1, "another process has ended"),
    ("late", 1, "the process beside this one ended with: 9"),
    ("full", 1, "the process beside this one ended with: error: cannot write state: no space left"),
    ("early", 1, "a second process did not start (error: no room): train in one, with --threads")])
def test_a_script_starts_itself_again_and_joins(tmp_path, ends, code, said):
    """Rank 1 is silent and in the sum; where it ends, rank 0 ends in one line."""
    process = start(tmp_path, ends)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and said in err
    assert out.startswith("cpu 2 3 None " if ends != "early" else "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_second_process_ends_with_the_first(tmp_path, number):
    process = start(tmp_path, "waits")
    second = int(process.stdout.readline().split()[-1])
    os.kill(second, signal.SIGINT)                          # as Ctrl-C in a terminal, which the first one decides on
    process.send_signal(number)
    process.communicate(timeout=60)
    for _ in range(100):
        try:
            os.kill(second, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the second process is still there")
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
