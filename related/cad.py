"""CAD (arXiv 2312.06663): a 3D generator, distilled by an adversary from what a diffusion model believes about one
reference image.

    python -m related.cad --object 3 --prompt "a red wooden mug"                    # all steps for one reference
    python -m related.cad --reference mug.png --prompt "a red wooden mug" --name mug --mesh meshes

Score distillation seeks one mode of the diffusion model: too smooth, too saturated, with two faces. CAD draws many
views of the reference first, mends and sorts them, and trains a 3D GAN to draw *their distribution*:

    1  prior        a view-conditioned diffusion model draws the object from poses all around      `draw_views`
    2  refinement   SDEdit by the photographic base model, with the view's name in the prompt      `refine`
    3  pruning      of the samples of a pose, those that disagree with the others are dropped       `agree_with_others`
    4  3D GAN       no pose for the generator, the pose for the discriminator; R1, ADA              `stage1_losses`
    5  two stages   images enlarged by convolutions; then the planes, so that all views agree       `stage2_losses`
    6  use          samples, ways between them, the reference's own w (inversion), meshes           `write_sheets`

The networks are those of related/triplanes.py, the prior is related/view_prior.py's. To resume, run it again.
"""
import argparse
import json
import os

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import evaluation_set
from dit import add_noise
from geometry.camera import ELEVATION, VIEWS
from geometry.hull import silhouette
from geometry.mesh import surface_mesh
from geometry.texture import save_meshes
from related.triplanes import (SAMPLES_A_RAY, Discriminator, Generator, absolute_pose, adapted, augment, enlarged, r1)
from related.view_prior import load_prior
from sample import (Sampling, ddim_sample, ddim_timesteps, default_base, domain_mode, guided_noise, initial_noise,
                    load_network, sample_images)
from support.files import cached, checksum, file_id, load_strictly, load_tensors, read_metadata, save_tensors
from support.folders import read_image
from support.generators import seeded_generator
from support.launch import a_seed, finite, launch, run_cli, some_steps, some_threads, within
from support.pictures import save_picture, to_pixels, to_uint8
from toy.judge import load_judges
from toy.poses import BAND, pose_numbers, view_control
from toy.world import tokenize
from training.flags import check_name, parse_training
from training.loop import signals_caught
from training.states import Trained, hold, load_state, save_state, training_settings

DISTILL = 5             # (DISTILL, seed, step, ..): the random numbers of the GAN's steps
REFERENCE_POSE = (0, ELEVATION)         # azimuth, elevation of the reference; other poses are relative to it
WINDOW = 16             # side of what stage 2's discriminator sees
R1_EVERY = 8            # steps between those with R1, which is weighed up for it (StyleGAN2)

# ---------------------------------------------------------------------------------------------------------------------
# 1. The prior's views of the reference


def poses_around(num):
    """num poses spread evenly over the band that the toy renders: azimuth, elevation (num,) in degrees. (A spiral: the
    azimuth turns by the golden angle, the elevation's sine rises evenly.)"""
    k = torch.arange(num) + 0.5
    low, high = (torch.deg2rad(torch.tensor(float(end))).sin() for end in BAND)
    return (k * 137.50776) % 360, torch.rad2deg((low + (high - low) * k / num).asin())


def draw_views(prior, reference, poses, each, sampling):
    """`each` samples of the reference (3, H, W) in [-1, 1] from each of the poses (azimuth, elevation (P,)): (P, each,
    3, H, W). sampling.cfg_scale: guidance on the reference."""
    azimuth, elevation = (part.repeat_interleave(each) for part in poses)
    numbers = pose_numbers(azimuth - REFERENCE_POSE[0], elevation, torch.full_like(elevation, REFERENCE_POSE[1]))
    control = view_control(reference.expand(len(azimuth), -1, -1, -1), numbers)
    inputs = dict(text=tokenize([""]).expand(len(azimuth), -1), control=control,
                  null={"control": torch.zeros_like(control[:1])})
    return sample_images(prior, inputs, sampling)[:, 0].unflatten(0, (-1, each))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Distribution refinement: SDEdit (Meng et al. 2022) by the photographic model


def view_word(azimuth):
    """The word for a view from this azimuth, in degrees."""
    return VIEWS[round(float(azimuth) / 90) % 4]


