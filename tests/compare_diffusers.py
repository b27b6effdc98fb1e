"""Our DiT beside diffusers' PixArtTransformer2DModel on a CPU: equal weights, equal numbers, and the time of each.

    pip install diffusers; python tests/compare_diffusers.py            # on an idle machine
    python tests/compare_diffusers.py --cpu_time --threads 1            # on a busy one
    python tests/compare_diffusers.py --compile                         # our blocks compiled, as train_stage1.py does

Both take turns in one process: a training step (forward, epsilon loss, backward, clipping, AdamW) in fp32 and in bf16
autocast, and DDIM with guidance. The ratio is diffusers' time over ours. tests/test_diffusers.py checks the numbers.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F

try:
    from diffusers import DDIMScheduler, PixArtTransformer2DModel
except ImportError:
    sys.exit("error: this compares with diffusers: pip install diffusers")
from safetensors.torch import save_file

from dit import epsilon_loss, load_pixart
from domain_shifter import ShiftedDiT
from sample import ddim_sample, domain_mode, guided_noise

TOKENS, TEXT_DIM, GUIDANCE = 16, 64, 4.5


def make_models(depth=12, width=384, heads=6, size=32, seed=0):
    """diffusers' model with random weights, none of them zero, and ours with the same ones."""
    torch.manual_seed(seed)
    theirs = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        cross_attention_dim=width,
        num_layers=depth,
        sample_size=size,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        caption_channels=TEXT_DIM,
        use_additional_conditions=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_file(theirs.state_dict(), f"{folder}/pixart.safetensors")
        return theirs, load_pixart(f"{folder}/pixart.safetensors", heads, size)


def make_batch(batch, size=32):
    """x and noise (B, 4, H, W), t (B,), text (B, L, D) and its mask (B, L), 1 = a real token, of various lengths."""
    torch.manual_seed(1)
    x, noise = torch.randn(2, batch, 4, size, size)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (batch, 1))).long()
    return x, noise, torch.randint(1000, (batch,)), torch.randn(batch, TOKENS, TEXT_DIM), mask


def their_loss(model, x, noise, t, text, mask):
    eps = model(x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask, return_dict=False)[0][:, :4]
    return F.mse_loss(eps.float(), noise)


def our_loss(model, x, noise, t, text, mask):
    return epsilon_loss(model(x[:, None], t, text, mask), noise[:, None], t)[0]


def training_step(model, optimizer, loss_of, batch, autocast):
    """One step; returns the loss before it."""
    with autocast:
        loss = loss_of(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def their_sample(model, x, text, null_text, mask, num_steps):
    """The loop of diffusers' PixArtAlphaPipeline, with its DDIM."""
    scheduler = DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    both, mask = torch.cat([null_text.expand_as(text), text]), torch.cat([mask, mask])
    for t in scheduler.timesteps:
        noise = model(
            torch.cat([x, x]),
            encoder_hidden_states=both,
            encoder_attention_mask=mask,
            timestep=t.expand(len(both)),
            return_dict=False,
        )[0]
        without_text, with_text = noise.chunk(2)
        noise = (without_text + GUIDANCE * (with_text - without_text)).chunk(2, dim=1)[0]
        x = scheduler.step(noise, t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def our_sample(model, x, text, null_text, mask, num_steps):
    domains = domain_mode("real", model.config.depth)
    noise = guided_noise(ShiftedDiT(model), {"text": null_text}, domains, GUIDANCE, text=text, text_mask=mask)
    return ddim_sample(noise, x[:, None], num_steps)[:, 0]


def take_turns(title, theirs, ours, rounds, clock):
    """Times both, `rounds` times in turn after one round to warm up; returns what they returned in that first round."""
    first, times = None, []
    for _ in range(rounds + 1):
        start = clock()
        a = theirs()
        middle = clock()
        b = ours()
        first = first or (a, b)
        times.append((middle - start, clock() - middle))
    line = f"{title}:"
    for name, of in (("median", statistics.median), ("best", min)):
        a, b = (of(column) for column in zip(*times[1:]))
        line += f" {name} diffusers {a:.3f} s, ours {b:.3f} s, ratio {a / b:.2f};"
    print(line, end=" ", flush=True)
    return first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="training steps that are timed (sampling: a third)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--num_steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--batch", type=int, default=8, help="samples of a training step; sampling draws half as many")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--cpu_time", action="store_true", help="count CPU seconds, not those of the clock")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    batch = make_batch(args.batch)
    for name in ("fp32", "bf16"):
        theirs, ours = make_models()
        if args.compile:
            for block in ours.blocks:
                block.compile(dynamic=False)
        runs = [
            (model, torch.optim.AdamW(model.parameters(), lr=1e-4), loss_of)
            for model, loss_of in ((theirs, their_loss), (ours, our_loss))
        ]
        autocast = torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()
        steps = [lambda run=run: training_step(*run, batch, autocast) for run in runs]
        a, b = take_turns(f"training step, {name}", *steps, args.rounds, clock)
        print(f"loss {a:.6f} and {b:.6f}")
    theirs, ours = make_models()
    x, _, _, text, mask = (tensor[: args.batch // 2] for tensor in batch)
    inputs = x, text, torch.randn(1, TOKENS, TEXT_DIM), mask, args.num_steps
    samplers = [lambda: their_sample(theirs, *inputs), lambda: our_sample(ours, *inputs)]
    a, b = take_turns(f"{args.num_steps} steps of sampling, fp32", *samplers, (args.rounds + 2) // 3, clock)
    print(f"largest difference of a pixel {(a - b).abs().max() / a.std():.1e} (of an image of standard deviation 1)")


if __name__ == "__main__":
    main()
