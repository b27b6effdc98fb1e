"""Sampling (Sec. 4.3, B.3): DDIM, guidance on the text, Domain Shifters switched by block and by timestep.

    python sample.py                                        # three toy objects, from the shipped weights
    python sample.py --object 3 7 --domain shifted          # objects 3 and 7 of the held-out ones, shifted mode only
    python sample.py --model runs/toy/realiz3d_text.safetensors --prompt "a red wooden mug"     # four views from text
    python sample.py --object 3 --textured runs/toy/textured                    # a textured 3D object: GLB, OBJ
    python sample.py --mesh chair.obj --prompt "a blue metal chair" --textured runs/toy/textured    # your own geometry
    python sample.py --model weights/toy_base.safetensors --prompt "photo of a red wooden mug"  # the base model
    torchrun --nproc_per_node=8 sample.py --real_set real.safetensors                           # the real set (C.1)

The picture has a row for the control maps and one for each domain mode, with the four views side by side.
"""
import argparse
import io
import json
import math
import os
import shutil
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree
from tqdm import tqdm

import data
from dit import (PRESETS, T, add_noise, alphas_cumprod, launch, load_base, load_tensors, read_metadata, run_cli,
                 save_tensors, seeded_generator, up_to_date)
from domain_shifter import (REAL, SYN, ShiftedDiT, block_count, load_adapter, load_shifters, shifted_domains,
                            uniform_domains)

CFG_SCALE = 1.0         # guidance on the text, 1 = none: more burns toy photos to flat colours that look rendered
LATENT_CFG_SCALE = 4.5  # PixArt-alpha's, which draws poorly without
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"
SAMPLES = 4             # first key of the generators of initial noise (train_stage1.py has the other families)

# ---------------------------------------------------------------------------------------------------------------------
# DDIM (Song et al. 2021; 50 steps in Sec. B.3)


def ddim_timesteps(num_steps, spacing="trailing"):
    """The timesteps DDIM visits, from noise to image: (num_steps,) decreasing integers in [0, T).

    "trailing" starts at T - 1, so three of 50 steps lie at t >= t_max = 950; "leading" and "linspace" as in diffusers.
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
    # the next one visited; after linspace diffusers takes equal steps, which come close to it
    following = steps - T // num_steps if spacing == "linspace" else [*steps[1:].tolist(), -1]
    for t, previous in zip(steps, following):
        if t > t_start:
            continue
        eps = predict_noise(x, t.to(x.device))
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
    """"real", "syn" or "shifted" (Sec. 4.3) -> a function of t (B,) that gives the (N_B, B) table of domains.

    mode may be a number s too, for e(s) = (1 - s) e_syn + s e_real in all blocks: a dial from render to photograph.
    """
    if mode == "shifted":
        return lambda t: shifted_domains(t, num_blocks, B_max, t_max)
    domain = {"real": REAL, "syn": SYN}.get(mode, mode)
    return lambda t: uniform_domains(domain, num_blocks, len(t), t.device)


def guided_noise(network, null, domains, cfg_scale, **inputs):
    """predict_noise(x, t) for `ddim_sample`: classifier-free guidance on the text alone (Sec. B.3).

    network: ShiftedDiT. null: the empty caption, "text" (1, L) or (1, L, D), perhaps "text_mask". domains: from
    `domain_mode`. inputs: "text" (B, L) or (B, L, D), perhaps "text_mask"; control and view, which stay on in both
    passes. The passes run as one batch.
    """
    if cfg_scale != 1:
        inputs = {key: torch.cat([value, null[key].expand_as(value).to(value) if key in null else value])
                  for key, value in inputs.items()}

    def predict_noise(x, t):
        if cfg_scale == 1:
            return network(x, t.expand(len(x)), domains=domains(t.expand(len(x))), **inputs)
        t = t.expand(2 * len(x))
        with_text, without_text = network(torch.cat([x, x]), t, domains=domains(t), **inputs).chunk(2)
        return without_text + cfg_scale * (with_text - without_text)
    return predict_noise


def ticking(predict_noise, progress, share):
    """predict_noise that moves a progress bar on by `share` of each image in x (B, V, C, H, W)."""
    def tick(x, t):
        progress.update(min(share * x.shape[0] * x.shape[1], progress.total - progress.n))      # no rounding past it
        return predict_noise(x, t)
    return tick


def check_sampling(num_steps, spacing, cfg_scale, seed, B_max, t_max):
    """Raises ValueError naming the first of these that is out of its range."""
    ddim_timesteps(num_steps, spacing)
    block_count(B_max, 1)
    if not 0 <= t_max <= T:
        raise ValueError(f"t_max must lie in 0..{T} ({T}: no time shift), not {t_max}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be a finite number, not {cfg_scale}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")


@torch.no_grad()
def sample_images(network, text, mode="real", views=1, control=None, seed=0, keys=None, cfg_scale=CFG_SCALE,
                  num_steps=50, spacing="trailing", B_max=0.3, t_max=950, use_views=True, batch=64, progress=None,
                  text_mask=None, null=None):
    """Samples one grid per caption.

    network: ShiftedDiT. text: (N, L) ids; or vectors (N, L, D), with text_mask (N, L) and the empty caption, null, as
    `guided_noise` takes it. views: images a grid, V; 1 is single-image mode. control: (N, V, C_c, H, W) or None. keys:
    N whole numbers (default 0, 1, ..): sample k starts from noise of its own generator, (seed, keys[k]), so it does not
    depend on batch size or on how samples are spread over ranks. Latents are sampled in bf16 on CUDA.
    Returns (N, V, C, H, W) in the model's range, on the CPU.
    """
    config, like = network.dit.config, network.dit.positions            # like: its device and dtype
    null = {key: value.to(like.device) for key, value in (null or {"text": data.tokenize([""])}).items()}
    check_sampling(num_steps, spacing, cfg_scale, seed, B_max, t_max)
    domains = domain_mode(mode, config.depth, B_max, t_max)
    shape = (views, config.channels, config.image_size, config.image_size)
    images, keys = [], range(len(text)) if keys is None else keys
    for rows in torch.arange(len(text)).split(batch):
        x = torch.stack([torch.randn(shape, generator=seeded_generator(SAMPLES, seed, keys[k])) for k in rows]).to(like)
        inputs = {"text": text[rows].to(like.device)}                   # x (B, V, C, H, W)
        if text_mask is not None:
            inputs["text_mask"] = text_mask[rows].to(like.device)
        if control is not None:
            inputs["control"] = control[rows].to(like)
        if views > 1 and use_views:
            inputs["view"] = torch.arange(views, device=like.device).expand(len(rows), views)
        noise = guided_noise(network, null, domains, cfg_scale, **inputs)
        if progress is not None:
            noise = ticking(noise, progress, 1 / num_steps)
        with torch.autocast(like.device.type, torch.bfloat16, enabled=like.is_cuda and not config.vocab_size):
            images.append(ddim_sample(noise, x, num_steps, spacing, clip_x0=config.output_skip).cpu())
    return torch.cat(images)


@torch.no_grad()
def sdedit(network, images, text, t=500, num_steps=50, cfg_scale=CFG_SCALE, seed=0, first=0):
    """SDEdit (Meng et al. 2022; baseline 8): images noised to t, one noise for all views of a grid, and each view
    denoised alone by the base model.

    network: ShiftedDiT of the base model. images: (N, V, C, H, W) in [-1, 1], from syn_only. text: (N, V, L) ids, what
    the base model is asked for, view by view. Returns (N, V, C, H, W) in [-1, 1] on the CPU.
    """
    config, like = network.dit.config, network.dit.positions
    null = {"text": data.tokenize([""]).to(like.device)}
    steps = ddim_timesteps(num_steps)
    start, done = steps[steps <= t].max(), []
    for k, grid in enumerate(images):
        noise = torch.randn(grid.shape[1:], generator=seeded_generator(SAMPLES, seed, first + k)).to(like)
        x = add_noise(grid.to(like), noise.expand(grid.shape), start.expand(len(grid)).to(like.device))[:, None]
        predict = guided_noise(network, null, domain_mode("real", config.depth), cfg_scale,
                               text=text[k].to(like.device))
        done.append(ddim_sample(predict, x, num_steps, clip_x0=config.output_skip, t_start=int(start)).cpu()[:, 0])
    return torch.stack(done)


def load_network(path, device="cpu", config=None, shifters=None):
    """ShiftedDiT from a checkpoint: its model, its Domain Shifters (or those of the file `shifters`) and adapter; or
    from PixArt-alpha's weights, which have neither."""
    model, ours = load_base(path, device, config), "config" in read_metadata(path)
    of_file = load_shifters(shifters, device, model.config) if shifters else None
    if shifters and of_file is None:
        raise ValueError(f"{shifters} holds no Domain Shifters (--shifters)")
    return ShiftedDiT(model, of_file or (load_shifters(path, device, model.config) if ours else None),
                      load_adapter(path, device, model.config) if ours else None).eval()


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
            images = sample_images(network, rows, seed=seed, keys=range(start, start + chunk), cfg_scale=cfg_scale,
                                   num_steps=num_steps, batch=chunk, progress=progress)
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


