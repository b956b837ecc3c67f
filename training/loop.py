"""train(): the adversarial autoencoder's algorithm, readable from top to bottom.

Adversarial Autoencoders (Makhzani et al., arXiv 1511.05644), section 2, with a second adversary on images. At each
step, on fresh batches: the latent discriminator learns to tell codes from draws of N(0, I), the image discriminator
to tell decoded images from photographed ones, and the autoencoder to rebuild its images and to deceive both.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.errors import TrainingDivergedError
from models.networks import ScoringNetworks
from training.config import AdversarialLoss, Recipe
from training.corruption import corrupt, corrupt_features
from training.losses import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    reconstruction_loss,
    segmentation_loss,
)
from training.state import Batches, TrainingState

WARMUP = 50  # steps
STATISTICS_BATCHES = 50  # from which batch norm's running statistics are measured


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
    damaged = _damaged(state, recipe, quick=True).seen
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
    batch = _damaged(state, recipe, quick=True)
    with torch.no_grad(), state.autocast:
        codes = state.networks.encoder(batch.seen)
        fake = _fakes(codes, state.networks.decoder(codes), state)
    return _discriminator_step(
        "image",
        recipe.image_loss,
        state,
        recipe,
        discriminator=state.image_discriminator,
        optimizer=state.image_optimizer,
        real=batch.seen,
        fake=fake,
        defects=batch.masks,
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
    batch = _damaged(state, recipe)
    # From defects in features the head would learn what a seam between them looks like, which no real defect has.
    own = slice(batch.in_features, None)
    damaged = batch.seen.contiguous(memory_format=torch.channels_last)
    with state.autocast:
        codes, reconstructions = state.networks.rebuild(damaged)
        logits, _ = state.networks.mark(damaged[own], reconstructions[own], batch.places[own])
    codes, reconstructions = codes.float(), reconstructions.float()
    loss = reconstruction_loss(
        reconstructions,
        batch.whole,
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
        segmentation = segmentation_loss(logits.float(), to_mark(batch.masks[own], state.networks.config))
        loss = loss + recipe.head_weight * segmentation
        losses["segmentation"] = segmentation.detach()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    return losses


def to_mark(masks: Tensor, config: ModelConfig) -> Tensor:
    """What the head is to mark of defects with masks (B, 1, H, W): (B, 1, H / cell, W / cell).

    Of pixels those close to a defect too. Its logits are smoothed before they score, in which a hairline of a pixel or
    two would drown. Of a backbone's features a cell of which a quarter is a defect.
    """
    if config.over_features:
        return (4 * F.avg_pool2d(masks, config.cell)).clamp(max=1)
    close = round(0.75 * config.smoothing)
    return F.max_pool2d(masks, 2 * close + 1, stride=1, padding=close)


class _Batch(NamedTuple):
    whole: Tensor  # what there is to rebuild: (B, C, W, W), or features (B, F, W/8, W/8)
    seen: Tensor  # the same with synthetic defects
    masks: Tensor  # of these, (B, 1, W, W)
    places: Tensor  # of the pixels, (B, 2, W, W)
    in_features: int  # how many of the first have their defects drawn in the features


def _damaged(state: TrainingState, recipe: Recipe, *, quick: bool = False) -> _Batch:
    """The next images, and what the networks see of them.

    quick: over features, draw all defects in these. What is done with them is training: the networks that see them are
    put into train mode, if the recipe says so.
    """
    pixels, places, directions = state.batches.next()
    state.networks.train(recipe.train_flag)
    features = state.networks.features
    if features is None:
        (images,) = _jittered([_images(pixels, state)], recipe, state.generator)
        damaged, masks = corrupt(images, probability=recipe.corruption, generator=state.generator)
        return _Batch(images, damaged, masks, places, in_features=0)
    if directions is None:
        seen = state.networks.see(_images(pixels, state))
    else:
        seen = features.standardised(directions.float())
    count = len(pixels) if quick else int(recipe.feature_corruption * len(pixels))
    damaged, masks = corrupt_features(seen[:count], probability=recipe.corruption, generator=state.generator)
    masks = F.interpolate(masks, scale_factor=float(state.networks.config.cell))
    if count < len(pixels):
        images = _images(pixels[count:], state)
        images, own = corrupt(images, probability=recipe.corruption, generator=state.generator, over_features=True)
        damaged, masks = torch.cat([damaged, state.networks.see(images)]), torch.cat([masks, own])
    seen, damaged = _jittered([seen, damaged], recipe, state.generator)
    return _Batch(seen, damaged, masks, places, in_features=count)


def _images(pixels: Tensor, state: TrainingState) -> Tensor:
    images: Tensor = state.networks.standardisation(pixels)
    return images.contiguous(memory_format=torch.channels_last)


def _jittered(maps: list[Tensor], recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """Standardised images (B, C, W, W), each a little brighter or darker, and of more or less contrast: a lamp that
    ages is no defect. Of features (B, F, W/8, W/8) each channel by itself. All of the maps alike."""
    batch, channels = maps[0].shape[:2]
    shape = (2, batch, channels if recipe.over_features else 1, 1, 1)
    draws = 2 * torch.rand(shape, generator=generator, device=generator.device) - 1
    return [one * (1 + recipe.jitter * draws[0]) + recipe.jitter / 2 * draws[1] for one in maps]


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
            damaged, _ = corrupt(
                images, probability=recipe.corruption, generator=generator, over_features=recipe.over_features
            )
            averaged(averaged.see(damaged), places)
    return averaged.eval()
