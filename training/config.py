"""A recipe: everything that decides the weights, apart from the images. Read from TOML, changed by key=value."""

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from models.config import LatentShape, ModelConfig, NormPosition, Padding
from models.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"

AdversarialLoss = Literal["bce", "wgan-gp"]
LatentDiscriminatorNorm = Literal["none", "batch"]
ImageDiscriminatorNorm = Literal["group", "batch"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every value, checked. Raises ConfigError naming the key, the value and what is allowed."""

    # The networks: see ModelConfig.
    image_size: int
    tile: int
    channels: int
    width: int
    latent: LatentShape
    latent_dim: int
    batch_norm: NormPosition
    head_width: int
    features: str
    feature_layers: str
    feature_channels: int
    feature_padding: Padding
    # What the networks are shown: random windows of this many pixels (0: the whole image, or a tile of it), their
    # brightness and contrast changed by up to this share.
    crop: int
    jitter: float
    # What the autoencoder rebuilds: the probability of each synthetic defect, the share of images whose defects are
    # drawn in the features, where the backbone need not run again, and its loss.
    corruption: float
    feature_corruption: float
    l2_weight: float
    ssim_weight: float
    gradient_weight: float
    head_weight: float
    # The two adversaries. n_critic: discriminator steps per autoencoder step, each on a fresh batch. batch: batch norm,
    # as in the diary, where `batch_norm` says.
    latent_loss: AdversarialLoss
    latent_weight: float
    latent_n_critic: int
    latent_discriminator_norm: LatentDiscriminatorNorm
    image_loss: AdversarialLoss
    image_weight: float
    image_n_critic: int
    image_discriminator_norm: ImageDiscriminatorNorm
    gradient_penalty_weight: float
    adversary_every: int  # steps of the autoencoder from one in which the adversaries take part to the next
    discriminator_every: int  # of those steps, from one in which the discriminators learn to the next
    # Optimisation.
    steps: int
    batch_size: int
    learning_rate: float
    discriminator_learning_rate: float
    schedule: Schedule
    ema: float  # decay per step of the averaged weights, which are the ones that score
    mixed_precision: bool  # bfloat16 for the networks, where the device computes it
    # False repeats the mistake of the diary's first entry: during training, too, the networks are called as if for
    # scoring. Batch norm then divides by running statistics that never move from 0 and 1: it normalises nothing.
    train_flag: bool
    seed: int
    # The held-out images.
    calibration_fraction: float
    alpha: float
    # Steps between two saved states, to resume from.
    save_every: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        self.model_config()  # raises ConfigError itself
        allowed = self.crop == 0 or (self.crop >= 32 and self.crop % 16 == 0 and self.latent == "grid")
        _check("crop", self.crop, allowed, "0 (no crop) and, for a grid of codes, multiples of 16 from 32 on")
        _check("jitter", self.jitter, 0 <= self.jitter <= 0.5, "0 to 0.5")
        _check("corruption", self.corruption, 0 <= self.corruption <= 1, "0 to 1")
        self._check_features()
        for name in ("l2_weight", "ssim_weight", "gradient_weight", "head_weight", "latent_weight", "image_weight"):
            value = getattr(self, name)
            _check(name, value, 0 <= value < math.inf, "0 or more")
        if not self.l2_weight + self.ssim_weight + self.gradient_weight:
            raise ConfigError("l2_weight, ssim_weight and gradient_weight are all 0: one must be more.")
        counts = ("latent_n_critic", "image_n_critic", "adversary_every", "discriminator_every", "steps", "save_every")
        for name in counts:
            value = getattr(self, name)
            _check(name, value, value >= 1, "1 or more")
        for adversary, norm in (("latent", "none"), ("image", "group")):
            loss, chosen = getattr(self, f"{adversary}_loss"), getattr(self, f"{adversary}_discriminator_norm")
            if loss == "wgan-gp" and chosen == "batch":
                raise ConfigError(
                    f"{adversary}_discriminator_norm is 'batch': with {adversary}_loss wgan-gp allowed is {norm}, "
                    f"because the penalty is on the gradient of each sample, and batch norm mixes those of a batch."
                )
        weight = self.gradient_penalty_weight
        _check("gradient_penalty_weight", weight, 0 < weight < math.inf, "more than 0")
        # Batch norm has nothing to average over in a batch of one.
        _check("batch_size", self.batch_size, self.batch_size >= 2, "2 or more")
        for name in ("learning_rate", "discriminator_learning_rate"):
            value = getattr(self, name)
            _check(name, value, 0 < value <= 1, "more than 0, up to 1")
        _check("ema", self.ema, 0 <= self.ema < 1, "0 up to, but not including, 1")
        _check("seed", self.seed, 0 <= self.seed < 2**31, "0 to 2147483647")
        fraction = self.calibration_fraction
        _check("calibration_fraction", fraction, 0 < fraction <= 0.5, "more than 0, up to 0.5")
        _check("alpha", self.alpha, 0 < self.alpha < 1, "more than 0, less than 1")

    def _check_features(self) -> None:
        share, most = self.feature_corruption, 1.0 if self.over_features else 0.0
        learns = not self.head_width or share < 1  # the head learns from defects in pixels alone
        allowed = "0 and, over features, up to 1, with a head less than 1"
        _check("feature_corruption", share, 0 <= share <= most and learns, allowed)
        if self.over_features and self.ssim_weight + self.gradient_weight:
            raise ConfigError("ssim_weight and gradient_weight are of images: over features allowed is 0.")
        _check("crop", self.crop, not self.over_features or self.crop % 32 == 0, "over features multiples of 32")

    @property
    def over_features(self) -> bool:
        """Whether the networks see a backbone's features instead of pixels."""
        return self.features != "none"

    @property
    def caches_features(self) -> bool:
        """Whether training shows whole images, so that their features are computed once."""
        return self.over_features and self.window == self.image_size

    @property
    def window(self) -> int:
        """Pixels on each side of what training shows: no window is larger than the image, or its tile."""
        side = self.model_config().side
        return min(self.crop or side, side)

    def model_config(self) -> ModelConfig:
        return ModelConfig(
            image_size=self.image_size,
            tile=self.tile,
            channels=self.channels,
            width=self.width,
            latent=self.latent,
            latent_dim=self.latent_dim,
            batch_norm=self.batch_norm,
            head_width=self.head_width,
            features=self.features,
            feature_layers=self.feature_layers,
            feature_channels=self.feature_channels,
            feature_padding=self.feature_padding,
            # Over features a map is coarser: it was measured by its peak.
            highest=1 if self.over_features else 16,
        )


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """Read recipes/NAME.toml, then apply "key=value" overrides in order. Raises ConfigError."""
    if name not in recipe_names():
        raise ConfigError(f"recipe {name!r} does not exist: there are {', '.join(recipe_names())}.")
    values = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    types = {field.name: field.type for field in fields(Recipe)}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} is not of the form key=value.")
        if key not in types:
            raise ConfigError(f"recipe key {key!r} does not exist: allowed are {', '.join(types)}.")
        values[key] = _parse(key, types[key], text)
    return recipe_from_dict(values)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """A Recipe of these keys, no more and no fewer. Raises ConfigError."""
    names = {field.name for field in fields(Recipe)}
    if set(values) != names:
        odd = ", ".join(sorted(set(values) ^ names))
        raise ConfigError(f"a recipe has missing or unknown keys: {odd}.")
    return Recipe(**values)


def _parse(key: str, kind: Any, text: str) -> Any:
    try:
        if kind is int or kind is float:
            return kind(text)
    except ValueError:
        raise ConfigError(f"{key} is {text!r}: it takes {'a whole number' if kind is int else 'a number'}.") from None
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{key} is {text!r}: allowed are true, false.")
        return text == "true"
    return text


def _check_type(name: str, kind: Any, value: Any) -> None:
    if get_origin(kind) is Literal:
        _check(name, value, value in get_args(kind), ", ".join(get_args(kind)))
    elif kind is float:
        _check(name, value, isinstance(value, (int, float)) and not isinstance(value, bool), "a number")
    elif type(value) is not kind:
        _check(name, value, False, {int: "a whole number", bool: "true, false", str: "a text"}[kind])


def _check(name: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        shown = repr(value) if isinstance(value, str) else value
        raise ConfigError(f"{name} is {shown}: allowed are {what}.")
