"""train(): the adversarial autoencoder's algorithm, readable from top to bottom.

Adversarial Autoencoders (Makhzani et al., arXiv 1511.05644), section 2, with a second adversary on images. At each
step, on fresh batches: the latent discriminator learns to tell codes from draws of N(0, I), the image discriminator
to tell decoded images from photographed ones, and the autoencoder to rebuild its images and to deceive both.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from models.errors import TrainingDivergedError
from models.networks import Decoder, Encoder, ImageDiscriminator, LatentDiscriminator
from models.scoring import normalise
from training.config import AdversarialLoss, Recipe
from training.corruption import corrupt
from training.losses import discriminator_loss, generator_loss, gradient_penalty, reconstruction_loss

# Adam's betas of DCGAN (arXiv 1511.06434, section 4): a high first beta makes an adversary oscillate.
BETAS = (0.5, 0.999)


class Batches:
    """Shuffled batches of (B, C, S, S) in [-1, 1], pass after pass without repeats; `drawn` says where it stands."""

    def __init__(self, pixels: Tensor, *, batch_size: int, seed: int) -> None:
        self.pixels = pixels  # uint8 (N, C, S, S), all in the device's memory
        self.batch_size = min(batch_size, len(pixels))
        self.seed = seed
        self.drawn = 0
        self._order = self._shuffled(0)

    def next(self) -> Tensor:
        per_pass = len(self.pixels) // self.batch_size
        index = self.drawn % per_pass
        if index == 0:
            self._order = self._shuffled(self.drawn // per_pass)
        self.drawn += 1
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return normalise(self.pixels[chosen.to(self.pixels.device)])

    def resume(self, drawn: int) -> None:
        self.drawn = drawn
        self._order = self._shuffled(drawn // (len(self.pixels) // self.batch_size))

    def _shuffled(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(len(self.pixels), generator=generator)


class TrainingState:
    """All that a step reads and changes. Saved and loaded, training goes on as if it had never stopped."""

    def __init__(self, recipe: Recipe, pixels: Tensor, *, device: torch.device) -> None:
        """pixels: the training images, uint8 (N, C, S, S), at least two."""
        config = recipe.model_config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.encoder = Encoder(config).to(device)
            self.decoder = Decoder(config).to(device)
            self.latent_discriminator = LatentDiscriminator(config).to(device)
            self.image_discriminator = ImageDiscriminator(config).to(device)
        # The weights that score: an exponential moving average smooths what the adversaries stir up.
        self.averaged = nn.Sequential(copy.deepcopy(self.encoder), copy.deepcopy(self.decoder))
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.autoencoder_optimizer = torch.optim.Adam(autoencoder, betas=BETAS)
        self.latent_optimizer = torch.optim.Adam(self.latent_discriminator.parameters(), betas=BETAS)
        self.image_optimizer = torch.optim.Adam(self.image_discriminator.parameters(), betas=BETAS)
        self.batches = Batches(pixels.to(device), batch_size=recipe.batch_size, seed=recipe.seed)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=recipe.mixed_precision and device.type == "cuda"
        )
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
            "encoder": self.encoder,
            "decoder": self.decoder,
            "latent_discriminator": self.latent_discriminator,
            "image_discriminator": self.image_discriminator,
            "averaged": self.averaged,
            "autoencoder_optimizer": self.autoencoder_optimizer,
            "latent_optimizer": self.latent_optimizer,
            "image_optimizer": self.image_optimizer,
        }


def train(state: TrainingState, recipe: Recipe, after_step: Callable[[dict[str, float]], None]) -> None:
    """Bring `state` from its step to the recipe's last. `after_step` gets the losses of each step by name.

    Raises TrainingDivergedError at the first loss that is not finite.
    """
    while state.step < recipe.steps:
        set_learning_rates(state, recipe)
        losses: dict[str, Tensor] = {}
        # Without a weight an adversary has no say: it is not trained either.
        if recipe.latent_weight:
            for _ in range(recipe.latent_n_critic):
                losses |= latent_discriminator_step(state, recipe)
        if recipe.image_weight:
            for _ in range(recipe.image_n_critic):
                losses |= image_discriminator_step(state, recipe)
        losses |= autoencoder_step(state, recipe)
        average_weights(state, recipe)
        state.step += 1
        after_step(finite_losses(losses, state.step))


def latent_discriminator_step(state: TrainingState, recipe: Recipe) -> dict[str, Tensor]:
    """Tell codes from draws of the prior."""
    images = state.batches.next()
    with torch.no_grad(), state.autocast:
        codes = _codes(images, state, recipe).float()
    return _discriminator_step(
        "latent",
        recipe.latent_loss,
        state,
        recipe,
        discriminator=state.latent_discriminator,
        optimizer=state.latent_optimizer,
        real=_prior(codes.shape, state),
        fake=codes,
    )


def image_discriminator_step(state: TrainingState, recipe: Recipe) -> dict[str, Tensor]:
    """Tell photographed images from decoded ones: half of these from codes, half from draws of the prior."""
    images = state.batches.next()
    state.decoder.train()
    with torch.no_grad(), state.autocast:
        codes = _codes(images, state, recipe)
        fake = _fakes(codes, state.decoder(codes), state)
    return _discriminator_step(
        "image",
        recipe.image_loss,
        state,
        recipe,
        discriminator=state.image_discriminator,
        optimizer=state.image_optimizer,
        real=images,
        fake=fake,
    )


def _discriminator_step(
    name: str,
    kind: AdversarialLoss,
    state: TrainingState,
    recipe: Recipe,
    *,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    real: Tensor,
    fake: Tensor,
) -> dict[str, Tensor]:
    """One step of either discriminator. `fake` carries no graph: the autoencoder does not learn here."""
    discriminator.train().requires_grad_(True)
    with state.autocast:
        logits_real, logits_fake = discriminator(real).float(), discriminator(fake).float()
    loss = discriminator_loss(kind, logits_real, logits_fake)
    losses = {f"{name}_discriminator": loss.detach()}
    if kind == "wgan-gp":
        penalty = gradient_penalty(discriminator, real, fake, generator=state.generator)
        loss = loss + recipe.gradient_penalty_weight * penalty
        losses[f"{name}_penalty"] = penalty.detach()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return losses


def autoencoder_step(state: TrainingState, recipe: Recipe) -> dict[str, Tensor]:
    """Rebuild the images without their synthetic defects, and deceive both discriminators."""
    images = state.batches.next()
    state.decoder.train()
    with state.autocast:
        codes = _codes(images, state, recipe)
        reconstructions = state.decoder(codes)  # (B, C, S, S)
    codes, reconstructions = codes.float(), reconstructions.float()
    loss = reconstruction_loss(
        reconstructions,
        images,
        l2_weight=recipe.l2_weight,
        ssim_weight=recipe.ssim_weight,
        gradient_weight=recipe.gradient_weight,
    )
    losses = {"reconstruction": loss.detach()}
    if recipe.latent_weight:
        state.latent_discriminator.requires_grad_(False)
        with state.autocast:
            logits = state.latent_discriminator(codes)
        adversarial = generator_loss(recipe.latent_loss, logits.float())
        loss = loss + recipe.latent_weight * adversarial
        losses["latent_adversarial"] = adversarial.detach()
    if recipe.image_weight:
        state.image_discriminator.requires_grad_(False)
        with state.autocast:
            logits = state.image_discriminator(_fakes(codes, reconstructions, state))
        adversarial = generator_loss(recipe.image_loss, logits.float())
        loss = loss + recipe.image_weight * adversarial
        losses["image_adversarial"] = adversarial.detach()
    state.autoencoder_optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    state.autoencoder_optimizer.step()
    return losses


def _codes(images: Tensor, state: TrainingState, recipe: Recipe) -> Tensor:
    """Codes (B, D, G, G) of the images, some of which get a synthetic defect first."""
    state.encoder.train()
    damaged, _ = corrupt(images, probability=recipe.corruption, generator=state.generator)
    codes: Tensor = state.encoder(damaged)
    return codes


def _fakes(codes: Tensor, reconstructions: Tensor, state: TrainingState) -> Tensor:
    """What the image discriminator is shown: half reconstructions, half decoded draws of the prior. (B, C, S, S).

    The draws are decoded by themselves: batch norm would mix them with the codes.
    """
    half = len(codes) // 2
    samples = state.decoder(_prior(codes[half:].shape, state))
    return torch.cat([reconstructions[:half].float(), samples.float()])


def _prior(shape: torch.Size, state: TrainingState) -> Tensor:
    return torch.randn(shape, generator=state.generator, device=state.generator.device)


def set_learning_rates(state: TrainingState, recipe: Recipe) -> None:
    """constant, or cosine: from the full rate down to zero at the last step (Loshchilov and Hutter, 1608.03983)."""
    factor = 1.0
    if recipe.schedule == "cosine":
        factor = (1 + math.cos(math.pi * state.step / recipe.steps)) / 2
    for optimizer, rate in (
        (state.autoencoder_optimizer, recipe.learning_rate),
        (state.latent_optimizer, recipe.discriminator_learning_rate),
        (state.image_optimizer, recipe.discriminator_learning_rate),
    ):
        for group in optimizer.param_groups:
            group["lr"] = factor * rate


@torch.no_grad()
def average_weights(state: TrainingState, recipe: Recipe) -> None:
    # The first steps are forgotten sooner: an average that began at random weights would keep them for long.
    decay = min(recipe.ema, (1 + state.step) / (10 + state.step))
    live = nn.Sequential(state.encoder, state.decoder)
    for average, parameter in zip(state.averaged.parameters(), live.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def finite_losses(losses: dict[str, Tensor], step: int) -> dict[str, float]:
    """The losses as numbers. Raises TrainingDivergedError naming the first that is not finite."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"the {name} loss is {value} at step {step}: a smaller learning rate, or a smaller weight of the "
                f"adversaries, may help."
            )
    return values


def scoring_networks(state: TrainingState) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder that score: averaged weights, in eval mode.

    Batch norm's running statistics are measured anew on the training images as they are. Those gathered during
    training also saw synthetic defects and draws from the prior, and belong to other weights.
    """
    averaged = copy.deepcopy(state.averaged)
    pixels = state.batches.pixels
    # Chunks of one size within one image: update_bn weighs them alike.
    chunks = torch.tensor_split(pixels, math.ceil(len(pixels) / 64))
    update_bn((normalise(chunk) for chunk in chunks), averaged)
    encoder, decoder = averaged.eval()
    return encoder, decoder
