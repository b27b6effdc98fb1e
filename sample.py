"""Sampling (Sec. 4.3, B.3): DDIM, guidance on the text, Domain Shifters switched by block and by timestep.

    python sample.py                                        # three toy objects, by runs/toy's model or the shipped one
    python sample.py --object 3 7 --domain shifted          # objects 3 and 7 of the held-out ones, shifted mode only
    python sample.py --model runs/toy/realiz3d_text.safetensors --prompt "a red wooden mug"     # four views from text
    python sample.py --object 3 --textured runs/toy/textured                    # a textured 3D object: GLB, OBJ
    python sample.py --mesh chair.obj --prompt "a blue metal chair" --textured runs/toy/textured    # your own geometry
    python sample.py --model weights/toy_base.safetensors --prompt "photo of a red wooden mug"  # the base model
    torchrun --nproc_per_node=8 sample.py --real_set real.safetensors                       # the toy's real set (C.1)

The picture shows the four views side by side: normals, positions, each domain mode and the toy's perfect photographs.
"""
import argparse
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from baselines.adapters import load_beside
from data import ASSETS, SEEDS, SHOWN, control_maps, held_objects, real_captions
from dit import PRESETS, T, alphas_cumprod
from domain_shifter import (B_MAX, REAL, SYN, T_MAX, ShiftedDiT, block_count, load_shifters, shifted_domains,
                            uniform_domains)
from full.encoders import Encoders, latent_objects
from full.pixart import load_base
from geometry.camera import VIEWS
from geometry.files import read_mesh
from geometry.mesh import mesh_views
from geometry.texture import save_meshes
from support.files import (checksum, file_id, joined_parts, locked, ranges, read_json, read_metadata, run_or_shipped,
                           save_tensors, up_to_date, write_array, write_json, write_parts)
from support.generators import SAMPLES, seeded_generator
from support.launch import (BAR, UsageError, a_seed, barrier, check_out, finite, launch, run_cli, some_steps,
                            some_threads, within)
from support.pictures import save_image, save_picture, to_uint8
from support.speed import CPU_DTYPES, autocast, choose_dtype, compile_blocks
from toy.render import asset_mesh
from toy.world import WORLD_VERSION, exaggerated, refuse_unknown_words, sample_assets, take, tokenize