def encode_captions(captions, encode_text, dit):
    """Captions as `sample_images` takes them: text (N, L, D), text_mask (N, L), and null, PixArt's own if there is."""
    def padded(captions):
        text, mask = zip(*(data.padded(words, dit.config.text_length) for words in encode_text(captions)))
        return {"text": torch.stack(text), "text_mask": torch.stack(mask)}
    return padded(captions) | {"null": padded([""]) if dit.null_text is None else {"text": dit.null_text[None]}}


def write_latent_real_set(out, base, synthetic, text_encoder, seed=0, num_steps=20,
                          cfg_scale=LATENT_CFG_SCALE, batch=16, launched=None):
    """The real set of the full model (C.1): four images for each caption of the synthetic set, drawn by the base model.

    base: its file, of latents. synthetic: folder of `data.encode_objects`, whose captions are taken; text_encoder: as
    there. Writes a shard for each of its shards into OUT, of the same form without maps (an image drawn as latents has
    no deviation), spread over the ranks; a run that was stopped goes on. Each image is a function of its caption, its
    view phrase and seed, whatever the number of ranks.
    """
    device, rank, world = launched or launch()
    key = dict(base=file_id(base), text_encoder=data.encoder_id(text_encoder), seed=seed, num_steps=num_steps,
               cfg_scale=cfg_scale, scale=data.LATENT_SCALE)
    shards = {str(path): (read_metadata(str(path)).get("shard") or {}).get("captions") or {} for path in
              sorted(Path(synthetic).rglob("*.safetensors"))}
    if not any(shards.values()):
        raise ValueError(f"{synthetic} holds no shards with captions: write them with python data.py encode")
    shards = {os.path.join(out, os.path.relpath(path, synthetic)): captions for path, captions in shards.items()}
    for path in filter(os.path.exists, shards):
        data.check_shard(path, key, list(shards[path]))
    mine = {path: captions for path, captions in list(shards.items())[rank::world] if not os.path.exists(path)}
    if mine:                                                            # T5 takes its time to load
        network, encode_text = load_network(base, device), data.load_text_encoder(text_encoder, device)
        null_text = encode_text([""])[0].half()
    with tqdm(total=4 * sum(map(len, mine.values())), desc="real set, drawn by the base model", unit="image",
              bar_format=BAR, disable=rank > 0) as progress:
        for path, captions in mine.items():
            places = [(caption, view) for caption in captions.values() for view in data.VIEW_PHRASES]
            prompts = encode_captions([data.real_prompt(*place) for place in places], encode_text, network.dit)
            keys = [crc32(" ".join(place).encode()) for place in places]
            images = sample_images(network, **prompts, seed=seed, keys=keys, cfg_scale=cfg_scale, num_steps=num_steps,
                                   batch=batch, progress=progress)
            latents = (images[:, 0] / data.LATENT_SCALE).half().unflatten(0, (-1, 4))               # (N, 4, C, h, w)
            tensors = {"null_text": null_text}
            for name, mean, text in zip(captions, latents, encode_text([*map(data.real_prompt, captions.values())])):
                tensors |= {f"{name}.color": torch.stack([mean, torch.zeros_like(mean)], dim=1),
                            f"{name}.text": text.half()}
            save_tensors(path, tensors, shard=dict(key=key, captions=captions))
    if world > 1:
        torch.distributed.barrier()


