"""The Domain Shifter (Sec. 4.1) and the two tables that say which domain each block runs in.

One shifter stands before each DiT block and adds one vector to all of its tokens:

    X~ = X + W_left W_right e_domain        W_left (d, r), W_right (r, d), e_domain in {e_syn, e_real} in R^d

Most of the time every block runs in the sample's own domain. There are two exceptions, each a function that returns
the (N_B, B) table of domains: `reassigned_domains` in training (Sec. 4.2) and `shifted_domains` in sampling (Sec. 4.3).
At the end stand the adapters of the baselines that Realiz3D is compared with.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn

from dit import load_strictly, load_tensors, read_config, require_config

SYN, REAL = 0, 1            # indices of e_syn and e_real


class DomainShifters(nn.Module):
    """All N_B shifters of a model, stacked: 580,608 parameters for PixArt-XL/2 at r = 8."""

    def __init__(self, config, rank=8):
        super().__init__()
        N_B, d = config.depth, config.width
        self.config, self.rank = config, rank
        # W_left = 0 makes the model with shifters the base model; as the others are not 0, W_left learns from step 1.
        self.domain_embeddings = nn.Parameter(torch.randn(N_B, 2, d))                       # e_syn, e_real: N(0, 1)
        self.W_right = nn.Parameter(torch.randn(N_B, rank, d) / d ** 0.5)                   # N(0, 1 / d)
        self.W_left = nn.Parameter(torch.zeros(N_B, d, rank))

    def forward(self, domains):
        """domains: (N_B, B) of SYN / REAL -> shift (N_B, B, d), what is added to X before each block.

        Numbers between (or a little outside) mix: e(s) = (1 - s) e_syn + s e_real.
        """
        e_syn, e_real = self.domain_embeddings.unsqueeze(2).unbind(1)                               # (N_B, 1, d)
        e_domain = torch.lerp(e_syn, e_real, domains[..., None].to(e_syn))                          # (N_B, B, d)
        low_rank = torch.einsum("nrd,nbd->nbr", self.W_right, e_domain)                     # (N_B, B, r)
        return torch.einsum("ndr,nbr->nbd", self.W_left, low_rank)                          # (N_B, B, d)


class ShiftedDiT(nn.Module):
    """A DiT and its Domain Shifters as one module, so that one forward (and one DDP wrapper) holds both.

    A baseline has an adapter from below in their place.
    """

    def __init__(self, dit, shifters=None, adapter=None):
        super().__init__()
        self.dit, self.shifters, self.adapter, self.domains = dit, shifters, adapter, None
        self.adapter_on = True
        if adapter is not None:
            adapter.attach(self)

    def forward(self, x, t, text, domains, **inputs):
        """As DiT.forward, with domains (N_B, B) in place of the shift; see `knows_domains`."""
        self.domains = domains                                      # read by DomainSwitcher
        shift = None if self.shifters is None else self.shifters(domains)
        return self.dit(x, t, text, shift=shift, **inputs)

    def knows_domains(self):
        """Whether the domain mode makes a difference."""
        return self.shifters is not None or isinstance(self.adapter, DomainSwitcher)

    @contextmanager
    def without_adapter(self):
        """with network.without_adapter(): samples as the methods do that remove their adapter after training."""
        self.adapter_on = False
        try:
            yield
        finally:
            self.adapter_on = True


def block_count(fraction, num_blocks):
    """tau_B, B_max as fractions of N_B -> how many blocks that is, rounded down: floor(0.4 * 28) = 11."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of the blocks must lie in [0, 1], not {fraction}")
    return int(fraction * num_blocks + 1e-9)                # 1e-9: 0.7 * 10 must give 7 in floating point


def uniform_domains(domain, num_blocks, batch, device=None):
    """Every block runs in the sample's own domain: (N_B, B) of SYN or REAL, or of a number between."""
    return torch.full((num_blocks, batch), domain, device=device)


def draw_frozen_blocks(generator, num_blocks, tau_B=0.4):
    """Layer-aware training (Sec. 4.2): i uniform in 0..floor(tau_B N_B), how many of the first blocks are frozen."""
    return int(torch.randint(block_count(tau_B, num_blocks) + 1, (), generator=generator))


def draw_reassigned_blocks(generator, num_blocks, p_B=0.1, tau_B=0.4):
    """Domain reassignment (Sec. 4.2): with probability p_B, j uniform in 0..floor(tau_B N_B); else 0."""
    reassign = torch.rand((), generator=generator) < p_B
    j = int(torch.randint(block_count(tau_B, num_blocks) + 1, (), generator=generator))
    return j if reassign else 0


def reassigned_domains(num_reassigned, num_blocks, batch, device=None):
    """A real training iteration with reassignment (Sec. 4.2): the first j blocks run with e_syn, the others e_real.

    num_reassigned: j, from `draw_reassigned_blocks`. Returns (N_B, B) of SYN / REAL.
    """
    domains = uniform_domains(REAL, num_blocks, batch, device)
    domains[:num_reassigned] = SYN
    return domains


def shifted_domains(t, num_blocks, B_max=0.3, t_max=950):
    """Shifted sampling (Sec. 4.3): real mode, but synthetic in the first floor(B_max N_B) blocks, and in every block
    at t >= t_max.

    t: (B,) timesteps. B_max: fraction of N_B, 0 = no layer shift. t_max: in [0, T], T = no time shift.
    Returns (N_B, B) of SYN / REAL.
    """
    domains = reassigned_domains(block_count(B_max, num_blocks), num_blocks, len(t), t.device)
    domains[:, t >= t_max] = SYN
    return domains


