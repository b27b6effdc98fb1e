"""The paper's claims (Sec. 5) against the tables in results/, each confirmed, not confirmed, or within the noise.

    python -m experiments.findings

Reads what `python -m experiments.tables` wrote, prints a table and writes it to results/findings.md. Of a table of one
seed there is no noise to hold a difference against (`difference`): then it only says whether the sign is the paper's.
"""
import argparse
import os
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from evaluate import DIGITS, formatted
from experiments.results import comparable, seed_mean, stored_table, trained_rows
from support.files import write_text
from support.launch import run_cli


class Finding(NamedTuple):
    """A claim of the paper: one row of a table has less of a measure than another."""
    claim: str
    table: str
    measure: str
    low: str                # label of the row that should have less of it
    high: str


MEASURED = """Columns of table1.md to table3.md, means over the seeds that both rows have: KD_I (x1000; less: more
realistic), psnr (dB; more: views agree), iou (silhouettes). By chance at most: what two rows differ by in 95 of 100
cases where nothing sets them apart. The verdict is by a fit to all seeds of all rows of the table, by which two rows
may differ a little otherwise than by their means."""
FINDINGS = [Finding(*row) for row in (
    ("renders alone forget realism",               "table1", "KD_I", "Realiz3D", "syn only"),
    ("mixing in real data softens that",           "table1", "KD_I", "syn + real", "syn only"),
    ("... and only softens it",                    "table1", "KD_I", "Realiz3D", "syn + real"),
    ("two stages are more realistic than joint",   "table2", "KD_I", "3 real data", "1 joint"),
    ("real data in stage 2 gives realism",         "table2", "KD_I", "3 real data", "2 no real data"),
    ("... and costs consistency",                  "table2", "psnr", "3 real data", "2 no real data"),
    ("reassignment wins consistency back",         "table2", "psnr", "3 real data", "5 = 3 + reassignment"),
    ("layer-aware training wins more back",        "table2", "psnr", "5 = 3 + reassignment", "7 = 5 + freezing"),
    ("shifted sampling wins more back",            "table2", "psnr", "7 = 5 + freezing", "8 = 7, shifted"),
    ("... without the two as well",                "table2", "psnr", "3 real data", "4 = 3, shifted"),
    ("shifted, the two still win consistency",     "table2", "psnr", "4 = 3, shifted", "8 = 7, shifted"),
    ("... and silhouettes (ours, exact control)",  "table2", "iou",  "4 = 3, shifted", "8 = 7, shifted"),
    ("real data costs silhouettes (ours)",         "table2", "iou",  "3 real data", "2 no real data"),
    ("Realiz3D is more realistic than no real data", "table2", "KD_I", "8 = 7, shifted", "2 no real data"),
    ("text task: renders alone forget realism",    "table3", "KD_I", "Realiz3D", "syn only"),
    ("... and mixing in real data only softens it", "table3", "KD_I", "Realiz3D", "syn + real"),
)]


def read_tables(folder):
    """{table: {label: row}} of the tables in a folder. Raises FileNotFoundError where Table 1 or 2 is missing."""
    tables = {}
    for name in ("table1", "table2", "table3"):
        path = f"{folder}/{name}.json"
        if os.path.isfile(path):
            _, tables[name] = stored_table(path)
        elif name != "table3":
            raise FileNotFoundError(f"no {path} yet: python -m experiments.tables {name} makes it")
    return tables


def difference(rows, what, low, high):
    """How much more of a measure the row `high` has than the row `low`, and the most that chance gives in 95 of 100
    cases (Student's t; noise and training, not other objects): None where too few have a second seed to tell.

    Rows of a seed have much in common: sets, noise, order of the data, often stage 1. So value = row + seed is fitted
    by least squares to a row of each training, and what is left is chance. Rows that are one model, sampled in two ways
    (`blocks`), are held against other such rows instead: value = row + model.
    """
    cells = blocks(rows, what, low, high)
    columns = list(dict.fromkeys(name for label, block, _ in cells for name in (label, block)))
    design = np.array([[name in (label, block) for name in columns] for label, block, _ in cells], dtype=float)
    values, contrast = np.array([value for _, _, value in cells]), np.zeros(len(columns))
    contrast[columns.index(low)], contrast[columns.index(high)] = -1, 1
    inverse = np.linalg.pinv(design)
    effects, left = inverse @ values, len(cells) - np.linalg.matrix_rank(design)
    gain = float(contrast @ effects)
    if left == 0 or not np.allclose(contrast @ inverse @ design, contrast):             # no seed in common
        return gain, None
    deviation = np.sqrt(np.square(values - design @ effects).sum() / left) * np.linalg.norm(contrast @ inverse)
    return gain, float(t.ppf(0.975, left) * deviation)