def file_id(path):
    """Name of a checkpoint and the sum over its tensors of their absolute values: changes when the checkpoint does."""
    tensors, _ = load_tensors(path)             # numpy adds in the same order on any number of threads
    return [os.path.basename(path), sum(float(np.abs(tensor.double().numpy()).sum()) for tensor in tensors.values())]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def save_picture(path, rows, scale=3, column_titles=(), below=None):
    """Writes labelled rows of images as one PNG: rows = [(label, uint8 (n, 3, H, W)), ...]; below: a PIL image."""
    label_width, pad = 8 + 6 * max(len(label) for label, _ in rows), 2
    size = rows[0][1].shape[-1] * scale + pad
    width, top = label_width + size * max(len(images) for _, images in rows), 16 if column_titles else 0
    height = top + size * len(rows)
    sheet = Image.new("RGB", (width, height) if below is None else (max(width, below.width), height + below.height),
                      "white")
    if below is not None:
        sheet.paste(below, (0, height))
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
    """Writes a PIL image as PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    write_bytes(path, content.getvalue())


def write_bytes(path, content):
    """Writes to a temporary name and moves it into place."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)


COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def axes(points, x_label, y_label, log_y=False, size=(640, 360), margin=12):
    """An empty plot that spans points [(x, y), ...], right of it `margin` pixels: the sheet, its pen, and place(x, y)
    -> pixels."""
    (width, height), left, top, bottom = size, 60, 20, 36
    scale_y = (lambda y: math.log10(max(y, 1e-12))) if log_y else float
    (x0, x1), (y0, y1) = [(min(v), max(v) + (max(v) == min(v))) for v in
                          ([x for x, _ in points], [scale_y(y) for _, y in points])]

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (width - left - margin),
                height - bottom - (scale_y(y) - y0) / (y1 - y0) * (height - bottom - top))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([left, top, width - margin, height - bottom], outline="black")
    for x in round_numbers(x0, x1):
        at = place(x, points[0][1])[0]
        pen.line([(at, height - bottom - 4), (at, height - bottom)], "black")
        pen.text((at, height - bottom + 4), f"{x:.4g}", "black", anchor="ma")
    for y in [10 ** e for e in round_numbers(y0, y1)] if log_y else round_numbers(y0, y1):
        at = place(x0, y)[1]
        pen.line([(left, at), (left + 4, at)], "black")
        pen.text((left - 4, at), f"{y:.3g}", "black", anchor="rm")
    pen.text(((left + width - margin) // 2, height - 16), x_label, "black", anchor="ma")
    pen.text((left, top - 4), y_label, "black", anchor="ls")
    return sheet, pen, place


def round_numbers(low, high):
    """Three to nine numbers in [low, high], each a multiple of 1, 2 or 5 times a power of ten."""
    step = min((m * 10. ** e for e in range(-12, 12) for m in (1, 2, 5)), key=lambda step: abs((high - low) / step - 5))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_plot(curves, x_label, y_label, log_y=False, size=(640, 360), y_range=()):
    """A line plot: curves = {name: [(x, y), ...]}, spanning y_range at least, names beside it. Returns a PIL image."""
    points = [point for curve in curves.values() for point in curve]
    margin = 20 + 6 * max(map(len, curves))
    sheet, pen, place = axes(points + [(points[0][0], y) for y in y_range], x_label, y_label, log_y, size, margin)
    for k, (name, curve) in enumerate(sorted(curves.items())):
        pen.line([place(x, y) for x, y in sorted(curve)], COLORS[k % 5], 2)
        pen.text((sheet.width - margin + 8, 20 + 14 * k), name, COLORS[k % 5])
    return sheet


def save_plot(path, curves, x_label, y_label, log_y=False):
    """Writes `draw_plot` as PNG."""
    save_image(path, draw_plot(curves, x_label, y_label, log_y))


def draw_points(points, x_label, y_label, limit=None, size=(700, 560), highlight=()):
    """A plot of labelled points {label: (x, y)}, their labels apart, those in `highlight` in red; limit: a vertical
    line at this x. A PIL image."""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points.values()))
    x1 = x1 if limit is None else max(x1, limit)
    dx, dy = 0.06 * (x1 - x0), 0.06 * (y1 - y0)
    sheet, pen, place = axes([(x0 - dx, y0 - dy), (x1 + dx, y1 + dy)], x_label, y_label, size=size)
    if limit is not None:
        x, _ = place(limit, y0)
        pen.line([(x, 20), (x, size[1] - 36)], "gray")
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in (place(*point) for point in points.values())]
    for k, (label, point) in enumerate(points.items()):
        color = COLORS[label in highlight]
        x, y = place(*point)
        pen.ellipse(taken[k], fill=color)
        wide = pen.textlength(label)
        boxes = [(left, y - 6 + shift, left + wide, y + 5 + shift) for shift in (0, 11, -11, 22, -22, 33, -33, 44, -44)
                 for left in (x + 7, x - 7 - wide) if 60 < left < size[0] - 12 - wide]
        box = next((box for box in boxes if not any(box[0] < c and a < box[2] and box[1] < d and b < box[3]
                                                    for a, b, c, d in taken)), boxes[0])
        taken.append(box)
        pen.text(box[:2], label, color)
    return sheet


