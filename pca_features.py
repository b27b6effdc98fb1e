"""What the blocks of a model know, by depth and by timestep (Sec. A.1, Fig. 5).

    python pca_features.py                                              # the shipped base model of the toy world
    python pca_features.py --model runs/toy/base.safetensors --num 100  # another checkpoint, more prompts
    python pca_features.py --model PixArt-XL-2-512x512.pth --text_encoder pixart/text_encoder --prompt "a red mug" ...

Draws the paper's figure: the first three principal components of the tokens after the blocks at 0.2, 0.5 and 1 N_B, at
four of 20 DDIM steps. Then, what the eye sees there as numbers: how much of an object's geometry and of its domain a
linear map can read off the tokens, block by block.
"""
import argparse
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import SEEDS
from dit import add_noise
from domain_shifter import REAL, uniform_domains
from full.encoders import encode_captions, load_text_encoder
from geometry.camera import AZIMUTHS, camera
from sample import (CFG_SCALE, LATENT_CFG_SCALE, Sampling, ddim_sample, ddim_timesteps, default_base, domain_mode,
                    guidance, guided_noise, initial_noise, load_network)
from support.launch import UsageError, a_seed, check_out, finite, launch, run_cli, some_steps, some_threads, within
from support.pictures import draw_plot, save_image, save_picture, side_by_side
from toy.render import Look, render
from toy.world import STYLES, asset_captions, sample_assets, tokenize

STEPS = (800, 700, 500, 200)                # t of the figure's four groups
DEPTHS = (0.2, 0.5, 1.0)                    # of its three rows, as shares of N_B


@contextmanager
def recorded(dit, depths):
    """with recorded(dit, depths) as features: a forward leaves features[k] (B, N, d), the tokens after k blocks, for
    each k of depths in 0..N_B."""
    features, handles = {}, []

    def keep_input(_, inputs):
        features[0] = inputs[0].detach()

    def keep_output_after(k):
        def hook(_, inputs, out):
            features[k] = out.detach()
        return hook
    for k in depths:
        if k == 0:
            handles.append(dit.blocks[0].register_forward_pre_hook(keep_input))
        else:
            handles.append(dit.blocks[k - 1].register_forward_hook(keep_output_after(k)))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 5: the principal components of what the blocks hold while the model samples


@torch.no_grad()
def sampled_features(network, inputs, sampling):
    """Samples one image a prompt and keeps the tokens at STEPS and DEPTHS (A.1).

    network: ShiftedDiT. inputs: {"text": (P, L) or (P, L, D), perhaps "text_mask", "null": the empty caption}.
    Returns images (P, C, H, W) and {(t, block): (P, N, d)}: t is the visited step nearest to each of
    STEPS (with 20 trailing steps 799, 699, 499 and 199, with leading ones exactly 800, 700, 500 and 200), block how
    many blocks the tokens have passed.
    """
    config, like = network.dit.config, network.dit.positions
    visited = ddim_timesteps(sampling.num_steps, sampling.spacing)
    steps = [int(visited[(visited - t).abs().argmin()]) for t in STEPS]
    blocks = [max(1, round(depth * config.depth)) for depth in DEPTHS]
    shape = (1, config.channels, config.image_size, config.image_size)
    null = {key: value.to(like.device) for key, value in inputs["null"].items()}
    images, features = [], {(t, block): [] for t in steps for block in blocks}
    for rows in tqdm(torch.arange(len(inputs["text"])).split(sampling.batch), desc="sampling", unit="batch"):
        noise = initial_noise(rows.tolist(), shape, sampling.seed)
        given = {key: inputs[key][rows].to(like.device) for key in ("text", "text_mask") if key in inputs}
        predict_noise = guided_noise(network, null, domain_mode("real", config.depth), sampling.cfg_scale,
                                     **given)

        def watched(x, t):
            with recorded(network.dit, blocks if int(t) in steps else ()) as found:
                eps = predict_noise(x, t)
            for block, tokens in found.items():             # under guidance the first half of the batch has the text
                features[int(t), block].append(tokens[:len(x)].float().cpu())
            return eps
        images.append(ddim_sample(watched, noise.to(like), sampling.num_steps, sampling.spacing,
                                  clip_x0=config.output_skip))
    return torch.cat(images)[:, 0].cpu(), {key: torch.cat(parts) for key, parts in features.items()}


def pca(x, num=3):
    """Principal components of the rows of x (M, d): components (num, d), scores (M, num), and the share of the variance
    that each explains (num,); float64. A component's sign makes its largest entry positive, so that runs agree."""
    x = x.double() - x.double().mean(dim=0)
    variance, vectors = torch.linalg.eigh(x.T @ x)                                          # ascending
    components = vectors.flip(1)[:, :num].T
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * largest.sign()
    return components, x @ components.T, variance.flip(0)[:num] / variance.sum()


