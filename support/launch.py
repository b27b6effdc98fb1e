"""Launching: the same script runs alone or under torchrun, and bad input ends in one line."""
import argparse
import math
import os
import sys
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch

from support.speed import choose_threads

# of tqdm, for shares of images
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"


class Launched(NamedTuple):
    """What `launch` found: the device of this process, its number, and how many there are."""
    device: torch.device
    rank: int = 0
    world: int = 1


def launch(threads=None):
    """Joins torchrun's process group where there is one (NCCL on CUDA, gloo else); returns Launched.

    RANK decides who writes, LOCAL_RANK which GPU is used, so that several nodes work. threads: of the CPU, None = the
    fastest in a short trial.
    """
    ranks = [os.environ.get(name, first) for name, first in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(word.isdecimal() for word in ranks):
        raise ValueError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: they are torchrun's to set, unset "
                         "them to run alone")
    rank, local, world = map(int, ranks)
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}: both are torchrun's to set, unset them to run alone")
    if threads is not None and not 1 <= threads <= 2 ** 10:
        raise UsageError(f"--threads must lie in [1, {2 ** 10}], not {threads}")
    # under bf16 autocast RMSNorm keeps its weight in fp32, which is what we want, and says so at length
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # the word for it that torch 2.13 wants is not known to torch 2.11
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device(f"cuda:{local}")
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this node has no GPU: --nproc_per_node must be at most "
                             f"{torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")              # what is not in bf16 takes TF32: some times as fast
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    torch.set_num_threads(threads or choose_threads(device))
    if world > 1 and not torch.distributed.is_initialized():
        on_cuda = device.type == "cuda"
        # two hours: ranks that encode or draw a set work alone and meet at its end, some of them early
        torch.distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=2),
                                             device_id=device if on_cuda else None)
    return Launched(device, rank, world)


def finite(text):
    """The type of a flag that takes a number, but not nan or inf; argparse puts the flag's name before the message."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def within(low, high, kind=int):
    """The type of a flag that takes a number in [low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie in [{low}, {high}]")
        return value
    number.__name__ = kind.__name__             # what argparse calls it where it is no number at all
    return number


# of --seed, --threads and --num_steps, everywhere
a_seed, some_threads, some_steps = within(0, 2 ** 63 - 1), within(1, 2 ** 10), within(1, 1000)


class UsageError(ValueError):
    """A flag's value that is not allowed."""


def check_out(path, flag="--out"):
    """Raises UsageError where no file can be written at path, a flag's value: a folder or a device, below a file, or a
    name that is too long."""
    parent = os.path.dirname(path) or "."
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent) or "."
    is_other = os.path.lexists(path) and not os.path.isfile(path)
    too_long = any(len(name.encode()) > 200 for name in path.split("/"))        # what is written first ends in .PID.tmp
    if not os.path.basename(path).strip() or is_other or too_long or not os.path.isdir(parent):
        raise UsageError(f"{flag} '{path}' must be the name of a file, and is none, a folder or below a file")


def check_picture(out):
    """`check_out` of a picture, --out with or without its .png, and of the numbers that stand beside it, .json."""
    stem = out.removesuffix(".png")
    for path in (out, f"{stem}.png", f"{stem}.json"):
        check_out(path)


def refuse_empty(words):
    """Raises UsageError at an empty word on the command line, as a shell's unset variable leaves; a --prompt may be."""
    before, flag = "the program's name", ""
    for word in words:
        flag = word if word.startswith("--") else flag
        if word == "" and flag != "--prompt":
            raise UsageError(f"an empty word follows {before}: give it a value, or leave the flag out")
        before = word


def run_cli(main):
    """Runs a script's main(): bad input ends in one line, never in a traceback: a flag's with exit code 2, as of
    argparse, any other with 1."""
    try:
        refuse_empty(sys.argv[1:])
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")         # sys.exit prints a string to stderr and exits with 1
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        # of what PyTorch raises on a CPU only the words tell that memory is short
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            sys.exit("error: out of memory: use a smaller --batch, --num or size")
        if isinstance(error, (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)):
            sys.exit(f"error: no connection to the other processes (MASTER_ADDR, MASTER_PORT): {error}")
        if "gloo" not in str(error):                        # whose connection to another process has closed
            raise
        sys.exit("error: another process has ended; where this was a training, the same command goes on from its last "
                 "state")
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def barrier(launched):
    """Waits for all processes, where there are several."""
    if launched.world > 1:
        torch.distributed.barrier()


def on_rank_0_first(launched, make):
    """make() on rank 0, which writes the cached file, then on the others, which read it."""
    if launched.rank == 0:
        made = make()
    barrier(launched)
    return made if launched.rank == 0 else make()


def peak_memory(device):
    """Peak memory of this process in GiB: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource                         # not on Windows, where nothing else is missing
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
