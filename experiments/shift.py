"""How far to shift at sampling time (Sec. 4.3), and, beyond the paper, the dial between the two domains.

    python -m experiments.shift select      # B_max and t_max of a model, kept where sample.py and evaluate.py find them
    python -m experiments.shift dial        # e(s) = (1 - s) e_syn + s e_real, from render to photograph

The choice of B_max and t_max is made once per model, on validation objects, which nothing is evaluated on.
"""
import argparse
from dataclasses import replace

from tqdm import tqdm

import data
from dit import T
from evaluate import (DIGITS, SAMPLING_FLAGS, add_command, asked_sampling, formatted, load_toy, measure,
                      measured_settings)
from geometry.camera import VIEWS
from sample import default_model, sample_images, trained_task
from support.files import file_id, write_json
from support.launch import BAR, check_out, check_picture, launch, run_cli, within
from support.pictures import draw_plot, draw_points, save_image, save_picture, to_uint8
from toy.judge import load_judges

LAYER_SHIFTS, TIME_SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.4), (950, 900, 850, 800)     # tried in this order; T: no time shift
DIAL = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

# ---------------------------------------------------------------------------------------------------------------------
# Selection of B_max and t_max


def loss_limit(tried, max_loss):
    """The largest kernel distance to photos that a shift may lead to: the unshifted model's and the share max_loss."""
    unshifted = tried[0.0, T]["KD_I"]
    return unshifted + max_loss * abs(unshifted)


def best_shift(tried, max_loss):
    """Of {(B_max, t_max): measures} the most consistent one that loses no more realism than `loss_limit`."""
    allowed = [shift for shift in tried if tried[shift]["KD_I"] <= loss_limit(tried, max_loss)]
    return max(allowed, key=lambda shift: tried[shift]["psnr"])


def select_shift(args):
    """Tries B_max over 0, 10, .. 40 % of the blocks, then t_max over 800, 850, .. 1000, on validation objects; of those
    whose kernel distance to photos exceeds the unshifted model's by no more than the share --max_loss, the one with the
    highest re-rendered PSNR wins. Writes the choice beside the model, for sample.py, and a picture of the trade-off."""
    path = args.model or default_model("toy", "texturing")
    out = path.removesuffix(".safetensors")
    for ending in (".shift.json", ".shift.png"):
        check_out(f"{out}{ending}", "--model")
    device = launch(args.threads).device
    network, task = load_toy(path, device), trained_task(path)
    if network.shifters is None or task is None:
        raise ValueError(f"{path} is not a Realiz3D model of stage 2: there is no domain to shift")
    held = data.evaluation_set(args.num, data.SEEDS["validation"], folder=args.folder, device=device)
    inputs = held if task == "texturing" else {"text": held["text"]}
    judges = load_judges(args.folder, device)
    sampling, tried = replace(asked_sampling(args, device), mode="shifted"), {}

    def try_shift(B_max, t_max):
        images = sample_images(network, inputs, replace(sampling, B_max=B_max, t_max=t_max), views=4, progress=progress)
        row = tried[B_max, t_max] = measure(to_uint8(images) / 255, held, judges, task=task)
        measures = some_measures(row, "psnr psnr_loo iou normals photo KD_I")
        progress.write(f"B_max {B_max:.1f}  t_max {t_max:4d}  {measures}")
    total = (len(LAYER_SHIFTS) + len(TIME_SHIFTS)) * 4 * args.num
    with tqdm(total=total, desc="select", unit="image", bar_format=BAR) as progress:
        for B_max in LAYER_SHIFTS:
            try_shift(B_max, T)
        by_layer, _ = best_shift(tried, args.max_loss)
        for t_max in TIME_SHIFTS:
            try_shift(by_layer, t_max)
    B_max, t_max = best_shift(tried, args.max_loss)
    draw_shifts(f"{out}.shift.png", tried, args.max_loss)
    rows = [dict(B_max=layer, t_max=time, **row) for (layer, time), row in tried.items()]
    settings = measured_settings(args) | dict(seed=args.seed)
    write_json(f"{out}.shift.json", dict(B_max=B_max, t_max=t_max, model=file_id(path), settings=settings, tried=rows))
    print(f"B_max {B_max}, t_max {t_max} -> {out}.shift.json, where sample.py finds it; the trade-off: {out}.shift.png")


