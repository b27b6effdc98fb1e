"""The benchmark of our own kernels."""

import pytest
from conftest import refuses

from experiments import fid_benchmark


def test_fid_benchmark_agrees_on_the_value(capsys):
    fid_benchmark.main("--num 60 --width 24 --rounds 1".split())
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "of the time" in line)
    values = [float(part.split(")")[0]) for part in line.split("(")[1:]]
    assert values[0] == pytest.approx(values[1], abs=2e-6) and values[0] > 1 and "rasteriser: " in out


@pytest.mark.parametrize("flag, value, allowed", [("--rounds", 0, "[1, 10000]"), ("--num", 10 ** 5, "[2, 50000]"),
                                                  ("--width", 10 ** 5, "[1, 2048]")])
def test_what_fits_no_memory_is_refused(flag, value, allowed, monkeypatch):
    monkeypatch.setattr(fid_benchmark, "benchmark_fid", None)
    refuses(fid_benchmark, (flag, value), 2, f"{flag}: {value} does not lie in {allowed}")