@torch.no_grad()
def refine(base, images, azimuth, prompt, strength, sampling):
    """Images (N, 3, H, W) in [-1, 1], noised to `strength` of the steps and denoised by the base model, which is told
    what it sees and from which side."""
    like, steps = base.dit.positions, ddim_timesteps(sampling.num_steps, sampling.spacing)
    start = steps[steps <= strength * 1000].max() if strength * 1000 >= steps.min() else None
    if start is None:
        return images
    text = tokenize([f"photo of {prompt}, {view_word(turn)} view, white background" for turn in azimuth])
    null, done = {"text": tokenize([""]).to(like.device)}, []
    for rows in torch.arange(len(images)).split(sampling.batch):
        x0 = images[rows, None].to(like)
        noise = initial_noise(rows.tolist(), x0.shape[1:], sampling.seed + 1).to(like)
        predict_noise = guided_noise(base, null, domain_mode("real", base.dit.config.depth), sampling.cfg_scale,
                                     text=text[rows].to(like.device))
        x = add_noise(x0, noise, start.expand(len(rows)).to(like.device))
        done.append(ddim_sample(predict_noise, x, sampling.num_steps, sampling.spacing, clip_x0=True,
                                t_start=int(start))[:, 0].cpu())
    return torch.cat(done)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pose pruning


