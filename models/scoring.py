"""The three scores, the anomaly map, and the Scorer that turns images into verdicts.

Higher is more anomalous, always. Training's calibration, the command line and the service all score here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from models.calibration import SCORE_NAMES, Calibration, FloatArray
from models.config import ModelConfig
from models.errors import ConfigError

MapArray = NDArray[np.float32]

GRADIENT_SCALES = 3
# Zavrtanik et al., RIAD (Pattern Recognition 2021): keeps the ratio steady where both images are flat.
GRADIENT_CONSTANT = 0.0026


def gradient_magnitude_similarity(images: Tensor, others: Tensor) -> Tensor:
    """How alike the edges of two images are, per pixel: (B, C, S, S) in [-1, 1] -> (B, 1, S, S) in (0, 1].

    Xue et al., Gradient Magnitude Similarity Deviation, arXiv 1308.3052, equation 4, on the gray images in [0, 1]
    with the Prewitt operator.
    """
    first, second = _gradient_magnitude(images), _gradient_magnitude(others)
    return (2 * first * second + GRADIENT_CONSTANT) / (first**2 + second**2 + GRADIENT_CONSTANT)


def _gradient_magnitude(images: Tensor) -> Tensor:
    gray = (images.mean(dim=1, keepdim=True) + 1) / 2  # (B, 1, S, S) in [0, 1]
    rows = gray.new_tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]) / 3
    kernels = torch.stack([rows, rows.T]).unsqueeze(1)  # (2, 1, 3, 3)
    # Replicated borders: zeros outside would draw an edge around every image.
    slopes = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), kernels)  # (B, 2, S, S)
    # The root's slope is infinite at zero; the constant is far below one grey level.
    return (slopes.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def residual_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Where an image differs from its reconstruction: (B, C, S, S) in [-1, 1] -> (B, S, S) in [0, 2].

    The mean absolute difference in intensity, in [0, 1], plus the mean over scales of 1 - gradient magnitude
    similarity, in [0, 1): the first sees colour and missing material, the second fine structure. Smoothed by a
    Gaussian, because a defect is larger than a pixel and a mislaid edge is not.
    """
    difference = (images - reconstructions).abs().mean(dim=1, keepdim=True) / 2  # (B, 1, S, S)
    size = images.shape[-1]
    for scale in range(GRADIENT_SCALES):
        if scale > 0:
            images, reconstructions = F.avg_pool2d(images, 2), F.avg_pool2d(reconstructions, 2)
        # In float32 a similarity can round to just above one.
        change = (1 - gradient_magnitude_similarity(images, reconstructions)).clamp(min=0)
        change = F.interpolate(change, size=(size, size), mode="bilinear", align_corners=False)
        difference = difference + change / GRADIENT_SCALES
    return _smooth(difference, sigma=size / 64).squeeze(1)


def _smooth(maps: Tensor, *, sigma: float) -> Tensor:
    """Separable Gaussian blur of (B, 1, S, S), borders replicated."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    maps = F.pad(maps, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(maps, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


def latent_score(codes: Tensor) -> Tensor:
    """Negative log-likelihood of codes (B, D, G, G) under N(0, I), in nats per latent dimension: (B,).

    0.92 at the origin, 1.42 on average for a draw from the prior.
    """
    return (codes.square() / 2 + math.log(2 * math.pi) / 2).flatten(1).mean(dim=1)


def choose_device(name: str) -> torch.device:
    """ "auto" takes a GPU if there is one. Raises ConfigError for a GPU that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}: allowed are auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda': torch finds no GPU here; allowed are auto and cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class RawScores:
    """Of B images: the scores (B, 3) in the order of SCORE_NAMES, the maps (B, S, S), the reconstructions."""

    scores: FloatArray
    maps: MapArray
    reconstructions: Tensor  # (B, C, S, S) in [-1, 1]


