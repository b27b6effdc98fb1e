"""What the tables have in common: their files, the flags that train their rows, and what is printed of them, {label:
row}, means and deviations over seeds, beside the paper's numbers.

A row is a dict: "paper" {column: number}, "flags" and "mode" (experiments/paper.py), "toy" {seed: {measure: number}}.
"""
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch
from scipy.stats import spearmanr

from evaluate import DIGITS, formatted, measured_settings
from experiments.paper import PAPER_COLUMNS
from support.files import locked, read_json, write_text
from support.launch import check_out
from support.pictures import draw_points, save_image, side_by_side

ORACLE = "perfect photos (oracle)"                                      # a row of every table: the best there is
WORDS = ("commit", "device", "trained", "dtype")        # among a seed's measures, no numbers: the last two are the
                                                        # precisions that it was trained and sampled in

# ---------------------------------------------------------------------------------------------------------------------
# Files and flags


def check_places(args, name, *endings):
    """Raises UsageError where --results takes no file of this name with one of the endings, or --folder no sets."""
    for ending in endings:
        check_out(f"{args.results}/{name}{ending}", "--results")
    check_out(f"{args.folder}/sets/{name}", "--folder")


def seed_folder(args):
    """Where the models of --seed go: --folder itself for seed 0; for others a folder in it, which shares its sets."""
    if args.seed == 0:
        return args.folder
    out = f"{args.folder}/seed{args.seed}"
    with locked(out):
        if not os.path.exists(f"{out}/sets"):
            os.symlink(os.path.abspath(f"{args.folder}/sets"), f"{out}/sets")
    return out


def check_row_flags(parser, text, of_the_rows, parse):
    """Ends with a line of usage at words of --train_flags, `text`, that are in of_the_rows or that parse(words), of the
    program that they are for, refuses; it must not take flags that are cut short (allow_abbrev)."""
    words, said = text.split(), io.StringIO()
    own = of_the_rows & {word.partition("=")[0] for word in words}
    if own:
        parser.error(f"--train_flags must not name {', '.join(sorted(own))}: the rows and this command's flags do")
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parse(words)
    except (SystemExit, ValueError) as error:
        parser.error(f"--train_flags '{text}': {said.getvalue().strip().split('error: ')[-1] or error}")


def kept_rows(path, settings_of, args, labels=None):
    """The rows of a results file, {} where there is none. Raises ValueError where it is no such file, was made with
    other settings than settings_of(args), the flags that decide the numbers, or holds a row that is not in labels."""
    if not os.path.isfile(path):
        return {}
    was, rows = stored_table(path)
    now = json.loads(json.dumps(settings_of(args)))
    other = [f"--{name} {was.get(name)} (now {value})" for name, value in now.items() if was.get(name) != value]
    other += [] if labels is None else [f"a row {label!r}" for label in rows if label not in labels]
    if other:
        raise ValueError(f"{path} was made with {', '.join(other)}: name another folder with --results")
    return rows


def stored_table(path):
    """(settings, rows) of a results file. Raises ValueError where it is none."""
    stored = read_json(path)
    if not is_table(stored):
        raise ValueError(f"{path} is no file of results: delete it, or name another folder with --results")
    return stored["settings"], stored["rows"]


def is_table(stored):
    """Whether this is {"settings": {..}, "rows": {label: {"toy": {seed: {measure: number or None}}, ..}}}."""
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part), dict) for part in ("settings", "rows")):
        return False
    for row in stored["rows"].values():
        seeds = row.get("toy") if isinstance(row, dict) else None
        if not isinstance(seeds, dict) or not all(isinstance(measures, dict) for measures in seeds.values()):
            return False
        values = [value for measures in seeds.values() for name, value in measures.items() if name not in WORDS]
        if not all(value is None or isinstance(value, (int, float)) and abs(value) < 1e100 for value in values):
            return False
    return True


