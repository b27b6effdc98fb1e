"""CAD's 3D GAN: rendering against closed forms, the planes against a loop, R1 against finite differences, ADA against
its rule."""
import math

import pytest
import torch
import torch.nn.functional as F

from geometry.camera import EXTENT, camera, project
from related.triplanes import (RAY_FEATURES, SIZE, Discriminator, Generator, StyledConv, W, Z, adapted, augment,
                               cube_span, lookup, r1, rays, render_rays, surface_depth, windows)
from toy.poses import BAND, pose_numbers


def ball(density, radius=0.4, color=(-0.5, 0.2, 0.9)):
    """A field of one density and colour inside a ball, none outside."""
    def field(points):
        inside = points.norm(dim=-1) < radius
        return density * inside.float(), torch.tensor(color).expand(*points.shape)
    return field


@pytest.mark.parametrize("density", [1.0, 8.0])
def test_a_ball_of_constant_density(density):
    """1 - exp(-density x chord) of light is lost; the rest is white; depth is the mean of a truncated exponential."""
    size, samples, radius = 16, 1500, 0.4
    pose = torch.tensor([30.0, 200.0]), torch.tensor([10.0, 35.0])
    origins, direction = rays(*pose, size)
    seen, opacity, depth = render_rays(ball(density), origins, direction, samples)
    off = origins.norm(dim=-1)                                          # the rays' distance from the middle
    chord = 2 * (radius ** 2 - off ** 2).clamp(min=0).sqrt()
    want = 1 - torch.exp(-density * chord)
    assert (opacity - want).abs().max() < 0.01 and want.max() > 0.5
    color = torch.tensor([-0.5, 0.2, 0.9])
    assert (seen - (want[..., None] * color + 1 - want[..., None])).abs().max() < 0.02
    through = chord > 0.3
    mean = 1 / density - chord / torch.expm1(density * chord)           # from where the ray enters
    assert (depth - (mean - chord / 2))[through].abs().max() < 0.003


@pytest.mark.parametrize("density", [4.0, 60.0])
def test_the_surface_is_where_half_of_the_light_is_lost(density):
    """Of a ball: ln 2 / density behind where the ray enters, by closed form."""
    radius, half = 0.4, math.log(2) / density
    origins, direction = rays(torch.tensor([30.0]), torch.tensor([20.0]), 16)
    depth, opacity = surface_depth(ball(density), origins, direction)
    chord = 2 * (radius ** 2 - origins.norm(dim=-1) ** 2).clamp(min=0).sqrt()
    through = chord > half + 0.05
    assert through.sum() > 50 and (depth - (half - chord / 2))[through].abs().max() < 0.01
    assert (opacity - (1 - torch.exp(-density * chord))).abs().max() < 0.3 and opacity[chord == 0].max() == 0


def test_a_wall_hides_what_is_behind_it():
    """A dense plane before another: its colour at its depth; half of the cube's height is empty."""
    def field(points):
        z = points[..., 2]
        front, back = (z > 0.2) & (z < 0.3), z < -0.2
        color = torch.where(front[..., None], torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, 1, -1]))
        return 500 * (front | back).float() * (points[..., 1] < 0), color
    origins, direction = rays(torch.zeros(1), torch.zeros(1), 8)        # looks along -z
    seen, opacity, depth = render_rays(field, origins, direction, samples=300)
    seen, opacity, depth = (part.unflatten(1, (8, 8))[0] for part in (seen, opacity, depth))
    inside = slice(1, 7)                                                # an image is wider than the cube
    assert torch.allclose(seen[4:7, inside], torch.tensor([1.0, -1, -1]).expand(3, 6, 3), atol=0.02)
    assert (depth[4:7, inside] + 0.3).abs().max() < 0.01 and opacity[4:7, inside].min() > 0.99
    assert torch.equal(seen[:4], torch.ones(4, 8, 3)) and opacity[:4].max() == 0


def test_matter_ends_at_the_cube():
    def everywhere(points):
        return torch.full(points.shape[:2], 3.0), torch.zeros(*points.shape)
    origins, direction = rays(torch.zeros(1), torch.zeros(1), 64)
    _, opacity, _ = render_rays(everywhere, origins, direction, samples=600)
    x, y = origins[0, :, 0].abs(), origins[0, :, 1].abs()
    covered = (x <= 0.5) & (y <= 0.5)
    assert (opacity[0, covered] - (1 - math.exp(-3))).abs().max() < 0.02 and opacity[0, ~covered].max() == 0


def test_rays_are_the_toys_camera():
    azimuth, elevation, size = torch.tensor([40.0, 310.0]), torch.tensor([5.0, 30.0]), 6
    origins, direction = rays(azimuth, elevation, size)
    for b in range(2):
        places = origins[b] + 0.3 * direction[b]
        column, row, depth = project(places.T.reshape(3, size, size), azimuth[b], float(elevation[b]))
        grid = torch.arange(size) + 0.5
        assert torch.allclose(column, grid.expand(size, size), atol=1e-4) and (depth - 0.3).abs().max() < 1e-5
        assert torch.allclose(row, grid[:, None].expand(size, size), atol=1e-4)
        assert torch.allclose(direction[b], camera(azimuth[b], elevation[b])[2])
    assert EXTENT > 0.5