def draw_shifts(path, tried, max_loss):
    """Writes the trade-off of the tried shifts as a picture, the chosen one in red."""
    def name(B_max, t_max):
        return f"B_max {B_max:.1f}" + (f", t_max {t_max}" if t_max < T else "")
    points = {name(*shift): (row["KD_I"], row["psnr"]) for shift, row in tried.items()}
    save_image(path, draw_points(points, "KD_I x1000 (left: realistic; the line: as much as may be lost)",
                                 "re-rendered PSNR (up: consistent)", limit=loss_limit(tried, max_loss),
                                 highlight=(name(*best_shift(tried, max_loss)),)))


def some_measures(row, names):
    """Measures of a row with their names, to print."""
    return "  ".join(f"{name} {formatted(row[name], DIGITS[name])}" for name in names.split())


# ---------------------------------------------------------------------------------------------------------------------
# The dial, beyond the paper: the shift is linear in e_domain, so e(s) = (1 - s) e_syn + s e_real lies in between


def turn_dial(args):
    """Turns s from render to photograph in e(s) = (1 - s) e_syn + s e_real: the same objects, control and noise at
    seven settings, and below them the share called a photo and how well the silhouette follows the control."""
    check_picture(args.out)
    device = launch(args.threads).device
    path = args.model or default_model("toy", "texturing")
    network = load_toy(path, device)
    if not network.knows_domains or trained_task(path) != "texturing":
        raise ValueError(f"{path} is not a texturing model with Domain Shifters: there is no dial to turn")
    held, judges = data.evaluation_set(args.num, folder=args.folder, device=device), load_judges(args.folder, device)
    sampling, rows, pictures = asked_sampling(args, device), {}, []
    with tqdm(total=len(DIAL) * 4 * args.num, desc="dial", unit="image", bar_format=BAR) as progress:
        for s in DIAL:
            images = to_uint8(sample_images(network, held, replace(sampling, mode=s), views=4, progress=progress))
            rows[s] = measure(images / 255, held, judges)
            pictures.append((f"s = {s}", images[data.shown_objects(args.num)].flatten(0, 1)))
    for s, row in rows.items():
        print(f"s {s:5.2f}  {some_measures(row, 'photo iou normals psnr psnr_loo KD_I')}")
    curves = {"called a photo": [(s, row["photo"]) for s, row in rows.items()],
              "silhouette IoU": [(s, row["iou"]) for s, row in rows.items()]}
    out = args.out.removesuffix(".png")
    plot = draw_plot(curves, "s: 0 synthetic, 1 real", "", size=(880, 300), y_range=(0, 1))
    save_picture(f"{out}.png", pictures, scale=2, column_titles=VIEWS * 3, below=plot)
    write_json(f"{out}.json", dict(settings=measured_settings(args) | dict(seed=args.seed), rows=rows))
    print(f"wrote {out}.png and {out}.json")


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = add_command(commands, "select", select_shift, "how far to shift: B_max and t_max of a model, kept where "
                      "sample.py finds them", "model", *SAMPLING_FLAGS, "folder")
    sub.set_defaults(num=20)
    sub.add_argument("--max_loss", type=within(0, 1000, float), default=0.25, help="share by which the kernel distance "
                     "may grow (default %(default)s)")
    sub = add_command(commands, "dial", turn_dial, "mix the two domains: e(s) from render to photograph", "model",
                      *SAMPLING_FLAGS, "folder")
    sub.set_defaults(num=20)
    sub.add_argument("--out", default="runs/toy/dial.png",
                     help="picture to write (default %(default)s); its numbers: .json")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