def table_rows(rows, stored):
    """The rows of a results file before this run: {label: dict of what makes it, the paper's numbers, the toy's}.

    Raises ValueError where it holds a row of another table or version, which would be lost, or one made otherwise.
    """
    unknown = stored.keys() - {row.label for row in rows} - {ORACLE}
    if unknown:
        raise ValueError(f"the results hold rows that the table has not: {', '.join(sorted(unknown))}; name another "
                         "folder with --results")
    for row in rows:
        made = stored.get(row.label, {})
        if made.get("toy") and (made.get("flags"), made.get("mode")) != (row.flags, row.mode):
            raise ValueError(f"the results of {row.label!r} are of '{made.get('flags')}', {made.get('mode')}, not of "
                             f"'{row.flags}', {row.mode}; name another folder with --results")
    results = {row.label: dict(paper=dict(zip(PAPER_COLUMNS, row.paper)), flags=row.flags, mode=row.mode,
                               toy=stored.get(row.label, {}).get("toy", {})) for row in rows}
    results[ORACLE] = dict(paper=dict.fromkeys(PAPER_COLUMNS), flags=None, mode="",
                           toy=stored.get(ORACLE, {}).get("toy", {}))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Means and what is printed


def seed_mean(row, name):
    """A row's measure, averaged over its seeds; None where it has none."""
    values = [toy[name] for toy in row["toy"].values() if toy.get(name) is not None]
    return float(np.mean(values)) if values else None


def seed_deviation(row, name):
    """Standard deviation of a row's measure over its seeds; None where fewer than two have it."""
    values = [toy[name] for toy in row["toy"].values() if toy.get(name) is not None]
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def seed_noise(results, name):
    """Standard deviation of a measure between seeds, pooled over the rows trained with two or more; None: no such."""
    variances = []
    for row in results.values():
        if seed_deviation(row, name) is not None:
            variances.append(seed_deviation(row, name)**2)
    return float(np.sqrt(np.mean(variances))) if variances else None


def mean_and_deviation(row, name, digits):
    """A row's measure over its seeds, to print: "27.56 +- 0.12"; without the second where there is one seed."""
    mean, deviation = seed_mean(row, name), seed_deviation(row, name)
    return formatted(mean, digits) + (f" +- {formatted(deviation, digits)}" if deviation is not None else "")


def trained_rows(results):
    """The rows that have values of the toy and of the paper."""
    return {label: row for label, row in results.items() if row["toy"] and label != ORACLE}


def comparable(rows):
    """The rows with those seeds alone that all measured ones have, as all rows of one seed can be a decibel better than
    of another; as they are where no seed is common to them."""
    measured = [set(row["toy"]) for row in rows.values() if row["toy"]]
    common = set.intersection(*measured) if measured else set()
    if not common:
        return rows
    return {label: row | {"toy": {seed: toy for seed, toy in row["toy"].items() if seed in common}}
            for label, row in rows.items()}


def left_out(rows):
    """The seeds that `comparable` leaves out, in words, with their rows; "" where there are none."""
    kept, of_seed = comparable(trained_rows(rows)), {}
    for label in kept:
        for seed in rows[label]["toy"].keys() - kept[label]["toy"].keys():
            of_seed.setdefault(seed, []).append(label)
    return "; ".join(f"seed {seed} of {', '.join(labels)}" for seed, labels in sorted(of_seed.items()))


