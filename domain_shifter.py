"""The Domain Shifter (Sec. 4.1), and which domain each block runs in (Sec. 4.1, 4.2, 4.3).

One shifter stands before each DiT block and adds one vector to all of its tokens:

    X~ = X + W_left W_right e_domain        W_left (d, r), W_right (r, d), e_domain in {e_syn, e_real} in R^d

Domains are a table (N_B, B), a row for each block, counted from 0, and a column for each sample. Most of the time every
block runs in the sample's own domain. In two cases blocks of real samples run in the synthetic one: the first j of them
by domain reassignment in training (Sec. 4.2), and by shifted sampling (Sec. 4.3) the first ones at every step and all
of them at the first steps. Numbers of blocks are counts: B_max = 0.3 of N_B = 28 means the first 8, blocks 0..7, and
tau_B = 0.4 at most the first 11, blocks 0..10.
"""
import torch
import torch.nn as nn

from dit import read_config, require_config
from support.files import load_strictly, load_tensors

SYN, REAL = 0, 1            # indices of e_syn and e_real
TAU_B, P_B = 0.4, 0.1       # the paper's: most blocks to freeze or reassign, probability of reassignment (Sec. 4.2)
B_MAX, T_MAX = 0.3, 950     # the paper's shift at sampling time (Sec. 4.3)


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
        """W_left W_right e_domain of every block: domains (N_B, B) of SYN / REAL -> shift (N_B, B, d).

        Row k is added where block k begins, to each of its tokens: in `Block.forward` (dit.py). Blocks are counted from
        0: B_max = 0.3 of 28 means that rows 0..7 are synthetic. Numbers between SYN and REAL (or a little outside) mix:
        e(s) = (1 - s) e_syn + s e_real.
        """
        e_syn, e_real = self.domain_embeddings.unsqueeze(2).unbind(1)                               # (N_B, 1, d)
        e_domain = torch.lerp(e_syn, e_real, domains[..., None].to(e_syn))                          # (N_B, B, d)
        low_rank = torch.einsum("nrd,nbd->nbr", self.W_right, e_domain)                     # (N_B, B, r)
        return torch.einsum("ndr,nbr->nbd", self.W_left, low_rank)                          # (N_B, B, d)


class ShiftedDiT(nn.Module):
    """A DiT and its Domain Shifters as one module, so that one forward (and one DDP wrapper) holds both.

    Without shifters it is the plain DiT; a baseline's adapter takes their place in baselines/adapters.py.
    """

    def __init__(self, dit, shifters=None):
        super().__init__()
        self.dit, self.shifters, self.adapter = dit, shifters, None

    def forward(self, x, t, text, domains, **inputs):
        """As `DiT.forward`, with domains (N_B, B) in place of the shift."""
        domain_shift = None if self.shifters is None else self.shifters(domains)                    # (N_B, B, d)
        return self.dit(x, t, text, domain_shift=domain_shift, **inputs)

    @property
    def knows_domains(self):
        """Whether the domain makes a difference."""
        return self.shifters is not None


# ---------------------------------------------------------------------------------------------------------------------
# Which domain each block runs in


def block_count(fraction, num_blocks):
    """tau_B, B_max as fractions of N_B -> how many of the first blocks that is, rounded down: floor(0.4 * 28) = 11."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of the blocks must lie in [0, 1], not {fraction}")
    return int(fraction * num_blocks + 1e-9)                # 1e-9: 0.7 * 10 must give 7 in floating point


def uniform_domains(domain, num_blocks, batch, device=None):
    """Every block runs in the sample's own domain: (N_B, B) of SYN or REAL, or of a number between."""
    return torch.full((num_blocks, batch), domain, device=device)


def draw_frozen_blocks(generator, num_blocks, tau_B=TAU_B):
    """Layer-aware training (Sec. 4.2): i uniform in 0..floor(tau_B N_B), how many of the first blocks are frozen."""
    return int(torch.randint(block_count(tau_B, num_blocks) + 1, (), generator=generator))


def draw_reassigned_blocks(generator, num_blocks, p_B=P_B, tau_B=TAU_B):
    """Domain reassignment (Sec. 4.2): with probability p_B, j uniform in 0..floor(tau_B N_B); else 0."""
    reassign = torch.rand((), generator=generator) < p_B
    j = int(torch.randint(block_count(tau_B, num_blocks) + 1, (), generator=generator))
    return j if reassign else 0


def real_after(first_blocks, num_blocks, batch, device=None):
    """Real samples whose first blocks run with e_syn, the others with e_real: (N_B, B) of SYN / REAL.

    first_blocks: how many. In training j, from `draw_reassigned_blocks` (domain reassignment, Sec. 4.2); in sampling
    floor(B_max N_B) (layer shift, Sec. 4.3).
    """
    domains = uniform_domains(REAL, num_blocks, batch, device)
    domains[:first_blocks] = SYN
    return domains


def shifted_domains(t, num_blocks, B_max=B_MAX, t_max=T_MAX):
    """Shifted sampling (Sec. 4.3): real mode, but synthetic in the first floor(B_max N_B) blocks, and in every block
    at t >= t_max.

    t: (B,) timesteps. B_max: fraction of N_B, 0 = no layer shift. t_max: in [0, T], T = no time shift; 950 is 3 of 50
    trailing steps.
    Returns (N_B, B) of SYN / REAL.
    """
    domains = real_after(block_count(B_max, num_blocks), num_blocks, len(t), t.device)
    domains[:, t >= t_max] = SYN
    return domains


# ---------------------------------------------------------------------------------------------------------------------
# Shifters from their file


def load_shifters(path, device="cpu", config=None):
    """Domain Shifters from a stage-1 checkpoint, or from a stage-2 one that holds them beside its model.

    Returns DomainShifters, or None where the checkpoint is of a model without any. Raises FileNotFoundError, or
    ValueError with one line: damaged, or of another configuration than `config`.
    """
    found, weights, _ = load_part(path, "shifters", config)
    if not weights:
        return None
    if "W_right" not in weights or weights["W_right"].dim() != 3:
        raise ValueError(f"{path} does not fit the model: it must hold shifters.W_right (N_B, r, d)")
    shifters = DomainShifters(found, rank=weights["W_right"].shape[1])
    load_strictly(shifters, weights, path)
    return shifters.to(device)


def load_part(path, part, config=None):
    """A checkpoint's Config, what it holds of `part` ("shifters" or "adapter") in fp32, and the kind of its adapter."""
    tensors, metadata = load_tensors(path, prefix=f"{part}.")
    found = read_config(path, metadata)
    if config is not None:
        require_config(path, found, config)
    weights = {name.removeprefix(f"{part}."): tensor.float() for name, tensor in tensors.items()}
    return found, weights, metadata.get("adapter_kind")
