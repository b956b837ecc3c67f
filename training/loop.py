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
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import TrainingDivergedError
from models.features import SPOTS
from models.networks import ImageDiscriminator, LatentDiscriminator, ScoringNetworks, Standardisation, places_of
from training.config import AdversarialLoss, Recipe
from training.corruption import corrupt, corrupt_features
from training.losses import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    reconstruction_loss,
    segmentation_loss,
)

BETAS = (0.9, 0.999)
# Adam's betas of DCGAN (arXiv 1511.06434, section 4): a high first beta makes an adversary oscillate.
ADVERSARY_BETAS = (0.5, 0.999)
WARMUP = 50  # steps
STATISTICS_BATCHES = 50  # from which batch norm's running statistics are measured
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
        corners = torch.randint(self.pixels.shape[-1] - self.crop + 1, (len(chosen), 2), generator=generator)
        self.drawn += 1
        windows = [(slice(top, top + self.crop), slice(left, left + self.crop)) for top, left in corners.tolist()]
        pixels = [self.pixels[image, :, *window] for image, window in zip(chosen.tolist(), windows, strict=True)]
        places = torch.stack([self.places[:, *window] for window in windows])
        directions = None if self.directions is None else self.directions[chosen.to(self.directions.device)]
        return torch.stack(pixels), places, directions

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
    chunks = torch.split(pixels, FEATURE_BATCH)
    return torch.cat([networks.features.directions(chunk.float() / 255).half() for chunk in chunks])


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


def train(state: TrainingState, recipe: Recipe, after_step: Callable[[dict[str, float]], None]) -> None:
    """Bring `state` from its step to the recipe's last. `after_step` gets the losses of each step by name.

    Raises TrainingDivergedError at the first loss that is not finite.
    """
    while state.step < recipe.steps:
        set_learning_rates(state, recipe)
        losses: dict[str, Tensor] = {}
        # Without a weight an adversary has no say: it is not trained either. Its share of a step's time is large, its
        # say small: as with the regularisation of StyleGAN2 (arXiv 1912.04958, section 3.1), not every step needs it.
        latent, image = (
            bool(weight) and state.step % recipe.adversary_every == 0
            for weight in (recipe.latent_weight, recipe.image_weight)
        )
        learning = state.step // recipe.adversary_every % recipe.discriminator_every == 0
        for _ in range(recipe.latent_n_critic if latent and learning else 0):
            losses |= latent_discriminator_step(state, recipe)
        for _ in range(recipe.image_n_critic if image and learning else 0):
            losses |= image_discriminator_step(state, recipe)
        losses |= autoencoder_step(state, recipe, latent=latent, image=image)
        average_weights(state, recipe)
        state.step += 1
        after_step(finite_losses(losses, state.step))


def latent_discriminator_step(state: TrainingState, recipe: Recipe) -> dict[str, Tensor]:
    """Tell codes from draws of the prior."""
    _, damaged, _, _ = _damaged(state, recipe, quick=True)
    with torch.no_grad(), state.autocast:
        codes = state.networks.encoder(damaged).float()
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
    """Tell photographed images from decoded ones: half of these from codes, half from draws of the prior.

    Patches with a synthetic defect are fakes too: what the discriminator learns of defects it passes on to the decoder
    (OCR-GAN, arXiv 2203.00259, section 3.3).
    """
    _, damaged, masks, _ = _damaged(state, recipe, quick=True)
    with torch.no_grad(), state.autocast:
        codes = state.networks.encoder(damaged)
        fake = _fakes(codes, state.networks.decoder(codes), state)
    return _discriminator_step(
        "image",
        recipe.image_loss,
        state,
        recipe,
        discriminator=state.image_discriminator,
        optimizer=state.image_optimizer,
        real=damaged,
        fake=fake,
        defects=masks,
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
    defects: Tensor | None = None,
) -> dict[str, Tensor]:
    """One step of either discriminator. `fake` carries no graph: the autoencoder does not learn here.

    defects: (B, 1, W, W), 1 where logits of `real` are to count as those of fakes.
    """
    discriminator.train(recipe.train_flag).requires_grad_(True)
    with state.autocast:
        logits_real, logits_fake = discriminator(real).float(), discriminator(fake).float()
    if defects is not None:
        damaged = F.adaptive_max_pool2d(defects, logits_real.shape[-1]) > 0
        logits_fake = torch.cat([logits_fake.flatten(), logits_real[damaged]])
        logits_real = logits_real[~damaged]
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


