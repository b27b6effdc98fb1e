"""RefAny3D (related/refany3d.py) and its ablations on the toy world, where the truth is known: is it *this* asset, is
the point map one of its surface, and is the rest as asked?

    python -m toy.pretrain --scenes                             # first: the base model learns what scenes are
    python -m experiments.references                            # trains what is missing; hours on a CPU; goes on
    python -m experiments.references --seed 1 --rows RefAny3D "text only"

The measures are in scene_measures.py. Half of the cases are assets that no training saw, half are known assets before
the one background that each was never shown before. Writes results/refany3d.json and .md, and a sheet.
"""
import argparse
import os
from dataclasses import replace

import torch

from data import SEEDS
from evaluate import asked_sampling, kid, measuring_flags
from experiments.results import check_places, check_row_flags, kept_rows, seed_folder, write_means
from experiments.scene_measures import measure_scenes, silhouettes
from related import refany3d
from related.refany3d import draw, load_refany3d
from sample import CFG_SCALE, load_network, sample_images
from support.files import cached, file_id, locked, read_metadata, run_or_shipped, write_json
from support.launch import Launched, a_seed, launch, run_cli
from support.pictures import save_picture, to_uint8
from toy.judge import train_feature_net
from toy.scenes import SCENES, scene_set
from toy.world import WORLD_VERSION, Assets, exaggerated, sample_assets
from training.flags import fill_defaults
from training.sets import scenes_base
from training.states import other_settings

ROWS = {                                # what is trained: flags of related.refany3d; None: nothing, the base model
    "text only":                        None,
    "one reference, no point maps":     "--num_references 1 --no-points",           # OminiControl's form
    "RefAny3D":                         "",
    "without shared positions":         "--no-shared_positions",
    "without text-agnostic attention":  "--no-text_agnostic",
    "without Domain-LoRA":              "--no-domain_lora",
    "without point maps":               "--no-points",
    "4 views":                          "--num_references 4",
    "6 views":                          "--num_references 6",
    "renders alone":                    "--renders",
    "renders, Realiz3D's shifters":     "--renders --shifters SHIFTERS",            # beyond both papers
}
# flags of related.refany3d that the rows, or flags of this command, decide
OF_THE_ROWS = {"--out", "--base", "--name", "--seed", "--threads", "--preset", "--num_references", "--points",
               "--no-points", "--shared_positions", "--no-shared_positions", "--text_agnostic", "--no-text_agnostic",
               "--domain_lora", "--no-domain_lora", "--renders", "--shifters", "--prompt", "--help", "-h"}
PERFECT = "perfect scenes"
COLUMNS = dict(color=2, material=2, matches=1, shape=2, drawn=2, hue=1, tone=2, surface=3, pose=3, outline=2,
               category=2, background=2, KD=0, photo=2)

# ---------------------------------------------------------------------------------------------------------------------
# Cases, rows, the table


