"""RefAny3D (arXiv 2601.22094, ICLR 2026): a picture of *this* asset in a new scene, and with it its point map.

    python -m toy.pretrain --scenes                             # first: the base model learns what scenes are
    python -m related.refany3d                                  # trains on the toy world, and shows held-out assets
    python -m related.refany3d --object 14 --prompt "a duck, sunset background"     # draws with what was trained
    python -m related.refany3d --mesh FILE.glb --prompt "a mug, sunset background"  # a textured mesh of your own
    torchrun --nproc_per_node=8 -m related.refany3d --preset full --base BASE --synthetic DIR   # see full/scenes.py
    python -m related.refany3d --renders --shifters runs/toy/shifters.safetensors   # beyond both papers, see below

A point map colours each pixel with its place on the asset, the same in every view. The frozen base model draws the
image and its map together, in one attention over their tokens and those of clean colours and maps of V views:

    branch                    timestep   attends to                        text   LoRA
    image                     t          all                               yes    -
    the image's point map     t          all                               no     domain
    colours of view v         0          view v, image and its map         yes    reference
    point map of view v       0          view v, image and its map         yes    reference and domain

Tokens are (B, G, K, N, d): G = 1 + V groups, of which the first is drawn, and K = 2 kinds, colours and maps.

With --renders it learns from renders alone, and with --shifters Realiz3D's Domain Shifters stand in the base model: the
image's tokens run with e_syn in training, and with e_real when it draws, perhaps a photograph (neither paper tries it).
"""
import argparse
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from data import LATENT_SCALE, SEEDS
from dit import modulate, position_embedding, timestep_embedding
from domain_shifter import load_part, load_shifters
from full.encoders import encode_captions, load_text_encoder, load_vae
from full.pixart import load_base
from full.scenes import SceneLatents
from sample import CFG_SCALE, LATENT_CFG_SCALE, Sampling, guidance, guided_noise, sample_images
from support.files import file_id, load_strictly, read_metadata, run_or_shipped
from support.launch import UsageError, check_out, finite, launch, on_rank_0_first, run_cli, some_steps, within
from support.pictures import save_picture, to_pixels, to_uint8
from support.speed import attend, choose_dtype
from toy.scenes import SCENES, SIDES, mesh_references, scene_set, spread_views
from toy.world import captions_of, refuse_unknown_words, tokenize
from training.estimate import choose, launch_training
from training.flags import MOST, parse_training, refuse_unread, training_arguments
from training.loop import Iteration, save_trained, train
from training.sets import base_model, base_path, null_caption, scenes_base

SHOWN = 4                               # held-out assets of the picture
OPENING = 0.2                           # of a training, in which the image goes from seeing itself alone to seeing all
VIEW_COUNTS = (1, 2, 4, 6, 8)

# ---------------------------------------------------------------------------------------------------------------------
# What trains (Sec. 3: Reference-LoRA, Domain-LoRA, domain switcher)


@dataclass(frozen=True)
class References:
    """RefAny3D, and what its ablations leave out."""
    num_references: int = 8             # V
    points: bool = True                 # whether there are point maps, of the image and of the views
    shared_positions: bool = True       # whether a map has the positions of its image
    text_agnostic: bool = True          # whether the image's map is kept from the text
    domain_lora: bool = True
    rank: int = 16                      # the paper's, of Flux's width 3072; in proportion it would be 1 of 192
    renders: bool = False               # whether it is trained on renders in place of photographs
    shifted: bool = False               # whether Realiz3D's Domain Shifters stand in the base model


