"""The depth condition of CAD's refinement: the maps read off an image, and what the texturing model is given."""
import pytest
import torch
from conftest import TINY, random_model

from data import control_maps
from domain_shifter import DomainShifters, ShiftedDiT
from geometry.camera import AZIMUTHS, project
from related.depth_condition import read_control, refine_by_depth, train_surface_net
from sample import Sampling
from toy.judge import in_camera
from toy.render import Look, render
from toy.world import VOCAB, sample_assets


def seen(azimuth, elevation):
    """Renders of six objects from azimuth (6,) and elevation (6,), and the truth as a SurfaceNet would give it."""
    views = render(sample_assets(6, 5), Look("render"), azimuth[:, None], elevation=elevation)
    normal = in_camera(views.normal, azimuth[:, None], elevation[:, None])[:, 0]
    depth = project(views.position, azimuth[:, None], elevation[:, None])[2]                        # (6, 1, H, W)
    return views, (normal, depth, (normal != 0).any(dim=1, keepdim=True).float() - 0.5)


def test_perfect_maps_of_the_four_views_are_the_control():
    for azimuth in AZIMUTHS:
        views, truth = seen(torch.full((6,), float(azimuth)), torch.full((6,), 20.0))
        control, place = read_control(lambda images: truth, 2 * views.rgb[:, 0] - 1, torch.full((6,), azimuth + 0.0),
                                      torch.full((6,), 20.0))
        assert (control - control_maps(views)).abs().max() < 1e-3
        assert (place == AZIMUTHS.index(azimuth)).all()


def test_between_the_four_views_the_object_is_turned():
    """From 100 degrees and 30: what the camera at 90 sees of the object turned back by 10, each place on its pixel."""
    azimuth, elevation = torch.full((6,), 100.0), torch.full((6,), 30.0)
    views, truth = seen(azimuth, elevation)
    control, place = read_control(lambda images: truth, 2 * views.rgb[:, 0] - 1, azimuth, elevation)
    whole = (views.normal[:, 0] != 0).any(dim=1)
    assert control[:, 0].movedim(1, 3)[~whole].eq(1).all()
    column, row, _ = project(control[:, 0, 3:] / 2, 90.0 * place, elevation)
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    assert (place == 1).all()
    assert (column - columns)[whole].abs().max() < 0.02 and (row - rows)[whole].abs().max() < 0.02
    turn = torch.deg2rad(torch.tensor(-10.0))
    back = torch.tensor([[turn.cos(), 0, turn.sin()], [0, 1, 0], [-turn.sin(), 0, turn.cos()]])     # about y
    for maps, of_object in ((control[:, 0, :3], views.normal[:, 0]), (control[:, 0, 3:] / 2, views.position[:, 0])):
        turned = torch.einsum("ij,njhw->nihw", back, of_object)
        assert (maps - turned).abs().amax(dim=1)[whole].max() < 1e-3


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_the_texturing_model_sees_maps_places_and_the_prompt_alone(cfg_scale):
    texturing = ShiftedDiT(random_model(), DomainShifters(TINY))
    given, places = [], []
    texturing.register_forward_pre_hook(lambda module, inputs, named: given.append((inputs, named)), with_kwargs=True)
    texturing.dit.register_forward_pre_hook(lambda module, inputs: places.append(module.places.tolist()))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    poses = torch.tensor([0.0, 95, 200]), torch.tensor([10.0, 20, 30])

    def net(pixels):
        return torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    sampling, maps = Sampling(cfg_scale=cfg_scale, num_steps=10), read_control(net, images, *poses)
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(refine_by_depth(texturing, images, noise, maps, "a red mug", 0.0, sampling), images)
    out = refine_by_depth(texturing, images, noise, maps, "a red mug", 0.8, sampling)
    assert out.shape == images.shape and texturing.dit.places is None
    passes = 1 if cfg_scale == 1 else 2
    assert [int(inputs[1][0]) for inputs, _ in given] == list(range(799, 0, -100))
    assert places == 8 * [passes * [0, 1, 2]]
    assert torch.equal(given[0][1]["control"], maps[0].repeat(passes, 1, 1, 1, 1))
    assert [VOCAB[word] for word in given[0][1]["text"][0] if word > 1] == ["a", "red", "mug"]
    assert (given[0][1]["domains"] == 1).all()                          # e_real


def test_a_surface_net_learns_normals_and_depth(tmp_path):
    net = train_surface_net(tmp_path, num=40, steps=60)
    views, (normal, depth, on) = seen(torch.linspace(0, 300, 6), torch.full((6,), 20.0))
    shown, behind, logit = net(views.rgb[:, 0])
    assert ((logit > 0) == (on > 0)).float().mean() > 0.9
    there = views.mask[:, 0, 0] == 1
    behind, depth = behind[:, 0][there], depth[:, 0][there]
    assert (behind - depth).abs().mean() < 0.8 * depth.abs().mean()     # than the plane through the middle
    assert (shown * normal).sum(1)[there].mean() > 0.7
    assert torch.allclose(shown.norm(dim=1), torch.ones(6, 32, 32), atol=1e-4)
