"""domain_shifter.py: the shifter's formula, and the tables that say which block runs in which domain."""

from collections import Counter

import pytest
import torch
from conftest import TINY, random_inputs, random_model, trained_shifters

from dit import PRESETS, save_model
from domain_shifter import (
    REAL,
    SYN,
    DomainShifters,
    ShiftedDiT,
    block_count,
    draw_frozen_blocks,
    draw_reassigned_blocks,
    load_shifters,
    real_after,
    shifted_domains,
    uniform_domains,
)
from support.generators import seeded_generator


def test_full_has_580608_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in DomainShifters(PRESETS["full"]).parameters()) == 580_608


@torch.no_grad()
def test_shift_is_W_left_W_right_e():
    shifters, domains = trained_shifters(), torch.tensor([[SYN, REAL], [REAL, REAL], [SYN, SYN], [REAL, SYN]])
    shift = shifters(domains)
    for n in range(4):
        for b in range(2):
            e = shifters.domain_embeddings[n, domains[n, b]]
            assert torch.allclose(shift[n, b], shifters.W_left[n] @ shifters.W_right[n] @ e, atol=1e-5)


@torch.no_grad()
def test_numbers_between_the_domains_mix_their_shifts():
    """The dial: linear in s, and exactly the domains at its ends."""
    shifters = trained_shifters()
    n = len(shifters.W_left)

    def at(s):
        return shifters(uniform_domains(s, n, 2))

    assert torch.equal(at(0.0), at(SYN)) and torch.equal(at(1.0), at(REAL))
    for s in (-0.25, 0.3, 1.25):
        assert torch.allclose(at(s), (1 - s) * at(SYN) + s * at(REAL), atol=1e-5)


def test_untrained_shifters_leave_the_base_model_exactly():
    model, (x, t, text) = random_model(), random_inputs()
    network = ShiftedDiT(model, DomainShifters(TINY))
    for domain in (SYN, REAL):
        assert torch.equal(network(x, t, text, uniform_domains(domain, 4, 2)), model(x, t, text))


def test_gradient_reaches_W_left_at_once_and_then_the_domains_differ():
    network, (x, t, text) = ShiftedDiT(random_model(), DomainShifters(TINY)), random_inputs()
    network(x, t, text, uniform_domains(SYN, 4, 2)).square().mean().backward()
    assert (network.shifters.W_left.grad.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        network.shifters.W_left -= 0.1 * network.shifters.W_left.grad
        syn, real = (network(x, t, text, uniform_domains(domain, 4, 2)) for domain in (SYN, REAL))
    assert (syn - real).abs().max() > 1e-4


@torch.no_grad()
def test_the_shift_is_added_to_every_token_before_its_block():
    network, (x, t, text) = ShiftedDiT(random_model(), trained_shifters()), random_inputs()
    domains, before, after = uniform_domains(REAL, 4, 2), [], []
    for block in network.dit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        block.norm.register_forward_pre_hook(lambda _, inputs: after.append(inputs[0]))  # called twice a block
    network(x, t, text, domains)
    for tokens, shifted, shift in zip(before, after[::2], network.shifters(domains)):
        assert torch.allclose(shifted, tokens + shift[:, None], atol=1e-5)


@torch.no_grad()
def test_each_block_reads_its_own_row_and_each_sample_its_own_column():
    network, (x, t, text) = ShiftedDiT(random_model(), trained_shifters()), random_inputs()
    base = network(x, t, text, uniform_domains(REAL, 4, 2))
    for block in range(4):
        domains = uniform_domains(REAL, 4, 2)
        domains[block, 1] = SYN
        moved = (network(x, t, text, domains) - base).abs().amax((1, 2, 3, 4))
        assert moved[0] == 0 and moved[1] > 1e-5


def test_real_after_some_synthetic_blocks_by_hand():
    assert real_after(0, 4, 2).tolist() == [[1, 1]] * 4
    assert real_after(3, 4, 2).tolist() == [[0, 0]] * 3 + [[1, 1]]


def test_shifted_domains_by_hand():
    t = torch.tensor([999, 950, 949, 0])
    assert shifted_domains(t, 5, B_max=0.4, t_max=950).tolist() == [[0, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 3
    assert shifted_domains(t, 3, B_max=0, t_max=1000).tolist() == [[1, 1, 1, 1]] * 3  # plain real mode
    assert shifted_domains(t, 3, B_max=0, t_max=0).tolist() == [[0, 0, 0, 0]] * 3  # plain synthetic mode
    assert shifted_domains(t, 3, B_max=1, t_max=1000).tolist() == [[0, 0, 0, 0]] * 3


@pytest.mark.parametrize(
    "fraction, blocks, count",
    [(0.4, 28, 11), (0.3, 28, 8), (0.7, 10, 7), (0.3, 10, 3), (0, 10, 0), (1, 10, 10), (0.29, 100, 29)],
)
def test_fractions_of_the_blocks_round_down(fraction, blocks, count):
    assert block_count(fraction, blocks) == count


def test_a_fraction_outside_0_to_1_is_an_error():
    with pytest.raises(ValueError, match="1.5"):
        block_count(1.5, 10)


def test_draws_are_uniform_over_0_to_tau_B_and_independent():
    draws = [
        (draw_frozen_blocks(g, 10), draw_reassigned_blocks(g, 10))
        for g in (seeded_generator(3, 0, step) for step in range(5000))
    ]
    frozen, reassigned = Counter(i for i, _ in draws), Counter(j for _, j in draws)
    assert sorted(frozen) == [0, 1, 2, 3, 4]
    assert all(abs(count - 1000) < 150 for count in frozen.values())  # 5 deviations of a binomial
    assert sorted(reassigned) == [0, 1, 2, 3, 4]
    assert all(abs(reassigned[j] - 100) < 50 for j in (1, 2, 3, 4))  # p_B / 5 each
    both = Counter(i for i, j in draws if j > 0)
    assert len(both) == 5  # i is not tied to j


def test_shifters_travel_alone_or_with_their_model(tmp_path):
    shifters, path = trained_shifters(), str(tmp_path / "s.safetensors")
    for model in (None, random_model()):
        save_model(path, TINY, model, shifters)
        again = load_shifters(path, config=TINY)
        assert again.rank == 3 and torch.equal(again.W_left, shifters.W_left)
    save_model(path, TINY, random_model())
    assert load_shifters(path) is None
    with pytest.raises(ValueError, match="another configuration"):
        load_shifters(path, config=PRESETS["toy"])
