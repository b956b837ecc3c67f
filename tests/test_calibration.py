"""p-values, thresholds and the fusion of the scores, against brute force and by simulation."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.calibration import MIN_CALIBRATION_IMAGES, SCORE_NAMES, Calibration, images_needed
from models.errors import CalibrationError

Array = NDArray[np.float64]
MAP = SCORE_NAMES.index("anomaly_map")


def calibration_of(
    n: int, *, seed: int = 0, alpha: float | None = None, weights: tuple[float, ...] = (1, 1, 1)
) -> Calibration:
    scores = np.random.default_rng(seed).normal(loc=[0.2, 1.4, 0.7], scale=[0.02, 0.1, 0.05], size=(n, 3))
    return Calibration(scores=scores, alpha=1 / (n + 1) if alpha is None else alpha, weights=weights)


def p_values(calibration: Calibration, parts: Array) -> Array:
    """Of parts (B, 3), as models.scoring asks for them."""
    return calibration.p_value(calibration.anomaly_score(parts))


def fused(part: Array, good: Array, weights: Sequence[float]) -> float:
    middle = np.median(good, axis=0)
    standardised = (part - middle) / (1.4826 * np.median(np.abs(good - middle), axis=0))
    return sum(weight * float(one) for weight, one in zip(weights, standardised, strict=True)) / sum(weights)


def p_value_by_definition(scores: Array, part: Array, weights: Sequence[float] = (1, 1, 1)) -> float:
    """Each calibration image is standardised by the others, the part by all of them: slowly, one by one."""
    n = len(scores)
    others = [fused(scores[i], np.delete(scores, i, axis=0), weights) for i in range(n)]
    return (1 + sum(other >= fused(part, scores, weights) for other in others)) / (n + 1)


# p-values


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.01, 0.48, 0.3), (0, 0, 2)])
@pytest.mark.parametrize("n", [4, 5, 19, 39, 200])
def test_p_value_is_the_share_of_calibration_images_that_score_as_high(n, weights):
    calibration = calibration_of(n, weights=weights)
    centre, spread = calibration.scores.mean(axis=0), calibration.scores.std(axis=0)
    parts = centre + spread * np.random.default_rng(1).normal(scale=2, size=(60, 3))
    expected = [p_value_by_definition(calibration.scores, part, weights) for part in parts]
    assert len(set(expected)) >= 3
    assert p_values(calibration, parts) == pytest.approx(np.array(expected), abs=1e-12)


def test_p_value_counts_a_calibration_image_that_is_just_like_the_part():
    """By hand: without itself each of 0, 1, 2, 3, 4 is -2.5, -1.5, 0, 1.5, 2.5 away from the others, a part from 2."""
    calibration = Calibration(scores=np.repeat([[0.0], [1.0], [2.0], [3.0], [4.0]], 3, axis=1), alpha=0.2)
    parts = np.repeat([[5.0], [4.5], [3.5], [2.0], [-1.0]], 3, axis=1)
    assert p_values(calibration, parts).tolist() == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 6 / 6]


def test_p_value_stays_between_its_smallest_and_one():
    calibration = calibration_of(19)
    parts = np.array([[-1e6] * 3, [0.2, 1.4, 0.7], [1e6] * 3])
    lowest, middle, highest = p_values(calibration, parts)
    assert lowest == 1
    assert 0.05 < middle < 1
    assert highest == 0.05


def test_p_value_falls_as_a_score_rises():
    calibration = calibration_of(39)
    parts = np.repeat(calibration.scores.mean(axis=0, keepdims=True), 400, axis=0)
    parts[:, 0] += np.linspace(-10, 10, 400) * 0.02
    falling = p_values(calibration, parts)
    assert (np.diff(falling) <= 0).all()
    assert falling[0] > 0.5
    assert falling[-1] == 1 / 40
    assert len(set(falling)) > 10


def test_p_value_of_an_image_does_not_depend_on_its_batch():
    calibration = calibration_of(19)
    parts = calibration_of(30, seed=1).scores
    alone = [float(p_values(calibration, part[None])[0]) for part in parts]
    assert len(set(alone)) > 5
    assert p_values(calibration, parts).tolist() == alone
    assert p_values(calibration, parts[::-1]).tolist() == alone[::-1]


def test_the_order_of_the_calibration_images_does_not_matter():
    calibration = calibration_of(19)
    turned = Calibration(scores=calibration.scores[::-1].copy(), alpha=0.05)
    parts = calibration_of(50, seed=1).scores
    assert turned.anomaly_score(parts) == pytest.approx(calibration.anomaly_score(parts))
    assert p_values(turned, parts) == pytest.approx(p_values(calibration, parts))
    assert turned.map_level(0.05) == calibration.map_level(0.05)


def good_scores(distribution: str, *, generator: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """(repetitions, images, 3), exchangeable within a repetition."""
    one_in_twenty = generator.random((*shape[:2], 1)) < 0.05
    drawn = {
        "normal": generator.normal(size=shape),
        "heavy tailed": generator.standard_t(3, size=shape),
        "skewed": generator.lognormal(size=shape),
        "one cause": generator.lognormal(size=(*shape[:2], 1)) * [1.0, 2.0, 3.0],
        "dust on one in twenty": generator.normal(size=shape) + 10_000 * one_in_twenty,
        "equal but one in twenty": np.full(shape, 0.1) + one_in_twenty,
    }
    return np.asarray(drawn[distribution], dtype=np.float64)


@pytest.mark.parametrize(
    "distribution",
    ["normal", "heavy tailed", "skewed", "one cause", "dust on one in twenty", "equal but one in twenty"],
)
@pytest.mark.parametrize(("n", "weights"), [(19, (0.01, 0.45, 0.3)), (39, (1, 1, 1))])
def test_good_parts_are_flagged_no_more_often_than_alpha(n, weights, distribution):
    """1000 calibrations of n images, 20 good parts each: p <= alpha for a share of alpha at most.

    The alphas are those that n gives exactly. The slack is sampling: the rate of one calibration, around k / (n + 1),
    has the Beta(k, n + 1 - k) distribution, so three standard deviations of 1000 are 0.008 at 0.2 and less below it.
    """
    repetitions, parts = 1000, 20
    scores = good_scores(distribution, generator=np.random.default_rng(7), shape=(repetitions, n + parts, 3))
    alphas = np.array([1, 2, 4]) / (n + 1)
    flagged = np.zeros(3)
    for one in scores:
        calibration = Calibration(scores=one[:n], alpha=1 / (n + 1), weights=weights)
        flagged += (p_values(calibration, one[n:])[:, None] <= alphas + 1e-12).sum(axis=0)
    rate = flagged / (repetitions * parts)
    slack = 3 * np.sqrt(alphas * (1 - alphas) / (n + 2) / repetitions)
    assert (rate <= alphas + slack).all(), f"{rate} at {alphas}"
    if "equal" not in distribution:  # ties only ever make for caution
        # So does dust: a dusty calibration image is measured by the others, a dusty part by a deviation with one more.
        assert (rate >= 0.4 * alphas).all(), f"{rate} at {alphas}"


# Fusion


GOOD = np.array([[0.0, 10.0, 100.0], [1.0, 12.0, 104.0], [2.0, 14.0, 108.0], [3.0, 16.0, 112.0], [4.0, 18.0, 116.0]])


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5), (0.01, 0.25, 0), (0, 0, 3)])
def test_anomaly_score_is_the_weighted_mean_of_the_standardised_scores(weights):
    queries = np.array([[2.0, 14.0, 108.0], [5.0, 14.0, 108.0], [2.0, 24.0, 112.0], [1.0, 10.0, 104.0]])
    away = np.array([[0, 0, 0], [3, 0, 0], [0, 5, 1], [-1, -2, -1]])  # in median absolute deviations
    expected = (away * weights).sum(axis=1) / sum(weights) / 1.4826
    calibration = Calibration(scores=GOOD, alpha=0.2, weights=weights)
    assert calibration.anomaly_score(queries) == pytest.approx(expected)


def test_scores_count_alike_where_no_weights_are_given():
    assert Calibration(scores=GOOD, alpha=0.2).weights == (1, 1, 1)


def test_anomaly_score_depends_on_the_weights_ratio_alone():
    parts = calibration_of(50, seed=1).scores
    one, other = calibration_of(19, weights=(1, 2, 5)), calibration_of(19, weights=(0.05, 0.1, 0.25))
    assert one.anomaly_score(parts) == pytest.approx(other.anomaly_score(parts))
    assert p_values(one, parts) == pytest.approx(p_values(other, parts))


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_score_of_weight_zero_has_no_say(silent):
    weights = tuple(0.0 if index == silent else 1.0 for index in range(3))
    calibration = calibration_of(19, weights=weights)
    parts = calibration_of(50, seed=1).scores
    changed = parts.copy()
    changed[:, silent] += 1e6
    assert np.array_equal(calibration.anomaly_score(changed), calibration.anomaly_score(parts))
    assert np.array_equal(p_values(calibration, changed), p_values(calibration, parts))
    # Not in the calibration images either, not even where it never varies.
    scores = calibration.scores.copy()
    scores[:, silent] = 7
    other = Calibration(scores=scores, alpha=0.05, weights=weights)
    assert np.array_equal(p_values(other, changed), p_values(calibration, parts))
    # With a say it decides.
    assert not np.array_equal(p_values(calibration_of(19), changed), p_values(calibration_of(19), parts))


def test_anomaly_score_does_not_depend_on_a_scores_unit():
    calibration = calibration_of(19)
    unit = np.array([100.0, 0.001, 7.0])
    scaled = Calibration(scores=calibration.scores * unit, alpha=0.05)
    parts = calibration_of(50, seed=1).scores
    assert scaled.anomaly_score(parts * unit) == pytest.approx(calibration.anomaly_score(parts))
    assert np.array_equal(p_values(scaled, parts * unit), p_values(calibration, parts))


@given(seed=st.integers(0, 10_000), n=st.integers(4, 40), offset=st.sampled_from([0.0, 1.0, 1000.0]))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_p_value_is_its_definition_wherever_the_scores_lie(seed, n, offset):
    scores = offset + np.random.default_rng(seed).lognormal(size=(n + 3, 3))
    calibration = Calibration(scores=scores[:n], alpha=0.5)
    expected = [p_value_by_definition(scores[:n], part) for part in scores[n:]]
    assert p_values(calibration, scores[n:]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.42, 1e6])
@pytest.mark.parametrize("constant", [[0], [MAP], [0, 1, 2]])
def test_scores_that_never_vary_are_calibrated_all_the_same(constant, value):
    scores = calibration_of(19).scores.copy()
    scores[:, constant] = value
    calibration = Calibration(scores=scores, alpha=0.05)
    alike = scores.mean(axis=0, keepdims=True)
    alike[:, constant] = value
    assert np.isfinite(calibration.anomaly_score(alike)).all()
    assert p_values(calibration, alike) > 0.05  # a part like all the others is good
    worse = alike.copy()
    worse[:, constant] = value + 0.01 * max(value, 1)
    assert np.isfinite(calibration.anomaly_score(worse)).all()
    assert p_values(calibration, worse).tolist() == [0.05]
    assert np.isfinite(calibration.map_level(0.05))


def test_one_dusty_calibration_image_does_not_make_good_parts_anomalous():
    """It takes the highest rank. At alpha = 2 / (n + 1) a good part must then beat the 18 others: one in 19 does."""
    flagged = []
    for seed in range(50):
        scores = np.random.default_rng(seed).normal(size=(119, 3))
        scores[0] += 10_000
        flagged.append(p_values(Calibration(scores=scores[:19], alpha=0.05), scores[19:]) <= 0.1)
    assert 0.02 < np.mean(flagged) < 0.08


@pytest.mark.parametrize("value", [0.1, 1.42, 1e6])
def test_a_part_that_equals_all_calibration_images_but_one_is_good(value):
    scores = np.full((19, 3), value)
    scores[7] += 0.5
    calibration = Calibration(scores=scores, alpha=0.05)
    assert p_values(calibration, np.full((1, 3), value)) == 1
    assert p_values(calibration, np.full((1, 3), value + 0.5)) == 0.1


# alpha


@pytest.mark.parametrize("n", [4, 19, 39, 99])
def test_check_alpha_takes_what_n_images_can_resolve(n):
    calibration = calibration_of(n)
    assert calibration.smallest_alpha == 1 / (n + 1)
    for alpha in (calibration.smallest_alpha, 0.5, 0.999):
        calibration.check_alpha(alpha)
    for alpha in (0.99 / (n + 1), 0.0, -0.1, 1.0, 1.5, math.nan, math.inf, -math.inf):
        with pytest.raises(CalibrationError, match=f"alpha is {alpha:g}: {n} calibration images allow"):
            calibration.check_alpha(alpha)
        with pytest.raises(CalibrationError):
            calibration.map_level(alpha)


@pytest.mark.parametrize("alpha", [0.2, 0.1, 0.05, 0.04, 0.025, 0.02, 0.0125, 0.01, 0.005, 0.004, 0.002, 0.001])
def test_an_alpha_as_a_person_writes_it_is_resolved_by_its_number_of_images(alpha):
    """And the smallest p-value of so many images is at most alpha as floats, too: otherwise nothing is flagged."""
    calibration = calibration_of(images_needed(alpha), alpha=alpha)
    assert p_values(calibration, np.full((1, 3), 1e6))[0] <= alpha


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.2, 0.1, 0.05, 0.04, 0.03, 0.025, 0.02, 0.01, 0.005, 0.001, 1 / 7, 1 / 3])
def test_images_needed_are_the_fewest_that_resolve_alpha(alpha):
    n = images_needed(alpha)
    calibration_of(n, alpha=alpha)
    if n > MIN_CALIBRATION_IMAGES:
        with pytest.raises(CalibrationError, match=f"{n - 1} calibration images allow"):
            calibration_of(n - 1, alpha=alpha)


def test_images_needed_undoes_smallest_alpha():
    for n in range(MIN_CALIBRATION_IMAGES, 2000):
        assert images_needed(1 / (n + 1)) == n


# Level of the map


def level_by_brute_force(peaks: Array, alpha: float) -> float:
    """The lowest calibration peak as level, such that a map which exceeds it has a p-value of alpha or less."""
    n = len(peaks)
    for level in sorted(peaks):
        above = level + 1e-9
        if (1 + sum(peak >= above for peak in peaks)) / (n + 1) <= alpha + 1e-12:
            return float(level)
    raise AssertionError("no level")


@pytest.mark.parametrize("n", [4, 19, 39, 100])
def test_map_level_is_the_lowest_that_good_maps_exceed_with_probability_alpha(n):
    calibration = calibration_of(n)
    for rank in range(1, n + 1):
        for alpha in (rank / (n + 1), min((rank + 0.5) / (n + 1), 0.9999)):
            assert calibration.map_level(alpha) == level_by_brute_force(calibration.scores[:, MAP], alpha)


def test_map_level_at_the_smallest_alpha_is_the_highest_peak():
    calibration = calibration_of(19)
    assert calibration.map_level(0.05) == calibration.scores[:, MAP].max()


def test_map_level_reads_the_map_and_no_other_score():
    scores = calibration_of(19).scores.copy()
    level = Calibration(scores=scores, alpha=0.05).map_level(0.2)
    scores[:, [index for index in range(3) if index != MAP]] += 100
    assert Calibration(scores=scores, alpha=0.05).map_level(0.2) == level


def test_map_level_is_one_of_the_peaks_where_the_maps_score_is_something_else():
    scores = calibration_of(19).scores
    peaks = 2 + np.arange(19.0)[::-1]
    calibration = Calibration(scores=scores, alpha=0.05, peaks=peaks)
    assert calibration.map_level(0.05) == 20
    assert calibration.map_level(0.1) == 19
    assert np.array_equal(calibration.good_scores, Calibration(scores=scores, alpha=0.05).good_scores)


@pytest.mark.parametrize("peaks", [np.ones(18), np.ones((19, 1)), np.full(19, math.nan), np.full(19, math.inf)])
def test_peaks_that_are_not_a_number_for_each_image_are_refused(peaks):
    with pytest.raises(CalibrationError, match="the peaks of the maps are not a finite number for each of 19 images"):
        Calibration(scores=calibration_of(19).scores, alpha=0.05, peaks=peaks)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.25])
def test_good_maps_exceed_the_level_no_more_often_than_alpha(alpha):
    """Exact in expectation; 40000 maps, so that two standard deviations are 0.0043 at most."""
    generator = np.random.default_rng(3)
    exceeded = 0
    for _ in range(2000):
        scores = generator.lognormal(size=(39, 3))
        level = Calibration(scores=scores[:19], alpha=0.05).map_level(alpha)
        exceeded += int((scores[19:, MAP] > level).sum())
    assert exceeded / 40_000 == pytest.approx(alpha, abs=0.006)


# Pictures of one part


def of_parts(parts: int, pictures: int, *, alike: float, seed: int = 0) -> Calibration:
    """`alike`: the share of a score's variance that all pictures of a part have in common."""
    random = np.random.default_rng(seed)
    own, common = random.normal(size=(parts * pictures, 3)), random.normal(size=(parts, 3)).repeat(pictures, axis=0)
    scores = math.sqrt(alike) * common + math.sqrt(1 - alike) * own
    numbers = np.arange(parts).repeat(pictures)
    return Calibration(scores, alpha=0.5, weights=(0, 0, 1), parts=tuple(numbers.tolist()))


