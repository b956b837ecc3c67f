"""What the servers are sent: checkpoints, and images for them as files and as whole bodies."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from models.calibration import Calibration
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.config import ModelConfig
from models.maps import MapFusion
from models.networks import ScoringNetworks, Standardisation
from models.scoring import Scorer
from service.settings import DEFAULT_CHECKPOINT

IMAGES = 8
BOUNDARY = "hazelnut"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@dataclass(frozen=True, eq=False)
class Workload:
    """A checkpoint, and the images that it is sent: files and whole bodies, which wrk reads from `folder`."""

    name: str
    checkpoint: Path
    scorer: Scorer
    images: list[bytes]
    folder: Path

    @property
    def bodies(self) -> list[Path]:
        return [self.folder / f"body-{index}" for index in range(len(self.images))]


def workloads(scratch: Path, checkpoints: list[Path], device: torch.device) -> list[Workload]:
    tiny = scratch / "tiny"
    save_checkpoint(tiny, tiny_checkpoint())
    photos = [picture(1024, "JPEG", seed) for seed in range(IMAGES)]
    thumbnails = [picture(32, "PNG", seed) for seed in range(IMAGES)]
    chosen = [("demo", DEFAULT_CHECKPOINT, photos)]
    chosen += [(folder.resolve().parent.name, folder, photos) for folder in checkpoints]
    chosen += [("next to nothing", tiny, thumbnails)]
    found = []
    for number, (name, checkpoint, images) in enumerate(chosen):
        folder = scratch / str(number)
        folder.mkdir()
        workload = Workload(name, checkpoint, load_checkpoint(checkpoint).scorer(device), images, folder)
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="image"\r\n\r\n'.encode()
        for body, image in zip(workload.bodies, images, strict=True):
            body.write_bytes(head + image + f"\r\n--{BOUNDARY}--\r\n".encode())
        found.append(workload)
    return found


def tiny_checkpoint() -> Checkpoint:
    """Untrained networks that cost as little as they can."""
    config = ModelConfig(image_size=32, channels=3, width=8, latent="grid", latent_dim=4, head_width=8)
    torch.manual_seed(0)
    return Checkpoint(
        networks=ScoringNetworks(config, Standardisation()).eval(),
        fusion=MapFusion(torch.zeros(2, 8, 8), torch.ones(2, 8, 8), torch.zeros(4), torch.ones(4)),
        calibration=Calibration(scores=np.random.default_rng(0).normal(size=(19, 3)), alpha=0.05),
        origin={"name": "tiny"},
        metrics={},
    )


def picture(side: int, file_format: str, seed: int) -> bytes:
    """Soft noise, which compresses about as well as a photograph."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side, 3)), (3, 3, 0))
    values: NDArray[np.uint8] = np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, file_format, quality=90)
    return file.getvalue()


def form(image: bytes) -> dict[str, Any]:
    return {"files": {"files": ("image", image)}}
