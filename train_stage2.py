"""Stage 2 (Sec. 4.2, B.2): the backbone learns 3D control from renders while real images keep it realistic.

    python train_stage2.py                                     # the toy, all stages, from the shipped base model
    python train_stage2.py --task text                         # text to four views, no maps
    python train_stage2.py --method syn_only                   # the baseline: fine-tune on renders alone
    python train_stage2.py --no_freezing --no_reassignment     # an ablation (Table 2, row 3)
    python train_stage2.py --layer_selective                   # what moved the authors to it (A.2, Fig. 6)
    python train_stage2.py --benchmark                         # what layer-aware freezing saves
    torchrun --nproc_per_node=8 train_stage2.py --preset full --base pixart.safetensors \\
        --synthetic latents --real real   # eight GPUs, after train_stage1.py likewise

Iterations alternate between the domains. Shifters are frozen, the backbone trains on the epsilon loss:

    synthetic   four views of one asset, control, e_syn, attention over all views
    real        single images, empty control, e_real; the first i blocks frozen (layer-aware training), the first j
                blocks run with e_syn (domain reassignment)

In the toy world, stage 1 and the sets it needs are made first where they are missing. To resume, run it again.
"""
import argparse
import os
import time
from contextlib import nullcontext
from glob import glob
from typing import NamedTuple

import torch

import data
import evaluate
import sample
import train_stage1
from dit import PRESETS, DiT, T, launch, run_cli, seeded_generator
from domain_shifter import (DomainShifters, ShiftedDiT, block_count, draw_frozen_blocks, draw_reassigned_blocks,
                            load_adapter, load_shifters, with_adapter)
from train_stage1 import (DEFAULTS, DRAWS, Iteration, base_model, denoising_loss, fill_defaults, finish, null_caption,
                          on_rank_0_first, stage1_file, train, train_shifters, training_arguments, training_sets)

# ---------------------------------------------------------------------------------------------------------------------
# Realiz3D and its baselines (Sec. 5)


class Method(NamedTuple):
    """What a row of the paper's tables trains."""
    adapter: str | None         # "shifters", a key of domain_shifter.ADAPTERS, or None
    stage1: bool                # whether that is trained alone first, then frozen (--joint: trained with the model)
    backbone: bool              # whether the backbone trains; control and view weights always do
    real_data: bool             # whether real iterations alternate with the synthetic ones
    kept: bool = True           # whether the adapter stays for sampling


METHODS = {
    #                         adapter     stage1 backbone real   kept
    "realiz3d":        Method("shifters", True,  True,  True),
    "syn_only":        Method(None,       False, True,  False),
    "syn_real":        Method(None,       False, True,  True),
    "lora":            Method("lora",     False, False, False),
    "linear_adapter":  Method("linear",   False, False, False),
    "domain_adapter":  Method("lora",     True,  True,  False, kept=False),         # AnimateDiff, Guo et al. 2024
    "spatial_adapter": Method("linear",   True,  True,  False, kept=False),         # Still-Moving
    "domain_switcher": Method("switcher", True,  True,  True),                      # Wonder3D
}

# ---------------------------------------------------------------------------------------------------------------------
# Which iteration comes when (Sec. 4.2)


def stage2_plan(args, num_blocks):
    """plan(step) -> Iteration: a short real warm-up, then synthetic and real in turn."""
    def real_iteration(step, visit):
        generator = seeded_generator(DRAWS, args.seed, step)        # one i and one j a step, the same on every rank
        i = 0 if args.no_freezing else draw_frozen_blocks(generator, num_blocks, args.tau_B)
        j = 0 if args.no_reassignment else draw_reassigned_blocks(generator, num_blocks, args.p_B, args.tau_B)
        return Iteration("real", visit, reassigned_blocks=j, frozen_blocks=i)

    def plan(step):
        if args.no_real_data:
            return Iteration("syn", step)
        if step < args.real_warmup:
            return real_iteration(step, step)
        turn, is_real = divmod(step - args.real_warmup, 2)
        return real_iteration(step, args.real_warmup + turn) if is_real else Iteration("syn", turn)
    return plan