def autoencoder_step(state: TrainingState, recipe: Recipe, *, latent: bool, image: bool) -> dict[str, Tensor]:
    """Rebuild the images without their synthetic defects, mark the defects, and deceive the discriminators.

    latent, image: whether that discriminator takes part.
    """
    images, damaged, masks, places = _damaged(state, recipe)
    with state.autocast:
        codes, reconstructions, logits, _ = state.networks(damaged, places)
    codes, reconstructions = codes.float(), reconstructions.float()
    loss = reconstruction_loss(
        reconstructions,
        images,
        l2_weight=recipe.l2_weight,
        ssim_weight=recipe.ssim_weight,
        gradient_weight=recipe.gradient_weight,
    )
    losses = {"reconstruction": loss.detach()}
    if latent:
        state.latent_discriminator.train(recipe.train_flag).requires_grad_(False)
        with state.autocast:
            realism = state.latent_discriminator(codes)
        adversarial = generator_loss(recipe.latent_loss, realism.float())
        loss = loss + recipe.latent_weight * adversarial
        losses["latent_adversarial"] = adversarial.detach()
    if image:
        state.image_discriminator.train(recipe.train_flag).requires_grad_(False)
        with state.autocast:
            realism = state.image_discriminator(_fakes(codes, reconstructions, state))
        adversarial = generator_loss(recipe.image_loss, realism.float())
        loss = loss + recipe.image_weight * adversarial
        losses["image_adversarial"] = adversarial.detach()
    if logits is not None:
        # From defects in features the head would learn what a seam between them looks like, which no real defect has.
        own = slice(int(recipe.feature_corruption * len(masks)), None)
        segmentation = segmentation_loss(logits[own].float(), masks_of_cells(masks[own], state.networks.config.cell))
        loss = loss + recipe.head_weight * segmentation
        losses["segmentation"] = segmentation.detach()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    return losses


def masks_of_cells(masks: Tensor, cell: int) -> Tensor:
    """Masks (B, 1, H, W) -> (B, 1, H / cell, W / cell): a cell of which a quarter is a defect is one, or a crack would
    be none."""
    return masks if cell == 1 else (4 * F.avg_pool2d(masks, cell)).clamp(max=1)


