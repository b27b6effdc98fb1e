"""The diffusion transformer, its noise process and its file.

The network is PixArt-alpha's (Chen et al. 2023), the public text-to-image DiT (Peebles & Xie 2023) with the paper's
epsilon objective, so that its weights can be loaded. Realiz3D adds three inputs to it (Sec. 4, B.2). Until they are
trained, control and domain leave the base model exactly as it was; an image that is no part of a grid it draws as ever:

    control  extra input channels of the patch embedder, their weights start at zero    (texturing: normals, positions)
    views    attention over all views of a grid, each with a learned encoding that starts at random
    domain   a vector per block and sample, added to every token before the block       (domain_shifter.py, Sec. 4.1)

and a number, frozen_blocks: how many of the first blocks run without a graph (layer-aware training, Sec. 4.2). Blocks
are counted from 0: "the first 3" are blocks 0, 1 and 2.

Symbols: B batch, V views (1 = single-image mode, 4 = attention over all views), N tokens a view, L text tokens,
d width, N_B depth, T = 1000 diffusion steps, alpha_bar_t = alphas_cumprod[t].

    model = DiT(PRESETS["toy"])                          # or load_model("weights/toy_base.safetensors")
    eps = model(x, t, text)                              # x (B, V, C, H, W), t (B,), text (B, L) -> eps like x
"""
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.files import load_strictly, load_tensors, save_tensors
from support.speed import attend

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Config:
    """Everything that decides what the network is; stored in every checkpoint."""
    image_size: int         # height and width of one view, in pixels (toy, small) or VAE latents (full)
    patch_size: int         # side of a patch: (image_size / patch_size)^2 tokens a view
    channels: int           # channels of the image: 3 RGB, or 4 latent
    out_channels: int       # channels of the output; the first `channels` are epsilon (PixArt also learned a variance)
    control_channels: int   # normal and position map, concatenated along channels
    num_views: int          # V, how many view encodings there are
    depth: int              # N_B
    width: int              # d
    heads: int
    text_dim: int           # width of a text token as it comes in
    text_length: int        # most text tokens, L
    vocab_size: int         # 0: text comes as vectors (L, text_dim); else as ids, embedded here, id 0 = padding
    output_skip: bool       # eps = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) F(x_t) in place of eps = F(x_t)
    qk_norm: bool           # RMS-normalise queries and keys: keeps attention logits bounded in long fine-tuning
    pos_scale: float = 1.0  # positions are divided by this (2: a table trained at half the resolution)
    world: int = 0          # version of the toy world whose words the ids are (WORLD_VERSION of toy/world.py); 0: none

    @property
    def latent(self):
        """Whether images are VAE latents and text T5's vectors (full), not the toy world's pixels and words."""
        return self.vocab_size == 0


MAY_BE_ZERO = ("control_channels", "num_views", "vocab_size", "output_skip", "qk_norm", "world")    # there is none

PRESETS = {
    #                image patch  ch  out ctrl views depth width heads text_dim  L  vocab   skip  qk_norm
    "toy":    Config(   32,    4,  3,   3,   6,    4,   10,  192,    6,    192,  16,   64,  True,  True, world=2),
    "small":  Config(   64,    4,  3,   3,   6,    4,   12,  384,    6,    384,  16,   64,  True,  True, world=2),
    "full":   Config(   64,    2,  4,   8,   8,    4,   28, 1152,   16,   4096, 120,    0, False, False),
}

# ---------------------------------------------------------------------------------------------------------------------
# Noise process (paper: T = 1000, epsilon prediction; betas as in PixArt-alpha and DDPM, Ho et al. 2020)

T = 1000
alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), dim=0)       # (T,)
LOSS_BINS = 4               # the loss is also reported for t in [0, 250), [250, 500), [500, 750), [750, 1000)


