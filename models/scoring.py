"""The three scores, and the Scorer that turns images into verdicts.

Higher is more anomalous, always. Training's calibration, the command line and the service all score here.
"""

import math
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.calibration import SCORE_NAMES, Calibration, FloatArray
from models.config import ModelConfig
from models.errors import ConfigError
from models.maps import MapFusion, smooth, unrounded
from models.networks import ScoringNetworks, cells_of, places_of

MapArray = NDArray[np.float32]


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


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the networks say of B images."""

    # (B,) mean squared error per pixel and channel, of intensities in [0, 1]; of features, whose mean square is 1
    reconstruction: Tensor
    latent: Tensor  # (B,) nats per latent dimension
    maps: Tensor  # (B, K, S, S) component maps; over features (B, K, S/8, S/8)
    # Intensities (B, C, S, S), in [0, 1] or a little outside; or features (B, F, S/8, S/8)
    reconstructions: Tensor


def at_once(config: ModelConfig, images: int) -> int:
    """How many images are scored together: so many of up to 256 pixels, of larger ones as many as have these pixels."""
    return max(images * 256**2 // max(config.image_size, 256) ** 2, 1)


@torch.inference_mode()
def outputs(networks: ScoringNetworks, pixels: Tensor) -> Outputs:
    """Run networks in eval mode on uint8 (B, C, S, S), on any device, in float32.

    Raises ValueError if the networks are in training mode: batch norm would mix the images of the batch.
    """
    if any(module.training for module in networks.modules()):
        raise ValueError("scoring needs networks in eval mode.")
    with unrounded():
        images = networks.standardisation(pixels.to(next(networks.parameters()).device))
        codes, seen, reconstructions, evidence = in_tiles(networks, images, tile=networks.config.side)
        maps = torch.cat([networks.residual(seen, reconstructions), evidence], dim=1)
    if networks.features is None:
        maps = smooth(maps, sigma=networks.config.smoothing)
        seen, reconstructions = map(networks.standardisation.intensities, (seen, reconstructions))
    return Outputs(
        reconstruction=(seen - reconstructions).square().mean(dim=(1, 2, 3)),
        latent=latent_score(codes),
        maps=maps,
        reconstructions=reconstructions,
    )


def windows(size: int, tile: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that an image is scored in: one, or several that overlap by about a quarter."""
    # A multiple of the largest stride: every window is cut at the same phase.
    starts = [*range(0, size - tile, _step(tile)), size - tile]
    return [(slice(top, top + tile), slice(left, left + tile)) for top in starts for left in starts]


def _step(tile: int) -> int:
    return 3 * tile // 4 // 16 * 16


