"""RefAny3D: who attends to whom, whose tokens the LoRAs touch, positions and timesteps of the branches, against
hand-written cases; and a training as a whole."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY, random_model, refuses, run_main

from dit import PRESETS, save_model, timestep_embedding
from domain_shifter import REAL, SYN, DomainShifters, ShiftedDiT, uniform_domains
from related import refany3d, view_prior
from related.refany3d import RefAny3D, References, TwoLoRAs, branch_positions, branches, draw, load_refany3d
from sample import Sampling
from support.files import file_id, load_tensors
from toy import pretrain
from training.loop import Iteration, seen_control

VIEWS = References(num_references=3, rank=2)


def network(config=VIEWS, depth=2, seed=0):
    """RefAny3D on a random model, everything that starts at zero made random."""
    made = RefAny3D(random_model(replace(TINY, depth=depth), seed, torch.float64), config)
    for p in made.adapter.double().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def inputs(batch=2, kinds=2, views=3):
    torch.manual_seed(3)
    x, control = torch.randn(batch, kinds, 3, 8, 8).double(), torch.rand(batch, kinds, views, 3, 8, 8).double() * 2 - 1
    return x, torch.tensor([7, 903])[:batch], torch.randint(2, 50, (batch, 14)), control


def test_before_training_the_image_is_the_base_models():
    base = random_model()
    made = RefAny3D(base, VIEWS)
    x, t, text, control = (z.float() if z.is_floating_point() else z for z in inputs())
    assert torch.allclose(made(x, t, text, control, opening=0.0)[:, :1], base(x[:, :1], t, text), atol=1e-5)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {
        f"adapter.{name}" for name, _ in made.adapter.named_parameters()}
    for opening, least in ((0.1, 1e-3), (1.0, 1e-2)):                           # then it sees the asset
        moved = made(x, t, text, control, opening=opening)[:, :1] - base(x[:, :1], t, text)
        assert moved.abs().max() > least


def test_realiz3ds_shifters_move_the_images_tokens_alone():
    """Before training the image is Realiz3D's in either domain; the tokens of maps and views stay as they are."""
    base = random_model()
    shifters = DomainShifters(TINY)
    torch.nn.init.normal_(shifters.W_left)
    made, x_t_text_control = RefAny3D(base, VIEWS, shifters=shifters), inputs()
    x, t, text, control = (z.float() if z.is_floating_point() else z for z in x_t_text_control)
    images, taken = [], []
    made.blocks[0].register_forward_pre_hook(lambda module, given: taken.append(given[1]))
    for domain in (SYN, REAL):
        domains = uniform_domains(domain, TINY.depth, 2)
        images.append(made(x, t, text, control, domains=domains, opening=0.0)[:, :1])
        assert torch.allclose(images[-1], ShiftedDiT(base, shifters)(x[:, :1], t, text, domains), atol=1e-5)
    moved = (taken[1] - taken[0]).abs().amax(dim=(0, 3, 4))                     # (G, K)
    assert moved[0, 0] > 1e-2 and (images[1] - images[0]).abs().max() > 1e-3
    moved[0, 0] = 0
    assert moved.max() == 0 and made.knows_domains and not RefAny3D(base, VIEWS).knows_domains
    assert not any(p.requires_grad for p in made.shifters.parameters())


def test_each_branch_attends_to_what_the_table_says():
    """Against softmax over a hand-written mask of all pairs of tokens."""
    made = network()
    block, attn, (G, K, N) = made.adapter.blocks[0], made.dit.blocks[0].attn, (4, 2, 4)
    qkv = torch.randn(2, G, K, N, 3 * TINY.width, dtype=torch.float64)
    names = [(g, k) for g in range(G) for k in range(K) for _ in range(N)]      # group and kind of each token
    masks = {}
    masks["all"] = torch.tensor([[a[0] == 0 or b[0] == 0 or a[0] == b[0] for b in names] for a in names])
    masks["alone"] = torch.tensor([[a == b == (0, 0) or a[0] > 0 or a == (0, 1) for b in names] for a in names])
    q, k, v = [attn.split_heads(z.flatten(1, 3)) for z in qkv.chunk(3, -1)]
    weights = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) / q.shape[-1] ** 0.5
    def share(a, b):                    # to the image seven others count as much as itself, to its map three views
        if a == (0, 0) != b:                                                    # as much as image and map
            return 1 / 7
        return 1 / 3 if a == (0, 1) and b[0] > 0 else 1
    weights = weights + torch.tensor([[share(a, b) for b in names] for a in names], dtype=torch.float64).log()
    seen = {name: (weights.masked_fill(~mask, -1e30).softmax(-1) @ v).transpose(1, 2).flatten(2)
            for name, mask in masks.items()}
    want = seen["all"].clone()
    want[:, :N] = seen["alone"][:, :N] + 0.3 * (seen["all"] - seen["alone"])[:, :N]
    assert torch.allclose(block.attend_branches(attn, qkv, 0.3).flatten(1, 3), want, atol=1e-10)


