"""The paper's claims against the noise between seeds."""

import numpy as np
import pytest
from conftest import ROOT

from experiments import findings
from experiments.paper import PAPER_COLUMNS, TABLES
from support.files import write_json


def some_results(**values):
    """A table of rows with these (KD_I, psnr), a tuple of pairs for several seeds."""
    rows = {}
    for label, pairs in values.items():
        pairs = pairs if isinstance(pairs[0], tuple) else (pairs,)
        toy = {str(seed): dict(KD_I=kd, psnr=psnr, iou=0.9) for seed, (kd, psnr) in enumerate(pairs)}
        paper = dict.fromkeys(PAPER_COLUMNS, 1.0) | dict(PSNR=float(len(rows)), KID_I=-float(len(rows)))
        rows[label] = dict(paper=paper, toy=toy, flags=label)
    return rows


def test_findings_hold_against_the_noise(tmp_path, capsys):
    """Differences that are more than chance are confirmed or not, smaller ones are neither."""
    for name, (_, rows) in TABLES.items():
        values = {row.label: ((500.0, 20.0), (503.0, 20.1)) for row in rows}
        values |= {"syn only": ((1000.0, 21.0), (1020.0, 21.0)), "syn + real": ((1008.0, 21.0), (1011.0, 21.0))}
        values |= {"Realiz3D": ((100.0, 22.0), (103.0, 22.1))}
        values |= {"3 real data": ((100.0, 20.0), (113.0, 20.2)), "2 no real data": ((50.0, 21.0), (53.0, 21.1))}
        results = {label: row for label, row in some_results(**values).items()}
        if name == "table3":
            results["LoRA 32"] = some_results(x=((50.0, 23.0), (53.0, 23.1)))["x"]
        write_json(f"{tmp_path}/{name}.json", dict(settings={}, rows=results))
    findings.main(["--results", str(tmp_path)])
    verdicts = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert verdicts[:3] == ["confirmed", "within the noise", "confirmed"]
    assert verdicts[4:6] == ["not confirmed", "confirmed"] and verdicts[14:] == ["confirmed"] * 3 + ["not confirmed"]
    assert verdicts[10:14] == ["within the noise"] * 3 + ["not confirmed"]
    assert (tmp_path / "findings.md").exists()
    with pytest.raises(FileNotFoundError, match="python -m experiments.tables table1 makes it"):
        findings.main(["--results", str(tmp_path / "none")])


@pytest.mark.skipif(not (ROOT / "results" / "findings.md").exists(), reason="findings need two seeds of Tables 1 and 2")
def test_the_committed_findings_are_those_of_the_committed_tables():
    written = (ROOT / "results" / "findings.md").read_text().split("\n\n", 2)[2]
    assert findings.findings_lines(findings.read_tables(ROOT / "results")) == written.splitlines()


def test_a_difference_is_held_against_what_chance_leaves_of_the_table():
    """Against the two-way analysis of variance by hand: a seed that lifts all rows is no noise."""
    table = np.array([[1.0, 3.5, 2.0], [4.0, 7.0, 4.5], [9.0, 11.0, 10.5], [2.0, 4.0, 4.0]])
    rows = some_results(**{label: tuple((value, 20.0) for value in row) for label, row in zip("abcd", table)})
    chance = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    mean, most = findings.difference(rows, "KD_I", "a", "c")
    assert mean == pytest.approx(table[2].mean() - table[0].mean())
    assert most == pytest.approx(2.4469 * np.sqrt((chance**2).sum() / 6 * 2 / 3), rel=1e-4)     # of 6 degrees of freedom
    # a row that lacks the seed that lifts all rows by 2 to 3 is compared within the seeds that it has
    del rows["a"]["toy"]["1"]
    both = findings.difference(rows, "KD_I", "a", "c")[0]
    assert table[2].mean() - table[0, ::2].mean() > both + 0.3
    assert abs(both - (table[2, ::2].mean() - table[0, ::2].mean())) < 0.3
    # of two rows that are one model, sampled in two ways, the other such pairs are the measure
    rows = some_results(**{label: tuple((value, 20.0) for value in row) for label, row in zip("abcd", table)})
    for one, other in ("ab", "cd"):
        rows[other]["flags"] = rows[one]["flags"]
    gains = np.stack([table[1] - table[0], table[3] - table[2]])                # (pairs, seeds)
    mean, most = findings.difference(rows, "KD_I", "a", "b")
    chance = np.sqrt(((gains - gains.mean(1, keepdims=True))**2).sum() / 4)
    assert mean == pytest.approx(gains[0].mean()) and most == pytest.approx(2.7764 * chance / np.sqrt(3), rel=1e-4)
    # and of two trainings a row each: d, the second of c, says nothing more about chance
    rows["d"]["toy"] = {"0": dict(KD_I=1e6), "1": dict(KD_I=-1e6)}
    assert findings.difference(rows, "KD_I", "a", "c")[1] < 10
    rows["a"]["toy"], rows["c"]["toy"] = {"0": dict(KD_I=1.0)}, {"1": dict(KD_I=1.0)}
    assert findings.difference(rows, "KD_I", "a", "c")[1] is None               # no seed in common


def test_what_is_not_measured_or_has_one_seed_is_said():
    claim = findings.Finding("claim", "table1", "KD_I", "a", "b")
    rows = some_results(a=((1.0, 5.0), (3.0, 5.5)), b=((4.0, 6.0), (4.5, 6.0)))
    assert findings.finding_line(claim, rows).endswith("within the noise |")
    rows["b"]["toy"] = {}
    assert findings.finding_line(claim, rows).endswith("| a: 2 | b: - | | not measured yet |")
    assert findings.baselines_line("table3", rows).endswith("not measured yet |")
    for low, said in ((1.0, "agrees"), (9.0, "does not agree")):
        line = findings.finding_line(claim, some_results(a=(low, 5.0), b=(4.0, 6.0)))
        assert line.endswith(f"| one seed: {said} |")


def test_a_baseline_ahead_on_both_axes_is_named():
    ours = {"Realiz3D": ((100.0, 20.0), (102.0, 20.2))}
    for other, outcome in (
        (((50.0, 30.0), (52.1, 30.3)), "| b | | not confirmed |"),
        (((100.0, 20.1), (101.0, 20.4)), "| b (perhaps) | | within the noise |"),
        (((50.0, 19.0), (52.0, 19.2)), "| none | | confirmed |"),
        (((50.0, 19.99), (52.0, 20.25)), "| b (perhaps) | | within the noise |"),
    ):
        assert findings.baselines_line("table1", some_results(**ours, b=other)).endswith(outcome), other
    for other, outcome in (((50.0, 30.0), "does not agree"), ((50.0, 19.0), "agrees")):
        rows = some_results(Realiz3D=(100.0, 20.0), b=other)
        assert findings.baselines_line("table1", rows).endswith(f"one seed: {outcome} |"), other
