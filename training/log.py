"""The log of a training: log.jsonl, a line per domain every so many steps, and the picture of the loss."""
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from support.files import write_text
from support.launch import peak_memory
from support.pictures import save_plot


class Log:
    """Collects losses on the device without waiting for it; writes log.jsonl and the loss picture."""

    def __init__(self, out, args, launched, start):
        self.out, self.args, self.launched = out, args, launched
        self.path, self.pending, self.images, self.clock = f"{out}/log.jsonl", [], 0, time.time()
        self.lines = []
        if os.path.exists(self.path):       # lines after the state that training resumes from are written again
            with open(self.path, errors="replace") as file:
                self.lines = [line for line in map(parse_json, file) if line["step"] <= start]
        if launched.rank == 0:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, step, domain, loss, bins, images):
        """One step: its domain, loss (scalar) and loss by timestep bin, (2, LOSS_BINS) of sums and counts."""
        self.pending.append((step, domain, loss.detach(), bins))
        self.images += images * self.launched.world

    def flush(self, step, lr):
        """Writes one line per domain for the steps since the last flush; raises FloatingPointError at a bad loss."""
        losses = torch.stack([loss for _, _, loss, _ in self.pending]).float()
        domains = sorted({domain for _, domain, _, _ in self.pending})
        sums = torch.stack([sum(bins for _, domain, _, bins in self.pending if domain == name) for name in domains])
        if self.launched.world > 1:
            torch.distributed.all_reduce(losses)        # a sum: finite only if it is finite on every rank
            torch.distributed.all_reduce(sums)
        for (bad, domain, _, _), finite in zip(self.pending, losses.isfinite().tolist()):
            if not finite:
                raise FloatingPointError(f"{self.args.name}: the loss is not finite at step {bad + 1} ({domain} "
                                         f"iteration); the last good state stays in {self.out}")
        speed, memory = self.images / (time.time() - self.clock), peak_memory(self.launched.device)
        text = []
        for name, (total, count) in zip(domains, sums.tolist()):
            by_bin = [s / n if n else None for s, n in zip(total, count)]
            line = dict(step=step + 1, domain=name, loss=sum(total) / sum(count), loss_by_timestep=by_bin, lr=lr,
                        images_per_s=round(speed, 1), peak_memory_gib=round(memory, 2))
            self.lines.append(line)
            text.append(f"{name} {line['loss']:.4f}")
            if self.launched.rank == 0:
                self.append(line)
        self.pending, self.images, self.clock = [], 0, time.time()
        return f"loss {', '.join(text)}, {speed:.0f} images/s"

    def append(self, line):
        """Adds a line to log.jsonl."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}") from None

    def note_threads(self, step, threads):
        """Says and writes down that a step changed the number of threads, which changes how sums are rounded."""
        self.lines.append(dict(step=step + 1, threads=threads))
        self.append(self.lines[-1])
        tqdm.write(f"step {step + 1}: much slower than before, goes on with threads {threads}", file=sys.stderr)

    def finish(self):
        """Draws loss.png; returns {domain: mean loss over the last tenth of the steps}."""
        curves, tail = {}, {}
        for line in self.lines:
            if "domain" not in line:
                continue                    # a note
            curves.setdefault(line["domain"], []).append((line["step"], line["loss"]))
            if line["step"] > 0.9 * self.args.steps:
                tail.setdefault(line["domain"], []).append(line["loss"])
        if self.launched.rank == 0 and curves:
            save_plot(f"{self.out}/loss.png", curves, "step", "epsilon loss", log_y=True)
        return {name: sum(losses) / len(losses) for name, losses in sorted(tail.items())}


def parse_json(line):
    """A line of the log, or one after all steps in place of one that was cut off by a kill or is none."""
    try:
        value = json.loads(line)
        is_note = "domain" not in value
        is_loss = isinstance(value.get("domain"), str) and math.isfinite(value.get("loss"))
        if isinstance(value["step"], int) and value["step"] > 0 and (is_note or is_loss):
            return value
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    return dict(step=math.inf)