def test_parts_that_are_shown_once_have_no_design_effect():
    assert calibration_of(19).design_effect == 1
    assert of_parts(19, 1, alike=0.9).design_effect == 1


@pytest.mark.parametrize("pictures", [2, 6])
def test_copies_of_a_picture_tell_no_more_than_the_picture(pictures):
    assert of_parts(20, pictures, alike=1).design_effect == pytest.approx(pictures)


def test_pictures_of_a_single_part_count_as_one():
    assert of_parts(1, 8, alike=0.5).design_effect == 8


@pytest.mark.parametrize(("alike", "expected"), [(0, 1), (0.2, 2), (0.6, 4)])
def test_the_design_effect_is_what_the_likeness_of_the_pictures_says(alike, expected):
    """Kish's formula with six pictures of each part. Ranks are a little less alike than the normal scores."""
    found = [of_parts(60, 6, alike=alike, seed=seed).design_effect for seed in range(20)]
    assert np.mean(found) == pytest.approx(expected, rel=0.1)


def test_the_design_effect_is_that_of_the_part_of_a_picture():
    """Nineteen parts once and one 19 times, all alike: a picture has on average ten of its part, itself one of them."""
    scores = np.repeat(np.arange(20.0), [*([1] * 19), 19])[:, None].repeat(3, axis=1)
    calibration = Calibration(scores, alpha=0.5, parts=(*range(19), *([19] * 19)))
    assert calibration.design_effect == pytest.approx(10)


