"""The training loop of the project, the base model of the toy world, and stage 1: the Domain Shifters (Sec. 4.1, B.1).

    python train_stage1.py --stage base                        # pretrain the toy base model (the repository ships one)
    python train_stage1.py                                     # stage 1 of the toy: CPU, MPS or one GPU
    torchrun --nproc_per_node=8 train_stage1.py --preset small # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_stage1.py \\
        --preset full --base pixart.safetensors --synthetic latents --real real

Stage 1 freezes the base model and fits one Domain Shifter per block to both domains: empty control, single-image
mode, epsilon loss (toy and small weigh it, see --loss). To resume any training, run the same command again.
"""
import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from glob import glob

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import sample
from dit import (PRESETS, DiT, T, add_noise, epsilon_loss, launch, load_base, load_tensors, run_cli,
                 save_model, save_tensors, seeded_generator)
from domain_shifter import (ADAPTERS, SYN, ShiftedDiT, adapter_rank, reassigned_domains, uniform_domains,
                            with_adapter)

ORDER, NOISE, DRAWS = 1, 2, 3           # first key of each family of generators, so that none repeats another's numbers

# Images are counted in grids of V = 4 views in stages 1 and 2 (a real grid: four single images), one by one at base.
#                            steps  batch  lr    warmup  weight decay  EMA
DEFAULTS = {
    ("toy", "base"):        (3000,    64, 1e-3,    200,         0.01, 0.998),
    ("toy", "stage1"):      ( 600,     4, 2e-3,     40,          0.0,   0.0),
    ("toy", "stage2"):      (1600,     4, 2e-4,     50,         0.01,  0.99),
    ("toy", "selective"):   ( 300,     4, 2e-4,     20,         0.01,  0.98),    # layer-selective training (A.2)
    ("small", "base"):      (100000, 256, 3e-4,   1000,         0.01, 0.9999),
    ("small", "stage1"):    (2000,    16, 5e-4,    100,          0.0,   0.0),
    ("small", "stage2"):    (20000,   16, 5e-5,    200,         0.01, 0.999),
    ("full", "stage1"):     (4700,     8, 5e-5,    100,          0.0,   0.0),    # 64 GPUs: 512 of 120K grids a step;
    ("full", "stage2"):     (4700,     8, 5e-5,    100,         0.01,   0.0),    # 10 epochs of each domain
}


@dataclass(frozen=True)
class Iteration:
    """What one training step does: a pure function of (seed, step), so that ranks and restarts agree."""
    domain: str                 # key of the data set: "base", "syn" or "real"
    visit: int                  # how many steps before this one used that set: where its data order stands
    reassigned_blocks: int = 0  # j of domain reassignment (Sec. 4.2)
    frozen_blocks: int = 0      # i of layer-aware training (Sec. 4.2)
    frozen_last_blocks: int = 0 # how many of the last blocks stay as they are: layer-selective training (A.2)
    timesteps: tuple = (0, T)   # t is drawn from [first, last): timestep-selective training (A.2)

    def domains(self, num_blocks, batch, device):
        """The (N_B, B) table of domains in which the blocks run."""
        if self.domain == "syn":
            return uniform_domains(SYN, num_blocks, batch, device)
        return reassigned_domains(self.reassigned_blocks, num_blocks, batch, device)                # Sec. 4.2


# ---------------------------------------------------------------------------------------------------------------------
# Data order and noise: pure functions of (seed, epoch, index) and (seed, step, sample)


