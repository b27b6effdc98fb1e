"""The prior of CAD (related/cad.py): a view-conditioned diffusion model, as Zero-1-to-3 (Liu et al. 2023).

    python -m related.view_prior                                # fine-tunes the base model on pairs of renders

It draws the object of a reference image from another pose: the reference comes through the control channels, the pose
beside the time embedding and, as the ray of each pixel, through the control channels too. Of 2,000 assets where
--num_assets does not say otherwise.
"""
import argparse
from dataclasses import replace

import torch
import torch.nn as nn

from data import SEEDS
from dit import PRESETS, DiT, require_config
from full.pixart import load_base
from related.triplanes import rays
from sample import Sampling, sample_images
from support.files import load_strictly, load_tensors, read_metadata
from support.launch import on_rank_0_first, run_cli
from support.pictures import save_picture, to_uint8
from toy.poses import BAND, VIEWS_EACH, pose_numbers, pose_set, view_control
from toy.world import tokenize
from training.estimate import choose, launch_training
from training.flags import parse_training, refuse_unread, training_arguments
from training.loop import Iteration, save_trained, train
from training.sets import base_model

CONTROL_CHANNELS = 3 + 6                # the reference's colours and a ray

# ---------------------------------------------------------------------------------------------------------------------
# The network


class PoseEmbedding(nn.Module):
    """A pose (B, 4), see `pose_numbers`, as a vector (B, d) beside the time embedding; zero before training."""
    kind = "pose"

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, pose):
        return self.layers(pose)


def ray_map(pose, size):
    """The ray of each pixel of a view from poses (B, 4), see `pose_numbers`: where it starts and where it points, in
    the frame of the reference -> (B, 6, size, size); zeros where the pose is zeros. (A product of pose and place, which
    a network is slow to find: docs/cad.md.)"""
    azimuth = torch.rad2deg(torch.atan2(pose[:, 0], pose[:, 1]))
    middle, half = sum(BAND) / 2, (BAND[1] - BAND[0]) / 2
    origins, direction = rays(azimuth, middle + half * pose[:, 2], size)                            # (B, M, 3), (B, 3)
    both = torch.cat([origins, direction[:, None].expand_as(origins)], dim=2)
    known = pose[:, :2].square().sum(dim=1)                             # 1 of a pose, 0 of none
    return (known[:, None, None] * both).transpose(1, 2).unflatten(2, (size, size))


class ViewPrior(nn.Module):
    """A DiT that draws the object of a reference image from another pose: the reference and the rays come through the
    control channels, the pose beside the time."""
    shifters = None

    def __init__(self, dit):
        super().__init__()
        self.dit, self.adapter, self.pose = dit, PoseEmbedding(dit.config.width), None
        dit.t_embedder.register_forward_hook(self.beside_the_time)

    def beside_the_time(self, module, inputs, out):
        """A hook: the time embedding (B, d) and the pose's."""
        return out + self.adapter(self.pose).to(out.dtype)

    @property
    def knows_domains(self):
        """Realiz3D's domains are no input here."""
        return False

    def forward(self, x, t, text, control, domains=None):
        """As `DiT.forward`; control (B, 1, 7, H, W): see `view_control`, all zeros where there is no reference."""
        self.pose = control[:, 0, 3:, 0, 0].to(x)                                                   # (B, 4)
        rays_of_pixels = ray_map(self.pose, x.shape[-1])[:, None]                                   # (B, 1, 6, H, W)
        return self.dit(x, t, text, control=torch.cat([control[:, :, :3].to(x), rays_of_pixels], dim=2))


def new_prior(base):
    """ViewPrior on the weights of a base model: what its control channels were is left out."""
    dit = DiT(replace(base.config, control_channels=CONTROL_CHANNELS, num_views=0))
    kept = {name: tensor for name, tensor in base.state_dict().items()
            if name not in ("control_embedder.weight", "view_encoding")}
    dit.load_state_dict(kept | {"control_embedder.weight": dit.control_embedder.weight})
    return ViewPrior(dit)


