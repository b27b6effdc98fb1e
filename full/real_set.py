"""The real set of the full model (Sec. 5, C.1): what the base model itself draws from the synthetic set's captions.

    python -m full.real_set real --base pixart.safetensors --synthetic latents --text_encoder pixart/text_encoder
    torchrun --nproc_per_node=8 -m full.real_set real --base pixart.safetensors --synthetic latents --text_encoder ...

Four images a caption, asked for as a photograph of the front, right side, back and left side; the view phrase is
dropped in what is trained on. They stay latents, in shards of the same form as the synthetic set's (full/latents.py).
"""
import argparse
import os
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm

from data import LATENT_SCALE, VIEW_PHRASES, real_prompt
from full.encoders import encode_captions, encoder_id, load_text_encoder
from full.latents import check_shard, left_to_write, save_shard, shard_header
from sample import LATENT_CFG_SCALE, Sampling, load_network, sample_images
from support.files import file_id, read_metadata
from support.launch import BAR, a_seed, barrier, check_out, finite, launch, run_cli, some_steps, some_threads


def write_latent_real_set(out, base, synthetic, text_encoder, sampling, launched):
    """Draws four images for each caption of the synthetic set with the base model, over all ranks.

    out: folder, to which a shard for each shard of `synthetic` goes, a folder of `encode_objects`. base: the file of a
    model of latents. text_encoder: folder, as there. sampling: Sampling, of mode "real". A run that was stopped goes
    on; shards of other captions than there are now are drawn again. Each image is a function of its object's name,
    caption and view and of the seed, whatever the number of ranks. Raises UsageError where no shard can be written,
    ValueError where `out` holds shards made otherwise or of other objects.
    """
    config = read_metadata(base).get("config")
    if isinstance(config, dict) and config.get("vocab_size"):
        raise ValueError(f"{base} is of the toy world: python sample.py --real_set draws its real set")
    shards = shards_to_draw(out, synthetic)
    for path in shards:
        check_out(path, "out")
    key = dict(base=file_id(base), text_encoder=encoder_id(text_encoder), seed=sampling.seed,
               num_steps=sampling.num_steps, cfg_scale=sampling.cfg_scale, scale=LATENT_SCALE)
    for path, captions in shards.items():
        if os.path.exists(path):
            check_shard(path, key, list(captions))
    mine = left_to_write(shards, launched, lambda path, captions: shard_header(path)["captions"] == captions)
    if mine:                                                            # T5 takes its time to load
        network, encode_text = load_network(base, launched.device), load_text_encoder(text_encoder, launched.device)
        null_text = encode_text([""])[0].half()
    total = 4 * sum(len(captions) for captions in mine.values())
    with tqdm(total=total, desc="real set, drawn by the base model", unit="image", bar_format=BAR,
              disable=launched.rank > 0) as progress:
        for path, captions in mine.items():
            tensors = draw_shard(network, encode_text, captions, sampling, progress)
            save_shard(path, {"null_text": null_text} | tensors, key, captions)
    barrier(launched)


def shards_to_draw(out, synthetic):
    """{path of a shard in OUT: {object ID: caption}}, one for each shard in `synthetic` and the folders inside it."""
    shards = {}
    for path in sorted(Path(synthetic).rglob("*.safetensors")):
        shards[os.path.join(out, os.path.relpath(path, synthetic))] = shard_header(path)["captions"]
    if not shards:
        raise ValueError(f"{synthetic} holds no shards with captions: write them with python -m full.latents encode")
    return shards


def draw_shard(network, encode_text, captions, sampling, progress):
    """{name: float16 tensor} of a shard of the real set: of each object of captions four views and its text.

    The latents have no deviation: these are drawn as latents, and not images that were encoded.
    """
    places = [(caption, view) for caption in captions.values() for view in VIEW_PHRASES]            # 4 N
    prompts = encode_captions([real_prompt(*place) for place in places], encode_text, network.dit)
    keys = [crc32(f"{name} {view}".encode()) for name in captions for view in VIEW_PHRASES]     # captions may be equal
    images = sample_images(network, prompts, sampling, keys=keys, progress=progress)                # (4 N, 1, C, h, w)
    latents = (images[:, 0] / LATENT_SCALE).half().unflatten(0, (-1, 4))                            # (N, 4, C, h, w)
    texts = encode_text([real_prompt(caption) for caption in captions.values()])
    tensors = {}
    for name, mean, text in zip(captions, latents, texts):
        tensors[f"{name}.color"] = torch.stack([mean, torch.zeros_like(mean)], dim=1)               # (4, 2, C, h, w)
        tensors[f"{name}.text"] = text.half()
    return tensors


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", help="folder to write shards to")
    add("--base", required=True, metavar="FILE", help="the base model: PixArt-alpha's .pth or safetensors, or ours")
    add("--synthetic", required=True, metavar="DIR", help="folder of python -m full.latents encode, whose captions are "
        "drawn")
    add("--text_encoder", required=True, metavar="DIR", help="PixArt's text_encoder folder, with tokenizer beside it "
        "(needs transformers)")
    add("--num_steps", type=some_steps, default=20, help="DDIM steps (default %(default)s)")
    add("--cfg_scale", type=finite, default=LATENT_CFG_SCALE, help="guidance on the text, 1 = none "
        "(default %(default)s)")
    add("--seed", type=a_seed, default=0, help="decides the noise (default %(default)s)")
    add("--threads", type=some_threads, help="CPU threads (default: the fastest in a trial)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    sampling = Sampling(seed=args.seed, num_steps=args.num_steps, cfg_scale=args.cfg_scale, batch=16)
    launched = launch(args.threads)
    write_latent_real_set(args.out, args.base, args.synthetic, args.text_encoder, sampling, launched)
    if launched.rank == 0:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
