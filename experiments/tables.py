"""The paper's tables on the toy world: Table 1 (texturing), Table 2 (ablation), Table 3 (text to multiview).

    python -m experiments.tables table1                         # hours on a CPU; run again to go on
    python -m experiments.tables table2 --seed 1 --rows "3 real data" "5 = 3 + reassignment"        # another seed

Several processes may work at once, on other tables, seeds or rows, a core each (--threads 1).

The rows, their flags and the paper's numbers are in experiments/paper.py. A row's model is trained by train_stage2.py
where it is missing, its images are sampled where they are missing, and both are kept in the run folder. Writes
results/TABLE.json after each row, with the images of three objects in TABLE.samples, and at the end TABLE.md, TABLE.png
(realism against consistency, a point a method) and TABLE_sheet.png (those objects, a row a method). What stands in
TABLE.json is not made again, so that another machine, without the run folder, goes on from there; --rows makes it anew.
"""
import argparse
import json
import os
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import data
import train_stage2
from baselines.sdedit import sdedit
from evaluate import (DIGITS, asked_sampling, base_images, formatted, load_toy, measure, measured_settings,
                      measuring_flags)
from experiments.paper import PAPER_COLUMNS, TABLES
from geometry.camera import VIEWS
from sample import default_base, sample_images
from support.files import (cached, file_id, load_tensors, locked, read_json, read_metadata, save_tensors, write_json,
                           write_text)
from support.launch import BAR, launch, run_cli
from support.networks import load_lpips
from support.pictures import draw_points, save_image, save_picture, side_by_side, to_pixels, to_uint8
from toy.judge import load_judges
from toy.world import WORLD_VERSION, sample_assets, tokenize
from training.estimate import choose, resumed
from training.flags import fill_defaults, stage1_comes_first, stage1_folder

ORACLE = "perfect photos (oracle)"                                      # a row of every table: the best there is

# ---------------------------------------------------------------------------------------------------------------------
# One row: its model, its images


def trained_row(row, task, args, launched):
    """Path of the row's model; train_stage2.py trains it first where it is missing, or goes on where it stopped.

    Another seed trains stage 1 and 2 anew, on the same sets. What another process is training is waited for: stage 1
    serves several rows, and some rows stand in two tables. Raises ValueError where the model was trained otherwise.
    """
    name = "-".join([task, *row.flags.replace("--", "").replace(" ", "_").split()])
    out = args.folder if args.seed == 0 else f"{args.folder}/seed{args.seed}"
    with locked(out):
        if not os.path.exists(f"{out}/sets"):
            os.symlink(os.path.abspath(f"{args.folder}/sets"), f"{out}/sets")
    path = f"{out}/{name}.safetensors"
    flags = ["--task", task, *row.flags.split(), "--name", name, "--seed", str(args.seed), *args.train_flags.split()]
    more = ["--out", out, "--base", default_base("toy", args.folder), "--sample_every", "1000000"]
    more += ["--threads", str(args.threads)] if args.threads else []
    more += ["--compile"] if launched.device.type == "cpu" else []
    training = fill_defaults(train_stage2.parse_args(more + flags), "stage2", launched)
    if stage1_comes_first(training) and not os.path.isfile(path):
        with locked(f"{out}/{stage1_folder(training.adapter, training.rank)}"):
            if stage1_comes_first(training):
                choose(training, launched, *resumed(training, "stage2"))
                train_stage2.stage1_path(training, launched)
    with nullcontext() if os.path.isfile(path) else locked(f"{out}/{name}"):
        if not os.path.isfile(path):
            print(f"{row.label}: python train_stage2.py {' '.join(more + flags)}", flush=True)
            torch.compiler.reset()          # what was compiled for the last model counts against this one's limit
            train_stage2.main(more + flags)
    made = read_metadata(path)["command"].split()
    missing = [word for word in flags if word not in made]
    if missing:
        raise ValueError(f"{path} was trained by '{' '.join(made)}', without {' '.join(missing)}: name another "
                         "--folder, or delete it")
    return path


