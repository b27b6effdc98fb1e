"""The judges of the toy world: learn the domain and the surface, are kept, are the same on any number of threads."""

import pytest
import torch
from shapes import one_asset

import data
from dit import PRESETS, read_config
from evaluate import fid
from geometry.camera import AZIMUTHS
from support.files import read_metadata, up_to_date
from toy import judge
from toy.render import Look, render
from toy.world import WORLD_VERSION, sample_assets


def test_feature_net_learns_the_domain_and_is_kept(tmp_path):
    net = judge.train_feature_net(tmp_path, num=40, steps=30)
    again = judge.train_feature_net(tmp_path, num=40, steps=30)
    assets = sample_assets(24, data.SEEDS["evaluation"])
    photo, picture = (render(assets, Look(style), geometry=False).rgb.flatten(0, 1) for style in ("photo", "render"))
    features = net.features(photo)
    assert features.shape == (96, 64) and torch.equal(features, again.features(photo))
    assert torch.allclose(features[:7], net.features(photo[:7], batch=3), atol=1e-4)
    assert net.photo_probability(photo).mean() - net.photo_probability(picture).mean() > 0.3
    other = net.features(picture)
    assert fid(features, other) > 2 * fid(features[::2], features[1::2])


def test_the_judge_is_trained_on_one_thread_and_leaves_their_number(tmp_path, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    fit = judge.fit_feature_net

    def watched(images, labels, steps, seed):
        seen.append(torch.get_num_threads())
        return fit(images, labels, steps, seed)
    monkeypatch.setattr(judge, "fit_feature_net", watched)
    torch.set_num_threads(2)
    try:
        judge.train_feature_net(tmp_path, num=8, steps=1)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_examples_turn_through_views_and_backgrounds():
    images, labels = judge.domain_examples(9, 16, 3, ("white", "black"))
    assert images.shape == (18, 3, 16, 16) and labels.tolist()[9][3] == 1
    assert torch.equal(labels[:9, :3], labels[9:, :3])
    corners = images[..., 0, 0].mean(dim=1).view(2, 9)
    assert ((corners > 0.9) == torch.tensor([True] * 4 + [False] * 4 + [True])).all()


def test_normals_of_a_camera_point_right_up_and_at_it():
    """On a ball: the pixel right of the middle has a normal to the right, whichever side is seen."""
    views = render(one_asset("ball"), size=33)
    turned = judge.in_camera(views.normal, torch.tensor(AZIMUTHS)[None])
    assert torch.allclose(turned[0, :, :, 16, 16], torch.tensor([0., 0, 1]).expand(4, 3), atol=1e-3)
    right, above = turned[0, :, :, 16, 24], turned[0, :, :, 8, 16]
    assert (right[:, 0] > 0.5).all() and (above[:, 1] > 0.5).all() and right[:, 1].abs().max() < 1e-2
    assert torch.allclose(turned.norm(dim=2), views.normal.norm(dim=2), atol=1e-5)


def test_normal_net_learns_the_surface_and_its_error_is_an_angle(tmp_path):
    net = judge.train_normal_net(tmp_path, num=30, steps=30)
    again = judge.train_normal_net(tmp_path, num=30, steps=30)
    assets = sample_assets(6, data.SEEDS["evaluation"])
    photo, plain = render(assets), render(assets, Look("render"), geometry=False)
    errors = [net.angular_error(rgb, photo.normal) for rgb in (photo.rgb, plain.rgb)]
    assert torch.equal(errors[0], again.angular_error(photo.rgb, photo.normal))
    white = torch.ones_like(photo.rgb)
    assert all((error < 40).all() and error.mean() < net.angular_error(white, photo.normal).mean() for error in errors)
    others = net.angular_error(photo.rgb, photo.normal.roll(1, 0))      # another object's control
    assert others.mean() > 1.2 * errors[0].mean()

    class Perfect(judge.NormalNet):
        def forward(self, images):
            return judge.in_camera(photo.normal, torch.tensor(AZIMUTHS).expand(6, 4)).flatten(0, 1)
    assert Perfect().angular_error(photo.rgb, photo.normal).max() < 0.1
    tilted = torch.stack([photo.normal[:, :, 0], photo.normal[:, :, 2], -photo.normal[:, :, 1]], dim=2)  # 90 degrees
    angle = (tilted * photo.normal).sum(2).clamp(-1, 1).acos().rad2deg()[photo.normal.norm(dim=2) > 0.5].mean()
    assert Perfect().angular_error(photo.rgb, tilted).mean() == pytest.approx(angle.item(), rel=0.1)


def test_what_the_judges_read_is_counted(shipped_judges):
    """Shares against a count by hand; the two judges are asked separately."""
    assets = sample_assets(24, data.SEEDS["evaluation"])
    images, labels = render(assets, azimuth=(0,), geometry=False).rgb[:, 0], torch.stack(assets[:3], dim=1)
    row = judge.read(images, labels, shipped_judges)
    with torch.no_grad():
        heads = shipped_judges.net(images)
    for name, truth in zip(("category", "color", "material"), labels.T):
        right = sum(int(logits.argmax()) == int(label) for logits, label in zip(heads[name], truth))
        assert row[name] == pytest.approx(right / 24)
    said = [heads[name][k].softmax(0)[labels[k, i]] for i, name in enumerate(heads) if name != "domain" for k in range(24)]
    assert row["caption"] == pytest.approx(sum(map(float, said)) / 72, abs=1e-5)
    for name, net in (("photo", shipped_judges.net), ("photo_2", shipped_judges.second)):
        assert row[name] == (net.photo_probability(images) > 0.5).double().mean()

    class Never(judge.FeatureNet):
        def photo_probability(self, images):
            return torch.zeros(len(images))
    assert judge.read(images, labels, shipped_judges._replace(second=Never()))["photo_2"] == 0


OF_CAD = ("toy_cad_9.safetensors", "toy_view_prior.safetensors")        # see tests/related/test_cad.py


def test_the_shipped_judges_and_models_are_of_this_world():
    """Else every command would train judges anew, or refuse the models."""
    assert sorted(path.name for path in judge.SHIPPED.glob("*")) == [
        "features_8000_5000_32_11.safetensors", "features_8000_5000_32_13.safetensors", "normals_8000_4000_32_12.safetensors"]
    for path in judge.SHIPPED.glob("*"):
        net = judge.NormalNet() if "normals" in path.name else judge.FeatureNet()
        shapes = {name: list(weight.shape) for name, weight in net.state_dict().items()}
        assert up_to_date(path, dict(net=shapes, name=path.stem, version=WORLD_VERSION))    # of any version of torch
    weights = sorted(judge.SHIPPED.parent.glob("toy_*.safetensors"))
    weights = [path for path in weights if path.name not in OF_CAD]
    assert len(weights) == 4 and PRESETS["toy"].world == PRESETS["small"].world == WORLD_VERSION
    for path in weights:
        assert read_config(path, read_metadata(path)) == PRESETS["toy"]