@pytest.mark.parametrize("text_agnostic", [True, False])
def test_the_images_map_does_not_read_the_text(text_agnostic):
    """With one block no other branch can tell it what it read."""
    made = network(replace(VIEWS, text_agnostic=text_agnostic), depth=1)
    x, t, text, control = inputs()
    reads = []
    made.blocks[0].register_forward_pre_hook(lambda module, given: reads.append(given[5].flatten(1).tolist()))
    changed = (made(x, t, text, control) - made(x, t, text.roll(1, dims=0), control)).abs().amax(dim=(0, 2, 3, 4))
    assert changed[0] > 1e-3 and (changed[1] > 1e-3) == (not text_agnostic)
    assert reads[0] == [[1, 1 - text_agnostic], [1, 1], [1, 1], [1, 1]]


def test_loras_touch_the_tokens_of_their_branches():
    two = TwoLoRAs(6, 5, VIEWS)
    x, out = torch.randn(2, 4, 2, 3, 6), torch.randn(2, 4, 2, 3, 5)
    assert torch.equal(two(out, x), out)                                        # zero before training
    for lora in (two.reference, two.domain):
        torch.nn.init.normal_(lora.W_left)
    got = two(out, x)
    for g in range(4):
        for k in range(2):
            want = out[:, g, k]
            for lora, on in ((two.reference, g > 0), (two.domain, k == 1)):
                want = want + on * torch.einsum("or,ri,bni->bno", lora.W_left, lora.W_right, x[:, g, k])
            assert torch.allclose(got[:, g, k], want, atol=1e-5)
    without = TwoLoRAs(6, 5, replace(VIEWS, domain_lora=False))
    torch.nn.init.normal_(without.reference.W_left)
    assert torch.equal(without(out, x)[:, 0], out[:, 0]) and without.domain is None


def test_a_block_is_the_base_models_with_the_loras_in_its_maps():
    """Against weights with each token's LoRAs in them, everything random."""
    made = network(depth=1)
    block, beside, width = made.dit.blocks[0], made.adapter.blocks[0], TINY.width
    h, mod = torch.randn(2, 4, 2, 4, width).double(), torch.randn(2, 4, 2, 6, 1, width).double()
    text = torch.randn(2, 5, width).double()
    reads = torch.tensor([[1.0, 0.0], [1, 1], [1, 1], [1, 1]]).double()[..., None, None]

    def mapped(x, linear, two):
        out = torch.empty(*x.shape[:-1], len(linear.weight), dtype=x.dtype)
        for g in range(4):
            for k in range(2):
                weight = linear.weight + sum(lora.W_left @ lora.W_right for lora, on in
                                             ((two.reference, g > 0), (two.domain, k == 1)) if on)
                out[:, g, k] = x[:, g, k] @ weight.T + linear.bias
        return out
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table[:, None] + mod).unbind(3)
    x = block.norm(h) * (1 + scale1) + shift1
    seen = beside.attend_branches(block.attn, mapped(x, block.attn.qkv, beside.qkv), 0.4)
    want = h + gate1 * mapped(seen, block.attn.proj, beside.proj)
    want = want + reads * block.cross_attn(want.flatten(1, 3), text, None).view_as(want)
    x = block.mlp[:2](block.norm(want) * (1 + scale2) + shift2)
    want = want + gate2 * mapped(x, block.mlp[2], beside.mlp_out)
    assert torch.allclose(beside(block, h, mod, text, None, reads, 0.4), want, atol=1e-9)


def test_recomputed_blocks_give_the_same_gradients():
    """--grad_checkpointing: each block runs again in the backward pass."""
    made, calls, gradients = network(), [], []
    made.blocks[0].register_forward_pre_hook(lambda module, given: calls.append(1))
    for recompute, count in ((False, 1), (True, 3)):
        made.dit.grad_checkpointing = recompute
        made.zero_grad()
        made(*inputs()).square().sum().backward()
        gradients.append([p.grad.clone() for p in made.adapter.parameters()])
        assert len(calls) == count
    assert all(torch.allclose(a, b) for a, b in zip(*gradients))