# ---------------------------------------------------------------------------------------------------------------------
# The baselines' adapters (Sec. 5). They hang on the network by hooks: dit.py knows none of them, and a network without
# its adapter is exactly what was trained around it.


class LowRank(nn.Module):
    """x (..., d) -> W_left W_right x, `outputs` times (..., outputs d): zero before training."""

    def __init__(self, width, rank, outputs=1):
        super().__init__()
        self.W_right = nn.Parameter(torch.randn(outputs, rank, width) / width ** 0.5)
        self.W_left = nn.Parameter(torch.zeros(outputs, width, rank))

    def forward(self, x):
        low_rank = torch.einsum("...d,nrd->...nr", x, self.W_right)
        return torch.einsum("...nr,ndr->...nd", low_rank, self.W_left).flatten(-2)


class LoRA(nn.Module):
    """Beside every attention projection W: W x + W_left W_right x (Hu et al. 2021; baselines 3 and 5)."""
    kind = "lora"
    OUTPUTS = {"attn.qkv": 3, "attn.proj": 1, "cross_attn.q": 1, "cross_attn.kv": 2, "cross_attn.proj": 1}

    def __init__(self, config, rank):
        super().__init__()
        self.layers = nn.ModuleList(LowRank(config.width, rank, outputs)
                                    for _ in range(config.depth) for outputs in self.OUTPUTS.values())

    def attach(self, network):
        def beside(low_rank):
            return lambda _, inputs, out: out + low_rank(inputs[0]) if network.adapter_on else out
        projections = [block.get_submodule(name) for block in network.dit.blocks for name in self.OUTPUTS]
        for projection, low_rank in zip(projections, self.layers):
            projection.register_forward_hook(beside(low_rank))


class LinearAdapters(nn.Module):
    """Before each block: X + W_left W_right X on every token (Still-Moving, Chefer et al. 2024; baselines 4 and 6)."""
    kind = "linear"

    def __init__(self, config, rank):
        super().__init__()
        self.layers = nn.ModuleList(LowRank(config.width, rank) for _ in range(config.depth))

    def attach(self, network):
        def before(low_rank):
            return lambda _, inputs: (inputs[0] + low_rank(inputs[0]), *inputs[1:]) if network.adapter_on else None
        for block, low_rank in zip(network.dit.blocks, self.layers):
            block.register_forward_pre_hook(before(low_rank))


class DomainSwitcher(nn.Module):
    """A vector per domain, added to the time embedding (Wonder3D, Long et al. 2024; baseline 7)."""
    kind = "switcher"

    def __init__(self, config, rank=None):
        super().__init__()
        self.domain_embeddings = nn.Parameter(torch.zeros(2, config.width))                 # syn, real

    def attach(self, network):
        def join(_, inputs, out):                                   # here all blocks run in one domain
            e_domain = torch.lerp(*self.domain_embeddings, network.domains[-1, :, None].to(self.domain_embeddings))
            return out + e_domain.to(out.dtype) if network.adapter_on else out
        network.dit.t_embedder.register_forward_hook(join)


ADAPTERS = {adapter.kind: adapter for adapter in (LoRA, LinearAdapters, DomainSwitcher)}


def adapter_rank(kind, config):
    """Rank where none is given: the paper's 8 for the shifters; for the baselines its 32, scaled to the width."""
    return round(32 * config.width / 1152) if kind in ("lora", "linear") else 8


def with_adapter(dit, kind, rank, seed=0):
    """ShiftedDiT with new shifters ("shifters"), a new adapter (a key of ADAPTERS), or neither (None)."""
    device = dit.positions.device
    torch.manual_seed(seed)
    if kind == "shifters":
        return ShiftedDiT(dit, DomainShifters(dit.config, rank).to(device))
    return ShiftedDiT(dit, adapter=ADAPTERS[kind](dit.config, rank).to(device) if kind else None)


def load_adapter(path, device="cpu", config=None):
    """The baseline's adapter in a checkpoint, or None where it has none. Raises as `load_shifters`."""
    found, weights, kind = load_part(path, "adapter", config)
    if not weights:
        return None
    if kind not in ADAPTERS:
        raise ValueError(f"{path} holds an adapter of unknown kind {kind!r}, must be one of {', '.join(ADAPTERS)}")
    rank = next((tensor.shape[1] for name, tensor in weights.items() if name.endswith("W_right")), 1)
    adapter = ADAPTERS[kind](found, rank)
    load_strictly(adapter, weights, path)
    return adapter.to(device)


def load_shifters(path, device="cpu", config=None):
    """Domain Shifters from a stage-1 checkpoint, or from a stage-2 one that holds them beside its model.

    Returns DomainShifters, or None where the checkpoint is of a model without any. Raises FileNotFoundError, or
    ValueError with one line: damaged, or of another configuration than `config`.
    """
    found, weights, _ = load_part(path, "shifters", config)
    if not weights:
        return None
    if "W_right" not in weights:
        raise ValueError(f"{path} does not fit the model: shifters.W_right is missing")
    shifters = DomainShifters(found, rank=weights["W_right"].shape[1])
    load_strictly(shifters, weights, path)
    return shifters.to(device)


def load_part(path, part, config=None):
    """A checkpoint's Config, what it holds of `part` ("shifters" or "adapter") in fp32, and the kind of its adapter."""
    tensors, metadata = load_tensors(path)
    found = read_config(path, metadata)
    if config is not None:
        require_config(path, found, config)
    weights = {name.removeprefix(f"{part}."): tensor.float() for name, tensor in tensors.items()
               if name.startswith(f"{part}.")}
    return found, weights, metadata.get("adapter_kind")
