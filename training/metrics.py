"""Detection, measured: arrays in, floats out. Higher scores are more anomalous; True is anomalous.

Pixel figures are exact and need no grid of thresholds. Let a be the share of good pixels above a defect pixel's value
and b the share at or above it. Its pixel is found at every false positive rate of at least b, and, by the straight
line between two points of a curve, at a rate x between a and b to the degree (x - a) / (b - a). The area below any of
the curves is therefore a mean over defect pixels of a function of a and b alone.

No torch here: with what torchmetrics brings along it takes more memory than all maps of a test set.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
MapArray = NDArray[np.float32]

RESAMPLES = 1000
CONFIDENCE = 0.95
PIXELS_AT_ONCE = 2**23
CURVE_POINTS = 101


def image_auroc(labels: BoolArray, scores: FloatArray) -> float:
    """Area under the ROC curve of (N,) images. Raises ValueError unless some are good and some anomalous."""
    _check_labels(labels)
    return float(roc_auc_score(labels, scores))


def rank_auroc(labels: BoolArray, scores: FloatArray) -> float:
    """image_auroc by ranks (Mann and Whitney, 1947): the same number in a tenth of the time, for the bootstrap."""
    ranks, anomalous = stats.rankdata(scores), int(labels.sum())
    return float((ranks[labels].sum() - anomalous * (anomalous + 1) / 2) / (anomalous * (len(labels) - anomalous)))


def image_ap(labels: BoolArray, scores: FloatArray) -> float:
    """Average precision of (N,) images. Raises ValueError unless some are good and some anomalous."""
    _check_labels(labels)
    return float(average_precision_score(labels, scores))


def f1_max(labels: BoolArray, scores: FloatArray) -> float:
    """The best F1 of any threshold, over (N,) images. Raises ValueError unless some are good and some anomalous.

    Optimistic: the threshold is picked with the labels at hand. A figure to compare with others', it decides nothing.
    """
    _check_labels(labels)
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def roc_points(labels: BoolArray, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """False and true positive rates from (0, 0) to (1, 1): corners of the ROC curve of (N,) images, at most 101.

    Raises ValueError unless some are good and some anomalous.
    """
    _check_labels(labels)
    false_positives, true_positives, _ = roc_curve(labels, scores)
    chosen = np.unique(np.linspace(0, len(false_positives) - 1, CURVE_POINTS).round().astype(int))
    return false_positives[chosen], true_positives[chosen]


def _check_labels(labels: BoolArray) -> None:
    if labels.all() or not labels.any():
        raise ValueError(f"{len(labels)} images of one kind: at least one good and one anomalous image are needed.")


def bootstrap_interval(
    metric: Callable[[BoolArray, FloatArray], float], labels: BoolArray, scores: FloatArray, *, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of an image metric. Good and anomalous images are resampled apart, so both stay."""
    random = np.random.default_rng(seed)
    anomalous, good = np.flatnonzero(labels), np.flatnonzero(~labels)
    values = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([random.choice(anomalous, len(anomalous)), random.choice(good, len(good))])
        values.append(metric(labels[chosen], scores[chosen]))
    return _percentiles(np.array(values))


