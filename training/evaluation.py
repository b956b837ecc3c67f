"""What a checkpoint is worth, measured on the test images of a folder. Nothing is chosen here: no threshold, no
epoch; alpha comes from calibration.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from models.calibration import SCORE_NAMES, Calibration
from models.errors import DataError
from models.files import replace_file
from models.scoring import MapArray, Scorer
from training import metrics
from training.data import GOOD, Dataset, TestImage, load_mask, read_dataset, unreadable
from training.inference import FailedImage, ScoredImage, score_images
from training.progress import peak_memory_bytes, progress_bar

ImageMetric = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]

FPR_LIMITS = (0.3, 0.05)
FIGURES = {
    "auroc": "AUROC",
    "ap": "AP",
    "f1_max": "F1-max",
    "aupro_0.3": "AUPRO@0.3",
    "aupro_0.05": "AUPRO@0.05",
    "psnr_db": "PSNR of good images, dB",
    "ssim": "SSIM of good images",
    "sharpness_ratio": "sharpness ratio of good images",
}


@dataclass(frozen=True, eq=False)
class Measured:
    """Of N test images, in the folder's order. Maps and masks are (H, W), at each image's own resolution."""

    defects: NDArray[np.str_]  # (N,) "good" or the kind of the defect
    scores: NDArray[np.float64]  # (N, 3) in the order of SCORE_NAMES
    anomaly_scores: NDArray[np.float64]  # (N,)
    p_values: NDArray[np.float64]  # (N,)
    maps: list[MapArray]
    masks: list[NDArray[np.bool_] | None]  # None: a defect whose mask the folder does not have
    good_images: list[Tensor]  # (C, S, S) in [-1, 1], what the model saw
    good_reconstructions: list[Tensor]  # (C, S, S) in [-1, 1]
    seconds: float

    @property
    def anomalous(self) -> NDArray[np.bool_]:
        return np.asarray(self.defects != GOOD)


def evaluate_folder(
    scorer: Scorer, data: Path, *, alpha: float | None, command: str, console: Console
) -> dict[str, Any]:
    """Score a folder's test images and measure the scores. Returns what model.json and evaluation.json hold.

    alpha: None takes the checkpoint's. Raises DataError, CalibrationError.
    """
    dataset = read_dataset(data)
    if not dataset.test:
        raise DataError(f"no test images in {data}: evaluation needs test/{GOOD} and test/<kind of defect>.")
    alpha = scorer.calibration.chosen_alpha(alpha)
    measured = measure(scorer, dataset, console)
    statistics = pixel_statistics(measured)
    good = int((~measured.anomalous).sum())
    return {
        "command": command,
        "data": data.resolve().name,
        "images": {"good": good, "anomalous": len(measured.defects) - good},
        "image": image_level(measured),
        "pixel": pixel_level(statistics),
        "reconstruction": reconstruction_quality(measured),
        "false_alarms": false_alarms(measured, alpha=alpha, calibration=scorer.calibration),
        "defects": by_defect(measured, statistics, alpha=alpha),
        "images_per_second": len(measured.defects) / measured.seconds,
        "peak_memory_bytes": peak_memory_bytes(scorer.device),
    }


def measure(scorer: Scorer, dataset: Dataset, console: Console) -> Measured:
    """Score the test images. Raises DataError naming the images that cannot be read, or a mask that does not fit."""
    rows: list[list[float]] = []
    anomaly_scores: list[float] = []
    p_values: list[float] = []
    maps, masks, good_images, good_reconstructions = [], [], [], []
    failed: list[str] = []
    begin = time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task("evaluating", total=len(dataset.test), detail="")
        results = score_images(scorer, [image.path for image in dataset.test])
        for test_image, result in zip(dataset.test, results, strict=True):
            bar.advance(task)
            if isinstance(result, FailedImage):
                failed.append(f"{result.path}: {result.error}")
                continue
            rows.append([result.scores[name] for name in SCORE_NAMES])
            anomaly_scores.append(result.anomaly_score)
            p_values.append(result.p_value)
            maps.append(result.full_map())
            masks.append(_mask(test_image, result))
            if test_image.defect == GOOD:
                good_images.append(result.pixels.float() / 127.5 - 1)
                good_reconstructions.append((2 * result.reconstruction - 1).clamp(-1, 1))
    if failed:
        raise unreadable(failed, of=f"{len(dataset.test)} test images")
    return Measured(
        defects=np.array([image.defect for image in dataset.test]),
        scores=np.array(rows),
        anomaly_scores=np.array(anomaly_scores),
        p_values=np.array(p_values),
        maps=maps,
        masks=masks,
        good_images=good_images,
        good_reconstructions=good_reconstructions,
        seconds=time.perf_counter() - begin,
    )


def _mask(test_image: TestImage, result: ScoredImage) -> NDArray[np.bool_] | None:
    if test_image.defect != GOOD and test_image.mask is None:
        return None
    return load_mask(test_image, width=result.image.width, height=result.image.height)


def image_level(measured: Measured) -> dict[str, Any] | None:
    """AUROC, AP and best F1 of the anomaly score; None unless there are good and anomalous images.

    F1-max picks its threshold on the test images: it is what the best threshold would give, not what alpha gives.
    """
    labels, scores = measured.anomalous, measured.anomaly_scores
    if labels.all() or not labels.any():
        return None
    return {
        "auroc": _with_interval(metrics.image_auroc, labels, scores, resampled=metrics.rank_auroc),
        "ap": _with_interval(metrics.image_ap, labels, scores, resampled=metrics.image_ap),
        "f1_max": metrics.f1_max(labels, scores),
        "auroc_of_each_score": {
            name: metrics.image_auroc(labels, measured.scores[:, index]) for index, name in enumerate(SCORE_NAMES)
        },
    }


def pixel_statistics(measured: Measured) -> metrics.PixelStatistics | None:
    """Over all images whose masks are known; None unless there are good pixels and pixels of defects."""
    known = [index for index, mask in enumerate(measured.masks) if mask is not None]
    masks = [mask for mask in measured.masks if mask is not None]
    if not any(mask.any() for mask in masks) or all(mask.all() for mask in masks):
        return None
    return metrics.pixel_statistics([measured.maps[index] for index in known], masks)


def pixel_level(statistics: metrics.PixelStatistics | None) -> dict[str, Any] | None:
    """AUROC and AP over pixels, AUPRO over regions."""
    if statistics is None:
        return None
    report: dict[str, Any] = {
        "auroc": metrics.pixel_auroc(statistics),
        "ap": metrics.pixel_ap(statistics),
    }
    for limit in FPR_LIMITS:
        areas = metrics.region_areas(statistics, fpr_limit=limit)
        report[f"aupro_{limit}"] = _mean_with_interval(areas, statistics.region_images)
    return report


def reconstruction_quality(measured: Measured) -> dict[str, float] | None:
    """How well good parts are rebuilt, at the model's resolution; None without good images."""
    if not measured.good_images:
        return None
    images, reconstructions = torch.stack(measured.good_images), torch.stack(measured.good_reconstructions)
    return {
        "psnr_db": metrics.psnr(reconstructions, images),
        "ssim": metrics.ssim(reconstructions, images),
        "sharpness_ratio": metrics.sharpness_ratio(reconstructions, images),
    }


