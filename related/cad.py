"""CAD (arXiv 2312.06663): a 3D generator, distilled by an adversary from what a diffusion model believes about one
reference image.

    python -m related.cad --object 9 --prompt "a blue metal teapot"                 # the shipped generator's sheet
    python -m related.cad --object 4 --prompt "a blue wooden car"                   # all steps for one reference
    python -m related.cad --reference mug.png --prompt "a red wooden mug" --name mug --mesh meshes

Score distillation seeks one mode of the diffusion model: too smooth, too saturated, with two faces. CAD draws many
views of the reference first, mends and sorts them, and trains a 3D GAN to draw *their distribution*:

    1  prior        a view-conditioned diffusion model draws the object from poses all around      `draw_views`
    2  refinement   SDEdit by the photographic base model, with the view's name in the prompt      `refine`
                    or, with --depth, by Realiz3D's texturing model under a depth condition        `refine_by_depth`
    3  pruning      of the samples of a pose, those that disagree with the others are dropped       `agree_with_others`
    4  3D GAN       no pose for the generator, the pose for the discriminator; R1, ADA              `stage1_losses`
    5  two stages   images enlarged by convolutions; then the planes, so that all views agree       `stage2_losses`
    6  use          samples, ways between them, the reference's own w (inversion), meshes           `write_sheets`

Steps 1 to 3 are in related/cad_samples.py (the depth condition in related/depth_condition.py), the networks in
related/triplanes.py. To resume, run it again.
"""
import argparse
import json
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import held_objects
from geometry.camera import ELEVATION
from geometry.hull import silhouette
from geometry.mesh import surface_mesh
from geometry.texture import save_meshes
from related.cad_samples import load_models, reference_samples, samples_key, view_phrase
from related.triplanes import (SAMPLES_A_RAY, SIZE, WINDOW, Discriminator, Generator, Z, adapted, augment, enlarged, r1,
                               windows)
from support.files import checksum, load_strictly, load_tensors, read_metadata, run_or_shipped, save_tensors
from support.folders import read_image
from support.generators import GAN, seeded_generator, seeded_words
from support.launch import a_seed, check_out, launch, run_cli, some_steps, some_threads, within
from support.pictures import save_picture, to_pixels, to_uint8
from toy.judge import train_feature_net
from toy.poses import BAND, pose_numbers
from toy.world import refuse_unknown_words
from training.flags import check_name, parse_training, refuse_unread
from training.loop import signals_caught
from training.states import Trained, hold, load_state, save_state, stored_speed

GAN_VERSION = 2         # to be raised when the same weights would be drawn, or trained, otherwise
R1_EVERY = 8            # steps between those with R1, which is weighed up for it (StyleGAN2)

# ---------------------------------------------------------------------------------------------------------------------
# 4, 5. The 3D GAN in two stages


class Batch(NamedTuple):
    """What a step of the GAN starts from, a pure function of (seed, stage, step)."""
    real: torch.Tensor                  # (B, 3, SIZE, SIZE) in [-1, 1]
    pose: torch.Tensor                  # (B, 3), theirs, see `pose_numbers`
    z: torch.Tensor                     # (B, Z)
    azimuth: torch.Tensor               # (B,), of what is drawn, with elevation
    elevation: torch.Tensor
    fake_pose: torch.Tensor             # (B, 3), the same
    generator: torch.Generator          # of the CPU, of the random numbers that follow


def gan_batch(samples, stage, step, args):
    """The Batch of a step: samples and poses are drawn with the chances that they have among the samples."""
    generator, device = seeded_generator(GAN, args.seed, stage, step), samples["image"].device
    pick, of_fake = torch.randint(len(samples["image"]), (2, args.batch), generator=generator).to(device)
    azimuth, elevation = samples["azimuth"], samples["elevation"]
    return Batch(to_pixels(samples["image"][pick]), pose_numbers(azimuth[pick], elevation[pick]),
                 torch.randn(args.batch, Z, generator=generator).to(device), azimuth[of_fake], elevation[of_fake],
                 pose_numbers(azimuth[of_fake], elevation[of_fake]), generator)