CFG_SCALE = 1.5         # guidance on the text, 1 = none: materials show, and photographs are as close (docs/toy.md)
LATENT_CFG_SCALE = 4.5  # PixArt-alpha's, which draws poorly without
MODES = {"syn": "synthetic mode", "real": "real mode", "shifted": "shifted"}

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
    which only makes sense where x is pixels. t_start: x is an image noised to this step; steps above it are skipped.
    """
    steps = ddim_timesteps(num_steps, spacing)
    following = [*steps[1:].tolist(), -1]               # the next one visited
    if spacing == "linspace":                           # here diffusers takes equal steps, which come close to it
        following = (steps - T // num_steps).tolist()
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


def domain_mode(mode, num_blocks, B_max=B_MAX, t_max=T_MAX):
    """"real", "syn" or "shifted" (Sec. 4.3) -> a function of t (B,) that gives the (N_B, B) table of domains, as
    `uniform_domains` and `shifted_domains` in domain_shifter.py say it.

    mode may be a number s too, for e(s) = (1 - s) e_syn + s e_real in all blocks: a dial from render to photograph.
    """
    if mode == "shifted":
        return lambda t: shifted_domains(t, num_blocks, B_max, t_max)
    domain = {"real": REAL, "syn": SYN}.get(mode, mode)
    return lambda t: uniform_domains(domain, num_blocks, len(t), t.device)


def guided_noise(network, null, domains, cfg_scale, **inputs):
    """predict_noise(x, t) for `ddim_sample`: classifier-free guidance on the text alone (Sec. B.3).

    network: ShiftedDiT. null: the empty caption, "text" (1, L) or (1, L, D), perhaps "text_mask". domains: from
    `domain_mode`. inputs: "text" (B, L) or (B, L, D), perhaps "text_mask" and control, which stays on in both passes.
    The passes run as one batch.
    """
    if cfg_scale == 1:
        def predict_noise(x, t):
            t = t.expand(len(x))
            return network(x, t, domains=domains(t), **inputs)
        return predict_noise
    empty = {key: null[key].expand_as(inputs[key]).to(inputs[key]) for key in null if key in inputs}
    both = {key: torch.cat([value, empty.get(key, value)]) for key, value in inputs.items()}        # (2 B, ...)

    def predict_noise(x, t):
        t = t.expand(2 * len(x))
        with_text, without_text = network(torch.cat([x, x]), t, domains=domains(t), **both).chunk(2)
        return without_text + cfg_scale * (with_text - without_text)
    return predict_noise


def ticking(predict_noise, progress, share):
    """predict_noise that moves a progress bar on by `share` of each image in x (B, V, C, H, W)."""
    def tick(x, t):
        progress.update(min(share * x.shape[0] * x.shape[1], progress.total - progress.n))      # no rounding past it
        return predict_noise(x, t)
    return tick


@dataclass(frozen=True)
class Sampling:
    """How to sample. Raises ValueError naming the first that is out of its range."""
    mode: str | float = "real"      # domain mode, see `domain_mode`
    cfg_scale: float = 1.0          # guidance on the text, 1 = none; the programs' default is CFG_SCALE
    num_steps: int = 50             # of DDIM
    spacing: str = "trailing"       # see `ddim_timesteps`
    B_max: float = B_MAX            # of mode "shifted" (Sec. 4.3)
    t_max: int = T_MAX
    seed: int = 0                   # decides the noise
    batch: int = 64                 # samples computed at once, changes none of them
    dtype: str | None = None        # of autocast, "float32" or "bfloat16"; None: bf16 for latents on CUDA, else fp32
    compile: bool = False           # compile the blocks: seconds at first, then up to twice as fast on a CPU

    def __post_init__(self):
        if isinstance(self.mode, str) and self.mode not in MODES:
            raise ValueError(f"mode must be a number or one of {', '.join(MODES)}, not {self.mode!r}")
        ddim_timesteps(self.num_steps, self.spacing)
        block_count(self.B_max, 1)
        if not 0 <= self.t_max <= T:
            raise ValueError(f"t_max must lie in 0..{T} ({T}: no time shift), not {self.t_max}")
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be a finite number, not {self.cfg_scale}")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"seed must lie in 0..2^63 - 1, not {self.seed}")


def initial_noise(keys, shape, seed):
    """(B, *shape): sample k starts from noise of its own generator, (seed, keys[k]), whatever it is sampled with."""
    return torch.stack([torch.randn(shape, generator=seeded_generator(SAMPLES, seed, key)) for key in keys])


@torch.no_grad()
def sample_images(network, inputs, sampling=Sampling(), views=1, keys=None, progress=None, guide=guided_noise):
    """Samples one grid of V views per caption.

    network: ShiftedDiT. inputs: "text" (N, L) ids; or vectors (N, L, D), with "text_mask" (N, L) and "null", the empty
    caption, as `guided_noise` takes it; perhaps "control" (N, V, C_c, H, W), which is empty where absent. views: V, 1
    is single-image mode. keys: N whole numbers (default 0, 1, ..), the samples' numbers for `initial_noise`. guide: as
    `guided_noise`. Returns (N, V, C, H, W) in the model's range, on the CPU.
    """
    config, like = network.dit.config, network.dit.positions            # like: its device and dtype
    null = inputs.get("null", {} if config.latent else {"text": tokenize([""])})
    null = {key: value.to(like.device) for key, value in null.items()}
    domains = domain_mode(sampling.mode, config.depth, sampling.B_max, sampling.t_max)
    dtype = sampling.dtype or ("bfloat16" if like.is_cuda and config.latent else "float32")
    shape = (views, config.channels, config.image_size, config.image_size)
    images, keys = [], range(len(inputs["text"])) if keys is None else keys
    if sampling.compile:
        compile_blocks(getattr(network, "blocks", network.dit.blocks))
    for rows in torch.arange(len(inputs["text"])).split(sampling.batch):
        x = initial_noise([keys[k] for k in rows], shape, sampling.seed).to(like)                   # (B, V, C, H, W)
        given = {key: inputs[key][rows].to(like.device) for key in ("text", "text_mask") if key in inputs}
        if "control" in inputs:
            given["control"] = inputs["control"][rows].to(like)
        predict_noise = guide(network, null, domains, sampling.cfg_scale, **given)
        if progress is not None:
            predict_noise = ticking(predict_noise, progress, 1 / sampling.num_steps)
        with autocast(like.device, dtype):
            x0 = ddim_sample(predict_noise, x, sampling.num_steps, sampling.spacing, clip_x0=config.output_skip)
        images.append(x0.cpu())                                                                     # (B, V, C, H, W)
    return torch.cat(images)


# ---------------------------------------------------------------------------------------------------------------------
# Models from their files


def load_network(path, device="cpu", config=None, shifters=None):
    """ShiftedDiT from a checkpoint: its model and its Domain Shifters (or those of the file `shifters`), or a
    baseline's adapter; or from PixArt-alpha's weights, which have neither."""
    model = load_base(path, device, config)
    if shifters:
        of_file = load_shifters(shifters, device, model.config)
        if of_file is None:
            raise ValueError(f"{shifters} holds no Domain Shifters (--shifters)")
        if "adapter_kind" in read_metadata(path):
            raise ValueError(f"{path} has a baseline's adapter, which takes no --shifters beside it")
        return ShiftedDiT(model, of_file).eval()
    if "config" not in read_metadata(path):                             # PixArt-alpha's
        return ShiftedDiT(model).eval()
    return load_beside(model, path).eval()


def default_base(preset="toy", folder=None):
    """Path of the base model: the run folder's, else the one that comes with the repository.

    Raises FileNotFoundError, saying how to get one.
    """
    path = run_or_shipped(folder or f"runs/{preset}", preset, "base.safetensors")
    if os.path.isfile(path):
        return path
    how = ("name PixArt-alpha's weights, .pth or safetensors, with --base" if preset == "full" else
           f"pretrain one with python -m toy.pretrain --preset {preset}, or name one with --base")
    raise FileNotFoundError(f"preset {preset} has no base model yet: {how}")


def default_model(preset="toy", task="texturing", method="realiz3d", folder=None):
    """Path of the trained model: the run folder's, else the one that comes with the repository."""
    path = run_or_shipped(folder or f"runs/{preset}", preset, f"{method}_{task}.safetensors")
    if os.path.isfile(path):
        return path
    flags = f"--preset {preset} --task {task}" + (f" --method {method}" if method != "realiz3d" else "")
    raise FileNotFoundError(f"no {method} model in runs/{preset} or weights: train one with python train_stage2.py "
                            f"{flags}")


