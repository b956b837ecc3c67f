"""Pictures of a run: what its networks make of the same images and the same draws of the prior, step after step."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.networks import ScoringNetworks
from models.overlay import HEAT
from training.config import Recipe
from training.corruption import corrupt
from training.diagnostics import as_in_training, fixed_draws, fixed_images
from training.state import TrainingState

FIRST = 50  # steps; then at twice as many, and so on
COLUMNS = 8
ROWS = 3  # of interpolations of either kind
SIDE = 128  # pixels of one image in a picture
GAP = 4
LABELS = 132  # pixels to the left of the rows
MARGIN = 28  # pixels above them
FONT_SIZE = 15

Picture = NDArray[np.uint8]


def is_drawn(step: int, recipe: Recipe) -> bool:
    """At steps 50, 100, 200, 400 and so on, and at the last."""
    times = step // FIRST
    return step == recipe.steps or (step % FIRST == 0 and times & (times - 1) == 0)


@torch.no_grad()
def draw_step(state: TrainingState, recipe: Recipe) -> Image.Image:
    """A grid: training images, half of them with synthetic defects, what is made of them, and samples of the prior.

    The networks answer as they do in training, on this batch: to measure statistics for scoring takes too long.
    """
    images, places = fixed_images(state, recipe, COLUMNS)
    half = len(images) // 2
    generator = torch.Generator(images.device).manual_seed(recipe.seed + 2)
    damaged, _ = corrupt(images[half:], probability=1.0, generator=generator, over_features=recipe.over_features)
    shown = torch.cat([images[:half], damaged]).contiguous(memory_format=torch.channels_last)
    networks = as_in_training(state.networks, recipe)
    assert isinstance(networks, ScoringNetworks)
    with state.autocast:
        seen = networks.see(shown)
        codes, reconstructions, logits, _ = networks(seen, places)
        samples = networks.decoder(fixed_draws(codes.shape, state, recipe))
    residuals = networks.residual(seen, reconstructions.float())
    colours = as_colours(networks, seen)
    rows = [
        ("good, damaged", networks.standardisation.intensities(shown)),
        *([] if networks.features is None else [("their features", colours(seen))]),
        ("reconstructions", colours(reconstructions.float())),
        ("residual map", heat(residuals / residuals.amax().clamp(min=1e-6))),
        *([] if logits is None else [("defects found", heat(logits.float().sigmoid()))]),
        ("samples of\nthe prior", colours(samples.float())),
    ]
    return grid(f"{recipe_line(recipe)}, step {state.step}", rows)


@torch.no_grad()
def draw_interpolations(networks: ScoringNetworks, state: TrainingState, recipe: Recipe) -> Image.Image:
    """Ways from one code to another, decoded: between images, which stand at both ends, and between draws of the prior.

    networks: those that score.
    """
    images, _ = fixed_images(state, recipe, 2 * ROWS)
    seen = networks.see(images[: len(images) // 2 * 2])
    colours = as_colours(networks, seen)
    codes = networks.encoder(seen)
    rows = []
    for index, (first, second) in enumerate(zip(codes[::2], codes[1::2], strict=True)):
        made = colours(networks.decoder(between(first, second, COLUMNS - 2)))
        ends = colours(seen[2 * index : 2 * index + 2])
        rows.append(("image, codes\nbetween, image", torch.cat([ends[:1], made, ends[1:]])))
    draws = fixed_draws(torch.Size([2 * ROWS, *codes.shape[1:]]), state, recipe)
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        rows.append(("between draws\nof the prior", colours(networks.decoder(between(first, second, COLUMNS)))))
    return grid(f"{recipe_line(recipe)}, interpolations at step {state.step}", rows)


def as_colours(networks: ScoringNetworks, seen: Tensor) -> Callable[[Tensor], Tensor]:
    """How to show what networks see, rebuild and make, as intensities (B, C, H, W) in [0, 1] or a little outside.

    Features, (B, F, h, w), have more numbers than there are colours: the three directions in which `seen` varies most.
    """
    if networks.features is None:
        return networks.standardisation.intensities
    flat = seen.transpose(0, 1).flatten(1)  # (F, B h w)
    middle = flat.mean(dim=1, keepdim=True)
    deviations, directions = torch.linalg.eigh((flat - middle) @ (flat - middle).T / flat.shape[1])
    scaled = directions[:, -3:] / (4 * deviations[-3:].clamp(min=1e-6).sqrt())  # (F, 3)
    return lambda features: 0.5 + torch.einsum("bfhw,fc->bchw", features - middle.unsqueeze(2), scaled)


def between(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Codes on the way from one code (D, G, G) to another, both included: (count, D, G, G).

    Spherical (White, arXiv 1609.04468): half-way along a straight line codes are shorter than any draw of N(0, I).
    """
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-0.999999, 0.999999)
    angle = cosine.acos()
    shares = torch.linspace(0, 1, count, device=first.device).view(-1, 1, 1, 1)
    return (((1 - shares) * angle).sin() * first + (shares * angle).sin() * second) / angle.sin()


def heat(maps: Tensor) -> Tensor:
    """Maps (B, 1, S, S) from 0 to 1 -> colours (B, 3, S, S): black, then as in overlays."""
    stops = np.vstack([np.zeros((1, 3)), HEAT]) / 255
    values, steps = maps.clamp(0, 1).squeeze(1).cpu().numpy(), np.linspace(0, 1, len(stops))
    return torch.from_numpy(np.stack([np.interp(values, steps, stops[:, channel]) for channel in range(3)], axis=1))


def grid(title: str, rows: list[tuple[str, Tensor]]) -> Image.Image:
    """A labelled picture of rows of images (B, C, S, S) with intensities in [0, 1]; what lies outside is cut off."""
    font = ImageFont.load_default(FONT_SIZE)
    columns = max(len(images) for _, images in rows)
    size = LABELS + columns * (SIDE + GAP), MARGIN + len(rows) * (SIDE + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, MARGIN / 2), title, fill="black", font=font, anchor="lm")
    for row, (label, images) in enumerate(rows):
        top = MARGIN + row * (SIDE + GAP)
        draw.multiline_text((GAP, top + SIDE / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            picture.paste(_as_picture(image), (LABELS + column * (SIDE + GAP), top))
    return picture


def recipe_line(recipe: Recipe) -> str:
    """What tells runs apart that are looked at side by side."""
    latent, image = recipe.latent_loss, recipe.image_loss
    seen = f", {recipe.features}" if recipe.over_features else ""
    return f"{recipe.image_size} pixels{seen}, latent {latent}, image {image}, batch norm {recipe.batch_norm}"


def _as_picture(image: Tensor) -> Image.Image:
    """(C, S, S) -> RGB of SIDE pixels, each of which stays a square where the image is small."""
    values = (255 * image.clamp(0, 1)).round().byte().cpu()
    pixels = values.expand(3, -1, -1).permute(1, 2, 0).numpy()
    smaller = image.shape[-1] > SIDE
    how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((SIDE, SIDE), how)
