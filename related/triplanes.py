"""The 3D GAN of CAD (related/cad.py): EG3D's parts (Chan et al. 2022), small, and as CAD changes them.

    z -> w -> three planes of features -> at any point a density and a colour -> volumetric rendering -> an image

The generator knows no pose, the discriminator does. Symbols: B batch, C features of a plane, n its side, M rays or
points, S samples of a ray. Cameras are the toy's, orthographic (geometry/camera.py); images are in [-1, 1], before
white (stage 1's enlarged ones may pass it).
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from geometry.camera import EXTENT, camera

SAMPLES_A_RAY = 16
SIZE = 32                               # of images and of stage 1's planes, to a side
WINDOW = 16                             # of what stage 2 draws in training
Z, W = 64, 128                          # widths of z and w
PLANE_FEATURES, RAY_FEATURES = 16, 16   # of a plane; of what rendering gives, the first three a colour

# ---------------------------------------------------------------------------------------------------------------------
# Volumetric rendering


def rays(azimuth, elevation, size):
    """Rays of the pixels of an image of size x size -> origins (B, M, 3) on the plane through the middle, directions
    (B, 3). Degrees, (B,) each."""
    right, up, forward = camera(azimuth, elevation)                                                 # (B, 3)
    place = (torch.arange(size, device=azimuth.device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(place, place, indexing="ij")
    origins = x.flatten()[:, None] * right[:, None] - y.flatten()[:, None] * up[:, None]            # (B, M, 3)
    return EXTENT * origins, forward


def lookup(planes, points):
    """Features at points (B, M, 3) in [-0.5, 0.5]^3: the sum of what the planes xy, xz and zy (B, 3, C, n, n) hold
    there, bilinear -> (B, M, C)."""
    x, y, z = (2 * points).unbind(-1)
    grid = torch.stack([torch.stack(pair, -1) for pair in ((x, y), (x, z), (z, y))], dim=1)         # (B, 3, M, 2)
    values = F.grid_sample(planes.flatten(0, 1), grid.flatten(0, 1)[:, None], align_corners=False)  # (3 B, C, 1, M)
    return values[:, :, 0].unflatten(0, (-1, 3)).sum(dim=1).transpose(1, 2)


def cube_span(origins, direction):
    """Where rays, see `rays`, enter and leave the cube [-0.5, 0.5]^3, along the direction, (B, M) each; 0 and 0 where
    they miss it."""
    direction = torch.where(direction.abs() < 1e-6, 1e-6, direction)[:, None]                       # (B, 1, 3)
    one, other = (-0.5 - origins) / direction, (0.5 - origins) / direction                          # (B, M, 3)
    near, far = torch.minimum(one, other).amax(dim=2), torch.maximum(one, other).amin(dim=2)
    meets = near < far
    return near * meets, far * meets


def samples_on_rays(origins, direction, samples, jitter=None):
    """Of each ray `samples` points in the cube (B, M, S, 3), how far along the ray they lie (B, M, S), and how much of
    the ray each stands for (B, M, 1). jitter: see `render_rays`."""
    near, far = cube_span(origins, direction)
    width = (far - near)[..., None] / samples
    places = torch.arange(samples, device=near.device) + (0.5 if jitter is None else jitter)
    along = near[..., None] + width * places
    return origins[:, :, None] + along[..., None] * direction[:, None, None], along, width


def render_rays(field, origins, direction, samples=SAMPLES_A_RAY, jitter=None):
    """Volumetric rendering (Max 1995): what a ray meets in the cube, before white.

    field(points (B, M, 3)) -> density (B, M), features (B, M, F) in [-1, 1], the first three a colour. jitter: (B, M,
    samples) in [0, 1), where in its share of the ray a sample lies (stratified); None: in the middle. Returns features
    (B, M, F), white (1) where nothing is, opacity (B, M), depth (B, M) along the direction.
    """
    points, along, width = samples_on_rays(origins, direction, samples, jitter)
    density, features = field(points.flatten(1, 2))
    alpha = 1 - torch.exp(-width * density.view_as(along))
    left = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], dim=-1), dim=-1)   # (B, M, S + 1)
    weight = alpha * left[..., :-1]
    opacity = 1 - left[..., -1]
    seen = (weight[..., None] * features.unflatten(1, along.shape[1:])).sum(dim=2)
    depth = (weight * along).sum(dim=2) / opacity.clamp(min=1e-6)
    return seen + (1 - opacity)[..., None], opacity, depth


def surface_depth(field, origins, direction, samples=96):
    """Where a ray has lost half of its light, along the direction (B, M), and the opacity (B, M); arguments as of
    `render_rays`. (The depth of volumetric rendering, a mean, lies behind the surface, by 1 / density on each ray.)"""
    points, along, width = samples_on_rays(origins, direction, samples)
    density, _ = field(points.flatten(1, 2))
    lost = width * density.view_as(along)
    total = lost.cumsum(dim=2)                                          # light falls as exp(-total)
    half = math.log(2)
    first = (total >= half).float().argmax(dim=2, keepdim=True)         # 0 where there is too little matter
    share = (half - total.gather(2, first)) / lost.gather(2, first).clamp(min=1e-6) + 1
    place = along.gather(2, first) + width * (share.clamp(0, 1) - 0.5)  # a sample lies in the middle of its share
    return place[..., 0], 1 - torch.exp(-total[..., -1])


# ---------------------------------------------------------------------------------------------------------------------
# The generator


def unit_linear(inputs, outputs, gain=1):
    """A linear layer that makes of inputs of mean square 1 outputs of mean square `gain` (StyleGAN2's start; with that
    of nn.Linear z moves the weights by a tenth only, and the generator learns to do without)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=(gain / inputs) ** 0.5)
    nn.init.zeros_(layer.bias)
    return layer