class LowRankMap(nn.Module):
    """Adds W_left W_right x to `out` of a linear map where `on`, (G, K, ..), is 1; zero at first (Hu et al. 2021)."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.W_right = nn.Parameter(torch.randn(rank, inputs) / inputs ** 0.5)
        self.W_left = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, out, x, on):
        low = x @ self.W_right.T * on                                                               # (B, G, K, .., r)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.W_left.T).view_as(out)


class TwoLoRAs(nn.Module):
    """Beside a linear map: Reference-LoRA for the tokens of all views, Domain-LoRA for those of all point maps."""

    def __init__(self, inputs, outputs, config):
        super().__init__()
        self.reference = LowRankMap(inputs, outputs, config.rank)
        self.domain = LowRankMap(inputs, outputs, config.rank) if config.domain_lora else None

    def forward(self, out, x):
        """x, out: (B, G, K, ..), what the linear map took and gave -> out with what the LoRAs add to it."""
        views, maps = x.new_zeros(2, *x.shape[1:3], *[1] * (x.dim() - 3))                           # (G, K, 1, ..)
        views[1:], maps[:, 1:] = 1, 1
        out = self.reference(out, x, views)
        return out if self.domain is None else self.domain(out, x, maps)


class BranchBlock(nn.Module):
    """What RefAny3D adds to a block of the base model, and how that block runs with several branches."""

    def __init__(self, width, config):
        super().__init__()
        self.qkv, self.proj = TwoLoRAs(width, 3 * width, config), TwoLoRAs(width, width, config)
        self.mlp_out = TwoLoRAs(4 * width, width, config)

    def forward(self, block, h, mod, text, text_mask, reads, opening):
        """h (B, G, K, N, d) -> the same, as `Block.forward`. mod: (B, G, K, 6, 1, d). reads: (G, K, 1, 1), 1 where the
        text is seen. opening: how far the image sees anything but itself; at 0 it is the base model's."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table[:, None] + mod).unbind(3)
        x = modulate(block.norm(h), shift1, scale1)
        seen = self.attend_branches(block.attn, self.qkv(block.attn.qkv(x), x), opening)
        h = h + gate1 * self.proj(block.attn.proj(seen), seen)
        h = h + reads * block.cross_attn(h.flatten(1, 3), text, text_mask).view_as(h)
        x = block.mlp[:2](modulate(block.norm(h), shift2, scale2))
        return h + gate2 * self.mlp_out(block.mlp[2](x), x)                                         # (B, G, K, N, d)

    def attend_branches(self, attn, qkv, opening):
        """The table at the head of this file: qkv (B, G, K, N, 3 d) -> what each token attends to, (B, G, K, N, d)."""
        _, G, K, N, _ = qkv.shape
        q, k, v = [attn.split_heads(part.flatten(1, 3)) for part in qkv.chunk(3, -1)]              # (B, h, G K N, d/h)
        q, k = attn.q_norm(q), attn.k_norm(k)
        quiet = q.new_zeros(K * N, G * K * N)                   # before training count
        quiet[:N, N:] = -math.log(G * K - 1)                    # to the image all others as much as itself,
        quiet[N:, K * N:] = -math.log(G - 1)                    # to its map all views as much as image and map
        drawn = attend(q[:, :, :K * N], k, v, quiet)                            # image and map: to all
        alone = attend(q[:, :, :N], k[:, :, :N], v[:, :, :N])                   # the image as the base model draws it
        image = alone + opening * (drawn[:, :, :N] - alone)
        q, k, v = [part.unflatten(2, (G, K * N)).transpose(1, 2) for part in (q, k, v)]            # (B, G, h, K N, d/h)
        k, v = [torch.cat([part[:, 1:], part[:, :1].expand_as(part[:, 1:])], dim=3) for part in (k, v)]
        views = attend(q[:, 1:].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))                    # (B V, h, K N, d/h)
        views = views.unflatten(0, (-1, G - 1)).transpose(1, 2).flatten(2, 3)
        seen = torch.cat([image, drawn[:, :, N:], views], dim=2)                                    # (B, h, G K N, d/h)
        return seen.transpose(1, 2).flatten(2).unflatten(1, (G, K, N))