def test_a_ray_has_its_samples_in_the_cube():
    """Against a walk along each ray in small steps; from the front and from above, too, along the cube's edges."""
    azimuth, elevation = torch.tensor([40.0, 310.0, 0.0, 90.0]), torch.tensor([5.0, 30.0, 0.0, 90.0])
    origins, direction = rays(azimuth, elevation, 24)
    near, far = cube_span(origins, direction)
    walk = torch.linspace(-1, 1, 1001)
    places = origins[:, :, None] + walk[:, None] * direction[:, None, None]                         # (4, 576, 1001, 3)
    inside = (places.abs() <= 0.5).all(dim=-1)
    met = inside.any(dim=2)
    assert torch.equal(met, near < far) and met.sum() < met.numel() and near[~met].abs().max() == 0
    first = torch.where(inside, walk, torch.inf).amin(dim=2)
    last = torch.where(inside, walk, -torch.inf).amax(dim=2)
    assert (near - first)[met].abs().max() < 3e-3 and (far - last)[met].abs().max() < 3e-3
    assert far[~met].abs().max() == 0


def test_a_sample_lies_in_its_share_of_the_ray():
    """With jitter 0 at its near end, with 1 at its far one."""
    seen = []

    def field(points):
        seen.append(points[0, :, 2])
        return torch.zeros(points.shape[:2]), torch.zeros(*points.shape)
    origins, direction = rays(torch.zeros(1), torch.zeros(1), 1)        # one ray, along -z
    for where in (0.0, 1.0):
        render_rays(field, origins, direction, samples=6, jitter=torch.full((1, 1, 6), where))
    width = 1 / 6
    assert torch.allclose(seen[0][2:5], torch.tensor([width, 0, -width]), atol=1e-6)
    assert torch.allclose(seen[1][1:4], seen[0][2:5], atol=1e-6)


def test_z_moves_the_object_from_the_start():
    """Styles spread about as far as the ones that they are added to (StyleGAN2), and the planes with them."""
    torch.manual_seed(0)
    G = Generator()
    with torch.no_grad():
        w = G.style(torch.randn(128, Z))
        spread = torch.stack([conv.style(w[:, 0]).std(dim=0).mean() for conv in G.synthesis])
        planes = G.planes(w)
    assert w.square().mean().sqrt().sub(1).abs() < 0.3 and spread.min() > 0.6 and spread.max() < 1.4
    assert planes.std(dim=0).mean() > 0.5 * planes.square().mean().sqrt()


def test_planes_are_looked_up_as_by_a_loop():
    torch.manual_seed(0)
    n, C = 5, 2
    planes, points = torch.randn(2, 3, C, n, n), torch.rand(2, 7, 3) - 0.5
    got = lookup(planes, points)
    for b in range(2):
        for m in range(7):
            want = torch.zeros(C)
            for plane, (first, second) in zip(planes[b], ((0, 1), (0, 2), (2, 1))):         # xy, xz, zy
                column, row = [(float(points[b, m, axis]) + 0.5) * n - 0.5 for axis in (first, second)]
                for dc in (0, 1):
                    for dr in (0, 1):
                        c, r = math.floor(column) + dc, math.floor(row) + dr
                        weight = (1 - abs(column - c)) * (1 - abs(row - r))
                        if 0 <= c < n and 0 <= r < n:
                            want += weight * plane[:, r, c]
            assert torch.allclose(got[b, m], want, atol=1e-5)


def test_a_styled_convolution_is_one_of_scaled_unit_weights():
    torch.manual_seed(0)
    conv, plain, x, w = StyledConv(3, 4), StyledConv(3, 4, active=False), torch.randn(2, 3, 6, 6), torch.randn(2, W)
    got, padded = conv(x, w), F.pad(x, (1, 1, 1, 1), mode="replicate")
    for b in range(2):
        weight = plain.weight * (1 + plain.style(w[b]))[:, None, None]
        want = F.conv2d(padded[b:b + 1], weight, plain.bias)
        assert torch.allclose(plain(x, w)[b:b + 1], want, atol=1e-5)
        weight = conv.weight * (1 + conv.style(w[b]))[:, None, None]
        weight = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
        want = F.leaky_relu(F.conv2d(padded[b:b + 1], weight, conv.bias), 0.2) * 2 ** 0.5
        assert torch.allclose(got[b:b + 1], want, atol=1e-5)


def test_windows():
    images = torch.arange(2.0 * SIZE ** 2).view(2, 1, SIZE, SIZE)
    got = windows(images, torch.tensor([[1, 2], [16, 0]]))
    assert torch.equal(got[0], images[0, :, 1:17, 2:18]) and torch.equal(got[1], images[1, :, 16:, :16])


