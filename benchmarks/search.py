"""Scoring by reconstruction over features beside scoring by nearest neighbours, as PatchCore does: one backbone.

    python -m benchmarks.search [--recipe features]

Time does not depend on the weights, so these are random. A bank of 20,000 features is what the baseline of
benchmarks/quality.py keeps of its training images; without choosing among them it would grow with every image. One
image at a time, in turn, several rounds; medians. Prints a table in Markdown, writes docs/benchmarks/search.json.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.results import write_results
from benchmarks.speed import noise, scorer_of
from models.config import CELL
from models.features import Features
from models.maps import enlarged, smooth
from training.config import load_recipe

RESULTS = Path("docs/benchmarks/search.json")
ROUNDS = 25
BANK = 20_000
SIDE = 224  # pixels, as the baseline's


@torch.inference_mode()
def main(recipe: Annotated[str, typer.Option(help="Name of a recipe over features.")] = "features") -> None:
    chosen = load_recipe(recipe, [])
    scorer, pixels = scorer_of(chosen, torch.device("cpu")), noise(1, chosen)
    features = scorer.networks.features
    assert features is not None
    small = noise(1, load_recipe(recipe, [f"image_size={SIDE}"])).float() / 255
    bank = F.normalize(torch.randn(BANK, chosen.feature_channels), dim=1)
    found = features.directions(small)
    ways: dict[str, Callable[[], object]] = {
        f"Hazelnut, {chosen.image_size} pixels, to the verdict": lambda: scorer.score(pixels),
        f"its backbone alone, {chosen.image_size} pixels": lambda: features(pixels.float() / 255),
        f"PatchCore, {SIDE} pixels, to the map": lambda: map_of(nearest(features.directions(small), bank)),
        f"its backbone alone, {SIDE} pixels": lambda: features.directions(small),
        "its search alone": lambda: nearest(found, bank),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 3):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            if turn >= 3:  # the first warm up
                seconds[name].append(time.perf_counter() - begin)
    milliseconds = {name: round(1000 * median(values), 1) for name, values in seconds.items()}
    weights = sum(value.nbytes for value in scorer.networks.state_dict().values())
    places = (SIDE // 8) ** 2
    record = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "milliseconds": milliseconds,
        "mebibytes": {
            "Hazelnut, all weights": round(weights / 2**20, 1),
            "PatchCore, the backbone": round(size_of(features) / 2**20, 1),
            f"PatchCore, a bank of {BANK}": round(bank.nbytes / 2**20, 1),
            "PatchCore, a bank of all features of 1000 images": round(1000 * places * bank[0].nbytes / 2**20, 1),
        },
    }
    write_results(RESULTS, record)
    lines = ["| what | median, ms |", "|---|---|", *(f"| {name} | {value} |" for name, value in milliseconds.items())]
    Console().print("\n".join(lines), record["mebibytes"], markup=False, highlight=False)


def nearest(features: Tensor, bank: Tensor) -> Tensor:
    """Distance of each place's features, of length one, from the nearest in the bank: (B, h, w)."""
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)
    distances = (2 - 2 * (flat @ bank.T).amax(dim=1)).clamp(min=0).sqrt()
    return distances.view(len(features), *features.shape[2:])


def map_of(distances: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, w) in pixels, smoothed as the baseline's, and its peak."""
    heights = smooth(enlarged(distances.unsqueeze(1), CELL), sigma=4)
    return heights, heights.amax()


def size_of(features: Features) -> int:
    return sum(value.nbytes for value in features.state_dict().values())


if __name__ == "__main__":
    typer.run(main)
