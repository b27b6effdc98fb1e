"""Stage 2 (Sec. 4.2, B.2): the backbone learns 3D control from renders while real images keep it realistic.

    python train_stage2.py                                     # the toy, all stages, from the shipped base model
    python train_stage2.py --task text                         # text to four views, no maps
    python train_stage2.py --method syn_only                   # the baseline: fine-tune on renders alone
    python train_stage2.py --no_freezing --no_reassignment     # an ablation (Table 2, row 3)
    python train_stage2.py --layer_selective                   # what moved the authors to it (A.2, Fig. 6)
    python train_stage2.py --benchmark                         # what a step costs and freezing saves
    python train_stage2.py --benchmark --preset full --dtype bfloat16   # on a laptop: memory and operations, counted
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
from dit import PRESETS, DiT, T, launch, read_metadata, run_cli, seeded_generator
from domain_shifter import (DomainShifters, ShiftedDiT, block_count, draw_frozen_blocks, draw_reassigned_blocks,
                            load_adapter, load_shifters, with_adapter)
from train_stage1 import (DEFAULTS, DRAWS, Iteration, base_model, denoising_loss, fill_defaults, finish, in_training,
                          null_caption, on_rank_0_first, peak_memory, read_batch, stage1_file, train, train_shifters,
                          training_arguments, training_sets)


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
        made = read_metadata(path).get("settings", {})
        if launched[1] == 0:
            print(f"stage 1: {path}, trained for {made.get('steps')} steps with seed {made.get('seed')}", flush=True)
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
    assets = data.sample_assets(args.num_prompts, data.SEEDS["evaluation"])
    others = [data.BACKGROUNDS[1 + k % (len(data.BACKGROUNDS) - 1)] for k in range(args.num_prompts)]
    plain, asked = (data.tokenize(data.asset_captions(assets, background=name)) for name in (None, others))
    measured, pictures = {}, []
    for seed in range(args.seeds):
        for variant in ("base", *VARIANTS):
            network = with_adapter(base_model(args, device).requires_grad_(False), None, None)
            network.dit.blocks.requires_grad_(True)
            if variant != "base":
                run = argparse.Namespace(**vars(args) | dict(seed=seed, name=f"selective_{variant}_{seed}"))
                train(network, sets, {"text": data.tokenize([""])}, selective_plan(variant, config.depth), run,
                      f"{args.out}/{run.name}", launched)
            draw = lambda text: data.to_uint8(sample.sample_images(network, text, seed=seed,
                                                                   num_steps=args.picture_steps)[:, 0])
            images, elsewhere = draw(plain), draw(asked)
            pictures += [(variant, torch.cat([images[:6], elsewhere[:6]]))] if seed == 0 else []
            measured.setdefault(variant, []).append(selective_measures(images / 255, elsewhere / 255, judge, photos))
    if rank == 0:
        print_selective(measured, args)
        sample.save_picture(f"{args.out}/layer_selective.png", pictures)
        evaluate.write_json(f"{args.out}/layer_selective.json", dict(settings=evaluate.settings(args), rows=measured))
        print(f"wrote {args.out}/layer_selective.png and .json: the same prompts and noise, one row a variant (seed 0)")


def selective_measures(images, elsewhere, judge, photos):
    """Of images (N, 3, H, W) in [0, 1] after captions that name no background: share called a photo, distances to
    held-out photos before white; of images `elsewhere`, after captions that name another one: share before white."""
    features = judge.features(images)
    edge = torch.cat([elsewhere[..., 0, :], elsewhere[..., -1, :], elsewhere[..., 0], elsewhere[..., -1]], dim=-1)
    is_white = (edge > 0.9).all(dim=1).double()                                                     # (N, 4 W)
    return dict(photo=(judge.photo_probability(images) > 0.5).double().mean().item(),
                white=(is_white.mean(dim=1) > 0.9).double().mean().item(),
                FD=evaluate.fid(photos, features), KD=1000 * evaluate.kid(photos, features))


def print_selective(measured, args):
    """Prints mean and, with several seeds, standard deviation of each measure."""
    print(f"{args.num_prompts} prompts, {args.seeds} seed(s): share called a photo, share before white where another "
          "background is asked for, distances to held-out photos before white")
    print(f"{'':64}{'photo':>14}{'white':>14}{'FD':>14}{'KD x1000':>14}")
    for variant, rows in measured.items():
        cells = []
        for name, digits in (("photo", 2), ("white", 2), ("FD", 1), ("KD", 0)):
            values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            spread = f" +- {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{f'{values.mean():.{digits}f}{spread}':>14}")
        print(f"{variant + (': ' + VARIANTS[variant] if variant in VARIANTS else ''):64}{''.join(cells)}")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: what an iteration costs and what freezing saves (Sec. 4.2), counted and measured


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


def parameter_counts(config):
    """How many numbers the matrices of one block, those outside the blocks, and all of the backbone hold."""
    c, d, patch = config, config.width, config.patch_size ** 2
    block = (3 + 1 + 1 + 2 + 1 + 4 + 4) * d * d                 # qkv and proj; q, kv and proj over the text; MLP
    outside = patch * (c.channels + c.control_channels + c.out_channels) * d \
        + (256 + d + 6 * d + c.text_dim + d) * d                # patches in and out; time, modulation, text
    small = (1 + 2 + 6 + 2) * d + patch * c.out_channels + c.depth * (13 + 6) * d + (c.num_views + 2) * d
    small += (c.vocab_size + c.text_length) * c.text_dim if c.vocab_size else 0
    small += 4 * c.depth * d // c.heads if c.qk_norm else 0     # before: biases, and tables of blocks, views and output
    return block, outside, c.depth * block + outside + small


def memory_bytes(config, batch, views, dtype, checkpointing):
    """What a stage-2 iteration holds in device memory, counted: no model is built or run.

    config: Config. batch: samples of `views` jointly attending views. dtype: "float32", or "bfloat16" for fp32 weights
    under autocast. checkpointing: as --grad_checkpointing, which keeps the input of every block, and everything only
    of the one that is being recomputed. Returns {part: bytes}. Not counted: frozen shifters, what lives for a moment,
    the average of --ema, and DDP's buckets (as much as the gradients).
    """
    c, d, size = config, config.width, 2 if dtype == "bfloat16" else 4
    tokens, words = batch * views * (c.image_size // c.patch_size) ** 2, batch * c.text_length
    pixels = tokens * c.patch_size ** 2
    stream = 4 * tokens * d                                     # (tokens, d) in fp32: norms and residuals
    wide = size * tokens * d                                    # (tokens, d) in --dtype: matrix products
    matrices, outer_matrices, parameters = parameter_counts(config)

    block = 4 * stream                                          # both LayerNorms: input, output (times 1 + scale)
    block += 2 * wide                                           # both modulated, the inputs of attention and MLP
    block += (3 + 1 + 1) * wide                                 # attention: q k v, its output, projected (times gate)
    block += (1 + 1 + 1) * wide + 2 * size * words * d          # to the text: input, q, output; its k v
    block += (4 + 4 + 1) * wide                                 # MLP: GELU's input and output, projected (times gate)
    block += 4 * tokens * (2 * 2 + 2 * c.heads)                 # mean and deviation; flash attention's log-sum-exp
    block += 8 * stream if c.qk_norm else 0                     # q, k and q to the text in an unfused RMSNorm; copies
    outside = size * pixels * (c.channels + c.control_channels) + 4 * pixels * c.channels     # patches; the loss
    outside += size * words * (c.text_dim + 3 * d)              # text embedder: input, GELU's input and output, output
    outside += 2 * stream + wide                                # final LayerNorm: input and output; modulated
    if dtype == "bfloat16":                                     # autocast's copies of the weights
        block, outside = block + 2 * matrices, outside + 2 * outer_matrices
    return {"parameters": 4 * parameters, "gradients": 4 * parameters, "AdamW's moments": 2 * 4 * parameters,
            "saved activations": outside + (c.depth * stream + block if checkpointing else c.depth * block)}


def tera_operations(args, views, frozen_blocks=0):
    """10^12 operations of an iteration of one process on samples of `views` views, two for each multiply-add."""
    config = PRESETS[args.preset]
    L = data.TEXT_LENGTH if config.vocab_size else config.text_length
    return 2e-12 * args.batch * 4 / views * iteration_macs(config, views, frozen_blocks, L)


def print_counted(args):
    """Memory by part, without and with checkpointing, and operations of an iteration."""
    print(f"{args.preset}, {args.batch} grids of 4 views a step in {args.dtype}, counted")
    print(f"{'GiB':20}{'no checkpointing':>18}{'--grad_checkpointing':>24}")
    kept, recomputed = (memory_bytes(PRESETS[args.preset], args.batch, 4, args.dtype, checkpointing)
                        for checkpointing in (False, True))
    for part in kept:
        print(f"{part:20}{kept[part] / 2 ** 30:18.3f}{recomputed[part] / 2 ** 30:24.3f}")
    print(f"{'sum':20}{sum(kept.values()) / 2 ** 30:18.3f}{sum(recomputed.values()) / 2 ** 30:24.3f}")
    print(f"TFLOP an iteration: synthetic {tera_operations(args, 4):.4g}, real {tera_operations(args, 1):.4g} (no "
          "freezing, nothing recomputed)", flush=True)


def benchmark_sets(args):
    """Random sets in the types in which real ones are kept, and the empty caption, as from `stage2_sets`."""
    config, rows = PRESETS[args.preset], 2 * args.batch
    size = (config.image_size, config.image_size)

    def one_set(num, views):
        if config.vocab_size:
            return {"image": torch.randint(256, (num, views, config.channels, *size), dtype=torch.uint8),
                    "text": torch.randint(1, len(data.VOCAB), (num, data.TEXT_LENGTH))}
        return {"image": torch.randn(num, views, 2, config.channels, *size).half(),
                "text": torch.randn(num, config.text_length, config.text_dim).half(),
                "text_mask": torch.ones(num, config.text_length, dtype=torch.uint8)}
    syn, real = one_set(rows, 4), one_set(4 * rows, 1)
    syn["view"] = torch.arange(4).expand(rows, 4)
    syn["control"] = torch.randn(rows, 4, config.control_channels, *size).half()
    null = {key: value[:1] for key, value in real.items() if key != "image"}
    return {"syn": syn, "real": real}, null


def timed_step(model, optimizer, sets, null, iteration, args, device, parts=None):
    """Seconds of one training step like those of `train`.

    parts: {name: [seconds]}, to which the time of each part is added; the device is waited for after each.
    """
    def lap(part):
        if parts is not None:
            wait(device)
            clock.append(time.perf_counter())
            parts[part].append(clock[-1] - clock[-2])
    clock = [time.perf_counter()]
    _, _, _, batch = read_batch(0, iteration, sets, args, (device, 0, 1))
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    lap("data")
    wait(device)
    start = time.perf_counter()                 # `train` reads while the device computes: not part of the step
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss, _ = denoising_loss(model, batch, iteration, null, args.seed, 0, 0, args.text_dropout,
                                 even=args.loss == "even")
    lap("forward")
    loss.backward()
    lap("backward")
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lap("optimizer")
    wait(device)
    return time.perf_counter() - start


def measure(args, launched):
    """Times the synthetic, the unfrozen real and the real iteration at every i in turn, then the synthetic in parts.

    Returns medians of seconds, {"syn", "real", i: ...} and {part: ...}, and the peak memory in GiB.
    """
    device, _, world = launched
    config = PRESETS[args.preset]
    network = ShiftedDiT(DiT(config), DomainShifters(config, args.rank).requires_grad_(False)).to(device)
    optimizer = torch.optim.AdamW(network.dit.parameters(), lr=0.0, fused=device.type == "cuda")
    model = in_training(network, args, world)
    sets, null = benchmark_sets(args)
    null = {key: value.to(device) for key, value in null.items()}
    iterations = {"syn": Iteration("syn", 0), "real": Iteration("real", 0)}
    iterations |= {i: Iteration("real", 0, frozen_blocks=i) for i in range(block_count(args.tau_B, config.depth) + 1)}
    times = {name: [] for name in iterations}
    parts = {part: [] for part in ("data", "forward", "backward", "all-reduce", "optimizer")}
    for _ in range(args.rounds + 2):                                # the first two rounds warm up
        for name, iteration in iterations.items():
            times[name].append(timed_step(model, optimizer, sets, null, iteration, args, device))
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else peak_memory()
    gradients = torch.zeros(parameter_counts(config)[-1] if world > 1 else 0, device=device)
    for _ in range(args.rounds + 2):                                # without DDP: its all-reduce is timed by itself
        timed_step(network, optimizer, sets, null, iterations["syn"], args, device, parts)
        parts["all-reduce"].append(seconds(lambda: torch.distributed.all_reduce(gradients), device)
                                   if world > 1 else 0.0)
    times, parts = ({name: sorted(values[2:])[args.rounds // 2] for name, values in table.items()}
                    for table in (times, parts))
    return times, parts, peak


def print_measured(args, launched, times, parts, peak):
    """What `measure` found, beside the rate of a plain matrix product and beside the counted ratios."""
    device, _, world = launched
    n, images = 1024 if device.type == "cpu" else 8192, 4 * args.batch * world
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, args.dtype))
    matrix_rate = 2e-12 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(10))
    print(f"{args.preset} on {device} in {args.dtype}, {torch.get_num_threads()} CPU threads, {images} images a step; "
          f"{matrix_rate:.4g} TFLOP/s in a matrix product of size {n}")
    for name, domain, views, what in (("synthetic", "syn", 4, "attention over 4 views, control"),
                                      ("real", "real", 1, "no freezing")):
        rate = tera_operations(args, views) / times[domain]         # of one process
        print(f"{name + ' iteration':19} {images / times[domain]:8.1f} images/s {rate:9.4g} TFLOP/s, "
              f"{rate / matrix_rate:.1%} of that   ({what})")
    print("synthetic by part, ms: " + ", ".join(f"{part} {1000 * took:.1f}" for part, took in parts.items()))
    print(f"peak memory         {peak:8.3f} GiB ({'allocated' if device.type == 'cuda' else 'resident, with Python'})")
    print("blocks frozen, i    time / unfrozen   counted")
    rows = [(times[i] / times["real"], tera_operations(args, 1, i) / tera_operations(args, 1))
            for i in range(block_count(args.tau_B, PRESETS[args.preset].depth) + 1)]
    for i, (measured, counted) in enumerate(rows):
        print(f"{i:16d} {measured:17.3f} {counted:9.3f}")
    measured, counted = (sum(column) / len(rows) for column in zip(*rows))
    print(f"{'average':>16} {measured:17.3f} {counted:9.3f}")


def benchmark(args, launched):
    """Prints memory and operations of an iteration, counted; then speed and what freezing saves, measured."""
    device, rank, _ = launched
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {args.rounds}")
    if args.accumulate > 1:
        raise ValueError("--benchmark times whole batches: leave out --accumulate, or take a smaller --batch")
    timed = args.preset != "full" or device.type == "cuda"
    if rank == 0:
        print_counted(args)
        if not timed:
            print("to time preset full takes a GPU; toy and small are timed on a CPU as well")
    if timed:
        try:
            measured = measure(args, launched)
        except torch.OutOfMemoryError:
            raise ValueError(f"no memory left on {device}: use --grad_checkpointing, --dtype bfloat16 or a --batch "
                             f"below {args.batch}") from None
        if rank == 0:
            print_measured(args, launched, *measured)


def wait(device):
    """Waits for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device):
    """How long work() takes, device included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def step_seconds(args, device):
    """Seconds a training step and a forward pass take for each image, from a short trial of the base model."""
    config, images = PRESETS[args.preset], 16
    model = base_model(args, device)
    x = torch.randn(images, 1, config.channels, config.image_size, config.image_size, device=device)
    t, text = torch.zeros(images, dtype=torch.long, device=device), data.tokenize([""] * images).to(device)

    def third(work):                                                # the first two warm up
        return [seconds(work, device) for _ in range(3)][-1] / images
    with torch.no_grad():
        forward = third(lambda: model(x, t, text))
    return third(lambda: model(x, t, text).square().mean().backward()), forward


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
    for flag in ("joint", "shifters"):
        if getattr(args, flag) and not METHODS[args.method].stage1:
            parser.error(f"--{flag} says where stage 1 comes in, and --method {args.method} has none")
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
