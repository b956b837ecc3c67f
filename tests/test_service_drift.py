"""The drift figure: near 0 for good parts, near 1 for parts that all look alike, and over a window."""

import math

import numpy as np
import pytest

from service.drift import WINDOW, Drift


def drift(p_values: list[float], *, n: int) -> Drift:
    found = Drift(n)
    for p_value in p_values:
        found.add(p_value)
    return found


def test_distance_of_nothing_is_no_number():
    assert math.isnan(Drift(19).distance())
    assert Drift(19).images() == 0


@pytest.mark.parametrize("n", [9, 19, 48, 999])
def test_distance_is_zero_where_every_p_value_comes_once(n):
    p_values = [(1 + count) / (n + 1) for count in range(n + 1)]
    assert drift(p_values[:: -1 if n > 20 else 1], n=n).distance() == pytest.approx(0, abs=1e-12)


def test_distance_of_parts_that_are_all_defective_or_all_too_good():
    assert drift([0.05] * 30, n=19).distance() == pytest.approx(0.95)
    assert drift([1.0] * 30, n=19).distance() == pytest.approx(0.95)


def test_distance_is_that_of_the_distribution_functions():
    source = np.random.default_rng(0)
    p_values = [(1 + count) / 20 for count in source.integers(0, 20, 200) // 2]
    at_steps = max(abs(np.mean(np.array(p_values) <= step / 20 + 1e-9) - step / 20) for step in range(1, 21))
    assert drift(p_values, n=19).distance() == pytest.approx(at_steps)


def test_good_parts_rarely_exceed_the_bound_that_the_docstring_gives():
    source = np.random.default_rng(0)
    n, m, times = 199, 400, 400
    exceeded = 0
    for _ in range(times):
        calibration = np.sort(source.normal(size=n))
        at_least = n - np.searchsorted(calibration, source.normal(size=m))
        exceeded += drift(list((1 + at_least) / (n + 1)), n=n).distance() > 1.36 * math.sqrt(1 / m + 1 / n)
    assert 0 < exceeded / times < 0.08


def test_only_the_last_images_count():
    found = drift([0.05] * 500 + [1.0] * WINDOW, n=19)
    assert found.images() == WINDOW
    assert found.distance() == pytest.approx(0.95)
    assert drift([0.05] * 500 + [1.0] * (WINDOW - 500), n=19).distance() == pytest.approx(0.45)
