"""The component maps and their fusion, against closed forms, scipy and numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.maps import (
    CELLS,
    GRADIENT_CONSTANT,
    HIGH,
    LOW,
    OF_FEATURES,
    GoodMaps,
    MapFusion,
    Weights,
    enlarged,
    gradient_magnitude_similarity,
    residual_map,
    smooth,
)


def images_of(count: int, *, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """Noise, standardised."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def maps_of(count: int, *, components: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    """Noise about another mean at every place, so that no place, component or image is like another."""
    generator = torch.Generator().manual_seed(seed)
    usual = torch.randn(1, components, size, size, generator=generator)
    return usual + 0.3 * torch.randn(count, components, size, size, generator=generator)


def good_maps(maps: Tensor, *, chunk: int = 100) -> GoodMaps:
    good = GoodMaps()
    for part in torch.split(maps, chunk):
        good.add(part)
    return good


# Gradient magnitude similarity and the residual


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_magnitude_similarity_is_one_for_equal_images(channels):
    images = images_of(2, channels=channels)
    similarity = gradient_magnitude_similarity(images, images)
    assert similarity.shape == (2, 1, 32, 32)
    assert torch.allclose(similarity, torch.ones_like(similarity), atol=1e-6)


def test_gradient_magnitude_similarity_is_symmetric_and_in_its_range():
    first, second = images_of(4), images_of(4, seed=1)
    similarity = gradient_magnitude_similarity(first, second)
    assert similarity.min() > 0
    assert similarity.min() < 0.5  # two noise images differ: the range is used
    assert similarity.max() <= 1 + 1e-6
    assert torch.equal(similarity, gradient_magnitude_similarity(second, first))


def test_gradient_magnitude_similarity_ignores_a_shift_in_brightness():
    images = images_of(2) / 2
    assert torch.allclose(gradient_magnitude_similarity(images, images + 0.3), torch.ones(2, 1, 32, 32), atol=1e-4)


def test_gradient_magnitude_similarity_of_a_ramp_and_a_flat_image_is_the_closed_form():
    ramp = torch.linspace(-1, 1, 33).expand(1, 1, 33, 33)  # the gray level in [0, 1] rises by 1/32 per column
    similarity = gradient_magnitude_similarity(ramp, torch.zeros_like(ramp))[0, 0]
    # The Prewitt operator spans two columns and sums three rows of a third each.
    slope = 2 / 32
    expected = GRADIENT_CONSTANT / (slope**2 + GRADIENT_CONSTANT)  # 0.40
    # A flat image's magnitude is 1e-4, not 0: that is where the tolerance comes from.
    assert torch.allclose(similarity[:, 1:-1], torch.full((33, 31), expected), atol=3e-3)
    # The same turned by a quarter: neither direction is favoured.
    turned = gradient_magnitude_similarity(ramp.mT, torch.zeros_like(ramp))[0, 0]
    assert torch.allclose(turned, similarity.T, atol=1e-6)


@pytest.mark.parametrize("size", [32, 48, 112])
def test_residual_map_of_equal_images_is_zero(size):
    images = images_of(2, size=size)
    maps = residual_map(images, images)
    assert maps.shape == (2, 1, size, size)
    assert maps.abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_residual_map_stays_in_its_range(channels):
    black, white = -torch.ones(1, channels, 32, 32), torch.ones(1, channels, 32, 32)
    for first, second in [(images_of(4, channels=channels), images_of(4, channels=channels, seed=1)), (black, white)]:
        maps = residual_map(first, second)
        assert maps.min() >= 0
        assert maps.max() <= 2
    # No edges at all, and the largest difference of intensity.
    assert torch.allclose(residual_map(black, white), torch.ones(1, 1, 32, 32), atol=1e-5)


@pytest.mark.parametrize("difference", [1e-7, 1e-6, 1e-5])
def test_residual_map_of_nearly_equal_images_is_not_negative(difference):
    """In float32 a similarity can round to just above one."""
    images = images_of(32)
    assert residual_map(images, images + difference * images_of(32, seed=1)).min() >= 0


@pytest.mark.parametrize(("row", "column"), [(20, 9), (0, 0), (31, 31), (0, 17)])
def test_residual_map_peaks_where_the_defect_is(row, column):
    images = torch.zeros(1, 3, 32, 32)
    defect = images.clone()
    defect[..., row, column] = 1
    peak = int(residual_map(defect, images)[0, 0].argmax())
    # At the border itself a slope is half as steep, as the row outside repeats the last one.
    assert abs(peak // 32 - row) <= 1
    assert abs(peak % 32 - column) <= 1


def test_residual_map_is_higher_at_a_defect_than_far_from_it():
    images = torch.zeros(1, 3, 128, 128)
    defect = images.clone()
    defect[..., 60:70, 60:70] = 0.8
    maps = residual_map(defect, images)[0, 0]
    assert maps[60:70, 60:70].min() > 0.1
    assert maps[:40].max() < 1e-6


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.4), (-1.0, 1.0)])
def test_residual_map_of_two_flat_images_has_no_border(first, second):
    maps = residual_map(torch.full((1, 3, 64, 64), first), torch.full((1, 3, 64, 64), second))
    assert torch.allclose(maps, torch.full_like(maps, abs(first - second) / 2), atol=1e-5)


def test_residual_map_adds_the_difference_to_the_mean_over_three_scales():
    """A ramp rebuilt as flat gray: pooling doubles its slope per pixel from scale to scale."""
    column = 16
    ramp = torch.linspace(-1, 1, 65)[:-1].expand(1, 3, 64, 64)  # the gray level rises by 1/64 per column
    changes = [1 - GRADIENT_CONSTANT / ((2 / 64 * 2**scale) ** 2 + GRADIENT_CONSTANT) for scale in range(3)]
    expected = abs(float(ramp[0, 0, 0, column])) / 2 + sum(changes) / 3
    assert float(residual_map(ramp, torch.zeros_like(ramp))[0, 0, 32, column]) == pytest.approx(expected, abs=3e-3)


def test_residual_map_has_a_defect_in_its_middle_at_every_scale():
    images = torch.zeros(1, 3, 64, 64)
    defect = images.clone()
    defect[..., 8:16, 48:56] = 0.1
    weights = residual_map(defect, images)[0, 0].double()
    positions = torch.arange(64, dtype=torch.float64)
    row, column = (weights.sum(dim=axis) @ positions / weights.sum() for axis in (1, 0))
    assert float(row) == pytest.approx(11.5, abs=0.05)
    assert float(column) == pytest.approx(51.5, abs=0.05)


def test_residual_map_sees_a_defect_of_colour_alone():
    images = torch.zeros(1, 3, 32, 32)
    defect = images.clone()
    defect[:, 0, 10:20, 10:20], defect[:, 1, 10:20, 10:20] = 0.5, -0.5  # as bright as before
    maps = residual_map(defect, images)[0, 0]
    assert maps[14, 14] > 0.1
    assert maps[0, 0] < 1e-3


# Component maps


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_smooth_is_a_gaussian_filter_of_every_map_by_itself(sigma):
    maps = maps_of(2)
    # scipy cuts the kernel at as many pixels, and "nearest" is its word for replicated borders.
    expected = ndimage.gaussian_filter(
        maps.double().numpy(), sigma=(0, 0, sigma, sigma), mode="nearest", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
    )
    assert smooth(maps, sigma=sigma).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("height", [0.3, -25.0])
def test_smooth_keeps_a_flat_map_up_to_its_borders(height):
    maps = torch.full((1, 2, 32, 32), height)
    assert torch.allclose(smooth(maps, sigma=2), maps, rtol=1e-6)


def test_smooth_keeps_the_sum_of_a_map_that_is_quiet_at_the_borders():
    maps = torch.zeros(1, 1, 32, 32)
    maps[0, 0, 12, 17] = 5
    smoothed = smooth(maps, sigma=2)
    assert float(smoothed.sum()) == pytest.approx(5, abs=1e-4)
    assert int(smoothed.argmax()) == 12 * 32 + 17


# Fusion


def fusion_of(
    *,
    mean: Tensor | float = 0.0,
    deviation: Tensor | float = 1.0,
    components: int = 1,
    low: float = 0.0,
    high: float = 1.0,
) -> MapFusion:
    """Flat unless a tensor (G, G) says otherwise; all components alike."""
    places = [
        torch.as_tensor(value).expand(components, *torch.as_tensor(value).shape or (8, 8))
        for value in (mean, deviation)
    ]
    ends = [torch.full((2 * components,), value) for value in (low, high)]
    return MapFusion(places[0], places[1], ends[0], ends[1])


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("size", [8, 32, 48, 112])
def test_anomaly_maps_have_one_height_per_pixel_and_are_not_negative(size, components):
    maps = 30 * maps_of(3, components=components, size=size)  # far above and far below what is usual
    fused = fusion_of(components=components)(maps)
    assert fused.shape == (3, size, size)
    assert fused.min() >= 0
    assert fused.isfinite().all()


def test_fusion_scales_each_view_from_low_to_high():
    """By hand, in a flat fusion, at a pixel with heights 3 and 6: the weighted mean of four views, the head's logits
    four times the residual."""
    fusion = MapFusion(
        mean=torch.tensor([1.0, 2.0])[:, None, None].expand(2, 8, 8),
        deviation=torch.tensor([0.5, 4.0])[:, None, None].expand(2, 8, 8),
        low=torch.tensor([1.0, 2.0, 0.0, -1.0]),
        high=torch.tensor([2.0, 10.0, 8.0, 1.0]),
    )
    maps = torch.tensor([3.0, 6.0])[None, :, None, None].expand(1, 2, 32, 32)
    # The views are 3 and 6 as they are, (3 - 1) / 0.5 = 4 and (6 - 2) / 4 = 1 in deviations.
    scaled = [(3 - 1) / (2 - 1), (6 - 2) / (10 - 2), (4 - 0) / (8 - 0), (1 - -1) / (1 - -1)]
    assert torch.allclose(fusion.views(maps)[0, :, 7, 30], torch.tensor(scaled))
    mean = (scaled[0] + 4 * scaled[1] + scaled[2] + 4 * scaled[3]) / 10
    expected = math.log1p(math.exp(mean))
    assert torch.allclose(fusion(maps), torch.full((1, 32, 32), expected))


@pytest.mark.parametrize("cell", [2, 8])
def test_maps_of_cells_are_joined_by_their_geometric_mean_and_brought_to_pixels(cell):
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.rand((2, 2, 8, 8), generator=generator)
    maps = maps_of(2, components=2, size=8)
    weights = Weights((1.5, 1.0), (0.5, 0.0))
    fusion = MapFusion(mean, 1 + deviation, torch.zeros(4), torch.ones(4), weights, cell)
    residual, logits = F.softplus(maps).unbind(dim=1)
    by_place = F.softplus((maps[:, 0] - mean[0]) / (1 + deviation[0]))
    fused = (residual**1.5 * logits * by_place**0.5) ** (1 / 3)
    assert fusion(maps).shape == (2, 8 * cell, 8 * cell)
    assert torch.allclose(fusion(maps), smooth(enlarged(fused[:, None], cell), sigma=cell / 4)[:, 0], atol=1e-6)


def test_what_one_map_of_cells_alone_finds_counts_less_than_what_both_do():
    fusion = MapFusion(torch.zeros(2, 8, 8), torch.ones(2, 8, 8), torch.zeros(4), torch.ones(4), OF_FEATURES[0], cell=8)
    alone, both = torch.full((2, 1, 2, 8, 8), -1000.0)
    alone[0, 0, 3, 3] = 10
    both[0, :, 3, 3] = 5
    assert 0 < fusion(alone).max() < 0.5 * fusion(both).max()


def test_a_defect_between_two_cells_is_found_between_them():
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 3, 4:6] = 20
    fusion = MapFusion(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.zeros(2), torch.ones(2), cell=8)
    row, column = divmod(int(fusion(maps)[0].argmax()), 64)
    assert row in (27, 28)  # the middle of the cell
    assert column in (39, 40)  # the border of the two


def test_a_distance_counts_only_as_compared_with_its_place():
    usual = torch.full((3, 8, 8), 5.0)
    fusion = MapFusion(usual, torch.ones(3, 8, 8), low=torch.zeros(6), high=torch.ones(6))
    maps = torch.zeros(1, 3, 32, 32)
    maps[:, 2] = 5
    with_a_usual_distance = fusion(maps)
    further = fusion(maps + torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1))
    # In all 0.25 + 1 as they are and 0.25 + 1 + 0.5 by place; the views of the residual and the logits are 0 and -5.
    before, after = (-5 * (0.25 + 1)) / 3, (-5 * (0.25 + 1) + 0.5) / 3
    assert torch.allclose(with_a_usual_distance, torch.full((1, 32, 32), math.log1p(math.exp(before))))
    assert torch.allclose(further, torch.full((1, 32, 32), math.log1p(math.exp(after))))


def test_fusion_of_one_component_changes_no_order_where_all_places_are_alike():
    maps = maps_of(4, components=1)
    fused = fusion_of(mean=0.4, deviation=0.7, low=0.2, high=1.3)(maps)
    heights, order = maps.flatten().sort()
    rising = fused.flatten()[order].diff()
    assert (rising >= 0).all()
    assert (rising[heights.diff() > 1e-3] > 0).all()


def test_a_height_that_is_usual_at_its_place_is_less_of_an_anomaly():
    mean = torch.zeros(8, 8)
    mean[2, 5] = 1.0  # an edge that is never rebuilt
    fused = fusion_of(mean=mean)(torch.ones(1, 1, 64, 64))[0]
    usual, elsewhere = fused[20, 44], fused[44, 20]
    assert usual < elsewhere - 0.1
    # It is seen all the same: as it is, the map is as high here as there.
    quiet = fusion_of(mean=mean)(torch.zeros(1, 1, 64, 64))[0]
    assert usual > quiet[20, 44] + 0.1


def test_a_height_is_less_of_an_anomaly_where_good_images_differ():
    deviation = torch.ones(8, 8)
    deviation[2, 5] = 10.0
    fused = fusion_of(deviation=deviation)(torch.ones(1, 1, 64, 64))[0]
    assert fused[20, 44] < fused[44, 20] - 0.1


def test_fusion_of_an_image_does_not_depend_on_its_batch():
    maps = maps_of(5)
    fusion, _ = good_maps(maps_of(6, seed=1)).fusions()
    together = fusion(maps)
    alone = torch.cat([fusion(one) for one in torch.split(maps, 1)])
    assert torch.allclose(together, alone, atol=1e-6)


# What the fusion is made from


def place_by_definition(pixels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of maps (n, K, G, s, G, s), in cells of s x s pixels: mean and deviation by cell, (K, G, G)."""
    mean, deviation = pixels.mean(axis=(0, 3, 5)), pixels.std(axis=(0, 3, 5))
    return mean, deviation + deviation.mean(axis=(1, 2), keepdims=True)