def agree_with_others(images, features, outline=0.75, meaning=0.6):
    """Which samples (P, K, 3, H, W) in [0, 1] agree with the other samples of their pose: (P, K) bool.

    Silhouettes must overlap with those of the others by `outline` (median IoU), and features (P, K, F) point the same
    way by `meaning` (median cosine); but the best of each pose stays.
    """
    shape = silhouette(images).flatten(2).float()                                                   # (P, K, H W)
    both = shape @ shape.mT
    count = shape.sum(dim=2)
    overlap = both / (count[:, :, None] + count[:, None] - both).clamp(min=1)                       # (P, K, K)
    alike = F.normalize(features, dim=2) @ F.normalize(features, dim=2).mT
    itself = torch.eye(images.shape[1], dtype=torch.bool)
    overlap, alike = [table.masked_fill(itself, torch.nan).nanmedian(dim=2).values.nan_to_num()         # (P, K)
                      for table in (overlap, alike)]
    keep = (overlap >= outline) & (alike >= meaning)
    return keep | (overlap + alike == (overlap + alike).amax(dim=1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# The cache that the GAN learns from: steps 1 to 3


def reference_samples(reference, prior, base, judges, args):
    """Steps 1 to 3 of one reference: {"image": uint8 (N, 3, H, W), "azimuth", "elevation": (N,)}, drawn before any
    training of the GAN, and a picture of them. Kept in OUT/NAME/samples.safetensors."""
    path = f"{args.out}/{args.name}/samples.safetensors"
    poses = poses_around(args.num_poses)
    key = dict(reference=checksum({"image": reference}), prior=file_id(prior_path(args)),
               base=file_id(default_base("toy", args.out)))
    key |= {flag: getattr(args, flag) for flag in ("prompt", "num_poses", "each", "num_steps", "view_scale", "strength",
                                                   "pruning", "seed")}

    def build():
        sampling = Sampling(num_steps=args.num_steps, cfg_scale=args.view_scale, seed=args.seed)
        drawn = draw_views(prior, reference, poses, args.each, sampling)
        azimuth, elevation = (part.repeat_interleave(args.each) for part in poses)
        refined = refine(base, drawn.flatten(0, 1), azimuth, args.prompt, args.strength, sampling)
        pixels = to_uint8(refined).unflatten(0, drawn.shape[:2])
        features = judges.net.features(pixels.flatten(0, 1) / 255).unflatten(0, drawn.shape[:2])
        keep = agree_with_others(pixels / 255, features) if args.pruning else torch.ones(drawn.shape[:2]).bool()
        return dict(drawn=to_uint8(drawn), image=pixels, keep=keep, azimuth=poses[0], elevation=poses[1])
    made = cached(path, key, build)
    kept, drawn = int(made["keep"].sum()), made["keep"].numel()
    print(f"{kept} of {drawn} samples agree with the others of their pose", flush=True)
    draw_pruning(f"{args.out}/{args.name}/samples.png", made)
    each, keep = args.each, made["keep"].flatten()
    return dict(image=made["image"].flatten(0, 1)[keep], azimuth=made["azimuth"].repeat_interleave(each)[keep],
                elevation=made["elevation"].repeat_interleave(each)[keep])


def draw_pruning(path, made, num=6):
    """Writes a picture: of some poses the samples as drawn, refined, and those that were dropped in red."""
    rows, every = [], max(1, len(made["image"]) // num)
    for k in range(0, len(made["image"]), every)[:num]:
        red = torch.tensor([255, 60, 60], dtype=torch.uint8)[:, None, None]
        marked = torch.where((~made["keep"][k])[:, None, None, None] & (made["image"][k] > 230), red, made["image"][k])
        rows += [(f"{made['azimuth'][k]:.0f} degrees", made["drawn"][k]), ("refined, dropped", marked)]
    save_picture(path, rows)


# ---------------------------------------------------------------------------------------------------------------------
# 4, 5. The 3D GAN in two stages


def gan_batch(samples, step, args):
    """Random numbers of a step, a pure function of (seed, step): real images (B, 3, H, W) in [-1, 1] with their poses
    azimuth, elevation (B,), z (B, 64), the fakes' poses, and the generator for what follows."""
    generator = seeded_generator(DISTILL, args.seed, step)
    pick, of_fake = torch.randint(len(samples["image"]), (2, args.batch), generator=generator)
    z = torch.randn(args.batch, Generator.z_dim, generator=generator)
    real = to_pixels(samples["image"][pick]), samples["azimuth"][pick], samples["elevation"][pick]
    return real, z, (samples["azimuth"][of_fake], samples["elevation"][of_fake]), generator


def stage1_losses(nets, samples, step, share, args):
    """Stage 1 at a step: the losses of the generator and of the discriminator, and its scores of real images.

    The discriminator sees an image and what volumetric rendering alone gives of it (EG3D's dual discrimination); of
    real ones the second is the image at half the size. share: how many are augmented.
    """
    G, D = nets["generator"], nets["discriminator"]
    (image, *pose), z, fake_pose, generator = gan_batch(samples, step, args)
    jitter = torch.rand(args.batch, (G.size // 2) ** 2, SAMPLES_A_RAY, generator=generator)
    fake = torch.cat(G.draw(G.style(z), *fake_pose, jitter), dim=1)                                 # (B, 6, H, W)
    real = torch.cat([image, enlarged(F.avg_pool2d(image, 2))], dim=1).requires_grad_()
    fakes, pose, fake_pose = augment(fake, share, generator), absolute_pose(*pose), absolute_pose(*fake_pose)
    real_scores = D(augment(real, share, generator), pose)
    loss_D = F.softplus(D(fakes.detach(), fake_pose)).mean() + F.softplus(-real_scores).mean()
    if step % R1_EVERY == 0:
        loss_D = loss_D + R1_EVERY * args.gamma * r1(real_scores, real)
    return F.softplus(-D(fakes, fake_pose)).mean(), loss_D, real_scores.detach()


def stage2_losses(nets, samples, step, share, args):
    """Stage 2, likewise: the planes are enlarged, the rest of the generator stays as it is. Windows of the image must
    look real, and the whole like stage 1's image, to a network's features; without ADA (share is not read)."""
    G, D, side = nets["generator"], nets["discriminator"], WINDOW
    (image, *pose), z, fake_pose, generator = gan_batch(samples, step, args)
    with torch.no_grad():
        w = G.style(z)
        branch, _ = G.draw(w, *fake_pose)
    whole, _, _ = G.draw_lifted(w, *fake_pose)
    corner = torch.randint(G.size - side + 1, (2, args.batch, 2), generator=generator)
    fake, real = windows(whole, corner[0], side), windows(image, corner[1], side).requires_grad_()
    pose, fake_pose = absolute_pose(*pose), absolute_pose(*fake_pose)
    real_scores = D(real, pose)
    loss_D = F.softplus(D(fake.detach(), fake_pose)).mean() + F.softplus(-real_scores).mean()
    if step % R1_EVERY == 0:
        loss_D = loss_D + R1_EVERY * args.gamma * r1(real_scores, real)
    features = nets["judge"].body
    alike = (features(whole) - features(branch)).square().mean() + (whole - branch).square().mean()
    return F.softplus(-D(fake, fake_pose)).mean() + args.branch_weight * alike, loss_D, real_scores.detach()


def windows(images, corner, side):
    """Of each of images (B, C, H, W) the window of side x side with its upper left pixel at corner (B, 2)."""
    return torch.stack([image[:, y:y + side, x:x + side] for image, (y, x) in zip(images, corner.tolist())])


def deciding(args):
    """The flags that decide what the generator becomes, but for the length."""
    return {flag: value for flag, value in training_settings(args).items()
            if flag not in ("steps", "prior", "mesh", "invert_steps")}


def train_stage(stage, G, samples, judge, args):
    """Trains stage 1, or 2, of the generator on the samples, or goes on; at the end G holds the running averages.

    States go to OUT/NAME/stageN. Raises FloatingPointError at a loss that is not finite.
    """
    out, steps = f"{args.out}/{args.name}/stage{stage}", (args.steps, args.lift_steps)[stage - 1]
    settings, lock = argparse.Namespace(**deciding(args), steps=steps, dtype="float32", compile=False), hold(out)
    torch.manual_seed(args.seed)
    D = Discriminator(6, G.size) if stage == 1 else Discriminator(3, WINDOW)
    of_G = {f"generator.{name}": p for name, p in G.named_parameters() if name.startswith("lift") == (stage == 2)}
    of_D = {f"discriminator.{name}": p for name, p in D.named_parameters()}
    optimizers = [torch.optim.Adam([dict(params=list(part.values()))], lr=args.lr, betas=(0.0, 0.99), fused=True)
                  for part in (of_G, of_D)]
    share = torch.zeros(1)                                              # of augmented images (ADA)
    averages = {f"average.{name}": p.detach().clone() for name, p in of_G.items()}
    trained = Trained(of_G | of_D | averages | {"share": share}, {}, optimizers)
    made = dict(samples=checksum(samples), generator=checksum(dict(G.named_parameters())))
    start = load_state(out, trained, settings, 1, made)
    nets, losses = dict(generator=G, discriminator=D, judge=judge), (stage1_losses, stage2_losses)[stage - 1]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"{args.name}, stage {stage}")
    with signals_caught() as stop:
        for step in bar:
            loss_G, loss_D, real_scores = losses(nets, samples, step, float(share), args)
            if not (loss_G + loss_D).isfinite():
                raise FloatingPointError(f"{args.name}, stage {stage}: the loss is not finite at step {step}: try "
                                         "another --gamma, a lower --lr or another --seed")
            for loss, part in ((loss_G, of_G), (loss_D, of_D)):
                for p, gradient in zip(part.values(), torch.autograd.grad(loss, list(part.values()))):
                    p.grad = gradient
            for optimizer in optimizers:
                optimizer.step()
            if stage == 1:
                share.fill_(adapted(float(share), real_scores, 1))
            for name, p in of_G.items():
                averages[f"average.{name}"].lerp_(p.detach(), 1 - min(0.998, (step + 1) / (step + 10)))
            last = step + 1 == steps
            if last or (step + 1) % 20 == 0:
                bar.set_postfix_str(f"discriminator {loss_D.item():.2f}, augmented {float(share):.2f}")
            if last or stop["now"] or (step + 1) % args.save_every == 0:
                save_state(out, step + 1, trained, settings, 1, made)
            if stop["now"]:
                bar.close()
                print(f"{args.name}: stopped by a signal at step {step + 1}; the same command goes on from there")
                raise SystemExit(128 + stop["now"])
    for name, p in of_G.items():
        p.data.copy_(averages[f"average.{name}"])
    del lock


# ---------------------------------------------------------------------------------------------------------------------
# 6. Use


def invert(G, image, pose, judge, steps, each_layer=True):
    """The w (1, layers, 128) with which the generator draws image (3, H, W) in [-1, 1] at pose (azimuth, elevation):
    one for each layer (w+), or the same for all."""
    generator = seeded_generator(DISTILL, 0, 1 << 40)
    w = G.style(torch.randn(256, G.z_dim, generator=generator)).mean(dim=0, keepdim=True).detach()
    w = (w if each_layer else w[:, :1]).clone().requires_grad_()
    pose, image = [torch.tensor([float(angle)]) for angle in pose], image[None]
    optimizer = torch.optim.Adam([w], lr=0.03)
    for _ in range(steps):
        drawn, _, _ = G.draw_lifted(w.expand(-1, G.layers(), -1), *pose)
        loss = (judge.body(drawn) - judge.body(image)).square().mean() + 4 * (drawn - image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return w.detach().expand(-1, G.layers(), -1)


@torch.no_grad()
def turned(G, w, num=8):
    """Images uint8 (num, 3, H, W) of one w (1, layers, 128) from num azimuths, and of the depth, bright where near."""
    azimuth = 360 / num * torch.arange(num)
    image, opacity, depth = G.draw_lifted(w.expand(num, -1, -1), azimuth, torch.full((num,), float(ELEVATION)))
    near = (0.5 - depth).clamp(0, 1) * opacity
    return to_uint8(image), to_uint8(2 * near.expand(-1, 3, -1, -1) - 1)


def write_sheets(G, reference, judge, args):
    """Writes OUT/NAME.png: the reference, four objects from eight sides, a way between two of them, the reference
    inverted in w and w+, the depth of one; and with --mesh each object as GLB."""
    w = G.style(torch.randn(4, G.z_dim, generator=seeded_generator(DISTILL, args.seed, 1 << 41)))
    rows = [("reference", to_uint8(reference)[None])]
    for k in range(4):
        image, depth = turned(G, w[k:k + 1])
        rows += [(f"object {k + 1}", image)] + ([("its depth", depth)] if k == 0 else [])
    between = torch.lerp(w[:1], w[1:2], torch.linspace(0, 1, 8)[:, None, None])
    with torch.no_grad():
        way, _, _ = G.draw_lifted(between, torch.zeros(8), torch.full((8,), float(ELEVATION)))
    rows.append(("from 1 to 2", to_uint8(way)))
    for name, each_layer in (("reference in w", False), ("in w+", True)):
        rows.append((name, turned(G, invert(G, reference, REFERENCE_POSE, judge, args.invert_steps, each_layer))[0]))
    save_picture(f"{args.out}/{args.name}.png", rows, column_titles=[f"{45 * k} degrees" for k in range(8)])
    print(f"wrote {args.out}/{args.name}.png")
    if args.mesh:
        meshes = {f"{args.name}_{k + 1}": field_mesh(G, w[k:k + 1]) for k in range(4)}
        images = torch.stack([to_pixels(turned(G, w[k:k + 1], num=4)[0]) for k in range(4)])
        save_meshes(args.mesh, meshes, {"cad": images})


@torch.no_grad()
def field_mesh(G, w, size=64, density=10.0):
    """Mesh of where the density of one w (1, layers, 128) passes `density`."""
    line = torch.linspace(-0.5, 0.5, size)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(1, -1, 3)
    matter, _ = G.field(G.planes(w, stage=2))(points)
    matter = F.pad(matter.view(size, size, size)[1:-1, 1:-1, 1:-1], (1,) * 6)       # nothing lies outside the cube
    return surface_mesh(density - matter, 0.5)


def read_reference(args):
    """The reference (3, 32, 32) in [-1, 1]: of --reference, a picture before white, or --object, a held-out asset's
    render."""
    if args.reference is not None:
        image = F.interpolate(read_image(args.reference)[None], (32, 32), mode="area")[0]
        return 2 * image - 1
    held = evaluation_set(args.object + 1, folder=f"{args.out}/sets")
    return to_pixels(held["image"][args.object, 0])


def distill(args):
    """All steps for one reference -> OUT/NAME.safetensors, the generator, and OUT/NAME.png."""
    launch(args.threads)
    path = f"{args.out}/{args.name}.safetensors"
    reference, judges = read_reference(args), load_judges(f"{args.out}/sets")
    judge = judges.net
    if not os.path.isfile(path):
        base, prior = load_network(default_base("toy", args.out)), load_prior(prior_path(args))
        samples = reference_samples(reference, prior, base, judges, args)
        torch.manual_seed(args.seed)
        G = Generator()
        for stage in (1, 2):
            train_stage(stage, G, samples, judge, args)
        save_tensors(path, {name: p.half() for name, p in G.state_dict().items()}, kind="cad", command=args.command,
                     settings=deciding(args) | dict(steps=args.steps))
    made, now = read_metadata(path).get("settings", {}), json.loads(json.dumps(deciding(args) | dict(steps=args.steps)))
    other = [f"{flag} {made.get(flag)} (now {now[flag]})" for flag in now if made.get(flag) != now[flag]]
    if other:
        raise ValueError(f"{path} was made otherwise: {', '.join(other)}; use another --name, or delete it")
    write_sheets(load_generator(path), reference, judge, args)


def load_generator(path):
    """The 3D generator in a file of this program. Raises ValueError where it is another thing."""
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "cad":
        raise ValueError(f"{path} holds no generator of CAD: make one with python -m related.cad")
    G = Generator()
    load_strictly(G, {name: tensor.float() for name, tensor in tensors.items()}, path)
    return G.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def prior_path(args):
    """--prior, or the run folder's, or the shipped view-conditioned model. Raises FileNotFoundError."""
    shipped = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "weights", "toy_view_prior")
    for path in [args.prior] if args.prior else [f"{args.out}/view_prior.safetensors", f"{shipped}.safetensors"]:
        if os.path.isfile(path):
            return path
    raise FileNotFoundError("no view-conditioned model: train one with python -m related.view_prior, or name its file "
                            "with --prior")


def parse_args(argv=None):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--object", type=within(0, 10 ** 4 - 1), help="the reference: number of a held-out asset")
    add("--reference", help="or an image of the object before white, from the front")
    add("--prompt", required=True, help='what it is: "a red wooden mug"')
    add("--out", default="runs/toy", help="run folder (default %(default)s)")
    add("--name", help="of this generator (default cad_OBJECT, or cad)")
    add("--prior", help="view-conditioned model (default: the run folder's, else the shipped one)")
    add("--num_poses", type=within(8, 10 ** 5), default=250, help="poses that the prior draws (default %(default)s)")
    add("--each", type=within(1, 64), default=4, help="samples of each pose (default %(default)s)")
    add("--num_steps", type=some_steps, default=25, help="DDIM steps of a sample (default %(default)s)")
    add("--view_scale", type=finite, default=2.0, help="guidance on the reference (default %(default)s)")
    add("--strength", type=within(0, 1, float), default=0.5, help="noise of the refinement, 0: none (default "
        "%(default)s)")
    add("--pruning", action=argparse.BooleanOptionalAction, default=True, help="drop samples that disagree")
    add("--gamma", type=within(0, 10 ** 6, float), default=3.0, help="weight of R1 (default %(default)s)")
    add("--steps", type=within(1, 10 ** 7), default=1500, help="steps of stage 1 (default %(default)s)")
    add("--lift_steps", type=within(1, 10 ** 7), default=500, help="steps of stage 2 (default %(default)s)")
    add("--batch", type=within(2, 4096), default=16, help="images a step (default %(default)s)")
    add("--lr", type=within(0, 1, float), default=2e-3, help="learning rate (default %(default)s)")
    add("--branch_weight", type=within(0, 10 ** 6, float), default=1.0, help="how much stage 2 shall look like stage 1 "
        "(default %(default)s)")
    add("--invert_steps", type=within(1, 10 ** 6), default=200, help="steps of an inversion (default %(default)s)")
    add("--save_every", type=within(1, 10 ** 7), default=100, help="steps between states (default %(default)s)")
    add("--seed", type=a_seed, default=0, help="decides samples and training (default %(default)s)")
    add("--threads", type=some_threads, help="CPU threads (default: the fastest in a trial)")
    add("--mesh", metavar="DIR", help="also write each object as a mesh")
    args = parse_training(parser, "-m related.cad", argv)
    if (args.object is None) == (args.reference is None):
        parser.error("name the reference: --object NUMBER, or --reference FILE")
    args.name = args.name or ("cad" if args.object is None else f"cad_{args.object}")
    check_name(args.name, "cad")
    tokenize([args.prompt])
    return args


def main(argv=None):
    distill(parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
