"""The diffusion models' one training loop, and the step in it (Sec. 4.1, 4.2, B.2).

A stage says which iterations come (its plan: a function of the step), what is trained (requires_grad) and on which
sets; everything else is here. Stage 2 alternates between two kinds of iteration, stage 1 knows only single images:

                        views                    control  blocks run in                 frozen
    stage 2, synthetic  4, attention over all    maps     e_syn                         shifters
    stage 2, real       1, each image by itself, empty    e_real, the first j in e_syn  shifters, the first i blocks
                        at a place of a grid
    stage 1             1, each image by itself  empty    e_syn or e_real               all but the shifters
"""
import math
import os
import platform
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import set_shape
from dit import T, add_noise, epsilon_loss, save_model
from domain_shifter import SYN, real_after, uniform_domains
from support.files import file_id
from support.launch import barrier
from support.speed import Watch, autocast, choose_threads, compile_blocks
from training.batches import read_ahead, read_batch, split_batch, with_noise
from training.log import Log
from training.optimizers import make_optimizers
from training.states import Trained, check_ranks, hold, load_state, made_from, save_state, training_settings

# ---------------------------------------------------------------------------------------------------------------------
# One iteration


@dataclass(frozen=True)
class Iteration:
    """What one training step does: a pure function of (seed, step), so that ranks and restarts agree."""
    domain: str                 # key of the data set: "syn" or "real" ("base": the toy's base model)
    visit: int                  # how many steps before this one used that set: where its data order stands
    views: int = 1              # V: 1 = single-image mode, attention inside each image
    grid: int = 0               # single images: how many places the grid has in which they stand in turn, 0 = no grid
    control: bool = False       # whether the maps are seen; if not, the empty control
    reassigned_blocks: int = 0  # j of domain reassignment: how many of the first blocks run with e_syn (Sec. 4.2)
    frozen_blocks: int = 0      # i of layer-aware training: how many of the first blocks are frozen (Sec. 4.2)
    frozen_last_blocks: int = 0 # how many of the last blocks are frozen: layer-selective training (A.2)
    control_dropout: float = 0.0    # how often the maps are lost (black pixels), never together with the caption
    timesteps: tuple = (0, T, 1)    # (first, last, draws): t is the least of so many draws from [first, last)
    opening: float | None = None        # RefAny3D's, which no other network has: how far the image sees its views

    @property
    def of_network(self):
        """What the network is given of it by name, where it is not the default."""
        given = dict(frozen_blocks=self.frozen_blocks or None, opening=self.opening)
        return {name: value for name, value in given.items() if value is not None}

    def domains(self, num_blocks, batch, device):
        """The domains in which the blocks run, (N_B, B) of SYN / REAL."""
        if self.domain == "syn":
            return uniform_domains(SYN, num_blocks, batch, device)
        return real_after(self.reassigned_blocks, num_blocks, batch, device)


def training_step(model, optimizers, batch, iteration, null, args, lap=lambda part: None):
    """One iteration of any stage: forward, loss, backward, step.

    No gradient reaches
    - what the stage froze for good (requires_grad is False);
    - the first i blocks and, for i > 0, the patch, control and view embedders below them: there the forward pass builds
      no graph (layer-aware training; time and text embedders and the final layer train);
    - what a single image does not use: the control embedder and, where it stands in no grid, the view encoding;
    - the last blocks of A.2: the gradient passes them on its way down, and what it leaves there is dropped.
    Such a gradient is None, not zero, so that AdamW leaves parameter, moments and step count as they are.

    model: ShiftedDiT, perhaps in DDP. batch: from `with_noise`. null: the empty caption, {"text": (1, L, ..), ..},
    which replaces the caption where u < text_dropout. lap(part): called after each part, for the benchmark's clock.
    Returns the loss (a scalar) and what it is made of, see `epsilon_loss`.
    """
    if batch["x0"].shape[1] != iteration.views:
        raise ValueError(f"a {iteration.domain} iteration of {iteration.views} view(s) got {batch['x0'].shape[1]}")
    parts, loss, bins = split_batch(batch, args.accumulate), 0, 0   # gradients add up to those of the whole batch
    for k, (share, part) in enumerate(parts):
        waits = isinstance(model, DistributedDataParallel) and k + 1 < len(parts)           # for the last part
        with model.no_sync() if waits else nullcontext():
            part_loss, part_bins = loss_of(model, part, iteration, null, args)
            lap("forward")
            (share * part_loss).backward()
        loss, bins = loss + share * part_loss.detach(), bins + part_bins
    blocks = getattr(model, "module", model).dit.blocks
    for block in blocks[len(blocks) - iteration.frozen_last_blocks:]:                       # A.2; else none
        block.zero_grad(set_to_none=True)
    lap("backward")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], args.clip)
    for optimizer in optimizers:
        with autocast(batch["x0"].device, args.dtype):              # Muon's matrix products
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    lap("optimizer")
    return loss, bins