def trained_task(path):
    """The task a stage-2 model was trained for, None for a base model."""
    settings = read_metadata(path).get("settings")
    return settings.get("task") if isinstance(settings, dict) else None


def selected_shift(path):
    """B_max and t_max that `python -m experiments.shift select` left beside a model, the paper's 0.3 and 950 without
    (Sec. 4.3)."""
    choice = f"{path.removesuffix('.safetensors')}.shift.json"
    if not os.path.isfile(choice):
        return B_MAX, T_MAX
    try:
        stored = read_json(choice)
        shift, model = (float(stored["B_max"]), int(stored["t_max"])), stored["model"]
        Sampling(B_max=shift[0], t_max=shift[1])                # raises where they are out of their ranges
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{choice} is damaged: delete it, or make it again with python -m experiments.shift select") \
            from None
    if model != file_id(path):
        raise ValueError(f"{choice} was chosen for another model of this name: run python -m experiments.shift select "
                         f"--model {path} again, or delete it")
    return shift


# ---------------------------------------------------------------------------------------------------------------------
# The real set: what the base model itself draws (Sec. 5, C.1)


def write_real_set(path, base, num_assets, sampling, launched, chunk=64):
    """Draws four images a caption with the base model and writes the toy's real set of stage 1 and 2, over all ranks.
    (The full configuration's: full/real_set.py.) Training draws it with --real_steps, 10.

    path: the safetensors to write: {"image": uint8 (N, 1, 3, H, W), "text": (N, L)}, N = 4 num_assets, the text being
    the captions to train on (`real_captions`). sampling: training takes it without guidance, as real iterations shall
    keep the base model's own distribution. Chunks of images are written on the way, each a pure function of the base
    model, seed and its place, so that a run that was stopped goes on.
    """
    device, rank, world = launched
    network = load_network(base, device)
    draw, train = real_captions(sample_assets(num_assets, SEEDS["synthetic"]))
    folder, key = f"{path}.parts", dict(base=file_id(base), num_assets=num_assets, seed=sampling.seed,
                                        num_steps=sampling.num_steps, cfg_scale=sampling.cfg_scale,
                                        size=network.dit.config.image_size, world=WORLD_VERSION)
    text, parts = tokenize(draw), ranges(len(draw), chunk)
    mine = parts[rank::world]
    with locked(os.path.dirname(path) or ".") if rank == 0 else nullcontext():
        barrier(launched)                   # here the other ranks wait while another program draws it
        if up_to_date(path, key):
            return
        with tqdm(total=sum(map(len, mine)), unit="image", bar_format=BAR, desc="real set, drawn by the base model",
                  disable=rank > 0) as progress:
            def draw_part(rows):
                return to_uint8(sample_images(network, {"text": text[rows]}, sampling, keys=rows, progress=progress))
            write_parts(folder, key, mine, draw_part, progress)
        barrier(launched)
        if rank == 0:
            images = joined_parts(folder, parts)
            tensors = {"image": images, "text": tokenize(train)}
            save_tensors(path, tensors, key=key, checksum=checksum(tensors))
            rows = [(train[k], images[k:k + 4, 0]) for k in range(0, min(40, len(train)), 4)]
            save_picture(f"{path.removesuffix('.safetensors')}.png", rows, column_titles=VIEWS)
            shutil.rmtree(folder)
        barrier(launched)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of samples