def markdown_table(cells):
    """Rows of words as aligned lines of Markdown; the first row is the head, the first column aligned to the left."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for label, *others in cells:
        words = [label.ljust(widths[0])] + [word.rjust(width) for word, width in zip(others, widths[1:])]
        lines.append("| " + " | ".join(words) + " |")
    rule = ["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return lines


def mean_of(values):
    """The mean of numbers, without those that are not finite; None if none is left."""
    values = torch.tensor(values)
    values = values[values.isfinite()]
    return float(values.mean()) if len(values) else None


def write_means(path, title, table, labels, columns, command):
    """Prints the rows `labels` of {label: {"toy": {seed: measures}}} that are there, means and deviations over the
    seeds, and writes them as Markdown. columns: {measure: digits}; command: what made it, of seed 0."""
    cells = [["", *columns]]
    for label in labels:
        if label in table:
            cells.append([label, *(mean_and_deviation(table[label], name, digits) for name, digits in columns.items())])
    lines = "\n".join(markdown_table(cells))
    print(lines)
    write_text(path, f"# {title}\n\n{lines}\n\n{command}; a further seed: `--seed 1`\n")


def table_lines(results):
    """The toy's values and the paper's beside them as lines of Markdown, then how alike the two order the methods."""
    measured = {name for row in results.values() for toy in row["toy"].values() for name in toy}
    columns = {name: digits for name, digits in DIGITS.items() if name in measured}
    cells = [["", *columns, *(f"paper {name}" for name in PAPER_COLUMNS)]]
    for label, row in results.items():
        seeds = f" ({len(row['toy'])} seeds)" if len(row["toy"]) > 1 else ""
        ours = [mean_and_deviation(row, name, digits) for name, digits in columns.items()]
        theirs = [formatted(value, 2 if value and value > 10 else 4) for value in row["paper"].values()]
        cells.append([label + seeds, *ours, *theirs])
    noise = {name: seed_noise(trained_rows(results), name) for name in columns}
    if any(noise.values()):
        cells.append(["deviation between seeds", *(formatted(noise[name], digits) for name, digits in columns.items()),
                      *[""] * len(PAPER_COLUMNS)])
    return [*markdown_table(cells), *order_lines(trained_rows(results)), "", disagreement(results)]


def order_lines(rows):
    """How alike the toy and the paper order the rows, as lines; none for one or two of them."""
    lines = []
    for what, ours, theirs in (("consistency", "psnr", "PSNR"), ("realism", "KD_I", "KID_I")):
        if len(rows) > 2:
            pairs = [(seed_mean(row, ours), row["paper"][theirs]) for row in rows.values()]
            lines += ["", f"Spearman correlation of the order of {len(rows)} rows by {what} ({ours} here, {theirs} in "
                      f"the paper): {spearmanr(*zip(*pairs)).statistic:.2f}"]
    return lines


def disagreement(results, most=0.05):
    """Where the two judges' shares of photos differ by more than `most`, as a line."""
    pairs = {label: (seed_mean(row, "photo"), seed_mean(row, "photo_2")) for label, row in results.items()}
    apart = [f"{label} ({a:.2f} and {b:.2f})" for label, (a, b) in pairs.items() if b is not None and abs(a - b) > most]
    return f"Rows on which the two judges differ by more than {most}: {', '.join(apart) or 'none'}"


LEGEND = """psnr, ssim: generated views against their re-rendering (up: consistent); psnr_loo: on surface seen by two
views, each from the other, and loo_gap: how far that is below perfect photographs and renders, mixed as `photo` says.
FD, KD x1000: distances of a small network's features to the base model's images (B) and to held-out photographs (I)
(down: realistic), not on the paper's scale of FID and KID. caption: how surely that network reads category, colour and
material, material: how often it is right; iou: silhouette against the control's; normals: degrees between the normals
asked for and those a third network reads off the image; photo, photo_2: share called a photo, by two networks of
different seeds. +-: deviation over the seeds."""


def write_table(out, results, args):
    """Prints a table and writes it as OUT.md, and realism against consistency as OUT.png, a point a method."""
    missing, results = left_out(results), comparable(results)
    lines = "\n".join(table_lines(results))
    lines += f"\n\nNot counted until all rows have it: {missing}" if missing else ""
    print(lines)
    flags = [f"--{name} '{value}'" if " " in str(value) else f"--{name} {value}"
             for name, value in measured_settings(args).items() if value not in (None, "")]
    write_text(f"{out}.md", f"# {args.table.replace('table', 'Table ')} on the toy world, beside the paper's\n\n"
               f"{LEGEND}\n\n{lines}\n\n`python -m experiments.tables {args.table} {' '.join(flags)}`; "
               "a further seed: `--seed 1 --rows ..`\n")
    ours, theirs, errors, highlight = {}, {}, {}, ("Realiz3D", "8 = 7, shifted")
    for label, row in trained_rows(results).items():
        ours[label] = (seed_mean(row, "KD_I"), seed_mean(row, "psnr"))
        errors[label] = (seed_deviation(row, "KD_I") or 0, seed_deviation(row, "psnr") or 0)
        theirs[label] = (row["paper"]["KID_I"], row["paper"]["PSNR"])
    toy = draw_points(ours, "KD_I x1000 (left: realistic)", "the toy: re-rendered PSNR (up: consistent)",
                      highlight=highlight, errors=errors, best=True)
    paper = draw_points(theirs, "KID_I (left: realistic)", "the paper: PSNR (up: consistent)", highlight=highlight,
                        best=True)
    save_image(f"{out}.png", side_by_side([toy, paper]))