@torch.inference_mode()
def raw_scores(encoder: nn.Module, decoder: nn.Module, pixels: Tensor) -> RawScores:
    """Score images by networks in eval mode, in float32.

    pixels: uint8 (B, C, S, S) on any device. `reconstruction` is the mean squared error per pixel and channel, of
    intensities in [0, 1]. `latent` is in nats per latent dimension. `anomaly_map` is the highest value of the map.
    Raises ValueError if a network is in training mode: batch norm would mix the images of the batch.
    """
    if encoder.training or decoder.training:
        raise ValueError("scoring needs networks in eval mode.")
    images = normalise(pixels.to(next(encoder.parameters()).device))
    # TensorFloat-32 would make a score depend on which kernel the batch size selects.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        codes = encoder(images)
        reconstructions = decoder(codes)
        maps = residual_map(images, reconstructions)
    squared_error = ((images - reconstructions) / 2).square().flatten(1).mean(dim=1)
    table = torch.stack([squared_error, latent_score(codes), maps.flatten(1).amax(dim=1)], dim=1)  # (B, 3)
    return RawScores(scores=table.double().cpu().numpy(), maps=maps.cpu().numpy(), reconstructions=reconstructions)


@dataclass(frozen=True, eq=False)
class Scores:
    """Of B images. `scores` is (B, 3) in the order of SCORE_NAMES; `maps` (B, S, S) is >= 0.

    Reconstructions are (B, C, S, S) in [-1, 1], on the scorer's device.
    """

    scores: FloatArray
    anomaly_score: FloatArray  # (B,) in standard deviations of good images
    p_value: FloatArray  # (B,) in (0, 1]
    maps: MapArray
    reconstructions: Tensor

    def named(self, index: int) -> dict[str, float]:
        """The three scores of one image by name."""
        return {name: float(value) for name, value in zip(SCORE_NAMES, self.scores[index], strict=True)}


class Scorer:
    """Encoder, decoder and calibration, frozen and in eval mode. One image's scores never depend on another's."""

    def __init__(self, config: ModelConfig, encoder: nn.Module, decoder: nn.Module, calibration: Calibration) -> None:
        self.config = config
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder = decoder.eval().requires_grad_(False)
        self.calibration = calibration

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def score(self, pixels: Tensor) -> Scores:
        """Score images of models.images.image_tensor, stacked: uint8 (B, C, S, S)."""
        raw = raw_scores(self.encoder, self.decoder, pixels)
        anomaly_score = self.calibration.anomaly_score(raw.scores)
        return Scores(
            scores=raw.scores,
            anomaly_score=anomaly_score,
            p_value=self.calibration.p_value(anomaly_score),
            maps=raw.maps,
            reconstructions=raw.reconstructions,
        )


def resize_map(anomaly_map: MapArray, *, width: int, height: int) -> MapArray:
    """Bring a map (S, S) to an image's own resolution (height, width), bilinearly."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    tensor = torch.from_numpy(anomaly_map)[None, None]
    resized = F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)
    return np.asarray(resized[0, 0].numpy(), dtype=np.float32)


@dataclass(frozen=True)
class Region:
    """A connected part of the map above the level: a box in pixels of the original image, and its peak."""

    left: int
    top: int
    width: int
    height: int
    peak: float


def regions(anomaly_map: MapArray, *, level: float, width: int, height: int) -> list[Region]:
    """Where a map (S, S) is above the level, highest first, as boxes in an image of width x height pixels."""
    labels, count = ndimage.label(anomaly_map > level, structure=np.ones((3, 3)))
    rows, columns = anomaly_map.shape
    found = []
    for label, (down, across) in enumerate(ndimage.find_objects(labels, max_label=count), start=1):
        left, right = across.start * width // columns, math.ceil(across.stop * width / columns)
        top, bottom = down.start * height // rows, math.ceil(down.stop * height / rows)
        peak = float(anomaly_map[down, across][labels[down, across] == label].max())
        found.append(Region(left=left, top=top, width=right - left, height=bottom - top, peak=peak))
    return sorted(found, key=lambda region: -region.peak)