def row_samples(row, path, task, held, args, device):
    """The row's grids of the held-out objects, uint8 (N, V, 3, H, W), kept beside the model at path."""
    num, base, sampling = len(held["text"]), default_base("toy", args.folder), asked_sampling(args)
    key = dict(model=file_id(path), mode=row.mode, num=num, steps=args.num_steps, cfg=args.cfg_scale, seed=args.seed,
               version=WORLD_VERSION)
    if row.mode == "sdedit":
        key["base"] = file_id(base)

    def draw():
        if row.mode == "sdedit":
            drawn = to_pixels(row_samples(row._replace(mode="real"), path, task, held, args, device))
            images = sdedit(load_toy(base, device), drawn, sdedit_prompts(num), sampling=sampling)
            return dict(image=to_uint8(images))
        inputs = held if task == "texturing" else {"text": held["text"]}
        with tqdm(total=4 * num, desc=row.label, unit="image", bar_format=BAR) as progress:
            images = sample_images(load_toy(path, device), inputs, replace(sampling, mode=row.mode, batch=16), views=4,
                                   progress=progress)
        return dict(image=to_uint8(images))
    return cached(f"{path.removesuffix('.safetensors')}-{row.mode}.samples", key, draw)["image"]


def sdedit_prompts(num):
    """What SDEdit asks the base model for, view by view as for the real set: (num, 4, L) ids."""
    prompts, _ = data.real_captions(sample_assets(num, data.SEEDS["evaluation"]))
    return tokenize(prompts).view(num, 4, -1)


# ---------------------------------------------------------------------------------------------------------------------
# One table


def run_table(args):
    """Trains what is missing, samples and measures every row of one of the paper's tables, and prints the toy's values
    beside the paper's. Other seeds than 0 add to the file: what is printed is the mean over the seeds of a row."""
    launched = launch(args.threads)
    if launched.world > 1:
        raise ValueError("a table takes no torchrun: start it several times, with other --rows or another --seed")
    device, (task, rows) = launched.device, TABLES[args.table]
    unknown = set(args.rows or []) - {row.label for row in rows}
    if unknown:
        raise ValueError(f"{args.table} has no row {', '.join(map(repr, unknown))}; its rows: "
                         + ", ".join(repr(row.label) for row in rows))
    out, folder = f"{args.results}/{args.table}", f"{args.folder}/sets"
    results = table_rows(rows, read_results(f"{out}.json", args))
    judges, weights = load_judges(folder, device), load_lpips(args.lpips) if args.lpips else None
    held = data.evaluation_set(args.num, folder=folder, device=device)
    base = base_images(default_base("toy", args.folder), args.num, folder, device, asked_sampling(args))
    base = judges.net.features(base / 255)
    done = {label for label, row in results.items() if str(args.seed) in row["toy"]}
    todo = [row for row in rows if row.flags is not None and row.label in (args.rows or results.keys() - done)]
    print(f"{len(todo)} rows on {args.num} held-out objects, seed {args.seed}; into {out}.json; a missing model is "
          "trained first, about ten minutes on one core", flush=True)
    perfect = measure(held["photo"] / 255, held, judges, base, task, weights)
    results = keep_row(ORACLE, held["photo"], perfect, out, args)
    for row in todo:
        images = row_samples(row, trained_row(row, task, args, launched), task, held, args, device)
        toy = measure(images / 255, held, judges, base, task, weights)
        results = keep_row(row.label, images, toy | dict(commit=current_commit(), device=device.type), out, args)
    with locked(args.results):
        write_table(out, results, args)
        shown = data.shown_objects(args.num)
        sheet = {"renders": held["image"][shown], ORACLE: held["photo"][shown]} | read_samples(f"{out}.samples")
        labels = ["renders", *(row.label for row in rows), ORACLE]
        save_picture(f"{out}_sheet.png", [(label, sheet[label].flatten(0, 1)) for label in labels if label in sheet],
                     column_titles=VIEWS * len(shown))
    print(f"wrote {out}.json, {out}.md, {out}.png and {out}_sheet.png")


def keep_row(label, images, toy, out, args):
    """Adds a row's measures to OUT.json, and of seed 0 its shown objects to OUT.samples; returns all rows, with those
    that other processes, of other rows or seeds, have added meanwhile."""
    with locked(args.results):
        if args.seed == 0:                      # before the row counts as done
            samples = f"{out}.samples"
            save_tensors(samples, read_samples(samples) | {label: images[data.shown_objects(args.num)]})
        results = table_rows(TABLES[args.table][1], read_results(f"{out}.json", args))
        results[label]["toy"][str(args.seed)] = toy
        write_json(f"{out}.json", dict(settings=table_settings(args), rows=results))
    return results


def read_samples(path):
    """{label: uint8 (3, V, 3, H, W)} of the rows of which images are kept."""
    return load_tensors(path)[0] if os.path.isfile(path) else {}


