"""A checkpoint is a folder: model.safetensors, the weights, and model.json, everything else. Never pickle.

Written under a temporary name and renamed, so that a reader sees a whole checkpoint or none.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from models.calibration import Calibration
from models.config import ModelConfig
from models.errors import CalibrationError, CheckpointError, ConfigError
from models.files import write_durably
from models.maps import MapFusion, Weights
from models.networks import ScoringNetworks, Standardisation
from models.scoring import Scorer

FORMAT = 4
WEIGHTS_FILE = "model.safetensors"
RECORD_FILE = "model.json"
FIELDS = {
    "format",
    "model_config",
    "calibration",
    "origin",
    "metrics",
    "versions",
    "weights_sha256",
    "record_sha256",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Networks, calibration, and where they came from.

    origin: the recipe, the command and the fingerprint of the training data. metrics: what was measured and the
    command that measured it, or empty. Both are JSON.
    """

    networks: ScoringNetworks
    fusion: MapFusion
    calibration: Calibration
    origin: dict[str, Any]
    metrics: dict[str, Any]
    weights_sha256: str = ""

    @property
    def config(self) -> ModelConfig:
        return self.networks.config

    def scorer(self, device: torch.device) -> Scorer:
        return Scorer(self.networks.to(device), self.fusion.to(device), self.calibration)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, in place of the one that may be there. Raises CheckpointError; the old one then stays."""
    weights = safetensors.torch.save(_state(checkpoint.networks, checkpoint.fusion))
    record = {
        "format": FORMAT,
        "model_config": asdict(checkpoint.config),
        "calibration": {
            "alpha": checkpoint.calibration.alpha,
            "weights": list(checkpoint.calibration.weights),
            "scores": checkpoint.calibration.scores.tolist(),
            "parts": list(checkpoint.calibration.parts),
            "peaks": None if checkpoint.calibration.peaks is None else checkpoint.calibration.peaks.tolist(),
        },
        "origin": checkpoint.origin,
        "metrics": checkpoint.metrics,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["record_sha256"] = _record_digest(record)
    try:
        # Resolved: a link stays one, and "." has a name.
        with _replaced_folder(folder.resolve()) as new:
            write_durably(new / WEIGHTS_FILE, weights)
            write_durably(new / RECORD_FILE, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise CheckpointError(f"cannot save the checkpoint {folder}: {error}.") from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, in eval mode. Raises CheckpointError naming what is wrong."""
    try:
        record_bytes = (folder / RECORD_FILE).read_bytes()
        weights = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}.") from error
    record = _checked_record(folder, record_bytes)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != record["weights_sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has sha256 {digest[:12]}..., "
            f"{RECORD_FILE} names {str(record['weights_sha256'])[:12]}...: the file was changed."
        )
    try:
        config = ModelConfig(**record["model_config"])
        stored = record["calibration"]
        calibration = Calibration(
            scores=np.asarray(stored["scores"], dtype=np.float64),
            alpha=stored["alpha"],
            weights=tuple(stored["weights"]),
            parts=tuple(stored["parts"]),
            peaks=None if stored["peaks"] is None else np.asarray(stored["peaks"], dtype=np.float64),
        )
        if config.highest > 1 and calibration.peaks is None:
            raise CalibrationError(f"the calibration holds no peaks of maps: with highest {config.highest} it must.")
        networks, fusion = _load_state(config, weights)
    except (ConfigError, CalibrationError) as error:
        raise CheckpointError(f"{folder / RECORD_FILE}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} does not describe a model: {error}.") from error
    return Checkpoint(
        networks=networks.eval(),
        fusion=fusion,
        calibration=calibration,
        origin=record["origin"],
        metrics=record["metrics"],
        weights_sha256=digest,
    )


def _checked_record(folder: Path, record_bytes: bytes) -> dict[str, Any]:
    path = folder / RECORD_FILE
    try:
        record = json.loads(record_bytes)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(record, dict) or "format" not in record:
        raise CheckpointError(f"{path} names no format: it is not a checkpoint's record.")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {record['format']!r}: this Hazelnut reads format {FORMAT}.")
    if set(record) != FIELDS:
        odd = ", ".join(sorted(set(record) ^ FIELDS))
        raise CheckpointError(f"{path} has missing or unknown fields: {odd}.")
    if record["record_sha256"] != _record_digest(record):
        raise CheckpointError(f"{path} does not match its own sha256: the file was changed.")
    return record


def _record_digest(record: dict[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _state(networks: ScoringNetworks, fusion: MapFusion) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {"networks": networks, "fusion": fusion}
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


def _load_state(config: ModelConfig, content: bytes) -> tuple[ScoringNetworks, MapFusion]:
    state = safetensors.torch.load(content)
    own = {key.removeprefix("networks."): state.pop(key) for key in list(state) if key.startswith("networks.")}
    networks = ScoringNetworks(config, Standardisation())
    networks.load_state_dict(own)
    names = ("mean", "deviation", "low", "high", "weights")
    mean, deviation, low, high, weights = values = [state.pop(f"fusion.{name}") for name in names]
    if state:
        raise ValueError(f"unknown weights {', '.join(sorted(state))}")
    # Of another number some broadcast: the scores would be wrong, and nothing would say so.
    components = 1 + networks.evidence_maps
    shapes = [tuple(value.shape) for value in values]
    place, end = (components, *mean.shape[1:]), (2 * components,)
    if mean.ndim != 3 or shapes != [place, place, end, end, end]:
        raise ValueError(f"the fusion has shapes {shapes}, which do not fit {components} component maps")
    return networks, MapFusion(mean, deviation, low, high, Weights.halves(weights), config.cell)


@contextmanager
def _replaced_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` if the block succeeds, and vanishes if it fails."""
    if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {WEIGHTS_FILE, RECORD_FILE}):
        raise FileExistsError(f"{folder} exists and is not a checkpoint")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-new-", dir=folder.parent))
    try:
        new.chmod(0o755)  # mkdtemp's 0o700 would hide the checkpoint from the service's own user
        yield new
        old = new.with_name(new.name.replace("-new-", "-old-"))
        # A folder cannot be renamed over a full one. Between these two lines the old one has its other name.
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