class StyledConv(nn.Module):
    """A convolution whose weights are scaled by a style (StyleGAN2, Karras et al. 2020). Inside a network (`active`)
    they are brought back to unit length, and a leaky ReLU follows."""

    def __init__(self, inputs, outputs, kernel=3, active=True):
        super().__init__()
        self.style = unit_linear(W, inputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel ** 2) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.active = active

    def forward(self, x, w):
        style = 1 + self.style(w)                                                                   # (B, in)
        # scaling weights by input channel is scaling inputs, and their lengths divide outputs: so all samples share one
        # convolution. Zeros beyond the edge would show as a frame.
        x = F.pad(x * style[:, :, None, None], (self.weight.shape[-1] // 2,) * 4, mode="replicate")
        out = F.conv2d(x, self.weight)
        if self.active:
            length = (style.square() @ self.weight.square().sum(dim=(2, 3)).T).add(1e-8).sqrt()     # (B, out)
            out = out / length[:, :, None, None]
        out = out + self.bias[:, None, None]
        return F.leaky_relu(out, 0.2) * 2 ** 0.5 if self.active else out


def windows(images, corner):
    """Of each of images (B, C, H, W) the window of WINDOW x WINDOW with its upper left pixel at corner (B, 2)."""
    return torch.stack([image[:, y:y + WINDOW, x:x + WINDOW] for image, (y, x) in zip(images, corner.tolist())])


def enlarged(x):
    """Twice as many pixels to a side, bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Generator(nn.Module):
    """z (B, Z) or w (B, layers, W), one for each layer, and a pose -> an image.

    Stage 1: rendered at half the size, and enlarged by convolutions of the image. Stage 2 (`lift`): the planes are
    enlarged, and rendering gives the image itself, so that all views are of one object.
    """

    def __init__(self):
        super().__init__()
        C, widths = PLANE_FEATURES, [128, 96, 64, 64]                   # of maps of 4, 8, 16, 32 to a side
        self.mapping = nn.Sequential(unit_linear(Z, W, 2), nn.LeakyReLU(0.2), unit_linear(W, W, 2), nn.LeakyReLU(0.2))
        self.start = nn.Parameter(torch.randn(1, 128, 4, 4))
        self.synthesis = nn.ModuleList(StyledConv(a, b) for a, b in zip([128, *widths], widths))
        self.to_planes = StyledConv(widths[-1], 3 * C, kernel=1, active=False)
        self.decoder = nn.Sequential(nn.Linear(C, 64), nn.Softplus(), nn.Linear(64, 1 + RAY_FEATURES))
        self.enlarge = nn.ModuleList([StyledConv(RAY_FEATURES, 32), StyledConv(32, 32)])
        self.to_image = StyledConv(32, 3, kernel=1, active=False)
        self.lift = nn.Sequential(nn.Conv2d(C, 64, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(64, 4 * C, 3, padding=1),
                                  nn.PixelShuffle(2))
        nn.init.zeros_(self.to_image.weight)                            # at first these two add nothing
        nn.init.zeros_(self.lift[2].weight)
        nn.init.zeros_(self.lift[2].bias)
        self.layers = len(self.synthesis) + len(self.enlarge) + 2       # that take a w

    def style(self, z):
        """z (B, Z) -> w for all layers, (B, layers, W)."""
        z = z * z.square().mean(dim=1, keepdim=True).add(1e-8).rsqrt()
        return self.mapping(z)[:, None].expand(-1, self.layers, -1)

    def planes(self, w, stage=1):
        """(B, layers, W) -> (B, 3, C, n, n): n is SIZE, in stage 2 twice that."""
        x = self.start.expand(len(w), -1, -1, -1)
        for k, conv in enumerate(self.synthesis):
            x = conv(enlarged(x) if k else x, w[:, k])
        planes = self.to_planes(x, w[:, len(self.synthesis)]).unflatten(1, (3, PLANE_FEATURES))
        if stage == 1:
            return planes
        flat = planes.flatten(0, 1)
        return (enlarged(flat) + self.lift(flat)).unflatten(0, (-1, 3))

    def field(self, planes, features=RAY_FEATURES):
        """What planes say of points: field(points) for `render_rays`, with so many of the features."""
        def at(points):
            decoded = self.decoder(lookup(planes, points))
            return 10 * F.softplus(decoded[..., 0] - 1), decoded[..., 1:1 + features].tanh()
        return at

    def draw(self, w, azimuth, elevation, jitter=None):
        """Stage 1: the image (B, 3, SIZE, SIZE), and what volumetric rendering alone gives, enlarged, likewise.

        jitter: (B, M, SAMPLES_A_RAY), M = (SIZE / 2)^2, see `render_rays`.
        """
        half = SIZE // 2
        seen, _, _ = render_rays(self.field(self.planes(w)), *rays(azimuth, elevation, half), jitter=jitter)
        maps = enlarged(seen.transpose(1, 2).unflatten(2, (half, half)))                            # (B, F, SIZE, SIZE)
        x, first = maps, len(self.synthesis) + 1
        for k, conv in enumerate(self.enlarge):
            x = conv(x, w[:, first + k])
        return maps[:, :3] + self.to_image(x, w[:, -1]), maps[:, :3]

    def draw_lifted(self, w, azimuth, elevation, jitter=None, corner=None):
        """Stage 2: the image (B, 3, n, n), opacity and depth, (B, 1, n, n) each, n = SIZE; or of each the window at
        its corner (B, 2), see `windows`, n = WINDOW. jitter: as of `draw`, M = n^2."""
        field = self.field(self.planes(w, stage=2), features=3)
        origins, direction = rays(azimuth, elevation, SIZE)                                         # (B, SIZE^2, 3)
        if corner is not None:
            origins = windows(origins.transpose(1, 2).unflatten(2, (SIZE, SIZE)), corner).flatten(2).transpose(1, 2)
        seen, opacity, depth = render_rays(field, origins, direction, jitter=jitter)
        maps = torch.cat([seen, opacity[..., None], depth[..., None]], dim=-1).transpose(1, 2)      # (B, 5, n^2)
        n = math.isqrt(maps.shape[2])
        return maps.unflatten(2, (n, n)).split([3, 1, 1], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator


class Discriminator(nn.Module):
    """How real an image (B, channels, size, size) looks as one of a pose (B, 3), (B,): the pose, see `pose_numbers`,
    enters by projection (Miyato & Koyama 2018)."""

    def __init__(self, channels, size):
        super().__init__()
        widths, stages = [48, 64, 96, 128], []
        before = channels
        for width in widths[:size.bit_length() - 3]:                    # down to 4 x 4
            stages += [nn.Conv2d(before, width, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2)]
            before = width
        self.body = nn.Sequential(*stages, nn.Conv2d(before, 128, 3, padding=1), nn.LeakyReLU(0.2))
        self.last = nn.Sequential(nn.Linear(129 * 16, 128), nn.LeakyReLU(0.2))
        self.pose = nn.Sequential(nn.Linear(3, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128))
        self.score = nn.Linear(128, 1)

    def forward(self, images, pose):
        x = self.body(images)                                                                       # (B, 128, 4, 4)
        # all alike, all false (Karras et al. 2018); 1e-8: a square root has no slope at 0
        spread = x.var(dim=0).add(1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        x = self.last(torch.cat([x, spread], dim=1).flatten(1))
        return self.score(x)[:, 0] + (x * self.pose(pose)).sum(dim=1) / 128 ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What keeps it from overfitting (ADA, Karras et al. 2020; R1, Mescheder et al. 2018)


def augment(images, share, generator):
    """Each of the images (B, C, H, W), of three colours a picture, with probability `share` moved by up to an eighth,
    white behind; likewise made up to 30 % darker or brighter; likewise more colourful or less. Differentiable.
    generator: of the CPU, as all of CAD's, so that a GPU draws the same."""
    B, C, size, _ = images.shape
    where = torch.rand(3, B, generator=generator) < share
    reach = size // 8
    shift = torch.randint(-reach, reach + 1, (B, 2), generator=generator) * where[0][:, None]
    moved = F.pad(images, (reach,) * 4, value=1.0)
    images = torch.stack([image[:, reach + dy:reach + dy + size, reach + dx:reach + dx + size]
                          for image, (dy, dx) in zip(moved, shift.tolist())])
    change = where[1:] * (2 * torch.rand(2, B, generator=generator) - 1) * torch.tensor([[0.3], [1.0]])
    darkness, color = 1 + change.to(images.device)
    images = 1 - (1 - images) * darkness[:, None, None, None]           # white stays white
    gray = images.view(B, C // 3, 3, size, size).mean(dim=2).repeat_interleave(3, dim=1)
    return gray + color[:, None, None, None] * (images - gray)


def adapted(share, real_scores, target=0.6, ramp=500):
    """ADA: the probability of augmentation after one more batch, in [0, 1]. It goes up while the mean sign of the real
    images' scores is above `target`, else down; from 0 to 1 it takes `ramp` batches."""
    return min(1.0, max(0.0, share + (1 if real_scores.sign().mean() > target else -1) / ramp))


def r1(scores, images):
    """Half the squared length of the scores' gradient by the images (which require one), mean over them."""
    gradient, = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2
