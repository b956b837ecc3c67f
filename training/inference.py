"""Score files from the command line: a row per image, whatever its neighbours are like."""

import csv
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from torch import Tensor

from models.calibration import SCORE_NAMES
from models.errors import DataError, ImageError
from models.images import decode_image, image_tensor
from models.overlay import overlay
from models.scoring import MapArray, Scorer, at_once, regions, resize_map
from training.data import images_below

BATCH = 16
CSV_HEADER = ["file", *SCORE_NAMES, "anomaly_score", "p_value", "is_anomalous", "error"]


@dataclass(frozen=True, eq=False)
class ScoredImage:
    path: Path
    image: Image.Image  # upright, at its own resolution
    scores: dict[str, float]  # by SCORE_NAMES
    anomaly_score: float
    p_value: float
    anomaly_map: MapArray  # (S, S)
    pixels: Tensor  # uint8 (C, S, S), what the model saw
    reconstruction: Tensor | None  # (C, S, S) intensities, in [0, 1] or a little outside; None of features

    def full_map(self) -> MapArray:
        """The map at the image's own resolution (H, W)."""
        return resize_map(self.anomaly_map, width=self.image.width, height=self.image.height)


@dataclass(frozen=True)
class FailedImage:
    path: Path
    error: str


def find_images(paths: list[Path]) -> list[Path]:
    """The paths themselves, and for a folder the images below it. Raises DataError for a folder without any."""
    found: list[Path] = []
    for path in paths:
        images = images_below(path) if path.is_dir() else [path]
        if not images:
            raise DataError(f"no images in {path}.")
        found += images
    return found


def score_images(scorer: Scorer, paths: list[Path]) -> Iterator[ScoredImage | FailedImage]:
    """Score files batch by batch, in their order. A file that cannot be read is a FailedImage."""
    config = scorer.config
    size = at_once(config, BATCH)

    def read(path: Path) -> tuple[Image.Image, Tensor] | FailedImage:
        try:
            image = decode_image(path.read_bytes())
        except ImageError as error:
            return FailedImage(path, f"{error.code}: {error}")
        except OSError as error:
            return FailedImage(path, f"file: {error.strerror}")
        return image, image_tensor(image, channels=config.channels, size=config.image_size)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            read_images = list(pool.map(read, batch))
            pixels = [item[1] for item in read_images if not isinstance(item, FailedImage)]
            if pixels:
                columns, maps, reconstructions = scorer.compute(torch.stack(pixels))
                scores = scorer.verdicts(columns, maps)
            index = 0
            for path, item in zip(batch, read_images, strict=True):
                if isinstance(item, FailedImage):
                    yield item
                    continue
                yield ScoredImage(
                    path=path,
                    image=item[0],
                    scores=scores.named(index),
                    anomaly_score=float(scores.anomaly_score[index]),
                    p_value=float(scores.p_value[index]),
                    anomaly_map=scores.maps[index],
                    pixels=item[1],
                    reconstruction=None if config.over_features else reconstructions[index].cpu(),
                )
                index += 1


def write_rows(
    scorer: Scorer,
    paths: list[Path],
    output: TextIO,
    *,
    alpha: float,
    as_csv: bool,
    overlays: Path | None,
    advance: Callable[[], None],
) -> int:
    """Write a row per file to `output`, and an overlay per image to a folder; returns how many files failed.

    Raises DataError if an overlay cannot be written.
    """
    level = scorer.calibration.map_level(alpha)
    table = csv.writer(output, lineterminator="\n") if as_csv else None
    if table:
        table.writerow(CSV_HEADER)
    failed = 0
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    for result in score_images(scorer, paths):
        anomalous = isinstance(result, ScoredImage) and result.p_value <= alpha
        if table:
            table.writerow(_csv_row(result, anomalous))
        else:
            output.write(_text_row(result, anomalous) + "\n")
        output.flush()
        if isinstance(result, FailedImage):
            failed += 1
        elif overlays:
            # abspath, because "../nut.png" would lead out of the folder.
            relative = os.path.relpath(os.path.abspath(result.path), root)
            write_overlay(result, overlays / f"{relative}.overlay.png", level=level)
        advance()
    return failed


def write_overlay(result: ScoredImage, path: Path, *, level: float) -> None:
    """Save the image with its map and regions on it. Raises DataError."""
    image = result.image
    found = regions(result.anomaly_map, level=level, width=image.width, height=image.height)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        overlay(image, result.full_map(), level=level, regions=found).save(path)
    except OSError as error:
        raise DataError(f"cannot write the overlay {path}: {error}.") from error


def _csv_row(result: ScoredImage | FailedImage, anomalous: bool) -> list[object]:
    if isinstance(result, FailedImage):
        return [_shown(result.path), *[""] * (len(CSV_HEADER) - 2), result.error]
    verdict = str(anomalous).lower()
    return [_shown(result.path), *result.scores.values(), result.anomaly_score, result.p_value, verdict, ""]


def _shown(path: Path) -> str:
    """A name is bytes on Linux: those that are not UTF-8 are written as \\xNN, where printing them would fail."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _text_row(result: ScoredImage | FailedImage, anomalous: bool) -> str:
    if isinstance(result, FailedImage):
        return f"{'error':9}  {_shown(result.path)}  {result.error}"
    scores = "  ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
    verdict = "anomalous" if anomalous else "normal"
    return f"{verdict:9}  p {result.p_value:.3f}  score {result.anomaly_score:7.2f}  {scores}  {_shown(result.path)}"