@cache
def _signal_and_noise(device):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) in fp32 on `device`: (T,) each."""
    return alphas_cumprod.sqrt().float().to(device), (1 - alphas_cumprod).sqrt().float().to(device)


def add_noise(x0, noise, t):
    """Forward process, DDPM eq. 4: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise.

    x0, noise: (B, ...); t: (B,) integers in [0, T). Returns x_t like x0.
    """
    signal, sigma = _signal_and_noise(x0.device)
    per_sample = (-1, *[1] * (x0.dim() - 1))                                                        # (B, 1, 1, ..)
    return signal[t].view(per_sample) * x0 + sigma[t].view(per_sample) * noise


def epsilon_loss(prediction, noise, t, even=False):
    """Plain epsilon loss (Sec. 4), in fp32, and what it is made of.

    prediction, noise: (B, ...); t: (B,). even (--loss even, the default at toy and small): divide by alpha_bar_t, which
    makes it the loss on v (Salimans & Ho 2022) and lets every noise level weigh alike; the plain loss of a
    low-resolution image is all but blind to high noise, where shape is decided. Where the noise is too faint to see
    (variance below 1 / 50) it is weighed down, as in min-SNR (Hang et al. 2023): telling it from the image is most of
    the loss and none of the picture.
    Returns the mean (a scalar), and a detached (2, LOSS_BINS) of the sums and counts of the plain loss by timestep bin,
    over samples.
    """
    per_sample = (prediction.float() - noise.float()).square().flatten(1).mean(1)                   # (B,)
    bins = F.one_hot(t * LOSS_BINS // T, LOSS_BINS).float()                                         # (B, LOSS_BINS)
    parts = torch.stack([per_sample.detach() @ bins, bins.sum(0)])
    if even:
        alpha_bar = _signal_and_noise(t.device)[0][t].square()
        per_sample = per_sample / alpha_bar * (50 * (1 - alpha_bar)).clamp(max=1)
    return per_sample.mean(), parts


# ---------------------------------------------------------------------------------------------------------------------
# Network


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoidal embedding of t (B,) -> (B, dim) in fp32, cosines first."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs                                                             # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(width, size, scale=1.0, first_column=0):
    """Fixed 2D sin-cos positions of a size x size grid of tokens, rows first -> (size^2, width).

    The first half of the channels encodes the column, the second the row (as PixArt's table does).
    """
    position = torch.arange(size, dtype=torch.float64)
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    columns, rows = [place[:, None] / scale * omega for place in (position + first_column, position)]   # (size, w / 4)
    columns, rows = [torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (columns, rows)]      # (size, w / 2)
    return torch.cat([columns.repeat(size, 1), rows.repeat_interleave(size, 0)], dim=1)


def modulate(x, shift, scale):
    """adaLN: x (B, N, d) times 1 + scale (B, 1, d), plus shift (B, 1, d)."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to `context` where one is given (text; mask: True = attend)."""

    def __init__(self, width, heads, qk_norm, cross=False):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width) if cross else None
        self.kv = nn.Linear(width, 2 * width) if cross else None
        self.qkv = None if cross else nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x, context=None, mask=None):
        if context is None:
            q, k, v = self.qkv(x).chunk(3, -1)                                                      # (B, N, d) each
        else:
            q, (k, v) = self.q(x), self.kv(context).chunk(2, -1)                                    # k, v: (B, L, d)
        x = attend(self.q_norm(self.split_heads(q)), self.k_norm(self.split_heads(k)), self.split_heads(v), mask)
        return self.proj(x.transpose(1, 2).flatten(2))                                              # (B, N, d)

    def split_heads(self, x):
        """(B, N, d) -> (B, heads, N, d / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A DiT block as in PixArt-alpha, with the Domain Shifter's vector added in front (Sec. 4.1, Fig. 2)."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(d, config.heads, config.qk_norm)
        self.cross_attn = Attention(d, config.heads, config.qk_norm, cross=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / d ** 0.5)

    def forward(self, x, mod, text, text_mask, domain_shift):
        """x (B, V N, d) -> the same. domain_shift: W_left W_right e_domain (B, d), this block's row of what
        `DomainShifters.forward` gives, or None; blocks are counted from 0, so B_max = 0.3 of 28 means blocks 0..7.
        mod: adaLN-single's (B, 6, d)."""
        if domain_shift is not None:
            x = x + domain_shift[:, None]                                                           # Sec. 4.1: X~
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + mod).unsqueeze(2).unbind(1)
        x = x + gate1 * self.attn(modulate(self.norm(x), shift1, scale1))                           # over all V views
        x = x + self.cross_attn(x, text, text_mask)
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))                         # (B, V N, d)