def loss_of(model, batch, iteration, null, args):
    """Forward pass and loss of a batch or a part of one: a scalar, and what it is made of, see `epsilon_loss`."""
    dit, x0, t, noise = getattr(model, "module", model).dit, batch["x0"], batch["t"], batch["noise"]
    text = drop_text(batch, null, args.text_dropout)
    control = seen_control(batch, iteration)                                                # None: the empty control
    domains = iteration.domains(dit.config.depth, len(x0), x0.device)                       # (N_B, B)
    with autocast(x0.device, args.dtype), dit.in_grid(batch.get("places")):
        prediction = model(add_noise(x0, noise, t), t, domains=domains, control=control, **text, **iteration.of_network)
    return epsilon_loss(prediction, noise, t, even=args.loss == "even")     # autocast would round its sums


def seen_control(batch, iteration):
    """The maps of a batch, None where the iteration sees none; uint8 maps are black where u >= 1 - control_dropout."""
    if not iteration.control:
        return None
    if not iteration.control_dropout:
        return batch["control"]
    lost = batch["u"] >= 1 - iteration.control_dropout
    return batch["control"].masked_fill(lost.view(-1, *[1] * (batch["control"].dim() - 1)), 0)


def drop_text(batch, null, text_dropout):
    """The captions of a batch, {"text": (B, L, ..), perhaps "text_mask"}, the empty one where u < text_dropout."""
    text = {key: batch[key] for key in ("text", "text_mask") if key in batch}
    for key, empty in null.items():
        dropped = (batch["u"] < text_dropout).view(-1, *[1] * (text[key].dim() - 1))
        text[key] = torch.where(dropped, empty, text[key])
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(network, sets, null, plan, args, launched, preview=None):
    """Trains the parameters of `network` that require a gradient; resumes from the newest readable state.

    network: ShiftedDiT. sets: {domain: {"image": (N, V, C, H, W), "text": ..., ...} or LatentSet}. null: the empty
    caption, {"text": ...}. plan(step) -> Iteration. args: from a parser with `training_arguments`. preview(path): draws
    a picture of samples. States, log.jsonl and pictures go to OUT/NAME. Afterwards `network` holds the EMA weights.
    Returns the mean loss by domain over the last tenth of the steps. Raises FloatingPointError at a non-finite loss.
    """
    device, rank, world = launched
    out = f"{args.out}/{args.name}"
    check_sets(sets, args, world)
    lock = hold(out) if rank == 0 else None         # open until the end
    params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(params, args, launched)
    ema = {name: p.detach().clone() for name, p in params.items()} if args.ema else {}
    trained = Trained(params, ema, optimizers)
    made = made_from(network, sets)
    start = load_state(out, trained, args, world, made)
    check_ranks(start, out, world)
    if not start and os.path.exists(f"{out}.safetensors"):
        raise ValueError(f"{out}.safetensors is there, and no state of this training: use another --name, or delete it")
    describe(network, params, sets, plan, args, launched, start)
    model = in_training(network, args, world)
    null = {key: value.to(device) for key, value in null.items()}
    log, watch = Log(out, args, launched, start), Watch()
    threads_open = device.type == "cpu" and world == 1 and args.threads is None

    def read(step):
        iteration = plan(step)
        first, batch = read_batch(iteration, sets, args, launched)
        return step, iteration, first, batch
    batches = read_ahead(read, range(start, args.steps), args.workers)
    bar = tqdm(batches, initial=start, total=args.steps, desc=args.name, disable=rank > 0)
    with signals_caught() as stop:
        for step, iteration, first, batch in bar:
            last = step + 1 == args.steps
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            batch = with_noise(batch, iteration, args.seed, step, first)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args) * group["lr_scale"]
            began, images = time.perf_counter(), batch["x0"].shape[:2].numel()
            loss, bins = training_step(model, optimizers, batch, iteration, null, args)
            if threads_open and watch.calls(time.perf_counter() - began, images):
                change_threads(step, log)
            if ema:                                 # a short horizon at first, so that the start is forgotten
                newest = [params[name].detach() for name in ema]
                torch._foreach_lerp_(list(ema.values()), newest, 1 - min(args.ema, (step + 1) / (step + 10)))
            log.add(step, iteration.domain, loss, bins, images)
            # on GPUs ranks ask each other where they wait for each other anyway
            asking = device.type == "cpu" or world == 1 or (step + 1) % args.log_every == 0
            stopping = asking and agree(stop["now"], launched)
            saving = last or stopping or (step + 1) % args.save_every == 0
            if saving or (step + 1) % args.log_every == 0:      # first, as it raises at a loss that is not finite
                bar.set_postfix_str(log.flush(step, learning_rate(step, args)))
            if saving and rank == 0:
                save_state(out, step + 1, trained, args, world, made)
            if stopping:
                bar.close()
                if rank == 0:
                    print(f"{args.name}: stopped by a signal at step {step + 1}; the same command goes on from there")
                raise SystemExit(128 + stopping)
            if preview and rank == 0 and (step + 1) % args.sample_every == 0 and not last:
                with swapped(params, ema), torch.compiler.set_stance("force_eager"):  # not worth a compilation
                    preview(f"{out}/samples_{step + 1:07d}.png")
    for name, average in ema.items():
        params[name].data.copy_(average)
    if preview and rank == 0:
        with torch.compiler.set_stance("force_eager"):
            preview(f"{out}.png")
    del lock
    return log.finish()