def table_settings(args):
    """What a results file's numbers stand on: the flags that decide them and the base model."""
    return measured_settings(args) | dict(base=file_id(default_base("toy", args.folder)))


def table_rows(rows, stored):
    """The rows of a results file before this run: {label: dict of what makes it, the paper's numbers, the toy's}."""
    results = {row.label: dict(paper=dict(zip(PAPER_COLUMNS, row.paper)), flags=row.flags, mode=row.mode,
                               toy=stored.get(row.label, {}).get("toy", {})) for row in rows}
    results[ORACLE] = dict(paper=dict.fromkeys(PAPER_COLUMNS), flags=None, mode="",
                           toy=stored.get(ORACLE, {}).get("toy", {}))
    return results


def read_results(path, args):
    """The rows of a results file, {} where there is none. Raises ValueError if it was made with other settings."""
    if not os.path.isfile(path):
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part), dict) for part in ("settings", "rows")):
        raise ValueError(f"{path} is no file of results: delete it, or name another folder with --results")
    now = json.loads(json.dumps(table_settings(args)))
    other = [f"--{name} {stored['settings'].get(name)} (now {value})" for name, value in now.items()
             if stored["settings"].get(name) != value]
    if other:
        raise ValueError(f"{path} was made with {', '.join(other)}: name another folder with --results")
    return stored["rows"]


def current_commit():
    """The repository's commit, None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


# ---------------------------------------------------------------------------------------------------------------------
# What is printed of {label: row}, as `table_rows` makes them


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
    noise = {name: seed_noise(results, name) for name in columns}
    if any(noise.values()):
        cells.append(["deviation between seeds", *(formatted(noise[name], digits) for name, digits in columns.items()),
                      *[""] * len(PAPER_COLUMNS)])
    lines, both = markdown_table(cells), trained_rows(results).values()
    for what, ours, theirs in (("consistency", "psnr", "PSNR"), ("realism", "KD_I", "KID_I")):
        rho = spearmanr([seed_mean(row, ours) for row in both], [row["paper"][theirs] for row in both]).statistic
        lines += ["", f"Spearman correlation of the order by {what} ({ours} here, {theirs} in the paper): {rho:.2f}"]
    return lines + ["", disagreement(results)]


def disagreement(results, most=0.05):
    """Where the two judges' shares of photos differ by more than `most`, as a line."""
    pairs = {label: (seed_mean(row, "photo"), seed_mean(row, "photo_2")) for label, row in results.items()}
    apart = [f"{label} ({a:.2f} and {b:.2f})" for label, (a, b) in pairs.items() if b is not None and abs(a - b) > most]
    return f"Rows on which the two judges differ by more than {most}: {', '.join(apart) or 'none'}"


LEGEND = """psnr, ssim: generated views against their re-rendering (up: consistent); psnr_loo: on surface seen by two
views, each from the other, and loo_gap: how far that is below perfect photographs and renders, in the row's shares.
FD, KD x1000: distances of a small network's features to the base model's images (B) and to held-out photographs (I)
(down: realistic), not on the paper's scale of FID and KID. caption: how surely that network reads category, colour and
material, material: how often it is right; iou: silhouette against the control's; normals: degrees between the normals
asked for and those a third network reads off the image; photo, photo_2: share called a photo, by two networks of
different seeds. +-: deviation over the seeds."""


def write_table(out, results, args):
    """Prints a table and writes it as OUT.md, and realism against consistency as OUT.png, a point a method."""
    lines = "\n".join(table_lines(results))
    print(lines)
    flags = [f"--{name} '{value}'" if " " in str(value) else f"--{name} {value}"
             for name, value in measured_settings(args).items() if value is not None]
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


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES, metavar="TABLE", help=f"which of the paper's: {', '.join(TABLES)}")
    measuring_flags(parser, "num", "num_steps", "cfg_scale", "threads", "lpips")
    add("--seed", type=int, default=0, help="decides the training and the noise (default %(default)s)")
    add("--results", default="results", help="where the tables and their pictures go (default %(default)s)")
    add("--folder", default="runs/toy", help="run folder: sets, models, samples (default %(default)s)")
    add("--rows", nargs="+", metavar="LABEL", help="only these rows (default: all)")
    add("--train_flags", default="--dtype bfloat16", help="more flags for train_stage2.py, as "
        "--train_flags='%(default)s', the default")
    return parser.parse_args(argv)


def main(argv=None):
    run_table(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
