"""PixArt-alpha's encoders, which the full configuration works through: its VAE (maps and images, Sec. 4) and its T5.

    encode_image, decode = load_vae("pixart/vae", device)               # needs diffusers
    encode_text = load_text_encoder("pixart/text_encoder", device)      # needs transformers, and PixArt's "tokenizer"
    objects, meshes, decode = latent_objects(encoders, network, prompts, mesh, folders)     # what sample.py draws

Both run as they are and are never trained. Their folders are those of huggingface.co/PixArt-alpha/PixArt-XL-2-512x512.
"""
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import LATENT_SCALE, control_maps
from full.objects import read_object
from geometry.files import read_mesh
from geometry.mesh import mesh_views
from support.pictures import to_uint8


class Encoders(NamedTuple):
    """The folders of PixArt's encoders, as --vae and --text_encoder name them."""
    vae: str
    text_encoder: str


# ---------------------------------------------------------------------------------------------------------------------
# From disk


def load_vae(folder, device="cpu"):
    """PixArt's VAE -> (encode, decode). folder: a diffusers AutoencoderKL. Needs the diffusers package.

    encode(images (N, 3, H, W) in [-1, 1]) -> mean and deviation (N, 2, C, H / 8, W / 8), unscaled, of the latents;
    decode(latents (N, C, h, w), scaled) -> images in [-1, 1]. Both on the CPU.
    """
    AutoencoderKL = optional_class("diffusers", "AutoencoderKL", folder, "vae")
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).to(device).eval()

    @torch.no_grad()
    def encode(images):
        latents = vae.encode(images.to(device)).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1).cpu()

    @torch.no_grad()
    def decode(latents):
        one_by_one = latents.float().split(1)
        return torch.cat([vae.decode(one.to(device) / LATENT_SCALE).sample.cpu() for one in one_by_one])
    return encode, decode


def load_text_encoder(folder, device="cpu", length=120):
    """PixArt's T5 -> encode(captions) -> a list of (n, D) vectors, one for each of the n tokens of a caption, the last
    being the end of the sentence; n is cut at length.

    folder: a T5EncoderModel; its tokenizer lies there too, or beside it in "tokenizer". Needs the transformers package.
    """
    T5EncoderModel = optional_class("transformers", "T5EncoderModel", folder, "text_encoder")
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder), local_files_only=True)
    except ImportError:
        raise ValueError("T5's tokenizer needs more packages: pip install sentencepiece protobuf") from None
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32        # in float16 T5 overflows
    t5 = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype).to(device).eval()

    @torch.no_grad()
    def encode(captions):
        vectors = []
        for caption in captions:                                        # each alone, so that none depends on others
            ids = tokenizer(caption.lower().strip(), truncation=True, max_length=length).input_ids
            vectors.append(t5(torch.tensor([ids], device=device)).last_hidden_state[0].float().cpu())
        return vectors
    return encode


def tokenizer_folder(text_encoder):
    """PixArt's folder "tokenizer" beside the text encoder, or the text encoder's own."""
    beside = os.path.join(os.path.dirname(os.path.abspath(text_encoder)), "tokenizer")
    return beside if os.path.isdir(beside) else text_encoder


def optional_class(package, name, folder, part):
    """A class of an optional package that reads a model folder. Raises with what to install or where to get it."""
    if not os.path.isfile(f"{folder}/config.json"):
        raise FileNotFoundError(f"no {name} in {folder}: get the files of huggingface.co/PixArt-alpha/PixArt-XL-2-"
                                f"512x512 and name its folder {part}")
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError:
        raise ValueError(f"{name} needs the {package} package: pip install {package}") from None


def encoder_id(folder):
    """Name of a model folder and a checksum of the sizes and first bytes of its configuration, weights, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({*Path(folder).glob("*"), *Path(tokenizer_folder(folder)).glob("*")}):
        if path.suffix in (".json", ".safetensors", ".bin", ".model") and path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return f"{os.path.basename(os.path.abspath(folder))} {digest.hexdigest()[:12]}"


# ---------------------------------------------------------------------------------------------------------------------
# As the model takes it


def padded(words, length):
    """Tokens (n, D) -> (length, D), zeros at the end, and a mask (length,), True where there were any."""
    return F.pad(words, (0, 0, 0, length - len(words))), torch.arange(length) < len(words)


def encode_captions(captions, encode_text, dit):
    """Captions as `sample_images` takes them: text (N, L, D), text_mask (N, L), and null, the empty caption: PixArt's
    own if dit has it, else the text encoder's."""
    text = padded_captions(captions, encode_text, dit.config.text_length)
    if dit.null_text is None:
        return text | {"null": padded_captions([""], encode_text, dit.config.text_length)}
    return text | {"null": {"text": dit.null_text[None]}}


