"""Sampling (Sec. 4.3, B.3): DDIM, guidance on the text, Domain Shifters switched by block and by timestep.

    python sample.py                                        # an object of the toy world, from the shipped weights
    python sample.py --object 3 7 --domain shifted          # objects 3 and 7 of the held-out ones, shifted mode only
    python sample.py --model runs/toy/realiz3d_text.safetensors --prompt "a red wooden mug"     # four views from text
    python sample.py --model weights/toy_base.safetensors --prompt "photo of a red wooden mug"  # the base model
    torchrun --nproc_per_node=8 sample.py --real_set runs/toy/sets/real.safetensors             # the real set (C.1)

The picture has a row for the control maps and one for each domain mode, with the four views side by side.
"""
import argparse
import json
import math
import os
import shutil

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from dit import (T, add_noise, alphas_cumprod, launch, load_model, load_tensors, run_cli, save_tensors,
                 seeded_generator)
from domain_shifter import REAL, SYN, ShiftedDiT, load_adapter, load_shifters, shifted_domains, uniform_domains

CFG_SCALE = 1.0         # guidance on the text, 1 = none: more burns toy photos to flat colours that look rendered
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"
SAMPLES = 4             # first key of the generators of initial noise (train_stage1.py has the other families)

# ---------------------------------------------------------------------------------------------------------------------
# DDIM (Song et al. 2021; 50 steps in Sec. B.3)


def ddim_timesteps(num_steps, spacing="trailing"):
    """The timesteps DDIM visits, from noise to image: (num_steps,) decreasing integers in [0, T).

    "trailing" ends on T - 1, so three of 50 steps lie at t >= t_max = 950; "leading" and "linspace" as in diffusers.
    """
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps must lie in 1..{T}, not {num_steps}")
    if spacing == "trailing":
        steps = torch.arange(T, 0, -T / num_steps, dtype=torch.float64).round() - 1
    elif spacing == "leading":
        steps = torch.arange(num_steps, dtype=torch.float64).flip(0) * (T // num_steps)
    elif spacing == "linspace":
        steps = torch.linspace(0, T - 1, num_steps, dtype=torch.float64).flip(0).round()
    else:
        raise ValueError(f"spacing must be trailing, leading or linspace, not {spacing!r}")
    return steps.long()[:num_steps]


def ddim_sample(predict_noise, x, num_steps=50, spacing="trailing", clip_x0=False, t_start=T):
    """DDIM (Song et al. 2021, eq. 12 with sigma = 0): from noise x (B, ...) at t = T to an image of the same shape.

    predict_noise(x, t): epsilon like x, at t, a scalar integer tensor. clip_x0: keep the predicted image in [-1, 1],
    which only makes sense where x is pixels. t_start: x is an image noised to this step; later ones are left out.
    """
    steps = ddim_timesteps(num_steps, spacing)
    for t in steps[steps <= t_start]:
        eps = predict_noise(x, t.to(x.device))
        previous = int(t) - T // num_steps
        alpha_bar = float(alphas_cumprod[t])
        alpha_bar_previous = float(alphas_cumprod[previous]) if previous >= 0 else 1.0
        x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar ** 0.5
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = (x - alpha_bar ** 0.5 * x0) / (1 - alpha_bar) ** 0.5
        x = alpha_bar_previous ** 0.5 * x0 + (1 - alpha_bar_previous) ** 0.5 * eps
    return x


# ---------------------------------------------------------------------------------------------------------------------
# What DDIM asks for: guided noise, in a domain


def domain_mode(mode, num_blocks, B_max=0.3, t_max=950):
    """"real", "syn" or "shifted" (Sec. 4.3) -> a function of t (B,) that gives the (N_B, B) table of domains."""
    if mode == "shifted":
        return lambda t: shifted_domains(t, num_blocks, B_max, t_max)
    domain = {"real": REAL, "syn": SYN}[mode]
    return lambda t: uniform_domains(domain, num_blocks, len(t), t.device)


def guided_noise(network, text, null_text, domains, cfg_scale, **inputs):
    """predict_noise(x, t) for `ddim_sample`: classifier-free guidance on the text alone (Sec. B.3).

    network: ShiftedDiT. text: (B, L) or (B, L, D); null_text: (1, L) or (1, L, D), the empty caption. domains: from
    `domain_mode`. inputs: control, view, text_mask; they stay on in both passes, which run as one batch.
    """
    def predict_noise(x, t):
        t = t.expand(len(x))
        if cfg_scale == 1:
            return network(x, t, text, domains(t), **inputs)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, null_text.expand_as(text)]),
                       domains(torch.cat([t, t])), **{k: torch.cat([v, v]) for k, v in inputs.items()})
        with_text, without_text = both.chunk(2)
        return without_text + cfg_scale * (with_text - without_text)
    return predict_noise