def false_alarms(measured: Measured, *, alpha: float, calibration: Calibration) -> dict[str, Any] | None:
    """How many good test images are flagged at alpha, and the rates that alpha promises; None without good images.

    Test images are taken to show each part as often as those of calibration do, and to be as alike.
    """
    p_values = measured.p_values[~measured.anomalous]
    if not len(p_values):
        return None
    low, high = metrics.false_alarm_interval(
        calibration_images=calibration.n,
        alpha=alpha,
        good_images=len(p_values),
        design_effect=calibration.design_effect,
    )
    return {
        "alpha": alpha,
        "calibration_images": calibration.n,
        "design_effect": calibration.design_effect,
        "flagged": int((p_values <= alpha).sum()),
        "rate": float((p_values <= alpha).mean()),
        "promised_low": low,
        "promised_high": high,
    }


def by_defect(
    measured: Measured, statistics: metrics.PixelStatistics | None, *, alpha: float
) -> dict[str, dict[str, Any]]:
    """For each kind of defect: its images against all good ones, the share found at alpha, AUPRO@0.3 of its regions."""
    report = {}
    known = np.array([mask is not None for mask in measured.masks])
    areas = None if statistics is None else metrics.region_areas(statistics, fpr_limit=FPR_LIMITS[0])
    for kind in sorted(set(measured.defects[measured.anomalous])):
        chosen = (measured.defects == kind) | ~measured.anomalous
        labels, scores = measured.anomalous[chosen], measured.anomaly_scores[chosen]
        regions = None
        if statistics is not None and areas is not None:
            of_kind = (measured.defects[known] == kind)[statistics.region_images]
            regions = _mean_with_interval(areas[of_kind], statistics.region_images[of_kind])
        report[str(kind)] = {
            "images": int(labels.sum()),
            "auroc": None
            if labels.all()
            else _with_interval(metrics.image_auroc, labels, scores, resampled=metrics.rank_auroc),
            "found_at_alpha": float((measured.p_values[measured.defects == kind] <= alpha).mean()),
            f"aupro_{FPR_LIMITS[0]}": regions,
        }
    return report


