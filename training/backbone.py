"""The weights of a backbone: from a file, or torchvision's own, which need a network the first time."""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import get_model_weights

from models.errors import TrainingError
from models.features import check_backbone

# What reading bytes that are no weights raises: an old file is a stream of instructions, of which any may fail.
BROKEN = (
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, eq=False)
class Backbone:
    """weights: of the whole network, by torchvision's names."""

    weights: dict[str, Tensor]
    source: str
    sha256: str  # of the file

    @property
    def record(self) -> dict[str, str]:
        """Where the weights came from, for run.json and the checkpoint."""
        return {"weights": self.source, "sha256": self.sha256}


def load_backbone(name: str, file: Path | None) -> Backbone:
    """Read the weights of one of torchvision's networks. Raises TrainingError naming what is wrong, ConfigError for a
    network that torchvision does not have.

    file: a state dict as .safetensors, or as torch.save wrote it; None takes what torchvision calls the best.
    """
    check_backbone(name)
    if file is not None:
        content = _content(file)
        return Backbone(_read(file, content), file.name, hashlib.sha256(content).hexdigest())
    weights = get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise TrainingError(
            f"torchvision's weights of {name} cannot be fetched ({error}): without a network give --backbone-weights "
            f"a file of them."
        ) from error
    except BROKEN as error:
        raise TrainingError(
            f"torchvision's weights of {name} are broken ({error}): remove {file} if it is there, or give "
            f"--backbone-weights a file of them."
        ) from error
    return Backbone(dict(state), str(weights), hashlib.sha256(_content(file)).hexdigest())


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read the backbone's weights {file}: {error.strerror}.") from error


def _read(file: Path, content: bytes) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return dict(safetensors.torch.load(content))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise TrainingError(f"{file} cannot be read as weights, .safetensors or .pth: {error}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainingError(f"{file} is no state dict: expected names with tensors.")
    return state
