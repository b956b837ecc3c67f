"""From scores to a p-value, by held-out normal images alone: split conformal prediction.

Vovk et al., Algorithmic Learning in a Random World, 2005; Bates et al., Testing for Outliers with Conformal
p-values, arXiv 2104.08279, equation 2. Whatever the scores are worth, a good part is flagged with probability at
most alpha, as long as it comes from where the calibration images came from.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.errors import CalibrationError

FloatArray = NDArray[np.float64]

SCORE_NAMES = ("reconstruction", "latent", "anomaly_map")
MIN_CALIBRATION_IMAGES = 4


@dataclass(frozen=True, eq=False)
class Calibration:
    """The scores of the calibration images, (n, 3) in the order of SCORE_NAMES, and the default alpha.

    weights: what each score counts for in the anomaly score, in the same order, 0 or more. parts: for each image a
    number that pictures of one part share; empty: no part is shown twice. peaks: the highest value of each image's
    map, (n,); None: that is the map's score. Raises CalibrationError if n is too small for alpha, a score, a peak or a
    weight is not finite, or parts or peaks are not those of n images.
    """

    scores: FloatArray
    alpha: float
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    parts: tuple[int, ...] = ()
    peaks: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[1] != len(SCORE_NAMES):
            raise CalibrationError(f"calibration scores have shape {self.scores.shape}: expected (n, 3).")
        if self.n < MIN_CALIBRATION_IMAGES:
            raise CalibrationError(f"{self.n} calibration images: at least {MIN_CALIBRATION_IMAGES} are needed.")
        if not np.isfinite(self.scores).all():
            raise CalibrationError("a calibration score is not a finite number.")
        if len(self.weights) != len(SCORE_NAMES) or not all(0 <= weight < math.inf for weight in self.weights):
            raise CalibrationError(f"the weights of the scores are {list(self.weights)}: expected three, 0 or more.")
        if not any(self.weights):
            raise CalibrationError("the weights of the scores are all 0: one must be more.")
        if self.parts and (len(self.parts) != self.n or not all(isinstance(part, int) for part in self.parts)):
            raise CalibrationError(f"the parts {list(self.parts)} are not a whole number for each of {self.n} images.")
        if self.peaks is not None and (self.peaks.shape != (self.n,) or not np.isfinite(self.peaks).all()):
            raise CalibrationError(f"the peaks of the maps are not a finite number for each of {self.n} images.")
        self.check_alpha(self.alpha)

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def smallest_alpha(self) -> float:
        """The smallest p-value that n images can give: 1 / (n + 1)."""
        return 1 / (self.n + 1)

    def check_alpha(self, alpha: float) -> None:
        """Raise CalibrationError unless n images can tell whether a p-value is at most alpha."""
        if not self.smallest_alpha <= alpha < 1:
            raise CalibrationError(
                f"alpha is {alpha:g}: {self.n} calibration images allow {self.smallest_alpha:.4g} "
                f"up to, but not including, 1."
            )

    def chosen_alpha(self, wanted: float | None) -> float:
        """The alpha that was asked for, checked; None takes the default. Raises CalibrationError."""
        if wanted is None:
            return self.alpha
        self.check_alpha(wanted)
        return wanted

    @cached_property
    def design_effect(self) -> float:
        """How many of these pictures tell as much as one picture of a part of its own, 1 or more: pictures of one part
        score alike. 1 + (m - 1) rho (Kish, Survey Sampling, 1965), with m the mean, over pictures, of how many show
        the same part, and rho how much alike their anomaly scores are: the intraclass correlation of the ranks.
        """
        part, counts = np.unique(self.parts or range(self.n), return_inverse=True, return_counts=True)[1:]
        if len(counts) == self.n:
            return 1.0
        if len(counts) == 1:
            return float(self.n)
        # Equal scores share their mean rank. By hand: importing scipy.stats takes the service a second to start.
        _, place, ties = np.unique(self._alone, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
        means = np.bincount(part, weights=ranks) / counts
        between = float((counts * (means - ranks.mean()) ** 2).sum()) / (len(counts) - 1)
        within = float(((ranks - means[part]) ** 2).sum()) / (self.n - len(counts))
        pictures = float((counts**2).sum()) / self.n  # m
        usual = (self.n - pictures) / (len(counts) - 1)
        if between <= within:  # also if all scores are the same
            return 1.0
        rho = (between - within) / (between + (usual - 1) * within)
        return 1 + (pictures - 1) * rho

    @cached_property
    def _alone(self) -> FloatArray:
        """Anomaly scores of the calibration images, (n,).

        Each is standardised by the other n - 1 images. A part that is scored later did not take part in the median
        and the deviation; a calibration image that did would look too normal, and good parts too anomalous.
        """
        alone = [self._fuse(self.scores[i : i + 1], np.delete(self.scores, i, axis=0)) for i in range(self.n)]
        return np.concatenate(alone)

    @cached_property
    def good_scores(self) -> FloatArray:
        """Anomaly scores of the calibration images, ascending, (n,): those that p-values count."""
        return np.sort(self._alone)

    def anomaly_score(self, scores: FloatArray) -> FloatArray:
        """Fuse scores (B, 3) into (B,): their weighted mean, each in standard deviations of the good images' score."""
        return self._fuse(scores, self.scores)

    def _fuse(self, scores: FloatArray, good: FloatArray) -> FloatArray:
        """By the scores of good images (n, 3): median and median absolute deviation, so that one dusty image among
        them does not move the scale; 1.4826 makes the latter a standard deviation where scores are normal.
        """
        middle = np.median(good, axis=0)
        deviation = 1.4826 * np.median(np.abs(good - middle), axis=0)
        # Scores that never vary (a constant image) have no scale; any other value is then infinitely far. The floor
        # keeps that finite.
        standardised = (scores - middle) / np.maximum(deviation, 1e-12)
        return np.asarray(np.average(standardised, axis=1, weights=self.weights), dtype=np.float64)

    def p_value(self, anomaly_score: FloatArray) -> FloatArray:
        """(1 + #{calibration score >= s}) / (n + 1) for each s in (B,); in (0, 1]."""
        at_least = self.n - np.searchsorted(self.good_scores, anomaly_score, side="left")
        return np.asarray((1 + at_least) / (self.n + 1), dtype=np.float64)

    def map_level(self, alpha: float) -> float:
        """The height that the map of a good image exceeds anywhere with probability at most alpha.

        In the unit of the anomaly map. Raises CalibrationError for an alpha that n images cannot resolve.
        """
        self.check_alpha(alpha)
        peaks = np.sort(self.scores[:, SCORE_NAMES.index("anomaly_map")] if self.peaks is None else self.peaks)
        # A p-value counts peaks >= s: at most alpha (n + 1) - 1 of them may lie above the level.
        above = math.floor(alpha * (self.n + 1) + 1e-9) - 1
        return float(peaks[self.n - 1 - above])


def images_needed(alpha: float) -> int:
    """The fewest calibration images that resolve alpha: 1 / (n + 1) <= alpha."""
    return max(MIN_CALIBRATION_IMAGES, math.ceil(1 / alpha - 1 - 1e-9))
