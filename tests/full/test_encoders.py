"""full/encoders.py: PixArt's VAE and T5 from disk against their own code, and what sample.py draws through them."""

import sys

import pytest
import torch
import torch.nn.functional as F
from full_stand_ins import CONFIG, full_run, stand_in_text_encoder  # noqa: F401

import sample
from data import LATENT_SCALE, control_maps
from dit import PRESETS, DiT
from full.encoders import Encoders, encode_captions, latent_objects, load_text_encoder, load_vae
from full.objects import read_object, write_toy_objects


def test_encoders_of_diffusers_and_transformers(tmp_path):
    """Tiny random AutoencoderKL and T5 from disk: latents as their own code has them, each caption alone."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "mug": 4, "a": 5},
                                       unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                                         ).save_pretrained(tmp_path / "tokenizer")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=2,
                                                           num_heads=2)).eval()
    t5.save_pretrained(tmp_path / "text_encoder")
    encode, decode = load_vae(f"{tmp_path}/vae")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = encode(images).unbind(1)
    encode_text = load_text_encoder(f"{tmp_path}/text_encoder")
    long, short, empty = encode_text(["A red mug ", "mug", ""])
    assert mean.shape == (2, 4, 4, 4) and (len(long), len(short), len(empty)) == (4, 2, 1)
    with torch.no_grad():
        wanted = vae.encode(images).latent_dist
        decoded = vae.decode(mean).sample
        alone = t5(torch.tensor([[5, 3, 4, 1]])).last_hidden_state[0]
        batch = t5(torch.tensor([[4, 1, 0, 0]]), attention_mask=torch.tensor([[1, 1, 0, 0]])).last_hidden_state
    for ours, theirs in ((mean, wanted.mean), (deviation, wanted.std), (decode(mean * LATENT_SCALE), decoded),
                         (long, alone), (short, batch[0, :2])):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max())  # batch and padding differ


def test_the_empty_caption_is_pixarts_own_where_there_is_one(monkeypatch):
    monkeypatch.setitem(PRESETS, "full", CONFIG)
    model, encode_text = DiT(CONFIG), stand_in_text_encoder("")
    theirs = encode_captions(["a red mug", "a mug"], encode_text, model)
    assert theirs["text"].shape == (2, 120, CONFIG.text_dim) and theirs["text_mask"].sum(dim=1).tolist() == [4, 3]
    assert torch.equal(theirs["null"]["text"][0, 0], encode_text([""])[0][0]) and theirs["null"]["text_mask"].sum() == 1
    model.null_text = torch.randn(120, 32)
    assert torch.equal(encode_captions(["a mug"], encode_text, model)["null"]["text"], model.null_text[None])


def test_what_a_model_of_latents_cannot_draw_is_one_clear_line(full_run):
    run, out = full_run
    write_toy_objects("objects", 1, 64)
    network = sample.load_network("pixart.pth", config=CONFIG)
    encoders = Encoders("vae", "text_encoder")
    for given, words in ((dict(encoders=Encoders("vae", None), prompts=["a mug"]), "--vae and --text_encoder"),
                         (dict(), "give a --prompt"),
                         (dict(prompts=["a mug"], folders=["objects/0000"]), "leave out --prompt"),
                         (dict(folders=["objects/0000"]), "objects/0000 is of 64 x 64 pixels, the model takes 128")):
        with pytest.raises(ValueError, match=words):
            latent_objects(**dict(encoders=encoders, network=network) | given)
    found = latent_objects(encoders, network, prompts=["a mug", "a duck"])
    assert found.objects["captions"] == ["a mug", "a duck"] and list(found.meshes.values()) == [None, None]
    assert found.decode(torch.randn(2, 4, 4, 16, 16)).shape == (2, 4, 3, 128, 128)


def test_objects_come_with_their_maps_as_pictures_and_as_latents(full_run):
    run, out = full_run
    write_toy_objects("objects", 2, 128)
    network = sample.load_network("pixart.pth", config=CONFIG)
    folders = ["objects/0001", "objects/0000/"]
    objects, meshes, _ = latent_objects(Encoders("vae", "text_encoder"), network, folders=folders)
    assert meshes == {"0001": None, "0000": None}
    for k, folder in enumerate(folders):
        caption, views = read_object(folder)
        maps = control_maps(views)[0]
        assert objects["captions"][k] == caption and torch.equal(objects["maps"][k], maps)
        assert torch.equal(objects["position"][k], views.position[0])
        means = [F.avg_pool2d(part, 8) for part in maps.split(3, dim=1)]  # what the stand-in makes of them
        wanted = torch.cat([torch.cat([mean, mean.mean(dim=1, keepdim=True)], dim=1) for mean in means], dim=1)
        assert torch.allclose(objects["control"][k], wanted, atol=1e-5)


def test_a_mesh_comes_with_one_caption(full_run):
    run, out = full_run
    (out / "pyramid.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    network, encoders = sample.load_network("pixart.pth", config=CONFIG), Encoders("vae", "text_encoder")
    objects, meshes, _ = latent_objects(encoders, network, ["a red pyramid"], mesh="pyramid.obj")
    assert [len(mesh.faces) for mesh in meshes.values()] == [4] and list(meshes) == ["pyramid"]
    assert objects["maps"].shape == (1, 4, 6, 128, 128) and objects["control"].shape == (1, 4, 8, 16, 16)
    assert objects["mask"].dtype == torch.uint8 and 0 < (objects["mask"] == 255).float().mean() < 1
    with pytest.raises(ValueError, match="one for --mesh"):
        latent_objects(encoders, network, ["a pyramid", "a mug"], mesh="pyramid.obj")


def test_missing_encoders_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no AutoencoderKL in nowhere"):
        load_vae("nowhere")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        load_vae(str(tmp_path))