@pytest.mark.parametrize(("cells", "side"), [(32, 1), (CELLS, 2)])
def test_place_statistics_are_numpys(cells, side):
    maps = maps_of(5, size=cells * side)
    pixels = maps.double().numpy().reshape(5, 2, cells, side, cells, side)
    whole, others = good_maps(maps).fusions()
    mean, deviation = place_by_definition(pixels)
    assert whole.mean.numpy() == pytest.approx(mean, abs=1e-6)
    assert whole.deviation.numpy() == pytest.approx(deviation, abs=1e-6)
    assert len(others) == 5
    for index, fusion in enumerate(others):
        mean, deviation = place_by_definition(np.delete(pixels, index, axis=0))
        assert fusion.mean.numpy() == pytest.approx(mean, abs=1e-6)
        assert fusion.deviation.numpy() == pytest.approx(deviation, abs=1e-6)


def test_the_fusion_of_the_others_never_saw_the_image():
    maps = maps_of(6, size=32)
    maps[2, :, 4:9, 20:30] += 50  # dust
    _, others = good_maps(maps).fusions()
    for index in range(6):
        without, _ = good_maps(torch.cat([maps[:index], maps[index + 1 :]])).fusions()
        assert torch.allclose(others[index].mean, without.mean, atol=1e-5)
        assert torch.allclose(others[index].deviation, without.deviation, atol=1e-5)
    # The dust is in the statistics of all but its own image: the comparison is able to fail.
    assert (others[1].mean - others[2].mean).max() > 5