def padded_captions(captions, encode_text, length):
    """Captions -> text (N, L, D) and text_mask (N, L)."""
    pairs = [padded(words, length) for words in encode_text(captions)]
    return {"text": torch.stack([text for text, _ in pairs]), "text_mask": torch.stack([mask for _, mask in pairs])}


# ---------------------------------------------------------------------------------------------------------------------
# What sample.py draws with a model of latents


class LatentObjects(NamedTuple):
    """Objects to draw, as the toy's `chosen_objects` gives them, and the way back to pixels."""
    objects: dict       # see `latent_objects`
    meshes: dict        # {name: Mesh, or None for the hull of the views}, in the order of the objects
    decode: Callable    # latents (N, V, C, h, w), scaled -> images (N, V, 3, H, W) in [-1, 1]


def latent_objects(encoders, network, prompts=None, mesh=None, folders=None):
    """LatentObjects of captions, of a mesh with one caption, or of rendered objects, which bring theirs.

    encoders: Encoders; they run on the device of network, a ShiftedDiT. prompts: list of captions. mesh: a file that
    `read_mesh` reads. folders: of rendered objects. objects holds "captions" and what `encode_captions` returns; of a
    mesh and of rendered objects also "maps" (N, V, 6, H, W), the control as pictures, "control" (N, V, 2 C, h, w),
    scaled latents of the maps, "position" (N, V, 3, H, W) and "mask" uint8 (N, V, 1, H, W). Raises ValueError where
    these do not go together or do not fit the model.
    """
    if not (encoders.vae and encoders.text_encoder):
        raise ValueError("a model of latents needs PixArt's encoders: name their folders with --vae and --text_encoder")
    if folders and prompts:
        raise ValueError("--objects bring their own captions: leave out --prompt")
    size, device = 8 * network.dit.config.image_size, network.dit.positions.device
    captions, drawn = prompts or [], []
    meshes = dict.fromkeys(range(len(captions)))
    if mesh:
        shape = read_mesh(mesh)
        drawn, meshes = [mesh_views(shape, size)], {Path(mesh).stem: shape}
    elif folders:
        captions, drawn = read_objects(folders, size)
        meshes = dict.fromkeys(os.path.basename(os.path.abspath(folder)) for folder in folders)
    if len(captions) != len(meshes) or not captions:
        raise ValueError("give a --prompt, one for --mesh, or rendered objects with --objects")
    encode_image, decode = load_vae(encoders.vae, device)
    objects = encode_captions(captions, load_text_encoder(encoders.text_encoder, device), network.dit)
    objects["captions"] = captions
    if drawn:
        objects |= encoded_views(drawn, encode_image)

    def decode_views(latents):
        return decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return LatentObjects(objects, meshes, decode_views)


def read_objects(folders, size):
    """([caption, ...], [Views, ...]) of rendered objects, which must be of size x size pixels."""
    captions, drawn = [], []
    for folder in folders:
        caption, views = read_object(folder)
        if views.mask.shape[-2:] != (size, size):
            raise ValueError(f"{folder} is of {views.mask.shape[-1]} x {views.mask.shape[-2]} pixels, the model takes "
                             f"{size}")
        captions.append(caption)
        drawn.append(views)
    return captions, drawn


def encoded_views(drawn, encode_image):
    """[Views of one object, ...] -> "maps", "control", "position" and "mask" of `latent_objects`."""
    maps = torch.cat([control_maps(views) for views in drawn])                                      # (N, V, 6, H, W)
    latents = []
    for view in maps.flatten(0, 1):                                     # normal and position map of one view at a time
        mean = encode_image(view.unflatten(0, (2, 3)))[:, 0]                                        # (2, C, h, w)
        latents.append(mean.flatten(0, 1))
    control = LATENT_SCALE * torch.stack(latents).unflatten(0, maps.shape[:2])                      # (N, V, 2 C, h, w)
    mask = torch.cat([views.mask for views in drawn])
    return dict(maps=maps, control=control, position=torch.cat([views.position for views in drawn]),
                mask=to_uint8(2 * mask - 1))
