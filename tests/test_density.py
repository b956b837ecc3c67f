"""How far features lie from those of good images."""

import pytest
import torch
from torch import Tensor

from models.density import FeatureDistance, GoodFeatures, neighbourhood

EVERYWHERE = (slice(0, 8), slice(0, 8))


def features_of(count: int, *, seed: int = 0) -> Tensor:
    """(B, 3, 8, 8): correlated, of very different scales, and elsewhere at every place."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.0, 3.0, 9.0]])
    noise = torch.einsum("bchw,dc->bdhw", torch.randn(count, 3, 8, 8, generator=generator), mixing)
    return noise + torch.arange(64.0).view(8, 8)


def fitted(features: Tensor) -> FeatureDistance:
    distance = FeatureDistance(channels=3, cells=8)
    good = GoodFeatures(distance)
    for chunk in features.split(7):
        good.add(chunk, *EVERYWHERE)
    good.fit()
    return distance


def test_the_distance_is_mahalanobis_from_the_mean_at_the_place():
    good, strange = features_of(200), features_of(4, seed=1) + torch.tensor([2.0, -1.0, 5.0]).view(1, 3, 1, 1)
    known = neighbourhood(good).double()
    mean = known.mean(dim=0)
    offsets = (known - mean).transpose(0, 1).flatten(1)
    inverse = torch.linalg.inv(offsets @ offsets.T / offsets.shape[1])
    offset = neighbourhood(strange).double() - mean
    expected = (torch.einsum("bchw,cd,bdhw->bhw", offset, inverse, offset) / 3).sqrt()
    assert torch.allclose(fitted(good)(strange, *EVERYWHERE)[:, 0].double(), expected, rtol=1e-3)


def test_good_features_are_about_one_away_and_strange_ones_further():
    distance = fitted(features_of(200))
    good = distance(features_of(50, seed=1), *EVERYWHERE)
    assert good.shape == (50, 1, 8, 8)
    assert float(good.square().mean()) == pytest.approx(1, abs=0.1)
    strange = features_of(50, seed=1)
    strange[:, :2, 4, 4] += torch.tensor([6.0, -6.0])  # against the correlation, within each one's range
    far = distance(strange, *EVERYWHERE)
    assert far[:, 0, 4, 4].mean() > 3 * far[:, 0, 0, 0].mean()


def test_what_is_usual_at_one_place_is_strange_at_another():
    distance = fitted(features_of(200))
    turned = features_of(20, seed=1).flip(2)
    assert distance(turned, *EVERYWHERE).mean() > 3


def test_windows_know_which_cells_they_are():
    whole, distance = features_of(200), FeatureDistance(channels=3, cells=8)
    flat = whole[:, :, :, :] * 0 + torch.arange(64.0).view(8, 8) // 32 * 10 + 0.1 * torch.randn_like(whole)
    good = GoodFeatures(distance)
    for rows in (slice(0, 4), slice(4, 8)):
        good.add(flat[:, :, rows], rows, slice(0, 8))
    good.fit()
    assert distance(flat[:5, :, :4], slice(0, 4), slice(0, 8)).mean() < 1.5
    assert distance(flat[:5, :, :4], slice(4, 8), slice(0, 8)).mean() > 20


def test_features_that_never_vary_keep_the_distance_finite():
    distance = fitted(torch.full((10, 3, 8, 8), 5.0))
    assert float(distance(torch.full((1, 3, 8, 8), 5.0), *EVERYWHERE).max()) == pytest.approx(0, abs=1e-3)
    assert distance(torch.full((1, 3, 8, 8), 6.0), *EVERYWHERE).isfinite().all()


def test_a_direction_in_which_good_features_never_vary_does_not_decide():
    """A change of a hundredth in it would otherwise outweigh all others."""
    good = features_of(100)
    good[:, 1] = good[:, 0]
    changed = features_of(20, seed=1)
    changed[:, 1] = changed[:, 0] + 0.01
    assert fitted(good)(changed, *EVERYWHERE).mean() < 1.5
