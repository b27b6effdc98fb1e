"""How to compute on this machine: precision and threads of a CPU, chosen by timing a little of the work.

Two threads of which one shares its core with another program can be a hundred times slower than one, and bf16 is
several times faster on some processors and slower on others, so neither has a good default.
"""
import math
import os
import shutil
import sys
import time

import torch
import torch.nn.functional as F

# read when something is first compiled: tanh by the exponential, a compiled step takes 5 % less
os.environ.setdefault("TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH", "1")
CPU_DTYPES = ("float32", "bfloat16")
MOST_THREADS = torch.get_num_threads()      # that PyTorch would take: OMP_NUM_THREADS, torchrun's 1, or all cores
HOPELESS = 3            # a first call so many times slower than the best is not repeated, nor are as many threads


def wait_for(device):
    """Waits for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work, device):
    """How long work() takes, device included."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def autocast(device, dtype):
    """The context of a --dtype: bf16 autocast, or none for "float32" (and None, where nobody has chosen)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def has_compiler():
    """Whether there is the C++ compiler that torch.compile looks for, to compile for a CPU."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def compile_blocks(blocks):
    """torch.compile for each of a network's blocks. What cannot be compiled runs as it is, and says so."""
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.skip_nnmodule_hook_guards = False      # else a model runs with the adapters of the one before
    for block in blocks:
        block.compile(dynamic=False)


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d / h)) v: q (B, heads, N, d / h), k and v (B, heads, M, d / h). mask: True = attend,
    or what is added to the logits.

    PyTorch's kernel, except to train in bf16 on a CPU: its backward pass is slow there, with the formula a step takes
    half the time, on Intel's and AMD's.
    """
    if v.device.type != "cpu" or v.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)                                         # (B, heads, N, M)
    if mask is not None:
        logits = logits.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ v                                                                   # (B, heads, N, d/h)


def time_choices(work, counts, dtypes=("float32",)):
    """{(threads, dtype): least seconds of work() on the CPU}; the number of threads stays at the last tried."""
    cpu, seconds = torch.device("cpu"), {}
    for threads in counts:
        torch.set_num_threads(threads)
        for dtype in dtypes:
            best, times = min(seconds.values(), default=math.inf), []
            with autocast(cpu, dtype):
                while len(times) < 3 and min(times, default=0) <= HOPELESS * best:          # the first call warms up
                    times.append(seconds_of(work, cpu))
            seconds[threads, dtype] = min(times)
            if len(times) == 1:
                break
    return seconds


def promising_dtypes():
    """Those of CPU_DTYPES that are worth a trial: bf16 where a small product does not take ten times as long in it. On
    a CPU without instructions for bf16 it takes thirty times as long, and a trial of that would take minutes."""
    cpu, x, weight, seconds = torch.device("cpu"), torch.randn(64, 192), torch.randn(192, 768), {}
    for dtype in CPU_DTYPES:
        with autocast(cpu, dtype):
            seconds[dtype] = min(seconds_of(lambda: x @ weight, cpu) for _ in range(5))
    return [dtype for dtype, took in seconds.items() if took < 10 * min(seconds.values())]


def thread_counts():
    """1, 2, 4, .. and MOST_THREADS."""
    return [2 ** k for k in range(MOST_THREADS.bit_length()) if 2 ** k < MOST_THREADS] + [MOST_THREADS]


def choose_threads(device):
    """How many threads are fastest at what a block does to 16 images of 64 tokens; all of them beside a GPU."""
    counts = thread_counts() if device.type == "cpu" else [MOST_THREADS]
    if len(counts) == 1:
        return counts[0]
    seconds = time_choices(block_work(), counts)
    return min(seconds, key=seconds.get)[0]


def choose_dtype(device):
    """In which precision that is fastest, with the threads there are; None where there is no choice (on a GPU)."""
    if device.type != "cpu":
        return None
    seconds = time_choices(block_work(), [torch.get_num_threads()], promising_dtypes())
    return min(seconds, key=seconds.get)[1]


def block_work():
    """work(), for `time_choices`: a few times what a block does to 16 images of 64 tokens."""
    x, weight = torch.randn(1024, 192), torch.randn(192, 768)

    def work():
        for _ in range(30):
            F.gelu(x @ weight) @ weight.T
    return work


class Watch:
    """Notices that another program has taken cores: for half a minute, and three steps in a row, each was three times
    slower than the fastest before. (One slow step may have compiled.)"""

    def __init__(self):
        self.fastest, self.slow = math.inf, []

    def calls(self, seconds, images):
        """Takes in how long a step of so many images took; returns whether to look for another number of threads, and
        then begins anew."""
        self.fastest = min(self.fastest, seconds / images)
        self.slow = [*self.slow, seconds] if seconds / images > 3 * self.fastest else []
        called = len(self.slow) >= 3 and sum(self.slow) > 30
        if called:
            self.__init__()
        return called


def choose_speed(work, images, device, threads=None, dtype=None):
    """Takes the number of threads and the precision, of those that are open (None), with which work() is fastest.

    work(): a little of what the program will do, `images` images. Sets the number of threads. Returns (dtype, seconds
    an image, what to say of it). Only a CPU leaves a choice: CUDA computes in bf16, MPS in fp32.
    """
    if device.type != "cpu":
        dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        with autocast(device, dtype):
            times = [seconds_of(work, device) for _ in range(3)]                # the first two warm up
        return dtype, times[-1] / images, ""
    seconds = time_choices(work, [threads] if threads else thread_counts(), [dtype] if dtype else promising_dtypes())
    threads, dtype = min(seconds, key=seconds.get)
    torch.set_num_threads(threads)
    others = ", ".join(f"{name} x {count}: {images / took:.0f}" for (count, name), took in seconds.items()
                       if (count, name) != (threads, dtype))
    said = f"{dtype} with {threads} thread(s), {images / seconds[threads, dtype]:.0f} images/s"
    return dtype, seconds[threads, dtype] / images, f"fastest here: {said} ({others})" if others else ""