def data_indices(num, first, count, *key):
    """Which samples stand at places first .. first + count - 1 of the endless shuffled order of a set of `num`."""
    places = torch.arange(first, first + count)
    orders = {epoch: torch.randperm(num, generator=seeded_generator(ORDER, *key, epoch))
              for epoch in (places // num).unique().tolist()}
    return torch.stack([orders[int(place) // num][place % num] for place in places])


def draw_noise(shape, seed, step, first, count, device, timesteps=(0, T)):
    """For `count` samples from number `first` of this step: t (B,) in [*timesteps), noise (B, *shape) and u (B,)
    uniform in [0, 1).

    Every sample has a generator of its own, so two ranks with half the batch draw what one rank draws with all of it.
    """
    draws = []
    for k in range(first, first + count):
        generator = seeded_generator(NOISE, seed, step, k, device=device)
        draws.append((torch.randint(*timesteps, (), generator=generator, device=device),
                      torch.randn(shape, generator=generator, device=device),
                      torch.rand((), generator=generator, device=device)))
    return [torch.stack(column) for column in zip(*draws)]


def denoising_loss(network, batch, iteration, null, seed, step, first, text_dropout, even=False):
    """The epsilon loss of one batch, for every stage and domain (Sec. 4).

    network: ShiftedDiT, perhaps in DDP. batch: "image", uint8 pixels (B, V, C, H, W) or mean and deviation of latents
    (B, V, 2, C, h, w), and "text", perhaps "text_mask", "control" and "view" (absent: empty). null: the empty caption,
    what text is replaced by with probability text_dropout. even and what is returned: see `epsilon_loss`.
    """
    inputs = dict(batch)
    image = inputs.pop("image")
    if image.dtype == torch.uint8:
        x0 = data.to_pixels(image)
        t, noise, u = draw_noise(x0.shape[1:], seed, step, first, len(x0), x0.device, iteration.timesteps)
    else:                                                           # the VAE gives a normal distribution of latents
        mean, deviation = image.float().unbind(2)
        t, both, u = draw_noise((2, *mean.shape[1:]), seed, step, first, len(mean), mean.device, iteration.timesteps)
        noise, z = both.unbind(1)
        x0 = data.LATENT_SCALE * (mean + deviation * z)
    for key in null:
        dropped = (u < text_dropout).view(-1, *[1] * (inputs[key].dim() - 1))
        inputs[key] = torch.where(dropped, null[key], inputs[key])
    config = getattr(network, "module", network).dit.config
    domains = iteration.domains(config.depth, len(x0), x0.device)
    prediction = network(add_noise(x0, noise, t), t, domains=domains, frozen_blocks=iteration.frozen_blocks, **inputs)
    return epsilon_loss(prediction, noise, t, even)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def train(network, sets, null, plan, args, out, launched, preview=None):
    """Trains the parameters of `network` that require a gradient; resumes from the newest readable state in `out`.

    network: ShiftedDiT. sets: {domain: {"image": (N, V, C, H, W), "text": ..., ...} or data.LatentSet}. null: the empty
    caption, {"text": ...}. plan(step) -> Iteration. args: from `parse_args`. out: folder for states, log.jsonl and
    pictures. launched: (device, rank, world). preview(path): draws a picture of samples. Afterwards `network` holds the
    EMA weights.
    Returns the mean loss by domain over the last tenth of the steps. Raises FloatingPointError at a non-finite loss.
    """
    device, rank, world = launched
    check_sets(sets, args, world)
    params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    in_backbone = {name: name.startswith("dit.") for name in params}
    groups = [dict(params=[p for name, p in params.items() if in_backbone[name] == which], lr_scale=scale)
              for which, scale in ((True, 1.0), (False, args.shifter_lr_scale))]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    ema = {name: p.detach().clone() for name, p in params.items()} if args.ema else {}
    start = load_state(out, params, ema, optimizer, args, world)
    check_ranks(start, out, world)
    describe(network, params, sets, args, out, launched, start)
    model = in_training(network, args, world)
    autocast = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()
    null = {key: value.to(device) for key, value in null.items()}
    log = Log(out, args, launched, start)
    stop = catch_signals()
    batches = prefetched(lambda step: read_batch(step, plan(step), sets, args, launched), range(start, args.steps),
                         args.workers)
    bar = tqdm(batches, initial=start, total=args.steps, desc=args.name, disable=rank > 0)
    for step, iteration, first, batch in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["lr_scale"]
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        parts, loss, bins = split(batch, args.accumulate), 0, 0     # gradients add up to those of the whole batch
        for k, (offset, share, part) in enumerate(parts):
            with model.no_sync() if world > 1 and k + 1 < len(parts) else nullcontext():
                with autocast:
                    part_loss, part_bins = denoising_loss(model, part, iteration, null, args.seed, step, first + offset,
                                                          args.text_dropout, even=args.loss == "even")
                (share * part_loss).backward()
            loss, bins = loss + share * part_loss.detach(), bins + part_bins
        for block in network.dit.blocks[len(network.dit.blocks) - iteration.frozen_last_blocks:]:   # mostly none
            block.zero_grad(set_to_none=True)
        torch.nn.utils.clip_grad_norm_(params.values(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)   # None, not zero: AdamW would move a frozen block on a zero gradient
        for name, average in ema.items():       # a short horizon at first, so that the start is forgotten
            average.lerp_(params[name].detach(), 1 - min(args.ema, (step + 1) / (step + 10)))
        log.add(step, iteration.domain, loss, bins, batch["image"].shape[:2].numel())
        last = step + 1 == args.steps
        stopping = (world == 1 or step % args.log_every == 0) and agree(stop["now"], launched)
        saving = last or stopping or (step + 1) % args.save_every == 0
        if saving or (step + 1) % args.log_every == 0:      # first: it stops at a loss that is not finite
            bar.set_postfix_str(log.flush(step, learning_rate(step, args)))
        if saving:
            save_state(out, step + 1, params, ema, optimizer, args, rank, world)
        if stopping and not last:
            bar.close()
            if rank == 0:
                print(f"{args.name}: stopped by a signal at step {step + 1}; the same command goes on from there")
            raise SystemExit(130 if stop["now"] == signal.SIGINT else 0)
        if preview and rank == 0 and (step + 1) % args.sample_every == 0 and not last:
            with swapped(params, ema), torch.compiler.set_stance("force_eager"):  # not worth a compilation
                preview(f"{out}/samples_{step + 1:07d}.png")
    for number, handler in stop["before"].items():
        signal.signal(number, handler)
    for name, average in ema.items():
        params[name].data.copy_(average)
    if preview and rank == 0:
        with torch.compiler.set_stance("force_eager"):
            preview(f"{out}.png")
    return log.finish()


def in_training(network, args, world):
    """The network with the flags --compile and --grad_checkpointing, in DDP where there are several processes."""
    if args.compile:            # four compilations serve all blocks, domains and i: grids, single images with a graph,
        for block in network.dit.blocks:            # without one, and where the graph begins
            block.compile(dynamic=False)
    network.dit.grad_checkpointing = args.grad_checkpointing
    # find_unused_parameters: the blocks frozen in an iteration get no gradient; without it the ranks drift apart. To
    # run them and set their gradients to None takes 8 to 10 % longer, and trains the embedders through them; an
    # all-reduce by hand takes up to 3 % less on two gloo ranks, but on GPUs would not overlap with the backward pass.
    # Where the backbone is frozen (stage 1) nothing is unused, and the buffers are constants.
    if world == 1:
        return network
    backbone_trains = any(p.requires_grad for p in network.dit.parameters())
    return DistributedDataParallel(network, find_unused_parameters=backbone_trains, gradient_as_bucket_view=True,
                                   broadcast_buffers=False)


def read_batch(step, iteration, sets, args, launched):
    """(step, iteration, number of its first sample within the step, this rank's samples of the set on the CPU)."""
    device, rank, world = launched
    num, views = data.set_shape(sets[iteration.domain])
    count = args.batch * args.images_per_sample // views
    index = data_indices(num, (iteration.visit * world + rank) * count, count, args.seed,
                         ("base", "syn", "real").index(iteration.domain))
    batch = data.rows(sets[iteration.domain], index)
    if device.type == "cuda":                   # from pinned memory the host need not wait for the copy
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return step, iteration, rank * count, batch


def prefetched(read, steps, workers):
    """read(step) for each of steps, in order; with workers, up to as many steps ahead of need, in as many threads."""
    if not workers:
        yield from map(read, steps)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for step in steps:
            ahead.append(pool.submit(read, step))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def split(batch, parts):
    """A batch in so many parts, or fewer where it is small: a list of (first sample, share of the batch, part)."""
    num = len(batch["image"])
    size = -(-num // parts)
    return [(k, min(size, num - k) / num, {key: value[k:k + size] for key, value in batch.items()})
            for k in range(0, num, size)]


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to zero at the last step."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def check_sets(sets, args, world):
    """Refuses a set that is smaller than one step of all ranks."""
    for domain, dataset in sets.items():
        num, views = data.set_shape(dataset)
        count = args.batch * args.images_per_sample // views * world
        if count > num:
            raise ValueError(f"one step of {world} process(es) takes {count} samples, but the {domain} set has only "
                             f"{num}: use a smaller --batch or --nproc_per_node, or more data")


def check_ranks(start, out, world):
    """Refuses processes that found different states: their gradients would be averaged over different steps."""
    starts = [start] * world
    if world > 1:
        torch.distributed.all_gather_object(starts, start)
    if len(set(starts)) > 1:
        raise ValueError(f"the processes would go on from different steps, {starts}: all nodes must see the same {out}")


def describe(network, params, sets, args, out, launched, start):
    """Prints what follows from the settings before the first step."""
    device, rank, world = launched
    trained, total = sum(p.numel() for p in params.values()), sum(p.numel() for p in network.parameters())
    images = args.batch * args.images_per_sample
    if rank == 0:
        print(f"{args.name}: trains {trained:,} of {total:,} parameters, {args.steps - start} of {args.steps} steps of "
              f"{images} images x {world} process(es) = {images * world}, on {device} in {args.dtype}; "
              + ", ".join("{} set of {} x {} image(s)".format(name, *data.set_shape(s)) for name, s in sets.items())
              + f"; into {out}",
              flush=True)


def catch_signals():
    """From now on SIGTERM (a requeue, torchrun's stop) and Ctrl-C only set ["now"] to their number; the loop then saves
    and exits. ["before"] is what they did until now."""
    stop = {"now": 0}
    stop["before"] = {number: signal.signal(number, lambda number, _: stop.update(now=number))
                      for number in (signal.SIGTERM, signal.SIGINT)}
    return stop


def agree(flag, launched):
    """Whether any rank raised the flag; all ranks must call this at the same step."""
    device, _, world = launched
    if world == 1:
        return flag
    flag = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag)


@contextmanager
def swapped(params, ema):
    """with swapped(params, ema): the parameters hold their running averages."""
    def swap():
        for name, average in ema.items():
            params[name].data, ema[name] = average, params[name].data
    swap()
    yield
    swap()


# ---------------------------------------------------------------------------------------------------------------------
# Training states: parameters that train, their averages and AdamW's moments. Noise and data order need no state.

NOT_SETTINGS = ("out", "log_every", "save_every", "sample_every", "picture_steps", "compile", "grad_checkpointing",
                "accumulate", "workers", "threads", "benchmark", "rounds", "layer_selective", "seeds", "num_prompts")


def settings(args):
    """The flags that decide the result of a training."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}


def save_state(out, step, params, ema, optimizer, args, rank, world):
    """Writes out/state_STEP.safetensors (rank 0), and keeps the one before it."""
    if rank > 0:
        return
    tensors = {f"param.{name}": p for name, p in params.items()} | {f"ema.{name}": p for name, p in ema.items()}
    for name, p in params.items():
        tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in optimizer.state[p].items()}
    save_tensors(f"{out}/state_{step:08d}.safetensors", tensors, step=step,
                 settings=settings(args) | {"processes": world})
    for old in sorted(glob(f"{out}/state_*.safetensors"))[:-2]:
        os.remove(old)


def load_state(out, params, ema, optimizer, args, world):
    """Restores the newest readable state in `out` and returns its step, 0 if there is none.

    Raises ValueError if that state was made with other settings, or by another number of processes, which see other
    data.
    """
    for path in sorted(glob(f"{out}/state_*.safetensors"), reverse=True):
        try:
            tensors, metadata = load_tensors(path)
        except ValueError as error:
            print(f"skipping a damaged state: {error}", file=sys.stderr)
            continue
        was, now = metadata["settings"], json.loads(json.dumps(settings(args) | {"processes": world}))
        other = [f"{key} {was.get(key)} (now {now.get(key)})" for key in sorted(was.keys() | now.keys())
                 if was.get(key) != now.get(key)]
        if other:
            raise ValueError(f"{path} was made with other settings: {', '.join(other)}; use another --out or --name, "
                             f"or delete {out}")
        for name, p in params.items():
            p.data.copy_(tensors[f"param.{name}"])
            if ema:
                ema[name].copy_(tensors[f"ema.{name}"])
            if f"step.{name}" in tensors:
                optimizer.state[p] = {key: tensors[f"{key}.{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
                step = tensors[f"step.{name}"]          # a fused optimizer counts on the device, the others on the CPU
                optimizer.state[p]["step"] = step.to(p.device) if optimizer.defaults["fused"] else step
        return metadata["step"]
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Log


class Log:
    """Collects losses on the device without waiting for it; writes log.jsonl and the loss picture."""

    def __init__(self, out, args, launched, start):
        self.out, self.args, (self.device, self.rank, self.world) = out, args, launched
        self.path, self.pending, self.images, self.clock = f"{out}/log.jsonl", [], 0, time.time()
        self.lines = []
        if os.path.exists(self.path):       # lines after the state that training resumes from are written again
            with open(self.path) as file:
                self.lines = [line for line in map(parse_json, file) if line and line["step"] <= start]
        if self.rank == 0:
            os.makedirs(out, exist_ok=True)
            with open(f"{self.path}.tmp", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
            os.replace(f"{self.path}.tmp", self.path)

    def add(self, step, domain, loss, bins, images):
        """One step: its domain, loss (scalar) and loss by timestep bin, (2, LOSS_BINS) of sums and counts."""
        self.pending.append((step, domain, loss.detach(), bins))
        self.images += images * self.world

    def flush(self, step, lr):
        """Writes one line per domain for the steps since the last flush; raises FloatingPointError at a bad loss."""
        losses = torch.stack([loss for _, _, loss, _ in self.pending]).float()
        domains = sorted({domain for _, domain, _, _ in self.pending})
        sums = torch.stack([sum(bins for _, domain, _, bins in self.pending if domain == name) for name in domains])
        if self.world > 1:
            torch.distributed.all_reduce(losses)        # a sum: finite only if it is finite on every rank
            torch.distributed.all_reduce(sums)
        for (bad, domain, _, _), finite in zip(self.pending, losses.isfinite().tolist()):
            if not finite:
                raise FloatingPointError(f"{self.args.name}: the loss is not finite at step {bad} ({domain} "
                                         f"iteration); the last good state stays in {self.out}")
        speed = self.images / (time.time() - self.clock)
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if self.device.type == "cuda" else peak_memory()
        text = []
        for name, (total, count) in zip(domains, sums.tolist()):
            by_bin = [s / n if n else None for s, n in zip(total, count)]
            line = dict(step=step + 1, domain=name, loss=sum(total) / sum(count), loss_by_timestep=by_bin, lr=lr,
                        images_per_s=round(speed, 1), peak_memory_gib=round(memory, 2))
            self.lines.append(line)
            text.append(f"{name} {line['loss']:.4f}")
            if self.rank == 0:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
        self.pending, self.images, self.clock = [], 0, time.time()
        return f"loss {', '.join(text)}, {speed:.0f} images/s"

    def finish(self):
        """Draws loss.png; returns {domain: mean loss over the last tenth of the steps}."""
        if self.rank == 0 and self.lines:
            curves = {}
            for line in self.lines:
                curves.setdefault(line["domain"], []).append((line["step"], line["loss"]))
            sample.save_plot(f"{self.out}/loss.png", curves, "step", "epsilon loss", log_y=True)
        tail = [line for line in self.lines if line["step"] > 0.9 * self.args.steps]
        return {name: sum(line["loss"] for line in tail if line["domain"] == name)
                / sum(line["domain"] == name for line in tail) for name in sorted({line["domain"] for line in tail})}


def parse_json(line):
    """The value of a line, None for one cut off by a kill."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def peak_memory():
    """Peak resident memory of this process in GiB."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def training_arguments(parser):
    """Adds the flags that every training takes; those of DEFAULTS are None until `fill_defaults`."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="toy", help="size of model and world (default toy)")
    add("--out", help="run folder (default runs/PRESET)")
    add("--name", help="name of this training below the run folder (default says what it is)")
    add("--base", help="base model: a checkpoint of ours, or PixArt-alpha's .pth or safetensors (default: the run "
                       "folder's, else the one shipped in weights/)")
    add("--synthetic", help="synthetic set; full: folder of data.py encode (toy, small: a safetensors file, default is "
        "to render it)")
    add("--real", help="real set; full: folder of sample.py --real_set (toy, small: a safetensors file, default is to "
        "let the base model draw it)")
    add("--num_assets", type=int, default=640, help="assets of the synthetic set the toy world renders")
    add("--real_steps", type=int, default=10, help="DDIM steps for the images of the real set")
    for flag, kind, text in (("steps", int, "training steps"), ("batch", int, "per process: grids of four views; base: "
                             "images"), ("lr", float, "learning rate after warm-up"), ("warmup", int, "steps of linear "
                             "warm-up"), ("weight_decay", float, "AdamW's"), ("ema", float, "decay of the weights' "
                             "running average, 0 = none")):
        add(f"--{flag}", type=kind, help=f"{text} (default by preset and stage)")
    add("--shifter_lr_scale", type=float, help="learning rate of shifters or an adapter as a share of --lr (default 1; "
        "with --joint width / 1152, so that beside a narrow backbone they learn as fast as beside the paper's)")
    add("--loss", choices=("epsilon", "even"), help="plain epsilon loss as in the paper (default at full), or "
        "divided by alpha_bar so that noise levels weigh alike (default at toy and small: few pixels)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--text_dropout", type=float, default=0.1, help="how often the caption is dropped, for guidance")
    add("--seed", type=int, default=0, help="decides initial weights, data order, noise and draws")
    add("--dtype", choices=("float32", "bfloat16"), help="autocast (default bfloat16 on CUDA, float32 elsewhere)")
    add("--compile", action="store_true", help="torch.compile each block")
    add("--accumulate", type=int, default=1, help="parts that a batch is computed in, one after the other: less "
        "memory, same result")
    add("--workers", type=int, help="threads that read batches ahead (default 2 on CUDA, 0 elsewhere)")
    add("--grad_checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--log_every", type=int, default=20, help="steps between lines of log.jsonl")
    add("--save_every", type=int, default=250, help="steps between states to resume from")
    add("--sample_every", type=int, default=500, help="steps between pictures of samples")
    add("--picture_steps", type=int, default=25, help="DDIM steps for those pictures")


def fill_defaults(args, stage, device):
    """Completes the flags from DEFAULTS and checks their ranges. Raises ValueError."""
    if (args.preset, stage) not in DEFAULTS:
        raise ValueError(f"preset {args.preset} has no {stage} training"
                         + (": its base model comes from a file (--base)" if stage == "base" else ""))
    for name, value in zip(("steps", "batch", "lr", "warmup", "weight_decay", "ema"), DEFAULTS[args.preset, stage]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{args.preset}"
    args.rank = adapter_rank(args.adapter, PRESETS[args.preset]) if args.rank is None else args.rank
    args.name = args.name or stage.replace("stage1", f"stage1{stage1_suffix(args.adapter, args.rank)}")
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.shifter_lr_scale is None:       # the wider, the faster matrices learn, but not vectors (Yang et al. 2022)
        args.shifter_lr_scale = PRESETS[args.preset].width / 1152 if getattr(args, "joint", False) else 1.0
    args.workers = (2 if device.type == "cuda" else 0) if args.workers is None else args.workers
    args.loss = args.loss or ("even" if PRESETS[args.preset].output_skip else "epsilon")
    args.images_per_sample = 1 if stage == "base" else 4
    for name, least in dict(steps=1, batch=1, rank=1, log_every=1, save_every=1, sample_every=1, picture_steps=1,
                            real_steps=1, num_assets=1, accumulate=1, workers=0, warmup=0, seed=0).items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    for name in ("ema", "text_dropout", "p_B", "tau_B"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise ValueError(f"--{name} must lie in [0, 1], not {getattr(args, name)}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The base model of the toy world


def train_base(args, launched):
    """Pretrains the text-to-image model on the toy world in all its styles -> OUT/base.safetensors.

    Not in the paper, which starts from a pretrained model: single-image mode, no control, no shifters.
    """
    device, rank, world = launched
    config, folder = PRESETS[args.preset], f"{args.out}/sets"
    base = on_rank_0_first(world, rank, lambda: data.base_set(args.num_base_images, size=config.image_size,
                                                              folder=folder, device=device))
    torch.manual_seed(args.seed)
    network = ShiftedDiT(load_base(args.base, device, config) if args.base else DiT(config).to(device))
    for p in (network.dit.control_embedder.weight, network.dit.view_encoding):
        p.requires_grad_(False)                                     # nothing to learn from: the base sees no control
    captions = [f"photo of a {c}, white background" for c in
                ("red wooden mug", "blue marble duck", "green brick house", "yellow striped chair")]
    captions += ["render of a red wooden mug, white background", "sketch of a purple metal car",
                 "cartoon of a green spotted snowman", "photo of a pink marble teapot, sunset background"]

    def preview(path):
        images = sample.sample_images(network, data.tokenize(captions).repeat_interleave(6, 0),
                                      num_steps=args.picture_steps)
        sample.save_picture(path, [(c, data.to_uint8(i)[:, 0]) for c, i in zip(captions, images.unflatten(0, (-1, 6)))])
    null = {"text": data.tokenize([""])}
    losses = train(network, {"base": base}, null, lambda step: Iteration("base", step), args, f"{args.out}/{args.name}",
                   launched, preview)
    return finish(f"{args.out}/base.safetensors", network, args, losses, launched)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1 (Sec. 4.1, B.1)


def train_shifters(args, launched):
    """Stage 1: the whole backbone frozen, the shifters learn both domains -> OUT/shifters.safetensors.

    Empty control and single-image mode: the four views of an asset, without their maps, are four images. A baseline's
    --adapter is fitted in the same way, LoRA and linear ones to renders alone -> OUT/ADAPTER_RANK.safetensors.
    """
    network = with_adapter(base_model(args, launched[0]).requires_grad_(False), args.adapter, args.rank, args.seed)
    synthetic, real = training_sets(args, launched, needs_real=network.knows_domains(), views=False)
    sets = {"syn": synthetic, "real": real} if network.knows_domains() else {"syn": synthetic}
    turns = list(sets)
    plan = lambda step: Iteration(turns[step % len(turns)], step // len(turns))
    losses = train(network, sets, null_caption(network.dit, synthetic), plan, args, f"{args.out}/{args.name}", launched,
                   domain_preview(network, args))
    return finish(stage1_file(args.out, args.adapter, args.rank), network, args, losses, launched, keep_model=False)


def stage1_file(out, adapter, rank):
    """Where stage 1 leaves its shifters, or a baseline's adapter."""
    return f"{out}/{stage1_suffix(adapter, rank).removeprefix('_') or 'shifters'}.safetensors"


def stage1_suffix(adapter, rank):
    """Tells stage 1 of anything but shifters of rank 8, the paper's, from that: "_lora_32"."""
    return "" if (adapter, rank) == ("shifters", 8) else f"_{adapter}_{rank}"


def domain_preview(network, args):
    """preview(path) for `train`: the same captions and noise in both domains, single-image mode; None for latents."""
    if not network.dit.config.vocab_size:
        return None
    text = data.tokenize(data.asset_captions(data.sample_assets(12, data.SEEDS["validation"])))

    def preview(path):
        images = {mode: sample.sample_images(network, text, mode, num_steps=args.picture_steps)
                  for mode in ("syn", "real")}
        sample.save_picture(path, [(mode, data.to_uint8(image)[:, 0]) for mode, image in images.items()])
    return preview


# ---------------------------------------------------------------------------------------------------------------------
# What stages 1 and 2 start from: the base model and the two sets


def base_path(args):
    """The base model: --base, else the run folder's, else the shipped one. Raises FileNotFoundError."""
    if args.base and not os.path.isfile(args.base):
        raise FileNotFoundError(f"no such file: {args.base} (--base)")
    return args.base or sample.default_base(args.preset, args.out)


def base_model(args, device):
    """The base model of the preset's configuration: `base_path`'s."""
    return load_base(base_path(args), device, PRESETS[args.preset])


def training_sets(args, launched, needs_real=True, views=True, control=False):
    """(synthetic, real): of --synthetic and --real, or of the toy world and the base model (C.1).

    needs_real: False leaves the real set undrawn, and None in its place. views: whether the synthetic set comes in
    grids of views that know their index, or as single images. control: whether with its maps.
    """
    device, rank, world = launched
    config, folder = PRESETS[args.preset], f"{args.out}/sets"
    if not config.vocab_size:
        if not args.synthetic or needs_real and not args.real:
            raise FileNotFoundError(f"preset {args.preset} needs --synthetic DIR, from python data.py encode, and "
                                    "--real DIR, from python sample.py --real_set")
        synthetic = data.LatentSet(args.synthetic, config, views, control)
        real = data.LatentSet(args.real, config, views=False) if needs_real else synthetic
        if real.key["text_encoder"] != synthetic.key["text_encoder"]:
            raise ValueError(f"{args.real} has text of the encoder {real.key['text_encoder']}, {args.synthetic} of "
                             f"{synthetic.key['text_encoder']}")
        return synthetic, real if needs_real else None
    if args.synthetic:
        synthetic = read_set(args.synthetic)
    else:
        synthetic = on_rank_0_first(world, rank, lambda: data.synthetic_set(args.num_assets, size=config.image_size,
                                                                            folder=folder, device=device))
    if control and "control" not in synthetic:
        raise ValueError("task texturing needs control maps, but the synthetic set has none: use --task text")
    if views:
        synthetic["view"] = torch.arange(4).expand(len(synthetic["image"]), 4)
    else:
        synthetic = {"image": synthetic["image"].flatten(0, 1)[:, None],                            # (4 N, 1, C, H, W)
                     "text": synthetic["text"].repeat_interleave(4, 0)}
    if not control:
        synthetic.pop("control", None)
    path = args.real
    if needs_real and not path:
        path = f"{folder}/real_{args.num_assets}.safetensors"
        sample.write_real_set(path, base_path(args), args.num_assets, num_steps=args.real_steps, launched=launched)
    return synthetic, read_set(path) if needs_real else None


def read_set(path):
    """{"image": ..., "text": ...} of a file of images of the toy world. Raises ValueError if it holds no such set."""
    tensors, _ = load_tensors(path)
    if not {"image", "text"} <= tensors.keys():
        raise ValueError(f"{path} is no set of images: it holds no 'image' and 'text'")
    return tensors


def null_caption(dit, dataset):
    """What drops the text for guidance: no words; of vectors PixArt's own, under the caption's mask as PixArt has it,
    else the text encoder's for an empty caption."""
    if dit.config.vocab_size:
        return {"text": data.tokenize([""])}
    return dataset.null if dit.null_text is None else {"text": dit.null_text[None]}


def on_rank_0_first(world, rank, make):
    """make() on rank 0, which writes the cached file, then on the others, which read it."""
    made = make() if rank == 0 else None
    if world > 1:
        torch.distributed.barrier()
    return made if rank == 0 else make()


def finish(path, network, args, losses, launched, keep_model=True, keep_adapter=True):
    """Writes the trained weights in 16 bits for use (the states keep 32), with how they were made; returns the path."""
    if launched[1] == 0:
        made = dict(name=args.name, command=" ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                    loss=losses, torch=torch.__version__, settings=settings(args), machine=f"{platform.machine()}, "
                    f"{os.cpu_count()} cores, {launched[2]} process(es) on {launched[0]}")
        model, adapter = network.dit if keep_model else None, network.adapter if keep_adapter else None
        made |= {"adapter_kind": adapter.kind} if adapter is not None else {}
        save_model(path, network.dit.config, model, network.shifters, adapter, dtype=torch.float16, **made)
        print(f"{args.name}: done, loss {', '.join(f'{k} {v:.4f}' for k, v in losses.items())} -> {path}; "
              f"log and pictures: {args.out}/{args.name}*", flush=True)
    if launched[2] > 1:
        torch.distributed.barrier()
    return path


def parse_args(argv=None):
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("base", "stage1"), default="stage1", help="what to train (default stage1)")
    parser.add_argument("--adapter", choices=("shifters", *ADAPTERS), default="shifters", help="what stage 1 trains: "
                        "Domain Shifters, or a baseline's adapter")
    parser.add_argument("--rank", type=int, help="r of the Domain Shifters (default 8) or the adapter (32 at full)")
    parser.add_argument("--num_base_images", type=int, default=48000, help="images of the base model's world")
    training_arguments(parser)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    launched = launch(args.threads)
    fill_defaults(args, args.stage, launched[0])
    (train_base if args.stage == "base" else train_shifters)(args, launched)


if __name__ == "__main__":
    run_cli(main)
