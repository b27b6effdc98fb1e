"""PixArt-alpha's weights (Chen et al. 2023), the public base model of the full configuration, in our network.

    model = load_base("pixart.safetensors", device, PRESETS["full"])        # PixArt's file, or a checkpoint of ours

The paper's base model is internal and follows DiT; `dit.DiT` is PixArt-alpha's architecture, so its tensors need new
names and nothing else. The inputs that Realiz3D adds (control and view, Sec. 4) are at their start.
"""
import torch

from dit import NEW_INPUTS, PRESETS, Config, DiT, load_model, require_config
from support.files import load_strictly, load_tensors, read_metadata
from toy.world import WORLD_VERSION

# PixArt-alpha's own name for each part of ours, and the diffusers one (several: stacked along the rows)
PIXART_NAMES = {
    "x_embedder": ("x_embedder.proj", "pos_embed.proj"),
    "t_embedder.0": ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    "t_embedder.2": ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    "t_block.1": ("t_block.1", "adaln_single.linear"),
    "text_embedder.0": ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    "text_embedder.2": ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    "final_linear": ("final_layer.linear", "proj_out"),
    "final_table": ("final_layer.scale_shift_table", "scale_shift_table"),
}
PIXART_BLOCK_NAMES = {
    "scale_shift_table": ("scale_shift_table", "scale_shift_table"),
    "attn.qkv": ("attn.qkv", "attn1.to_q attn1.to_k attn1.to_v"),
    "attn.proj": ("attn.proj", "attn1.to_out.0"),
    "cross_attn.q": ("cross_attn.q_linear", "attn2.to_q"),
    "cross_attn.kv": ("cross_attn.kv_linear", "attn2.to_k attn2.to_v"),
    "cross_attn.proj": ("cross_attn.proj", "attn2.to_out.0"),
    "mlp.0": ("mlp.fc1", "ff.net.0.proj"),
    "mlp.2": ("mlp.fc2", "ff.net.2"),
}
POSITION_TABLES = ("pos_embed", "pos_embed.pos_embed")                              # left out: we compute it
EMPTY_CAPTIONS = ("y_embedder.y_embedding", "caption_projection.y_embedding")       # (L, D), in the original .pth


def load_base(path, device="cpu", config=None):
    """A model from a checkpoint of ours or from PixArt-alpha's weights, whichever the file holds.

    config: what it must be (default: PixArt-alpha's must be PRESETS["full"]). Raises as `load_model`, `load_pixart`.
    """
    if "config" in read_metadata(path) or config and not config.latent:
        model = load_model(path, device, config)
        if not model.config.latent and model.config.world != WORLD_VERSION:
            raise ValueError(f"{path} was trained on version {model.config.world} of the toy world, whose words and "
                             f"looks are not those of version {WORLD_VERSION}: train it again")
        return model
    config = config or PRESETS["full"]
    model = load_pixart(path, config.heads, config.image_size, config.pos_scale)
    require_config(path, model.config, config)
    return model.to(device)


def load_pixart(path, num_heads=16, image_size=64, pos_scale=1.0):
    """Loads PixArt-alpha weights (.pth or safetensors, original or diffusers names) into a DiT with control and view
    inputs.

    image_size is in latent pixels. All else follows from the shapes; the control and view weights are at their start,
    so that a single image is PixArt-alpha's. Its empty caption, where the file has one, becomes `model.null_text`.
    Raises ValueError naming the file, and tensors that are missing, left over or of a wrong shape.
    """
    weights, null_text = convert_pixart(load_tensors(path)[0], path)
    width, channels, patch, _ = weights["x_embedder.weight"].shape
    out_channels = len(weights["final_linear.weight"]) // patch ** 2
    text_dim = weights["text_embedder.0.weight"].shape[1]
    depth = sum("attn.qkv.weight" in name for name in weights)
    config = Config(image_size, patch, channels, out_channels, control_channels=2 * channels, num_views=4, depth=depth,
                    width=width, heads=num_heads, text_dim=text_dim, text_length=120, vocab_size=0, output_skip=False,
                    qk_norm=False, pos_scale=pos_scale)
    try:
        model = DiT(config)
    except ValueError as error:
        raise ValueError(f"{path} is no PixArt-alpha model: {error}") from None
    for name in NEW_INPUTS:                                         # not PixArt's: as they start
        weights[name] = model.state_dict()[name]
    if null_text is not None:
        model.null_text = torch.empty(config.text_length, text_dim)
        weights["null_text"] = null_text.float()
    load_strictly(model, weights, path)
    return model


def convert_pixart(source, path="the state_dict"):
    """PixArt-alpha's {name: tensor}, original or diffusers names -> ({our name: tensor}, its empty caption or None).

    Raises ValueError naming tensors that are missing, left over, or no dense numbers of as many dimensions.
    """
    if not all(isinstance(name, str) for name in source):
        raise ValueError(f"{path} is no checkpoint of this project, nor PixArt-alpha's: its tensors have no names")
    source = {name: tensor for name, tensor in source.items() if name not in POSITION_TABLES}
    null_text, weights = None, {}
    for name in EMPTY_CAPTIONS:
        null_text = take_tensor(source, name, 2, path) if name in source else null_text
    for ours, theirs in pixart_table(source).items():
        dims = {".weight": 2, ".bias": 1}
        if theirs.endswith("table"):
            dims = {"": 2}
        elif ours == "x_embedder":
            dims[".weight"] = 4                     # a convolution
        for suffix, dim in dims.items():
            parts = [take_tensor(source, part + suffix, dim, path) for part in theirs.split()]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{path}: {theirs}{suffix} differ in shape")
            weights[ours + suffix] = torch.cat(parts).float()
    if source:
        raise ValueError(f"{path} holds tensors of no PixArt-alpha model: {', '.join(sorted(source)[:4])}")
    return weights, null_text


def take_tensor(source, name, dim, path):
    """Takes a tensor of `dim` dimensions out of {name: tensor}. Raises ValueError naming it where there is none."""
    if name not in source:
        raise ValueError(f"{path} is no checkpoint of this project, nor PixArt-alpha's: {name} is missing")
    tensor = source.pop(name)
    dense = tensor.layout == torch.strided and tensor.is_floating_point()
    if not dense or tensor.dim() != dim or not tensor.numel():
        raise ValueError(f"{path}: {name} must be dense numbers of {dim} dimension(s), not {tensor.layout} "
                         f"{tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def pixart_table(source):
    """{our name of a part: the names in `source`, separated by spaces}, for as many blocks as `source` has."""
    diffusers = "pos_embed.proj.weight" in source
    names, prefix = (1, "transformer_blocks") if diffusers else (0, "blocks")
    numbers = {name.split(".")[1] for name in source if name.startswith(f"{prefix}.")}
    depth = next(k for k in range(len(numbers) + 1) if str(k) not in numbers)       # what stands beyond is left over
    table = {ours: theirs[names] for ours, theirs in PIXART_NAMES.items()}
    for k in range(depth):
        for ours, theirs in PIXART_BLOCK_NAMES.items():
            parts = [f"{prefix}.{k}.{part}" for part in theirs[names].split()]
            table[f"blocks.{k}.{ours}"] = " ".join(parts)
    return table