def test_positions_of_maps_are_their_images_and_views_lie_a_width_to_the_left():
    dit, n = random_model(replace(TINY, image_size=16)), 4
    places = branch_positions(dit, VIEWS)                                       # (2, K, N, d)
    assert torch.equal(places[0, 0], dit.positions) and torch.equal(places[:, 0], places[:, 1])
    omega = 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for token, (row, column) in enumerate((i, j) for i in range(n) for j in range(n)):
        want = [((column - n) * omega).sin(), ((column - n) * omega).cos(), (row * omega).sin(), (row * omega).cos()]
        assert torch.allclose(places[1, 0, token], torch.cat(want).float(), atol=1e-6)
    apart = branch_positions(dit, replace(VIEWS, shared_positions=False)).flatten(0, 2)
    assert torch.pdist(apart).min() > 0.1                                       # no two tokens coincide
    assert branch_positions(dit, replace(VIEWS, points=False)).shape[1] == 1


def test_views_are_at_timestep_0_and_maps_carry_their_domain():
    made = network()
    dit, switcher = made.dit, made.adapter.switcher
    for lora in (made.adapter.adaln.reference, made.adapter.adaln.domain):
        torch.nn.init.zeros_(lora.W_left)
    t_emb, mod = made.embed_time(torch.tensor([7, 903]), 2)
    for b, t in enumerate((7, 903)):
        for k in range(2):
            tag = switcher(torch.tensor([k]))[0]
            for group, time in ((0, t), (1, 0)):
                embedded = dit.t_embedder(timestep_embedding(torch.tensor([time])).double())[0] + tag
                assert torch.allclose(mod[b, group, k].flatten(), dit.t_block(embedded))
                assert group or torch.allclose(t_emb[b, k], embedded)
    taken = []
    made.blocks[0].register_forward_pre_hook(lambda module, given: taken.append(given[2]))
    x, t, text, control = inputs()
    made(x, t, text, control)
    assert torch.allclose(taken[0], mod[:, [0, 1, 1, 1]])                       # what each group's blocks are given
    fresh = RefAny3D(random_model(), VIEWS)
    assert torch.equal(fresh.adapter.switcher(torch.arange(2)), torch.zeros(2, TINY.width))


def test_patches_are_embedded_as_by_the_base_model():
    made = RefAny3D(random_model(), VIEWS)
    images = torch.randn(2, 4, 2, 3, 8, 8)
    want = made.dit.x_embedder(images.flatten(0, 2)).flatten(2).transpose(1, 2).view(2, 4, 2, 4, -1)
    places = made.places[[0, 1, 1, 1]]                                          # of the drawn group and three views
    assert torch.allclose(made.embed_branches(images), want + places, atol=1e-5)


def test_views_are_spread_evenly_and_kinds_left_out():
    scenes = {"image": torch.arange(2).view(1, 2, 1, 1, 1), "text": 0,
              "references": torch.arange(16).view(1, 2, 8, 1, 1, 1)}
    for count, sides in ((8, range(8)), (4, (0, 2, 4, 6)), (6, (0, 1, 3, 4, 5, 7)), (1, (0,))):
        got = branches(scenes, References(num_references=count))["control"]
        assert got[0, 0].flatten().tolist() == list(sides) and got[0, 1].flatten().tolist() == [8 + s for s in sides]
    got = branches(scenes, References(points=False))
    assert got["image"].flatten().tolist() == [0] and got["control"].shape[1] == 1


def test_views_are_dropped_where_the_text_is_not():
    u, control = torch.tensor([0.05, 0.5, 0.89, 0.91]), torch.full((4, 2, 3, 1, 2, 2), 9, dtype=torch.uint8)
    got = seen_control(dict(u=u, control=control), Iteration("syn", 0, control=True, control_dropout=0.1))
    assert got.flatten(1).amax(1).tolist() == [9, 9, 9, 0] and control.min() == 9
    assert seen_control(dict(u=u, control=control), Iteration("syn", 0)) is None
    assert seen_control(dict(u=u, control=control), Iteration("syn", 0, control=True)) is control


