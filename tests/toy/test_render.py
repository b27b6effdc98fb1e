"""The toy world drawn: geometry against closed forms, looks, determinism."""

import math

import pytest
import torch
from shapes import one_asset, volume

from geometry.camera import AZIMUTHS, ELEVATION, EXTENT, camera, project
from toy.render import LOOKS, Look, asset_mesh, render
from toy.trace import Cameras, nearest, trace
from toy.world import CATEGORIES, MATERIALS, SHAPES, box, sample_assets, sphere, take


@pytest.fixture(scope="module")
def world():
    assets = sample_assets(40, seed=7)
    return assets, render(assets, Look("render")), render(assets, geometry=False)


def grid(size):
    """Column and row coordinates of the pixel centres."""
    s = torch.arange(size) + 0.5
    return s.expand(size, size), s[:, None].expand(size, size)


def traced(distance, azimuth, elevation=ELEVATION, size=64):
    """Hit (S, S), points (3, S, S) and normals (3, S, S) of a bare distance function."""
    ray, p, normal, _ = trace(distance, torch.zeros(1, 3), Cameras(torch.tensor([float(azimuth)]), elevation), size)
    hit, points, normals = torch.zeros(size**2, dtype=torch.bool), torch.zeros(3, size**2), torch.zeros(3, size**2)
    hit[ray], points[:, ray], normals[:, ray] = True, p, normal
    return hit.view(size, size), points.view(3, size, size), normals.view(3, size, size)


# ---- camera and tracer


def test_position_map_projects_back_onto_its_own_pixel_grid(world):
    _, views, _ = world
    column, row, _ = project(views.position, torch.tensor(AZIMUTHS))
    on = views.position.abs().sum(dim=2) > 0
    want = grid(32)
    assert on.sum() > 10000
    assert (column - want[0])[on].abs().max() < 1e-3 and (row - want[1])[on].abs().max() < 1e-3


@pytest.mark.parametrize("azimuth, elevation", [(0, 20), (90, 20), (217, 35), (0, 0)])
def test_sphere_against_closed_form(azimuth, elevation, radius=0.4, size=64):
    hit, points, normals = traced(lambda p, a, b, c: (sphere(p, radius), None), azimuth, elevation, size)
    column, row = grid(size)
    x, y = (column / size * 2 - 1) * EXTENT, (1 - row / size * 2) * EXTENT
    inside = x**2 + y**2 < radius**2
    sure = (x**2 + y**2 - radius**2).abs() > 1e-3
    assert torch.equal(hit[sure], inside[sure])
    right, up, forward = camera(azimuth, elevation)
    depth = -(radius**2 - x**2 - y**2).clamp(min=0).sqrt()
    want = right[:, None, None] * x + up[:, None, None] * y + forward[:, None, None] * depth
    deep = x**2 + y**2 < (0.95 * radius) ** 2
    assert (points - want)[:, deep].norm(dim=0).max() < 2e-3
    assert ((points / radius - normals)[:, deep].norm(dim=0)).max() < 5e-3


@pytest.mark.parametrize("azimuth, elevation", [(0, 20), (90, 20), (30, 20), (180, 0)])
def test_box_against_closed_form(azimuth, elevation, size=64):
    half = torch.tensor([0.3, 0.25, 0.2])
    hit, points, normals = traced(lambda p, a, b, c: (box(p, 0.3, 0.25, 0.2), None), azimuth, elevation, size)
    column, row = grid(size)
    x, y = (column / size * 2 - 1) * EXTENT, (1 - row / size * 2) * EXTENT
    right, up, forward = (axis.double()[:, None, None] for axis in camera(azimuth, elevation))
    origin, way = right * x + up * y, torch.where(forward.abs() < 1e-9, 1e-9, forward)

    def slabs(half):
        half = half.double()[:, None, None]
        enter, leave = (-half * way.sign() - origin) / way, (half * way.sign() - origin) / way
        return enter, enter.amax(dim=0), leave.amin(dim=0)

    enter, near, far = slabs(half)
    inner, outer = ((a < b) for _, a, b in (slabs(half - 2e-3), slabs(half + 2e-3)))  # a fifteenth of a pixel at 32
    sure = (inner == outer) & ((far - near).abs() > 2e-2)
    assert torch.equal(hit[sure], inner[sure]) and sure.float().mean() > 0.95
    assert 0.05 < (near < far).float().mean() < 0.6
    both = sure & hit
    assert (points - (origin + forward * near))[:, both].norm(dim=0).max() < 2e-3
    side = torch.nn.functional.one_hot(enter.argmax(dim=0), 3).movedim(2, 0) * -way.sign()
    top = enter.topk(2, dim=0).values
    face = both & (top[0] - top[1] > 2e-2)  # away from edges, where two faces meet
    assert face.sum() > 200 and (normals - side)[:, face].abs().max() < 1e-3


def test_normals_are_unit_and_face_the_camera(world):
    _, views, _ = world
    on = views.position.abs().sum(dim=2) > 0
    assert torch.allclose(views.normal.norm(dim=2)[on], torch.ones(on.sum()), atol=1e-5)
    assert views.normal.norm(dim=2)[~on].max() == 0
    forward = camera(torch.tensor(AZIMUTHS))[2][None, :, :, None, None]
    assert (views.normal * forward).sum(dim=2)[on].max() < 1e-3