def as_colors(scores, grid):
    """Scores (P N, 3) of P maps of grid x grid tokens -> uint8 (P, 3, grid, grid): 1st to 99th percentile."""
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    rgb = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (rgb * 255).round().byte().view(-1, grid, grid, 3).permute(0, 3, 1, 2)


def pca_figure(path, images, features, shown=12):
    """Writes Fig. 5: the images, then four groups by step of three rows by depth, a column for each prompt. Returns
    {(t, block): share of the variance that the three components explain}."""
    grid, size = round(next(iter(features.values())).shape[1] ** 0.5), images.shape[-1]
    low, high = -1, 1
    if images.shape[1] != 3:                                            # latents
        low, high = images[:, :3].min(), images[:, :3].max()
    pictures = ((images[:shown, :3] - low) / (high - low) * 255).clamp(0, 255).round().byte()
    rows, explained = [("generated", pictures)], {}
    for (t, block), tokens in features.items():
        _, scores, share = pca(tokens.flatten(0, 1))
        explained[t, block] = float(share.sum())
        maps = F.interpolate(as_colors(scores, grid)[:shown].float(), size, mode="nearest").byte()
        rows.append((f"t {t}, block {block}: {share.sum():.0%}", maps))
    save_picture(path, rows, scale=max(1, 64 // size))
    return explained


# ---------------------------------------------------------------------------------------------------------------------
# What can be read off the tokens: the figure's claim, geometry early and domain late, as numbers


def read_off(features, targets, fit):
    """R^2 of ridge regressions from tokens (M, d) to targets (M, k): fitted on the tokens `fit` (M,) bool, tested on
    the others."""
    x, y = features.double(), targets.double()
    mean_x, mean_y = x[fit].mean(dim=0), y[fit].mean(dim=0)
    x, y = x - mean_x, y - mean_y
    gram = x[fit].T @ x[fit]
    weights = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), x[fit].T @ y[fit])
    rest = ~fit
    return float(1 - (y[rest] - x[rest] @ weights).square().sum() / (y[rest] - y[rest].mean(dim=0)).square().sum())


