"""Folders of images: what is in them, and their pixels and masks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import DataError, ImageError
from models.images import decode_image, image_tensor

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
GOOD = "good"


@dataclass(frozen=True)
class TestImage:
    """defect: "good", or the name of the test folder. mask: None where there is none."""

    path: Path
    defect: str
    mask: Path | None

    __test__ = False  # not a test class: keep pytest from collecting it


@dataclass(frozen=True)
class Dataset:
    """A folder's images. `validation`: good images that the folder itself keeps out of training."""

    root: Path
    good: list[Path]
    validation: list[Path]
    test: list[TestImage]


def read_dataset(root: Path) -> Dataset:
    """List an MVTec-layout folder (train/good, and perhaps validation/good, test/*, ground_truth/*), or a plain
    folder of good images with any subfolders. Raises DataError if it has no good image.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.")
    if _is_mvtec(root):
        dataset = Dataset(
            root=root,
            good=images_below(root / "train" / GOOD),
            validation=images_below(root / "validation" / GOOD),
            test=_test_images(root),
        )
        expected = f"{root / 'train' / GOOD}"
    else:
        products = sorted(path.parent.parent for path in root.glob(f"*/train/{GOOD}"))
        if products:  # its defects and masks would be taken for good images
            raise DataError(f"{root} holds {len(products)} folders in MVTec layout: name one, such as {products[0]}.")
        dataset = Dataset(root=root, good=images_below(root), validation=[], test=[])
        expected = f"{root} (nor a folder train/{GOOD} in it)"
    if not dataset.good and not dataset.test:
        raise DataError(f"no images in {expected}: {', '.join(sorted(EXTENSIONS))} are read.")
    return dataset


def images_below(folder: Path) -> list[Path]:
    """The image files below a folder, by their extension, sorted; empty if there is no such folder.

    What is hidden is left out, folders too: editors and file managers keep copies and thumbnails there.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not _is_hidden(path, folder)
    )


def is_searched(folder: Path, root: Path) -> bool:
    """Whether images below `folder` would be taken for good ones of the data in `root`."""
    searched = [root / "train" / GOOD, root / "validation" / GOOD] if _is_mvtec(root) else [root]
    folder = folder.resolve()
    return any(
        folder.is_relative_to(good) and not _is_hidden(folder, good) for good in (path.resolve() for path in searched)
    )


def _is_mvtec(root: Path) -> bool:
    return (root / "train").is_dir() or (root / "test").is_dir()


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _test_images(root: Path) -> list[TestImage]:
    images = []
    for folder in sorted(path for path in (root / "test").glob("[!.]*") if path.is_dir()):
        paths = images_below(folder)
        masks = [] if folder.name == GOOD else [_mask(root, path) for path in paths]
        ground_truth = root / "ground_truth" / folder.name
        if not all(masks) and images_below(ground_truth):
            path = paths[masks.index(None)]
            raise DataError(f"{path} has no mask {path.stem}_mask.png in {ground_truth}, which has other masks.")
        masks += [None] * (len(paths) - len(masks))
        images += [TestImage(path=path, defect=folder.name, mask=mask) for path, mask in zip(paths, masks, strict=True)]
    return images


def _mask(root: Path, image: Path) -> Path | None:
    # ground_truth mirrors test, subfolders too.
    folder = root / "ground_truth" / image.parent.relative_to(root / "test")
    for name in (f"{image.stem}_mask.png", f"{image.stem}.png"):
        if (folder / name).is_file():
            return folder / name
    return None


def load_images(paths: list[Path], *, channels: int, size: int, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Decode and resize images into one tensor, uint8 (N, C, S, S). Raises DataError naming each bad file.

    They stay decoded in memory: an image of 128 x 128 x 3 takes 48 KiB, decoding it again would take 2 ms.
    """

    def load(path: Path) -> Tensor | str:
        try:
            return image_tensor(decode_image(path.read_bytes()), channels=channels, size=size)
        except (ImageError, OSError) as error:
            return f"{path}: {error}"

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter's lock while it decodes
        results = []
        for result in pool.map(load, paths):
            results.append(result)
            advance()
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        raise unreadable(errors, of=f"{len(paths)} images")
    return torch.stack([result for result in results if isinstance(result, Tensor)])


def unreadable(errors: list[str], *, of: str) -> DataError:
    """An error that names the first ten images that cannot be read, each with its reason."""
    shown = "\n  ".join(errors[:10])
    return DataError(f"{len(errors)} of {of} cannot be read:\n  {shown}")


def load_mask(image: TestImage, *, width: int, height: int) -> NDArray[np.bool_]:
    """(height, width), True on the defect: more than half white. All False without a mask.

    Raises DataError if the mask cannot be read or is not of the image's size.
    """
    if image.mask is None:
        return np.zeros((height, width), dtype=bool)
    try:
        mask = decode_image(image.mask.read_bytes()).convert("L")
    except (ImageError, OSError) as error:
        raise DataError(f"{image.mask}: {error}") from error
    if mask.size != (width, height):
        raise DataError(
            f"{image.mask} is {mask.width} x {mask.height} pixels, its image {image.path} is {width} x {height}."
        )
    values = np.asarray(mask)
    if 0 < values.max() <= 127:
        raise DataError(f"{image.mask} has no value above {values.max()}: a mask's defect is white, 255.")
    return values > 127
