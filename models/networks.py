"""The networks: encoder, decoder, latent discriminator, image discriminator, and the segmentation head.

Adversarial Autoencoders (Makhzani et al., arXiv 1511.05644) with DCGAN's strided convolutions (Radford et al., arXiv
1511.06434). Images are (B, C, H, W), standardised; H and W are multiples of 16. A code is (B, D, G, G): G = 1 for a
vector, a sixteenth of the image's side for a grid, so that one code path serves both, with the prior N(0, I) at every
cell.

What scores replicates the borders instead of padding with zeros: zeros outside are an edge around every image and every
tile, and the map would be high there on good parts.

What is said of images holds of a backbone's features in their place (models/features.py): (B, F, H/8, W/8), with half
as many stages.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig, NormPosition
from models.density import FeatureDistance
from models.features import Features
from models.maps import enlarged, residual_map


class _ReplicatedBorders(torch.autograd.Function):
    """One more pixel on every side, as its neighbour: (B, C, H, W) -> (B, C, H + 2, W + 2).

    F.pad does the same, but on a CPU it takes half as long as the convolutions that it serves, mostly in its gradient.
    """

    @staticmethod
    def forward(_: Any, inputs: Tensor) -> Tensor:
        batch, channels, height, width = inputs.shape
        shape = batch, channels, height + 2, width + 2
        padded = torch.empty(shape, dtype=inputs.dtype, device=inputs.device, memory_format=torch.channels_last)
        padded[:, :, 1:-1, 1:-1] = inputs
        padded[:, :, 0, 1:-1], padded[:, :, -1, 1:-1] = inputs[:, :, 0], inputs[:, :, -1]
        padded[..., 0], padded[..., -1] = padded[..., 1], padded[..., -2]
        return padded

    @staticmethod
    def backward(_: Any, gradients: Tensor) -> Tensor:
        # First the columns are folded back onto their neighbours, then the rows: a corner goes both ways.
        columns = gradients[..., 1:-1].clone(memory_format=torch.channels_last)
        columns[..., 0] += gradients[..., 0]
        columns[..., -1] += gradients[..., -1]
        columns[:, :, 1] += columns[:, :, 0]
        columns[:, :, -2] += columns[:, :, -1]
        return columns[:, :, 1:-1]


class Convolution(nn.Conv2d):
    """A convolution that replicates the borders by one pixel: its own padding stays 0."""

    def forward(self, inputs: Tensor) -> Tensor:
        padded: Tensor = _ReplicatedBorders.apply(inputs)
        return super().forward(padded)


def _normalised(channels: int, activation: nn.Module, position: NormPosition) -> list[nn.Module]:
    norm = nn.BatchNorm2d(channels)
    return [norm, activation] if position == "before" else [activation, norm]


class Encoder(nn.Module):
    """images (B, C, H, W) -> codes (B, D, G, G), pushed towards N(0, I) by the latent discriminator."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.seen_channels
        for width in config.stage_widths:
            layers.append(Convolution(channels, width, kernel_size=4, stride=2))
            layers += _normalised(width, nn.LeakyReLU(0.2, inplace=True), config.batch_norm)
            channels = width
        # A vector sees the whole map at once, a cell of a grid only its own place.
        kernel = config.bottleneck_side if config.latent == "vector" else 1
        layers.append(nn.Conv2d(channels, config.latent_dim, kernel_size=kernel))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        codes: Tensor = self.layers(images)
        return codes