def test_the_numbers_of_the_parts_and_the_order_of_the_pictures_do_not_matter():
    calibration = of_parts(10, 3, alike=0.5)
    order = np.random.default_rng(1).permutation(30)
    parts = tuple(100 - 7 * calibration.parts[index] for index in order)
    shuffled = Calibration(calibration.scores[order], alpha=0.5, weights=(0, 0, 1), parts=parts)
    assert shuffled.design_effect == pytest.approx(calibration.design_effect)
    assert 1 < shuffled.design_effect < 3


def test_parts_whose_scores_never_vary_have_no_design_effect():
    assert Calibration(np.ones((6, 3)), alpha=0.5, parts=(1, 1, 1, 2, 2, 2)).design_effect == 1


# What is refused


@pytest.mark.parametrize("parts", [(1,), (1,) * 20, ("a",) * 19, (0.5,) * 19, (None,) * 19])
def test_parts_that_are_not_a_number_for_each_image_are_refused(parts):
    with pytest.raises(CalibrationError, match="are not a whole number for each of 19 images"):
        Calibration(scores=calibration_of(19).scores, alpha=0.05, parts=parts)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_calibration_of_too_few_images_is_refused(n):
    with pytest.raises(CalibrationError, match=f"{n} calibration images: at least 4 are needed"):
        Calibration(scores=np.zeros((n, 3)), alpha=0.5)