def discriminator_loss(fake_scores, real_scores, real, step, gamma):
    """Non-saturating loss (Goodfellow et al. 2014), and at some steps R1, which is weighed up for the others."""
    loss = F.softplus(fake_scores).mean() + F.softplus(-real_scores).mean()
    return loss + R1_EVERY * gamma * r1(real_scores, real) if step % R1_EVERY == 0 else loss


def stage1_losses(nets, samples, step, share, args):
    """Stage 1 at a step: the losses of the generator and of the discriminator, and its scores of real images.

    The discriminator sees an image and what volumetric rendering alone gives of it (EG3D's dual discrimination); of
    real ones the second is the image at half the size. share: how many are augmented.
    """
    G, D, batch = nets["generator"], nets["discriminator"], gan_batch(samples, 1, step, args)
    jitter = torch.rand(args.batch, (SIZE // 2) ** 2, SAMPLES_A_RAY, generator=batch.generator).to(batch.z.device)
    fake = torch.cat(G.draw(G.style(batch.z), batch.azimuth, batch.elevation, jitter), dim=1)       # (B, 6, H, W)
    real = torch.cat([batch.real, enlarged(F.avg_pool2d(batch.real, 2))], dim=1).requires_grad_()
    fakes, reals = augment(fake, share, batch.generator), augment(real, share, batch.generator)
    real_scores = D(reals, batch.pose)
    loss_D = discriminator_loss(D(fakes.detach(), batch.fake_pose), real_scores, real, step, args.gamma)
    return F.softplus(-D(fakes, batch.fake_pose)).mean(), loss_D, real_scores.detach()


def stage2_losses(nets, samples, step, share, args):
    """Stage 2, likewise: the planes are enlarged, the rest of the generator stays as it is. A window of the image is
    drawn: it must look real, and like stage 1's image there, to a network's features and by pixels; without ADA (share
    is 0)."""
    G, D, batch = nets["generator"], nets["discriminator"], gan_batch(samples, 2, step, args)
    with torch.no_grad():
        w = G.style(batch.z)
        whole, _ = G.draw(w, batch.azimuth, batch.elevation)
    jitter = torch.rand(args.batch, WINDOW ** 2, SAMPLES_A_RAY, generator=batch.generator).to(batch.z.device)
    corner = torch.randint(SIZE - WINDOW + 1, (2, args.batch, 2), generator=batch.generator)
    fake, _, _ = G.draw_lifted(w, batch.azimuth, batch.elevation, jitter, corner[0])
    branch, real = windows(whole, corner[0]), windows(batch.real, corner[1]).requires_grad_()
    real_scores = D(real, batch.pose)
    loss_D = discriminator_loss(D(fake.detach(), batch.fake_pose), real_scores, real, step, args.gamma)
    features = nets["judge"].body
    alike = (features(fake) - features(branch)).square().mean() + (fake - branch).square().mean()
    return F.softplus(-D(fake, batch.fake_pose)).mean() + args.branch_weight * alike, loss_D, real_scores.detach()


def gan_step(losses, parts, optimizers):
    """Generator and discriminator, {name: parameter} each, learn from their losses, at the weights that both had."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    for loss, part in zip(losses, parts):
        # not autograd.grad: what it gives may lie channels last in memory, and the fused Adam heeds no strides
        loss.backward(inputs=list(part.values()))
    for optimizer in optimizers:
        optimizer.step()


def stage_settings(stage, args):
    """The flags that decide what a stage learns from its samples, as `save_state` stores them."""
    own = dict(steps=args.steps) if stage == 1 else dict(steps=args.lift_steps, branch_weight=args.branch_weight)
    shared = {flag: getattr(args, flag) for flag in ("batch", "lr", "gamma", "seed")}
    return argparse.Namespace(**own, **shared, dtype="float32", compile=False)


def train_stage(stage, G, samples, judge, args):
    """Trains stage 1, or 2, of the generator on the samples, or goes on; at the end G holds the running averages.

    States go to OUT/NAME/stageN. Raises FloatingPointError at a loss that is not finite.
    """
    out, settings = f"{args.out}/{args.name}/stage{stage}", stage_settings(stage, args)
    steps = settings.steps
    torch.manual_seed(int(seeded_words(GAN, args.seed, 0, stage)[0] >> 1))
    D = (Discriminator(6, SIZE) if stage == 1 else Discriminator(3, WINDOW)).to(samples["image"].device)
    of_G = {f"generator.{name}": p for name, p in G.named_parameters() if name.startswith("lift") == (stage == 2)}
    of_D = {f"discriminator.{name}": p for name, p in D.named_parameters()}
    optimizers = [torch.optim.Adam([dict(params=list(part.values()))], lr=args.lr, betas=(0.0, 0.99), fused=True)
                  for part in (of_G, of_D)]
    share = torch.zeros(1)                                              # of augmented images (ADA)
    averages = {f"average.{name}": p.detach().clone() for name, p in of_G.items()}
    trained = Trained(of_G | of_D | averages | {"share": share}, {}, optimizers)
    made = dict(version=GAN_VERSION, samples=checksum(samples), generator=checksum(dict(G.named_parameters())))
    start = load_state(out, trained, settings, 1, made)
    nets, losses = dict(generator=G, discriminator=D, judge=judge), (stage1_losses, stage2_losses)[stage - 1]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"{args.name}, stage {stage}")
    with signals_caught() as stop:
        for step in bar:
            loss_G, loss_D, real_scores = losses(nets, samples, step, share.item(), args)
            if not (loss_G + loss_D).isfinite():
                raise FloatingPointError(f"{args.name}, stage {stage}: the loss is not finite at step {step}: try "
                                         "another --gamma, a lower --lr or another --seed")
            gan_step((loss_G, loss_D), (of_G, of_D), optimizers)
            if stage == 1:
                share.fill_(adapted(share.item(), real_scores))
            keep = min(0.998, (step + 1) / (step + 10))         # over the last ninth of the steps, at most 500
            torch._foreach_lerp_(list(averages.values()), [p.detach() for p in of_G.values()], 1 - keep)
            last = step + 1 == steps
            if last or (step + 1) % 20 == 0:
                bar.set_postfix_str(f"discriminator {loss_D.item():.2f}, augmented {share.item():.2f}")
            if last or stop["now"] or (step + 1) % args.save_every == 0:
                save_state(out, step + 1, trained, settings, 1, made)
            if stop["now"]:
                bar.close()
                print(f"{args.name}: stopped by a signal at step {step + 1}; the same command goes on from there")
                raise SystemExit(128 + stop["now"])
    for name, p in of_G.items():
        p.data.copy_(averages[f"average.{name}"])


# ---------------------------------------------------------------------------------------------------------------------
# 6. Use


def gan_noise(G, num, seed, number):
    """z (num, Z), a function of seed and number alone, where the generator G is."""
    return torch.randn(num, Z, generator=seeded_generator(GAN, seed, 0, number)).to(G.start.device)


def invert(G, image, pose, judge, steps, each_layer=True):
    """The w (1, layers, W) with which the generator draws image (3, H, W) in [-1, 1] at pose (azimuth, elevation):
    one for each layer (w+), or the same for all."""
    w = G.style(gan_noise(G, 256, 0, 3)).mean(dim=0, keepdim=True).detach()
    w = (w if each_layer else w[:, :1]).clone().requires_grad_()
    pose, image = [torch.tensor([float(angle)], device=w.device) for angle in pose], image[None].to(w.device)
    optimizer = torch.optim.Adam([w], lr=0.03)
    for _ in range(steps):
        drawn, _, _ = G.draw_lifted(w.expand(-1, G.layers, -1), *pose)
        loss = (judge.body(drawn) - judge.body(image)).square().mean() + 4 * (drawn - image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return w.detach().expand(-1, G.layers, -1)


@torch.no_grad()
def turned(G, w, num=8):
    """Images uint8 (num, 3, H, W) of one w (1, layers, W) from num azimuths, and of the depth, bright where near."""
    azimuth = 360 / num * torch.arange(num, device=w.device)
    image, opacity, depth = G.draw_lifted(w.expand(num, -1, -1), azimuth, torch.full_like(azimuth, ELEVATION))
    near = (0.5 - depth).clamp(0, 1) * opacity
    return to_uint8(image).cpu(), to_uint8(2 * near.expand(-1, 3, -1, -1) - 1).cpu()


def write_sheets(G, reference, judge, args):
    """Writes OUT/NAME.png: the reference, four objects from eight sides (the first also as depth, and as stage 1 drew
    it), a way between two of them, the reference inverted in w and w+; and with --mesh each object as GLB."""
    w = G.style(gan_noise(G, 4, args.seed, 4))
    azimuth, front = 45.0 * torch.arange(8, device=w.device), torch.zeros(8, device=w.device)
    level = torch.full_like(azimuth, ELEVATION)
    rows = [("reference", to_uint8(reference)[None])]
    for k in range(4):
        image, depth = turned(G, w[k:k + 1])
        rows.append((f"object {k + 1}", image))
        if k == 0:
            with torch.no_grad():
                before, _ = G.draw(w[:1].expand(8, -1, -1), azimuth, level)
            rows += [("its depth", depth), ("in stage 1", to_uint8(before).cpu())]
    between = torch.lerp(w[:1], w[1:2], torch.linspace(0, 1, 8, device=w.device)[:, None, None])
    with torch.no_grad():
        way, _, _ = G.draw_lifted(between, front, level)
    rows.append(("from 1 to 2", to_uint8(way).cpu()))
    for name, each_layer in (("reference in w", False), ("in w+", True)):
        own = invert(G, reference, (0, args.elevation), judge, args.invert_steps, each_layer)
        rows.append((name, turned(G, own)[0]))
    save_picture(f"{args.out}/{args.name}.png", rows, column_titles=[f"{45 * k} degrees" for k in range(8)])
    print(f"wrote {args.out}/{args.name}.png")
    if args.mesh:
        meshes = {f"{args.name}_{k + 1}": field_mesh(G, w[k:k + 1]) for k in range(4)}
        images = torch.stack([to_pixels(turned(G, w[k:k + 1], num=4)[0]) for k in range(4)])
        save_meshes(args.mesh, meshes, {"cad": images})


@torch.no_grad()
def field_mesh(G, w, size=64, density=5.0):
    """Mesh of where the density of one w (1, layers, W) passes `density`."""
    line = torch.linspace(-0.5, 0.5, size, device=w.device)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(1, -1, 3)
    matter, _ = G.field(G.planes(w, stage=2))(points)
    matter = F.pad(matter.view(size, size, size)[1:-1, 1:-1, 1:-1], (1,) * 6)       # nothing lies outside the cube
    return surface_mesh(density - matter.cpu(), 0.5)


def read_reference(args):
    """The reference (3, SIZE, SIZE) in [-1, 1]: of --reference, a picture before white, padded to a square, or of
    --object, a held-out asset's render from the front."""
    if args.reference is not None:
        image = read_image(args.reference)                              # (3, H, W) in [0, 1]
        height, width = image.shape[1:]
        side = max(height, width)
        if side > 16 * min(height, width) or not silhouette(image).any():
            raise ValueError(f"--reference {args.reference} shows no object before white, or is a strip of {width} x "
                             f"{height} pixels")
        left, top = (side - width) // 2, (side - height) // 2
        square = F.pad(image, (left, side - width - left, top, side - height - top), value=1.0)
        return 2 * F.interpolate(square[None], (SIZE, SIZE), mode="area")[0] - 1
    return to_pixels(held_objects([args.object])["image"][0, 0])


def distill(args):
    """All steps for one reference -> OUT/NAME.safetensors, the generator, and OUT/NAME.png."""
    path, folder = f"{args.out}/{args.name}.safetensors", f"{args.out}/{args.name}"
    before = stored_speed([f"{folder}/stage2", f"{folder}/stage1"])     # as many threads as the run that was stopped
    for kept in (f"{folder}/samples.safetensors", f"{args.out}/sets/cad_00000000.safetensors"):
        check_out(kept)
    models = load_models(args)
    device = where_it_trains(launch(args.threads or before.get("threads")))
    models = [model.to(device) for model in models]
    if args.mesh:
        check_out(f"{args.mesh}/{args.name}.glb", "--mesh")
    reference, judge = read_reference(args), train_feature_net(f"{args.out}/sets")
    key = generator_key(reference, args)
    lock = hold(folder)
    found = fitting_generator(key, args)
    if os.path.isfile(path) and not found:
        raise ValueError(f"{path} is no generator of CAD, or was made from another reference, prior or refining "
                         "model, or with other flags: use another --name or folder, or delete it")
    if not found:
        print(f"{args.name}: {args.num_poses} poses x {args.each} samples, refined and sorted; {args.steps} steps of "
              f"stage 1, {args.lift_steps} of stage 2, of {args.batch} images; into {folder}", flush=True)
        samples = reference_samples(models, reference, judge, args)
        samples = {name: part.to(device) for name, part in samples.items()}
        torch.manual_seed(int(seeded_words(GAN, args.seed, 0, 0)[0] >> 1))
        G = Generator().to(device)
        for stage in (1, 2):
            train_stage(stage, G, samples, judge.to(device), args)
        weights = {name: p.half() for name, p in G.state_dict().items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise FloatingPointError(f"{args.name}: weights too large for 16 bits: delete {folder}/stage*, and try a "
                                     "lower --lr")
        save_tensors(path, weights, made=key, command=args.command)
    write_sheets(load_generator(found or path, device), reference, judge.to(device), args)
    del lock


def where_it_trains(launched):
    """The GPU, if it is one of CUDA, else the CPU, beside Apple's too."""
    return launched.device if launched.device.type == "cuda" else torch.device("cpu")


def generator_key(reference, args):
    """What a generator of the reference (3, SIZE, SIZE) is made from, as its file keeps it."""
    key = dict(version=GAN_VERSION, samples=samples_key(reference, args), pruning=args.pruning,
               stages=[vars(stage_settings(stage, args)) for stage in (1, 2)])
    return json.loads(json.dumps(key))


def fitting_generator(key, args):
    """Path of the generator of this name in the run folder, or else the shipped one, if it was made from key, see
    `generator_key`; else None."""
    found = run_or_shipped(args.out, "toy", f"{args.name}.safetensors")
    return found if os.path.isfile(found) and read_metadata(found).get("made") == key else None


def load_generator(path, device="cpu"):
    """The 3D generator in a file of this program."""
    G, (tensors, _) = Generator(), load_tensors(path)
    load_strictly(G, {name: tensor.float() for name, tensor in tensors.items()}, path)
    return G.requires_grad_(False).eval().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)        # experiments/distillation.py looks for whole names
    add = parser.add_argument
    add("--object", type=within(0, 10 ** 4 - 1), help="the reference: number of a held-out asset")
    add("--reference", help="or an image of the object before white, as wide as the object's frame, from the front")
    add("--elevation", type=within(*BAND, float), default=float(ELEVATION), help="from how high the reference is seen, "
        "in degrees (default %(default)s)")
    add("--prompt", required=True, help='what it is: "a red wooden mug"')
    add("--out", default="runs/toy", help="run folder (default %(default)s)")
    add("--name", help="of this generator (default cad_OBJECT, or cad)")
    add("--prior", help="view-conditioned model (default: the run folder's, else the shipped one)")
    add("--base", help="base model (default: the run folder's, else the shipped one)")
    add("--num_poses", type=within(8, 10 ** 5), default=250, help="poses that the prior draws (default %(default)s)")
    add("--each", type=within(1, 64), default=4, help="samples of each pose (default %(default)s)")
    add("--num_steps", type=some_steps, default=25, help="DDIM steps of a sample (default %(default)s)")
    add("--view_scale", type=within(-100, 100, float), default=2.0, help="guidance on the reference (default "
        "%(default)s)")
    add("--depth", action="store_true", help="refine under a depth condition: by a texturing model of Realiz3D, which "
        "keeps to the shape of what it refines")
    add("--depth_model", help="that model (default: the run folder's, else the shipped one)")
    add("--strength", type=within(0, 1, float), help="noise of the refinement, 0: none (default 0.5; with --depth 0.8)")
    add("--pruning", action=argparse.BooleanOptionalAction, default=True, help="drop samples that disagree")
    add("--gamma", type=within(0, 10 ** 6, float), default=3.0, help="weight of R1 (default %(default)s)")
    add("--steps", type=within(1, 10 ** 7), default=1500, help="steps of stage 1 (default %(default)s)")
    add("--lift_steps", type=within(1, 10 ** 7), default=1000, help="steps of stage 2 (default %(default)s)")
    add("--batch", type=within(2, 4096), default=16, help="images a step (default %(default)s)")
    add("--lr", type=within(0, 1, float), default=5e-4, help="learning rate (default %(default)s)")
    add("--branch_weight", type=within(0, 10 ** 6, float), default=1.0, help="how much stage 2 shall look like stage 1 "
        "(default %(default)s)")
    add("--invert_steps", type=within(1, 10 ** 6), default=150, help="steps of an inversion (default %(default)s)")
    add("--save_every", type=within(1, 10 ** 7), default=100, help="steps between states (default %(default)s)")
    add("--seed", type=a_seed, default=0, help="decides samples and training (default %(default)s)")
    add("--threads", type=some_threads, help="CPU threads (default: the fastest in a trial)")
    add("--mesh", metavar="DIR", help="also write each object as a mesh")
    args = parse_training(parser, "-m related.cad", argv)
    if (args.object is None) == (args.reference is None):
        parser.error("name the reference: --object NUMBER, or --reference FILE")
    if args.pruning and args.each < 3:
        parser.error("--each must be at least 3, for samples to agree with others, or --no-pruning given")
    if args.num_poses * args.each > 10 ** 5:
        parser.error(f"--num_poses {args.num_poses} x --each {args.each} is more than 100,000 samples")
    if args.strength is None:
        args.strength = 0.8 if args.depth else 0.5
    unread = ["base"] if args.depth else ["depth_model"]
    refuse_unread(parser, args, unread, "with --depth" if args.depth else "without --depth")
    if args.object is not None:
        refuse_unread(parser, args, ["elevation"], "with --object, which is seen from 20 degrees")
    args.name = args.name or ("cad" if args.object is None else f"cad_{args.object}")
    picture = os.path.realpath(f"{args.out}/{args.name}.png")
    if args.reference is not None and os.path.realpath(args.reference) == picture:
        parser.error("--reference would be overwritten by the picture OUT/NAME.png: use another --name")
    args.preset = "toy"                     # for `base_path`
    check_name(args.name, "cad")
    if not args.prompt.replace(",", " ").split():
        parser.error("--prompt: it has no words")
    refuse_unknown_words(parser, [f"photo of {args.prompt}{view_phrase(0)}, white background"])
    return args


def main(argv=None):
    distill(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
