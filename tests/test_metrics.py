"""The metrics against the definitions, worked out by brute force, by hand, by scikit-learn and by simulation."""

import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from models.calibration import Calibration
from training import metrics

LIMITS = (0.3, 0.05)
SIZES = [(9, 13), (16, 16), (5, 7)]
QUICK = settings(deadline=None, max_examples=50, database=None)


def drawn(levels: int | None, *, seed: int = 0) -> tuple[list[metrics.MapArray], list[metrics.BoolArray]]:
    """Maps and masks of different sizes, many regions; levels: how many values there are, None for no ties."""
    random = np.random.default_rng(seed)
    maps, masks = [], []
    for size in SIZES:
        mask = random.random(size) < 0.15
        anomaly_map = random.normal(size=size) + mask
        if levels is not None:
            anomaly_map = np.clip(np.floor((anomaly_map + 2) / 5 * levels), 0, levels - 1)
        maps.append(anomaly_map.astype(np.float32))
        masks.append(mask)
    return maps, masks


def statistics(maps: list[list[list[float]]], masks: list[list[list[int]]]) -> metrics.PixelStatistics:
    return metrics.pixel_statistics([np.array(m, dtype=np.float32) for m in maps], [np.array(m) > 0 for m in masks])


@st.composite
def small_sets(draw: st.DrawFn) -> tuple[list[metrics.MapArray], list[metrics.BoolArray]]:
    """One to three maps of small whole numbers, with at least one good pixel and one of a defect."""
    shapes = draw(st.lists(array_shapes(min_dims=2, max_dims=2, max_side=5), min_size=1, max_size=3))
    maps = [draw(arrays(np.int64, shape, elements=st.integers(-3, 3))) for shape in shapes]
    masks = [draw(arrays(np.bool_, shape)) for shape in shapes]
    assume(any(mask.any() for mask in masks) and not all(mask.all() for mask in masks))
    return [anomaly_map.astype(np.float32) for anomaly_map in maps], masks


# AUPRO by its definition, sharing no step with training.metrics


def regions_of(mask: metrics.BoolArray) -> list[metrics.BoolArray]:
    """Each region as a mask of its own, by walking from pixel to neighbouring pixel."""
    left, regions = mask.copy(), []
    while left.any():
        region = np.zeros_like(mask)
        waiting = [tuple(np.argwhere(left)[0])]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and left[y, x]:
                left[y, x], region[y, x] = False, True
                waiting += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        regions.append(region)
    return regions


def aupro_by_definition(maps: list[metrics.MapArray], masks: list[metrics.BoolArray], limit: float) -> float:
    """Every value is a threshold. Trapezoids below the curve, the last one cut off at the limit."""
    regions = [
        (anomaly_map, region) for anomaly_map, mask in zip(maps, masks, strict=True) for region in regions_of(mask)
    ]
    good = np.concatenate([anomaly_map[~mask] for anomaly_map, mask in zip(maps, masks, strict=True)])
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in np.unique(np.concatenate([anomaly_map.ravel() for anomaly_map in maps]))[::-1]:
        x1 = float((good >= threshold).mean())
        y1 = float(np.mean([(anomaly_map[region] >= threshold).mean() for anomaly_map, region in regions]))
        if x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
        if x1 >= limit:
            break
        x0, y0 = x1, y1
    return area / limit


@pytest.mark.parametrize("limit", [*LIMITS, 1.0])
@pytest.mark.parametrize("levels", [None, 20, 5, 2, 1])
def test_aupro_is_the_area_that_its_definition_gives(levels, limit):
    for seed in range(2):
        maps, masks = drawn(levels, seed=seed)
        expected = aupro_by_definition(maps, masks, limit)
        assert metrics.aupro(metrics.pixel_statistics(maps, masks), fpr_limit=limit) == pytest.approx(
            expected, abs=1e-9
        )


@QUICK
@given(small_sets(), st.sampled_from([0.01, 0.05, 0.25, 0.3, 0.5, 1.0]))
def test_aupro_of_any_small_maps_is_the_area_that_its_definition_gives(small, limit):
    maps, masks = small
    expected = aupro_by_definition(maps, masks, limit)
    assert metrics.aupro(metrics.pixel_statistics(maps, masks), fpr_limit=limit) == pytest.approx(expected, abs=1e-9)


