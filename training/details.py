"""What an evaluation tells of each test image: for the report, where the figures alone do not say what went wrong."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from models.calibration import SCORE_NAMES, Calibration
from models.errors import DataError
from models.overlay import overlay
from models.scoring import Scorer, regions, resize_map
from training import metrics
from training.data import Dataset, TestImage, load_mask
from training.inference import ScoredImage, score_images
from training.measuring import Measured

CASES = 6  # pictures of anomalous images with the lowest scores, and of good ones with the highest
PICTURE_SIDE = 224
GAP = 6
OUTLINE = (0, 220, 90)


def details(
    scorer: Scorer,
    dataset: Dataset,
    measured: Measured,
    statistics: metrics.PixelStatistics | None,
    *,
    alpha: float,
    pictures: Path | None,
) -> dict[str, Any]:
    """A row per test image, the two curves, and with a folder for `pictures` the worst cases. Raises DataError."""
    labels = measured.anomalous
    both_kinds = labels.any() and not labels.all()
    rows = [
        {
            "file": image.path.relative_to(dataset.root / "test").as_posix(),
            "kind": image.defect,
            "anomaly_score": float(measured.anomaly_scores[index]),
            "p_value": float(measured.p_values[index]),
            "scores": dict(zip(SCORE_NAMES, measured.scores[index].tolist(), strict=True)),
        }
        for index, image in enumerate(dataset.test)
    ]
    return {
        "alpha": alpha,
        "score_level": score_level(scorer.calibration, alpha),
        "images": rows,
        "roc": _curve(metrics.roc_points(labels, measured.anomaly_scores)) if both_kinds else None,
        "overlap": None if statistics is None else _curve(metrics.overlap_points(statistics)),
        "cases": {} if pictures is None else write_cases(scorer, dataset, measured, alpha=alpha, folder=pictures),
    }


def score_level(calibration: Calibration, alpha: float) -> float:
    """The anomaly score above which, and at which not, an image is flagged at alpha."""
    good = calibration.good_scores
    return float(good[calibration.p_value(good) > alpha].max())


def _curve(points: tuple[metrics.FloatArray, metrics.FloatArray]) -> dict[str, list[float]]:
    rates, found = points
    return {"false_positive_rate": rates.tolist(), "found": found.tolist()}


def write_cases(
    scorer: Scorer, dataset: Dataset, measured: Measured, *, alpha: float, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Write pictures of the anomalous images that look best and of the good ones that look worst, each first.

    Whether they are misses and false alarms at alpha their p-values tell. Returns for `defects` and `good` the index
    of each image and the name of its picture. Raises DataError.
    """
    order = np.argsort(measured.anomaly_scores, kind="stable")
    chosen = {
        "defects": [int(index) for index in order if measured.anomalous[index]][:CASES],
        "good": [int(index) for index in order[::-1] if not measured.anomalous[index]][:CASES],
    }
    level = scorer.calibration.map_level(alpha)
    cases: dict[str, list[dict[str, Any]]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, indices in chosen.items():
            results = score_images(scorer, [dataset.test[index].path for index in indices])
            cases[name] = []
            for place, (index, result) in enumerate(zip(indices, results, strict=True), start=1):
                assert isinstance(result, ScoredImage)  # it was read a moment ago
                picture = f"{name}-{place}.png"
                case_picture(dataset.test[index], result, level=level).save(folder / picture)
                cases[name].append({"image": index, "picture": f"{folder.name}/{picture}"})
    except OSError as error:
        raise DataError(f"cannot write the pictures {folder}: {error}.") from error
    return cases


def case_picture(test_image: TestImage, result: ScoredImage, *, level: float) -> Image.Image:
    """The image with its mask's outline, and beside it the image with its map and regions."""
    mask = load_mask(test_image, width=result.image.width, height=result.image.height)
    image = ImageOps.contain(result.image.convert("RGB"), (PICTURE_SIDE, PICTURE_SIDE))
    width, height = image.size
    found = regions(result.anomaly_map, level=level, width=width, height=height)
    anomaly_map = resize_map(result.anomaly_map, width=width, height=height)
    picture = Image.new("RGB", (2 * width + GAP, height), (128, 128, 128))
    picture.paste(_outlined(image, mask), (0, 0))
    picture.paste(overlay(image, anomaly_map, level=level, regions=found), (width + GAP, 0))
    return picture


def _outlined(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    white = Image.fromarray(255 * mask.astype(np.uint8))
    small = np.asarray(white.resize(image.size, Image.Resampling.BOX)) > 0  # a hairline too
    around = ndimage.binary_dilation(small, iterations=2) & ~ndimage.binary_dilation(small)
    pixels = np.array(image)
    pixels[around] = OUTLINE
    return Image.fromarray(pixels)
