"""Whether the parts that are served still look like those that a model was calibrated on."""

from collections import deque

import numpy as np

WINDOW = 1000  # images


class Drift:
    """The distance of the last p-values from what good parts give: every multiple of 1 / (n + 1) equally often.

    It is the Kolmogorov-Smirnov distance: 0 at best, near 1 where all parts get the same extreme p-value. For m good
    parts and n calibration images it exceeds 1.36 sqrt(1/m + 1/n) about one time in twenty.
    """

    def __init__(self, calibration_images: int) -> None:
        self.calibration_images = calibration_images
        self._steps = np.arange(1, calibration_images + 2) / (calibration_images + 1)
        self._p_values: deque[float] = deque(maxlen=WINDOW)

    def add(self, p_value: float) -> None:
        self._p_values.append(p_value)

    def images(self) -> int:
        """How many the figure rests on, at most WINDOW."""
        return len(self._p_values)

    def distance(self) -> float:
        """NaN where there are none."""
        if not self._p_values:
            return float("nan")
        # Half a step lower, so that rounding cannot put a p-value beyond its own multiple.
        at_most = np.searchsorted(np.sort(self._p_values) - self._steps[0] / 2, self._steps, side="right")
        return float(np.abs(at_most / len(self._p_values) - self._steps).max())
