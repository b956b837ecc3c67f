"""How true images are to other images: reconstructions to what they rebuild, samples of the prior to photographs.

Images are (B, C, S, S) in [-1, 1]. PSNR, SSIM and MS-SSIM compare image by image; the energies of the octaves and the
Fréchet distance compare sets, which need not show the same parts.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft
from torch import Tensor, nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

FloatArray = NDArray[np.float64]

OCTAVES = ("2-4", "4-8", "8-16", "16-32")  # pixels of a period, the finest detail first
SHARP_OCTAVES = 2  # periods below 8 pixels
SMALLEST_MS_SSIM = 176  # the coarsest of its five scales still has to hold its kernel of 11 pixels
SPLITS = 20
BATCH = 8  # SSIM takes some ten times the memory of its input


def psnr(reconstructions: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over images. At most 126 dB, for equal images."""
    squared_error = (reconstructions - images).square().flatten(1).mean(dim=1).clamp(min=1e-12)  # (B,)
    return float((10 * (4 / squared_error).log10()).mean())


def ssim(reconstructions: Tensor, images: Tensor) -> float:
    """Structural similarity (Wang et al., 2004), mean over images."""
    similarities = []
    for pair in zip(torch.split(reconstructions, BATCH), torch.split(images, BATCH), strict=True):
        similarity = structural_similarity_index_measure(*pair, data_range=2.0, reduction="none")
        assert isinstance(similarity, Tensor)  # a tuple only when the full image is asked for
        similarities.append(similarity)
    return float(torch.cat(similarities).mean())


def ms_ssim(reconstructions: Tensor, images: Tensor) -> float | None:
    """Multi-scale structural similarity (Wang et al., 2003), mean over images; None below 176 pixels."""
    if images.shape[-1] < SMALLEST_MS_SSIM:
        return None
    similarities = [
        multiscale_structural_similarity_index_measure(*pair, data_range=2.0, reduction="none")
        for pair in zip(torch.split(reconstructions, BATCH), torch.split(images, BATCH), strict=True)
    ]
    return float(torch.cat(similarities).mean())


def octave_energies(images: Tensor) -> FloatArray:
    """Energy of the gray images in each of OCTAVES, mean over images and pixels: (4,).

    Of the cosine transform, by the length of the frequency vector; its period is the inverse. Unlike Fourier's it
    continues an image by its mirror image, so that no edge between opposite borders adds detail that is not there.
    """
    gray = images.mean(dim=1).double().cpu().numpy()  # (B, S, S)
    energy = (fft.dctn(gray, axes=(1, 2), norm="ortho") ** 2).mean(axis=0) / gray[0].size  # (S, S)
    along = np.arange(gray.shape[1]) / (2 * gray.shape[1])  # cycles per pixel
    frequency = np.hypot(along[:, None], along)
    finest_first = [frequency >= 1 / 4, *(frequency >= 1 / 2**power for power in (3, 4, 5))]
    cumulated = np.array([energy[above].sum() for above in finest_first])
    return np.diff(cumulated, prepend=0.0)


def octave_ratios(images: Tensor, others: Tensor) -> dict[str, float]:
    """Energy of each octave in `images` as a share of that in `others`; 1 is as much. The sets may differ in size."""
    ratios = (octave_energies(images) + 1e-12) / (octave_energies(others) + 1e-12)
    return dict(zip(OCTAVES, ratios.tolist(), strict=True))


def sharpness_ratio(images: Tensor, others: Tensor) -> float:
    """Energy of detail with periods below 8 pixels in `images` as a share of that in `others`.

    1 is as sharp, below 1 is blurred; more is detail that the others do not have, noise say. The sets may differ in
    size. Flat images have no detail: against flat ones they count as 1.
    """
    energies = [octave_energies(side)[:SHARP_OCTAVES].sum() + 1e-12 for side in (images, others)]
    return float(energies[0] / energies[1])