class RefAny3DAdapter(nn.Module):
    """All that trains."""
    kind = "refany3d"

    def __init__(self, dit_config, config):
        super().__init__()
        d = dit_config.width
        self.patches = TwoLoRAs(dit_config.channels * dit_config.patch_size ** 2, d, config)
        self.adaln = TwoLoRAs(d, 6 * d, config)
        self.blocks = nn.ModuleList(BranchBlock(d, config) for _ in range(dit_config.depth))
        self.switcher = nn.Sequential(nn.Embedding(2, 256), nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        nn.init.zeros_(self.switcher[3].weight)
        nn.init.zeros_(self.switcher[3].bias)


# ---------------------------------------------------------------------------------------------------------------------
# The network


class RefAny3D(nn.Module):
    """The frozen base model, beside it RefAny3D's adapter: (noisy image and map, t, text, views) -> epsilon.

    shifters: Realiz3D's, frozen too, where config.shifted.
    """

    def __init__(self, dit, config=References(), adapter=None, shifters=None):
        super().__init__()
        self.dit, self.config = dit.requires_grad_(False), config
        self.shifters = shifters if shifters is None else shifters.requires_grad_(False)
        self.adapter = RefAny3DAdapter(dit.config, config).to(dit.positions.device) if adapter is None else adapter
        self.blocks = self.adapter.blocks                                       # what --compile compiles
        self.register_buffer("places", branch_positions(dit, config), persistent=False)             # (2, K, N, d)

    @property
    def knows_domains(self):
        """Whether the domain makes a difference."""
        return self.shifters is not None

    def forward(self, x, t, text, control, text_mask=None, domains=None, opening=1.0):
        """Predicts the noise in an image and its point map.

        x: (B, K, C, H, W), both noisy. t: (B,). text, text_mask: as in `DiT.forward`. control: views of the asset and
        their maps, (B, K, V, C, H, W), uint8 pixels or in the model's range; black (latents: 0) where there are none.
        domains: (N_B, B), read where there are shifters. opening: see `BranchBlock`. Returns epsilon like x.
        """
        dit, (B, K) = self.dit, x.shape[:2]
        views = to_pixels(control) if control.dtype == torch.uint8 else control
        h = self.embed_branches(torch.cat([x[:, None], views.transpose(1, 2).to(x)], dim=1))        # (B, G, K, N, d)
        G = h.shape[1]
        t_emb, mod = self.embed_time(t.expand(B), K)
        mod = torch.cat([mod[:, :1], mod[:, 1:].expand(-1, G - 1, *4 * [-1])], dim=1)              # (B, G, K, 6, 1, d)
        text, text_mask = dit.embed_text(text, text_mask)
        reads = torch.ones(G, K, 1, 1, device=x.device)
        if self.config.text_agnostic:
            reads[0, 1:] = 0                                                    # the image's map
        shift = None if self.shifters is None else self.shifters(domains)                           # (N_B, B, d)
        opening = x.new_full((), opening)                   # for each number --compile would begin anew
        for k, (block, branch_block) in enumerate(zip(dit.blocks, self.blocks)):
            if shift is not None:
                of_image = torch.zeros_like(h[:, :, :, :1])                                         # (B, G, K, 1, d)
                of_image[:, 0, 0, 0] = shift[k]
                h = h + of_image
            inputs = block, h, mod, text, text_mask, reads, opening
            recompute = dit.grad_checkpointing and torch.is_grad_enabled()
            h = checkpoint(branch_block, *inputs, use_reentrant=False) if recompute else branch_block(*inputs)
        shift, scale = (dit.final_table[:, None, None] + t_emb[:, None, :, None]).unbind(1)         # (B, K, 1, d)
        out = dit.final_linear(modulate(dit.final_norm(h[:, 0]), shift, scale))                     # (B, K, N, ..)
        return dit.noise_in(x, t.expand(B), dit.unpatchify(out.flatten(1, 2), K))

    def embed_branches(self, images):
        """Patches (B, G, K, C, H, W) -> (B, G, K, N, d), each with its position."""
        p, embedder = self.dit.config.patch_size, self.dit.x_embedder
        patches = images.unflatten(5, (-1, p)).unflatten(4, (-1, p)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        patches = patches.flatten(5).flatten(3, 4)                                                 # (B, G, K, N, C p p)
        h = nn.functional.linear(patches, embedder.weight.flatten(1), embedder.bias)
        drawn, view = self.places[:, :images.shape[2]]
        places = torch.cat([drawn[None], view.expand(images.shape[1] - 1, -1, -1, -1)])             # (G, K, N, d)
        return self.adapter.patches(h, patches) + places

    def embed_time(self, t, K):
        """t (B,) -> the drawn group's time embedding (B, K, d), and adaLN-single's (B, 2, K, 6, 1, d), of the drawn
        group, at t, and of the views, at 0. Each kind has its domain's vector in it (domain switcher)."""
        time = torch.stack([t, torch.zeros_like(t)], dim=1)                                         # (B, 2)
        embedding = timestep_embedding(time.flatten()).to(self.dit.final_table.dtype)
        t_emb = self.dit.t_embedder(embedding).unflatten(0, (-1, 2))                                # (B, 2, d)
        t_emb = t_emb[:, :, None] + self.adapter.switcher(torch.arange(K, device=t.device))         # (B, 2, K, d)
        activated = self.dit.t_block[0](t_emb)
        mod = self.adapter.adaln(self.dit.t_block[1](activated), activated)
        return t_emb[:, 0], mod.unflatten(-1, (6, 1, -1))


def branch_positions(dit, config):
    """Positions of the drawn group and of a view, (2, K, N, d): a map has those of its image, and views lie a width to
    the left of what is drawn. (Without shared positions the maps lie further out on either side.)"""
    n = dit.config.image_size // dit.config.patch_size
    columns = [(0, 0), (-n, -n)] if config.shared_positions else [(0, n), (-n, -2 * n)]
    columns = [first for kinds in columns for first in kinds[:1 + config.points]]
    tables = [position_embedding(dit.config.width, n, dit.config.pos_scale, first) for first in columns]
    return torch.stack(tables).unflatten(0, (2, -1)).to(dit.positions)


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling


def branches(scenes, config):
    """Scenes (toy/scenes.py) as the network takes them: "control" (N, K, V, 3, H, W), V of the views, `spread_views`,
    "text", and where they have them "image" (N, K, 3, H, W)."""
    kinds = 1 + config.points
    control = scenes["references"][:, :kinds, spread_views(config.num_references)]
    images = {"image": scenes["image"][:, :kinds]} if "image" in scenes else {}
    return images | dict(text=scenes["text"], control=control)


def guided_by_views(view_scale, nothing):
    """`guided_noise` with guidance on the views too, beside `nothing` (1, K, V, C, H, W); the text stays in both."""
    def guide(network, null, domains, cfg_scale, control, **inputs):
        by_text = guided_noise(network, null, domains, cfg_scale, control=control, **inputs)
        with_views = guided_noise(network, null, domains, 1, control=control, **inputs)
        without = guided_noise(network, null, domains, 1, control=nothing.to(control).expand_as(control), **inputs)

        def predict_noise(x, t):
            return by_text(x, t) + (view_scale - 1) * (with_views(x, t) - without(x, t))
        return by_text if view_scale == 1 else predict_noise
    return guide


def draw(network, scenes, sampling=Sampling(), view_scale=1.0, vae=None):
    """Images and their maps (N, K, 3, H, W) in [-1, 1] of scenes; view_scale: guidance on the views, 1 = none.

    vae: (encode, decode) of `load_vae`, for a model of latents, whose scenes have "text", "text_mask" and "null".
    """
    control = branches(scenes, network.config)["control"]                                           # (N, K, V, 3, H, W)
    shape, control = control.shape[:3], to_pixels(control)
    if vae:
        means = [vae[0](view[None])[0, 0] for view in control.flatten(0, 2)]                        # (C, h, w) each
        control = LATENT_SCALE * torch.stack(means).unflatten(0, shape)
    nothing = torch.full_like(control[:1], 0 if vae else -1)
    inputs = {name: scenes[name] for name in ("text", "text_mask", "null") if name in scenes} | dict(control=control)
    drawn = sample_images(network, inputs, sampling, views=shape[1], guide=guided_by_views(view_scale, nothing))
    return vae[1](drawn.flatten(0, 1)).unflatten(0, shape[:2]) if vae else drawn


def draw_sheet(path, network, scenes, sampling=Sampling(), view_scale=1.0, vae=None):
    """Writes a picture: for each scene the views of its asset, the image drawn and the true one where the scenes have
    it ("image"), and below them the point maps; on the left its "captions"."""
    drawn, rows = to_uint8(draw(network, scenes, sampling, view_scale, vae)), []
    for k, image in enumerate(drawn):
        for kind in range(len(image)):
            cells = [scenes["references"][k, kind], image[kind, None]]
            cells += [scenes["image"][k, kind, None]] if "image" in scenes else []
            rows.append(("" if kind else scenes["captions"][k], torch.cat(cells)))
    titles = [f"{azimuth} degrees" for azimuth in SIDES] + ["drawn"] + ["truth"] * ("image" in scenes)
    save_picture(path, rows, column_titles=titles)


def load_refany3d(path, base, device="cpu"):
    """RefAny3D from its adapter's file, beside the base model's. Raises ValueError where either is another thing, or
    the base model not the one that it was trained beside."""
    dit = load_base(base, device)
    _, weights, kind = load_part(path, "adapter", dit.config)
    made = read_metadata(path).get("settings")
    config = {field.name: made.get(field.name) for field in fields(References)} if isinstance(made, dict) else {}
    known = all(type(value) is type(getattr(References(), name)) for name, value in config.items())
    if kind != RefAny3DAdapter.kind or not config or not known or config["num_references"] not in VIEW_COUNTS \
            or not 1 <= config["rank"] <= MOST["rank"]:
        raise ValueError(f"{path} holds no RefAny3D: train one with python -m related.refany3d")
    if made.get("base_file") != file_id(base)[1]:
        raise ValueError(f"{path} was trained beside another base model than {base}: name that one with --base")
    shifters = load_shifters(path, device, dit.config)
    if config["shifted"] != (shifters is not None):
        raise ValueError(f"{path} says shifted {config['shifted']}, but holds {'other' if shifters else 'no'} shifters")
    network = RefAny3D(dit, References(**config), shifters=shifters)
    load_strictly(network.adapter, weights, path)
    return network.to(device).eval()


def frozen_parts(args, device):
    """The base model, and the Domain Shifters of --shifters, or None. Raises ValueError where one is another thing."""
    base = base_model(args, device)
    shifters = load_shifters(args.shifters, device, base.config) if args.shifters else None
    if args.shifters and shifters is None:
        raise ValueError(f"{args.shifters} holds no Domain Shifters: train them with train_stage1.py")
    return base, shifters


def train_refany3d(args, launched):
    """Trains the adapter beside the frozen base model -> OUT/NAME.safetensors, and a picture of held-out assets."""
    config = References(**{field.name: getattr(args, field.name) for field in fields(References)})
    sets, device = f"{args.out}/sets", launched.device
    if args.preset == "full" and not args.synthetic:
        raise UsageError("--preset full needs --synthetic DIR: shards of scenes, from python -m full.scenes encode")
    torch.manual_seed(args.seed)
    base, shifters = frozen_parts(args, device)
    args.base_file = file_id(base_path(args))[1]
    network = RefAny3D(base, config, shifters=shifters)

    def toy_scenes(num, seed):
        return on_rank_0_first(launched, lambda: scene_set(num, seed, renders=args.renders, folder=sets, device=device))
    if base.config.latent:
        scenes, preview = SceneLatents(args.synthetic, base.config, config.num_references, config.points), None
    else:
        scenes, held = toy_scenes(args.num_assets, SEEDS["synthetic"]), toy_scenes(SHOWN, SEEDS["evaluation"])
        scenes, held = branches(scenes, config), {name: value[::SCENES] for name, value in held.items()}   # one of each
        held["captions"] = captions_of(held["text"])

        def preview(path):
            draw_sheet(path, network, held, Sampling(cfg_scale=CFG_SCALE, num_steps=args.picture_steps))
    args.images_per_grid = 1 + config.points

    def plan(step):
        return Iteration("syn", step, views=1 + config.points, control=True, control_dropout=0.1,
                         opening=min(1, step / (OPENING * args.steps)))
    losses = train(network, {"syn": scenes}, null_caption(base, scenes), plan, args, launched, preview)
    return save_trained(f"{args.out}/{args.name}.safetensors", network, args, losses, launched, ("adapter", "shifters"))


def draw_objects(args):
    """Draws held-out assets, or that of --mesh, in the scenes of --prompt -> OUT/refany3d_drawn.png."""
    folder = args.out or f"runs/{args.preset}"
    if args.mesh is not None and args.object:
        raise UsageError("--mesh and --object both name what to draw: give one of them")
    check_out(f"{folder}/refany3d_drawn.png")
    numbers = args.object or [14]
    assets = 1 if args.mesh is not None else len(numbers)
    if assets > 1 and len(args.prompt) not in (1, assets):
        raise UsageError(f"--prompt names {len(args.prompt)} scenes, --object {assets} assets: give as many, or one")
    num = max(assets, len(args.prompt))
    captions = args.prompt if len(args.prompt) == num else args.prompt * num
    args.base = args.base or scenes_base(args.preset, args.out)
    device = launch(args.threads).device
    path = run_or_shipped(folder, args.preset, f"{args.name or 'refany3d'}.safetensors")
    network = load_refany3d(path, base_path(args), device)
    config, vae = network.dit.config, None
    if config.latent:
        if args.mesh is None or not (args.vae and args.text_encoder):
            raise UsageError("a model of latents draws a --mesh, and needs PixArt's --vae and --text_encoder")
        vae, encode_text = load_vae(args.vae, device), load_text_encoder(args.text_encoder, device)
        text = encode_captions(captions, encode_text, network.dit)
        references = mesh_references(args.mesh, 8 * config.image_size)
    else:
        text = {"text": tokenize(captions)}
        if args.mesh is not None:
            references = mesh_references(args.mesh)
        else:
            scenes = scene_set(max(numbers) + 1, SEEDS["evaluation"], renders=network.config.renders,
                               folder=f"{folder}/sets", device=device)
            references = scenes["references"][[k * SCENES for k in numbers]]
    scenes = text | dict(captions=captions, references=references.expand(num, *references.shape[1:]))
    sampling = Sampling(cfg_scale=guidance(args.cfg_scale, config.latent), num_steps=args.num_steps, seed=args.seed,
                        dtype=None if config.latent else choose_dtype(device))
    draw_sheet(f"{folder}/refany3d_drawn.png", network, scenes, sampling, args.view_scale, vae)
    print(f"wrote {folder}/refany3d_drawn.png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)        # experiments/references.py looks for whole names
    training_arguments(parser)
    add = parser.add_argument
    add("--num_references", type=int, default=8, choices=VIEW_COUNTS, help="V, views of the asset (default 8)")
    add("--rank", type=int, default=16, help="of both LoRAs (default 16)")
    for name, what in (("points", "point maps, of the image and of the views"),
                       ("shared_positions", "a map has the positions of its image"),
                       ("text_agnostic", "the image's map does not see the text"), ("domain_lora", "Domain-LoRA")):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=f"{what} (default: yes)")
    add("--renders", action="store_true", help="learn from renders in place of photographs")
    add("--shifters", help="Realiz3D's Domain Shifters, of train_stage1.py, to stand in the base model")
    add("--prompt", nargs="+", help="draw instead of training: captions, as \"a mug, sunset background\"")
    add("--object", type=within(0, 10 ** 4 - 1), nargs="+", help="numbers of held-out assets to draw (default 14)")
    add("--mesh", help="or a mesh with its texture or vertex colours (GLB, glTF, OBJ, PLY; needs trimesh)")
    add("--vae", help="PixArt's vae folder, to draw with a model of latents (needs diffusers)")
    add("--text_encoder", help="PixArt's text_encoder folder, likewise (needs transformers)")
    add("--num_steps", type=some_steps, default=50, help="DDIM steps for them (default %(default)s)")
    add("--cfg_scale", type=finite, help=f"guidance on the text (default {CFG_SCALE:g}; full: {LATENT_CFG_SCALE})")
    add("--view_scale", type=finite, default=1.0, help="guidance on the views for them, 1 = none (default 1)")
    parser.set_defaults(adapter=None)
    args = parse_training(parser, "-m related.refany3d", argv)
    args.shifted = args.shifters is not None
    drawing = {"prompt", "object", "mesh", "num_steps", "cfg_scale", "view_scale", "vae", "text_encoder"}
    unread = {*drawing, "real", "real_steps", "synthetic"}
    if args.preset == "full":
        unread = unread - {"synthetic"} | {"renders", "num_assets", "picture_steps", "sample_every"}
    if args.prompt:
        unread = vars(args).keys() - drawing - set("preset out name base seed threads command shifted".split())
    refuse_unread(parser, args, sorted(unread), "beside --prompt: it draws" if args.prompt else "in a training")
    if args.preset != "full":
        refuse_unread(parser, args, ["vae", "text_encoder"], "with the toy's pixels and words")
        if args.shifters and not args.renders:
            parser.error("--shifters are for --renders: photographs would be learned as renders")
        refuse_unknown_words(parser, args.prompt or [""])
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.prompt:
        return draw_objects(args)
    if args.preset == "toy":                    # full has no trial of the speed
        args.base = args.base or scenes_base(folder=args.out)
        frozen_parts(args, "cpu")               # what is wrong with them is named before it
    launched = launch_training(args, "refany3d", __name__ == "__main__")
    choose(args, launched, args.name)
    train_refany3d(args, launched)


if __name__ == "__main__":
    run_cli(main)