def as_they_are(images):
    """The images of a model of pixels: nothing to decode."""
    return images


def sample_modes(network, objects, task, modes, sampling, decode=as_they_are):
    """Samples objects in several domain modes, of which a network without domains has one: {mode: images (N, V, 3, H,
    W) in [-1, 1]}.

    objects: {"text": (N, L), "control": (N, V, 6, H, W)}, as from data.evaluation_set, or as from `latent_objects`.
    task: "texturing", or "text" for four views an object from the caption alone, or None for one image a caption.
    sampling: in all but the mode. decode: makes images of what is sampled.
    """
    modes = modes if network.knows_domains else ("real",)
    inputs = {key: objects[key] for key in ("text", "text_mask", "null") if key in objects}
    if task == "texturing":
        inputs["control"] = objects["control"]
    views, images = 4 if task else 1, {}
    with tqdm(total=len(modes) * len(inputs["text"]) * views, desc="sampling", unit="image", bar_format=BAR) as bar:
        for mode in modes:
            grids = sample_images(network, inputs, replace(sampling, mode=mode), views, progress=bar)
            images[mode] = decode(grids)
    return images


def object_sheet(path, network, objects, task="texturing", modes=tuple(MODES), sampling=Sampling()):
    """Samples objects of the toy world, see `sample_modes`, and writes their picture, see `write_sheet`."""
    write_sheet(path, sample_modes(network, objects, task, modes, sampling), objects, task)


def write_sheet(path, images, objects, task):
    """Writes a picture: the control maps, a row for each of images {mode or name: (N, V, 3, H, W) in [-1, 1]}, and
    where the objects have them (the toy's) their perfect photographs."""
    maps = objects.get("maps", objects.get("control")) if task == "texturing" else None
    rows = [] if maps is None else [("normals", to_uint8(maps[:, :, :3])), ("positions", to_uint8(maps[:, :, 3:]))]
    rows += [(row_label(mode), to_uint8(grids)) for mode, grids in images.items()]
    rows += [("a perfect photo", objects["photo"])] if task and "photo" in objects else []
    save_picture(path, [(label, grids.flatten(0, 1)) for label, grids in rows],
                 scale=1 if rows[-1][1].shape[-1] > 128 else 3,
                 column_titles=VIEWS * len(objects["text"]) if task else ())


