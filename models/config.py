"""What a model is, in the few numbers that its weights depend on."""

from dataclasses import dataclass
from typing import Literal, get_args

from models.errors import ConfigError

LatentShape = Literal["vector", "grid"]
NormPosition = Literal["before", "after"]
Padding = Literal["torchvision", "tensorflow"]

MAX_SIDE = 512  # of what the networks see at once; a larger image goes through in tiles
CELL = 8  # pixels on each side of what one vector of a backbone's features stands for
# Backbones of torchvision, and the layers of theirs that are taken unless a recipe names others.
FEATURE_LAYERS = {
    "mobilenet_v2": "features.6,features.13",
    "resnet18": "layer2,layer3",
    "wide_resnet50_2": "layer2,layer3",
    "efficientnet_b0": "features.3,features.5",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the networks. Raises ConfigError, naming the field, the value and what is allowed."""

    image_size: int = 128  # pixels on each side; images are resized to this square
    tile: int = 0  # pixels on each side of the overlapping windows that a large image is scored in; 0: in one piece
    channels: int = 3  # 1 gray, 3 colour
    width: int = 32  # channels after the first convolution; doubles per stage, up to eight times
    latent: LatentShape = "grid"  # one code per image, or one per 16 x 16 pixels (features: 32 x 32)
    latent_dim: int = 64  # numbers in a code
    batch_norm: NormPosition = "before"  # before or after the activation
    head_width: int = 0  # channels of the segmentation head at its finest; 0: no head
    features: str = "none"  # what the networks see: the pixels, or the features of this backbone of torchvision
    feature_layers: str = ""  # names of its layers, with commas between them; empty: those of FEATURE_LAYERS
    feature_channels: int = 128  # numbers that are kept of each place
    feature_padding: Padding = "torchvision"  # how the backbone's strided layers pad: where its weights were trained
    highest: int = 1  # of how many of the anomaly map's highest squares its score is the mean; 1: its score is its peak

    def __post_init__(self) -> None:
        largest = 16 * MAX_SIDE if self.tile else MAX_SIDE
        if not 32 <= self.image_size <= largest or self.image_size % self.multiple:
            raise ConfigError(
                f"image_size is {self.image_size}: allowed are multiples of {self.multiple} from 32 to {MAX_SIDE}, "
                f"with a tile to {16 * MAX_SIDE}."
            )
        if self.tile and (not 32 <= self.tile <= min(MAX_SIDE, self.image_size) or self.tile % self.multiple):
            raise ConfigError(
                f"tile is {self.tile}: allowed are 0 (the image in one piece) and multiples of {self.multiple} from 32 "
                f"to {MAX_SIDE} and to image_size, {self.image_size}."
            )
        if self.channels not in (1, 3):
            raise ConfigError(f"channels is {self.channels}: allowed are 1 (gray) and 3 (colour).")
        if not 8 <= self.width <= 256 or self.width % 8:
            raise ConfigError(f"width is {self.width}: allowed are multiples of 8 from 8 to 256.")
        if self.latent not in get_args(LatentShape):
            raise ConfigError(f"latent is {self.latent!r}: allowed are {', '.join(get_args(LatentShape))}.")
        if not 1 <= self.latent_dim <= 1024:
            raise ConfigError(f"latent_dim is {self.latent_dim}: allowed are 1 to 1024.")
        if self.batch_norm not in get_args(NormPosition):
            raise ConfigError(f"batch_norm is {self.batch_norm!r}: allowed are {', '.join(get_args(NormPosition))}.")
        if not 0 <= self.head_width <= 256 or self.head_width % 8:
            raise ConfigError(f"head_width is {self.head_width}: allowed are 0 (no head) and multiples of 8 to 256.")
        squares = (self.image_size // self.square) ** 2
        if not 1 <= self.highest <= squares:
            raise ConfigError(f"highest is {self.highest}: allowed are 1 to {squares}, the squares of the anomaly map.")
        self._check_features()

    def _check_features(self) -> None:
        if self.over_features and not self.feature_layers and self.features not in FEATURE_LAYERS:
            raise ConfigError(
                f"features is {self.features!r}: without feature_layers allowed are none, {', '.join(FEATURE_LAYERS)}."
            )
        if not self.over_features and self.feature_layers:
            raise ConfigError(f"feature_layers is {self.feature_layers!r}: of features none there are no layers.")
        if self.over_features and self.latent == "vector":
            raise ConfigError("latent is 'vector': over features allowed is grid.")
        if not 8 <= self.feature_channels <= 1024 or self.feature_channels % 8:
            raise ConfigError(
                f"feature_channels is {self.feature_channels}: allowed are multiples of 8 from 8 to 1024."
            )
        if self.feature_padding not in get_args(Padding):
            raise ConfigError(
                f"feature_padding is {self.feature_padding!r}: allowed are {', '.join(get_args(Padding))}."
            )

    @property
    def over_features(self) -> bool:
        """Whether the networks see a backbone's features instead of pixels."""
        return self.features != "none"

    @property
    def layers(self) -> list[str]:
        """Of the backbone; none for pixels."""
        names = self.feature_layers or FEATURE_LAYERS.get(self.features, "")
        return [name.strip() for name in names.split(",") if name.strip()]

    @property
    def multiple(self) -> int:
        """Of which image_size and tile have to be one: of the largest stride."""
        return 32 if self.over_features else 16

    @property
    def cell(self) -> int:
        """Pixels on each side of what the autoencoder sees as one."""
        return CELL if self.over_features else 1

    @property
    def seen_channels(self) -> int:
        """Channels of what the autoencoder sees."""
        return self.feature_channels if self.over_features else self.channels

    @property
    def side(self) -> int:
        """Pixels on each side of what the networks see at once."""
        return self.tile or self.image_size

    @property
    def smoothing(self) -> float:
        """Sigma of the component maps' smoothing, in pixels: a defect is larger than a pixel, and a mislaid edge is
        not. What features say is smooth as it is."""
        return self.side / 64

    @property
    def square(self) -> int:
        """Pixels on each side of the squares that `highest` counts: as many as the smoothing leaves apart."""
        return max(int(self.smoothing), 1)

    @property
    def stage_widths(self) -> list[int]:
        """Channels after each stage of the encoder; a stage halves the image, or the features of one.

        A grid stops at one code per 16 x 16 pixels, over features per 32 x 32. A vector goes on as DCGAN does, to a
        side of 4, or to where a side is odd, so that the last, full-size convolution stays small.
        """
        stages = 2 if self.over_features else 4
        if self.latent == "vector":
            side = self.side // 16
            while side > 4 and side % 2 == 0:
                side //= 2
                stages += 1
        return [self.width * min(2**stage, 8) for stage in range(stages)]

    @property
    def bottleneck_side(self) -> int:
        """Side of the encoder's last feature map, in cells."""
        return int(self.side // self.cell // 2 ** len(self.stage_widths))

    @property
    def latent_side(self) -> int:
        """Side of the code's grid: 1 for a vector."""
        return 1 if self.latent == "vector" else self.bottleneck_side
