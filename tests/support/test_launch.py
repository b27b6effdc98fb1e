"""How a program starts and how it ends: what is refused, and errors in one line."""

import pytest
import torch

from support.launch import Launched, UsageError, launch, on_rank_0_first, refuse_empty, run_cli


def test_launch_names_a_process_without_a_gpu_and_a_thread_count_of_none(monkeypatch):
    with pytest.raises(ValueError, match="--threads must lie in .1, 1024., not -1"):
        launch(-1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this node has no GPU: --nproc_per_node must be at most 1"):
        launch()


@pytest.mark.parametrize("error, code", [
    (ValueError("bad word"), "error: bad word"), (FileNotFoundError("no such file: a"), "error: no such file: a"),
    (FloatingPointError("not finite"), "error: not finite"), (KeyboardInterrupt(), 130),
    (torch.distributed.DistNetworkError("timed out"),
     "error: no connection to the other processes (MASTER_ADDR, MASTER_PORT): timed out")])
def test_bad_input_ends_in_one_line_and_ctrl_c_with_its_code(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == code  # a string: Python prints it and exits with 1


def test_an_empty_word_is_named_by_the_one_before_it():
    for words, before in (["--out", ""], "--out"), (["folders", "a", "", "--out", "b"], "a"), ([""], "the program's"):
        with pytest.raises(UsageError, match=f"an empty word follows {before}"):
            refuse_empty(words)
    refuse_empty(["--out", "there", "--prompt", "a", ""])
    with pytest.raises(UsageError, match="follows --out"):
        refuse_empty(["--prompt", "", "--out", ""])


def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_cli(lambda: {}["a"])
    with pytest.raises(RuntimeError, match="size"):
        run_cli(lambda: torch.ones(2) @ torch.ones(3))


def test_rank_0_makes_what_the_others_read(monkeypatch):
    order = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("barrier"))
    for rank in (0, 1):
        made = on_rank_0_first(Launched(torch.device("cpu"), rank, 2), lambda: order.append(rank) or rank)
        assert made == rank
    assert order == [0, "barrier", "barrier", 1]