def row_label(mode):
    """What a row of a picture is called: a domain mode, a number s, or another model's name."""
    return f"s = {mode}" if isinstance(mode, float) else MODES.get(mode, mode)


def save_views(folder, images, objects, names):
    """Writes each view as a file of its own: FOLDER/MODE/NAME/color_000.png, .., the caption beside it in meta.json and
    the positions it shows as FOLDER/positions/NAME/position_000.npy, p + 0.5, float32 (H, W, 3), NaN off the object;
    both where the objects have them.

    images: {mode: (N, V, 3, H, W) in [-1, 1]}. objects: from data.evaluation_set. names: N of them.
    """
    for mode, grids in images.items():
        for k, (name, grid) in enumerate(zip(names, to_uint8(grids))):
            for v, image in enumerate(grid):
                save_image(f"{folder}/{mode}/{name}/color_{v:03}.png", Image.fromarray(image.permute(1, 2, 0).numpy()))
            if "captions" in objects:
                write_json(f"{folder}/{mode}/{name}/meta.json", {"caption": objects["captions"][k]})
    for k, name in enumerate(names if "position" in objects else ()):
        maps = (objects["position"][k] + 0.5).masked_fill(objects["mask"][k] < 255, math.nan)
        for v, position in enumerate(maps):
            write_array(f"{folder}/positions/{name}/position_{v:03}.npy", position.permute(1, 2, 0).cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", "--base", help="checkpoint, of a base model too: ours or PixArt-alpha's .pth or safetensors "
        "(default: the run folder's realiz3d of this task, else the shipped one)")
    add("--shifters", help="shifters of stage 1, to put into a model without its own")
    add("--preset", choices=PRESETS, default="toy", help="which default model (default %(default)s)")
    add("--task", choices=("texturing", "text"), help="default: the one the model was trained for")
    add("--object", type=int, nargs="+", help=f"numbers of held-out objects (default {' '.join(map(str, SHOWN))})")
    add("--prompt", nargs="+", help="captions instead of objects: a base model, --task text, or one for --mesh")
    add("--domain", type=domain_word, default="all", help="domain mode: real, syn, shifted, or a number s, 0 for "
        "synthetic to 1 for real and a little outside (default all: the three words)")
    add("--B_max", type=within(0, 1, float), help="layer shift: share of the blocks that run in synthetic mode "
        "(default: what python -m experiments.shift select found for this model, else 0.3)")
    add("--t_max", type=within(0, T), help="time shift: steps t >= t_max run in synthetic mode; 1000 = none (default: "
        "likewise, else 950)")
    add("--cfg_scale", type=finite, help=f"guidance on the text, 1 = none (default {CFG_SCALE:g}; full: "
        f"{LATENT_CFG_SCALE}; --real_set: 1)")
    add("--num_steps", type=some_steps, default=50, help="DDIM steps (default %(default)s)")
    add("--spacing", choices=("trailing", "leading", "linspace"), default="trailing", help="spacing of the steps "
        "(default %(default)s)")
    add("--seed", type=a_seed, default=0, help="decides the noise (default %(default)s)")
    add("--threads", type=some_threads, help="CPU threads (default: the fastest in a trial)")
    add("--dtype", choices=CPU_DTYPES, help="precision of pixels on a CPU (default: the faster in a trial)")
    add("--out", help="picture to write (default runs/PRESET/sample.png)")
    add("--views", metavar="DIR", help="also write every view as its own file, as evaluate.py folders reads them")
    add("--textured", metavar="DIR", help="also texture the object's mesh with the views: GLB, OBJ and a turntable")
    add("--mesh", metavar="FILE", help="a mesh to texture after a --prompt, in place of the toy's objects: OBJ; "
        "GLB, glTF, PLY, STL with pip install trimesh")
    add("--beside", nargs="+", default=[], metavar="MODEL", help="what other models draw of the same, above "
        "it; NAME=MODEL names the row")
    add("--texture_size", type=within(64, 2 ** 14), help="--textured: texels to a side (default 1024)")
    add("--objects", nargs="+", metavar="DIR", help="full: folders of rendered objects, in place of --object")
    add("--vae", metavar="DIR", help="full: PixArt's vae folder (needs diffusers)")
    add("--text_encoder", metavar="DIR", help="full: PixArt's text_encoder folder (needs transformers)")
    add("--real_set", metavar="FILE", help="draw the toy's real set of stages 1 and 2 with the base model, instead (as "
        "training does with --num_steps 10; full: python -m full.real_set)")
    add("--num_assets", type=within(1, 10 ** 6), help="real set: assets, four images each (default by preset: "
        f"{ASSETS})")
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


