"""The paper's tables on the toy world: Table 1 (texturing), Table 2 (ablation), Table 3 (text to multiview).

    python -m experiments.tables table1 --results runs/toy/results      # hours on a CPU; run again to go on
    python -m experiments.tables table2 --seed 1 --rows "3 real data" "5 = 3 + reassignment"        # another seed
    python -m experiments.tables table3 --processes 2 --seed 2  # two rows at a time, one on each core of a CPU

The rows, their flags and the paper's numbers are in paper.py, what is printed in results.py. A row's model is trained
by train_stage2.py where it is missing, its images are sampled where they are missing; both are kept in the run folder.
Writes results/TABLE.json after each row, with the images of three objects in TABLE.samples, and at the end TABLE.md,
TABLE.png (realism against consistency, a point a method) and TABLE_sheet.png (those objects, a row a method). What
stands in TABLE.json is not made again, so that another machine, without the run folder, goes on from there; --rows
makes it anew.
"""
import argparse
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import torch
from tqdm import tqdm

import data
import train_stage2
from baselines.methods import METHODS
from baselines.sdedit import sdedit
from evaluate import asked_sampling, base_images, load_toy, measure, measured_settings, measuring_flags
from experiments.paper import TABLES
from experiments.results import ORACLE, check_places, check_row_flags, kept_rows, seed_folder, table_rows, write_table
from geometry.camera import VIEWS
from sample import default_base, sample_images
from support.files import cached, file_id, load_tensors, locked, read_metadata, save_tensors, write_json
from support.launch import BAR, Launched, a_seed, launch, run_cli, within
from support.speed import has_compiler
from support.networks import load_lpips
from support.pictures import save_picture, to_pixels, to_uint8
from toy.judge import load_judges
from toy.world import WORLD_VERSION
from training.estimate import choose, resumed
from training.flags import fill_defaults, stage1_comes_first, stage1_file, stage1_folder
from training.states import other_settings

# flags of train_stage2.py that the rows, or flags of this command, decide
OF_THE_ROWS = {"--out", "--name", "--base", "--task", "--seed", "--threads", "--method", "--joint", "--rank",
               "--no_real_data", "--no_freezing", "--no_reassignment", "--layer_selective", "--benchmark", "--preset",
               "--shifters", "--help", "-h"}

# ---------------------------------------------------------------------------------------------------------------------
# One row: its model, its images


def trained_row(row, task, args, launched):
    """Path of the row's model; train_stage2.py trains it first where it is missing, or goes on where it stopped.

    Another seed trains stage 1 and 2 anew, on the same sets. What another process is training is waited for: stage 1
    serves several rows, and some rows stand in two tables. Raises ValueError where it or its
    stage 1 was trained otherwise.
    """
    name = "-".join([task, *row.flags.replace("--", "").replace(" ", "_").split()])
    out = seed_folder(args)
    path = f"{out}/{name}.safetensors"
    flags = ["--task", task, *row.flags.split(), "--name", name, "--seed", str(args.seed), *flags_for(row, args)]
    more = ["--out", out, "--base", default_base("toy", args.folder), "--sample_every", "1000000"]
    more += ["--threads", str(args.threads)] if args.threads else []
    more += ["--compile"] if launched.device.type == "cpu" and has_compiler() else []
    training = fill_defaults(train_stage2.parse_args(more + flags), "stage2", launched)
    check_trained(path, training, flags)
    if METHODS[training.method].stage1 and not training.joint:
        check_trained(stage1_file(training), train_stage2.stage1_flags(training, launched))
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
    return path


def check_trained(path, asked, flags=()):
    """Raises ValueError where there is a model or shifters at path that were trained with other settings than asked,
    without some of the flags, which name the sets too, or beside another base model."""
    if not os.path.isfile(path):
        return
    made = read_metadata(path)
    words = str(made.get("command")).split()
    missing = [word for word in flags if word not in words]
    if missing:
        raise ValueError(f"{path} was trained by '{' '.join(words)}', without {' '.join(missing)}: name another "
                         "--folder, or delete it")
    other = other_settings(made.get("settings") or {}, asked)
    if made.get("base") and made["base"][1] != file_id(asked.base)[1]:      # models of earlier commits do not say
        other = f"another base model, {made['base'][0]}"
    if other:
        raise ValueError(f"{path} was trained with {other}: name another --folder, or delete it")


