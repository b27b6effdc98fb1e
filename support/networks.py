"""The pretrained networks behind FID, LPIPS and CLIP: files that the user has; nothing is downloaded."""
import os

import torch

from support.files import load_tensors


def load_inception(path, device="cpu"):
    """Everybody's FID network: images (N, 3, H, W) in [0, 1] -> features (N, 2048), resizing them itself.

    path: inception-2015-12-05.pt, the TorchScript file that StyleGAN's repositories name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no Inception network at {path}: get inception-2015-12-05.pt from nvlabs-fi-cdn.nvidia"
                                ".com/stylegan2-ada-pytorch/pretrained/metrics/ and name it with --inception")
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        raise ValueError(f"{path} is not a TorchScript file; --inception wants inception-2015-12-05.pt") from None

    @torch.no_grad()
    def features(images):
        return net((images * 255).round().byte().to(device), return_features=True).float().cpu()
    try:
        works = bool(features(torch.zeros(1, 3, 32, 32)).isfinite().all())
    except (RuntimeError, AttributeError):
        works = False
    if not works:
        raise ValueError(f"{path} gives no features of an image; --inception wants inception-2015-12-05.pt")
    return features


LPIPS_LAYERS = (("net.slice1.0", 4, 2), ("net.slice2.3", 1, 2), ("net.slice3.6", 1, 1), ("net.slice4.8", 1, 1),
                ("net.slice5.10", 1, 1))                    # AlexNet's convolutions: name, stride, padding
LPIPS_SHAPES = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))


def load_lpips(path):
    """The weights of LPIPS on AlexNet, from a file of torch.save or safetensors: {name: tensor}, the convolutions of
    LPIPS_LAYERS and a linear layer lin0, .. for each. Raises where one is missing, of another shape or not finite."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no LPIPS weights at {path}: pip install lpips, then python -c \"import lpips, torch; "
                                f"torch.save(lpips.LPIPS(net='alex').state_dict(), '{path}')\"")
    weights = load_tensors(path)[0]
    for k, ((name, _, _), shape) in enumerate(zip(LPIPS_LAYERS, LPIPS_SHAPES)):
        expected = {f"{name}.weight": shape, f"{name}.bias": shape[:1], f"lin{k}.model.1.weight": (1, shape[0], 1, 1)}
        for part, wanted in expected.items():
            found = weights.get(part, torch.empty(0))
            if tuple(found.shape) != wanted or not found.isfinite().all():
                raise ValueError(f"{path} lacks {part} {wanted}, or it is of another shape or not finite: --lpips "
                                 "wants the state_dict of lpips.LPIPS(net='alex')")
    return weights


def load_clip(folder, device="cpu"):
    """embed(images (N, 3, H, W) in [0, 1], N captions) -> embeddings of both, (N, F) and (N, F), by a CLIP model.

    folder: as Hugging Face has it (openai/clip-vit-base-patch32: config.json, model.safetensors, tokenizer and
    preprocessor files). Needs the transformers package.
    """
    if not os.path.isfile(f"{folder}/config.json"):
        raise FileNotFoundError(f"no CLIP model in {folder}: get the files of huggingface.co/openai/clip-vit-base-"
                                "patch32 into a folder and name it with --clip")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise ValueError("--clip needs the transformers package: pip install transformers") from None
    model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed(images, captions):
        inputs = processor(text=captions, images=list((images * 255).round().byte()), return_tensors="pt", padding=True,
                           truncation=True).to(device)
        embedded = model(**inputs)
        return embedded.image_embeds.cpu(), embedded.text_embeds.cpu()
    return embed
