"""A look inside a run: what the networks do, and the ways in which adversarial training goes wrong, recognised.

The measurements take the same images and the same draws of the prior throughout a run, so that only the networks change
from one to the next. Nothing here draws from training's random numbers or changes a network.
"""

import copy
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from training.config import Recipe
from training.fidelity import sharpness_ratio, variety_ratio
from training.state import Batches, TrainingState

LOG_EVERY = 10  # steps between two lines of log.jsonl
DIAGNOSE_EVERY = 50  # steps between two lines with measurements
IMAGES = 32

PATIENCE = 3  # measurements in a row that show a problem before it is one, and that do not before it is over
WINDOW = 20  # lines within which a loss has to move
CONSTANT = 0.003  # standard deviation of a loss, as a share of it
DIVERGED = 2.0  # times the lowest reconstruction loss so far, if that is also more than at the start
UNBOUNDED = 1000.0  # no discriminator's loss is as large: images of 512 pixels are some 500 apart
FLAT = 0.02  # standard deviation of a discriminator's logits
BLIND = 0.001  # their margin, as a share of it
SURE = 8.0  # margin of a discriminator's logits: a loss of 0.04
NARROW = 0.1  # standard deviation of a code, where the prior has 1
FEW = 1.5  # effective dimensions of a code
ALIKE = 0.05  # variance of samples, as a share of that of images


def fixed_images(state: TrainingState, recipe: Recipe, count: int) -> tuple[Tensor, Tensor]:
    """The same training images, or windows of them, whenever it is asked: (B, C, W, W), and places (B, 2, W, W)."""
    batches = Batches(state.batches.pixels, batch_size=count, crop=recipe.window, seed=recipe.seed + 2)
    pixels, places, _ = batches.next()
    return state.networks.standardisation(pixels).contiguous(memory_format=torch.channels_last), places


def fixed_draws(shape: torch.Size, state: TrainingState, recipe: Recipe) -> Tensor:
    """The same draws of N(0, I) whenever it is asked."""
    device = state.generator.device
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(recipe.seed + 2), device=device)