def flags_for(row, args):
    """The words of --train_flags, without those that would do nothing for this row."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in train_stage2.unread_flags(train_stage2.parse_args(row.flags.split())):
        kind = dict(action=argparse.BooleanOptionalAction) if flag == "muon" else {}        # it takes no value
        parser.add_argument(f"--{flag}", **kind)
    return parser.parse_known_args(args.train_flags.split())[1]


def row_samples(row, path, task, held, sampling, base, device):
    """The row's grids of the held-out objects, uint8 (N, V, 3, H, W), kept beside the model at path."""
    num = len(held["text"])
    key = dict(model=file_id(path), mode=row.mode, num=num, steps=sampling.num_steps, cfg=sampling.cfg_scale,
               seed=sampling.seed, dtype=sampling.dtype, version=WORLD_VERSION)
    if row.mode == "sdedit":
        key["base"] = file_id(base)

    def draw():
        if row.mode == "sdedit":
            drawn = to_pixels(row_samples(row._replace(mode="real"), path, task, held, sampling, base, device))
            prompts = held["text"][:, None].expand(-1, 4, -1)                   # the same for every view
            images = sdedit(load_toy(base, device), drawn, prompts, sampling=sampling)
            return dict(image=to_uint8(images))
        inputs = held if task == "texturing" else {"text": held["text"]}
        with tqdm(total=4 * num, desc=row.label, unit="image", bar_format=BAR) as progress:
            images = sample_images(load_toy(path, device), inputs, replace(sampling, mode=row.mode), views=4,
                                   progress=progress)
        return dict(image=to_uint8(images))
    return cached(f"{path.removesuffix('.safetensors')}-{row.mode}.samples", key, draw)["image"]


# ---------------------------------------------------------------------------------------------------------------------
# One table


def run_table(args):
    """Trains what is missing, samples and measures every row of one of the paper's tables, and prints the toy's values
    beside the paper's. Other seeds than 0 add to the file: what is printed is the mean over the seeds of a row."""
    check_places(args, args.table, ".json", ".md", ".png", "_sheet.png", ".samples")
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
    base, sampling = default_base("toy", args.folder), asked_sampling(args, device)
    base_features = judges.net.features(base_images(base, args.num, folder, device, sampling) / 255)
    done = {label for label, row in results.items() if str(args.seed) in row["toy"]}
    todo = [row for row in rows if row.flags is not None and row.label in (args.rows or results.keys() - done)]
    print(f"{len(todo)} rows on {args.num} held-out objects, seed {args.seed}; into {out}.json; a missing model is "
          "trained first, about ten minutes on one core", flush=True)
    perfect = measure(held["photo"] / 255, held, judges, base_features, task, weights)
    keep_row(ORACLE, held["photo"], perfect, out, args)
    if args.processes > 1:
        run_apart(todo, args)
        todo = []
    for row in todo:
        path = trained_row(row, task, args, launched)
        images = row_samples(row, path, task, held, sampling, base, device)
        toy = measure(images / 255, held, judges, base_features, task, weights)
        trained = read_metadata(path)["settings"]["dtype"]
        made = dict(commit=current_commit(), device=device.type, trained=trained, dtype=sampling.dtype or "float32")
        keep_row(row.label, images, toy | made, out, args)
    with locked(args.results):
        results = table_rows(rows, read_results(f"{out}.json", args))       # with what others have added meanwhile
        write_table(out, results, args)
        shown = data.shown_objects(args.num)
        sheet = {"renders": held["image"][shown], ORACLE: held["photo"][shown]} | read_samples(f"{out}.samples")
        labels = ["renders", *(row.label for row in rows), ORACLE]
        save_picture(f"{out}_sheet.png", [(label, sheet[label].flatten(0, 1)) for label in labels if label in sheet],
                     column_titles=VIEWS * len(shown))
    print(f"wrote {out}.json, {out}.md, {out}.png and {out}_sheet.png")


