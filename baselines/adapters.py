"""The baselines' adapters (Sec. 5): LoRA, linear adapters, the domain switcher.

They hang on the network by hooks: dit.py knows none of them, and a network without its adapter is exactly what was
trained around it. Domain and spatial adapters are removed for sampling (`kept` in methods.py): `run_stage2` saves their
model alone, and `without_adapter` switches them off for the pictures before that.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn

from domain_shifter import DomainShifters, ShiftedDiT, load_part, load_shifters
from support.files import load_strictly


class AdaptedDiT(ShiftedDiT):
    """A DiT with a baseline's adapter in the place of Domain Shifters."""

    def __init__(self, dit, adapter):
        super().__init__(dit)
        self.adapter, self.adapter_on, self.domains = adapter, True, None
        adapter.attach(self)

    def forward(self, x, t, text, domains, **inputs):
        """As `ShiftedDiT.forward`; the domains (N_B, B) are what `DomainSwitcher` reads."""
        self.domains = domains
        return super().forward(x, t, text, domains, **inputs)

    @property
    def knows_domains(self):
        """Whether the domain makes a difference."""
        return self.adapter.knows_domains

    @contextmanager
    def without_adapter(self):
        """with network.without_adapter(): samples as the methods do that remove their adapter after training."""
        self.adapter_on = False
        try:
            yield
        finally:
            self.adapter_on = True


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
    kind, knows_domains = "lora", False
    OUTPUTS = {"attn.qkv": 3, "attn.proj": 1, "cross_attn.q": 1, "cross_attn.kv": 2, "cross_attn.proj": 1}

    def __init__(self, config, rank):
        super().__init__()
        self.layers = nn.ModuleList(LowRank(config.width, rank, outputs)
                                    for _ in range(config.depth) for outputs in self.OUTPUTS.values())

    def attach(self, network):
        """Adds each low-rank map to what its projection in network.dit gives."""
        def beside(low_rank):
            def hook(_, inputs, out):
                return out + low_rank(inputs[0]) if network.adapter_on else out
            return hook
        projections = [block.get_submodule(name) for block in network.dit.blocks for name in self.OUTPUTS]
        for projection, low_rank in zip(projections, self.layers):
            projection.register_forward_hook(beside(low_rank))


class LinearAdapters(nn.Module):
    """Before each block: X + W_left W_right X on every token (Still-Moving, Chefer et al. 2024; baselines 4 and 6)."""
    kind, knows_domains = "linear", False

    def __init__(self, config, rank):
        super().__init__()
        self.layers = nn.ModuleList(LowRank(config.width, rank) for _ in range(config.depth))

    def attach(self, network):
        """Adds each low-rank map of the tokens to what its block in network.dit takes."""
        def before(low_rank):
            def hook(_, inputs):
                return (inputs[0] + low_rank(inputs[0]), *inputs[1:]) if network.adapter_on else None
            return hook
        for block, low_rank in zip(network.dit.blocks, self.layers):
            block.register_forward_pre_hook(before(low_rank))


class DomainSwitcher(nn.Module):
    """A vector per domain, added to the time embedding (Wonder3D, Long et al. 2024; baseline 7)."""
    kind, knows_domains = "switcher", True

    def __init__(self, config, rank=None):
        super().__init__()
        self.domain_embeddings = nn.Parameter(torch.zeros(2, config.width))                 # syn, real

    def attach(self, network):
        """Adds the domain's vector to what network.dit.t_embedder gives."""
        def hook(_, inputs, out):
            if not network.adapter_on:
                return out
            # one for all blocks, the last one's: shifted sampling shifts steps alone
            domain = network.domains[-1, :, None].to(self.domain_embeddings)                        # (B, 1)
            e_domain = torch.lerp(*self.domain_embeddings, domain)                                  # (B, d)
            return out + e_domain.to(out.dtype)
        network.dit.t_embedder.register_forward_hook(hook)


ADAPTERS = {adapter.kind: adapter for adapter in (LoRA, LinearAdapters, DomainSwitcher)}


def sees_both_domains(kind):
    """Whether what stage 1 fits alone, shifters or a key of ADAPTERS, is fitted to both domains or to renders alone."""
    return kind == "shifters" or ADAPTERS[kind].knows_domains


def adapter_rank(kind, config):
    """Rank where none is given: the paper's 8 for the shifters; for the baselines its 32, scaled to the width."""
    return round(32 * config.width / 1152) if kind in ("lora", "linear") else 8


def new_network(dit, kind, rank, seed=0):
    """The network with new shifters ("shifters"), a new adapter (a key of ADAPTERS), or neither (None)."""
    device = dit.positions.device
    torch.manual_seed(seed)
    if kind is None:
        return ShiftedDiT(dit)
    if kind == "shifters":
        return ShiftedDiT(dit, DomainShifters(dit.config, rank).to(device))
    return AdaptedDiT(dit, ADAPTERS[kind](dit.config, rank).to(device))


def load_beside(model, path):
    """ShiftedDiT of a model with what the checkpoint at path holds beside one: Domain Shifters, a baseline's adapter,
    or neither. Raises as `load_shifters`."""
    device = model.positions.device
    adapter = load_adapter(path, device, model.config)
    if adapter is not None:
        return AdaptedDiT(model, adapter)
    return ShiftedDiT(model, load_shifters(path, device, model.config))


def load_adapter(path, device="cpu", config=None):
    """The baseline's adapter in a checkpoint, or None where it has none. Raises as `load_shifters`."""
    found, weights, kind = load_part(path, "adapter", config)
    if not weights:
        return None
    if kind not in ADAPTERS:
        raise ValueError(f"{path} holds an adapter of unknown kind {kind!r}, must be one of {', '.join(ADAPTERS)}")
    ranks = [tensor.shape[1] for name, tensor in weights.items() if name.endswith("W_right") and tensor.dim() == 3]
    if kind != "switcher" and not ranks:
        raise ValueError(f"{path} does not fit the model: its adapter must hold matrices W_right of three dimensions")
    adapter = ADAPTERS[kind](found, ranks[0] if ranks else None)
    load_strictly(adapter, weights, path)
    return adapter.to(device)
