"""Files that a kill or a full disk leaves whole."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, and wait until it is on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, whatever happens. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    try:
        write_durably(new, content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