def check_flags(parser, args):
    """Ends with a line of usage at flags that no model makes sense of."""
    if args.object and args.prompt:
        parser.error("--object and --prompt both say what to draw: leave one of them out")
    of_pictures = "object prompt mesh beside domain spacing views textured task shifters out".split()
    for flag in of_pictures if args.real_set else ():
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} would do nothing: --real_set draws its own captions, in trailing steps")
    for flag, needed in (("texture_size", "textured"), ("num_assets", "real_set")):
        if getattr(args, flag) and not getattr(args, needed):
            parser.error(f"--{flag} is of --{needed}, which is not there")
    if (args.B_max is not None or args.t_max is not None) and args.domain not in ("all", "shifted"):
        parser.error(f"--B_max and --t_max are of --domain shifted, not of {args.domain}")
    args.object = args.object or list(SHOWN)
    for number in args.object:
        if not 0 <= number < 10 ** 4:                               # all objects before it are made too
            parser.error(f"--object must lie in [0, {10 ** 4 - 1}], not {number}")
    check_out(f"runs/{args.preset}/sample.png" if args.out is None else args.out)
    for flag, path in (("views", args.views), ("textured", args.textured), ("real_set", args.real_set)):
        if path:
            check_out(path if flag == "real_set" else f"{path}/turntable.png", f"--{flag}")
    if args.prompt and args.preset != "full" and not args.text_encoder:     # then it is in words of the toy world
        refuse_unknown_words(parser, args.prompt)


def check_fit(args, path, network, task):
    """Raises ValueError at flags that do not fit the model at path, trained for `task` (None: a base model)."""
    if not network.dit.config.latent and (args.objects or args.vae or args.text_encoder):
        raise ValueError(f"--objects, --vae and --text_encoder are for models of latents (--preset full), {path} is of "
                         "the toy world: use --object or --mesh")
    if args.task not in (None, task):
        raise ValueError(f"{path} was trained for {task or 'no task (a base model)'}, not for {args.task}")
    captions_wanted = 1 if args.mesh else 0
    if task == "texturing" and len(args.prompt or []) != captions_wanted:
        raise ValueError("a texturing model needs an object's maps: name one with --object (full: --objects), or bring "
                         "--mesh FILE and one --prompt, or use --task text")
    if args.mesh and task != "texturing":
        raise ValueError(f"{path} does not follow maps, so --mesh needs another --model")
    if args.textured and task is None:
        raise ValueError(f"{path} is a base model, it draws no views of one object")
    if args.domain != "all" and not network.knows_domains:
        raise ValueError(f"{path} has no Domain Shifters, so no --domain; add some with --shifters FILE")


def guidance(cfg_scale, latents):
    """The scale of --cfg_scale, or its default where that is None."""
    if cfg_scale is not None:
        return cfg_scale
    return LATENT_CFG_SCALE if latents else CFG_SCALE


def chosen_sampling(args, path, latents, device):
    """The Sampling that the command line asks for, in all but the mode."""
    B_max, t_max = selected_shift(path)
    B_max = B_max if args.B_max is None else args.B_max
    t_max = t_max if args.t_max is None else args.t_max
    return Sampling(cfg_scale=guidance(args.cfg_scale, latents), num_steps=args.num_steps, spacing=args.spacing,
                    B_max=B_max, t_max=t_max, seed=args.seed, batch=4 if latents else 64,
                    dtype=None if latents else args.dtype or choose_dtype(device))