def test_aupro_of_a_map_drawn_by_hand():
    # Good pixels 1, 2, 3, 4. The region 5 lies above all of them; of the region 2.5, 0 a half lies above half of them.
    found = statistics([[[5, 1, 2, 2.5, 0, 3, 4]]], [[[1, 0, 0, 1, 1, 0, 0]]])
    assert metrics.region_areas(found, fpr_limit=1.0) == pytest.approx([1, 0.25])
    assert metrics.aupro(found, fpr_limit=1.0) == pytest.approx(0.625)
    assert metrics.aupro(found, fpr_limit=0.75) == pytest.approx((1 + (0.25 + 0) / 2 / 0.75) / 2)
    assert metrics.aupro(found, fpr_limit=0.5) == pytest.approx(0.5)


def test_aupro_interpolates_where_a_defect_ties_with_good_pixels():
    # The curve climbs from 0 to 1 between the rates 1/4 and 3/4, in a straight line.
    found = statistics([[[4, 2, 2, 1, 2]]], [[[0, 0, 0, 0, 1]]])
    assert metrics.aupro(found, fpr_limit=0.5) == pytest.approx(0.25 * 0.5 / 2 / 0.5)
    assert metrics.aupro(found, fpr_limit=0.25) == 0
    assert metrics.aupro(found, fpr_limit=1.0) == pytest.approx(0.5)


@pytest.mark.parametrize("limit", LIMITS)
def test_aupro_is_one_for_a_perfect_map_and_half_the_limit_for_a_constant_one(limit):
    _, masks = drawn(None)
    perfect = metrics.pixel_statistics([mask.astype(np.float32) for mask in masks], masks)
    inverted = metrics.pixel_statistics([1 - mask.astype(np.float32) for mask in masks], masks)
    constant = metrics.pixel_statistics([np.ones(mask.shape, dtype=np.float32) for mask in masks], masks)
    assert metrics.aupro(perfect, fpr_limit=limit) == pytest.approx(1, abs=1e-12)
    assert metrics.aupro(inverted, fpr_limit=limit) == 0
    assert metrics.aupro(constant, fpr_limit=limit) == pytest.approx(limit / 2)


def test_pixels_that_touch_at_a_corner_are_one_region():
    diagonal = [[1, 0, 0, 0], [0, 1, 0, 1]]
    found = statistics([[[0] * 4] * 2, [[0] * 4] * 2], [[[0] * 4] * 2, diagonal])
    assert len(metrics.region_areas(found, fpr_limit=0.3)) == 2
    assert found.region_images.tolist() == [1, 1]


def test_regions_know_their_images_and_areas_that_average_to_aupro():
    maps, masks = drawn(20)
    found = metrics.pixel_statistics(maps, masks)
    counts = [len(regions_of(mask)) for mask in masks]
    assert np.bincount(found.region_images).tolist() == counts
    areas = metrics.region_areas(found, fpr_limit=0.3)
    assert ((areas >= 0) & (areas <= 1)).all()
    assert areas.mean() == metrics.aupro(found)


# Pixels


@QUICK
@given(small_sets())
def test_pixel_auroc_and_ap_of_any_small_maps_are_those_of_scikit_learn(small):
    maps, masks = small
    labels, values = (np.concatenate([array.ravel() for array in group]) for group in (masks, maps))
    found = metrics.pixel_statistics(maps, masks)
    assert metrics.pixel_auroc(found) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    assert metrics.pixel_ap(found) == pytest.approx(average_precision_score(labels, values), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 1000, 3])
def test_pixel_auroc_and_ap_of_a_large_map_are_those_of_scikit_learn(levels):
    random = np.random.default_rng(0)
    mask = ndimage.binary_dilation(random.random((300, 400)) < 0.0005, iterations=6)
    anomaly_map = (random.normal(size=mask.shape) + mask).astype(np.float32)
    if levels is not None:
        anomaly_map = np.round(anomaly_map * levels / 8)
    found = metrics.pixel_statistics([anomaly_map], [mask])
    assert metrics.pixel_auroc(found) == pytest.approx(roc_auc_score(mask.ravel(), anomaly_map.ravel()), abs=1e-10)
    expected = average_precision_score(mask.ravel(), anomaly_map.ravel())
    assert metrics.pixel_ap(found) == pytest.approx(expected, abs=1e-10)


