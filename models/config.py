"""What a model is, in the few numbers that its weights depend on."""

from dataclasses import dataclass
from typing import Literal, get_args

from models.errors import ConfigError

LatentShape = Literal["vector", "grid"]
NormPosition = Literal["before", "after"]

MAX_SIDE = 512  # of what the networks see at once; a larger image goes through in tiles


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the networks. Raises ConfigError, naming the field, the value and what is allowed."""

    image_size: int = 128  # pixels on each side; images are resized to this square
    tile: int = 0  # pixels on each side of the overlapping windows that a large image is scored in; 0: in one piece
    channels: int = 3  # 1 gray, 3 colour
    width: int = 32  # channels after the first convolution; doubles per stage, up to eight times
    latent: LatentShape = "grid"  # one code per image, or one per 16 x 16 pixels
    latent_dim: int = 64  # numbers in a code
    batch_norm: NormPosition = "before"  # before or after the activation
    head_width: int = 0  # channels of the segmentation head at its finest; 0: no head

    def __post_init__(self) -> None:
        largest = 16 * MAX_SIDE if self.tile else MAX_SIDE
        if not 32 <= self.image_size <= largest or self.image_size % 16:
            raise ConfigError(
                f"image_size is {self.image_size}: allowed are multiples of 16 from 32 to {MAX_SIDE}, "
                f"with a tile to {16 * MAX_SIDE}."
            )
        if self.tile and (not 32 <= self.tile <= min(MAX_SIDE, self.image_size) or self.tile % 16):
            raise ConfigError(
                f"tile is {self.tile}: allowed are 0 (the image in one piece) and multiples of 16 from 32 to "
                f"{MAX_SIDE} and to image_size, {self.image_size}."
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

    @property
    def side(self) -> int:
        """Pixels on each side of what the networks see at once."""
        return self.tile or self.image_size

    @property
    def stage_widths(self) -> list[int]:
        """Channels after each stage of the encoder; a stage halves the image.

        A grid stops at one cell per 16 x 16 pixels. A vector goes on as DCGAN does, to a side of 4, or to where
        a side is odd, so that the last, full-size convolution stays small.
        """
        stages = 4
        if self.latent == "vector":
            side = self.side // 16
            while side > 4 and side % 2 == 0:
                side //= 2
                stages += 1
        return [self.width * min(2**stage, 8) for stage in range(stages)]

    @property
    def bottleneck_side(self) -> int:
        """Side of the encoder's last feature map, in cells."""
        return int(self.side // 2 ** len(self.stage_widths))

    @property
    def latent_side(self) -> int:
        """Side of the code's grid: 1 for a vector."""
        return 1 if self.latent == "vector" else self.bottleneck_side