def ticking(predict_noise, progress, share):
    """predict_noise that moves a progress bar on by `share` of each image in x (B, V, C, H, W)."""
    def tick(x, t):
        progress.update(share * x.shape[0] * x.shape[1])
        return predict_noise(x, t)
    return tick


@torch.no_grad()
def sample_images(network, text, mode="real", views=1, control=None, seed=0, first=0, cfg_scale=CFG_SCALE, num_steps=50,
                  spacing="trailing", B_max=0.3, t_max=950, use_views=True, batch=64, progress=None):
    """Samples one grid per caption.

    network: ShiftedDiT of a model that embeds token ids. text: (N, L) ids. views: images a grid, V; 1 is single-image
    mode. control: (N, V, C_c, H, W) or None. Sample k (numbered from `first`) starts from noise of its own generator,
    (seed, k), so it does not depend on batch size or on how samples are spread over ranks.
    Returns (N, V, C, H, W) in the model's range, on the CPU.
    """
    config, like = network.dit.config, network.dit.positions            # like: its device and dtype
    device = like.device
    null_text = data.tokenize([""]).to(device)
    domains = domain_mode(mode, config.depth, B_max, t_max)
    images = []
    for start in range(0, len(text), batch):
        rows = range(start, min(start + batch, len(text)))
        shape = (views, config.channels, config.image_size, config.image_size)
        noises = [torch.randn(shape, generator=seeded_generator(SAMPLES, seed, first + k)) for k in rows]
        x = torch.stack(noises).to(like)                                # (B, V, C, H, W)
        inputs = {} if control is None else {"control": control[rows.start:rows.stop].to(like)}
        if views > 1 and use_views:
            inputs["view"] = torch.arange(views, device=device).expand(len(rows), views)
        noise = guided_noise(network, text[rows.start:rows.stop].to(device), null_text, domains, cfg_scale, **inputs)
        if progress is not None:
            noise = ticking(noise, progress, 1 / num_steps)
        images.append(ddim_sample(noise, x, num_steps, spacing, clip_x0=config.output_skip).cpu())
    return torch.cat(images)


@torch.no_grad()
def sdedit(network, images, text, t=500, num_steps=50, cfg_scale=CFG_SCALE, seed=0, first=0):
    """SDEdit (Meng et al. 2022; baseline 8): images noised to t, one noise for all views of a grid, and each view
    denoised alone by the base model.

    network: ShiftedDiT of the base model. images: (N, V, C, H, W) in [-1, 1], from syn_only. text: (N, V, L) ids, what
    the base model is asked for, view by view. Returns (N, V, C, H, W) in [-1, 1] on the CPU.
    """
    config, like, null_text = network.dit.config, network.dit.positions, data.tokenize([""])
    steps = ddim_timesteps(num_steps)
    start, done = steps[steps <= t].max(), []
    for k, grid in enumerate(images):
        noise = torch.randn(grid.shape[1:], generator=seeded_generator(SAMPLES, seed, first + k)).to(like)
        x = add_noise(grid.to(like), noise.expand(grid.shape), start.expand(len(grid)).to(like.device))[:, None]
        predict = guided_noise(network, text[k].to(like.device), null_text.to(like.device),
                               domain_mode("real", config.depth), cfg_scale)
        done.append(ddim_sample(predict, x, num_steps, clip_x0=config.output_skip, t_start=int(start)).cpu()[:, 0])
    return torch.stack(done)