def chosen_objects(args, size, task):
    """What the command line asks for: objects as from data.evaluation_set, and in the same order {name: Mesh, or None
    for the hull of the views}."""
    if args.mesh:
        mesh = read_mesh(args.mesh)
        views = mesh_views(mesh, size)
        objects = dict(text=tokenize(args.prompt), control=control_maps(views), position=views.position,
                       mask=to_uint8(2 * views.mask - 1))
        return objects, {Path(args.mesh).stem: mesh}
    if args.prompt:
        text = tokenize(args.prompt)
        return dict(text=text), dict.fromkeys(range(len(text)))
    meshes = dict.fromkeys(args.object)
    if args.textured and task == "texturing":
        assets = exaggerated(sample_assets(max(meshes) + 1, SEEDS["evaluation"]))
        meshes = {k: asset_mesh(take(assets, torch.tensor([k])), 64) for k in meshes}
    return held_objects(list(meshes), size=size), meshes


def models_beside(words, modes, device, config):
    """{name of the row: (network, its (B_max, t_max))} of --beside [NAME=]MODEL .., no name twice or one of modes, all
    of one configuration."""
    others = {}
    for word in words:
        name, _, file = word.rpartition("=")
        name = name or Path(file).name.removesuffix(".safetensors")
        if name in others or name in modes:
            raise UsageError(f"--beside {word}: there is a row called {name} already, give it another as NAME=MODEL")
        others[name] = load_network(file, device, config), selected_shift(file)
    return others


def draw_real_set(args, launched):
    """The real set of stages 1 and 2, in pixels of the toy world."""
    base = args.model or default_base(args.preset)
    is_set = args.real_set.endswith(".safetensors")
    if is_set and os.path.isfile(args.real_set):
        made = read_metadata(args.real_set).get("key")
        is_set = isinstance(made, dict) and {"base", "num_assets"} <= made.keys()
    if not is_set:
        raise UsageError(f"--real_set {args.real_set} must be a .safetensors file that is not there yet, or a real set")
    config = read_metadata(base).get("config")
    if not isinstance(config, dict) or not config.get("vocab_size"):
        raise ValueError(f"{base} is a model of latents: draw its real set with python -m full.real_set")
    sampling = Sampling(cfg_scale=1.0 if args.cfg_scale is None else args.cfg_scale, num_steps=args.num_steps,
                        seed=args.seed, dtype=args.dtype)
    write_real_set(args.real_set, base, args.num_assets or ASSETS[args.preset], sampling, launched)
    if launched.rank == 0:
        print(f"wrote {args.real_set}")


def main(argv=None):
    parser, args = parse_args(argv)
    check_flags(parser, args)
    launched = launch(args.threads)
    if args.real_set:
        return draw_real_set(args, launched)
    path = args.model or default_model(args.preset, args.task or "texturing")
    network, task = load_network(path, launched.device, shifters=args.shifters), trained_task(path)
    check_fit(args, path, network, task)
    latents = network.dit.config.latent
    if launched.rank > 0:
        return
    sampling = chosen_sampling(args, path, latents, launched.device)
    if latents:
        encoders = Encoders(args.vae, args.text_encoder)
        objects, meshes, decode = latent_objects(encoders, network, args.prompt, args.mesh, args.objects)
    else:
        objects, meshes = chosen_objects(args, network.dit.config.image_size, task)
        decode = as_they_are
    out = args.out or f"runs/{args.preset}/sample.png"
    modes = ("syn", "real", "shifted") if args.domain == "all" else (args.domain,)
    others = models_beside(args.beside, modes, launched.device, network.dit.config)
    images = sample_modes(network, objects, task, modes, sampling, decode)
    beside = {}
    for name, (other, (B_max, t_max)) in others.items():
        mode = "real" if other.shifters is None else "shifted"
        drawn = sample_modes(other, objects, task, (mode,), replace(sampling, B_max=B_max, t_max=t_max), decode)
        beside[name] = drawn[mode]
    images = beside | images
    write_sheet(out, images, objects, task)
    print(f"{path} -> {out}")
    if args.views:
        save_views(args.views, images, objects, list(meshes))
        print(f"the single views are in {args.views}")
    if args.textured:
        save_meshes(args.textured, meshes, images, args.texture_size or 1024)


if __name__ == "__main__":
    run_cli(main)