def as_in_training(network: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy that answers as the network does in training: the running statistics of its batch norms may move."""
    return copy.deepcopy(network).train(recipe.train_flag)


@torch.no_grad()
def measure(state: TrainingState, recipe: Recipe, images: Tensor) -> dict[str, float]:
    """What the networks do with what they see of `fixed_images`, and with as many draws of the prior.

    docs/training.md says what each figure means. Those of an adversary that is left out are missing.
    """
    encoder, decoder = (as_in_training(part, recipe) for part in (state.networks.encoder, state.networks.decoder))
    with state.autocast:
        codes: Tensor = encoder(images).float()
        draws = fixed_draws(codes.shape, state, recipe)
        reconstructions, samples = decoder(codes).float(), decoder(draws).float()
    found = gradient_norms(state)
    half = len(images) // 2
    if recipe.latent_weight:
        found |= judgement("latent", as_in_training(state.latent_discriminator, recipe), draws, codes, state)
    if recipe.image_weight:
        fakes = torch.cat([reconstructions[:half], samples[half:]])  # as in training
        found |= judgement("image", as_in_training(state.image_discriminator, recipe), images, fakes, state)
    found |= code_statistics(codes)
    found["sharpness/reconstructions"] = sharpness_ratio(reconstructions, images)
    found["sharpness/samples"] = sharpness_ratio(samples, images)
    found["variety/samples"] = variety_ratio(samples, images)
    return found


def gradient_norms(state: TrainingState) -> dict[str, float]:
    """Of each network, the norm of the gradient of the last step in which it learned."""
    networks = {
        "encoder": state.networks.encoder,
        "decoder": state.networks.decoder,
        "head": state.networks.head,
        "latent_discriminator": state.latent_discriminator,
        "image_discriminator": state.image_discriminator,
    }
    norms = {}
    for name, network in networks.items():
        parameters = network.parameters() if network else ()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            norms[f"gradient_norm/{name}"] = float(get_total_norm(gradients))
    return norms


def judgement(
    name: str, discriminator: nn.Module, real: Tensor, fake: Tensor, state: TrainingState
) -> dict[str, float]:
    """How well a discriminator tells real from fake samples, and how much its logits differ at all."""
    with state.autocast:
        logits_real, logits_fake = discriminator(real).float(), discriminator(fake).float()
    return {
        f"{name}/margin": float(logits_real.mean() - logits_fake.mean()),
        f"{name}/accuracy_real": float((logits_real > 0).float().mean()),
        f"{name}/accuracy_fake": float((logits_fake < 0).float().mean()),
        f"{name}/spread": float(torch.cat([logits_real, logits_fake]).std(correction=0)),
    }


def code_statistics(codes: Tensor) -> dict[str, float]:
    """How codes (B, D, G, G) are spread, each cell one of n samples of D numbers.

    mean and std: root mean squares over the dimensions of their means and of their standard deviations: 0 and 1 under
    N(0, I). effective_dimensions: the participation ratio of the covariance's eigenvalues, (sum)^2 / sum of squares: D
    under N(0, I). The sum of squares is without the bias that few samples give it (Srivastava, Some tests concerning
    the covariance matrix in high dimensional data, 2005, equation 2.2).
    """
    samples = codes.permute(0, 2, 3, 1).flatten(0, 2).double()  # (n, D)
    dimensions, degrees = samples.shape[1], len(samples) - 1
    mean = samples.mean(dim=0)
    covariance = (samples - mean).T @ (samples - mean) / degrees
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    if degrees > 1:
        squares = degrees**2 / ((degrees - 1) * (degrees + 2)) * (squares - trace**2 / degrees)
    # All the same, or spread so evenly that chance makes the sum of squares too small.
    effective = 0.0 if trace < 1e-12 else min(trace**2 / max(squares, 1e-24), float(dimensions))
    return {
        "code/mean": math.sqrt(float(mean.square().mean())),
        "code/std": math.sqrt(trace / dimensions),
        "code/effective_dimensions": effective,
        "code/dimensions": float(dimensions),
    }


@dataclass(frozen=True)
class Finding:
    """A recognised problem; a line of findings.jsonl."""

    step: int
    name: str
    figure: float
    message: str


@dataclass(frozen=True)
class _Check:
    """Whether a problem shows in a line of the log; the message says what to try."""

    name: str
    shows: bool
    figure: float
    message: str
    patience: int = PATIENCE  # lines in a row before it is a problem
    over: int = PATIENCE  # and before it is over


class Watch:
    """Recognises problems in the lines of a run's log, in their order.

    A run that is resumed shows it the lines that it has: it keeps nothing else.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # What comes before all other advice.
        self._first = "" if recipe.train_flag else "batch norm does not normalise; set train_flag = true first, then "
        # The adversaries' losses are not those of every step: as many of them that are new.
        self.window = WINDOW * math.ceil(recipe.adversary_every * recipe.discriminator_every / LOG_EVERY)
        self.losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.window))
        self.first, self.lowest = 0.0, math.inf  # reconstruction losses, medians of three
        self.streaks: dict[str, int] = defaultdict(int)  # lines in a row that show a problem; negative: that do not
        self.present: set[str] = set()

    def see(self, line: dict[str, float]) -> list[Finding]:
        """The problems that become apparent with this line: once each, and again only after they were over."""
        findings = []
        for check in [*self._diverging(line), *self._constant(line), *self._measured(line)]:
            streak = self.streaks[check.name]
            streak = max(streak, 0) + 1 if check.shows else min(streak, 0) - 1
            self.streaks[check.name] = streak
            if streak >= check.patience and check.name not in self.present:
                self.present.add(check.name)
                findings.append(Finding(int(line["step"]), check.name, check.figure, check.message))
            elif streak <= -check.over:
                self.present.discard(check.name)
        return findings

    def _diverging(self, line: dict[str, float]) -> Iterator[_Check]:
        now = statistics.median([*self.losses["reconstruction"], line["reconstruction"]][-3:])
        self.first = self.first or now
        self.lowest = min(self.lowest, now)
        yield _Check(
            "diverging",
            now > max(DIVERGED * self.lowest, self.first),
            now,
            f"the reconstruction loss has risen from {self.lowest:.3g} to {now:.3g}, more than that of networks that "
            f"have learned nothing: try a smaller learning_rate, or smaller weights of the adversaries.",
            patience=1,
            over=WINDOW,
        )
        for name in ("latent_discriminator", "image_discriminator"):
            loss = line.get(name, 0.0)
            yield _Check(
                f"diverging/{name}",
                abs(loss) > UNBOUNDED,
                loss,
                f"the {name} loss is {loss:.3g}: try a smaller discriminator_learning_rate.",
                patience=1,
                over=WINDOW,
            )

    def _constant(self, line: dict[str, float]) -> Iterator[_Check]:
        for name, loss in line.items():
            if "/" in name or name in ("step", "images_per_second"):
                continue
            losses = self.losses[name]
            losses.append(loss)
            if len(losses) < self.window:
                continue
            mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
            share = deviation / abs(mean) if mean else 0.0
            yield _Check(
                f"constant/{name}",
                deviation <= CONSTANT * abs(mean),
                share,
                f"the {name} loss has been {mean:.4g} for {self.window * LOG_EVERY} steps, give or take {share:.2%}: "
                f"{_what_moves(name, self.recipe)}",
                patience=1,
                over=WINDOW,
            )

    def _measured(self, line: dict[str, float]) -> Iterator[_Check]:
        for adversary, loss in (("latent", self.recipe.latent_loss), ("image", self.recipe.image_loss)):
            if f"{adversary}/margin" not in line:
                continue
            spread, margin = line[f"{adversary}/spread"], line[f"{adversary}/margin"]
            blind = spread >= FLAT and abs(margin) < BLIND * spread
            yield _Check(
                f"dead_discriminator/{adversary}",
                spread < FLAT or blind,
                margin if blind else spread,
                f"the {adversary} discriminator's answers to real and to fake have one mean, {margin:.1g} apart: "
                f"{_what_moves(adversary, self.recipe)}"
                if blind
                else f"the {adversary} discriminator answers nearly the same to everything, with a deviation of "
                f"{spread:.2g}: {self._first}try a larger discriminator_learning_rate, more {adversary}_n_critic, or a "
                f"smaller {adversary}_weight.",
            )
            if loss == "bce":
                right = min(line[f"{adversary}/accuracy_real"], line[f"{adversary}/accuracy_fake"])
                yield _Check(
                    f"saturated_discriminator/{adversary}",
                    right >= 0.99 and margin > SURE,
                    margin,
                    f"the {adversary} discriminator is sure of all that is real and of all that is not, by a margin "
                    f"of {margin:.3g}: it has little left to teach; try a smaller discriminator_learning_rate, a "
                    f"larger discriminator_every, or {adversary}_loss = wgan-gp.",
                )
        if "code/std" not in line:
            return
        spread, effective = line["code/std"], line["code/effective_dimensions"]
        # Without the latent adversary nothing says how large a code should be.
        narrow = bool(self.recipe.latent_weight) and spread < NARROW
        yield _Check(
            "collapsed_code",
            narrow or (effective < FEW and line["code/dimensions"] > 3),
            spread if narrow else effective,
            f"the codes of different images differ by {spread:.2g}, where the prior has 1, and in {effective:.1f} of "
            f"{line['code/dimensions']:.0f} dimensions: {self._first}try a smaller latent_weight, or a larger "
            f"l2_weight.",
        )
        if self.recipe.image_weight:
            variety = line["variety/samples"]
            yield _Check(
                "collapsed_generator",
                variety < ALIKE,
                variety,
                f"samples of the prior differ among themselves {variety:.2g} times as much as images do: {self._first}"
                f"try image_loss = wgan-gp, a smaller image_weight, or a smaller discriminator_learning_rate.",
            )


def _what_moves(loss: str, recipe: Recipe) -> str:
    adversary = loss.partition("_")[0]
    if adversary not in ("latent", "image"):
        return "try a larger learning_rate, or more steps of a smaller one."
    if not recipe.train_flag:
        return "batch norm does not normalise; try train_flag = true."
    if getattr(recipe, f"{adversary}_discriminator_norm") == "batch":
        other = "none" if adversary == "latent" else "group"
        return (
            f"batch norm takes from a batch, real or fake, what sets it apart; try {adversary}_discriminator_norm = "
            f"{other}."
        )
    return f"try another discriminator_learning_rate, or more {adversary}_n_critic, or another {adversary}_loss."