def _with_interval(
    metric: ImageMetric, labels: NDArray[np.bool_], scores: NDArray[np.float64], *, resampled: ImageMetric
) -> dict[str, float]:
    low, high = metrics.bootstrap_interval(resampled, labels, scores)
    return {"value": metric(labels, scores), "low": low, "high": high}


def _mean_with_interval(areas: NDArray[np.float64], images: NDArray[np.int64]) -> dict[str, float] | None:
    """AUPRO is the mean of its regions' areas. Images are resampled; the false positive rates are held."""
    if not len(areas):
        return None
    low, high = metrics.bootstrap_mean_interval(areas, groups=images)
    return {"value": float(areas.mean()), "low": low, "high": high}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Raises DataError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(report, indent=1) + "\n").encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}.") from error


def print_report(report: dict[str, Any], console: Console) -> None:
    """Two tables: the figures, and the kinds of defects."""
    images, alarms = report["images"], report["false_alarms"]
    console.print(f"\n{report['data']}: {images['good']} good and {images['anomalous']} anomalous test images")
    table = Table("figure", Column("value", justify="right"), "95 % interval")
    for level, names in (("image", ("auroc", "ap", "f1_max")), ("pixel", ("auroc", "ap", "aupro_0.3", "aupro_0.05"))):
        for name in names if report[level] else ():
            table.add_row(f"{level} {FIGURES[name]}", *_value_and_interval(report[level][name]))
    for name, value in (report["reconstruction"] or {}).items():
        table.add_row(FIGURES[name], f"{value:.2f}", "")
    if alarms:
        promised = f"({alarms['promised_low']:.2f}-{alarms['promised_high']:.2f}) promised"
        table.add_row(f"false alarms at alpha {alarms['alpha']:g}", f"{alarms['rate']:.3f}", promised)
    table.add_row("images per second", f"{report['images_per_second']:.1f}", "")
    table.add_row("peak memory, GiB", f"{report['peak_memory_bytes'] / 2**30:.2f}", "")
    console.print(table)
    if not report["defects"]:
        return
    kinds = Table("defect", caption="found: share flagged at alpha; in brackets: 95 % interval")
    for heading in ("images", "found", "AUROC", "AUPRO@0.3"):
        kinds.add_column(heading, justify="right")
    for kind, found in report["defects"].items():
        shares = [" ".join(_value_and_interval(found[name])) for name in ("auroc", "aupro_0.3")]
        kinds.add_row(kind, str(found["images"]), f"{found['found_at_alpha']:.2f}", *shares)
    console.print(kinds)


def _value_and_interval(figure: dict[str, float] | float | None) -> tuple[str, str]:
    if figure is None:
        return "-", ""
    if isinstance(figure, float):
        return f"{figure:.3f}", ""
    return f"{figure['value']:.3f}", f"({figure['low']:.2f}-{figure['high']:.2f})"