def pixel_figures(found: metrics.PixelStatistics) -> list[float]:
    return [
        *(metrics.aupro(found, fpr_limit=limit) for limit in LIMITS),
        metrics.pixel_auroc(found),
        metrics.pixel_ap(found),
    ]


@QUICK
@given(small_sets(), st.sampled_from([lambda x: x**3, lambda x: 8 * x - 3, lambda x: 2**x]))
def test_pixel_figures_do_not_change_under_an_increasing_transform(small, transform):
    maps, masks = small
    transformed = metrics.pixel_statistics([transform(anomaly_map) for anomaly_map in maps], masks)
    assert pixel_figures(transformed) == pixel_figures(metrics.pixel_statistics(maps, masks))


@QUICK
@given(small_sets(), st.randoms(use_true_random=False))
def test_pixel_figures_do_not_depend_on_the_order_of_the_images(small, random):
    maps, masks = small
    order = list(range(len(maps)))
    random.shuffle(order)
    shuffled = metrics.pixel_statistics([maps[index] for index in order], [masks[index] for index in order])
    assert pixel_figures(shuffled) == pytest.approx(pixel_figures(metrics.pixel_statistics(maps, masks)), abs=1e-12)


@pytest.mark.parametrize("pixels", [1, 100, 256, 300])
def test_pixel_figures_do_not_depend_on_how_many_pixels_are_ranked_at_once(monkeypatch, pixels):
    maps, masks = drawn(20)
    expected = pixel_figures(metrics.pixel_statistics(maps, masks))
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", pixels)
    assert pixel_figures(metrics.pixel_statistics(maps, masks)) == expected


def test_pixel_statistics_needs_much_less_memory_than_the_maps(monkeypatch):
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", 2**16)
    random = np.random.default_rng(0)
    maps = [random.random((256, 256), dtype=np.float32) for _ in range(32)]
    masks = [np.zeros((256, 256), dtype=bool) for _ in maps]
    masks[3][20:40, 20:40] = True
    tracemalloc.start()
    metrics.pixel_statistics(maps, masks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(anomaly_map.nbytes for anomaly_map in maps) / 4


def test_metrics_are_imported_without_torch():
    # Together with torchmetrics it takes more memory than 110 maps of 1024 x 1024.
    code = "import sys, training.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD_AND_DEFECT = np.array([[True, False]])
ONE_MAP = np.array([[1, 0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([ONE_MAP], [~GOOD_AND_DEFECT | True], "2 of 2 pixels are defects"),
        ([ONE_MAP], [GOOD_AND_DEFECT & False], "0 of 2 pixels are defects"),
        ([], [], "0 of 0 pixels are defects"),
        ([ONE_MAP], [GOOD_AND_DEFECT.T], r"map 0 is \(1, 2\), its mask \(2, 1\)"),
        ([ONE_MAP, ONE_MAP], [GOOD_AND_DEFECT], "argument 2 is shorter"),
        ([ONE_MAP, ONE_MAP * np.float32("nan")], [GOOD_AND_DEFECT] * 2, "map 1 holds a value that is not finite"),
        ([ONE_MAP + np.float32("inf")], [GOOD_AND_DEFECT], "map 0 holds a value that is not finite"),
        ([ONE_MAP], [GOOD_AND_DEFECT * np.uint8(255)], "its mask uint8: not float32 and bool"),
        ([ONE_MAP.astype(np.float64)], [GOOD_AND_DEFECT], "map 0 is float64"),
    ],
)
def test_pixel_statistics_refuses_maps_and_masks_that_do_not_fit(maps, masks, message):
    with pytest.raises(ValueError, match=message):
        metrics.pixel_statistics(maps, masks)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.5, math.nan])
def test_aupro_refuses_a_limit_that_is_no_rate(limit):
    found = metrics.pixel_statistics([ONE_MAP], [GOOD_AND_DEFECT])
    with pytest.raises(ValueError, match="limit of the false positive rate"):
        metrics.aupro(found, fpr_limit=limit)


# Images

LABELS = np.array([False, False, True, True])
SCORES = np.array([1.0, 3.0, 2.0, 4.0])


