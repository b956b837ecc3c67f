"""The test images of a folder, scored once: what every figure and every picture of an evaluation is made from."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from models.calibration import SCORE_NAMES
from models.scoring import MapArray, Scorer, resize_map
from training.data import GOOD, Dataset, TestImage, load_mask, unreadable
from training.inference import FailedImage, ScoredImage, score_images
from training.progress import progress_bar


@dataclass(frozen=True, eq=False)
class Measured:
    """Of N test images, in the folder's order."""

    defects: NDArray[np.str_]  # (N,) "good" or the kind of the defect
    scores: NDArray[np.float64]  # (N, 3) in the order of SCORE_NAMES
    anomaly_scores: NDArray[np.float64]  # (N,)
    p_values: NDArray[np.float64]  # (N,)
    maps: list[MapArray]  # (S, S) each
    # (H, W), at each image's own resolution; None: a defect whose mask the folder does not have
    masks: list[NDArray[np.bool_] | None]
    # (C, S, S) in [-1, 1], what the model saw; none of a model over features, which makes no pictures
    good_images: list[Tensor]
    good_reconstructions: list[Tensor]  # (C, S, S) in [-1, 1]
    seconds: float

    @property
    def anomalous(self) -> NDArray[np.bool_]:
        return np.asarray(self.defects != GOOD)


class FullMaps:
    """Maps (S, S), each at the resolution of its image's mask while it is looked at: all of them together, of two
    hundred photographs, would take ten gigabytes."""

    def __init__(self, maps: list[MapArray], masks: list[NDArray[np.bool_]]) -> None:
        self._maps, self._masks = maps, masks

    def __iter__(self) -> Iterator[MapArray]:
        for anomaly_map, mask in zip(self._maps, self._masks, strict=True):
            yield resize_map(anomaly_map, width=mask.shape[1], height=mask.shape[0])


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
            maps.append(result.anomaly_map)
            masks.append(_mask(test_image, result))
            if test_image.defect == GOOD and result.reconstruction is not None:
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