def _damaged(state: TrainingState, recipe: Recipe, *, quick: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the networks see of the next images, (B, C, W, W) or features (B, F, W/8, W/8), the same with synthetic
    defects, the defects' masks (B, 1, W, W), and the places of the pixels.

    quick: over features, draw all defects in these. What is done with them is training: the networks that see them are
    put into train mode, if the recipe says so.
    """
    pixels, places, directions = state.batches.next()
    state.networks.train(recipe.train_flag)
    features = state.networks.features
    if features is None:
        images = _images(pixels, state, recipe)
        damaged, masks = corrupt(images, probability=recipe.corruption, generator=state.generator)
        return images, damaged, masks, places
    count = len(pixels) if quick else int(recipe.feature_corruption * len(pixels))
    if directions is None:
        images = _images(pixels, state, recipe)
        seen, images = state.networks.see(images), images[count:]
    else:
        seen, images = features.standardised(directions.float()), _images(pixels[count:], state, recipe)
    damaged, masks = corrupt_features(seen[:count], probability=recipe.corruption, generator=state.generator)
    masks = F.interpolate(masks, scale_factor=float(state.networks.config.cell))
    if count < len(pixels):
        images, own = corrupt(images, probability=recipe.corruption, generator=state.generator)
        damaged, masks = torch.cat([damaged, state.networks.see(images)]), torch.cat([masks, own])
    return seen, damaged, masks, places


def _images(pixels: Tensor, state: TrainingState, recipe: Recipe) -> Tensor:
    """Standardised images (B, C, W, W) of uint8 pixels.

    Each is a little brighter or darker, and of more or less contrast: a lamp that ages is no defect.
    """
    images: Tensor = state.networks.standardisation(pixels)
    draws = 2 * torch.rand((2, len(images), 1, 1, 1), generator=state.generator, device=images.device) - 1
    images = images * (1 + recipe.jitter * draws[0]) + recipe.jitter / 2 * draws[1]
    return images.contiguous(memory_format=torch.channels_last)


def _fakes(codes: Tensor, reconstructions: Tensor, state: TrainingState) -> Tensor:
    """What the image discriminator is shown: half reconstructions, half decoded draws of the prior. (B, C, W, W).

    The draws are decoded by themselves: batch norm would mix them with the codes.
    """
    half = len(codes) // 2
    samples = state.networks.decoder(_prior(codes[half:].shape, state))
    return torch.cat([reconstructions[:half].float(), samples.float()])


def _prior(shape: torch.Size, state: TrainingState) -> Tensor:
    return torch.randn(shape, generator=state.generator, device=state.generator.device)


def set_learning_rates(state: TrainingState, recipe: Recipe) -> None:
    """constant, or cosine: from the full rate down to zero at the last step (Loshchilov and Hutter, 1608.03983)."""
    factor = 1.0
    if recipe.schedule == "cosine":
        factor = (1 + math.cos(math.pi * state.step / recipe.steps)) / 2
    # Adam's first steps follow noise.
    factor *= min(1.0, (state.step + 1) / WARMUP)
    for optimizer, rate in (
        (state.optimizer, recipe.learning_rate),
        (state.latent_optimizer, recipe.discriminator_learning_rate),
        (state.image_optimizer, recipe.discriminator_learning_rate),
    ):
        for group in optimizer.param_groups:
            group["lr"] = factor * rate


@torch.no_grad()
def average_weights(state: TrainingState, recipe: Recipe) -> None:
    # The first steps are forgotten sooner: an average that began at random weights would keep them for long.
    decay = min(recipe.ema, (1 + state.step) / (10 + state.step))
    for average, parameter in zip(state.averaged.parameters(), state.networks.parameters(), strict=True):
        if parameter.requires_grad:  # a backbone is what it was
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


def scoring_networks(state: TrainingState, recipe: Recipe) -> ScoringNetworks:
    """The networks that score: averaged weights, in eval mode.

    Batch norm's running statistics are measured anew: those gathered during training belong to other weights, and the
    decoder's also saw draws from the prior. On images with synthetic defects, as in training: channels that only
    answer to defects would have no scale on good images alone. Not without the train flag: the networks were trained
    with the statistics that they have.
    """
    averaged = copy.deepcopy(state.averaged)
    if not recipe.train_flag:
        return averaged.eval()
    averaged.train()
    # A backbone's stay as they are.
    norms = [module for module in averaged.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    generator = torch.Generator(state.generator.device).manual_seed(recipe.seed)
    batches = Batches(state.batches.pixels, batch_size=recipe.batch_size, crop=state.batches.crop, seed=recipe.seed + 1)
    with torch.no_grad():
        for _ in range(STATISTICS_BATCHES):
            pixels, places, _ = batches.next()
            images = averaged.standardisation(pixels)
            damaged, _ = corrupt(images, probability=recipe.corruption, generator=generator)
            averaged(averaged.see(damaged), places)
    return averaged.eval()