def blocks(rows, what, low, high):
    """What a difference of two rows is judged by: [(row, block, value)], the block being what such rows share, a seed
    or, where both rows are of one training (equal flags), a model."""
    trainings = {}
    for label, row in rows.items():
        trainings.setdefault(row["flags"], []).append(label)
    one_model = rows[low]["flags"] == rows[high]["flags"]
    cells = []
    for flags, labels in trainings.items():
        if one_model:
            labels = labels if len(labels) > 1 else []
        else:
            labels = [label for label in labels if label in (low, high)] or labels[:1]
        for label in labels:
            cells += [(label, (flags if one_model else "", seed), toy[what])
                      for seed, toy in rows[label]["toy"].items() if toy.get(what) is not None]
    return cells


def verdict(gain, chance):
    """A difference that should be positive, against the most that chance gives, None where that is not known."""
    if chance is None:
        return "one seed: agrees" if gain > 0 else "one seed: does not agree"
    if gain > chance:
        return "confirmed"
    return "not confirmed" if gain < -chance else "within the noise"


def finding_line(finding, rows):
    """A claim with the toy's numbers as a line of Markdown."""
    claim, name, what, low, high = finding
    digits = DIGITS[what]
    both = comparable({label: rows[label] for label in (low, high) if label in rows})
    a, b = [seed_mean(both[label], what) if label in both else None for label in (low, high)]
    numbers = f"{low}: {formatted(a, digits)} | {high}: {formatted(b, digits)}"
    if a is None or b is None:
        return f"| {claim} | {what} | {numbers} | | not measured yet |"
    gain, chance = difference(trained_rows(rows), what, low, high)
    return f"| {claim} | {what} | {numbers} | {formatted(chance, digits)} | {verdict(gain, chance)} |"


def baselines_line(name, rows):
    """Which methods beat Realiz3D both in realism and in consistency, perhaps: are not clearly behind in either, as a
    line of Markdown."""
    claim, clearly, perhaps, known = f"no baseline beats Realiz3D on both axes ({name})", [], [], []
    rows = {label: row for label, row in trained_rows(rows).items()
            if seed_mean(row, "KD_I") is not None and seed_mean(row, "psnr") is not None}
    if "Realiz3D" not in rows or len(rows) == 1:
        return f"| {claim} | KD_I, psnr | | | | not measured yet |"
    for label in rows:
        if label == "Realiz3D":
            continue
        gains = [difference(rows, "KD_I", label, "Realiz3D"), difference(rows, "psnr", "Realiz3D", label)]
        verdicts = {verdict(*gain) for gain in gains}
        known += [chance is not None for _, chance in gains]
        if verdicts <= {"confirmed", "one seed: agrees"}:
            clearly.append(label)
        elif not verdicts & {"not confirmed", "one seed: does not agree"}:
            perhaps.append(f"{label} (perhaps)")
    outcome = "confirmed" if all(known) else "one seed: agrees"
    if clearly:
        outcome = "not confirmed" if all(known) else "one seed: does not agree"
    elif perhaps:
        outcome = "within the noise"
    return f"| {claim} | KD_I, psnr | | {', '.join(clearly + perhaps) or 'none'} | | {outcome} |"


def findings_lines(tables):
    """Each claim as a line of Markdown: confirmed where the difference has the right sign and is more than chance."""
    lines = ["| the paper's finding | measured | should be less | should be more | by chance at most | verdict |",
             "|---|---|---|---|---|---|"]
    lines += [finding_line(finding, tables[finding.table]) for finding in FINDINGS if finding.table in tables]
    return lines + [baselines_line(name, tables[name]) for name in ("table1", "table3") if name in tables]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results", help="where the tables are (default %(default)s)")
    args = parser.parse_args(argv)
    lines = "\n".join(findings_lines(read_tables(args.results)))
    print(lines)
    write_text(f"{args.results}/findings.md", "# The paper's findings on the toy (python -m experiments.findings)\n\n"
               f"{MEASURED}\n\n{lines}\n")


if __name__ == "__main__":
    run_cli(main)