def change_threads(step, log):
    """Takes the number of threads that is fastest now, and notes it where it is another one."""
    before, now = torch.get_num_threads(), choose_threads(torch.device("cpu"))
    torch.set_num_threads(now)
    if now != before:
        torch.compiler.reset()              # compiled code is for one number of threads
        log.note_threads(step, now)


def learning_rate(step, args):
    """A cosine from --lr to zero over all steps, times a linear warm-up."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def in_training(network, args, world):
    """The network with the flags --compile and --grad_checkpointing, in DDP where there are several processes."""
    if args.compile:
        # four compilations serve all blocks, domains and i: grids; single images with a graph, without, where it begins
        compile_blocks(getattr(network, "blocks", network.dit.blocks))
    network.dit.grad_checkpointing = args.grad_checkpointing
    if world == 1:
        return network
    # The blocks frozen in an iteration get no gradient: without find_unused_parameters the ranks drift apart there. To
    # run them with a graph and drop their gradients takes 8 to 10 % longer; an all-reduce by hand up to 3 % less on two
    # gloo ranks, but on GPUs it would not overlap with the backward pass. In stage 1 nothing is unused, and nowhere is
    # there a buffer that changes.
    backbone_trains = any(p.requires_grad for p in network.dit.parameters())
    return DistributedDataParallel(network, find_unused_parameters=backbone_trains, gradient_as_bucket_view=True,
                                   broadcast_buffers=False)


def check_sets(sets, args, world):
    """Refuses a set that is smaller than one step of all ranks."""
    for domain, dataset in sets.items():
        num, views = set_shape(dataset)
        count = args.batch * args.images_per_grid // views * world
        if count > num:
            raise ValueError(f"one step of {world} process(es) takes {count} samples, but the {domain} set has only "
                             f"{num}: use a smaller --batch or --nproc_per_node, or more data")


def count_visits(domain, plan, steps):
    """How many of the steps use a domain's set: the last one that does knows how many came before."""
    for step in reversed(range(steps)):
        iteration = plan(step)
        if iteration.domain == domain:
            return iteration.visit + 1
    return 0