def test_the_image_comes_to_see_its_views_in_a_fifth_of_the_training(tiny_toy, monkeypatch):
    """What the loop is told, and the network by it; in sampling it sees them in full."""
    plans = []
    monkeypatch.setattr(refany3d, "train", lambda *args: plans.append(args[3]))
    monkeypatch.setattr(refany3d, "save_trained", lambda *args: None)
    monkeypatch.setattr(refany3d, "scene_set", lambda *args, **options: {name: torch.zeros(1, 2, 8) for name in
                                                                         ("image", "references", "text")})
    monkeypatch.setattr(refany3d, "captions_of", lambda text: [])
    base = tiny_toy[0] / "base.safetensors"
    run_main(refany3d, "--out", tiny_toy[0], "--base", base, "--steps", 100, "--threads", 1)
    plan, = plans
    assert [plan(step).opening for step in (0, 5, 19, 20, 99)] == pytest.approx([0, 0.25, 0.95, 1, 1])
    assert plan(5).of_network == dict(opening=0.25) and Iteration("real", 0, frozen_blocks=2).of_network == dict(
        frozen_blocks=2)
    made, given = network(), []
    made.blocks[0].register_forward_pre_hook(lambda module, inputs: given.append(float(inputs[6])))
    made(*inputs(), **plan(5).of_network)
    made(*inputs())
    assert given == [0.25, 1] and Iteration("syn", 0).of_network == {}


def test_guidance_on_the_views_and_on_the_text():
    """Scale 2: twice what the views add to black ones; what both add beside each other is the sum."""
    made = network().float()
    torch.manual_seed(0)
    scenes = dict(image=torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), text=torch.randint(2, 50, (2, 14)),
                  references=torch.randint(256, (2, 2, 8, 3, 8, 8), dtype=torch.uint8))
    black = scenes | {"references": torch.zeros_like(scenes["references"])}
    one, two = (draw(made, scenes, Sampling(num_steps=1), view_scale=scale) for scale in (1, 2))
    none = draw(made, black, Sampling(num_steps=1))
    free = (one.abs() < 1) & (two.abs() < 1) & (none.abs() < 1)                 # not clipped
    assert free.sum() > 20 and torch.allclose((two - none)[free], 2 * (one - none)[free], atol=1e-3)
    words = Sampling(num_steps=1, cfg_scale=2)
    told, both = draw(made, scenes, words), draw(made, scenes, words, view_scale=2)
    free &= (told.abs() < 1) & (both.abs() < 1)
    assert (told - one)[free].abs().max() > 1e-3
    assert free.sum() > 20 and torch.allclose((both - one)[free], (told + two - 2 * one)[free], atol=1e-3)


def test_trained_and_read_back(tmp_path, monkeypatch):
    """On a small network: the pictures of the toy's scenes have 32 pixels."""
    small = replace(TINY, image_size=32, depth=2)
    monkeypatch.setitem(PRESETS, "toy", small)
    save_model(str(tmp_path / "base.safetensors"), small, random_model(small))
    once = ["--out", tmp_path, "--steps", 4, "--batch", 2, "--picture_steps", 2, "--threads", 1]
    run_main(pretrain, *once, "--scenes", "--num_base_images", 4)
    flags = [*once, "--num_assets", 3]
    run_main(refany3d, *flags, "--num_references", 2)
    path, base = str(tmp_path / "refany3d.safetensors"), str(tmp_path / "scenes.safetensors")
    made = load_refany3d(path, base)
    assert made.config == References(num_references=2) and (tmp_path / "refany3d.png").exists()
    assert list((tmp_path / "sets").glob("scene_world_4_*")) and not torch.equal(
        made.dit.x_embedder.weight, random_model(small).x_embedder.weight)
    tensors, metadata = load_tensors(path)
    assert tensors and all(name.startswith("adapter.") for name in tensors)
    assert metadata["adapter_kind"] == "refany3d" and metadata["settings"]["num_references"] == 2
    assert metadata["settings"]["base_file"] == file_id(base)[1]
    assert any(p.abs().max() > 0 for name, p in made.adapter.named_parameters() if name.endswith("W_left"))
    lines = [json.loads(line) for line in open(tmp_path / "refany3d" / "log.jsonl")]
    assert lines[-1]["step"] == 4 and lines[-1]["loss"] > 0
    drawing = ["--out", tmp_path, "--num_steps", 2, "--threads", 1]
    run_main(refany3d, *drawing, "--object", 2, 0, "--prompt", "a mug, sunset background")
    assert (tmp_path / "refany3d_drawn.png").exists()
    refuses(refany3d, [*drawing, "--prompt", "a mug, moonlit background"], 2, "--prompt: unknown word")
    refuses(refany3d, [*drawing, "--object", -1, "--prompt", "a mug"], 2, "--object: -1 does not lie in [0, 9999]")
    refuses(refany3d, [*drawing, "--object", 0, 1, 2, "--prompt", "a mug", "a car"], 2, "--prompt names 2 scenes")
    refuses(refany3d, [*drawing, "--object", 1, "--mesh", "a.glb", "--prompt", "a mug"], 2, "give one of them")
    refuses(refany3d, [*drawing, "--mesh", "a.glb"], 2, "--mesh would do nothing")
    refuses(refany3d, [*drawing, "--mesh", tmp_path / "a.glb", "--prompt", "a mug"], 1, "a.glb")
    refuses(refany3d, [*drawing, "--name", "other", "--prompt", "a mug"], 1, "no such file")
    with pytest.raises(ValueError, match="holds no RefAny3D: train one with python -m related.refany3d"):
        load_refany3d(base, base)
    refuses(refany3d, [*flags, "--preset", "small"], 2, "preset small")
    # on renders, with Realiz3D's shifters
    shifters = DomainShifters(small)
    torch.nn.init.normal_(shifters.W_left)
    save_model(str(tmp_path / "shifters.safetensors"), small, shifters=shifters)
    run_main(refany3d, *flags, "--renders", "--shifters", tmp_path / "shifters.safetensors", "--name", "renders")
    made = load_refany3d(str(tmp_path / "renders.safetensors"), base)
    assert made.config == References(renders=True, shifted=True)
    assert torch.equal(made.shifters.W_left, shifters.W_left.half().float())
    assert list((tmp_path / "sets").glob("scenes_renders_3_*"))
    run_main(refany3d, *drawing, "--name", "renders", "--prompt", "a mug, sunset background")
    refuses(refany3d, [*flags, "--renders", "--shifters", base, "--name", "none"], 1, "holds no Domain Shifters")
    refuses(refany3d, [*flags, "--shifters", base], 2, "--shifters are for --renders")
    refuses(refany3d, [*drawing, "--prompt", "a mug", "--vae", "there"], 2, "--vae would do nothing")