def stage2_network(args, launched):
    """The base model with the shifters (or adapter) of stage 1, frozen, or with new ones that train along."""
    device, method = launched[0], METHODS[args.method]
    base = base_model(args, device)
    if method.stage1 and not args.joint:
        path = stage1_path(args, launched)
        network = ShiftedDiT(base, load_shifters(path, device, base.config), load_adapter(path, device, base.config))
        network.requires_grad_(False)
    else:
        network = with_adapter(base, method.adapter, args.rank, args.seed)
    for name, p in base.named_parameters():
        p.requires_grad_(method.backbone or name in ("control_embedder.weight", "view_encoding"))
    if args.task == "text" and base.control_embedder is not None:
        base.control_embedder.requires_grad_(False)
    return network


def stage1_path(args, launched):
    """The run folder's shifters or adapter, trained first where they are missing (toy and small)."""
    path = args.shifters or stage1_file(args.out, args.adapter, args.rank)
    if os.path.isfile(path):
        return path
    if args.preset == "full" or args.shifters:
        raise FileNotFoundError(f"no {args.adapter} at {path}: train with train_stage1.py --preset {args.preset} "
                                f"--adapter {args.adapter} --rank {args.rank}, or name a file with --shifters")
    flags = ("preset", "out", "base", "synthetic", "real", "num_assets", "real_steps", "adapter", "rank", "seed",
             "batch", "dtype", "loss", "threads", "log_every", "picture_steps")
    argv = [f"--{flag}={getattr(args, flag)}" for flag in flags if getattr(args, flag) is not None]
    argv += [f"--steps={args.stage1_steps}"] if args.stage1_steps else []
    if launched[1] == 0:
        print(f"{path} is missing, first: train_stage1.py {' '.join(argv)}", flush=True)
    return train_shifters(fill_defaults(train_stage1.parse_args(argv), "stage1", launched[0]), launched)


# ---------------------------------------------------------------------------------------------------------------------
# Layer-selective training (A.2, Fig. 6): images only, no views, no control, no shifters; only blocks train

VARIANTS = {
    "renders":   "all blocks on renders",
    "layers":    "first half of the blocks on renders, second half on photos",
    "timesteps": "t >= 500 on renders, t < 500 on photos",
}