def in_tiles(networks: ScoringNetworks, images: Tensor, *, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, what was seen, its reconstructions and the evidence (B, E, S / cell, S / cell) of images (B, C, S, S),
    stitched from windows. Codes of all windows are one below the other, (B, D, T G, G)."""
    size, cell = images.shape[-1], networks.config.cell
    places = places_of(size, images.device).unsqueeze(0)
    cuts = windows(size, tile)
    codes, seen, rebuilt, evidence = [], [], [], []
    for window in cuts:
        seen.append(networks.see(images[..., *window]))
        code, reconstructions, logits, features = networks(seen[-1], places[..., *window])
        codes.append(code)
        rebuilt.append(reconstructions)
        evidence.append(torch.cat([seen[-1][:, :0], *networks.evidence(logits, features, window)], dim=1))
    whole = [stitched(pieces, cuts, size, cell) for pieces in (seen, rebuilt, evidence)]
    return torch.cat(codes, dim=2), whole[0], whole[1], whole[2]


def stitched(pieces: list[Tensor], cuts: list[tuple[slice, slice]], size: int, cell: int) -> Tensor:
    """Maps of windows, (B, K, tile / cell, tile / cell) each -> those of the whole image, (B, K, S / cell, S / cell).

    Where windows overlap each counts the less the nearer its border is, where it knows least of the surroundings: no
    seam shows.
    """
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    side = first.shape[-1]
    distance = torch.arange(side, device=first.device) + 0.5
    ramp = (torch.minimum(distance, side - distance) / (side - _step(side * cell) // cell)).clamp(max=1)
    weight = ramp * ramp.unsqueeze(1)  # (side, side)
    whole = torch.zeros(*first.shape[:2], size // cell, size // cell, device=first.device)
    total = torch.zeros(size // cell, size // cell, device=first.device)
    for piece, window in zip(pieces, cuts, strict=True):
        place = cells_of(window, cell)
        whole[..., *place] += weight * piece
        total[place] += weight
    return whole / total


def map_score(maps: Tensor, config: ModelConfig) -> Tensor:
    """What anomaly maps (B, S, S) say of their images, (B,): the mean of the highest of their squares. One hot pixel
    is chance, and a defect is hot where it lies."""
    if config.highest == 1:
        return peaks(maps)
    squares = F.avg_pool2d(maps.unsqueeze(1), config.square, ceil_mode=True).flatten(1)
    return squares.topk(config.highest).values.mean(dim=1)


def peaks(maps: Tensor) -> Tensor:
    """The highest values of maps (B, S, S): (B,)."""
    # One axis after the other: of both at once a CPU takes ten times as long.
    return maps.amax(dim=2).amax(dim=1)


def columns(found: Outputs, maps: Tensor, config: ModelConfig) -> Tensor:
    """The scores (B, 3), in the order of SCORE_NAMES, of images with anomaly maps (B, S, S)."""
    return torch.stack([found.reconstruction, found.latent, map_score(maps, config)], dim=1)


def table(found: Outputs, maps: Tensor, config: ModelConfig) -> FloatArray:
    """The same in the host's memory."""
    return columns(found, maps, config).double().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Scores:
    """Of B images. `scores` is (B, 3) in the order of SCORE_NAMES; `maps` (B, S, S) is >= 0."""

    scores: FloatArray
    anomaly_score: FloatArray  # (B,) in standard deviations of good images
    p_value: FloatArray  # (B,) in (0, 1]
    maps: MapArray

    def named(self, index: int) -> dict[str, float]:
        """The three scores of one image by name."""
        return {name: float(value) for name, value in zip(SCORE_NAMES, self.scores[index], strict=True)}


class Scorer:
    """Networks and calibration, frozen and in eval mode. One image's scores never depend on another's."""

    def __init__(self, networks: ScoringNetworks, fusion: MapFusion, calibration: Calibration) -> None:
        self.config = networks.config
        self.networks = networks.eval().requires_grad_(False)
        self.fusion = fusion
        self.calibration = calibration

    @property
    def device(self) -> torch.device:
        return next(self.networks.parameters()).device

    def score(self, pixels: Tensor) -> Scores:
        """Score images of models.images.image_tensor, stacked: uint8 (B, C, S, S)."""
        return self.verdicts(*self.compute(pixels)[:2])

    def begin(self, pixels: Tensor) -> "Future[Scores]":
        """`score`, as models.graphs does it. Here it is done at once."""
        scored: Future[Scores] = Future()
        scored.set_result(self.score(pixels))
        return scored

    @torch.inference_mode()
    def compute(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The device's part of `score`: scores (B, 3), maps (B, S, S) and reconstructions (B, C, S, S).

        For pixels on the device nothing here waits for it or takes a value from it: a CUDA graph can hold it.
        """
        found = outputs(self.networks, pixels)
        maps = self.fusion(found.maps)
        return columns(found, maps, self.config), maps, found.reconstructions

    def verdicts(self, scores: Tensor, maps: Tensor) -> Scores:
        """The host's part."""
        in_host = scores.double().cpu().numpy()
        anomaly_score = self.calibration.anomaly_score(in_host)
        return Scores(
            scores=in_host,
            anomaly_score=anomaly_score,
            p_value=self.calibration.p_value(anomaly_score),
            maps=maps.cpu().numpy(),
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
    above = anomaly_map > level
    if not above.any():
        return []  # most parts are good, and to label nothing takes as long
    labels, count = ndimage.label(above, structure=np.ones((3, 3)))
    rows, columns = anomaly_map.shape
    found = []
    for label, (down, across) in enumerate(ndimage.find_objects(labels, max_label=count), start=1):
        left, right = across.start * width // columns, math.ceil(across.stop * width / columns)
        top, bottom = down.start * height // rows, math.ceil(down.stop * height / rows)
        peak = float(anomaly_map[down, across][labels[down, across] == label].max())
        found.append(Region(left=left, top=top, width=right - left, height=bottom - top, peak=peak))
    return sorted(found, key=lambda region: -region.peak)