def load_prior(path, device="cpu"):
    """ViewPrior from its file. Raises ValueError where it is another thing."""
    if read_metadata(path).get("adapter_kind") != PoseEmbedding.kind:
        raise ValueError(f"{path} holds no view-conditioned model: train one with python -m related.view_prior")
    weights, _ = load_tensors(path)
    prior = ViewPrior(load_base(path))
    require_config(path, prior.dit.config, replace(PRESETS["toy"], control_channels=CONTROL_CHANNELS, num_views=0))
    load_strictly(prior.adapter, {name.removeprefix("adapter."): tensor.float() for name, tensor in weights.items()
                                  if name.startswith("adapter.")}, path)
    return prior.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_prior(args, launched):
    """Fine-tunes the base model on pairs of renders -> OUT/NAME.safetensors, and a picture of held-out objects."""
    folder, device = f"{args.out}/sets", launched.device
    torch.manual_seed(args.seed)
    prior = new_prior(base_model(args, device)).to(device)
    pairs = on_rank_0_first(launched, lambda: pose_set(args.num_assets, folder=folder, device=device))
    held = on_rank_0_first(launched, lambda: pose_set(12, SEEDS["evaluation"], folder=folder, device=device))
    held = {name: value[::VIEWS_EACH] for name, value in held.items()}           # one view of each

    def plan(step):
        return Iteration("syn", step, views=1, control=True, control_dropout=0.1)

    def preview(path):
        drawn = sample_images(prior, held, Sampling(num_steps=args.picture_steps))
        rows = [("reference", to_uint8(held["control"][:, 0, :3].float())), ("drawn", to_uint8(drawn)[:, 0]),
                ("truth", held["image"][:, 0])]
        save_picture(path, rows)
    losses = train(prior, {"syn": pairs}, {"text": tokenize([""])}, plan, args, launched, preview)
    return save_trained(f"{args.out}/{args.name}.safetensors", prior, args, losses, launched, keep=("model", "adapter"))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def poses_around(num):
    """num poses spread evenly over the band that the toy renders: azimuth, elevation (num,) in degrees. (A spiral: the
    azimuth turns by the golden angle, the elevation's sine rises evenly.)"""
    k = torch.arange(num) + 0.5
    low, high = (torch.deg2rad(torch.tensor(float(end))).sin() for end in BAND)
    return (k * 137.50776) % 360, torch.rad2deg((low + (high - low) * k / num).asin())


def draw_views(prior, reference, reference_elevation, poses, sampling, keys=None, progress=None):
    """The reference (3, H, W) in [-1, 1], which is seen from azimuth 0, from each of the poses (azimuth, elevation
    (N,)): (N, 3, H, W) in [-1, 1]. keys: as for `sample_images`. sampling.cfg_scale: guidance on the reference."""
    azimuth, elevation = poses
    numbers = pose_numbers(azimuth, elevation, torch.full_like(elevation, reference_elevation))
    control = view_control(reference.expand(len(azimuth), -1, -1, -1), numbers)
    inputs = dict(text=tokenize([""]).expand(len(azimuth), -1), control=control,
                  null={"control": torch.zeros_like(control[:1])})
    return sample_images(prior, inputs, sampling, keys=keys, progress=progress)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    training_arguments(parser)
    parser.set_defaults(adapter=None, rank=None, num_assets=2000)
    args = parse_training(parser, "-m related.view_prior", argv)
    refuse_unread(parser, args, ["synthetic", "real", "real_steps", "text_dropout"], "here: it learns from pairs of "
                  "renders, without words")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.preset == "toy":                    # no other has this training
        base_model(args, "cpu")                 # what is wrong with it is named before a trial of the speed
    launched = launch_training(args, "view_prior", __name__ == "__main__")
    choose(args, launched, args.name)
    train_prior(args, launched)


if __name__ == "__main__":
    run_cli(main)