@pytest.mark.parametrize("shape", [(19,), (19, 2), (19, 4), (3, 19), (19, 3, 1)])
def test_a_calibration_of_another_shape_is_refused(shape):
    with pytest.raises(CalibrationError, match="calibration scores have shape"):
        Calibration(scores=np.zeros(shape), alpha=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_calibration_score_that_is_not_finite_is_refused(value):
    scores = calibration_of(19).scores.copy()
    scores[11, 1] = value
    with pytest.raises(CalibrationError, match="not a finite number"):
        Calibration(scores=scores, alpha=0.05)


@pytest.mark.parametrize(
    "weights",
    [(), (1, 1), (1, 1, 1, 1), (-0.1, 1, 1), (1, 1, math.nan), (math.inf, 1, 1), (1, -math.inf, 1)],
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(CalibrationError, match="the weights of the scores are") as raised:
        calibration_of(19, weights=weights)
    assert str(raised.value) == f"the weights of the scores are {list(weights)}: expected three, 0 or more."


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(CalibrationError, match="all 0: one must be more"):
        calibration_of(19, weights=(0, 0, 0))


def test_a_calibration_that_cannot_resolve_its_own_alpha_is_refused():
    with pytest.raises(CalibrationError, match=r"alpha is 0.01: 19 calibration images allow 0.05"):
        calibration_of(19, alpha=0.01)


def test_a_score_that_is_not_a_number_is_not_called_good():
    """Networks whose weights are broken answer NaN: the most anomalous of all, or an error, but never a good part."""
    calibration = calibration_of(19)
    for position in range(3):
        scores = calibration.scores.mean(axis=0, keepdims=True)
        scores[0, position] = math.nan
        assert p_values(calibration, scores).tolist() == [0.05]
