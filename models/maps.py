"""The anomaly map: from an image, its reconstruction and the segmentation head's logits to one height per pixel.

Component maps are seen as they are and compared with the same place on good images. What is usual at a place, an edge
that is never rebuilt or a screw that shines, is no anomaly there.
"""

import math
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig

GRADIENT_SCALES = 3
# Zavrtanik et al., RIAD (Pattern Recognition 2021): keeps the ratio steady where both images are flat.
GRADIENT_CONSTANT = 0.0026
# Places are compared in this many cells per side: a part does not lie on the same pixel twice.
CELLS = 64
# EfficientAD (Batzner et al., arXiv 2303.14535, section 3.4): these quantiles of good pixels become 0 and 1.
LOW, HIGH = 0.9, 0.995


class Weights(NamedTuple):
    """What the residual, the head's logits and the distances of its features on up to three levels count for, as they
    are and compared by place."""

    as_they_are: tuple[float, ...]
    by_place: tuple[float, ...]

    def of(self, components: int) -> Tensor:
        """Of the first of the maps, (2 K,): without a head there is the residual alone."""
        return torch.tensor([*self.as_they_are[:components], *self.by_place[:components]])

    @classmethod
    def halves(cls, weights: Tensor) -> Self:
        """The way back from (2 K,)."""
        as_they_are, by_place = weights.chunk(2)
        return cls(tuple(as_they_are.tolist()), tuple(by_place.tolist()))


# What a product chooses from at the end of training: training/calibrating.py. Where a part fills the picture the
# comparison by place finds more; before a background, where every deviation is a small one, it makes much of the least
# change. Both found by defects of kinds that training never draws: benchmarks/unseen_defects.py.
OF_PIXELS = (
    Weights((0.25, 1.0, 0.0, 0.0, 0.0), (0.25, 1.0, 0.5, 0.5, 0.5)),
    Weights((0.25, 1.0, 0.0, 0.0, 0.0), (0.0625, 0.25, 0.125, 0.125, 0.125)),
)
OF_FEATURES = (Weights((1.0, 1.0), (0.0, 0.0)), Weights((0.0, 1.0), (1.0, 0.0)))


def fusion_weights(config: ModelConfig) -> tuple[Weights, ...]:
    """What there is to choose from; the first counts until the choice is made."""
    return OF_FEATURES if config.over_features else OF_PIXELS


def gradient_magnitude_similarity(images: Tensor, others: Tensor) -> Tensor:
    """How alike the edges of two images are, per pixel: standardised (B, C, S, S) -> (B, 1, S, S) in (0, 1].

    Xue et al., Gradient Magnitude Similarity Deviation, arXiv 1308.3052, equation 4, on the gray images with the
    Prewitt operator. Standardised images are halved: to the deviation of a well-exposed one with intensities in [0, 1].
    """
    first, second = _gradient_magnitude(images), _gradient_magnitude(others)
    return (2 * first * second + GRADIENT_CONSTANT) / (first**2 + second**2 + GRADIENT_CONSTANT)