def describe(network, params, sets, plan, args, launched, start):
    """Prints what follows from the settings before the first step."""
    if launched.rank > 0:
        return
    trained, total = sum(p.numel() for p in params.values()), sum(p.numel() for p in network.parameters())
    images = args.batch * args.images_per_grid
    seen = []
    for domain, dataset in sets.items():
        num, views = set_shape(dataset)
        epochs = count_visits(domain, plan, args.steps) * images * launched.world / (num * views)
        seen.append(f"{domain} set of {num} x {views} image(s), {epochs:.3g} epochs")
    print(f"{args.name}: trains {trained:,} of {total:,} parameters, {args.steps - start} of {args.steps} steps of "
          f"{images} images x {launched.world} process(es) = {images * launched.world}, on {launched.device} in "
          f"{args.dtype}; {', '.join(seen)}; into {args.out}/{args.name}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and looking


@contextmanager
def signals_caught():
    """with signals_caught() as stop: SIGTERM (a requeue, torchrun's stop) and Ctrl-C only set stop["now"] to their
    number, for the loop to save and exit."""
    stop = {"now": 0}

    def note(number, _):
        stop["now"] = number
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(number, launched):
    """The greatest number that any rank has, 0 = no signal; all ranks must call this at the same step."""
    if launched.world == 1:
        return number
    greatest = torch.tensor(number, device=launched.device)
    torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX)
    return int(greatest)


@contextmanager
def swapped(params, ema):
    """with swapped(params, ema): the parameters hold their running averages."""
    def swap():
        for name, average in ema.items():
            params[name].data, ema[name] = average, params[name].data
    swap()
    yield
    swap()


def save_trained(path, network, args, losses, launched, keep=("model", "shifters", "adapter"), base=None):
    """Writes the trained weights in 16 bits for use (the states keep 32), with how they were made; returns the path.

    keep: which parts of the network go into the file; base: path of the base model that they belong beside.
    """
    if launched.rank == 0:
        made = dict(name=args.name, command=args.command, loss=losses, torch=torch.__version__,
                    base=file_id(base) if base else None,
                    settings=training_settings(args) | {"batch": args.batch * launched.world},
                    machine=f"{platform.machine()}, {os.cpu_count()} cores, {launched.world} process(es) on "
                    f"{launched.device}")
        parts = {"model": network.dit, "shifters": network.shifters, "adapter": network.adapter}
        parts = {name: module for name, module in parts.items() if name in keep}
        if parts.get("adapter") is not None:
            made["adapter_kind"] = network.adapter.kind
        check_range(parts, args)
        save_model(path, network.dit.config, **parts, dtype=torch.float16, **made)
        print(f"{args.name}: done, loss {', '.join(f'{k} {v:.4f}' for k, v in losses.items())} -> {path}; "
              f"log and pictures: {args.out}/{args.name}*", flush=True)
    barrier(launched)
    return path


def check_range(parts, args):
    """Raises FloatingPointError where weights are not finite, or not in 16 bits, before a file is written."""
    for module in parts.values():
        for name, tensor in ({} if module is None else module.state_dict()).items():
            if not tensor.half().isfinite().all():
                raise FloatingPointError(f"{args.name}: {name} has grown beyond what 16 bits hold: use a smaller --lr")
