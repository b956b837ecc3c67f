"""What every peer is built around: the checkpoint, the decoding and the scoring of the library.

The environment says which checkpoint, device and port, in the service's own variables. WORKERS is the number of
processes, for those that can have several.
"""

import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import load_checkpoint
from models.config import ModelConfig
from models.images import decode_image, image_tensor
from models.scoring import Scorer, Scores, choose_device

HOST = os.environ.get("HAZELNUT_HOST", "127.0.0.1")
PORT = int(os.environ.get("HAZELNUT_PORT", "8000"))
DEVICE = os.environ.get("HAZELNUT_DEVICE", "auto")
WORKERS = int(os.environ.get("WORKERS", "1"))
LARGEST_BATCH = 16  # the service's own


def load_scorer() -> Scorer:
    return load_checkpoint(Path(os.environ["HAZELNUT_CHECKPOINT"])).scorer(choose_device(DEVICE))


def pixels(data: bytes, config: ModelConfig) -> Tensor:
    """From a file's bytes to what the model sees: uint8 (C, S, S)."""
    return image_tensor(decode_image(data), channels=config.channels, size=config.image_size)


def pixel_array(data: bytes, config: ModelConfig) -> NDArray[Any]:
    """The same, as what goes from process to process without a file of its own."""
    return pixels(data, config).numpy()


def results(scores: Scores) -> list[dict[str, Any]]:
    """One per image, in the words of the service's answer, without its regions."""
    return [
        {
            "scores": scores.named(index),
            "anomaly_score": float(scores.anomaly_score[index]),
            "p_value": float(scores.p_value[index]),
        }
        for index in range(len(scores.scores))
    ]