def side_by_side(images):
    """PIL images in a row."""
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (sum(other.width for other in images[:k]), 0))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------


def default_base(preset="toy", folder=None):
    """Path of the base model: the run folder's, else the one that comes with the repository.

    Raises FileNotFoundError, saying how to get one.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    for path in (f"{folder or f'runs/{preset}'}/base.safetensors", f"{here}/weights/{preset}_base.safetensors"):
        if os.path.isfile(path):
            return path
    how = ("name PixArt-alpha's weights, .pth or safetensors, with --base" if preset == "full" else
           f"pretrain one with python train_stage1.py --stage base --preset {preset}, or name one with --base")
    raise FileNotFoundError(f"preset {preset} has no base model yet: {how}")


def default_model(preset="toy", task="texturing", method="realiz3d"):
    """Path of the trained model: the run folder's, else the one that comes with the repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    for path in (f"runs/{preset}/{method}_{task}.safetensors", f"{here}/weights/{preset}_{method}_{task}.safetensors"):
        if os.path.isfile(path):
            return path
    flags = f"--preset {preset} --task {task}" + (f" --method {method}" if method != "realiz3d" else "")
    raise FileNotFoundError(f"no {method} model in runs/{preset} or weights: train one with python train_stage2.py "
                            f"{flags}")


def trained_task(path):
    """The task a stage-2 model was trained for, None for a base model."""
    return read_metadata(path).get("settings", {}).get("task")


def selected_shift(path):
    """B_max and t_max that `evaluate.py select` left beside a model, the paper's 0.3 and 950 without (Sec. 4.3)."""
    choice = f"{path.removesuffix('.safetensors')}.shift.json"
    if not os.path.isfile(choice):
        return 0.3, 950
    try:
        with open(choice) as file:
            stored = json.load(file)
        (name, total), (now_name, now) = stored["model"], file_id(path)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{choice} is damaged: delete it, or make it again with python evaluate.py select") from None
    if name != now_name or not math.isclose(total, now, rel_tol=1e-9):      # numpy may add otherwise elsewhere
        raise ValueError(f"{choice} was chosen for another model of this name: run python evaluate.py select --model "
                         f"{path} again, or delete it")
    return stored["B_max"], stored["t_max"]


MODES = {"syn": "synthetic mode", "real": "real mode", "shifted": "shifted"}


def sampled(network, objects, task, modes, decode=lambda x: x, **options):
    """Samples objects in several domain modes: {mode: images (N, V, 3, H, W) in [-1, 1]}.

    objects: {"text": (N, L), "control": (N, V, 6, H, W)}, as from data.evaluation_set, or as from `latent_objects`.
    task: "texturing", or "text" for four views an object from the caption alone, or None for one image a caption.
    decode: makes images of what is sampled. options: see `sample_images`.
    """
    inputs = {key: objects[key] for key in ("text", "text_mask", "null") if key in objects}
    inputs |= {"control": objects["control"]} if task == "texturing" else {}
    views = 4 if task else 1
    total = len(modes) * len(inputs["text"]) * views
    with tqdm(total=total, desc="sampling", unit="image", bar_format=BAR) as progress:
        return {mode: decode(sample_images(network, mode=mode, views=views, progress=progress, **inputs, **options))
                for mode in modes}


def object_sheet(path, network, objects, task="texturing", modes=tuple(MODES), decode=lambda x: x, **options):
    """Samples objects, see `sampled`, and writes the picture: the control maps and a row for each domain mode, of which
    a network without shifters has one. Returns {mode: images (N, V, 3, H, W) in [-1, 1]}."""
    images = sampled(network, objects, task, modes if network.knows_domains() else ("real",), decode, **options)
    maps = objects.get("maps", objects.get("control")) if task == "texturing" else None
    rows = [] if maps is None else [("normals", maps[:, :, :3]), ("positions", maps[:, :, 3:])]
    label = lambda mode: MODES.get(mode, f"s = {mode}") if network.knows_domains() else "generated"
    rows += [(label(mode), grids) for mode, grids in images.items()]
    save_picture(path, [(label, data.to_uint8(row).flatten(0, 1)) for label, row in rows],
                 scale=1 if rows[-1][1].shape[-1] > 128 else 3,
                 column_titles=data.VIEWS * len(objects["text"]) if task else ())
    return images