def test_an_adapter_is_read_beside_the_base_model_that_it_was_trained_on(tmp_path):
    """Whatever its file is called."""
    base, renamed, other, path = (str(tmp_path / f"{name}.safetensors") for name in ("base", "renamed", "other", "a"))
    for file, seed in ((base, 0), (renamed, 0), (other, 1)):
        save_model(file, TINY, random_model(seed=seed))
    config, record = References(num_references=2, rank=2), {"base_file": file_id(base)[1]}
    adapter = RefAny3D(random_model(), config).adapter
    save_model(path, TINY, adapter=adapter, adapter_kind="refany3d", settings=asdict(config) | record)
    assert load_refany3d(path, base).config == load_refany3d(path, renamed).config == config
    with pytest.raises(ValueError, match="a.safetensors was trained beside another base model than .*other.*--base"):
        load_refany3d(path, other)


@pytest.mark.parametrize("program, flags, word", [
    (refany3d, ("--prompt", "a moonlit mug"), "--prompt: unknown word 'moonlit'"),
    (refany3d, ("--num_ref", 4), "unrecognized arguments: --num_ref 4"),
    (view_prior, ("--pict", 4), "unrecognized arguments: --pict 4"),
])
def test_flags_are_refused_at_once(program, flags, word, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "launch_training", None)
    monkeypatch.chdir(tmp_path)
    refuses(program, flags, 2, word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program, flags, word", [
    (refany3d, ("--renders", "--shifters", "base.safetensors"), "base.safetensors holds no Domain Shifters: train them"),
    (refany3d, ("--renders", "--shifters", "none.safetensors"), "no such file: none.safetensors"),
    (refany3d, ("--base", "shifters.safetensors"), "shifters.safetensors holds Domain Shifters only"),
    (view_prior, ("--base", "shifters.safetensors"), "shifters.safetensors holds Domain Shifters only"),
])
def test_wrong_models_are_named_before_a_trial_of_the_speed(program, flags, word, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    monkeypatch.setattr(program, "launch_training", None)
    monkeypatch.chdir(tmp_path)
    save_model("base.safetensors", TINY, random_model())
    save_model("shifters.safetensors", TINY, shifters=DomainShifters(TINY))
    refuses(program, ("--base", "base.safetensors", *flags), 1, word)


def test_a_folder_in_the_pictures_place_is_found_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(refany3d, "launch", None)
    (tmp_path / "refany3d_drawn.png").mkdir()
    refuses(refany3d, ("--prompt", "a mug", "--out", tmp_path, "--base", "any"), 2, "refany3d_drawn.png")
