"""CAD (related/cad.py) and its ablations beside score distillation, on references whose truth is known.

    python -m experiments.distillation                          # trains what is missing; many hours on a CPU; goes on
    python -m experiments.distillation --objects 3 7 --seed 1 --rows CAD "score distillation"

Each row makes a 3D object, or many, of each reference: held-out assets, as renders. Of each reference four objects are
drawn from eight sides, two by score distillation; the row "samples" has what CAD learns from, no objects. Adds to
results/cad.json, by seed and reference, so that the table can be made in pieces; beside a row's means stands how far
they are from CAD's on the same references. Also writes cad.md, and a sheet of the references of this run.
"""
import argparse
import math
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F

from data import SEEDS, held_objects
from evaluate import Surface, consistency, formatted, kid, surface_normals
from experiments.results import (check_places, check_row_flags, kept_rows, markdown_table, mean_of, seed_folder,
                                 seed_mean)
from experiments.scene_measures import LEAST
from geometry.camera import ELEVATION
from related import cad
from related.cad_samples import load_models, prior_path, reference_samples
from related.score_distillation import distill_score
from related.triplanes import SIZE, Z, rays, surface_depth
from related.view_prior import load_prior, poses_around
from sample import default_base, default_model
from support.files import cached, file_id, locked, write_json, write_text
from support.launch import a_seed, launch, run_cli, some_threads, within
from support.pictures import save_picture, to_pixels, to_uint8
from toy.judge import load_judges
from toy.render import Look, render
from toy.world import asset_captions, exaggerated, sample_assets

ROWS = {                                # flags of related.cad; "stage 1" is drawn by the generator of CAD
    "samples":              "",         # what CAD's generator learns from: images, which no one object needs to fit
    "CAD":                  "",
    "stage 1 alone":        "",
    "without refinement":   "--strength 0",
    "depth condition":      "--depth",
    "strength 0.3":         "--strength 0.3",
    "strength 0.8":         "--strength 0.8",
    "without pruning":      "--no-pruning",
    "gamma 0.3":            "--gamma 0.3",
    "gamma 30":             "--gamma 30",
    "500 samples":          "--num_poses 125",
    "2000 samples":         "--num_poses 500",
    "score distillation":   None,
}
OF_THE_ROWS = {"--object", "--reference", "--elevation", "--prompt", "--out", "--name", "--prior", "--base", "--seed",
               "--threads", "--strength", "--depth", "--depth_model", "--pruning", "--no-pruning", "--gamma",
               "--num_poses", "--mesh", "--help", "-h"}
PERFECT = "perfect photographs"
COLUMNS = dict(KD=0, photo=2, category=2, color=2, material=2, likeness=2, drawn=2, psnr_loo=1, covered=2, two_fronts=2,
               chroma=3, diversity=2)
AZIMUTHS = tuple(range(0, 360, 45))
EACH, EACH_DISTILLED = 4, 2             # objects of a reference, by CAD and by score distillation

# ---------------------------------------------------------------------------------------------------------------------
# Measures


