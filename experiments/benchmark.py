"""What an iteration of stage 2 costs, and what layer-aware freezing saves (Sec. 4.2): counted, then measured.

    python train_stage2.py --benchmark                                  # or python -m experiments.benchmark
    python train_stage2.py --benchmark --preset full --dtype bfloat16   # on a laptop: memory and operations, counted

What is timed is the training's own step, `training_step` in training/loop.py, on random data.
"""
import argparse
import time
from typing import NamedTuple

import torch

from dit import PRESETS, DiT
from domain_shifter import TAU_B, DomainShifters, ShiftedDiT, block_count
from support.launch import UsageError, finite, launch, peak_memory, run_cli, within
from support.speed import seconds_of, wait_for
from toy.world import TEXT_LENGTH, VOCAB
from training.batches import read_batch, with_noise
from training.flags import GRIDS_A_PART, fill_defaults, parse_training, refuse_unread, training_arguments
from training.loop import Iteration, in_training, training_step
from training.optimizers import make_optimizers

# ---------------------------------------------------------------------------------------------------------------------
# Counted


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
    L = TEXT_LENGTH if not config.latent else config.text_length
    return 2e-12 * args.batch * 4 / views * iteration_macs(config, views, frozen_blocks, L)


def print_counted(args):
    """Memory by part, without and with checkpointing, and operations of an iteration."""
    print(f"{args.preset}, {args.batch} grids of 4 views a step in {args.dtype}, counted")
    print(f"{'GiB':20}{'no checkpointing':>18}{'--grad_checkpointing':>24}")
    config = PRESETS[args.preset]
    kept = memory_bytes(config, args.batch, 4, args.dtype, checkpointing=False)
    recomputed = memory_bytes(config, args.batch, 4, args.dtype, checkpointing=True)
    for part in kept:
        print(f"{part:20}{kept[part] / 2 ** 30:18.3f}{recomputed[part] / 2 ** 30:24.3f}")
    print(f"{'sum':20}{sum(kept.values()) / 2 ** 30:18.3f}{sum(recomputed.values()) / 2 ** 30:24.3f}")
    if args.muon:
        print("(counted as if AdamW had all; Muon keeps one moment of the blocks' matrices, not two)")
    print(f"TFLOP an iteration: synthetic {tera_operations(args, 4):.4g}, real {tera_operations(args, 1):.4g} (no "
          "freezing, nothing recomputed)", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measured


class Bench(NamedTuple):
    """What the timed steps share."""
    network: ShiftedDiT
    optimizers: list
    sets: dict                          # {"syn": ..., "real": ...}, as `train` takes them
    null: dict                          # the empty caption


def random_sets(args):
    """Random sets in the types in which real ones are kept, and the empty caption, as from `training_sets`."""
    config, rows = PRESETS[args.preset], 2 * args.batch
    size = (config.image_size, config.image_size)

    def one_set(num, views):
        if not config.latent:
            return {"image": torch.randint(256, (num, views, config.channels, *size), dtype=torch.uint8),
                    "text": torch.randint(1, len(VOCAB), (num, TEXT_LENGTH))}
        return {"image": torch.randn(num, views, 2, config.channels, *size).half(),
                "text": torch.randn(num, config.text_length, config.text_dim).half(),
                "text_mask": torch.ones(num, config.text_length, dtype=torch.uint8)}
    syn, real = one_set(rows, 4), one_set(4 * rows, 1)
    syn["control"] = torch.randn(rows, 4, config.control_channels, *size).half()
    null = {key: value[:1] for key, value in real.items() if key != "image"}
    return {"syn": syn, "real": real}, null


def random_bench(args, launched):
    """A Bench of random weights and data; its steps do not move the weights."""
    config, device = PRESETS[args.preset], launched.device
    network = ShiftedDiT(DiT(config), DomainShifters(config, args.rank).requires_grad_(False)).to(device)
    params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(params, argparse.Namespace(lr=0.0, weight_decay=0.0, muon=args.muon), launched)
    sets, null = random_sets(args)
    return Bench(network, optimizers, sets, {key: value.to(device) for key, value in null.items()})


def time_step(model, bench, iteration, args, launched, parts=None):
    """Seconds of one step of a training, after its batch was read.

    model: bench.network, perhaps in DDP. parts: {name: [seconds]}, to which the time of each part is added; the device
    is waited for after each.
    """
    device = launched.device
    clock = [time.perf_counter()]

    def lap(part):
        if parts is not None:
            wait_for(device)
            clock.append(time.perf_counter())
            parts[part].append(clock[-1] - clock[-2])
    _, batch = read_batch(iteration, bench.sets, args, launched)
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    lap("data")
    wait_for(device)
    start = time.perf_counter()                 # `train` reads while the device computes: not part of the step
    batch = with_noise(batch, iteration, args.seed, 0, 0)
    training_step(model, bench.optimizers, batch, iteration, bench.null, args, lap)
    wait_for(device)
    return time.perf_counter() - start


def median_after_two(values):
    """The median of all but the first two, which warm up."""
    return sorted(values[2:])[(len(values) - 2) // 2]


def time_iterations(args, launched):
    """Times the synthetic, the unfrozen real and the real iteration at every i in turn, then the synthetic in parts.

    Returns medians of seconds, {"syn", "real", i: ...} and {part: ...}, and the peak memory in GiB.
    """
    device, _, world = launched
    config, alone = PRESETS[args.preset], launched._replace(rank=0, world=1)
    bench = random_bench(args, launched)
    model = in_training(bench.network, args, world)
    iterations = {"syn": Iteration("syn", 0, views=4, control=True), "real": Iteration("real", 0, grid=4)}
    for i in range(block_count(args.tau_B, config.depth) + 1):
        iterations[i] = Iteration("real", 0, grid=4, frozen_blocks=i)
    times = {name: [] for name in iterations}
    for _ in range(args.rounds + 2):
        for name, iteration in iterations.items():
            times[name].append(time_step(model, bench, iteration, args, alone))
    peak = peak_memory(device)
    parts = {part: [] for part in ("data", "forward", "backward", "all-reduce", "optimizer")}
    gradients = torch.zeros(parameter_counts(config)[-1] if world > 1 else 0, device=device)
    for _ in range(args.rounds + 2):            # without DDP: its all-reduce is timed by itself
        time_step(bench.network, bench, iterations["syn"], args, alone, parts)
        reducing = 0.0
        if world > 1:
            reducing = seconds_of(lambda: torch.distributed.all_reduce(gradients), device)
        parts["all-reduce"].append(reducing)
    return ({name: median_after_two(values) for name, values in times.items()},
            {name: median_after_two(values) for name, values in parts.items()}, peak)


def matrix_rate(n, dtype, device):
    """10^12 operations a second of a product of two n x n matrices, the best of ten."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2e-12 * n ** 3 / min(seconds_of(lambda: a @ b, device) for _ in range(10))


def print_measured(args, launched, times, parts, peak):
    """What `time_iterations` found, beside the rate of a plain matrix product and beside the counted ratios."""
    device, _, world = launched
    n, images = 1024 if device.type == "cpu" else 8192, 4 * args.batch * world
    best = matrix_rate(n, getattr(torch, args.dtype), device)
    print(f"{args.preset} on {device} in {args.dtype}, {torch.get_num_threads()} CPU threads, {images} images a step; "
          f"{best:.4g} TFLOP/s in a matrix product of size {n}")
    for name, domain, views, what in (("synthetic", "syn", 4, "attention over 4 views, control"),
                                      ("real", "real", 1, "no freezing")):
        rate = tera_operations(args, views) / times[domain]         # of one process
        print(f"{name + ' iteration':19} {images / times[domain]:8.1f} images/s {rate:9.4g} TFLOP/s, "
              f"{rate / best:.1%} of that   ({what})")
    print("synthetic by part, ms: " + ", ".join(f"{part} {1000 * took:.1f}" for part, took in parts.items()))
    print(f"peak memory         {peak:8.3f} GiB ({'allocated' if device.type == 'cuda' else 'resident, with Python'})")
    print("blocks frozen, i    time / unfrozen   counted")
    rows = []
    for i in range(block_count(args.tau_B, PRESETS[args.preset].depth) + 1):
        rows.append((times[i] / times["real"], tera_operations(args, 1, i) / tera_operations(args, 1)))
        print(f"{i:16d} {rows[-1][0]:17.3f} {rows[-1][1]:9.3f}")
    measured = sum(measured for measured, _ in rows) / len(rows)
    counted = sum(counted for _, counted in rows) / len(rows)
    print(f"{'average':>16} {measured:17.3f} {counted:9.3f}")


def benchmark(args, launched):
    """Prints memory and operations of an iteration, counted; then speed and what freezing saves, measured."""
    timed = args.preset != "full" or launched.device.type == "cuda"
    if launched.rank == 0:
        print_counted(args)
        if not timed:
            print("to time preset full takes a GPU; toy and small are timed on a CPU as well")
    if not timed:
        return
    try:
        times, parts, peak = time_iterations(args, launched)
    except torch.OutOfMemoryError:
        raise ValueError(f"no memory left on {launched.device}: use --grad_checkpointing, --dtype bfloat16 or a "
                         f"--batch below {args.batch}") from None
    if launched.rank == 0:
        print_measured(args, launched, times, parts, peak)


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser)
    parser.add_argument("--rounds", type=within(1, 10 ** 4), default=15, help="how often each kind is timed (default "
                        "%(default)s)")
    parser.add_argument("--tau_B", type=finite, default=TAU_B, help="how many of the first blocks are frozen at most, "
                        "as a share of N_B (default %(default)s)")
    parser.add_argument("--rank", type=int, help="r of the Domain Shifters (default 8)")
    parser.set_defaults(adapter="shifters", no_real_data=False, real_warmup=0)
    args = parse_training(parser, "-m experiments.benchmark", argv)
    read = {"preset", "batch", "dtype", "compile", "accumulate", "grad_checkpointing", "muon", "loss", "clip", "seed",
            "text_dropout", "threads", "rounds", "tau_B", "rank", "command"}
    refuse_unread(parser, args, sorted(vars(args).keys() - read), "in a benchmark, which keeps nothing")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.preset == "full" and args.batch is None:
        args.batch = GRIDS_A_PART                               # what a GPU computes at once
    args.accumulate = 1 if args.accumulate is None else args.accumulate
    launched = launch(args.threads)
    fill_defaults(args, "stage2", launched)
    args.dtype = args.dtype or ("bfloat16" if launched.device.type == "cuda" else "float32")
    if args.accumulate > 1:
        raise UsageError("--benchmark times whole batches: leave out --accumulate, or take a smaller --batch")
    benchmark(args, launched)


if __name__ == "__main__":
    run_cli(main)