def evaluation_cases(num, folder, renders=False):
    """(scenes of num cases, their Assets): the first half of assets that no training saw, the others of known ones
    before the background that each was never shown before. renders: see `scene_set`."""
    parts = []
    for count, seed, unseen in ((num - num // 2, SEEDS["evaluation"], False), (num // 2, SEEDS["synthetic"], True)):
        parts.append((scene_set(count, seed, unseen, renders, folder=folder), sample_assets(count, seed)))
    scenes = {name: torch.cat([scenes[name][::SCENES] for scenes, _ in parts]) for name in parts[0][0]}
    return scenes, exaggerated(Assets(*(torch.cat(fields) for fields in zip(*(assets for _, assets in parts)))))


def judged(images, labels, judge, photos):
    """What the judge of scenes reads off images (N, 3, H, W) in [0, 1]: the share of category, colour and material read
    right, the share called a photograph, KD x1000 to the features `photos` of true scenes."""
    with torch.no_grad():
        heads = judge(images)
    row = {name: (heads[name].argmax(1) == truth).double().mean().item()
           for name, truth in zip(("category", "color", "material"), labels.T)}
    photo = (judge.photo_probability(images) > 0.5).double().mean().item()
    return row | dict(photo=photo, KD=1000 * kid(photos, judge.features(images)))


def row_training(label, args):
    """Path of a row's model, and the flags of related.refany3d that train it."""
    name, words = "refany3d-" + label.replace(" ", "_").replace(",", ""), (ROWS[label] or "").split()
    out = seed_folder(args)
    flags = ["--out", out, "--base", scenes_base(folder=args.folder), "--name", name, "--seed", str(args.seed)]
    flags += ["--threads", str(args.threads)] if args.threads else []
    flags += [run_or_shipped(args.folder, "toy", "shifters.safetensors") if word == "SHIFTERS" else word
              for word in words]
    return f"{out}/{name}.safetensors", flags + args.train_flags.split()


def parse_row(flags):
    """The flags of related.refany3d, completed and checked as its training does. Raises ValueError."""
    return fill_defaults(refany3d.parse_args(flags), "refany3d", Launched(torch.device("cpu")))


def check_row(label, args):
    """Raises ValueError where the file in the place of a row's model was trained with other flags than the row's, or
    beside another base model."""
    path, flags = row_training(label, args)
    if ROWS[label] is None or not os.path.isfile(path):
        return
    made, asked = read_metadata(path).get("settings"), parse_row(flags)
    if not isinstance(made, dict):
        raise ValueError(f"{path} holds no RefAny3D: name another --folder, or delete it")
    asked.base_file = file_id(scenes_base(folder=args.folder))[1]
    other = other_settings(made, asked)
    if other:
        raise ValueError(f"{path} was trained with {other}: name another --folder, or delete it")


def drawn_row(label, scenes, args, device):
    """What a row draws of the cases, uint8 (N, K, 3, H, W), kept in the run folder; trained first where it must be."""
    base, (path, flags) = scenes_base(folder=args.folder), row_training(label, args)
    sampling = replace(asked_sampling(args, device), batch=16)
    out = path.removesuffix(".safetensors")
    if ROWS[label] is not None and not os.path.isfile(path):
        with locked(out):
            torch.compiler.reset()      # what was compiled for the last model counts against this one's limit
            refany3d.main(flags)

    def sample():
        if ROWS[label] is None:
            return dict(image=to_uint8(sample_images(load_network(base, device), {"text": scenes["text"]}, sampling)))
        return dict(image=to_uint8(draw(load_refany3d(path, base, device), scenes, sampling)))
    key = dict(model=file_id(base if ROWS[label] is None else path), base=file_id(base), num=args.num,
               steps=args.num_steps, cfg_scale=args.cfg_scale, seed=args.seed, dtype=sampling.dtype,
               version=WORLD_VERSION)
    return cached(f"{out}.samples", key, sample)["image"]


def settings_of_cases(args):
    """The flags that decide the numbers and the base model, for the results file."""
    shared = {name: getattr(args, name) for name in ("num", "num_steps", "train_flags")}
    return shared | dict(base=file_id(scenes_base(folder=args.folder)))


def rows_of_cases(path, args):
    """`kept_rows` of this table."""
    return kept_rows(path, settings_of_cases, args, (PERFECT, *ROWS))


def run_rows(args):
    """Trains what is missing, draws and measures every row, and writes the table."""
    path, todo = f"{args.results}/refany3d.json", args.rows or list(ROWS)
    check_places(args, "refany3d", ".json", ".md", "_sheet.png")
    rows_of_cases(path, args)
    for label in todo:
        check_row(label, args)
    device, sets = launch(args.threads).device, f"{args.folder}/sets"
    scenes, assets = evaluation_cases(args.num, sets)
    sides = silhouettes(assets)
    judge = train_feature_net(sets, num=4000, steps=3000, world="scenes")
    photos = judge.features(scene_set(250, SEEDS["photos"], folder=sets)["image"][:, 0] / 255)
    print(f"{len(todo)} rows of {args.num} cases, seed {args.seed}, into {path}; a missing model is trained first, "
          "about an hour on one core", flush=True)

    def keep(label, drawn, given=scenes):
        row = measure_scenes(drawn, given, assets, sides) | judged(drawn[:, 0] / 255, scenes["labels"], judge, photos)
        with locked(args.results):
            rows = rows_of_cases(path, args)
            rows.setdefault(label, {"toy": {}})["toy"][str(args.seed)] = row
            write_json(path, dict(settings=settings_of_cases(args), rows=rows))
        return rows
    sheet = {PERFECT: scenes["image"]}
    rows = keep(PERFECT, scenes["image"])
    renders = scenes | {"references": evaluation_cases(args.num, sets, renders=True)[0]["references"]}
    for label in todo:
        given = renders if "renders" in label else scenes
        sheet[label] = drawn_row(label, given, args, device)
        rows = keep(label, sheet[label], given)
    command = f"`python -m experiments.references --num {args.num} --num_steps {args.num_steps}`"
    write_means(f"{args.results}/refany3d.md", "RefAny3D and its ablations on the toy world", rows, (PERFECT, *ROWS),
                COLUMNS, command)
    shown = [0, 3, 5, args.num // 2 + 1, args.num // 2 + 2, args.num // 2 + 4]              # new assets, known ones
    pictures = [("a reference", scenes["references"][shown, 0, 1])]
    pictures += [(label, drawn[shown, 0]) for label, drawn in sheet.items()]
    pictures += [("RefAny3D's point map", drawn[shown, 1]) for label, drawn in sheet.items() if label == "RefAny3D"]
    save_picture(f"{args.results}/refany3d_sheet.png", pictures)
    print(f"wrote {path}, refany3d.md and refany3d_sheet.png")


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    measuring_flags(parser, "num", "num_steps", "threads")
    parser.set_defaults(num=60, cfg_scale=CFG_SCALE)
    add("--seed", type=a_seed, default=0, help="decides the training and the noise (default %(default)s)")
    add("--rows", nargs="+", choices=ROWS, metavar="LABEL", help="only these rows (default: all)")
    add("--results", default="results", help="where the table and its picture go (default %(default)s)")
    add("--folder", default="runs/toy", help="run folder: sets, models, samples (default %(default)s)")
    add("--train_flags", default="", help="more flags for related.refany3d, as --train_flags='--steps 500'")
    args = parser.parse_args(argv)
    if args.num < 12:
        parser.error(f"--num must be at least 12, not {args.num}")
    check_row_flags(parser, args.train_flags, OF_THE_ROWS, parse_row)
    return args


def main(argv=None):
    run_rows(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