def measure_objects(images, surface, labels, truth, judges):
    """Of N objects of one reference, images (N, 8, 3, H, W) in [0, 1] from AZIMUTHS; truth (8, 3, H, W): photographs of
    the asset that the reference shows, likewise.

    category, color, material: share of the views read as the reference's labels (3,); photo: share called a photograph;
    drawn: share that shows an object at all. likeness: cosine of the front's features with the true front's.
    two_fronts: share of the objects that from behind (135 to 225 degrees) are most like the true front, of all true
    views. psnr_loo: views against what the others show of the same places (`consistency`, to a pixel), and the share of
    the surface that this can judge, covered; surface: a Surface, None where there is none. chroma: mean distance from
    gray over the object. diversity: mean distance of the features, of unit length, of two objects from the same of the
    four sides that have a word (refined samples of others are turned by up to 17 degrees, each otherwise: no variety of
    objects), where both are read as the right category: noise would be the most diverse. KD x1000: of each object, to
    photographs of all kinds: high by nature, and of several alike higher still.
    """
    flat = images.flatten(0, 1)
    heads, features = judges.net(flat), judges.net.features(flat)
    row = {name: (heads[name].argmax(1) == label).double().mean().item()
           for name, label in zip(("category", "color", "material"), labels)}
    unit = F.normalize(features, dim=1).unflatten(0, images.shape[:2])                              # (N, 8, F)
    alike = unit @ F.normalize(judges.net.features(truth), dim=1).T                     # (N, 8, 8), with each true view
    row["KD"] = mean_of([1000 * kid(judges.photos, of_one) for of_one in features.unflatten(0, images.shape[:2])])
    row["likeness"] = alike[:, 0, 0].mean().item()
    row["two_fronts"] = (alike[:, 3:6].argmax(dim=2) == 0).any(dim=1).double().mean().item()
    row["photo"] = (judges.net.photo_probability(flat) > 0.5).double().mean().item()
    if surface is not None:
        agree = consistency(images, surface, near=1.0)
        row |= {name: agree[name].nanmean().item() for name in ("psnr_loo", "covered")}
    on = (1 - images).amax(dim=2) > 0.08                                                            # (N, 8, H, W)
    row["drawn"] = (on.sum(dim=(2, 3)) >= LEAST).double().mean().item()
    off_gray = (images - images.mean(dim=2, keepdim=True)).norm(dim=2)
    row["chroma"] = off_gray[on].mean().item()
    if len(unit) > 1:
        four = unit[:, ::2].transpose(0, 1)                                                         # (4, N, F)
        apart = torch.cdist(four, four)                                                             # (4, N, N)
        right = (heads["category"].argmax(1) == labels[0]).unflatten(0, images.shape[:2])[:, ::2].T     # (4, N)
        pairs = right[:, :, None] & right[:, None] & ~torch.eye(len(unit), dtype=torch.bool)
        row["diversity"] = apart[pairs].mean().item()
    return row


def lifted_surface(opacity, depth):
    """Surface of objects from `surface_depth` and opacity, (N, 8, 1, H, W) each, from AZIMUTHS."""
    N, V = opacity.shape[:2]
    origins, direction = rays(torch.tensor(AZIMUTHS).float(), torch.full((V,), float(ELEVATION)), SIZE)
    places = origins.transpose(1, 2).unflatten(2, (SIZE, SIZE)) + depth * direction[:, :, None, None]   # (N, 8, 3, ..)
    mask = (opacity > 0.95).float()                                     # at an edge the background shines through
    normal = surface_normals(places.masked_fill(mask == 0, torch.nan).flatten(0, 1)).unflatten(0, (N, V))
    return Surface(places.clamp(-0.5, 0.5), normal, mask, AZIMUTHS, ELEVATION)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@torch.no_grad()
def eight_sides(shape, w, stage=2):
    """Images uint8 (N, 8, 3, H, W) of N objects w from AZIMUTHS, as a stage draws them, and the opacity and depth
    (N, 8, 1, H, W) of that stage's surface."""
    azimuth, elevation = torch.tensor(AZIMUTHS).float(), torch.full((len(AZIMUTHS),), float(ELEVATION))
    images, maps = [], []
    for one in w:
        many = one.expand(len(AZIMUTHS), -1, -1)
        draw = shape.draw if stage == 1 else shape.draw_lifted
        images.append(draw(many, azimuth, elevation)[0])
        field = shape.field(shape.planes(one[None], stage))
        sides = [surface_depth(field, *rays(azimuth[k:k + 1], elevation[k:k + 1], SIZE)) for k in range(len(azimuth))]
        maps.append(torch.stack([torch.cat([opacity, depth]) for depth, opacity in sides]))         # (8, 2, M)
    opacity, depth = torch.stack(maps).unflatten(3, (SIZE, SIZE)).split(1, dim=2)
    return dict(image=to_uint8(torch.stack(images)), opacity=opacity, depth=depth)


def sampled_views(samples):
    """Of samples, see `reference_samples`, those nearest to each of AZIMUTHS, as if of EACH objects: {"image": uint8
    (EACH, 8, 3, H, W)}."""
    turn = (samples["azimuth"] - torch.tensor(AZIMUTHS)[:, None] + 180) % 360 - 180                     # (8, N)
    apart = turn.square() + (samples["elevation"] - ELEVATION).square()
    nearest = apart.sort(dim=1, stable=True).indices[:, :EACH]                                          # (8, EACH)
    return dict(image=samples["image"][nearest].transpose(0, 1))