# Kept for each device: a constant that is copied there anew is one that a CUDA graph cannot hold.
@cache
def _prewitt(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kernels (2, 1, 3, 3): differences of rows and of columns."""
    with torch.inference_mode(False):  # training may need what scoring has made
        rows = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]], device=device, dtype=dtype) / 3
        return torch.stack([rows, rows.T]).unsqueeze(1)


def _gradient_magnitude(images: Tensor) -> Tensor:
    gray = images.mean(dim=1, keepdim=True) / 2  # (B, 1, S, S)
    # Replicated borders: zeros outside would draw an edge around every image.
    slopes = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), _prewitt(gray.device, gray.dtype))  # (B, 2, S, S)
    # The root's slope is infinite at zero; the constant is far below one gray level.
    return (slopes.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def residual_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Where an image differs from its reconstruction: standardised (B, C, S, S) -> (B, 1, S, S), not negative.

    Half the mean absolute difference, plus the mean over scales of 1 - gradient magnitude similarity, in [0, 1): the
    first sees colour and missing material, the second fine structure.
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
    return difference


def unrounded() -> AbstractContextManager[None]:
    """In which a GPU convolves in float32. TensorFloat-32 would make a score depend on which kernel the batch size
    selects."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


def enlarged(maps: Tensor, factor: int) -> Tensor:
    """Maps (B, K, H, W) -> (B, K, factor H, factor W), each value at the centre of the square that it stands for."""
    if factor == 1:
        return maps
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def smooth(maps: Tensor, *, sigma: float) -> Tensor:
    """Separable Gaussian blur of (B, K, S, S), borders replicated."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    batch, components, *size = maps.shape
    flat = F.pad(maps.reshape(batch * components, 1, *size), (radius, radius, radius, radius), mode="replicate")
    with unrounded():
        flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return flat.reshape(batch, components, *size)


@cache
def _to_pixels(cells: int, cell: int, device: torch.device) -> Tensor:
    """What `enlarged` and then `smooth`, by a quarter of a cell, make of a map along an axis: (cell cells, cells)."""
    with torch.inference_mode(False):
        columns = torch.eye(cells, device=device).view(1, cells, cells, 1).expand(-1, -1, -1, cells)
        return smooth(enlarged(columns, cell), sigma=cell / 4)[0, :, :, 0].T.contiguous()


class MapFusion(nn.Module):
    """Component maps (B, K, S / cell, S / cell) -> anomaly maps (B, S, S), not negative.

    Each component enters as it is and in deviations from the mean of good images at its place; each of these 2 K maps
    is scaled so that the quantiles LOW and HIGH of good pixels are 0 and 1. The anomaly map is the softplus of their
    weighted mean: a smooth way to keep it from being negative that changes no order.

    What has a value for each cell of pixels, as over features, is joined by the weighted geometric mean of the views'
    softplus: what one of them alone finds counts less than what all do. It is brought to pixels last.
    """

    def __init__(
        self,
        mean: Tensor,
        deviation: Tensor,
        low: Tensor,
        high: Tensor,
        weights: Weights = OF_PIXELS[0],
        cell: int = 1,
    ) -> None:
        """mean, deviation: of good maps, by place, (K, G, G). low, high: (2 K,)."""
        super().__init__()
        self.cell = cell
        self.mean: Tensor
        self.deviation: Tensor
        self.low: Tensor
        self.high: Tensor
        for name, value in (("mean", mean), ("deviation", deviation), ("low", low), ("high", high)):
            self.register_buffer(name, value.float())
        self.weights: Tensor
        self.register_buffer("weights", weights.of(len(mean)).to(mean.device))

    def forward(self, maps: Tensor) -> Tensor:
        return self.joined(self.views(maps), self.weights)

    def joined(self, views: Tensor, weights: Tensor) -> Tensor:
        """Views (B, 2 K, S / cell, S / cell) by weights (2 K,)."""
        weights = weights.view(1, -1, 1, 1)
        if self.cell == 1:
            return F.softplus((views * weights).sum(dim=1) / weights.sum())
        # Far below 0 a softplus is 0, which has no logarithm.
        fused = ((F.softplus(views).clamp(min=1e-6).log() * weights).sum(dim=1) / weights.sum()).exp()
        to_pixels = _to_pixels(fused.shape[-1], self.cell, fused.device)
        return to_pixels @ fused @ to_pixels.T

    def views(self, maps: Tensor) -> Tensor:
        """The 2 K scaled maps, each like a component: first all as they are."""
        size = maps.shape[2:]
        mean, deviation = (
            F.interpolate(by_place.unsqueeze(0), size=size, mode="bilinear", align_corners=False)
            for by_place in (self.mean, self.deviation)
        )
        both = torch.cat([maps, (maps - mean) / deviation], dim=1)
        low, high = self.low.view(1, -1, 1, 1), self.high.view(1, -1, 1, 1)
        return (both - low) / (high - low)


class GoodMaps:
    """What the fusion is made from: of n held-out good images, the moments of each cell of each component map."""

    def __init__(self, weights: Weights = OF_PIXELS[0], cell: int = 1) -> None:
        self._weights = weights
        self._cell = cell
        self._moments: list[Tensor] = []  # (B, 3, K, G, G): mean, mean square, the pixel in the middle

    def add(self, maps: Tensor) -> None:
        """maps: (B, K, S / cell, S / cell)."""
        maps = maps.double()
        cells = min(CELLS, maps.shape[-1])
        mean, square = F.adaptive_avg_pool2d(maps, cells), F.adaptive_avg_pool2d(maps.square(), cells)
        middle = F.interpolate(maps, size=(cells, cells), mode="nearest-exact")
        self._moments.append(torch.stack([mean, square, middle], dim=1).cpu())

    def fusions(self, parts: list[int] | None = None) -> tuple[MapFusion, list[MapFusion]]:
        """The fusion of all images, and for each image the fusion of those that show other parts.

        A part that is scored later took no part in the means; a good image that did would look too usual, and so would
        another picture of the same part.

        parts: a number for each image, the same for pictures of one part; None: no part is shown twice.
        """
        moments = torch.cat(self._moments)  # (n, 3, K, G, G)
        numbers = torch.from_numpy(np.unique(parts or range(len(moments)), return_inverse=True)[1])
        sums = torch.zeros_like(moments[: int(numbers.max()) + 1, :2]).index_add(0, numbers, moments[:, :2])
        counts = numbers.bincount().view(-1, 1, 1, 1, 1)
        total, count = sums.sum(dim=0), len(moments)
        without = (total - sums) / (count - counts)  # (parts, 2, K, G, G)
        places = [_place(*without[number]) for number in numbers]
        samples = [
            torch.cat([own[2], (own[2] - mean) / deviation]).flatten(1)
            for own, (mean, deviation) in zip(moments, places, strict=True)
        ]
        values = torch.cat(samples, dim=1).numpy()  # (2 K, n G G)
        low, high = (torch.from_numpy(np.quantile(values, share, axis=1)) for share in (LOW, HIGH))
        # Maps of images that are all alike have no range. Relative too, so that float32 tells the ends apart.
        high = torch.maximum(high, low + 1e-6 * (1 + low.abs()))
        whole = MapFusion(*_place(*(total / count)), low, high, self._weights, self._cell)
        return whole, [MapFusion(mean, deviation, low, high, self._weights, self._cell) for mean, deviation in places]


def _place(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation by place, (K, G, G). Where a map hardly varies, as on a black background, the mean deviation
    of the whole map keeps the least change from counting as many deviations."""
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    floor = deviation.mean(dim=(1, 2), keepdim=True)
    return mean, (deviation + floor).clamp(min=1e-6)
