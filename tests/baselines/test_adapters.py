"""The baselines' adapters: what each adds to the network, that it comes off exactly, its file."""

import pytest
import torch
from conftest import TINY, random_inputs, random_model

from baselines.adapters import ADAPTERS, LoRA, adapter_rank, load_adapter, new_network
from baselines.methods import METHODS
from dit import PRESETS, save_model
from domain_shifter import REAL, SYN, uniform_domains


@pytest.mark.parametrize(
    "kind, count",  # projections have 8 (d x r + r x d) a block: q, k, v, out of self- and cross-attention
    [("lora", 28 * 8 * 2 * 1152 * 32), ("linear", 28 * 2 * 1152 * 32), ("switcher", 2 * 1152)],
)
def test_full_adapters_have_the_counted_parameters(kind, count):
    config = PRESETS["full"]
    with torch.device("meta"):
        adapter = ADAPTERS[kind](config, adapter_rank(kind, config))
    assert sum(p.numel() for p in adapter.parameters()) == count


def test_methods_name_adapters_that_there_are_and_only_ones_of_stage_1_are_removed():
    assert {method.adapter for method in METHODS.values()} == {None, "shifters", *ADAPTERS}
    assert {name for name, method in METHODS.items() if not method.kept} == {"domain_adapter", "spatial_adapter"}
    assert all(method.stage1 and method.backbone for method in METHODS.values() if not method.kept)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_starts_as_the_base_learns_at_once_and_comes_off_exactly(kind):
    inputs, domains = random_inputs(), uniform_domains(REAL, 4, 2)
    base = random_model()(*inputs)
    network = new_network(random_model(), kind, rank=3)
    assert torch.equal(network(*inputs, domains), base)
    network(*inputs, domains).square().mean().backward()
    learns = [p for name, p in network.adapter.named_parameters() if not name.endswith("W_right")]
    assert all(p.grad.abs().max() > 0 for p in learns)
    with torch.no_grad():
        for p in network.adapter.parameters():
            torch.nn.init.normal_(p)
        moved = network(*inputs, domains)
        assert (moved - base).abs().max() > 1e-3
        with network.without_adapter():
            assert torch.equal(network(*inputs, domains), base)
        assert torch.equal(network(*inputs, domains), moved)
        other = network(*inputs, uniform_domains(SYN, 4, 2))
    assert torch.equal(other, moved) == (kind != "switcher") == (not network.knows_domains)


@torch.no_grad()
def test_lora_is_a_low_rank_change_of_each_projection_weight():
    inputs, domains = random_inputs(), uniform_domains(REAL, 4, 2)
    network, merged = new_network(random_model(), "lora", rank=3), random_model()
    layers = iter(network.adapter.layers)
    for block in merged.blocks:
        for name, outputs in LoRA.OUTPUTS.items():
            layer = next(layers)
            torch.nn.init.normal_(layer.W_left, std=0.1)
            assert len(layer.W_left) == outputs
            block.get_submodule(name).weight += (layer.W_left @ layer.W_right).flatten(0, 1)
    assert torch.allclose(network(*inputs, domains), merged(*inputs), atol=1e-5)


@torch.no_grad()
def test_linear_adapters_stand_before_each_block():
    inputs, domains = random_inputs(), uniform_domains(REAL, 4, 2)
    network, seen = new_network(random_model(), "linear", rank=3), {}
    first, layer = network.dit.blocks[0], network.adapter.layers[0]
    torch.nn.init.normal_(layer.W_left)
    first.norm.register_forward_pre_hook(lambda _, args: seen.setdefault("in", args[0]))
    network(*inputs, domains)
    tokens = network.dit.embed_tokens(inputs[0], None)
    assert torch.allclose(seen["in"], tokens + tokens @ (layer.W_left[0] @ layer.W_right[0]).T, atol=1e-5)


def test_adapters_are_kept_in_checkpoints(tmp_path):
    for kind in ADAPTERS:
        network, path = new_network(random_model(), kind, rank=3), str(tmp_path / kind)
        save_model(path, TINY, network.dit, adapter=network.adapter, adapter_kind=kind)
        again = load_adapter(path, config=TINY)
        assert type(again) is ADAPTERS[kind]
        for name, p in network.adapter.state_dict().items():
            assert torch.equal(p, again.state_dict()[name])
    save_model(path, TINY, random_model())
    assert load_adapter(path) is None
    with pytest.raises(ValueError, match="unknown kind 'x'"):
        save_model(path, TINY, adapter=network.adapter, adapter_kind="x")
        load_adapter(path)