def run_apart(rows, args):
    """Trains, samples and measures each row in a process of its own, --processes of them at a time, of one thread each.
    Raises ValueError at the end, if any of them failed."""
    flags = [f"--{name}={value}" for name, value in vars(args).items()
             if name not in ("table", "rows", "threads", "processes") and value is not None]

    def run(row):
        log = f"{args.folder}/{args.table}_{args.seed}_{row.label.replace(' ', '_')}.log"
        command = [sys.executable, "-m", "experiments.tables", args.table, *flags, "--threads=1", "--rows", row.label]
        with open(log, "w") as file:
            return row.label, log, subprocess.run(command, stdout=file, stderr=file).returncode
    models, failed = {}, []
    for row in rows:
        models.setdefault(row.flags, []).append(row)
    rows = [first for first, *_ in models.values()]         # a second row of a model would wait while that is trained
    rows += [row for _, *others in models.values() for row in others]
    with ThreadPool(args.processes) as pool:
        for label, log, code in tqdm(pool.imap_unordered(run, rows), desc=args.table, unit="row", total=len(rows)):
            tqdm.write(f"{label}: {f'failed, see {log}' if code else 'done'}")
            failed += [label] if code else []
    if failed:
        raise ValueError(f"rows that failed: {', '.join(failed)}; the same command goes on from there")


def keep_row(label, images, toy, out, args):
    """Adds a row's measures to OUT.json, beside what other processes, of other rows or seeds, have added meanwhile, and
    of seed 0 its shown objects to OUT.samples."""
    toy = {name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in toy.items()}
    with locked(args.results):
        if args.seed == 0:                      # before the row counts as done
            samples = f"{out}.samples"
            save_tensors(samples, read_samples(samples) | {label: images[data.shown_objects(args.num)]})
        results = table_rows(TABLES[args.table][1], read_results(f"{out}.json", args))
        results[label]["toy"][str(args.seed)] = toy
        write_json(f"{out}.json", dict(settings=table_settings(args), rows=results))


def read_samples(path):
    """{label: uint8 (3, V, 3, H, W)} of the rows of which images are kept."""
    return load_tensors(path)[0] if os.path.isfile(path) else {}


def table_settings(args):
    """What a results file's numbers stand on: the flags that decide them and the base model."""
    return measured_settings(args) | dict(base=file_id(default_base("toy", args.folder)))


def read_results(path, args):
    """`kept_rows` of one of the paper's tables."""
    return kept_rows(path, table_settings, args)


def current_commit():
    """The repository's commit, None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES, metavar="TABLE", help=f"which of the paper's: {', '.join(TABLES)}")
    measuring_flags(parser, "num", "num_steps", "cfg_scale", "threads", "lpips")
    add("--seed", type=a_seed, default=0, help="decides the training and the noise (default %(default)s)")
    add("--results", default="results", help="where the tables and their pictures go (default %(default)s)")
    add("--folder", default="runs/toy", help="run folder: sets, models, samples (default %(default)s)")
    add("--rows", nargs="+", metavar="LABEL", help="only these rows (default: all)")
    add("--processes", type=within(1, 64), default=1, help="rows at a time, each in a process of one thread (default "
        "%(default)s)")
    add("--train_flags", default="", help="more flags for train_stage2.py, as --train_flags='--steps 500'")
    args = parser.parse_args(argv)
    if args.processes > 1 and args.threads:
        parser.error("--processes gives each of them one thread: leave out --threads")
    check_row_flags(parser, args.train_flags, OF_THE_ROWS, lambda words: parse_rows(words, args))
    return args


def parse_rows(words, args):
    """Parses train_stage2.py's flags `words` alone and beside each row's own; ends as it does at those that it refuses.
    """
    train_stage2.parse_args(words)
    for row in TABLES[args.table][1]:
        if row.flags is not None:
            training = train_stage2.parse_args([*row.flags.split(), *flags_for(row, args)])
            fill_defaults(training, "stage2", Launched(torch.device("cpu"), 0, 1))


def main(argv=None):
    run_table(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
