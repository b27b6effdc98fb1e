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
    refuses(fid_benchmark, ("--rounds", 0), 2, "--rounds: 0 does not lie in [1, 10000]")
