"""What a checkpoint is worth, measured on the test images of a folder. Nothing is chosen here: no threshold, no
epoch; alpha comes from calibration.
"""

import json
from collections.abc import Callable
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
from models.scoring import Scorer, windows
from training import fidelity, metrics
from training.data import GOOD, read_dataset
from training.details import details
from training.measuring import FullMaps, Measured, measure
from training.progress import peak_memory_bytes

ImageMetric = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]

FPR_LIMITS = (0.3, 0.05)
FIGURES = {
    "auroc": "AUROC",
    "ap": "AP",
    "f1_max": "F1-max",
    "aupro_0.3": "AUPRO@0.3",
    "aupro_0.05": "AUPRO@0.05",
}
FIDELITY = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "sharpness_ratio": "sharpness ratio",
    "variety_ratio": "variety ratio",
    "frechet_random_features": "Fréchet (random features)",
}
DETAILS = "details"


def evaluate_folder(
    scorer: Scorer,
    data: Path,
    *,
    alpha: float | None,
    command: str,
    console: Console,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Score a folder's test images and measure the scores. Returns what evaluation.json holds.

    alpha: None takes the checkpoint's. pictures: a folder for those of the worst misses and false alarms. Raises
    DataError, CalibrationError.
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
        "generation": generation_quality(scorer, measured),
        "false_alarms": false_alarms(measured, alpha=alpha, calibration=scorer.calibration),
        "defects": by_defect(measured, statistics, alpha=alpha),
        "images_per_second": len(measured.defects) / measured.seconds,
        "peak_memory_bytes": peak_memory_bytes(scorer.device),
        DETAILS: details(scorer, dataset, measured, statistics, alpha=alpha, pictures=pictures),
    }


def without_details(report: dict[str, Any]) -> dict[str, Any]:
    """The figures alone, without what there is of each image: for model.json."""
    return {key: value for key, value in report.items() if key != DETAILS}


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
    return metrics.pixel_statistics(FullMaps([measured.maps[index] for index in known], masks), masks)


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


def reconstruction_quality(measured: Measured) -> dict[str, Any] | None:
    """How well good parts are rebuilt, at the model's resolution; None without good images or over features."""
    if not measured.good_images:
        return None
    images, reconstructions = torch.stack(measured.good_images), torch.stack(measured.good_reconstructions)
    return {
        "images": len(images),
        "psnr_db": fidelity.psnr(reconstructions, images),
        "ssim": fidelity.ssim(reconstructions, images),
        "ms_ssim": fidelity.ms_ssim(reconstructions, images),
        **_set_figures(reconstructions, images),
    }


@torch.inference_mode()
def generation_quality(scorer: Scorer, measured: Measured) -> dict[str, Any] | None:
    """How like good parts the decoder's pictures of as many draws from N(0, I) are; None without good images or over
    features.

    The prior is drawn on the CPU with a fixed seed. Of a model that scores in tiles, images are cut to tiles too.
    """
    if not measured.good_images:
        return None
    config, networks, count = scorer.config, scorer.networks, len(measured.good_images)
    shape = (count, config.latent_dim, config.latent_side, config.latent_side)
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(scorer.device)
    decoded = torch.cat([networks.standardisation.intensities(networks.decoder(few)) for few in torch.split(codes, 16)])
    samples = (2 * decoded.cpu() - 1).clamp(-1, 1)  # (N, C, side, side)
    cuts = windows(config.image_size, config.side)
    images = torch.stack([image[..., *cuts[i % len(cuts)]] for i, image in enumerate(measured.good_images)])
    return {
        "samples": count,
        "variety_ratio": fidelity.variety_ratio(samples, images),
        **_set_figures(samples, images),
    }


def _set_figures(made: Tensor, images: Tensor) -> dict[str, Any]:
    features = fidelity.random_features(images)
    distance = fidelity.frechet_distance(fidelity.random_features(made), features) if len(images) > 1 else None
    return {
        "sharpness_ratio": fidelity.sharpness_ratio(made, images),
        "octave_ratios": fidelity.octave_ratios(made, images),
        "frechet_random_features": distance,
        "frechet_floor": fidelity.frechet_floor(features),
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


def pictures_folder(out: Path) -> Path:
    """evaluation/ for evaluation.json."""
    return out.with_suffix("") if out.suffix else out.with_name(f"{out.name}.pictures")


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
    for level in ("reconstruction", "generation"):
        figures = report[level] or {}
        for name in (name for name in FIDELITY if figures.get(name) is not None):
            floor = figures["frechet_floor"] if name == "frechet_random_features" else None
            beside = "" if floor is None else f"({floor:.3g} between halves)"
            table.add_row(f"{level} {FIDELITY[name]}", f"{figures[name]:.3g}", beside)
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
