"""The four networks: encoder, decoder, latent discriminator, image discriminator.

Adversarial Autoencoders (Makhzani et al., arXiv 1511.05644) with DCGAN's convolutions (Radford et al., arXiv
1511.06434). Images are (B, C, S, S) in [-1, 1]. A code is (B, D, G, G): G = 1 for a vector, S / 16 for a grid, so
that one code path serves both, with the prior N(0, I) at every cell.
"""

from torch import Tensor, nn

from models.config import ModelConfig, NormPosition


def _normalised(channels: int, activation: nn.Module, position: NormPosition) -> list[nn.Module]:
    norm = nn.BatchNorm2d(channels)
    return [norm, activation] if position == "before" else [activation, norm]


class Encoder(nn.Module):
    """images (B, C, S, S) -> codes (B, D, G, G), pushed towards N(0, I) by the latent discriminator."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.channels
        for width in config.stage_widths:
            layers.append(nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1))
            layers += _normalised(width, nn.LeakyReLU(0.2), config.batch_norm)
            channels = width
        # A vector sees the whole map at once, a cell of a grid only its own place.
        kernel = config.bottleneck_side if config.latent == "vector" else 1
        layers.append(nn.Conv2d(channels, config.latent_dim, kernel_size=kernel))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        codes: Tensor = self.layers(images)
        return codes


class Decoder(nn.Module):
    """codes (B, D, G, G) -> images (B, C, S, S) in (-1, 1): the generator of the adversarial pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = config.stage_widths[::-1]
        kernel = config.bottleneck_side if config.latent == "vector" else 1
        layers: list[nn.Module] = [nn.ConvTranspose2d(config.latent_dim, widths[0], kernel_size=kernel)]
        layers += _normalised(widths[0], nn.ReLU(), config.batch_norm)
        for width, next_width in zip(widths, [*widths[1:], config.width], strict=True):
            # Kernel 4 is a multiple of stride 2: every output pixel gets as many taps, so no checkerboard.
            layers.append(nn.ConvTranspose2d(width, next_width, kernel_size=4, stride=2, padding=1))
            layers += _normalised(next_width, nn.ReLU(), config.batch_norm)
        layers += [nn.Conv2d(config.width, config.channels, kernel_size=3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.layers(codes)
        return images


class LatentDiscriminator(nn.Module):
    """codes (B, D, G, G) -> one unbounded logit per cell (B, 1, G, G): high for a draw from N(0, I).

    1 x 1 convolutions are a multilayer perceptron at every cell. No normalisation: a batch norm under a gradient
    penalty couples the samples of a batch, which the penalty's per-sample gradient must not see.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = 8 * config.width
        self.layers = nn.Sequential(
            nn.Conv2d(config.latent_dim, width, kernel_size=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, kernel_size=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, kernel_size=1),
        )

    def forward(self, codes: Tensor) -> Tensor:
        logits: Tensor = self.layers(codes)
        return logits


class ImageDiscriminator(nn.Module):
    """images (B, C, S, S) -> one unbounded logit per patch (B, 1, S/16, S/16): high for a photographed part.

    Patches as in PatchGAN (Isola et al., arXiv 1611.07004). Group norm works sample by sample, so that it is safe
    under a gradient penalty.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.channels
        for stage in range(4):
            width = config.width * 2**stage
            layers.append(nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1))
            if stage > 0:
                layers.append(nn.GroupNorm(num_groups=8, num_channels=width))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        layers.append(nn.Conv2d(channels, 1, kernel_size=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
