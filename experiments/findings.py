"""The paper's claims (Sec. 5) against the tables in results/, each confirmed, not confirmed, or within the noise.

    python -m experiments.findings

Reads what `python -m experiments.tables` wrote, prints a table and writes it to results/findings.md. Of a table of one
seed there is no noise to hold a difference against: then it only says whether the sign is the paper's.
"""
import argparse
import os
from typing import NamedTuple

import numpy as np

from evaluate import DIGITS, formatted
from experiments.results import seed_mean, seed_noise, stored_table, trained_rows
from support.files import write_text
from support.launch import run_cli


class Finding(NamedTuple):
    """A claim of the paper: one row of a table has less of a measure than another."""
    claim: str
    table: str
    measure: str
    low: str                # label of the row that should have less of it
    high: str


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


def difference_noise(rows, what, a, b):
    """Standard deviation that the noise between seeds gives the difference of two rows' means; None: no two seeds."""
    noise = seed_noise(rows, what)
    if noise is None:
        return None
    return float(noise * np.sqrt(1 / len(rows[a]["toy"]) + 1 / len(rows[b]["toy"])))


def verdict(difference, noise):
    """A difference that should be positive, against the noise that it has, None where that is not known."""
    if noise is None:
        return "one seed: agrees" if difference > 0 else "one seed: does not agree"
    if difference > 2 * noise:
        return "confirmed"
    return "not confirmed" if difference < -2 * noise else "within the noise"


def finding_line(finding, rows):
    """A claim with the toy's numbers as a line of Markdown."""
    claim, name, what, low, high = finding
    digits = DIGITS[what]
    a, b = [seed_mean(rows[label], what) if label in rows else None for label in (low, high)]
    numbers = f"{low}: {formatted(a, digits)} | {high}: {formatted(b, digits)}"
    if a is None or b is None:
        return f"| {claim} | {what} | {numbers} | | not measured yet |"
    noise = difference_noise(rows, what, low, high)
    return f"| {claim} | {what} | {numbers} | {formatted(noise, digits)} | {verdict(b - a, noise)} |"


def baselines_line(name, rows):
    """Which methods beat Realiz3D both in realism and in consistency, as a line of Markdown."""
    rows, claim = trained_rows(rows), f"no baseline beats Realiz3D on both axes ({name})"
    if "Realiz3D" not in rows:
        return f"| {claim} | KD_I, psnr | | | | not measured yet |"
    clearly, perhaps, known = [], [], seed_noise(rows, "KD_I") is not None
    for label in rows:
        gains = []                                                                  # over Realiz3D: verdicts on each
        for what, sign in (("KD_I", -1), ("psnr", 1)):
            gain = sign * (seed_mean(rows[label], what) - seed_mean(rows["Realiz3D"], what))
            gains.append((gain > 0, verdict(gain, difference_noise(rows, what, label, "Realiz3D")) == "confirmed"))
        if all(sure for _, sure in gains):
            clearly.append(label)
        elif all(ahead for ahead, _ in gains):
            perhaps.append(f"{label} (perhaps)")
    if clearly:
        outcome = "not confirmed"
    elif perhaps:
        outcome = "within the noise" if known else "one seed: does not agree"
    else:
        outcome = "confirmed" if known else "one seed: agrees"
    return f"| {claim} | KD_I, psnr | | {', '.join(clearly + perhaps) or 'none'} | | {outcome} |"


def findings_lines(tables):
    """Each claim as a line of Markdown: confirmed where the difference has the right sign and exceeds twice its noise,
    the noise between seeds."""
    lines = ["| the paper's finding | measured | should be less | should be more | noise of the difference | verdict |",
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
               f"{lines}\n")


if __name__ == "__main__":
    run_cli(main)