def test_the_fusion_of_the_others_never_saw_another_picture_of_the_same_part():
    maps = maps_of(6, size=32)
    maps[2, :, 4:9, 20:30] += 50
    maps[4, :, 4:9, 20:30] += 50  # the same part, dusty in both pictures
    whole, others = good_maps(maps).fusions([7, 7, 0, 3, 0, 5])
    clean, _ = good_maps(maps[[0, 1, 3, 5]]).fusions()
    for index in (2, 4):
        assert torch.allclose(others[index].mean, clean.mean, atol=1e-5)
        assert torch.allclose(others[index].deviation, clean.deviation, atol=1e-5)
    assert torch.equal(others[0].mean, others[1].mean)
    assert torch.equal(whole.mean, good_maps(maps).fusions()[0].mean)


def test_quantiles_of_good_pixels_become_zero_and_one():
    """Each image is seen by the others' statistics, as parts will be that had no part in them."""
    maps = maps_of(7, size=32)
    whole, others = good_maps(maps).fusions()
    views = torch.cat(
        [torch.cat([one, (one - own.mean) / own.deviation]).flatten(1) for one, own in zip(maps, others, strict=True)],
        dim=1,
    ).double()
    for fusion in (whole, *others):
        scaled = (views - fusion.low[:, None]) / (fusion.high - fusion.low)[:, None]
        assert np.quantile(scaled.numpy(), LOW, axis=1) == pytest.approx(np.zeros(4), abs=1e-4)
        assert np.quantile(scaled.numpy(), HIGH, axis=1) == pytest.approx(np.ones(4), abs=1e-4)