@torch.no_grad()
def readability(network, num=800, seed=0):
    """R^2 with which silhouette, normals (as the camera sees them) and domain can be read off the tokens of noised
    images, by step and depth.

    The toy world knows the truth: `num` held-out objects, one view each, as photo and as render, noised to STEPS. The
    captions are those of the training sets, the same for both domains, so the image alone tells the domain. One ridge
    regression for all three: silhouette on all tokens, normals and domain on the object's; fitted on half the objects.
    Returns {target: {t: [R^2 after k blocks, k = 0..N_B]}}.
    """
    config, device = network.dit.config, network.dit.positions.device
    p, assets = config.patch_size, sample_assets(num, SEEDS["validation"])
    azimuth = torch.tensor(AZIMUTHS)[torch.arange(num) % 4, None]
    views = [render(assets, Look(style, seed=seed), azimuth, config.image_size) for style in ("photo", "render")]
    x0 = torch.cat([2 * view.rgb - 1 for view in views]).to(device)                             # (2 num, 1, 3, H, W)
    text = tokenize(asset_captions(assets) * 2).to(device)
    mask = torch.cat([view.mask[:, 0] for view in views])
    normal = torch.cat([view.normal[:, 0] for view in views])
    axes = torch.stack(camera(azimuth[:, 0]), dim=1).repeat(2, 1, 1)                            # (2 num, 3 axes, 3)
    normal = torch.einsum("nij,njhw->nihw", axes, normal)                                       # in the camera's frame

    def tokens(maps):
        return F.avg_pool2d(maps, p).flatten(2).transpose(1, 2).flatten(0, 1)                   # (2 num N, c)
    covered = tokens(mask)
    per_image = len(covered) // (2 * num)
    on = covered[:, 0] > 0.9
    fit = (torch.arange(2 * num) % num < num // 2).repeat_interleave(per_image)
    domain = (torch.arange(2 * num) < num).double().repeat_interleave(per_image)[:, None]
    targets = {"silhouette": (covered, torch.ones_like(on)), "normals": (tokens(normal), on), "domain": (domain, on)}
    noise = initial_noise(range(2 * num), x0.shape[1:], seed).to(device)
    found = {name: {} for name in targets}
    for t in tqdm(STEPS, desc="reading", unit="timestep"):
        x_t, blocks = add_noise(x0, noise, torch.full((2 * num,), t, device=device)), {}
        for part in torch.arange(2 * num).split(64):
            with recorded(network.dit, range(config.depth + 1)) as features:
                network(x_t[part], torch.full((len(part),), t, device=device), text[part],
                        uniform_domains(REAL, config.depth, len(part), device))
            for k, h in features.items():
                blocks.setdefault(k, []).append(h.float().cpu().flatten(0, 1))
        for name, (target, where) in targets.items():
            found[name][t] = [read_off(torch.cat(blocks[k])[where], target[where], fit[where]) for k in sorted(blocks)]
    return found


def print_readability(found):
    """Prints R^2 by depth and step, and what the claim is about: at which block and step each target is there."""
    depth = len(found["domain"][STEPS[0]]) - 1
    print("R^2 of a linear map from the tokens to what they show, after k blocks (0: the patch embedding)")
    print(f"{'':24}" + "".join(f"{k:6d}" for k in range(depth + 1)))
    for name, by_step in found.items():
        for t, values in by_step.items():
            print(f"{name:12} t = {t:4d}    " + "".join(f"{value:6.2f}" for value in values))
    print("blocks until 90 % of the best depth's R^2 (and that R^2; -: not readable, R^2 below 0.05)")
    for name, by_step in found.items():
        cells = []
        for t, values in by_step.items():
            first = next(k for k, value in enumerate(values) if value >= 0.9 * abs(max(values)) or max(values) < 0.05)
            cells.append(f"t {t}: {first if max(values) >= 0.05 else '-':>2} ({max(values):.2f})")
        print(f"{name:12}{'   '.join(cells)}")


def readability_plot(path, found):
    """Writes R^2 by depth, a panel for each step."""
    panels = [draw_plot({name: list(enumerate(by_step[t])) for name, by_step in found.items()},
                               "blocks passed", f"R^2 at t = {t}", size=(380, 300), y_range=(0, 1))
              for t in STEPS]
    save_image(path, side_by_side(panels))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def prompts_of(args, network):
    """What the command line asks for, as `sampled_features` takes it: random objects in random styles, or --prompt."""
    if not network.dit.config.latent:
        if args.prompt or args.text_encoder:
            raise UsageError("--prompt and --text_encoder are for models of latents; the toy has prompts of its own, "
                             "as many as --num says")
        assets, generator = sample_assets(args.num, 100 + args.seed), torch.Generator().manual_seed(args.seed)
        styles = [STYLES[k] for k in torch.randint(len(STYLES), (args.num,), generator=generator).tolist()]
        return {"text": tokenize(asset_captions(assets, styles)), "null": {"text": tokenize([""])}}
    if not (args.prompt and args.text_encoder):
        raise UsageError("a model of latents: give it --prompt and --text_encoder")
    device = network.dit.positions.device
    return encode_captions(args.prompt, load_text_encoder(args.text_encoder, device), network.dit)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", "--base", help="checkpoint, ours or PixArt-alpha's .pth or safetensors (default: the base model of "
        "the toy's run folder, else the shipped one)")
    add("--num", type=within(10, 10 ** 5), default=60, help="prompts, all of them in the PCA (default %(default)s)")
    add("--num_objects", type=within(10, 10 ** 5), default=800, help="objects that readings are fitted and tested "
        "on (default %(default)s)")
    add("--prompt", nargs="+", help="full: captions of many objects in many styles")
    add("--text_encoder", metavar="DIR", help="full: PixArt's text_encoder folder (needs transformers)")
    add("--num_steps", type=some_steps, default=20, help="DDIM steps (default %(default)s)")
    add("--spacing", choices=("trailing", "leading", "linspace"), default="trailing", help="spacing of the steps "
        "(default %(default)s)")
    add("--cfg_scale", type=finite, help=f"guidance on the text, 1 = none (default {CFG_SCALE:g}; full: "
        f"{LATENT_CFG_SCALE})")
    add("--seed", type=a_seed, default=0, help="decides prompts and noise (default %(default)s)")
    add("--threads", type=some_threads, help="CPU threads (default: the fastest in a trial)")
    add("--out", default="runs/toy/pca.png", help="the figure; the plot gets _readable before .png (default "
        "%(default)s)")
    args = parser.parse_args(argv)
    check_out(args.out)
    network = load_network(args.model or default_base("toy"), launch(args.threads).device)
    pixels = not network.dit.config.latent
    sampling = Sampling(cfg_scale=guidance(args.cfg_scale, latents=not pixels), num_steps=args.num_steps,
                        spacing=args.spacing, seed=args.seed, batch=16)
    images, features = sampled_features(network, prompts_of(args, network), sampling)
    explained = pca_figure(args.out, images, features)
    print("variance explained by three components: "
          + ", ".join(f"t {t} block {block} {share:.0%}" for (t, block), share in explained.items()))
    written = [args.out]
    if pixels:
        found = readability(network, args.num_objects, args.seed)
        print_readability(found)
        written.append(f"{args.out.removesuffix('.png')}_readable.png")
        readability_plot(written[-1], found)
    print(f"wrote {' and '.join(written)}")


if __name__ == "__main__":
    run_cli(main)
