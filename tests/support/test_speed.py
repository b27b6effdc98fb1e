"""The choice of threads and precision: a scripted clock, and what must not change while it looks."""
import math

import pytest
import torch

import support.speed
from support.speed import (Watch, attend, autocast, choose_dtype, choose_speed, choose_threads, has_compiler,
                           promising_dtypes, thread_counts, time_choices)

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """clock({(threads, dtype): seconds}): what any work takes from here on; returns the list of choices timed."""
    def start(seconds):
        timed = []

        def seconds_of(work, device):
            dtype = "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"
            timed.append((torch.get_num_threads(), dtype))
            return seconds[timed[-1]]
        monkeypatch.setattr(support.speed, "seconds_of", seconds_of)
        return timed
    before = torch.get_num_threads()
    yield start
    torch.set_num_threads(before)


def test_the_fastest_of_all_choices_is_taken_and_the_others_are_told(clock, monkeypatch):
    monkeypatch.setattr(support.speed, "MOST_THREADS", 2)
    monkeypatch.setattr(support.speed, "CPU_DTYPES", ("float32", "bfloat16"))
    monkeypatch.setattr(support.speed, "thread_counts", thread_counts)
    clock({(1, "float32"): 0.4, (1, "bfloat16"): 0.2, (2, "float32"): 0.32, (2, "bfloat16"): 0.16})
    dtype, seconds, said = choose_speed(None, 16, CPU)
    assert (dtype, seconds, torch.get_num_threads()) == ("bfloat16", 0.01, 2)
    assert said == ("fastest here: bfloat16 with 2 thread(s), 100 images/s "
                    "(float32 x 1: 40, bfloat16 x 1: 80, float32 x 2: 50)")
    assert choose_speed(None, 16, CPU, dtype="float32")[:2] == ("float32", 0.02) and torch.get_num_threads() == 2
    assert choose_speed(None, 16, CPU, threads=1)[:2] == ("bfloat16", 0.0125) and torch.get_num_threads() == 1
    assert choose_speed(None, 16, CPU, 1, "float32") == ("float32", 0.025, "")


def test_what_is_hopeless_is_tried_once_and_with_one_precision(clock):
    timed = clock({(1, "float32"): 1.0, (1, "bfloat16"): 3.1, (2, "float32"): 50.0, (2, "bfloat16"): 0.1})
    seconds = time_choices(None, [1, 2], ("float32", "bfloat16"))
    assert timed == [(1, "float32")] * 3 + [(1, "bfloat16"), (2, "float32")] and (2, "bfloat16") not in seconds


@pytest.mark.parametrize("most, counts", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_thread_counts_are_powers_of_two_and_all(most, counts, monkeypatch):
    monkeypatch.setattr(support.speed, "MOST_THREADS", most)
    assert thread_counts() == counts


def test_threads_for_sampling_are_the_fastest_ones(clock, monkeypatch):
    monkeypatch.setattr(support.speed, "thread_counts", lambda: [1, 2])
    clock({(1, "float32"): 1.0, (2, "float32"): 0.6})
    assert choose_threads(CPU) == 2
    clock({(1, "float32"): 1.0, (2, "float32"): 30.0})
    assert choose_threads(CPU) == 1


def test_precision_for_sampling_is_the_faster_one(clock, monkeypatch):
    monkeypatch.setattr(support.speed, "CPU_DTYPES", ("float32", "bfloat16"))
    torch.set_num_threads(2)
    clock({(2, "float32"): 1.0, (2, "bfloat16"): 0.6})
    assert choose_dtype(CPU) == "bfloat16" and torch.get_num_threads() == 2
    clock({(2, "float32"): 1.0, (2, "bfloat16"): 1.2})
    assert choose_dtype(CPU) == "float32"
    assert choose_dtype(torch.device("cuda")) is None


def test_bf16_is_not_tried_where_a_small_product_in_it_is_hopeless(clock, monkeypatch):
    """Without instructions for bf16 a trial of a training step in it would take minutes."""
    monkeypatch.setattr(support.speed, "CPU_DTYPES", ("float32", "bfloat16"))
    monkeypatch.setattr(support.speed, "thread_counts", lambda: [1, 2])
    torch.set_num_threads(2)
    timed = clock({(2, "float32"): 1.0, (2, "bfloat16"): 30.0, (1, "float32"): 1.5})
    assert promising_dtypes() == ["float32"] and choose_dtype(CPU) == "float32"
    assert choose_speed(None, 16, CPU)[0] == "float32"
    assert timed.count((2, "bfloat16")) == 3 * 5 and (1, "bfloat16") not in timed
    clock({(2, "float32"): 1.0, (2, "bfloat16"): 9.0})
    assert promising_dtypes() == ["float32", "bfloat16"]
    clock({(2, "float32"): 30.0, (2, "bfloat16"): 1.0})
    assert promising_dtypes() == ["bfloat16"]


def test_a_watch_calls_after_half_a_minute_of_steps_three_times_slower():
    watch = Watch()
    assert not any(watch.calls(0.5, 16) for _ in range(100))
    assert not watch.calls(40, 16)                      # a compilation: one step, the next is fast again
    assert not watch.calls(0.5, 16)
    assert [watch.calls(5, 16) for _ in range(7)] == [False] * 6 + [True]
    assert watch.fastest == math.inf and not any(watch.calls(5, 16) for _ in range(100))    # it learns anew
    watch = Watch()
    watch.calls(0.5, 16)
    assert not any(watch.calls(4.4, 48) for _ in range(50))     # more images, not slower


def test_autocast_is_what_the_flag_says():
    x = torch.ones(2, 2)
    for dtype, want in (("bfloat16", torch.bfloat16), ("float32", torch.float32), (None, torch.float32)):
        with autocast(CPU, dtype):
            assert (x @ x).dtype == want


@pytest.mark.parametrize("length", [7, 40])
def test_attention_in_bf16_is_its_formula(length):
    """Against float64, with some text masked: on a CPU this is not PyTorch's kernel, but where nothing trains."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16().requires_grad_() for n in (11, length, length))
    mask = torch.arange(length) < torch.tensor([[3], [length]])[:, None, None]  # (2, 1, 1, length)
    got = attend(q, k, v, mask)
    exact = [z.detach().double().requires_grad_() for z in (q, k, v)]
    logits = torch.einsum("bhnd,bhmd->bhnm", *exact[:2]) / 8**0.5
    weights = logits.exp() * mask
    want = torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), exact[2])
    with torch.no_grad():
        drawn = attend(q, k, v, mask)  # by the kernel
    for out in (got, drawn):
        assert out.dtype == torch.bfloat16 and (out.double() - want).norm() < 0.02 * want.norm()
    got.square().sum().backward()
    want.square().sum().backward()
    for z, other in zip((q, k, v), exact):
        assert (z.grad.double() - other.grad).norm() < 0.02 * other.grad.norm()


def test_a_compiler_is_looked_for_where_pytorch_looks(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert not has_compiler()
    (tmp_path / "g++").write_text("#!/bin/sh")
    (tmp_path / "g++").chmod(0o755)
    assert has_compiler()