class Decoder(nn.Module):
    """codes (B, D, G, G) -> images (B, C, H, W), standardised: the generator of the adversarial pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = config.stage_widths[::-1]
        kernel = config.bottleneck_side if config.latent == "vector" else 1
        layers: list[nn.Module] = [nn.ConvTranspose2d(config.latent_dim, widths[0], kernel_size=kernel)]
        layers += _normalised(widths[0], nn.ReLU(inplace=True), config.batch_norm)
        for width, next_width in pairwise(widths):
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(Convolution(width, next_width, kernel_size=3))
            layers += _normalised(next_width, nn.ReLU(inplace=True), config.batch_norm)
        # The last doubling by pixel shuffle (Shi et al., arXiv 1609.05158): a feature map at full size would take half
        # of the decoder's time.
        layers.append(Convolution(widths[-1], 4 * config.seen_channels, kernel_size=3))
        layers.append(nn.PixelShuffle(2))
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.layers(codes)
        return images


class LatentDiscriminator(nn.Module):
    """codes (B, D, G, G) -> one unbounded logit per cell (B, 1, G, G): high for a draw from N(0, I).

    1 x 1 convolutions are a multilayer perceptron at every cell. batch_norm: not under a gradient penalty, because it
    couples the samples of a batch, which the penalty's per-sample gradient must not see.
    """

    def __init__(self, config: ModelConfig, *, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, width = config.latent_dim, 8 * config.width
        for _ in range(2):
            layers.append(nn.Conv2d(channels, width, kernel_size=1))
            activation = nn.LeakyReLU(0.2)
            layers += _normalised(width, activation, config.batch_norm) if batch_norm else [activation]
            channels = width
        layers.append(nn.Conv2d(width, 1, kernel_size=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        logits: Tensor = self.layers(codes)
        return logits


class ImageDiscriminator(nn.Module):
    """images (B, C, H, W) -> one unbounded logit per patch (B, 1, H/16, W/16): high for a photographed part. Of
    features a patch is 4 x 4.

    Patches as in PatchGAN (Isola et al., arXiv 1611.07004). Group norm works sample by sample, so that it is safe
    under a gradient penalty; batch_norm, in its place, is not.
    """

    def __init__(self, config: ModelConfig, *, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.seen_channels
        for stage in range(4 if config.cell == 1 else 2):
            width = config.width * 2**stage
            layers.append(nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1))
            activation = nn.LeakyReLU(0.2)
            if stage > 0 and batch_norm:
                layers += _normalised(width, activation, config.batch_norm)
            elif stage > 0:
                layers += [nn.GroupNorm(num_groups=8, num_channels=width), activation]
            else:
                layers.append(activation)
            channels = width
        layers.append(nn.Conv2d(channels, 1, kernel_size=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class SegmentationHead(nn.Module):
    """(images, reconstructions), each (B, C, H, W), and places (B, 2, H, W) -> one logit per pixel, or per place of a
    backbone's features, (B, 1, H, W): high on a defect; and the features that they are made from, level by level, as
    `strides` and `feature_widths` say.

    DRAEM's discriminative network (Zavrtanik et al., arXiv 2108.07610), a U-Net (Ronneberger et al., arXiv
    1505.04597), made small: it starts and ends at half the resolution, and adds its skip connections where the
    original concatenates them. It knows where it looks (CoordConv, Liu et al., arXiv 1807.03247): what belongs on one
    side of a part may be a defect on the other.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Each 2 x 2 pixels become channels: no detail is lost, and the widest maps shrink to a quarter. A backbone's
        # features are few already.
        fold = 2 if config.cell == 1 else 1
        self.folded = nn.PixelUnshuffle(fold) if fold > 1 else nn.Identity()
        self.unfolded = nn.PixelShuffle(fold) if fold > 1 else nn.Identity()
        widths = [config.head_width, *self.feature_widths(config)]
        inputs = (2 * config.seen_channels + 2) * fold**2
        norm = config.batch_norm
        # Each place of a backbone's features has seen its neighbours already, and they are many.
        kernel = 3 if config.cell == 1 else 1
        self.first = nn.Sequential(
            *_convolution(inputs, widths[0], norm, kernel=kernel), *_convolution(widths[0], widths[0], norm)
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), *_convolution(fine, coarse, norm), *_convolution(coarse, coarse, norm))
            for fine, coarse in pairwise(widths)
        )
        self.across = nn.ModuleList(nn.Conv2d(coarse, fine, kernel_size=1) for fine, coarse in pairwise(widths))
        self.up = nn.ModuleList(nn.Sequential(*_convolution(fine, fine, norm)) for fine in widths[:-1])
        self.last = nn.Conv2d(widths[0], fold**2, kernel_size=1)
        # Defects are rare: to begin with, one pixel in twenty.
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, -3.0)

    @staticmethod
    def strides(config: ModelConfig) -> tuple[int, ...]:
        """Pixels of the image from one place of the features to the next, level by level."""
        return (4, 8, 16) if config.cell == 1 else (2 * config.cell, 4 * config.cell)

    @classmethod
    def feature_widths(cls, config: ModelConfig) -> list[int]:
        """Channels of the features."""
        return [config.head_width * min(2**level, 4) for level in range(1, 1 + len(cls.strides(config)))]

    def forward(self, images: Tensor, reconstructions: Tensor, places: Tensor) -> tuple[Tensor, list[Tensor]]:
        places = places.expand(len(images), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        inputs = torch.cat([images, reconstructions, places], dim=1)
        features = self.first(self.folded(inputs))  # (B, w, H/2, W/2)
        pyramid = [features]
        for down in self.down:
            pyramid.append(down(pyramid[-1]))
        features = pyramid[-1]
        for finer, across, up in reversed(list(zip(pyramid, self.across, self.up, strict=False))):
            features = up(F.interpolate(across(features), scale_factor=2) + finer)
        logits: Tensor = self.unfolded(self.last(features))
        return logits, pyramid[1:]


def _convolution(inputs: int, outputs: int, position: NormPosition, *, kernel: int = 3) -> list[nn.Module]:
    # A batch norm right after it would take a bias away again.
    bias = position == "after"
    convolution = (
        nn.Conv2d(inputs, outputs, 1, bias=bias) if kernel == 1 else Convolution(inputs, outputs, 3, bias=bias)
    )
    return [convolution, *_normalised(outputs, nn.LeakyReLU(0.1, inplace=True), position)]


class Standardisation(nn.Module):
    """Pixels of one product -> images with mean 0 and deviation 0.5, so that one recipe suits dark and pale products.

    mean, deviation: of all training pixels, in gray levels, over all channels at once, so that colours keep their hue.
    """

    def __init__(self, mean: float = 127.5, deviation: float = 63.75) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        # Images of one flat colour have no deviation.
        self.register_buffer("scale", torch.tensor(max(2.0 * deviation, 1.0)))
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 in [0, 255], any shape -> float32."""
        return (pixels.float() - self.mean) / self.scale

    @property
    def limits(self) -> tuple[float, float]:
        """What black and white become."""
        black, white = self(self.mean.new_tensor([0, 255])).tolist()
        return black, white

    def intensities(self, images: Tensor) -> Tensor:
        """The way back, to intensities in [0, 1], of which a reconstruction may lie outside."""
        return (images * self.scale + self.mean) / 255

    def pixels(self, images: Tensor) -> Tensor:
        """The way back to uint8; what lies outside [0, 255] is cut off."""
        return (255 * self.intensities(images)).round().clamp(0, 255).byte()


def places_of(size: int, device: torch.device) -> Tensor:
    """How far across and down each pixel of an image lies, from -1 to 1: (2, S, S)."""
    axis = torch.linspace(-1, 1, size, device=device)
    return torch.stack([axis.expand(size, size), axis.view(size, 1).expand(size, size)])


class ScoringNetworks(nn.Module):
    """The networks that a checkpoint holds and that score: all but the discriminators."""

    def __init__(self, config: ModelConfig, standardisation: Standardisation) -> None:
        super().__init__()
        self.config = config
        self.standardisation = standardisation
        self.features = Features(config) if config.over_features else None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = SegmentationHead(config) if config.head_width else None
        # With cells up to a sixteenth of what the networks see: larger ones say too little of where a defect is. None
        # over features: their cells are large already.
        self.distances = nn.ModuleList(
            FeatureDistance(width, config.image_size // stride)
            for stride, width in self._levels()
            if self.head and not config.over_features and stride <= config.side // 16
        )
        # Convolutions on CPUs and on tensor cores want the channels of a pixel side by side: a quarter less time.
        self.to(memory_format=torch.channels_last)

    def _levels(self) -> list[tuple[int, int]]:
        """Stride and channels of the head's features."""
        widths = SegmentationHead.feature_widths(self.config)
        return list(zip(SegmentationHead.strides(self.config), widths, strict=True))

    def see(self, images: Tensor) -> Tensor:
        """What encoder and head are shown of standardised images (B, C, H, W): the images, or a backbone's features of
        them, (B, F, H/8, W/8)."""
        if self.features is None:
            return images
        features: Tensor = self.features(self.standardisation.intensities(images).clamp(0, 1))
        return features

    def forward(self, seen: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """Codes (B, D, G, G), reconstructions like `seen`, the head's logits for each place of it and its features, of
        what `see` makes of standardised images.

        places: (B or 1, 2, H, W), of `places_of`, where the pixels lie in the whole image.
        """
        seen = seen.contiguous(memory_format=torch.channels_last)
        codes, reconstructions = self.rebuild(seen)
        return codes, reconstructions, *self.mark(seen, reconstructions, places)

    def rebuild(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's part of `forward`."""
        codes = self.encoder(seen)
        return codes, self.decoder(codes)

    def mark(self, seen: Tensor, reconstructions: Tensor, places: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The head's. It does not teach the autoencoder: it sees reconstructions, not how they were made."""
        if self.head is None:
            return None, []
        if self.config.cell > 1:
            # Places grow evenly: a cell's mean is that of two opposite corners.
            cell = self.config.cell
            places = (places[..., ::cell, ::cell] + places[..., cell - 1 :: cell, cell - 1 :: cell]) / 2
        logits, features = self.head(seen, reconstructions.detach(), places)
        return logits, features

    def residual(self, seen: Tensor, reconstructions: Tensor) -> Tensor:
        """How badly each place is rebuilt, (B, 1, H, W): the residual map, or the root mean squared error of features,
        whose few large values weigh no more in the fusion than those of the head's logits."""
        if self.features is None:
            return residual_map(seen, reconstructions)
        return (seen - reconstructions).square().mean(dim=1, keepdim=True).sqrt()

    @property
    def evidence_maps(self) -> int:
        """How many maps `evidence` gives."""
        return 1 + len(self.distances) if self.head else 0

    def evidence(self, logits: Tensor | None, features: list[Tensor], window: tuple[slice, slice]) -> list[Tensor]:
        """What the head says of each place of what is seen in a window, (B, 1, H, W) each: its logits and, level by
        level, how far its features are from those of good images. Empty without a head.

        window: rows and columns of the whole image, at multiples of 16.
        """
        if logits is None:
            return []
        maps = [logits]
        for (stride, _), level, distance in zip(self._levels(), features, self.distances, strict=False):
            maps.append(enlarged(distance(level, *cells_of(window, stride)), stride))
        return maps


def cells_of(window: tuple[slice, slice], stride: int) -> tuple[slice, slice]:
    """Which cells of a feature map a window of the image is."""
    rows, columns = window
    return slice(rows.start // stride, rows.stop // stride), slice(columns.start // stride, columns.stop // stride)


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