def save_views(folder, images, objects, names):
    """Writes each view as a file of its own: FOLDER/MODE/NAME/color_000.png, .., the caption beside it in meta.json and
    the positions it shows as FOLDER/positions/NAME/position_000.npy, p + 0.5, float32 (H, W, 3), NaN off the object;
    both where the objects have them.

    images: {mode: (N, V, 3, H, W) in [-1, 1]}. objects: from data.evaluation_set. names: N of them.
    """
    for mode, grids in images.items():
        for k, (name, grid) in enumerate(zip(names, data.to_uint8(grids))):
            for v, image in enumerate(grid):
                save_image(f"{folder}/{mode}/{name}/color_{v:03}.png", Image.fromarray(image.permute(1, 2, 0).numpy()))
            if "captions" in objects:
                meta = json.dumps({"caption": objects["captions"][k]}) + "\n"
                write_bytes(f"{folder}/{mode}/{name}/meta.json", meta.encode())
    for k, name in enumerate(names if "position" in objects else ()):
        os.makedirs(f"{folder}/positions/{name}", exist_ok=True)
        maps = (objects["position"][k] + 0.5).masked_fill(objects["mask"][k] < 255, math.nan)
        for v, position in enumerate(maps):
            np.save(f"{folder}/positions/{name}/position_{v:03}.npy", position.permute(1, 2, 0).cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Textured meshes (D.4): the four views back-projected on the surface, as GLB and OBJ


def atlas(num_faces, size):
    """A place in a square texture for each triangle: two to a cell, each with all the texels of its half.

    Returns uv (F, 3, 2) in texels, and of each texel its face (size, size), -1 for none, and its barycentric place
    (size, size, 3), which lies on the triangle's rim for the texels beside it, so that bilinear filters find no foreign
    colour. Raises ValueError where the cells would be smaller than 4 texels.
    """
    columns = math.ceil(math.sqrt((num_faces + 1) // 2))
    cell = size // columns
    if cell < 4:
        raise ValueError(f"{num_faces} triangles do not fit a texture of {size} x {size}: use a larger --texture_size")
    face, half = torch.arange(num_faces), torch.arange(num_faces) % 2
    corner = torch.stack([face // 2 % columns, face // 2 // columns], dim=1) * cell                 # (F, 2) column, row
    low, high = 0.5, cell - 2.5
    lower = torch.tensor([[low, low], [high, low], [low, high]])        # the other half is turned round in its cell
    uv = corner[:, None] + torch.where(half[:, None, None] == 0, lower, cell - lower)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    x, y = column % cell + 0.5, row % cell + 0.5
    second = x + y > cell
    number = 2 * (row // cell * columns + column // cell) + second
    number = torch.where((column // cell < columns) & (number < num_faces), number, -1)
    x, y = torch.where(second, cell - x, x), torch.where(second, cell - y, y)
    b, c = ((z - low) / (high - low) for z in (x, y))
    place = torch.stack([1 - b - c, b, c], dim=-1).clamp(min=0)
    return uv, number, place / place.sum(dim=-1, keepdim=True)


def texture_mesh(mesh, images, size=1024, power=4, azimuth=data.AZIMUTHS, elevation=data.ELEVATION):
    """Back-projects views on a mesh (D.4): (texture uint8 (size, size, 3), uv (F, 3, 2) in texels, covered share).

    images: (V, 3, H, W) in [0, 1]. A texel takes the mean of the views that see it, weighed by the cosine of the angle
    to the power `power`; one that no view sees has the colour of the nearest on the surface that is seen. Covered is
    the share of the surface's area that is seen.
    """
    uv, face, place = atlas(len(mesh.faces), size)
    used = face >= 0
    face, place = face[used], place[used][:, :, None]
    points = (mesh.vertices[mesh.faces][face] * place).sum(dim=1)                                   # (texels, 3)
    normals = F.normalize((data.corner_normals(mesh)[face] * place).sum(dim=1), dim=1)
    fine = 8 * images.shape[-1]                                         # to see what hides what
    seen_face, seen_place = data.rasterize(mesh, fine, azimuth, elevation)
    surface = (mesh.vertices[mesh.faces][seen_face] * seen_place[..., None]).sum(dim=3)             # (V, fine, fine, 3)
    whole = (data.coverage(mesh, images.shape[-1], azimuth, elevation) == 1).float()                # no white mixed in
    inner = 1 - F.max_pool2d(1 - whole, 3, 1, 1)      # a generated outline may miss by a pixel: its
    trust = inner + 0.02 * (whole - inner) * ((1 - images).amax(dim=1, keepdim=True) > 0.15)    # own counts little
    total, weights = torch.zeros(len(points), 3), torch.zeros(len(points), 1)
    for v, turn in enumerate(azimuth):
        column, row, _ = data.project(points.T[:, None], turn, elevation, size=1)                   # (1, texels)
        x, y = ((z[0] * fine).long().clamp(0, fine - 1) for z in (column, row))
        visible = ((surface[v, y, x] - points).norm(dim=1) < 0.02) & (seen_face[v, y, x] >= 0)
        cosine = -(normals @ data.camera(turn, elevation)[2])
        read = lambda maps: data.bilinear(maps[None], *(z[None] * maps.shape[-1] for z in (column, row)))[0, :, 0].T
        inside = read(trust[v])
        color = read(images[v] * trust[v]) / inside.clamp(min=1e-6)
        weight = (cosine.clamp(min=0)**power * visible * (cosine > 0.1))[:, None] * inside * (inside > 1e-3)
        total, weights = total + weight * color, weights + weight
    seen = weights[:, 0] > 0
    if not seen.any():
        raise ValueError("no view sees any of the mesh")
    colors = total / weights.clamp(min=1e-12)
    near = seen.nonzero()[::4, 0]                                       # a quarter of them: texels lie close together
    colors[~seen] = colors[near[cKDTree(points[near]).query(points[~seen])[1]]]
    p = mesh.vertices[mesh.faces]
    area = torch.linalg.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]).norm(dim=1)
    area = (area / face.bincount(minlength=len(area)))[face]            # of each texel
    texture = torch.full((size, size, 3), 255, dtype=torch.uint8)
    texture[used] = (colors * 255).round().byte()
    return texture, uv, float(area[seen].sum() / area.sum())


def write_glb(path, mesh, texture, uv):
    """Writes a textured mesh as GLB (glTF 2.0): y up, picture inside as PNG, its origin top left, colours as they are
    (unlit, as the light is in them)."""
    picture = io.BytesIO()
    Image.fromarray(texture.numpy()).save(picture, "PNG")
    corners = [t.reshape(-1, t.shape[-1]).numpy().astype("<f4") for t in
               (mesh.vertices[mesh.faces], data.corner_normals(mesh), uv / texture.shape[0])]
    blobs = [array.tobytes() for array in corners] + [np.arange(len(corners[0]), dtype="<u4").tobytes(),
                                                      picture.getvalue()]
    views, binary = [], b""
    for blob in blobs:
        views.append(dict(buffer=0, byteOffset=len(binary), byteLength=len(blob)))
        binary += blob + b"\0" * (-len(blob) % 4)
    count, points = len(corners[0]), corners[0]
    floats = lambda k, kind: dict(bufferView=k, componentType=5126, count=count, type=kind)
    gltf = dict(
        asset=dict(version="2.0", generator="Realiz3D reference"), scene=0, scenes=[dict(nodes=[0])],
        nodes=[dict(mesh=0)], extensionsUsed=["KHR_materials_unlit"],
        meshes=[dict(primitives=[dict(attributes=dict(POSITION=0, NORMAL=1, TEXCOORD_0=2), indices=3, material=0)])],
        materials=[dict(pbrMetallicRoughness=dict(baseColorTexture=dict(index=0), metallicFactor=0.),
                        extensions=dict(KHR_materials_unlit={}), doubleSided=True)],
        textures=[dict(source=0)], images=[dict(bufferView=4, mimeType="image/png")], bufferViews=views,
        buffers=[dict(byteLength=len(binary))],
        accessors=[floats(0, "VEC3") | dict(min=points.min(0).tolist(), max=points.max(0).tolist()), floats(1, "VEC3"),
                   floats(2, "VEC2"), dict(bufferView=3, componentType=5125, count=count, type="SCALAR")])
    header = json.dumps(gltf, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 4)
    content = struct.pack("<4sII", b"glTF", 2, 28 + len(header) + len(binary))
    content += struct.pack("<I4s", len(header), b"JSON") + header + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    write_bytes(path, content)


def write_obj(path, mesh, texture, uv):
    """Writes a textured mesh as NAME.obj, NAME.mtl and NAME.png."""
    stem = path.removesuffix(".obj")
    name, size = os.path.basename(stem), texture.shape[0]
    lines = [f"mtllib {name}.mtl", "usemtl views"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"vt {u / size:.6f} {1 - v / size:.6f}" for u, v in uv.view(-1, 2).tolist()]          # origin bottom left
    lines += [f"vn {x:.4f} {y:.4f} {z:.4f}" for x, y, z in data.corner_normals(mesh).view(-1, 3).tolist()]
    lines += ["f " + " ".join(f"{vertex + 1}/{3 * k + i + 1}/{3 * k + i + 1}" for i, vertex in enumerate(face))
              for k, face in enumerate(mesh.faces.tolist())]
    save_image(f"{stem}.png", Image.fromarray(texture.numpy()))
    write_bytes(f"{stem}.mtl", f"newmtl views\nKa 1 1 1\nKd 1 1 1\nillum 0\nmap_Kd {name}.png\n".encode())
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def turntable(mesh, texture, uv, size=96, azimuth=tuple(range(0, 360, 45)), supersample=2):
    """Draws a mesh with what `texture_mesh` returned from each azimuth (degrees) before white: uint8 (n, 3, size,
    size)."""
    face, place = data.rasterize(mesh, size * supersample, azimuth)
    at = (uv[face] * place[..., None]).sum(dim=3)                                                   # (n, H, W, 2)
    column, row = (at[..., k].long().clamp(0, texture.shape[0] - 1) for k in (0, 1))
    image = torch.where((face >= 0)[..., None], texture[row, column], torch.tensor(255, dtype=torch.uint8))
    image = F.avg_pool2d(image.permute(0, 3, 1, 2).float(), supersample)
    return image.round().byte()


def save_meshes(folder, meshes, images, texture_size=1024):
    """Textures N meshes with the views of each row of images: FOLDER/NAME_ROW.glb and .obj, and a turntable of all.

    meshes: {name: Mesh, or None where the hull of the views is the mesh}; images: {row: (N, V, 3, H, W) in [-1, 1]}.
    """
    rows = []
    for k, (name, known) in enumerate(meshes.items()):
        for row, grids in images.items():
            views = data.to_uint8(grids[k]) / 255
            try:
                mesh = known or data.hull_mesh(data.silhouette(views))
            except ValueError:
                print(f"{name} {row}: no shape fits the outlines of the four views, so there is no mesh")
                continue
            texture, uv, covered = texture_mesh(mesh, views, texture_size)
            for write, kind in ((write_glb, "glb"), (write_obj, "obj")):
                write(f"{folder}/{name}_{row}.{kind}", mesh, texture, uv)
            print(f"{folder}/{name}_{row}.glb and .obj: {len(mesh.faces)} triangles, {covered:.0%} of the surface seen")
            rows.append((f"{name} {row}", turntable(mesh, texture, uv)))
    if not rows:
        raise ValueError("there is no mesh to show")
    save_picture(f"{folder}/turntable.png", rows, scale=1, column_titles=[f"{turn} degrees" for turn in
                                                                          range(0, 360, 45)])
    print(f"{folder}/turntable.png shows them")


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", "--base", help="checkpoint, of a base model too: ours or PixArt-alpha's .pth or safetensors "
        "(default: the run folder's realiz3d of this task, else the shipped one)")
    add("--shifters", help="shifters of stage 1, to put into a model without its own")
    add("--preset", choices=PRESETS, default="toy", help="which default model")
    add("--task", choices=("texturing", "text"), help="default: the one the model was trained for")
    add("--object", type=int, nargs="+", default=[0, 1, 2], help="numbers of held-out objects")
    add("--prompt", nargs="+", help="captions instead of objects: a base model, --task text, or one for --mesh")
    add("--domain", type=domain_word, default="all", help="domain mode: real, syn, shifted, or a number s, 0 for "
        "synthetic to 1 for real and a little outside (default all: the three words)")
    add("--B_max", type=float, help="layer shift: share of the blocks that run in synthetic mode (default: what "
        "evaluate.py select found for this model, else 0.3)")
    add("--t_max", type=int, help="time shift: steps t >= t_max run in synthetic mode; 1000 = none (default: likewise, "
        "else 950)")
    add("--cfg_scale", type=float, help=f"guidance on the text, 1 = none (default {CFG_SCALE:g}; full: "
        f"{LATENT_CFG_SCALE})")
    add("--num_steps", type=int, default=50, help="DDIM steps")
    add("--spacing", choices=("trailing", "leading", "linspace"), default="trailing", help="spacing of the steps")
    add("--seed", type=int, default=0, help="decides the noise")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--out", help="picture to write (default runs/PRESET/sample.png)")
    add("--views", metavar="DIR", help="also write every view as its own file, as evaluate.py folders reads them")
    add("--textured", metavar="DIR", help="also texture the object's mesh with the views: GLB, OBJ and a turntable")
    add("--mesh", metavar="FILE", help="OBJ or GLB to texture after a --prompt, in place of the toy's objects")
    add("--beside", nargs="+", default=[], metavar="MODEL", help="--textured: with these models too")
    add("--texture_size", type=int, default=1024, help="--textured: texels to a side")
    add("--objects", nargs="+", metavar="DIR", help="full: folders of rendered objects, in place of --object")
    add("--vae", metavar="DIR", help="full: PixArt's vae folder (needs diffusers)")
    add("--text_encoder", metavar="DIR", help="full: PixArt's text_encoder folder (needs transformers)")
    add("--real_set", metavar="FILE", help="draw the real set of stages 1 and 2 with the base model, instead; full: a "
        "folder")
    add("--num_assets", type=int, default=640, help="real set: assets, four images each")
    add("--synthetic", metavar="DIR", help="real set, full: folder of data.py encode, whose captions are drawn")
    return parser, parser.parse_args(argv)


def domain_word(word):
    """A domain mode from the command line: a word, or a number in [-1, 2]."""
    if word in ("all", "real", "syn", "shifted"):
        return word
    try:
        s = float(word)
    except ValueError:
        s = math.nan
    if not -1 <= s <= 2:
        raise argparse.ArgumentTypeError(f"{word!r} is not all, real, syn, shifted or a number from -1 to 2")
    return s


def chosen_objects(args, size, task):
    """What the command line asks for: objects as from data.evaluation_set, and in the same order {name: Mesh, or None
    for the hull of the views}."""
    text = data.tokenize(args.prompt or [])
    if args.mesh:
        mesh = data.read_mesh(args.mesh)
        views = data.mesh_views(mesh, size)
        return dict(text=text, control=data.control_maps(views), position=views.position,
                    mask=data.to_uint8(2 * views.mask - 1)), {os.path.splitext(os.path.basename(args.mesh))[0]: mesh}
    if args.prompt:
        return dict(text=text), dict.fromkeys(range(len(text)))
    num = max(args.object) + 1
    held, assets = data.evaluation_set(num, size=size, folder=f"runs/{args.preset}/sets"), \
        data.sample_assets(num, data.SEEDS["evaluation"])
    meshes = {k: data.asset_mesh(data.take(assets, torch.tensor([k])), 64) if args.textured and task == "texturing" else
              None for k in args.object}
    return {key: value[list(meshes)] for key, value in held.items()}, meshes


def guidance(args, latents):
    """--cfg_scale, or its default."""
    return (LATENT_CFG_SCALE if latents else CFG_SCALE) if args.cfg_scale is None else args.cfg_scale


def latent_objects(args, network, device):
    """What the command line asks for, as `chosen_objects`, for a model of latents: --objects, or --mesh with a
    --prompt, or --prompt, through the encoders. Adds "maps" (N, V, 6, H, W), the control as pictures. Also returns
    decode, which `sampled` takes."""
    if not (args.vae and args.text_encoder):
        raise ValueError("a model of latents needs PixArt's encoders: name their folders with --vae and --text_encoder")
    encode_image, decode = data.load_vae(args.vae, device)
    if args.objects and args.prompt:
        raise ValueError("--objects bring their own captions: leave out --prompt")
    captions, drawn, meshes = args.prompt or [], [], dict.fromkeys(range(len(args.prompt or [])))
    size = 8 * network.dit.config.image_size
    if args.mesh:
        mesh = data.read_mesh(args.mesh)
        drawn, meshes = [data.mesh_views(mesh, size)], {Path(args.mesh).stem: mesh}
    elif args.objects:
        captions, drawn = zip(*map(data.read_object, args.objects))
        for folder, views in zip(args.objects, drawn):
            if views.mask.shape[-2:] != (size, size):
                raise ValueError(f"{folder} is of {views.mask.shape[-1]} x {views.mask.shape[-2]} pixels, the model "
                                 f"takes {size}")
        meshes = dict.fromkeys(os.path.basename(os.path.abspath(folder)) for folder in args.objects)
    if len(captions) != len(meshes) or not captions:
        raise ValueError("give a --prompt, one for --mesh, or rendered objects with --objects")
    objects = encode_captions(captions, data.load_text_encoder(args.text_encoder, device), network.dit)
    objects["captions"] = captions
    if drawn:
        maps = torch.cat([data.control_maps(views) for views in drawn])                             # (N, V, 6, H, W)
        latents = [encode_image(view.unflatten(0, (2, 3)))[:, 0].flatten(0, 1) for view in maps.flatten(0, 1)]
        objects |= dict(maps=maps, control=data.LATENT_SCALE * torch.stack(latents).unflatten(0, (-1, 4)),
                        position=torch.cat([views.position for views in drawn]),
                        mask=data.to_uint8(2 * torch.cat([views.mask for views in drawn]) - 1))
    return objects, meshes, lambda x: decode(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def draw_real_set(args, launched):
    """The real set of stages 1 and 2, in pixels of the toy world or in latents."""
    base = args.model or default_base(args.preset)
    if read_metadata(base).get("config", {}).get("vocab_size"):
        write_real_set(args.real_set, base, args.num_assets, args.seed, args.num_steps, guidance(args, False),
                       launched=launched)
    elif args.synthetic and args.text_encoder:
        write_latent_real_set(args.real_set, base, args.synthetic, args.text_encoder, args.seed, args.num_steps,
                              guidance(args, True), launched=launched)
    else:
        raise ValueError("the real set of a model of latents needs --synthetic DIR, whose captions are drawn, and "
                         "--text_encoder DIR")
    if launched[1] == 0:
        print(f"wrote {args.real_set}")


def main():
    parser, args = parse_args()
    launched = device, rank, _ = launch(args.threads)
    if args.real_set:
        return draw_real_set(args, launched)
    if min(args.object) < 0:
        parser.error(f"--object must be 0 or more, not {min(args.object)}")
    if args.prompt and not args.text_encoder:                       # then it is in words of the toy world
        try:
            data.tokenize(args.prompt)
        except ValueError as error:
            parser.error(str(error))
    if args.beside and not args.textured:
        parser.error("--beside compares textured objects: add --textured DIR")
    path = args.model or default_model(args.preset, args.task or "texturing")
    network = load_network(path, device, shifters=args.shifters)
    config = network.dit.config
    task = trained_task(path)                                       # None: a base model, one image a caption
    if config.vocab_size and (args.objects or args.vae or args.text_encoder):
        raise ValueError(f"--objects, --vae and --text_encoder are for models of latents (--preset full), {path} is of "
                         "the toy world: use --object or --mesh")
    if args.task not in (None, task):
        raise ValueError(f"{path} was trained for {task or 'no task (a base model)'}, not for {args.task}")
    if task == "texturing" and len(args.prompt or []) != bool(args.mesh):
        raise ValueError("a texturing model needs an object's maps: name one with --object (full: --objects), or bring "
                         "--mesh FILE and one --prompt, or use --task text")
    if args.mesh and task != "texturing":
        raise ValueError(f"{path} does not follow maps, so --mesh needs another --model")
    if args.textured and task is None:
        raise ValueError(f"{path} is a base model, it draws no views of one object")
    if args.domain != "all" and not network.knows_domains():
        raise ValueError(f"{path} has no Domain Shifters, so no --domain; add some with --shifters FILE")
    B_max, t_max = selected_shift(path)
    options = dict(seed=args.seed, cfg_scale=guidance(args, not config.vocab_size), num_steps=args.num_steps,
                   spacing=args.spacing, B_max=B_max if args.B_max is None else args.B_max,
                   t_max=t_max if args.t_max is None else args.t_max)
    out = args.out or f"runs/{args.preset}/sample.png"
    modes = ("syn", "real", "shifted") if args.domain == "all" else (args.domain,)
    if rank > 0:
        return
    if config.vocab_size:
        objects, meshes = chosen_objects(args, config.image_size, task)
        decode = lambda x: x
    else:
        objects, meshes, decode = latent_objects(args, network, device)
        options["batch"] = 4
    images = object_sheet(out, network, objects, task, modes, decode, **options)
    print(f"{path} -> {out}")
    if args.views:
        save_views(args.views, images, objects, list(meshes))
        print(f"the single views are in {args.views}")
    if args.textured:
        for other in args.beside:
            network, name = load_network(other, device), os.path.basename(other).removesuffix(".safetensors")
            modes = ("shifted",) if network.knows_domains() else ("real",)
            images[name] = sampled(network, objects, task, modes, decode, **options)[modes[0]]
        save_meshes(args.textured, meshes, images, args.texture_size)


if __name__ == "__main__":
    run_cli(main)
