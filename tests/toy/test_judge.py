"""The judge of the toy world: learns the domain, is kept, is the same on any number of threads."""

import torch

import data
from evaluate import fid
from toy import judge
from toy.render import Look, render
from toy.world import sample_assets


def test_feature_net_learns_the_domain_and_is_kept(tmp_path):
    net = judge.train_feature_net(tmp_path, num=100, steps=60)
    again = judge.train_feature_net(tmp_path, num=100, steps=60)
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
    assert (labels[:9, 2] == -100).all() and torch.equal(labels[:9, :2], labels[9:, :2])
    corners = images[..., 0, 0].mean(dim=1).view(2, 9)
    assert ((corners > 0.9) == torch.tensor([True] * 4 + [False] * 4 + [True])).all()