def variety_ratio(images: Tensor, others: Tensor) -> float:
    """How much `images` differ among themselves, as a share of how much the others do: variances of pixels, mean over
    pixels. Near 0 where all are the same picture. The sets may differ in size.
    """
    variances = [side.var(dim=0, correction=0).mean().item() + 1e-12 for side in (images, others)]
    return variances[0] / variances[1]


class RandomFeatures(nn.Module):
    """images (B, 1 or 3, S, S) -> mean colour, and what four random convolutions see, each an octave coarser: (B, 35).

    The weights are drawn from a fixed seed and never trained: nothing has to be downloaded. Random convolutions tell
    textures apart (Ustyuzhaninov et al., arXiv 1606.00021), not where on a part they are. Of each of the 8 channels of
    a scale the logarithm of its mean over the image is taken, after a ReLU: 35 numbers in all, because a covariance
    wants more images than it has dimensions.
    """

    CHANNELS = 8
    SCALES = 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scales = nn.ModuleList()
        for inputs in [3, *[self.CHANNELS] * (self.SCALES - 1)]:
            scale = nn.Conv2d(inputs, self.CHANNELS, kernel_size=3, padding=1, padding_mode="replicate", bias=False)
            nn.init.kaiming_normal_(scale.weight, generator=generator)
            # Blind to the mean of what they see: brightness, whose variation is large, would hide all else.
            scale.weight.data -= scale.weight.data.mean(dim=(2, 3), keepdim=True)
            self.scales.append(scale)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        level = images.expand(-1, 3, -1, -1)
        features = [level.mean(dim=(2, 3))]
        for scale in self.scales:
            level = torch.relu(scale(level))  # (B, 8, S, S), the next time half the side
            features.append((level.mean(dim=(2, 3)) + 1e-3).log())
            level = nn.functional.avg_pool2d(level, 2)
        return torch.cat(features, dim=1)


def random_features(images: Tensor) -> FloatArray:
    """RandomFeatures of images on any device, (N, 35)."""
    extractor = RandomFeatures()
    with torch.inference_mode():
        found = [extractor(batch.float().cpu()) for batch in torch.split(images, BATCH)]
    return torch.cat(found).double().numpy()


def frechet_distance(features: FloatArray, others: FloatArray) -> float:
    """Squared Fréchet distance between the Gaussians that fit (N, D) and (M, D) (Dowson and Landau, 1982; Heusel et
    al., arXiv 1706.08500, equation 6). Raises ValueError for fewer than two of either.

    |m - n|^2 + tr(A'A + B'B - 2 (A'A B'B)^(1/2)), where A'A and B'B are the covariances and the last trace is the sum
    of the singular values of A B'. That needs no root of a matrix, which loses its digits where N < D.
    """
    if min(len(features), len(others)) < 2:
        raise ValueError(f"{len(features)} and {len(others)} images: a covariance takes at least two of either.")
    first, second = (
        (side - side.mean(axis=0)) / np.sqrt(len(side) - 1) for side in (features, others)
    )  # A (N, D), B (M, D)
    shift = ((features.mean(axis=0) - others.mean(axis=0)) ** 2).sum()
    common = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return float(max(shift + (first**2).sum() + (second**2).sum() - 2 * common, 0.0))


def frechet_floor(features: FloatArray) -> float | None:
    """The distance between two halves of one set, mean over SPLITS seeded ones; None for fewer than four.

    What distances of this size are worth: a finite set is never at distance 0 of another of its own kind, and the fewer
    images, the farther.
    """
    half = len(features) // 2
    if half < 2:
        return None
    random = np.random.default_rng(0)
    orders = [random.permutation(len(features)) for _ in range(SPLITS)]
    halves = [(features[order[:half]], features[order[half : 2 * half]]) for order in orders]
    return float(np.mean([frechet_distance(*pair) for pair in halves]))