def load_network(path, device="cpu", config=None, shifters=None):
    """ShiftedDiT from a checkpoint: its model, its Domain Shifters (or those of the file `shifters`) and adapter."""
    model = load_model(path, device, config)
    return ShiftedDiT(model, load_shifters(shifters or path, device, model.config),
                      load_adapter(path, device, model.config)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The real set: what the base model itself draws (Sec. 5, C.1)


def write_real_set(path, base, num_assets, seed=0, num_steps=20, cfg_scale=1.0, chunk=64, launched=None):
    """Draws four images a caption with the base model and writes the real set of stage 1 and 2, over all ranks.

    path: the safetensors to write: {"image": uint8 (N, 1, 3, H, W), "text": (N, L)}, N = 4 num_assets, the text being
    the captions to train on (data.real_captions). No guidance by default, see CFG_SCALE. Chunks of images are written
    on the way, each a pure function of the base model, seed and its place, so that a run that was stopped goes on.
    """
    device, rank, world = launched or launch()
    network = load_network(base, device)
    draw, train = data.real_captions(data.sample_assets(num_assets, data.SEEDS["synthetic"]))
    size = network.dit.config.image_size
    parts, key = f"{path}.parts", dict(base=file_id(base), num_assets=num_assets, seed=seed, num_steps=num_steps,
                                       cfg_scale=cfg_scale, size=size, world=data.WORLD_VERSION)
    if up_to_date(path, key):
        return
    text, starts = data.tokenize(draw), range(0, len(draw), chunk)
    mine = starts[rank::world]
    with tqdm(total=sum(len(text[start:start + chunk]) for start in mine), desc="real set, drawn by the base model",
              unit="image", bar_format=BAR, disable=rank > 0) as progress:
        for start in mine:
            part, rows = f"{parts}/{start:08d}.safetensors", text[start:start + chunk]
            if up_to_date(part, key):
                progress.update(len(rows))
                continue
            images = sample_images(network, rows, seed=seed, first=start, cfg_scale=cfg_scale, num_steps=num_steps,
                                   batch=chunk, progress=progress)
            save_tensors(part, {"image": data.to_uint8(images)}, key=key)
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        images = torch.cat([load_tensors(f"{parts}/{start:08d}.safetensors")[0]["image"] for start in starts])
        save_tensors(path, {"image": images, "text": data.tokenize(train)}, key=key)
        rows = [(train[k], images[k:k + 4, 0]) for k in range(0, min(40, len(train)), 4)]
        save_picture(f"{path.removesuffix('.safetensors')}.png", rows, column_titles=data.VIEWS)
        shutil.rmtree(parts)
    if world > 1:
        torch.distributed.barrier()


def up_to_date(path, key):
    """Whether `path` is a readable file made with this key."""
    try:
        return load_tensors(path)[1].get("key") == key
    except (FileNotFoundError, ValueError):
        return False


def file_id(path):
    """Name and size of a checkpoint with a checksum of its first tensors: changes when the checkpoint does."""
    tensors, _ = load_tensors(path)
    return [os.path.basename(path), sum(float(tensor.double().abs().sum()) for tensor in tensors.values())]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def save_picture(path, rows, scale=3, column_titles=()):
    """Writes labelled rows of images as one PNG: rows = [(label, uint8 (n, 3, H, W)), ...]."""
    label_width, pad = 8 + 6 * max(len(label) for label, _ in rows), 2
    size = rows[0][1].shape[-1] * scale + pad
    width, top = label_width + size * max(len(images) for _, images in rows), 16 if column_titles else 0
    sheet = Image.new("RGB", (width, top + size * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, title in enumerate(column_titles):
        pen.text((label_width + size * k, 2), title, "black")
    for r, (label, images) in enumerate(rows):
        pen.text((4, top + size * r + size // 2 - 6), label, "black")
        for k, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size - pad,) * 2, Image.NEAREST)
            sheet.paste(tile, (label_width + size * k, top + size * r))
    save_image(path, sheet)


def save_image(path, image):
    """Writes a PIL image to a temporary name and moves it into place."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def axes(points, x_label, y_label, log_y=False, size=(640, 360)):
    """An empty plot that spans points [(x, y), ...]: the sheet, its pen, and place(x, y) -> pixels."""
    (width, height), left, bottom = size, 60, 36
    scale_y = (lambda y: math.log10(max(y, 1e-12))) if log_y else float
    (x0, x1), (y0, y1) = [(min(v), max(v) + (max(v) == min(v))) for v in
                          ([x for x, _ in points], [scale_y(y) for _, y in points])]

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (width - left - 12),
                height - bottom - (scale_y(y) - y0) / (y1 - y0) * (height - bottom - 12))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([left, 12, width - 12, height - bottom], outline="black")
    for k in range(5):
        x, y = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4
        y = 10 ** y if log_y else y
        pen.text((place(x, points[0][1])[0] - 12, height - bottom + 4), f"{x:.4g}", "black")
        pen.text((4, place(x0, y)[1] - 6), f"{y:.3g}", "black")
    pen.text((width // 2, height - 16), x_label, "black")
    pen.text((left + 8, 16), y_label, "black")
    return sheet, pen, place


def draw_plot(curves, x_label, y_label, log_y=False, size=(640, 360), y_range=()):
    """A line plot: curves = {name: [(x, y), ...]}, spanning y_range at least. Returns a PIL image."""
    points = [point for curve in curves.values() for point in curve]
    sheet, pen, place = axes(points + [(points[0][0], y) for y in y_range], x_label, y_label, log_y, size)
    for k, (name, curve) in enumerate(sorted(curves.items())):
        pen.line([place(x, y) for x, y in sorted(curve)], COLORS[k % 5], 2)
        pen.text((sheet.width - 100, 16 + 14 * k), name, COLORS[k % 5])
    return sheet


def save_plot(path, curves, x_label, y_label, log_y=False):
    """Writes `draw_plot` as PNG."""
    save_image(path, draw_plot(curves, x_label, y_label, log_y))


def save_points(path, points, x_label, y_label, limit=None):
    """Writes a plot of labelled points as PNG: points = {label: (x, y)}; limit: draws a vertical line at this x."""
    corners = list(points.values()) + ([(limit, next(iter(points.values()))[1])] if limit is not None else [])
    sheet, pen, place = axes(corners, x_label, y_label, size=(900, 560))
    if limit is not None:
        pen.line([(place(limit, 0)[0], 12), (place(limit, 0)[0], sheet.height - 36)], "gray")
    for k, (label, point) in enumerate(points.items()):
        x, y = place(*point)
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=COLORS[k % 5])
        pen.text((x + 7 if x < 700 else x - 7 - 6 * len(label), y - 6), label, COLORS[k % 5])
    save_image(path, sheet)


# ---------------------------------------------------------------------------------------------------------------------


def default_base(preset="toy", folder=None):
    """Path of the base model: the run folder's, else the one that comes with the repository.

    Raises FileNotFoundError, saying how to get one.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    for path in (f"{folder or f'runs/{preset}'}/base.safetensors", f"{here}/weights/{preset}_base.safetensors"):
        if os.path.isfile(path):
            return path
    how = ("name a PixArt-alpha safetensors file with --base" if preset == "full" else
           f"pretrain one with python train_stage1.py --stage base --preset {preset}, or name one with --base")
    raise FileNotFoundError(f"preset {preset} has no base model yet: {how}")


def default_model(preset="toy", task="texturing", method="realiz3d"):
    """Path of the newest trained model: the run folder's, else the one that comes with the repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    for path in (f"runs/{preset}/{method}_{task}.safetensors", f"{here}/weights/{preset}_{method}_{task}.safetensors"):
        if os.path.isfile(path):
            return path
    flags = f"--preset {preset} --task {task}" + (f" --method {method}" if method != "realiz3d" else "")
    raise FileNotFoundError(f"no {method} model in runs/{preset} or weights: train one with python train_stage2.py "
                            f"{flags}")


def trained_task(path):
    """The task a stage-2 model was trained for, None for a base model."""
    return load_tensors(path)[1].get("settings", {}).get("task")


def selected_shift(path):
    """B_max and t_max that `evaluate.py select` left beside a model, the paper's 0.3 and 950 without (Sec. 4.3)."""
    choice = f"{path.removesuffix('.safetensors')}.shift.json"
    if not os.path.isfile(choice):
        return 0.3, 950
    with open(choice) as file:
        stored = json.load(file)
    return stored["B_max"], stored["t_max"]


MODES = {"syn": "synthetic mode", "real": "real mode", "shifted": "shifted"}


def object_sheet(path, network, objects, task="texturing", modes=tuple(MODES), **options):
    """Samples captions (and control maps) in each domain mode and writes the picture: a row for each mode.

    objects: {"text": (N, L), "control": (N, V, 6, H, W)}, as from data.evaluation_set. task: "texturing" or "text" for
    four views an object; None for one image a caption. A network without shifters has no modes. options: see
    `sample_images`. Returns {mode: images (N, V, C, H, W) in [-1, 1]}.
    """
    control, views = objects["control"] if task == "texturing" else None, 4 if task else 1
    modes = modes if network.knows_domains() else ("real",)
    total = len(modes) * len(objects["text"]) * views
    with tqdm(total=total, desc="sampling", unit="image", bar_format=BAR) as progress:
        images = {mode: sample_images(network, objects["text"], mode, views, control, progress=progress, **options)
                  for mode in modes}
    rows = [] if control is None else [("normals", control[:, :, :3]), ("positions", control[:, :, 3:])]
    rows += [(MODES[mode] if network.knows_domains() else "generated", images[mode]) for mode in modes]
    save_picture(path, [(label, data.to_uint8(row).flatten(0, 1)) for label, row in rows],
                 column_titles=data.VIEWS * len(objects["text"]) if task else ())
    return images


def save_views(folder, images, objects, names):
    """Writes each view as a file of its own: FOLDER/MODE/NAME/color_000.png, .., and the positions it shows, where the
    objects have them, as FOLDER/positions/NAME/position_000.npy, float32 (H, W, 3), NaN off the object.

    images: {mode: (N, V, 3, H, W) in [-1, 1]}. objects: from data.evaluation_set. names: N of them.
    """
    for mode, grids in images.items():
        for name, grid in zip(names, data.to_uint8(grids)):
            for v, image in enumerate(grid):
                save_image(f"{folder}/{mode}/{name}/color_{v:03}.png", Image.fromarray(image.permute(1, 2, 0).numpy()))
    for k, name in enumerate(names if "position" in objects else ()):
        os.makedirs(f"{folder}/positions/{name}", exist_ok=True)
        maps = objects["position"][k].masked_fill(objects["mask"][k] < 255, math.nan)
        for v, position in enumerate(maps):
            np.save(f"{folder}/positions/{name}/position_{v:03}.npy", position.permute(1, 2, 0).cpu().numpy())


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint (default: the run folder's realiz3d of this task, else the shipped one)")
    add("--shifters", help="shifters of stage 1, to put into a model without its own")
    add("--preset", choices=("toy", "small"), default="toy", help="which default model (full: see --model)")
    add("--task", choices=("texturing", "text"), help="default: the one the model was trained for")
    add("--object", type=int, nargs="+", default=[0, 1, 2], help="numbers of held-out objects")
    add("--prompt", nargs="+", help="captions instead of objects: a base model or --task text")
    add("--domain", choices=("all", "real", "syn", "shifted"), default="all", help="domain mode (default: all three)")
    add("--B_max", type=float, help="layer shift: share of the blocks that run in synthetic mode (default: what "
        "evaluate.py select found for this model, else 0.3)")
    add("--t_max", type=int, help="time shift: steps t >= t_max run in synthetic mode; 1000 = none (default: likewise, "
        "else 950)")
    add("--cfg_scale", type=float, default=CFG_SCALE, help="guidance on the text, 1 = none")
    add("--num_steps", type=int, default=50, help="DDIM steps")
    add("--spacing", choices=("trailing", "leading", "linspace"), default="trailing", help="spacing of the steps")
    add("--seed", type=int, default=0, help="decides the noise")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--out", help="picture to write (default runs/PRESET/sample.png)")
    add("--views", metavar="DIR", help="also write every view as its own file, as evaluate.py folders reads them")
    add("--real_set", metavar="FILE", help="draw the real set of stages 1 and 2 with the base model, instead")
    add("--num_assets", type=int, default=640, help="real set: assets, four images each")
    return parser, parser.parse_args(argv)


def main():
    parser, args = parse_args()
    launched = device, rank, _ = launch(args.threads)
    if args.real_set:
        base = args.model or default_base(args.preset)
        write_real_set(args.real_set, base, args.num_assets, args.seed, args.num_steps, args.cfg_scale,
                       launched=launched)
        print(f"wrote {args.real_set}")
        return
    try:
        text = data.tokenize(args.prompt or [])
    except ValueError as error:
        parser.error(str(error))
    if min(args.object) < 0:
        parser.error(f"--object must be 0 or more, not {min(args.object)}")
    path = args.model or default_model(args.preset, args.task or "texturing")
    network = load_network(path, device, shifters=args.shifters)
    config = network.dit.config
    if not config.vocab_size:
        raise ValueError(f"{path} is a latent model: it has no pictures without a VAE")
    task = trained_task(path)                                       # None: a base model, one image a caption
    if args.task not in (None, task):
        raise ValueError(f"{path} was trained for {task or 'no task (a base model)'}, not for {args.task}")
    if task == "texturing" and args.prompt:
        raise ValueError("a texturing model needs an object's maps: name one with --object, or use --task text")
    if args.domain != "all" and not network.knows_domains():
        raise ValueError(f"{path} has no Domain Shifters, so no --domain; add some with --shifters FILE")
    B_max, t_max = selected_shift(path)
    options = dict(seed=args.seed, cfg_scale=args.cfg_scale, num_steps=args.num_steps, spacing=args.spacing,
                   B_max=B_max if args.B_max is None else args.B_max, t_max=t_max if args.t_max is None else args.t_max)
    out = args.out or f"runs/{args.preset}/sample.png"
    modes = ("syn", "real", "shifted") if args.domain == "all" else (args.domain,)
    objects = data.evaluation_set(max(args.object) + 1, size=config.image_size, folder=f"runs/{args.preset}/sets")
    objects = {"text": text} if args.prompt else {key: value[args.object] for key, value in objects.items()}
    if rank == 0:
        images = object_sheet(out, network, objects, task, modes, **options)
        if args.views:
            save_views(args.views, images, objects, range(len(text)) if args.prompt else args.object)
        print(f"{path} -> {out}" + (f" and the single views in {args.views}" if args.views else ""))


if __name__ == "__main__":
    run_cli(main)
