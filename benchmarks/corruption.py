"""Synthetic defects: what they look like, and how much of a training step they take.

    python -m benchmarks.corruption [DATA]

Draws them on good images of DATA, a folder in MVTec layout, or else on parts that the program draws: a sheet with a row
per filling and one of shapes, in docs/images/corruption.png. Then times them on a batch of the default recipe, and
the recipe's training steps on random pixels. Prints both, writes docs/benchmarks/corruption.json.
"""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.results import write_results
from models.images import image_tensor
from models.networks import Standardisation
from training.config import Recipe, load_recipe
from training.corruption import SMALL, VISIBLE, Draws, altered, corrupt, painted, pasted, radii_on, roughened, shapes
from training.data import load_images, read_dataset
from training.demo import draw_part
from training.loop import train
from training.state import Batches, TrainingState, standardisation_of

SHEET = Path("docs/images/corruption.png")
RESULT = Path("docs/benchmarks/corruption.json")
PARTS = 64  # of which windows are cut
PAIRS = 4  # in a row of the sheet: a window with a defect, and where it is
LABEL, GAP = 88, 4  # pixels: the width of a row's name, and the space between windows
FILLINGS: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "painted": painted,
    "moved": pasted,
    "altered": altered,
    "roughened": roughened,
}


def main(
    data: Annotated[Path | None, typer.Argument(help="A folder in MVTec layout. [default: parts drawn here]")] = None,
    calls: Annotated[int, typer.Option(help="How many batches to damage.", min=1)] = 50,
    rounds: Annotated[int, typer.Option(help="How many rounds of steps, from adversaries to adversaries.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Of the defects on the sheet.")] = 1,
) -> None:
    recipe = load_recipe("default", [])
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    sheet(good_images(data, recipe), recipe, seed=seed).save(SHEET, optimize=True)
    typer.echo(f"sheet: {SHEET}")

    damage = seconds_to_damage(recipe, calls)
    round_of_steps = seconds_of_a_round(recipe, rounds)
    share = damages_in_a_round(recipe) * damage / round_of_steps
    batch = (recipe.batch_size, recipe.channels, recipe.window, recipe.window)
    record = {
        "command": f"python -m benchmarks.corruption --calls {calls} --rounds {rounds}",
        "batch": batch,
        "corrupt_ms": round(1000 * damage, 2),
        "step_ms": round(1000 * round_of_steps / recipe.adversary_every, 2),
        "share_of_training": round(share, 4),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_results(RESULT, record)
    typer.echo(f"corrupt(): {record['corrupt_ms']} ms for a batch of {' x '.join(str(side) for side in batch)}")
    typer.echo(f"a training step: {record['step_ms']} ms, of which {share:.1%} to draw defects")


# The sheet


def good_images(data: Path | None, recipe: Recipe) -> Tensor:
    """uint8 (N, C, S, S), N up to PARTS."""
    if data is not None:
        paths = read_dataset(data).good
        # From all over the folder: neighbours may be photographs of one part.
        return load_images(paths[:: -(-len(paths) // PARTS)], channels=recipe.channels, size=recipe.image_size)
    parts = [draw_part(np.random.default_rng([0, index])).image for index in range(PARTS)]
    return torch.stack([image_tensor(part, channels=recipe.channels, size=recipe.image_size) for part in parts])


def sheet(pixels: Tensor, recipe: Recipe, *, seed: int) -> Image.Image:
    """Rows of windows as the training sees them, each with its defect and, to the right, its shape or its mask."""
    standardisation = standardisation_of(pixels)
    repeated = pixels[torch.arange(PARTS) % len(pixels)]  # a small folder: other windows of the same parts
    batches = Batches(repeated, batch_size=PARTS, crop=recipe.window, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[str, list[Tensor]]] = []
    for name, filling in FILLINGS.items():
        windows = standardisation(batches.next()[0])
        draws = Draws(len(windows), generator)
        opacity = shapes(draws, recipe.window, radii_on(min(recipe.window, SMALL)))
        damaged = torch.lerp(windows, filling(windows, draws), opacity)
        rows.append((name, in_pairs(telling(windows, damaged, opacity), damaged, opacity, standardisation)))
    for name in ("as trained", ""):
        windows = standardisation(batches.next()[0])
        damaged, masks = corrupt(windows, probability=recipe.corruption, generator=generator)
        rows.append((name, in_pairs(telling(windows, damaged, masks), damaged, masks, standardisation)))
    drawn = shapes(Draws(8 * PARTS, generator), recipe.window, radii_on(min(recipe.window, SMALL)))
    large_enough = (drawn.mean(dim=(1, 2, 3)) > 0.005).nonzero().flatten().tolist()
    for name, first in (("shapes", 0), ("", 2 * PAIRS)):
        rows.append((name, [drawn[index] for index in large_enough[first : first + 2 * PAIRS]]))
    return laid_out(rows, size=recipe.window)


def telling(windows: Tensor, damaged: Tensor, where: Tensor) -> list[int]:
    """Which defects show well at this size, and leave enough of the part to see them by."""
    changed = ((damaged - windows).abs().mean(dim=1) > VISIBLE).float().mean(dim=(1, 2))
    covered = where.mean(dim=(1, 2, 3))
    chosen: list[int] = ((covered > 0.01) & (covered < 0.15) & (changed > 0.15 * covered)).nonzero().flatten().tolist()
    return chosen[:: max(1, len(chosen) // PAIRS)][:PAIRS]  # kinds come one after the other


def in_pairs(chosen: list[int], damaged: Tensor, where: Tensor, standardisation: Standardisation) -> list[Tensor]:
    intensities = standardisation.intensities(damaged)
    return [window for index in chosen for window in (intensities[index], where[index])]


def laid_out(rows: list[tuple[str, list[Tensor]]], *, size: int) -> Image.Image:
    """A white sheet. A row: its name, and windows (C, S, S) or (1, S, S) of intensities in [0, 1]."""
    step = size + GAP
    picture = Image.new("RGB", (LABEL + 2 * PAIRS * step, len(rows) * step + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for row, (name, windows) in enumerate(rows):
        top = GAP + row * step
        draw.text((GAP, top + size // 2), name, fill="black", font=font, anchor="lm")
        for column, window in enumerate(windows):
            levels = (255 * window.clamp(0, 1)).round().byte().expand(3, -1, -1)
            tile = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
            picture.paste(tile, (LABEL + column * step, top))
    return picture.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes


# How long


def damages_in_a_round(recipe: Recipe) -> int:
    """How many batches are damaged from one step with adversaries to the next: as training.loop.train does."""
    critics = recipe.latent_n_critic * bool(recipe.latent_weight) + recipe.image_n_critic * bool(recipe.image_weight)
    return recipe.adversary_every + critics


def seconds_to_damage(recipe: Recipe, calls: int) -> float:
    """The median."""
    size = recipe.window
    generator = torch.Generator().manual_seed(recipe.seed)
    images = 0.5 * torch.randn((recipe.batch_size, recipe.channels, size, size), generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)  # as training.loop has them
    seconds = []
    for _ in range(calls + 1):
        begin = time.perf_counter()
        corrupt(images, probability=recipe.corruption, generator=generator)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])  # the first call sets much up


def seconds_of_a_round(recipe: Recipe, rounds: int) -> float:
    """The median, of as many steps as lie between two with adversaries."""
    every = recipe.adversary_every
    recipe = replace(recipe, steps=(rounds + 1) * every)
    shape = (2 * recipe.batch_size, recipe.channels, recipe.image_size, recipe.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(recipe.seed))
    state = TrainingState(recipe, pixels, device=torch.device("cpu"))
    ends: list[float] = []
    train(state, recipe, lambda _: ends.append(time.perf_counter()))
    ends = ends[every - 1 :: every]  # the first round sets much up
    return statistics.median(end - begin for begin, end in itertools.pairwise(ends))


if __name__ == "__main__":
    typer.run(main)
