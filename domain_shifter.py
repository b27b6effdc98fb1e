"""The Domain Shifter (Sec. 4.1) and the two tables that say which domain each block runs in.

One shifter stands before each DiT block and adds one vector to all of its tokens:

    X~ = X + W_left W_right e_domain        W_left (d, r), W_right (r, d), e_domain in {e_syn, e_real} in R^d

Most of the time every block runs in the sample's own domain. There are two exceptions, each a function that returns
the (N_B, B) table of domains: `reassigned_domains` in training (Sec. 4.2) and `shifted_domains` in sampling (Sec. 4.3).
"""
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
        """domains: (N_B, B) of SYN / REAL -> shift (N_B, B, d), what is added to X before each block."""
        N_B = len(self.W_left)
        e_domain = self.domain_embeddings[torch.arange(N_B, device=domains.device)[:, None], domains]   # (N_B, B, d)
        low_rank = torch.einsum("nrd,nbd->nbr", self.W_right, e_domain)                     # (N_B, B, r)
        return torch.einsum("ndr,nbr->nbd", self.W_left, low_rank)                          # (N_B, B, d)


class ShiftedDiT(nn.Module):
    """A DiT and its Domain Shifters as one module, so that one forward (and one DDP wrapper) holds both."""

    def __init__(self, dit, shifters=None):
        super().__init__()
        self.dit, self.shifters = dit, shifters

    def forward(self, x, t, text, domains, **inputs):
        """As DiT.forward, with domains (N_B, B) in place of the shift; without shifters the domains change nothing."""
        shift = None if self.shifters is None else self.shifters(domains)
        return self.dit(x, t, text, shift=shift, **inputs)


def block_count(fraction, num_blocks):
    """tau_B, B_max as fractions of N_B -> how many blocks that is, rounded down: floor(0.4 * 28) = 11."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of the blocks must lie in [0, 1], not {fraction}")
    return int(fraction * num_blocks + 1e-9)                # 1e-9: 0.7 * 10 must give 7 in floating point


def uniform_domains(domain, num_blocks, batch, device=None):
    """Every block runs in the sample's own domain: (N_B, B) of SYN or REAL."""
    return torch.full((num_blocks, batch), domain, dtype=torch.long, device=device)


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


def load_shifters(path, device="cpu", config=None):
    """Domain Shifters from a stage-1 checkpoint, or from a stage-2 one that holds them beside its model.

    Returns DomainShifters, or None where the checkpoint is of a model without any. Raises FileNotFoundError, or
    ValueError with one line: damaged, or of another configuration than `config`.
    """
    tensors, metadata = load_tensors(path)
    found = read_config(path, metadata)
    if config is not None:
        require_config(path, found, config)
    weights = {name.removeprefix("shifters."): tensor.float() for name, tensor in tensors.items()
               if name.startswith("shifters.")}
    if not weights:
        return None
    if "W_right" not in weights:
        raise ValueError(f"{path} does not fit the model: shifters.W_right is missing")
    shifters = DomainShifters(found, rank=weights["W_right"].shape[1])
    load_strictly(shifters, weights, path)
    return shifters.to(device)