NEW_INPUTS = ("control_embedder.weight", "view_encoding")       # what Realiz3D adds to the base model


class DiT(nn.Module):
    """Diffusion transformer: (x_t, t, text, control, domain shift) -> epsilon, of one view or of V together."""

    def __init__(self, config):
        super().__init__()
        c, d = config, config.width
        if c.image_size % c.patch_size:
            raise ValueError(f"patch_size {c.patch_size} must divide image_size {c.image_size}")
        if d % c.heads or d % 4:
            raise ValueError(f"heads {c.heads} and 4 must divide width {d}")
        self.config = config
        self.grad_checkpointing = False         # recompute each block in the backward pass: less memory, a third slower
        self.places = None                      # see `in_grid`
        self.x_embedder = nn.Conv2d(c.channels, d, c.patch_size, c.patch_size)
        # A convolution over [x, control] is the sum of one over each; kept apart, x's weights stay the base model's.
        self.control_embedder = nn.Conv2d(c.control_channels, d, c.patch_size, c.patch_size, bias=False) \
            if c.control_channels else None
        self.view_encoding = nn.Parameter(torch.zeros(c.num_views, d)) if c.num_views else None
        self.t_embedder = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_dim) if c.vocab_size else None
        self.token_position = nn.Parameter(torch.zeros(c.text_length, c.text_dim)) if c.vocab_size else None
        self.text_embedder = nn.Sequential(nn.Linear(c.text_dim, d), nn.GELU(approximate="tanh"), nn.Linear(d, d))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.final_norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.randn(2, d) / d ** 0.5)
        self.final_linear = nn.Linear(d, c.patch_size ** 2 * c.out_channels)
        table = position_embedding(d, c.image_size // c.patch_size, c.pos_scale).to(self.x_embedder.weight.dtype)
        self.register_buffer("positions", table, persistent=False)                                  # (N, d)
        self.register_buffer("null_text", None)     # (L, text_dim): the empty caption that came with PixArt's weights
        self.init_weights()

    def init_weights(self):
        """PixArt-alpha's initialisation; what differs from it comes last, each with its reason."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.flatten(1))
        for module in (self.t_embedder[0], self.t_embedder[2], self.t_block[1], self.text_embedder[0],
                       self.text_embedder[2]):
            nn.init.normal_(module.weight, std=0.02)
        if self.token_embedding is not None:
            nn.init.normal_(self.token_position, std=0.5)   # word order must be readable beside the N(0, 1) words
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)    # text enters gently
        nn.init.zeros_(self.final_linear.weight)            # the first prediction is zero, not noise
        if self.control_embedder is not None:
            nn.init.zeros_(self.control_embedder.weight)    # the base model stays as it is until control is trained
        if self.view_encoding is not None:                  # from zero it does not get far enough in a fine-tuning for
            nn.init.normal_(self.view_encoding, std=0.3,    # tokens to tell their own view from the others'
                            generator=torch.Generator().manual_seed(0))

    def check_inputs(self, x, text, control, domain_shift, frozen_blocks):
        """Raises ValueError, naming the first input whose shape does not fit."""
        c, (B, V) = self.config, x.shape[:2]
        image = (c.image_size, c.image_size)

        def check(name, tensor, shape):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")
        check("x", x, (B, V, c.channels, *image))
        check("control", control, (B, V, c.control_channels, *image))
        check("domain_shift", domain_shift, (c.depth, B, c.width))
        words = text.shape[1]
        check("text", text, (B, words, c.text_dim) if c.latent else (B, words))
        if words > c.text_length:
            raise ValueError(f"text has {words} tokens, the model takes {c.text_length}")
        if V > max(1, c.num_views):
            raise ValueError(f"x has {V} views, the model knows {c.num_views}")
        if not 0 <= frozen_blocks <= c.depth:
            raise ValueError(f"frozen_blocks must lie in 0..{c.depth}, not {frozen_blocks}")

    @contextmanager
    def in_grid(self, places):
        """with model.in_grid(places): single images have the view encodings of these places (B,) of a grid, although
        each attends to itself alone (real iterations, Sec. 4.2); None: they stand in no grid and have none."""
        self.places = places
        try:
            yield
        finally:
            self.places = None

    def embed_tokens(self, x, control):
        """Patches of all views in a row, each with its position in its view, and in a grid with its view's encoding:
        (B, V, C, H, W) -> (B, V N, d)."""
        B, V = x.shape[:2]
        h = self.x_embedder(x.flatten(0, 1))                                                        # (B V, d, n, n)
        if control is not None:
            h = h + self.control_embedder(control.flatten(0, 1).to(x.dtype))     # sets keep it in 16 bits
        h = h.flatten(2).transpose(1, 2) + self.positions                                           # (B V, N, d)
        h = h.view(B, V, *h.shape[1:])
        if V > 1:
            h = h + self.view_encoding[:V].expand(B, V, -1)[:, :, None]                             # Sec. 4
        elif self.places is not None:
            h = h + self.view_encoding[self.places][:, None, None]                                  # (B, 1, N, d)
        return h.flatten(1, 2)

    def embed_text(self, text, text_mask):
        """Ids (B, L) or vectors (B, L, text_dim) -> keys for cross-attention (B, L, d) and a mask, True = attend."""
        if self.config.vocab_size:
            text_mask = text != 0 if text_mask is None else text_mask
            text = self.token_embedding(text) + self.token_position[:text.shape[1]]
        if text_mask is not None:
            text_mask = text_mask.bool()[:, None, None]                                             # (B, 1, 1, L)
        return self.text_embedder(text.to(self.final_table.dtype)), text_mask

    def unpatchify(self, tokens, V):
        """(B, V N, p p out_channels) -> (B, V, out_channels, H, W)."""
        p, n = self.config.patch_size, self.config.image_size // self.config.patch_size
        x = tokens.view(len(tokens), V, n, n, p, p, -1)                                             # PixArt: (p, q, c)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def forward(self, x, t, text, text_mask=None, control=None, domain_shift=None, frozen_blocks=0):
        """Predicts the noise in x.

        x: (B, V, C, H, W) noisy views. V = 1 is single-image mode: attention inside the image, no view encoding unless
        `in_grid`; else attention runs over all V views, view v having encoding v.
        t: (B,) timesteps in [0, T). text: (B, L) ids or (B, L, text_dim) vectors; text_mask: (B, L), nonzero = a real
        token (None: ids other than 0, or every vector). control: (B, V, C_c, H, W) from data.control_maps, None =
        the empty control, zeros.
        domain_shift: (N_B, B, d) from `DomainShifters`, or None.
        frozen_blocks: i of layer-aware training (Sec. 4.2); for i > 0 `embed_tokens` and the first i blocks run
        without a graph, so they get no gradient and the backward pass ends at block i.
        Returns epsilon (B, V, C, H, W). Raises ValueError naming an input of the wrong shape.
        """
        self.check_inputs(x, text, control, domain_shift, frozen_blocks)
        B, V = x.shape[:2]
        dtype = self.final_table.dtype
        t = t.expand(B)
        t_emb = self.t_embedder(timestep_embedding(t).to(dtype))                                    # (B, d)
        mod = self.t_block(t_emb).view(B, 6, -1)                                                    # adaLN-single
        text, text_mask = self.embed_text(text, text_mask)
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and frozen_blocks == 0):
            h = self.embed_tokens(x, control)                                                       # (B, V N, d)
        for k, block in enumerate(self.blocks):
            with torch.set_grad_enabled(grad and k >= frozen_blocks):                               # Sec. 4.2
                inputs = h, mod, text, text_mask, None if domain_shift is None else domain_shift[k]
                recompute = self.grad_checkpointing and torch.is_grad_enabled()
                h = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        shift_out, scale_out = (self.final_table + t_emb[:, None]).unsqueeze(2).unbind(1)
        out = self.unpatchify(self.final_linear(modulate(self.final_norm(h), shift_out, scale_out)), V)
        return self.noise_in(x, t, out)

    def noise_in(self, x, t, out):
        """Epsilon (B, V, C, H, W) from what the last layer gives, (B, V, out_channels, H, W)."""
        out = out[:, :, :self.config.channels]                                                      # the epsilon half
        if self.config.output_skip:  # near t = T x0 = (x_t - sigma eps) / signal would amplify errors of a bare eps
            signal, sigma = _signal_and_noise(x.device)
            out = sigma[t.long()].view(-1, 1, 1, 1, 1) * x + signal[t.long()].view(-1, 1, 1, 1, 1) * out
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors, whose metadata hold the configuration (a model file alone rebuilds its model)


def save_model(path, config, model=None, shifters=None, adapter=None, dtype=None, **metadata):
    """Writes a model, its Domain Shifters or a baseline's adapter, or several, which `load_model`, `load_shifters` and
    `load_adapter` read back."""
    tensors = {} if model is None else dict(model.state_dict())
    for part, module in (("shifters", shifters), ("adapter", adapter)):
        if module is not None:
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
    save_tensors(path, tensors, config=asdict(config), **metadata)


def read_config(path, metadata):
    """The Config in a checkpoint's metadata. Raises ValueError if it has none or of another version."""
    stored = metadata.get("config")
    if not isinstance(stored, dict) or set(stored) != {field.name for field in fields(Config)}:
        raise ValueError(f"{path} is not a checkpoint of this project: its metadata hold no config of this version")
    for field in fields(Config):
        value = stored[field.name]
        if type(value) not in (field.type, int) or not 0 <= value <= 2 ** 13 \
                or value == 0 and field.name not in MAY_BE_ZERO:
            raise ValueError(f"{path} has a configuration that cannot be: {field.name} {value!r}")
    if stored["image_size"] > 256 * stored["patch_size"]:
        raise ValueError(f"{path} has a configuration that cannot be: more than 256 x 256 tokens")
    return Config(**stored)


def require_config(path, found, expected):
    """Raises ValueError, naming the fields in which the checkpoint's Config is not the expected one."""
    found, expected = asdict(found), asdict(expected)
    other = [f"{name} {found[name]} (expected {expected[name]})" for name in found if found[name] != expected[name]]
    if other:
        raise ValueError(f"{path} is a checkpoint of another configuration: {', '.join(other)}")


def load_model(path, device="cpu", config=None):
    """Rebuilds a model in fp32 from its file alone; with `config`, it must be of that configuration.

    Raises FileNotFoundError, or ValueError with one line: damaged, no model in it, or of another configuration.
    """
    tensors, metadata = load_tensors(path)
    found = read_config(path, metadata)
    if config is not None:
        require_config(path, found, config)
    weights = {name: tensor.float() for name, tensor in tensors.items()
               if not name.startswith(("shifters.", "adapter."))}
    if not weights:
        raise ValueError(f"{path} holds Domain Shifters only (or an adapter); a model is needed here")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != found.depth:
        raise ValueError(f"{path} does not fit the model: it holds {len(blocks)} blocks of {found.depth}")
    model = DiT(found)
    if "null_text" in weights:
        model.null_text = torch.empty(found.text_length, found.text_dim)
    load_strictly(model, weights, path)
    return model.to(device)