def made_objects(label, number, prompt, args, device):
    """What a row makes of a reference: {"image": uint8 (N, 8, 3, H, W), and, where it is 3D, "opacity", "depth"}, kept
    in the run folder; trained first where it must be."""
    if ROWS[label] is None:
        return distilled_objects(number, args, device)
    out = seed_folder(args)
    name = "-".join([f"cad_{number}", *ROWS[label].replace("--", "").split()])
    flags = ["--object", str(number), "--prompt", prompt, "--out", out, "--name", name]
    flags += ["--prior", prior_path(args.prior, args.folder)]
    if "--depth" in ROWS[label]:
        flags += ["--depth_model", default_model(folder=args.folder)]
    else:
        flags += ["--base", default_base("toy", args.folder)]
    flags += ["--seed", str(args.seed), "--threads", str(args.threads or 1), *ROWS[label].split()]
    flags += args.train_flags.split()
    row_args = cad.parse_args(flags)
    reference = cad.read_reference(row_args)
    if label == "samples":
        models = [model.to(device) for model in load_models(row_args)]
        return sampled_views(reference_samples(models, reference, cad.train_feature_net(f"{out}/sets"), row_args))
    key = cad.generator_key(reference, row_args)
    if not cad.fitting_generator(key, row_args):
        print(f"{label}: python -m related.cad {' '.join(flags)}", flush=True)
        cad.main(flags)                 # refuses one in its place that was made from something else
    path = cad.fitting_generator(key, row_args)
    stage = 1 if label == "stage 1 alone" else 2

    def draw():
        G = cad.load_generator(path)
        return eight_sides(G, G.style(cad.gan_noise(G, EACH, args.seed, 4)), stage)             # those of the sheet
    key = dict(version=cad.GAN_VERSION, model=file_id(path), seed=args.seed)
    return cached(f"{out}/{name}-{stage}.samples", key, draw)


def distilled_objects(number, args, device):
    """What score distillation makes of a reference, as `made_objects`."""
    prior = prior_path(args.prior, args.folder)
    settings = dict(steps=args.sds_steps, batch=4, lr=0.01, scale=args.sds_scale, seed=args.seed)

    def draw():
        reference = to_pixels(held_objects([number])["image"][0, 0])
        made = []
        for again in range(EACH_DISTILLED):             # it has one object to show: more of them from other seeds
            own = Namespace(**settings | dict(seed=args.seed + 1000 * again))
            shape = distill_score(load_prior(prior, device), reference, ELEVATION, poses_around(250), own)
            made.append(eight_sides(shape, shape.style(torch.zeros(1, Z))))
        return {part: torch.cat([one[part] for one in made]) for part in made[0]}
    key = dict(version=cad.GAN_VERSION, prior=file_id(prior), num=EACH_DISTILLED, **settings)
    return cached(f"{seed_folder(args)}/sds_{number}.samples", key, draw)


def compare_rows(args):
    """Trains what is missing, draws and measures every row, and writes the table."""
    path = f"{args.results}/cad.json"
    check_places(args, "cad", ".json", ".md", "_sheet.png")
    device = cad.where_it_trains(launch(args.threads or 1))             # as many threads as a row's training sets
    stored_rows(path, args)
    load_prior(prior_path(args.prior, args.folder))
    judges = load_judges(f"{args.folder}/sets")
    held = {k: held_objects([k]) for k in args.objects}
    assets = exaggerated(sample_assets(max(args.objects) + 1, SEEDS["evaluation"]))
    captions, todo = asset_captions(assets), args.rows or list(ROWS)
    print(f"{len(todo)} rows of {len(args.objects)} references, seed {args.seed}, into {path}; a missing generator is "
          "trained first, half an hour on two cores", flush=True)
    perfect = render(assets, Look("photo"), AZIMUTHS, geometry=True)
    whole = Surface(perfect.position, perfect.normal, perfect.mask, AZIMUTHS, ELEVATION)
    sheet = {label: [] for label in ("reference", PERFECT, *todo)}

    def keep(label, number, images, surface):
        row = measure_objects(images, surface, held[number]["labels"][0], perfect.rgb[number], judges)
        row = {name: value if math.isfinite(value) else None for name, value in row.items()} | {"device": device.type}
        sheet[label].append(to_uint8(2 * images[0, 1] - 1))
        with locked(args.results):
            table = stored_rows(path, args)
            table.setdefault(label, {"toy": {}})["toy"][f"{args.seed}, {number}"] = row
            write_json(path, dict(settings=table_settings_of(args), rows=table))
    for k in args.objects:
        sheet["reference"].append(held[k]["image"][0, 0])
        keep(PERFECT, k, perfect.rgb[k:k + 1], Surface(*(part[k:k + 1] for part in whole[:3]), *whole[3:]))
        for label in todo:
            drawn = made_objects(label, k, captions[k], args, device)
            surface = lifted_surface(drawn["opacity"], drawn["depth"]) if "depth" in drawn else None
            keep(label, k, drawn["image"] / 255, surface)
    table = stored_rows(path, args)
    lines = "\n".join(markdown_table(paired_cells({name: table[name] for name in (PERFECT, *ROWS) if name in table})))
    print(lines)
    write_text(f"{args.results}/cad.md", f"# CAD beside score distillation\n\n{LEGEND}\n\n{lines}\n")
    save_picture(f"{args.results}/cad_sheet.png", [(label, torch.stack(images)) for label, images in sheet.items()])
    print(f"wrote {path}, cad.md and cad_sheet.png")


