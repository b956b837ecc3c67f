"""The versions of models on disk.

    CHECKPOINT/model.json                one product, named by its checkpoint, version 1
    CHECKPOINT/<name>/<version>/...      many: names in lower case, versions whole numbers, of which the highest answers

Names come from the disk and are checked; those of requests are only compared.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import RECORD_FILE, WEIGHTS_FILE
from service.errors import logger

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
UNREADABLE = ()  # in place of a stamp


@dataclass(frozen=True)
class Found:
    """A version on disk. product: None where the folder is the only one, whose checkpoint says its name."""

    folder: Path
    product: str | None
    version: int
    size: int  # bytes of its weights
    stamp: tuple[int, ...]  # another one: it was replaced; or UNREADABLE


def scan(root: Path) -> tuple[list[Found], set[Path]]:
    """And the products of which nothing is known now, because their folder cannot be read. Raises OSError."""
    if (root / RECORD_FILE).exists():
        return [_found(root, product=None, version=1)], set()
    found: list[Found] = []
    unreadable = set()
    for product in sorted(root.iterdir()):
        try:
            if NAME.fullmatch(product.name) and _is_folder(product):
                found += _versions_of(product)
        except OSError as error:
            logger.warning("cannot look for models in %s: %s", product, error)
            unreadable.add(product)
    return found, unreadable


def _versions_of(product: Path) -> Iterator[Found]:
    for folder in product.iterdir():
        if VERSION.fullmatch(folder.name) and _is_folder(folder):
            version = int(folder.name)
            try:
                yield _found(folder, product=product.name, version=version)
            except FileNotFoundError:
                continue  # it is being copied, or deleted
            except OSError:
                yield Found(folder, product.name, version, size=0, stamp=UNREADABLE)  # whoever reads it says why


def _is_folder(path: Path) -> bool:
    """Not a link: it could lead anywhere."""
    return path.is_dir() and not path.is_symlink()


def _found(folder: Path, *, product: str | None, version: int) -> Found:
    status = [(folder / name).stat() for name in (RECORD_FILE, WEIGHTS_FILE)]
    stamp = tuple(number for each in status for number in (each.st_mtime_ns, each.st_ino, each.st_size))
    return Found(folder, product, version, size=status[1].st_size, stamp=stamp)
