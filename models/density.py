"""How far the segmentation head's features lie from those of good images.

A head trained on synthetic defects marks what looks like them. Its features tell more: a real defect of a kind that was
never drawn still moves them away from where good images have them, as with the features of CutPaste (Li et al., arXiv
2104.04015), whose distance finds more than the classifier that they were learned for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of the largest variance of the features: directions in which good images vary less are not trusted to be known.
LEAST_VARIANCE = 1e-3


def neighbourhood(features: Tensor) -> Tensor:
    """Features averaged over 3 x 3 cells, as PatchCore's (Roth et al., arXiv 2106.08265, section 3.1): a part does not
    lie on the same cell twice."""
    return F.avg_pool2d(features, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class FeatureDistance(nn.Module):
    """Features (B, C, h, w) -> their Mahalanobis distance from good ones at their place, (B, 1, h, w): about 1 there.

    PaDiM's (Defard et al., arXiv 2011.08785, section III-B), with a mean for each place, but one covariance for all of
    them: a hundred images do for it.
    """

    def __init__(self, channels: int, cells: int) -> None:
        """cells: of the whole image, on each side."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, cells, cells))
        self.register_buffer("whitening", torch.eye(channels))
        self.mean: Tensor
        self.whitening: Tensor

    def forward(self, features: Tensor, rows: slice, columns: slice) -> Tensor:
        """rows, columns: of the whole image's cells, which are features'."""
        offset = neighbourhood(features) - self.mean[:, rows, columns]
        return torch.einsum("bchw,cd->bdhw", offset, self.whitening).square().mean(dim=1, keepdim=True).sqrt()


class GoodFeatures:
    """What a FeatureDistance is fitted from: sums over good images of features and of their products."""

    def __init__(self, distance: FeatureDistance) -> None:
        self._distance = distance
        self._sum = torch.zeros_like(distance.mean, dtype=torch.float64)  # (C, G, G)
        self._count = torch.zeros_like(self._sum[0])
        self._products = torch.zeros_like(distance.whitening, dtype=torch.float64)  # (C, C)

    def add(self, features: Tensor, rows: slice, columns: slice) -> None:
        """features: (B, C, h, w), at these cells of the whole image."""
        features = neighbourhood(features).double()
        self._sum[:, rows, columns] += features.sum(dim=0)
        self._count[rows, columns] += len(features)
        flat = features.transpose(0, 1).flatten(1)  # (C, B h w)
        self._products += flat @ flat.T

    def fit(self) -> None:
        """Each cell has been added to at least once."""
        mean = self._sum / self._count
        covariance = (self._products - self._sum.flatten(1) @ mean.flatten(1).T) / self._count.sum()
        variances, directions = torch.linalg.eigh(covariance)
        # Features that never vary, as of flat images, have no scale: the floor keeps their distance finite.
        variances = variances.clamp(min=max(LEAST_VARIANCE * float(variances[-1]), 1e-6))
        self._distance.mean.copy_(mean)
        self._distance.whitening.copy_(directions / variances.sqrt())
