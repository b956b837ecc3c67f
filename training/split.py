"""Which good images train and which calibrate: pictures of one part stay on one side.

A line photographs a part more than once: at other exposures, before and after a wash. A part that the networks know
from training looks better than one that they never saw, so its other pictures would calibrate what no new part keeps.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from models.calibration import images_needed
from models.errors import DataError
from models.maps import smooth
from training.data import GOOD, Dataset, load_images
from training.progress import progress_bar

# Parts are compared as thumbnails of this many pixels on each side, with what is coarser than this many pixels taken
# out: exposure and shading are not the part.
THUMBNAIL, COARSE = 48, 2.0
# Pictures that correlate at least so much show one part. Of the magnetic tiles (docs/detection.md) 95 in 100 pictures
# reach 0.8 with another one of their own tile; of two tiles one pair in a hundred reaches 0.4.
ALIKE = 0.7
AT_ONCE = 64  # pictures that one is compared with: more would not stay in a processor's cache


@dataclass(frozen=True)
class Split:
    """Paths of good images. No file of `training` has the content of one of `calibration`."""

    training: list[Path]
    calibration: list[Path]
    parts: list[int]  # which part each calibration image shows: a number that pictures of one part share
    fingerprint: str  # sha256 over the contents of the training images, in the order of their own sha256


def split_good_images(dataset: Dataset, *, fraction: float, alpha: float, seed: int, console: Console) -> Split:
    """Hold images out for calibration: the folder's own validation images with all other pictures of their parts, and
    parts chosen by a seeded hash.

    The hash is of the files' contents, so that the same image twice is on one side, whatever its name. At least as
    many are held out as alpha needs. Raises DataError if that leaves fewer than half for training, or for an image
    that cannot be read.
    """
    if not dataset.good:
        raise DataError(f"no good images in {dataset.root}: training needs them in train/{GOOD}.")
    content = {path: _digest(path) for path in [*dataset.good, *dataset.validation]}
    # The folder's own validation image goes before its copy, the first copy before the others.
    path_of = {content[path]: path for path in [*dataset.good[::-1], *dataset.validation[::-1]]}
    validation = {content[path] for path in dataset.validation}
    candidates = sorted({content[path] for path in dataset.good} - validation)
    needed = images_needed(alpha)
    # Copies of one image are one image: they add nothing to what alpha can resolve.
    held_out = max(math.floor(fraction * len(candidates)), needed - len(validation))
    if held_out > len(candidates) / 2:
        raise DataError(
            f"{len(candidates)} different good images in {dataset.root}: an alpha of {alpha:g} needs {needed} "
            f"held out for calibration, which leaves less than half for training. "
            f"Add images, or set a larger alpha."
        )
    part_of = _part_of(path_of, most=(held_out + len(validation)) // 2, console=console)
    pictures: dict[int, list[bytes]] = {}
    for digest in candidates:
        pictures.setdefault(part_of[digest], []).append(digest)
    kept_out = {part_of[digest] for digest in validation}
    shown = sum(len(pictures.get(part, [])) for part in kept_out)
    if shown > len(candidates) / 2:
        raise DataError(
            f"{shown} of {len(candidates)} different images in {dataset.root / 'train' / GOOD} show parts that "
            f"validation/{GOOD} shows too, which leaves less than half for training: keep each part in one of the two."
        )
    key = str(seed).encode()
    calibration = set(validation)
    order = {part: (part not in kept_out, hashlib.sha256(key + own[0]).digest()) for part, own in pictures.items()}
    for part in sorted(pictures, key=order.__getitem__):
        if part in kept_out or len(calibration) - len(validation) < held_out:
            calibration.update(pictures[part])
    # In the order of their contents: a file's name decides nothing.
    training = sorted((path for path in dataset.good if content[path] not in calibration), key=content.__getitem__)
    chosen = sorted(calibration, key=path_of.__getitem__)
    return Split(
        training=training,
        calibration=[path_of[digest] for digest in chosen],
        parts=[part_of[digest] for digest in chosen],
        fingerprint=hashlib.sha256(b"".join(content[path] for path in training)).hexdigest(),
    )


def _part_of(path_of: dict[bytes, Path], *, most: int, console: Console) -> dict[bytes, int]:
    """Which part each image shows, by the digests of their contents."""
    digests = sorted(path_of)
    with progress_bar(console) as bar:
        reading = bar.add_task("reading thumbnails", total=len(digests), detail="")
        paths = [path_of[digest] for digest in digests]
        thumbnails = load_images(paths, channels=1, size=THUMBNAIL, advance=lambda: bar.advance(reading))
        comparing = bar.add_task("comparing parts", total=len(digests), detail="")
        numbers = part_numbers(thumbnails, most=most, advance=lambda: bar.advance(comparing))
        bar.update(comparing, completed=len(digests))
    return dict(zip(digests, numbers, strict=True))


def part_numbers(thumbnails: Tensor, *, most: int, advance: Callable[[], None] = lambda: None) -> list[int]:
    """Which part each of N images, uint8 (N, 1, S, S), shows: the same number for pictures that are alike.

    If that gives one part more than `most` pictures, what is alike is the product, each part placed like the last:
    then every image is taken for a part of its own.
    """
    spectra = fine_spectra(thumbnails)
    numbers = torch.arange(len(spectra))
    for index, spectrum in enumerate(spectra[:-1]):
        alike = correlations(spectrum, spectra[index + 1 :]) >= ALIKE
        joined = torch.cat([numbers[index : index + 1], numbers[index + 1 :][alike]])
        numbers[torch.isin(numbers, joined)] = joined.min()
        if numbers.bincount().max() > max(most, 1):
            return list(range(len(spectra)))
        advance()
    found: list[int] = torch.unique(numbers, return_inverse=True)[1].tolist()
    return found


def fine_spectra(thumbnails: Tensor) -> Tensor:
    """Spectra (N, S, S / 2 + 1) of what is fine in images, uint8 (N, 1, S, S), and is not in their mean."""
    images = thumbnails.float()
    images = images - smooth(images, sigma=COARSE)
    images = images / images.std(dim=(2, 3), keepdim=True).clamp(min=1e-3)  # of flat ones, zeros stay
    # A shift brings in what the other does not show: the borders count less.
    window = torch.hann_window(images.shape[-1], periodic=False)
    images = (images - images.mean(dim=0)).squeeze(1) * window * window.unsqueeze(1)
    images = images / images.flatten(1).norm(dim=1).clamp(min=1e-3).view(-1, 1, 1)
    spectra: Tensor = torch.fft.rfft2(images)
    return spectra


def correlations(spectrum: Tensor, spectra: Tensor) -> Tensor:
    """The highest correlation of an image with each of M others over all shifts against each other, (M,)."""
    size = THUMBNAIL, THUMBNAIL
    shifted = (torch.fft.irfft2(spectrum.conj() * few, s=size) for few in torch.split(spectra, AT_ONCE))
    return torch.cat([shifts.flatten(1).amax(dim=1) for shifts in shifted])


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
