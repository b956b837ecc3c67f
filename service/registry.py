"""A checkpoint made ready to serve: on its device, warm, with its decoder and its batcher."""

import asyncio
from dataclasses import dataclass

import numpy as np
import torch

from models.calibration import Calibration
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.scoring import Scorer, choose_device
from service.batching import Batcher
from service.decoding import Decoder
from service.settings import Settings
from service.telemetry import Telemetry


@dataclass(frozen=True, eq=False)
class ServedModel:
    name: str
    checkpoint: Checkpoint
    device: torch.device
    decoder: Decoder
    batcher: Batcher

    @property
    def calibration(self) -> Calibration:
        return self.checkpoint.calibration

    def close(self) -> None:
        self.decoder.close()
        self.batcher.close()


def warm_scorer(checkpoint: Checkpoint, device: torch.device) -> Scorer:
    """The checkpoint's scorer on its device, after one black image. Raises CheckpointError for one not to be served."""
    model_name(checkpoint)
    config = checkpoint.config
    scorer = checkpoint.scorer(device)
    black = torch.zeros(1, config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    if not np.isfinite(scorer.score(black).scores).all():
        raise CheckpointError("the checkpoint scores a black image with what is not a finite number.")
    return scorer


def model_name(checkpoint: Checkpoint) -> str:
    """Raises CheckpointError where there is none."""
    name = checkpoint.origin.get("name")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"the checkpoint's origin has the name {name!r}: a model is served under a name.")
    return name


async def open_model(checkpoint: Checkpoint, *, settings: Settings, telemetry: Telemetry) -> ServedModel:
    """Raises CheckpointError, and ConfigError for a device that is not there."""
    device = choose_device(settings.device)
    scorer = await asyncio.to_thread(warm_scorer, checkpoint, device)
    name = model_name(checkpoint)
    telemetry.model_loaded(name, device=device)
    return ServedModel(
        name=name,
        checkpoint=checkpoint,
        device=device,
        decoder=Decoder(checkpoint.config, max_pixels=settings.max_pixels, telemetry=telemetry),
        batcher=Batcher(
            scorer.score,
            max_images=settings.max_waiting,
            max_bytes=settings.max_waiting_bytes,
            telemetry=telemetry,
        ),
    )