def test_image_figures_of_four_scores_ranked_by_hand():
    assert metrics.image_auroc(LABELS, SCORES) == pytest.approx(3 / 4)
    assert metrics.image_ap(LABELS, SCORES) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.f1_max(LABELS, SCORES) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))


@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.image_ap, metrics.f1_max])
def test_image_figures_depend_on_the_ranks_of_the_scores_alone(metric):
    # A sigmoid, as torchmetrics applies it to scores outside [0, 1], makes ties of large scores.
    assert metric(LABELS, SCORES + 1000) == metric(LABELS, SCORES)


@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.image_ap, metrics.f1_max])
@pytest.mark.parametrize("label", [False, True])
def test_image_figures_refuse_images_of_one_kind(metric, label):
    with pytest.raises(ValueError, match="at least one good and one anomalous image"):
        metric(np.full(4, label), SCORES)


@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.image_ap])
def test_bootstrap_interval_contains_the_estimate_and_is_reproducible(metric):
    random = np.random.default_rng(0)
    labels = np.arange(60) < 20
    scores = random.normal(size=60) + labels
    low, high = metrics.bootstrap_interval(metric, labels, scores)
    assert low < metric(labels, scores) < high
    assert (low, high) == metrics.bootstrap_interval(metric, labels, scores)
    assert (low, high) != metrics.bootstrap_interval(metric, labels, scores, seed=1)


def test_rank_auroc_is_the_image_auroc_with_ties_too():
    random = np.random.default_rng(0)
    for levels in (3, 10, 1000):
        labels, scores = random.random(60) < 0.3, random.integers(levels, size=60).astype(np.float64)
        assert metrics.rank_auroc(labels, scores) == pytest.approx(metrics.image_auroc(labels, scores), abs=1e-12)


def test_bootstrap_interval_of_a_mean_is_as_wide_as_the_normal_distribution_says():
    labels = np.arange(500) < 400
    scores = np.random.default_rng(0).normal(size=500)
    low, high = metrics.bootstrap_interval(lambda chosen, values: float(values[chosen].mean()), labels, scores)
    assert high - low == pytest.approx(2 * 1.96 * scores[labels].std() / math.sqrt(400), rel=0.1)


def test_bootstrap_interval_keeps_both_kinds_of_images():
    # Drawn from all images alike, a third of the resamples would hold no anomalous one, which image_auroc refuses.
    labels = np.arange(30) == 7
    low, high = metrics.bootstrap_interval(metrics.image_auroc, labels, np.arange(30.0))
    assert 0 <= low < high <= 1


def test_bootstrap_mean_interval_resamples_groups_and_not_values():
    values = np.random.default_rng(0).normal(size=50)
    groups = np.arange(50) * 3
    low, high = metrics.bootstrap_mean_interval(values, groups)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(50), rel=0.1)
    # Ten regions alike in each image tell no more than one.
    assert metrics.bootstrap_mean_interval(np.repeat(values, 10), np.repeat(groups, 10)) == pytest.approx((low, high))


# Curves


@pytest.mark.parametrize("images", [8, 2000])
def test_roc_points_are_corners_of_the_curve_and_enclose_its_area(images):
    random = np.random.default_rng(0)
    labels = np.arange(images) % 3 == 0
    scores = random.normal(size=images) + labels
    false_positives, true_positives = metrics.roc_points(labels, scores)
    assert len(false_positives) <= metrics.CURVE_POINTS
    assert (false_positives[0], true_positives[0], false_positives[-1], true_positives[-1]) == (0, 0, 1, 1)
    rates = {(float((scores[~labels] >= t).mean()), float((scores[labels] >= t).mean())) for t in [np.inf, *scores]}
    assert set(zip(false_positives.tolist(), true_positives.tolist(), strict=True)) <= rates
    area = np.trapezoid(true_positives, false_positives)
    assert area == pytest.approx(metrics.image_auroc(labels, scores), abs=0.01)