def selective_plan(variant, num_blocks):
    """plan(step) -> Iteration for one of VARIANTS; synthetic and real in turn where it takes both."""
    def plan(step):
        turn, is_real = divmod(step, 2)
        if variant == "renders":
            return Iteration("syn", step)
        if variant == "layers":
            return Iteration("real", turn, frozen_blocks=num_blocks // 2) if is_real else \
                Iteration("syn", turn, frozen_last_blocks=num_blocks - num_blocks // 2)
        return Iteration("real", turn, timesteps=(0, T // 2)) if is_real else \
            Iteration("syn", turn, timesteps=(T // 2, T))
    return plan


def layer_selective(args, launched):
    """Fine-tunes the base model in each of VARIANTS and --seeds, draws the same prompts from the same noise with all of
    them, and measures what each took from the two sets, which differ in their look and in their background."""
    device, rank, _ = launched
    config, folder = PRESETS[args.preset], f"{args.out}/sets"
    if args.seeds < 1 or args.num_prompts < 2:
        raise ValueError(f"--seeds must be at least 1 and --num_prompts 2, not {args.seeds} and {args.num_prompts}")
    if rank == 0:
        minutes = args.seeds * len(VARIANTS) * args.steps * args.batch * 4 * step_seconds(args, device)[0] / 60
        print(f"to do: {len(VARIANTS)} variants of {args.steps} steps x {args.seeds} seed(s), about {minutes:.0f} "
              "minutes on this machine (and three to make sets and a judge of domains, the first time)", flush=True)
    options = dict(size=config.image_size, folder=folder, device=device)
    sets = {domain: on_rank_0_first(launched[2], rank, lambda: data.selective_set(4 * args.num_assets, style, seed,
                                                                                 **options))
            for domain, style, seed in (("syn", "render", 6), ("real", "photo", 7))}
    judge = on_rank_0_first(launched[2], rank, lambda: evaluate.train_feature_net(
        folder, size=config.image_size, backgrounds=data.BACKGROUNDS))
    photos = evaluate.world_features(judge, folder, device)
    text = data.tokenize(data.asset_captions(data.sample_assets(args.num_prompts, data.SEEDS["evaluation"])))
    measured, pictures = {}, []
    for seed in range(args.seeds):
        for variant in ("base", *VARIANTS):
            network = with_adapter(base_model(args, device).requires_grad_(False), None, None)
            network.dit.blocks.requires_grad_(True)
            if variant != "base":
                run = argparse.Namespace(**vars(args) | dict(seed=seed, name=f"selective_{variant}_{seed}"))
                train(network, sets, {"text": data.tokenize([""])}, selective_plan(variant, config.depth), run,
                      f"{args.out}/{run.name}", launched)
            images = data.to_uint8(sample.sample_images(network, text, seed=seed, num_steps=args.picture_steps)[:, 0])
            pictures += [(variant, images[:12])] if seed == 0 else []
            measured.setdefault(variant, []).append(selective_measures(images / 255, judge, photos))
    if rank == 0:
        print_selective(measured, args)
        sample.save_picture(f"{args.out}/layer_selective.png", pictures)
        evaluate.write_json(f"{args.out}/layer_selective.json", dict(settings=evaluate.settings(args), rows=measured))
        print(f"wrote {args.out}/layer_selective.png and .json: the same prompts and noise, one row a variant (seed 0)")


def selective_measures(images, judge, photos):
    """Of images (N, 3, H, W) in [0, 1]: share called a photo, distances to held-out photos before white, and the share
    that lies before white."""
    features = judge.features(images)
    edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)  # (N, 3, 4 W)
    return dict(photo=(judge.photo_probability(images) > 0.5).double().mean().item(),
                white=((edge > 0.9).all(dim=1).double().mean(dim=1) > 0.9).double().mean().item(),
                FD=evaluate.fid(photos, features), KD=1000 * evaluate.kid(photos, features))


def print_selective(measured, args):
    """Prints mean and, with several seeds, standard deviation of each measure."""
    print(f"{args.num_prompts} prompts, {args.seeds} seed(s): share called a photo, share before white, distances to "
          "held-out photos before white")
    print(f"{'':64}{'photo':>14}{'white':>14}{'FD':>14}{'KD x1000':>14}")
    for variant, rows in measured.items():
        cells = []
        for name, digits in (("photo", 2), ("white", 2), ("FD", 1), ("KD", 0)):
            values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            spread = f" +- {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{f'{values.mean():.{digits}f}{spread}':>14}")
        print(f"{variant + (': ' + VARIANTS[variant] if variant in VARIANTS else ''):64}{''.join(cells)}")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: what a real iteration saves by freezing (Sec. 4.2), measured and counted


def iteration_macs(config, views, frozen_blocks=0, text_length=None):
    """Multiply-adds of one training step on one sample of `views` jointly attending views: forward and backward.

    The backward pass costs the forward's twice, once for the inputs and once for the weights, and ends at block i.
    """
    d, n, L = config.width, views * (config.image_size // config.patch_size) ** 2, text_length or config.text_length
    block = n * (4 + 2 + 8) * d * d + 2 * L * d * d + 2 * n * n * d + 2 * n * L * d
    patch = n * config.patch_size ** 2 * config.channels * d
    final = n * config.patch_size ** 2 * config.out_channels * d
    forward = patch + config.depth * block + final
    backward = 2 * (forward - frozen_blocks * block - (patch if frozen_blocks else 0))
    return forward + backward


def benchmark(args, launched):
    """Times real iterations at every i against unfrozen ones, in turn in one process, beside the counted ratio."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {args.rounds}")
    device = launched[0]
    config = PRESETS[args.preset]
    network = ShiftedDiT(DiT(config), DomainShifters(config, args.rank).requires_grad_(False)).to(device)
    optimizer = torch.optim.AdamW(network.dit.parameters(), lr=0.0, fused=device.type == "cuda")
    size = (config.channels, config.image_size, config.image_size)

    def batch(rows, views):
        images = torch.randint(256, (rows, views, *size), dtype=torch.uint8, device=device) if config.vocab_size else \
            torch.randn(rows, views, *size, device=device)
        L = data.TEXT_LENGTH if config.vocab_size else config.text_length
        text = torch.randint(1, len(data.VOCAB), (rows, L), device=device) if config.vocab_size else \
            torch.randn(rows, L, config.text_dim, device=device)
        return {"image": images, "text": text}
    real, syn = batch(4 * args.batch, 1), batch(args.batch, 4)
    syn["view"] = torch.arange(4, device=device).expand(args.batch, 4)
    syn["control"] = torch.randn(args.batch, 4, config.control_channels, *size[1:], device=device)
    null = {"text": data.tokenize([""]).to(device)} if config.vocab_size else {}

    def seconds(inputs, iteration):
        wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss, _ = denoising_loss(network, inputs, iteration, null, args.seed, 0, 0, args.text_dropout,
                                     even=args.loss == "even")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.dit.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        return time.perf_counter() - start
    deepest = block_count(args.tau_B, config.depth)
    cases = [("syn", syn, Iteration("syn", 0)), ("real", real, Iteration("real", 0))]
    cases += [(i, real, Iteration("real", 0, frozen_blocks=i)) for i in range(deepest + 1)]
    times = {name: [] for name, _, _ in cases}
    for k in range(args.rounds + 2):
        for name, inputs, iteration in cases:
            elapsed = seconds(inputs, iteration)
            if k >= 2:                                              # the first two rounds warm up
                times[name].append(elapsed)
    images = 4 * args.batch
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    print(f"{args.preset} on {device} in {args.dtype}, {torch.get_num_threads()} CPU threads, {images} images a step")
    print(f"synthetic iteration {images / median['syn']:8.1f} images/s   (attention over 4 views, control)")
    print(f"real iteration      {images / median['real']:8.1f} images/s   (no freezing)")
    print("blocks frozen, i    time / unfrozen   counted")
    macs = [iteration_macs(config, 1, i, real["text"].shape[1]) for i in range(deepest + 1)]
    counted = {i: macs[i] / macs[0] for i in range(deepest + 1)}
    for i in range(deepest + 1):
        print(f"{i:16d} {median[i] / median['real']:17.3f} {counted[i]:9.3f}")
    mean = [sum(values) / (deepest + 1) for values in ([median[i] / median["real"] for i in counted], counted.values())]
    print(f"{'average':>16} {mean[0]:17.3f} {mean[1]:9.3f}")


def wait(device):
    """Waits for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def step_seconds(args, device):
    """Seconds a training step and a forward pass take for each image, from a short trial of the base model."""
    config, images = PRESETS[args.preset], 16
    model = base_model(args, device)
    x = torch.randn(images, 1, config.channels, config.image_size, config.image_size, device=device)
    t, text = torch.zeros(images, dtype=torch.long, device=device), data.tokenize([""] * images).to(device)

    def seconds(work):
        for _ in range(3):                                          # the last one counts
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
        return (time.perf_counter() - start) / images
    with torch.no_grad():
        forward = seconds(lambda: model(x, t, text))
    return seconds(lambda: model(x, t, text).square().mean().backward()), forward


def announce(args, launched):
    """Prints what this command will do and how long that should take, from a short trial on this machine."""
    device, rank, world = launched
    config = PRESETS[args.preset]
    if not config.vocab_size or rank > 0:
        return
    step, forward = step_seconds(args, device)
    draw = forward * args.real_steps                                        # without guidance: once a step
    start = time.perf_counter()
    data.render(data.sample_assets(16, 0), size=config.image_size, device=device)
    render = (time.perf_counter() - start) / 16
    stage1 = METHODS[args.method].stage1 and not args.joint and \
        not os.path.isfile(args.shifters or stage1_file(args.out, args.adapter, args.rank))
    stage1_steps = args.stage1_steps or DEFAULTS[args.preset, "stage1"][0]
    todo = []
    if not (args.synthetic or glob(f"{args.out}/sets/synthetic_{args.num_assets}_*")):
        todo.append(("render the assets", args.num_assets * render))
    needs_real = not args.no_real_data or stage1 and args.adapter in ("shifters", "switcher")
    if needs_real and not (args.real or os.path.isfile(f"{args.out}/sets/real_{args.num_assets}.safetensors")):
        todo.append(("draw the real set", args.num_assets * 4 * draw / world))
    if stage1:
        todo.append(("train stage 1", stage1_steps * args.batch * 4 * step))
    todo.append(("train stage 2", args.steps * args.batch * 4 * step))
    print(f"to do: {', '.join(f'{what} ({took / 60:.1f} min)' for what, took in todo)}; about "
          f"{sum(took for _, took in todo) / 60:.0f} minutes on this machine", flush=True)


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser)
    add = parser.add_argument
    add("--task", choices=("texturing", "text"), default="texturing", help="control by normal and position maps, or by "
        "the view alone")
    add("--method", choices=METHODS, default="realiz3d", help="realiz3d or a baseline (Sec. 5)")
    add("--no_real_data", action="store_true", help="synthetic iterations only (Table 2, row 2)")
    add("--no_freezing", action="store_true", help="no layer-aware training")
    add("--no_reassignment", action="store_true", help="no domain reassignment")
    add("--joint", action="store_true", help="skip stage 1, train shifters or domain switcher with the model (Table 2, "
        "row 1)")
    add("--tau_B", type=float, default=0.4, help="deepest block that may be frozen or reassigned, as a share of N_B")
    add("--p_B", type=float, default=0.1, help="probability of domain reassignment on a real iteration")
    add("--real_warmup", type=int, default=20, help="real iterations before the domains alternate")
    add("--shifters", help="shifters, or a baseline's adapter, of stage 1 (default: in OUT)")
    add("--rank", type=int, help="r of the Domain Shifters (default 8) or of a baseline's adapter (32 at full)")
    add("--stage1_steps", type=int, help="steps of stage 1 where it is trained on the way")
    add("--layer_selective", action="store_true", help="the experiment of A.2 on single images, in place of stage 2")
    add("--seeds", type=int, default=1, help="--layer_selective: how many times it is trained")
    add("--num_prompts", type=int, default=64, help="--layer_selective: images a variant is measured on")
    add("--benchmark", action="store_true", help="time synthetic and real iterations, then stop")
    add("--rounds", type=int, default=15, help="how often --benchmark times each kind of iteration")
    args = parser.parse_args(argv)
    switches = [flag for flag in ("no_real_data", "no_freezing", "no_reassignment", "joint") if getattr(args, flag)]
    switches += [f"rank{args.rank}"] if args.rank else []
    args.name = args.name or "-".join([f"{args.method}_{args.task}", *switches])
    args.adapter = METHODS[args.method].adapter
    args.no_real_data |= not METHODS[args.method].real_data
    if args.method != "realiz3d":                       # layer-aware training and reassignment are Realiz3D's
        args.no_freezing = args.no_reassignment = True
    return args


def main():
    args = parse_args()
    launched = device, rank, _ = launch(args.threads)
    method = METHODS[args.method]
    fill_defaults(args, "selective" if args.layer_selective else "stage2", device)
    if args.layer_selective:
        return layer_selective(args, launched)
    if args.benchmark:
        return benchmark(args, launched)
    announce(args, launched)
    network = stage2_network(args, launched)
    config = network.dit.config
    synthetic, real = training_sets(args, launched, not args.no_real_data, control=args.task == "texturing")
    objects = data.evaluation_set(3, size=config.image_size, folder=f"{args.out}/sets") if config.vocab_size else None

    def preview(path):
        with nullcontext() if method.kept else network.without_adapter():
            sample.object_sheet(path, network, objects, args.task, num_steps=args.picture_steps)
    sets = {"syn": synthetic} if args.no_real_data else {"syn": synthetic, "real": real}
    losses = train(network, sets, null_caption(network.dit, synthetic), stage2_plan(args, config.depth), args,
                   f"{args.out}/{args.name}", launched, preview if objects else None)
    path = finish(f"{args.out}/{args.name}.safetensors", network, args, losses, launched, keep_adapter=method.kept)
    if rank == 0:
        print(f"to draw more: python sample.py --model {path}")


if __name__ == "__main__":
    run_cli(main)
