"""What a training run is made of: batches of its images, the four networks, their optimizers, and where it stands."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from models.config import CELL
from models.features import SPOTS
from models.networks import ImageDiscriminator, LatentDiscriminator, ScoringNetworks, Standardisation, places_of
from training.config import Recipe

BETAS = (0.9, 0.999)
# Adam's betas of DCGAN (arXiv 1511.06434, section 4): a high first beta makes an adversary oscillate.
ADVERSARY_BETAS = (0.5, 0.999)
FEATURE_BATCH = 16  # images that the backbone takes at once


class Batches:
    """Shuffled batches of windows of the training images, pass after pass without repeats; `drawn` is where it stands.

    A window is (C, W, W), W = crop, anywhere in its image.
    """

    def __init__(
        self, pixels: Tensor, *, batch_size: int, crop: int, seed: int, directions: Tensor | None = None
    ) -> None:
        self.pixels = pixels  # uint8 (N, C, S, S), all in the device's memory
        self.directions = directions  # of whole images, if they are kept: see models.features
        self.places = places_of(pixels.shape[-1], pixels.device)
        self.batch_size = min(batch_size, len(pixels))
        self.crop = crop
        self.seed = seed
        self.drawn = 0
        self._order = self._shuffled(0)

    def next(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Windows, uint8 (B, C, W, W), where in their images they lie, (B, 2, W, W), and what is kept of them."""
        per_pass = len(self.pixels) // self.batch_size
        index = self.drawn % per_pass
        if index == 0:
            self._order = self._shuffled(self.drawn // per_pass)
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 7_919 * self.drawn + 1)
        corners = self._corners(len(chosen), generator)
        self.drawn += 1
        windows = [(slice(top, top + self.crop), slice(left, left + self.crop)) for top, left in corners.tolist()]
        pixels = [self.pixels[image, :, *window] for image, window in zip(chosen.tolist(), windows, strict=True)]
        places = torch.stack([self.places[:, *window] for window in windows])
        directions = None if self.directions is None else self.directions[chosen.to(self.directions.device)]
        return torch.stack(pixels), places, directions

    def _corners(self, count: int, generator: torch.Generator) -> Tensor:
        """Top and left of windows, (count, 2), drawn evenly from beyond the borders too and moved back inside.

        From the places that fit alone, a picture's outermost pixels would come by in one window of 65, for windows of
        192 pixels of 256: what is normal at borders would be learned badly, and good images be highest there.
        """
        room = self.pixels.shape[-1] - self.crop
        beyond = min(room, self.crop)
        return torch.randint(-beyond, room + beyond + 1, (count, 2), generator=generator).clamp(0, room)

    def resume(self, drawn: int) -> None:
        self.drawn = drawn
        self._order = self._shuffled(drawn // (len(self.pixels) // self.batch_size))

    def _shuffled(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(len(self.pixels), generator=generator)


class TrainingState:
    """All that a step reads and changes. Saved and loaded, training goes on as if it had never stopped."""

    def __init__(
        self, recipe: Recipe, pixels: Tensor, *, device: torch.device, backbone: dict[str, Tensor] | None = None
    ) -> None:
        """pixels: the training images, uint8 (N, C, S, S), at least two. backbone: its weights; None leaves it with
        random ones, which take as long. Raises ConfigError for weights of another network."""
        config = recipe.model_config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.networks = ScoringNetworks(config, standardisation_of(pixels)).to(device)
            batch_norm = recipe.latent_discriminator_norm == "batch"
            self.latent_discriminator = LatentDiscriminator(config, batch_norm=batch_norm).to(device)
            batch_norm = recipe.image_discriminator_norm == "batch"
            self.image_discriminator = ImageDiscriminator(config, batch_norm=batch_norm).to(device)
            self.image_discriminator.to(memory_format=torch.channels_last)
        self.autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=recipe.mixed_precision and computes_bfloat16(device)
        )
        pixels = pixels.to(device)
        directions = None
        if self.networks.features is not None:
            if backbone is not None:
                self.networks.features.load(backbone)
            self.networks.features.locate(pixels[:SPOTS].float() / 255)
            directions = directions_of(self.networks, pixels)
            self.networks.features.fit(directions)
        # The weights that score: an exponential moving average smooths what the adversaries stir up.
        self.averaged = copy.deepcopy(self.networks)
        learning = [parameter for parameter in self.networks.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(learning, betas=BETAS)
        self.latent_optimizer = torch.optim.Adam(self.latent_discriminator.parameters(), betas=ADVERSARY_BETAS)
        self.image_optimizer = torch.optim.Adam(self.image_discriminator.parameters(), betas=ADVERSARY_BETAS)
        self.batches = Batches(
            pixels,
            batch_size=recipe.batch_size,
            crop=recipe.window,
            seed=recipe.seed,
            directions=directions if recipe.caches_features else None,
        )
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "drawn": self.batches.drawn,
            "generator": self.generator.get_state(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.batches.resume(state["drawn"])
        self.generator.set_state(state["generator"].cpu())
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "networks": self.networks,
            "latent_discriminator": self.latent_discriminator,
            "image_discriminator": self.image_discriminator,
            "averaged": self.averaged,
            "optimizer": self.optimizer,
            "latent_optimizer": self.latent_optimizer,
            "image_optimizer": self.image_optimizer,
        }


@torch.no_grad()
def directions_of(networks: ScoringNetworks, pixels: Tensor) -> Tensor:
    """What the backbone says of images, uint8 (N, C, S, S), before it is standardised: float16 (N, F, S/8, S/8)."""
    assert networks.features is not None
    shape = len(pixels), *networks.features.mean.shape[:1], *2 * [pixels.shape[-1] // CELL]
    found = torch.empty(shape, dtype=torch.float16, device=pixels.device)
    for kept, few in zip(torch.split(found, FEATURE_BATCH), torch.split(pixels, FEATURE_BATCH), strict=True):
        kept.copy_(networks.features.directions(few.float() / 255))
    return found


def standardisation_of(pixels: Tensor) -> Standardisation:
    """Of training images, uint8 (N, C, S, S): the mean and the deviation of all their gray levels."""
    counts = torch.bincount(pixels.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64, device=pixels.device)
    mean = float((counts * levels).sum() / counts.sum())
    deviation = math.sqrt(float((counts * (levels - mean) ** 2).sum() / counts.sum()))
    return Standardisation(mean, deviation)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself. A CPU that does not would be slower for it, not faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