def test_objects_fill_the_frame_and_stay_inside_it(world):
    _, views, _ = world
    border = torch.cat([views.mask[..., 0, :], views.mask[..., -1, :], views.mask[..., 0], views.mask[..., -1]])
    assert border.max() == 0 and views.position.abs().max() <= 0.5
    covered = views.mask.mean(dim=(1, 2, 3, 4))
    assert covered.min() > 0.08 and covered.mean() > 0.2


def test_mask_is_the_share_of_supersamples(world):
    assets, _, _ = world
    few = take(assets, slice(0, 3))
    fine = render(few, Look("render", supersample=1), size=64).mask.flatten(0, 1)
    coarse = render(few, Look("render", supersample=2), size=32).mask.flatten(0, 1)
    assert torch.equal(torch.nn.functional.avg_pool2d(fine, 2), coarse)
    assert set(coarse.unique().tolist()) == {0, 0.25, 0.5, 0.75, 1}


# ---- looks


def test_a_render_is_evenly_lit_and_painted_and_a_photo_is_lit(world):
    assets, plain, photo = world
    whole = (plain.mask == 1).squeeze(2)
    elsewhere = assets._replace(light=-assets.light)
    assert torch.equal(render(elsewhere, Look("render"), geometry=False).rgb, plain.rgb)
    assert not torch.equal(render(elsewhere, geometry=False).rgb, photo.rgb)
    for other in range(1, len(MATERIALS)):                      # each material is painted in its own way
        repainted = render(assets._replace(material=(assets.material + other) % len(MATERIALS)), Look("render"),
                           geometry=False).rgb
        assert ((repainted - plain.rgb).abs().amax(2)[whole] > 0.05).float().mean() > 0.25
    spread = photo.rgb.movedim(2, 4)[whole].mul(255).round().unique(dim=0)
    assert len(spread) > 5000
    assert (plain.rgb.movedim(2, 4)[(plain.mask == 0).squeeze(2)] == 1).all()  # white background, both
    assert (photo.rgb.movedim(2, 4)[(plain.mask == 0).squeeze(2)] == 1).all()


def test_a_photo_is_lit_from_the_side_of_its_light():
    assets = take(sample_assets(60, 0), torch.tensor([0]))
    assets = assets._replace(category=torch.tensor([CATEGORIES.index("ball")]), material=torch.tensor([0]))
    for x in (-1.0, 1.0):
        lit = assets._replace(light=torch.tensor([[x, 1.0, 0.0]]) / math.sqrt(2))
        front = render(lit, azimuth=(0,), geometry=False).rgb[0, 0].mean(dim=0)
        left, right = front[12:20, 7:14].mean(), front[12:20, 18:25].mean()
        assert (right - left) * x > 0.02
    toward = -camera(0)[2][None]  # light from where we stand, and from behind
    ahead, behind = [render(assets._replace(light=s * toward), azimuth=(0,), geometry=False).rgb[0, 0, 0]
                     for s in (1, -1)]
    gain = ahead / behind - 1
    assert gain[14:18, 14:18].mean() > 2 * gain[14:18, 8].mean() > 0.2  # by the cosine: less at the rim


def test_styles_and_backgrounds_differ(world):
    assets = take(world[0], slice(0, 4))
    pictures = [render(assets, Look(style), (30,), geometry=False).rgb for style in LOOKS]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a - b).abs().mean() > 0.01
    look = Look(background=["white", "black", "sky", "gray"])
    corner = render(assets, look, (0,), geometry=False).rgb[:, 0, :, 0, 0]
    assert corner[0].min() == 1 and corner[1].max() < 0.1 and corner[2][0] < 0.4 and corner[3].std() < 1e-6


def test_unknown_words_and_wrong_shapes_are_refused(world):
    assets = take(world[0], slice(0, 2))
    with pytest.raises(ValueError, match="unknown style 'oil'.*photo"):
        render(assets, Look("oil"))
    with pytest.raises(ValueError, match="unknown background 'plaid'"):
        render(assets, Look(background=["white", "plaid"]))
    with pytest.raises(ValueError, match=r"azimuth has shape \(3, 1\)"):
        render(assets, azimuth=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least one object"):
        sample_assets(0, 1)


def test_same_seed_same_pixels_whatever_the_batch():
    assets = sample_assets(12, 3)
    first, again = render(assets, Look(seed=5)), render(assets, Look(seed=5))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.rgb, render(assets, Look(seed=6), geometry=False).rgb)  # the grain
    few = render(take(assets, slice(0, 5)), Look(seed=5))
    assert all(((a[:5] - b).abs() < 2e-3).float().mean() > 0.9999 for a, b in zip(first, few))
    assert ((first.position[:5] - few.position).abs() < 1e-6).float().mean() > 0.9995  # a ray knows not of the others


# ---- meshes


@pytest.mark.parametrize("category", ["ball", "donut", "chair"])
def test_asset_meshes_are_closed_welded_and_face_outwards(category):
    asset = one_asset(category)
    mesh = asset_mesh(asset, 48)
    edges = torch.cat([mesh.faces[:, [i, (i + 1) % 3]] for i in range(3)])
    there, back = ({tuple(edge) for edge in way.tolist()} for way in (edges, edges.flip(1)))
    assert there == back and volume(mesh) > 0  # each edge is passed once in each direction
    assert len(mesh.vertices.unique(dim=0)) > 0.999 * len(mesh.vertices)
    distance = nearest(SHAPES[category](mesh.vertices.T.unbind(), *asset.shape[0][:, None].unbind()))
    assert distance.abs().median() < 1e-3 and distance.abs().max() < 0.02