def test_stage_2_starts_as_stage_1s_planes():
    torch.manual_seed(0)
    G, pose = Generator(), (torch.tensor([10.0, 100.0]), torch.tensor([20.0, 15.0]))
    w = G.style(torch.randn(2, Z))
    image, raw = G.draw(w, *pose)
    assert image.shape == raw.shape == (2, 3, SIZE, SIZE) and w.shape == (2, G.layers, W)
    assert torch.equal(image, raw)                                      # to_image starts at zero
    coarse, fine = G.planes(w).flatten(0, 1), G.planes(w, stage=2).flatten(0, 1)
    assert torch.equal(fine, F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))
    whole, opacity, depth = G.draw_lifted(w, *pose)
    assert whole.shape == image.shape and opacity.shape == depth.shape == (2, 1, SIZE, SIZE)
    assert 0 <= opacity.min() and opacity.max() <= 1 and whole[opacity.expand(-1, 3, -1, -1) == 0].eq(1).all()
    corner = torch.tensor([[0, 16], [7, 3]])
    for part, map_ in zip(G.draw_lifted(w, *pose, corner=corner), (whole, opacity, depth)):     # rays of a window
        assert torch.allclose(part, windows(map_, corner), atol=1e-5)
    _, features = G.field(G.planes(w))(torch.zeros(2, 5, 3))
    assert features.shape == (2, 5, RAY_FEATURES) and features.abs().max() <= 1


def test_the_discriminator_reads_the_pose():
    torch.manual_seed(0)
    D, images = Discriminator(3, 16), torch.randn(4, 3, 16, 16)
    one, other = (D(images, pose_numbers(torch.full((4,), angle), torch.full((4,), 20.0))) for angle in (0.0, 90.0))
    assert (one - other).abs().min() > 1e-4
    pose = pose_numbers(torch.tensor([0.0, 90.0]), torch.tensor([float(end) for end in BAND]))
    assert torch.allclose(pose, torch.tensor([[0.0, 1, -1], [1, 0, 1]]), atol=1e-6)


def test_r1_is_half_the_squared_gradient():
    """Against central differences of each pixel."""
    torch.manual_seed(0)
    D, images = Discriminator(3, 8).double(), torch.randn(2, 3, 8, 8).double().requires_grad_()
    pose = torch.randn(2, 3).double()
    value = r1(D(images, pose), images)
    want, flat, h = 0, images.detach().flatten(), 1e-5
    for k in range(len(flat)):
        moved = [flat.clone(), flat.clone()]
        moved[0][k] += h
        moved[1][k] -= h
        high, low = (D(x.view_as(images), pose).sum() for x in moved)
        want += ((high - low) / (2 * h)) ** 2
    assert value.item() == pytest.approx(want.item() / 2 / 2, rel=1e-4)
    value.backward()                                                    # and it can be trained on
    assert D.body[0].weight.grad.abs().max() > 0
    D.zero_grad()
    twice = images.detach()[:1].expand(2, -1, -1, -1).clone().requires_grad_()  # even where images are the same
    r1(D(twice, pose), twice).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in D.parameters())


def test_ada_follows_its_rule():
    """Up by 1 / 500 a batch while the mean sign is above 0.6, else down; never outside [0, 1]."""
    confident, unsure = torch.tensor([3.0, 1, 2, 0.1, -1]), torch.tensor([3.0, 1, 2, -2, -1])
    assert confident.sign().mean() == pytest.approx(0.6) and unsure.sign().mean() == pytest.approx(0.2)
    assert adapted(0.5, torch.ones(4)) == pytest.approx(0.502) and adapted(0.5, unsure) == pytest.approx(0.498)
    assert adapted(0.0, -torch.ones(4)) == 0 and adapted(1.0, torch.ones(4)) == 1
    share, batches = 0.0, 0
    while share < 1:
        share, batches = adapted(share, torch.ones(4)), batches + 1
    assert batches in (500, 501)


def test_augmentation_touches_a_share_of_the_images():
    images = torch.rand(2000, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def changed(share):
        got = augment(images, share, torch.Generator().manual_seed(1))
        return ((got - images).abs() > 1e-5).flatten(1).any(dim=1).double().mean()
    assert changed(0) == 0 and changed(0.3) == pytest.approx(1 - 0.7 ** 3, abs=0.06) and changed(1.0) > 0.99
    many = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.5
    got = augment(many, 1.0, torch.Generator().manual_seed(5))
    for before, after in ((many.mean(dim=(1, 2, 3)), got.mean(dim=(1, 2, 3))),
                          (many.std(dim=1).mean(dim=(1, 2)), got.std(dim=1).mean(dim=(1, 2)))):
        assert 0.1 < (after > before).double().mean() < 0.9             # both brighter and darker, more and less colour
    white = torch.ones(50, 6, 16, 16)
    assert (augment(white, 1.0, torch.Generator().manual_seed(2)) - 1).abs().max() < 1e-6     # white stays white
    images = images[:8].clone().requires_grad_()
    augment(images, 1.0, torch.Generator().manual_seed(3)).sum().backward()
    assert images.grad.abs().flatten(1).sum(1).min() > 0