LEGEND = """Eight sides of each object, read by the toy's judges. photo, category, color, material: share read so;
likeness: cosine of the front's features with the true photograph's; drawn: share that shows an object at all;
psnr_loo: each view against what the others show of the same places (dB), covered: the share of the surface that this
can judge; two_fronts: objects that from behind look like the front; chroma: distance from gray; diversity: distance of
features between objects; KD x1000: of each object, to photographs of all kinds.

Means over references and seeds (`cases`), as `python -m experiments.distillation --objects .. --seed ..` adds them; in
brackets how far a row is from CAD on the same cases, and the standard error of that."""


def paired_cells(table):
    """{label: {"toy": {case: measures}}} as the cells of a table, of which a row also says how far it is on average
    from CAD in the same cases, and, of two or more, the standard error of that: "0.47 (-0.12 +- 0.05)"."""
    cells, of_cad = [["", "cases", *COLUMNS]], table.get("CAD", {"toy": {}})["toy"]
    for label, row in table.items():
        cells.append([label, str(len(row["toy"]))])
        for name, digits in COLUMNS.items():
            pairs = [(measures.get(name), of_cad.get(case, {}).get(name)) for case, measures in row["toy"].items()]
            apart = [own - cad for own, cad in pairs if own is not None and cad is not None]
            cell = formatted(seed_mean(row, name), digits)
            if label != "CAD" and apart:
                error = f" +- {np.std(apart, ddof=1) / len(apart) ** 0.5:.{digits}f}" if len(apart) > 1 else ""
                cell += f" ({np.mean(apart):+.{digits}f}{error})"
            cells[-1].append(cell)
    return cells


def table_settings_of(args):
    """The flags that decide the numbers and the prior, for the results file."""
    prior = file_id(prior_path(args.prior, args.folder))
    return {name: getattr(args, name) for name in ("sds_steps", "sds_scale", "train_flags")} | dict(prior=prior)


def stored_rows(path, args):
    """`kept_rows` of this table."""
    return kept_rows(path, table_settings_of, args, (PERFECT, *ROWS))


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--objects", type=within(0, 10 ** 4 - 1), nargs="+", default=[1, 4, 6, 9, 10, 13, 14, 17], metavar="NUMBER",
        help="references: held-out assets (default: eight kinds)")
    add("--rows", nargs="+", choices=ROWS, metavar="LABEL", help="only these rows (default: all)")
    add("--seed", type=a_seed, default=0, help="decides samples and training (default %(default)s)")
    add("--prior", help="view-conditioned model (default: the run folder's, else the shipped one)")
    add("--sds_steps", type=within(1, 10 ** 6), default=1000, help="steps of score distillation (default %(default)s)")
    add("--sds_scale", type=within(-1000, 1000, float), default=10.0, help="its guidance on the reference (default "
        "%(default)s)")
    add("--results", default="results", help="where the table and its picture go (default %(default)s)")
    add("--folder", default="runs/toy", help="run folder: sets, prior, generators (default %(default)s)")
    add("--threads", type=some_threads, help="CPU threads (default: 1)")
    add("--train_flags", default="", help="more flags for related.cad, as --train_flags='--steps 500'")
    args = parser.parse_args(argv)
    check_row_flags(parser, args.train_flags, OF_THE_ROWS,
                    lambda words: cad.parse_args(["--object", "0", "--prompt", "a mug", *words]))
    return args


def main(argv=None):
    compare_rows(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