def test_few_pixels_of_new_good_images_are_above_the_high_end():
    maps = maps_of(40, components=1, size=48)
    fusion, _ = good_maps(maps[:20]).fusions()
    above = (fusion(maps[20:]) > F.softplus(torch.tensor(1.0))).double().mean()
    # The mean of two views that agree in part: rarer than each, and not never.
    assert 0 < above <= 1 - HIGH


@pytest.mark.parametrize("height", [0.0, 0.7, -3.0, -40.0, 1000.0])
def test_images_that_are_all_alike_give_finite_maps(height):
    maps = torch.full((5, 2, 32, 32), height)
    whole, others = good_maps(maps).fusions()
    for fusion in (whole, *others):
        assert fusion(maps).isfinite().all()
        higher = fusion(maps + 1)
        assert higher.isfinite().all()
        assert higher.min() > fusion(maps).max()


def test_maps_that_vary_at_a_few_places_only_count_no_change_as_many_deviations():
    """A black background never varies: a gray level there would otherwise be infinitely unusual."""
    maps = maps_of(8, components=1, size=32)
    maps[..., :16] = 0
    fusion, _ = good_maps(maps).fusions()
    assert fusion.deviation[..., :16].min() > 0.1 * fusion.deviation.max()


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_chunks_of_any_size_give_the_same_fusion(chunk):
    maps = maps_of(7, size=80)
    whole, others = good_maps(maps).fusions()
    chunked, chunked_others = good_maps(maps, chunk=chunk).fusions()
    for fusion, other in zip((whole, *others), (chunked, *chunked_others), strict=True):
        for name, value in fusion.state_dict().items():
            assert torch.allclose(value, other.state_dict()[name], atol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 80, 256])
def test_cells_are_no_more_than_pixels(size):
    fusion, _ = good_maps(maps_of(4, components=1, size=size)).fusions()
    assert fusion.mean.shape == fusion.deviation.shape == (1, min(CELLS, size), min(CELLS, size))
    assert fusion.low.shape == fusion.high.shape == (2,)
