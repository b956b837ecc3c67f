"""A checkpoint put among those that a service serves, as the next version of its product."""

import shutil
import tempfile
from pathlib import Path

from models.checkpoint import RECORD_FILE, WEIGHTS_FILE, load_checkpoint
from models.errors import CheckpointError, ConfigError
from models.files import write_durably
from service.found import NAME, VERSION
from service.registry import checkpoint_name


def publish(checkpoint: Path, root: Path, *, name: str | None) -> Path:
    """Copy it to root/NAME/VERSION, whole at once: a service that looks sees all of it or nothing.

    name: None takes the checkpoint's own. Raises ConfigError for a name that does not do, CheckpointError for a
    checkpoint that cannot be read or copied.
    """
    own = checkpoint_name(load_checkpoint(checkpoint))
    name = name or own
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name!r} does not do for a folder of models: allowed are 1 to 64 of a-z, 0-9, dot, dash and "
            "underscore, not a mark first; give another with --name."
        )
    if (root / RECORD_FILE).exists():
        raise ConfigError(f"{root} is itself a checkpoint: allowed is a folder for NAME/VERSION.")
    product = root / name
    try:
        product.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=product))
        try:
            new.chmod(0o755)  # mkdtemp's 0o700 would hide it from the service's own user
            for file in (WEIGHTS_FILE, RECORD_FILE):
                write_durably(new / file, (checkpoint / file).read_bytes())
            numbers = [int(path.name) for path in product.iterdir() if VERSION.fullmatch(path.name)]
            return new.rename(product / str(max(numbers, default=0) + 1))
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot publish {checkpoint} to {product}: {error}.") from error