def bootstrap_mean_interval(values: FloatArray, groups: NDArray[np.int64], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean over values that come in groups: the regions of an image, say."""
    random = np.random.default_rng(seed)
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    chosen = random.integers(len(sums), size=(RESAMPLES, len(sums)))
    return _percentiles(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))


def _percentiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class PixelStatistics:
    """Of every defect pixel, region by region: its value, and where it stands among the good pixels.

    above, at_or_above: shares of the good pixels, a and b of this module's docstring. starts: where each region
    begins. region_images: the index of each region's image.
    """

    values: MapArray
    above: FloatArray
    at_or_above: FloatArray
    good_pixels: int
    starts: NDArray[np.int64]
    region_images: NDArray[np.int64]


def pixel_statistics(maps: Iterable[MapArray], masks: list[BoolArray]) -> PixelStatistics:
    """Rank the defect pixels of N maps (H, W), of any sizes, among the good pixels of all of them.

    Regions are the masks' 8-connected components. Maps are gone through three times, one by one; besides them it needs
    some 70 bytes for each defect pixel, and 32 MiB. Raises ValueError for maps and masks that do not fit, values that
    are not finite, and where there is no good or no defect pixel.
    """
    _check_maps(maps, masks)
    values, region_images = [], []
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for label, box in enumerate(ndimage.find_objects(labels, max_label=count), start=1):
            values.append(anomaly_map[box][labels[box] == label])
            region_images.append(index)
    defect = np.concatenate(values)
    levels, level = np.unique(defect, return_inverse=True)
    good_pixels, above, at_or_above = 0, np.zeros(len(levels)), np.zeros(len(levels))
    for good in _good_pixels(maps, masks):
        good.sort()
        good_pixels += len(good)
        above += len(good) - np.searchsorted(good, levels, side="right")
        at_or_above += len(good) - np.searchsorted(good, levels, side="left")
    return PixelStatistics(
        values=defect,
        above=(above / good_pixels)[level],
        at_or_above=(at_or_above / good_pixels)[level],
        good_pixels=good_pixels,
        starts=np.cumsum([0, *(len(region) for region in values[:-1])]),
        region_images=np.array(region_images),
    )


def _check_maps(maps: Iterable[MapArray], masks: list[BoolArray]) -> None:
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"map {index} is {anomaly_map.shape}, its mask {mask.shape}.")
        if anomaly_map.dtype != np.float32 or mask.dtype != np.bool_:
            raise ValueError(f"map {index} is {anomaly_map.dtype}, its mask {mask.dtype}: not float32 and bool.")
        if not np.isfinite(anomaly_map).all():
            raise ValueError(f"map {index} holds a value that is not finite.")
    defect, pixels = sum(int(mask.sum()) for mask in masks), sum(mask.size for mask in masks)
    if not 0 < defect < pixels:
        raise ValueError(f"{defect} of {pixels} pixels are defects: at least one good and one defect are needed.")


def _good_pixels(maps: Iterable[MapArray], masks: list[BoolArray]) -> Iterator[MapArray]:
    """The good pixels of all maps, up to PIXELS_AT_ONCE at a time, in one buffer that the caller may sort.

    Counts add up, so that they need not all be in memory at once.
    """
    buffer, end = np.empty(PIXELS_AT_ONCE, dtype=np.float32), 0
    for anomaly_map, mask in zip(maps, masks, strict=True):
        good = anomaly_map[~mask]
        while len(good):
            taken = good[: len(buffer) - end]
            buffer[end : end + len(taken)] = taken
            good, end = good[len(taken) :], end + len(taken)
            if end == len(buffer):
                yield buffer
                end = 0
    yield buffer[:end]


def region_areas(statistics: PixelStatistics, *, fpr_limit: float) -> FloatArray:
    """Each region's overlap, averaged over the false positive rates up to the limit: (R,) in [0, 1].

    The rates are those of all good pixels, so that the mean over some regions is the AUPRO of those. Raises ValueError
    for a limit outside (0, 1].
    """
    areas = _areas(statistics, fpr_limit)
    sizes = np.diff([*statistics.starts, len(areas)])
    return np.asarray(np.add.reduceat(areas, statistics.starts) / sizes, dtype=np.float64)


def aupro(statistics: PixelStatistics, *, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap, up to a false positive rate (Bergmann et al., MVTec AD, IJCV 2021).

    The curve is the mean over regions of the share of a region's pixels that are found, against the share x of good
    pixels that are flagged. A pixel is found at rate x to the degree clip((x - a) / (b - a), 0, 1), with a and b as
    above. Integrated from 0 to L that is L - (a + b) / 2 if b <= L, (L - a)^2 / (2 (b - a)) if a < L < b, else 0;
    mean and integral change places, and dividing by L makes 1 of a perfect map.
    """
    return float(region_areas(statistics, fpr_limit=fpr_limit).mean())


def overlap_points(statistics: PixelStatistics, *, fpr_limit: float = 0.3) -> tuple[FloatArray, FloatArray]:
    """False positive rates up to the limit and the per-region overlap there: 101 points of the curve of aupro, closer
    together where it is steep.
    """
    rates = fpr_limit * np.linspace(0, 1, CURVE_POINTS) ** 2
    a, ramp = statistics.above, np.maximum(statistics.at_or_above - statistics.above, 1e-300)
    sizes = np.diff([*statistics.starts, len(a)])
    overlaps = [(np.add.reduceat(np.clip((rate - a) / ramp, 0, 1), statistics.starts) / sizes).mean() for rate in rates]
    return rates, np.array(overlaps)


def pixel_auroc(statistics: PixelStatistics) -> float:
    """Area under the ROC curve over pixels: the area of aupro up to 1, with every defect pixel weighted alike."""
    return float(_areas(statistics, 1.0).mean())


def _areas(statistics: PixelStatistics, limit: float) -> FloatArray:
    """How much of the rates from 0 to limit each defect pixel is found at: (P,) in [0, 1]."""
    if not 0 < limit <= 1:
        raise ValueError(f"the limit of the false positive rate is {limit:g}: it has to be in (0, 1].")
    a, b = statistics.above, statistics.at_or_above
    ramp = np.maximum(b - a, 1e-300)
    within = np.where(b <= limit, limit - (a + b) / 2, np.maximum(limit - a, 0) ** 2 / (2 * ramp))
    return np.asarray(np.where(a < limit, within, 0) / limit, dtype=np.float64)


def pixel_ap(statistics: PixelStatistics) -> float:
    """Average precision over pixels, as scikit-learn's average_precision_score defines it."""
    _, first, counts = np.unique(-statistics.values, return_index=True, return_counts=True)  # from the highest down
    true_positives = np.cumsum(counts)
    precision = true_positives / (true_positives + statistics.at_or_above[first] * statistics.good_pixels)
    return float(np.sum(precision * counts) / true_positives[-1])


def false_alarm_interval(
    *,
    calibration_images: int,
    alpha: float,
    good_images: int,
    design_effect: float = 1.0,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """The rates of false alarms that alpha promises on so many good images, 95 % of the time.

    Given the calibration images, the chance of an alarm is Beta(l, n + 1 - l) with l = floor(alpha (n + 1)) (Vovk,
    Conditional validity of inductive conformal predictors, 2012; Bates et al., arXiv 2104.08279), so that the number
    of alarms is beta-binomial. Raises ValueError for an alpha that n images cannot resolve.

    design_effect: how many pictures tell as much as one of a part of its own, among those of calibration and of the
    test alike: `Calibration.design_effect`. There are that many times fewer of either.
    """
    alarms = math.floor(alpha * (calibration_images + 1) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if not 1 <= alarms <= calibration_images:
        raise ValueError(f"alpha is {alpha:g}: {calibration_images} calibration images do not resolve it.")
    independent = max(round(good_images / design_effect), 1)
    others = calibration_images + 1 - alarms
    low, high = stats.betabinom(independent, alarms / design_effect, others / design_effect).interval(confidence)
    return float(low) / independent, float(high) / independent