def test_roc_points_refuse_images_of_one_kind():
    with pytest.raises(ValueError, match="of one kind"):
        metrics.roc_points(np.array([True, True]), np.array([0.1, 0.2]))


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("limit", LIMITS)
def test_overlap_points_enclose_the_area_of_aupro(levels, limit):
    found = metrics.pixel_statistics(*drawn(levels))
    rates, overlaps = metrics.overlap_points(found, fpr_limit=limit)
    assert (rates[0], rates[-1]) == (0, limit)
    assert (np.diff(rates, 2) > 0).all()  # closer together where the curve is steep
    assert np.all(np.diff(overlaps) >= 0)
    area = np.trapezoid(overlaps, rates) / limit
    assert area == pytest.approx(metrics.aupro(found, fpr_limit=limit), abs=2e-3)


# False alarms


@pytest.mark.parametrize(("calibration_images", "alpha"), [(3, 0.5), (19, 0.05), (99, 0.29), (60, 0.1)])
def test_false_alarm_interval_holds_95_percent_of_simulated_conformal_tests(calibration_images, alpha):
    random = np.random.default_rng(0)
    trials, good_images = 4000, 80
    calibration = np.sort(random.normal(size=(trials, calibration_images)), axis=1)
    scores = random.normal(size=(trials, good_images))
    at_least = np.array(
        [calibration_images - np.searchsorted(row, s) for row, s in zip(calibration, scores, strict=True)]
    )
    p_values = (1 + at_least) / (calibration_images + 1)
    rates = (p_values <= alpha).mean(axis=1)
    low, high = metrics.false_alarm_interval(
        calibration_images=calibration_images, alpha=alpha, good_images=good_images
    )
    inside = (rates >= low) & (rates <= high)
    assert inside.mean() >= 0.945
    # Not wider than it has to be: one alarm less at either end would be too few.
    assert (rates < low + 1 / good_images).mean() > 0.02
    assert (rates > high - 1 / good_images).mean() > 0.02


def test_false_alarm_interval_holds_where_parts_are_shown_more_than_once():
    """Six pictures of a part share most of what makes their scores: taken for independent, they promise too much."""
    random = np.random.default_rng(0)
    inside = {"by parts": 0, "by pictures": 0}
    trials, calibration_parts, test_parts, pictures = 300, 26, 30, 6
    for _ in range(trials):
        common = 0.8 * random.normal(size=calibration_parts + test_parts).repeat(pictures)
        scores = np.stack([common + 0.6 * random.normal(size=len(common))] * 3, axis=1)
        held_out = calibration_parts * pictures
        parts = tuple(np.arange(calibration_parts).repeat(pictures).tolist())
        calibration = Calibration(scores[:held_out], alpha=0.05, parts=parts)
        rate = (calibration.p_value(calibration.anomaly_score(scores[held_out:])) <= 0.05).mean()
        for name, design_effect in (("by parts", calibration.design_effect), ("by pictures", 1.0)):
            low, high = metrics.false_alarm_interval(
                calibration_images=held_out,
                alpha=0.05,
                good_images=test_parts * pictures,
                design_effect=design_effect,
            )
            inside[name] += low <= rate <= high
    assert inside["by parts"] / trials > 0.92
    assert inside["by pictures"] / trials < 0.85


def test_false_alarm_interval_counts_whole_calibration_images():
    # 0.29 * 100 is a little less than 29 in floating point, 0.05 * 20 must allow one alarm.
    narrow = metrics.false_alarm_interval(calibration_images=99, alpha=0.29, good_images=10000)
    assert narrow == metrics.false_alarm_interval(calibration_images=99, alpha=0.295, good_images=10000)
    assert metrics.false_alarm_interval(calibration_images=19, alpha=0.05, good_images=100)[1] > 0.1


def test_false_alarm_interval_narrows_with_the_confidence():
    wide = metrics.false_alarm_interval(calibration_images=99, alpha=0.1, good_images=1000)
    narrow = metrics.false_alarm_interval(calibration_images=99, alpha=0.1, good_images=1000, confidence=0.5)
    assert wide[0] < narrow[0] < 0.1 < narrow[1] < wide[1]


@pytest.mark.parametrize(("calibration_images", "alpha"), [(18, 0.05), (99, 0.0), (99, 1.0)])
def test_false_alarm_interval_refuses_an_alpha_that_the_images_do_not_resolve(calibration_images, alpha):
    with pytest.raises(ValueError, match="do not resolve it"):
        metrics.false_alarm_interval(calibration_images=calibration_images, alpha=alpha, good_images=100)
