"""Our DiT beside diffusers' PixArtTransformer2DModel on a CPU: equal weights, equal numbers, and the time of each.

    pip install diffusers; python tests/compare_diffusers.py            # on an idle machine
    python tests/compare_diffusers.py --cpu_time --threads 1            # on a busy one

Both take turns in one process: a training step (forward, epsilon loss, backward, clipping, AdamW) in fp32 and in bf16
autocast, without and with the blocks of both compiled, and 50 steps of DDIM with guidance. The ratio is diffusers' time
over ours; a loss is that before the first step. tests/full/test_diffusers.py checks the numbers of smaller models.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

try:
    from diffusers import DDIMScheduler, PixArtTransformer2DModel
except ImportError:
    sys.exit("error: this compares with diffusers: pip install diffusers")

from dit import epsilon_loss
from domain_shifter import ShiftedDiT
from full.pixart import load_pixart
from sample import ddim_sample, domain_mode, guided_noise

TOKENS, TEXT_DIM, GUIDANCE = 16, 64, 4.5


def make_models(depth=12, width=384, heads=6, size=32):
    """diffusers' model with random weights, none of them zero, and ours with the same ones."""
    torch.manual_seed(0)
    options = dict(num_layers=depth, sample_size=size, patch_size=2, in_channels=4, out_channels=8)
    options |= dict(num_attention_heads=heads, attention_head_dim=width // heads, cross_attention_dim=width)
    theirs = PixArtTransformer2DModel(**options, caption_channels=TEXT_DIM, use_additional_conditions=False)
    with tempfile.TemporaryDirectory() as folder:
        save_file(theirs.state_dict(), f"{folder}/pixart.safetensors")
        return theirs, load_pixart(f"{folder}/pixart.safetensors", heads, size)


def make_batch(batch=8, size=32):
    """x and noise (B, 4, H, W), t (B,), text (B, L, D) and its mask (B, L), 1 = a real token, of various lengths."""
    torch.manual_seed(1)
    x, noise = torch.randn(2, batch, 4, size, size)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (batch, 1))).long()
    return x, noise, torch.randint(1000, (batch,)), torch.randn(batch, TOKENS, TEXT_DIM), mask


def their_loss(model, x, noise, t, text, mask):
    eps = model(x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask).sample.chunk(2, dim=1)[0]
    return F.mse_loss(eps.float(), noise)


def our_loss(model, x, noise, t, text, mask):
    return epsilon_loss(model(x[:, None], t, text, mask), noise[:, None], t)[0]


def training_step(model, optimizer, loss_of, batch, autocast):
    with autocast:
        loss = loss_of(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def their_sample(model, x, text, null_text, mask, num_steps=50):
    """The loop of diffusers' PixArtAlphaPipeline, with diffusers' DDIM."""
    betas = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler = DDIMScheduler(1000, **betas, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    text, mask = torch.cat([null_text.expand_as(text), text]), torch.cat([mask, mask])
    for t in scheduler.timesteps:
        inputs = dict(encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t.expand(len(text)))
        without_text, with_text = model(torch.cat([x, x]), **inputs).sample.chunk(2)
        noise = (without_text + GUIDANCE * (with_text - without_text)).chunk(2, dim=1)[0]
        x = scheduler.step(noise, t, x).prev_sample
    return x


@torch.no_grad()
def our_sample(model, x, text, null_text, mask, num_steps=50):
    domains = domain_mode("real", model.config.depth)
    noise = guided_noise(ShiftedDiT(model), {"text": null_text}, domains, GUIDANCE, text=text, text_mask=mask)
    return ddim_sample(noise, x[:, None], num_steps)[:, 0]


def take_turns(title, theirs, ours, rounds, clock):
    """Times both in turn after a round to warm up; prints the times and returns what they returned in that round."""
    results, times = [], []
    for _ in range(rounds + 1):
        start, a, middle, b, end = clock(), theirs(), clock(), ours(), clock()
        results.append((a, b))
        times.append((middle - start, end - middle))
    print(title, end="")
    for name, of in (("median", statistics.median), ("best", min)):
        a, b = map(of, zip(*times[1:]))
        print(f", {name}: diffusers {a:.3f} s, ours {b:.3f} s, ratio {a / b:.2f}", end="")
    return results[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="training steps that are timed; images: a third as many")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="of the "
                        "training steps (default both; a CPU without instructions for bf16 is very slow in it)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what PyTorch takes)")
    parser.add_argument("--cpu_time", action="store_true", help="count CPU seconds, not those of the clock")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock, batch = time.process_time if args.cpu_time else time.perf_counter, make_batch()
    for name, how in itertools.product(args.dtypes, ("eager", "compiled")):
        models = make_models()
        if how == "compiled":
            for block in (*models[0].transformer_blocks, *models[1].blocks):
                block.compile()
        autocast = torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()
        turns = []
        for model, loss_of in zip(models, (their_loss, our_loss)):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            turns.append(partial(training_step, model, optimizer, loss_of, batch, autocast))
        a, b = take_turns(f"training step, {name}, {how}", *turns, args.rounds, clock)
        print(f"; loss {a:.6f} and {b:.6f}, difference {abs(a - b):.1e}", flush=True)
    (theirs, ours), (x, _, _, text, mask) = make_models(), make_batch(4)
    inputs = x, text, torch.randn(1, TOKENS, TEXT_DIM), mask
    turns = partial(their_sample, theirs, *inputs), partial(our_sample, ours, *inputs)
    a, b = take_turns("50 steps of sampling, fp32", *turns, max(1, args.rounds // 3), clock)
    print(f"; largest difference of a pixel {(a - b).abs().max() / a.std():.1e} standard deviations of the image")


if __name__ == "__main__":
    main()
