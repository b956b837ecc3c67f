"""Scoring by reconstruction over features beside scoring by nearest neighbours, as PatchCore does: one backbone.

    python -m benchmarks.search [--recipe features]

Time does not depend on the weights, so these are random. A bank of 20,000 features is what the baseline of
benchmarks/quality.py keeps of its training images; without choosing among them it would grow with every image. Each is
a process of its own, as a user would run it: `hazelnut` lets memory that it frees stay with its process
(models/memory.py), a script of PatchCore does not; what it would gain by it is a row of its own. One image at a time,
and four, as the baseline takes them; some batches in a row, in turn, several rounds; medians. Prints a table in
Markdown, writes docs/benchmarks/search.json.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
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
from models.maps import enlarged, smooth
from models.memory import keep_freed_memory
from models.scoring import Scorer
from training.config import Recipe, load_recipe

RESULTS = Path("docs/benchmarks/search.json")
ROUNDS, IN_A_ROW = 9, 6
AT_ONCE = (1, 4)  # images
BANK = 20_000
SIDE = 224  # pixels, as the baseline's
HAZELNUT, PATCHCORE, KEEPING = "Hazelnut", "PatchCore", "PatchCore, if it kept freed memory too"

prepared: dict[tuple[str, int], Callable[[], object]] = {}  # of a process that measures, by name and images at once


def main(recipe: Annotated[str, typer.Option(help="Name of a recipe over features.")] = "features") -> None:
    chosen = load_recipe(recipe, [])
    seconds: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), prepare, (name, chosen)))
            for name in (HAZELNUT, PATCHCORE, KEEPING)
        }
        for turn in range(ROUNDS + 1):
            for process in processes.values():
                for way, taken in process.submit(measure).result().items():
                    if turn > 0:  # the first warms up
                        seconds.setdefault(way, []).extend(taken)
        all_weights, backbone = processes[HAZELNUT].submit(weights_of, chosen).result()
    names = dict.fromkeys(name for name, _ in seconds)
    milliseconds = {name: {n: round(1000 * median(seconds[name, n]) / n, 1) for n in AT_ONCE} for name in names}
    bank_bytes = 4 * chosen.feature_channels
    record = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "milliseconds of an image, by images at once": milliseconds,
        "mebibytes": {
            "Hazelnut, all weights": mebibytes(all_weights),
            "PatchCore, the backbone": mebibytes(backbone),
            f"PatchCore, a bank of {BANK}": mebibytes(BANK * bank_bytes),
            "PatchCore, a bank of all features of 1000 images": mebibytes(1000 * (SIDE // CELL) ** 2 * bank_bytes),
        },
    }
    write_results(RESULTS, record)
    lines = [f"| median ms of an image | {' | '.join(f'{n} at once' for n in AT_ONCE)} |", "|---" * 3 + "|"]
    lines += [f"| {name} | {' | '.join(map(str, values.values()))} |" for name, values in milliseconds.items()]
    Console(soft_wrap=True).print("\n".join(lines), record["mebibytes"], markup=False, highlight=False)


def prepare(name: str, recipe: Recipe) -> None:
    """In the process that is to measure."""
    if name != PATCHCORE:
        keep_freed_memory()
    scorer = scorer_of(recipe, torch.device("cpu"))
    for images in AT_ONCE:
        pixels = noise(images, recipe)
        ways = ways_of_ours(scorer, pixels) if name == HAZELNUT else ways_of_patchcore(name, scorer, pixels)
        prepared.update({(way, images): run for way, run in ways.items()})


@torch.inference_mode()
def measure() -> dict[tuple[str, int], list[float]]:
    """Seconds that each way takes, several times in a row, as images follow one another on a line."""
    taken: dict[tuple[str, int], list[float]] = {way: [] for way in prepared}
    for way, run in prepared.items():
        for _ in range(IN_A_ROW):
            begin = time.perf_counter()
            run()
            taken[way].append(time.perf_counter() - begin)
    return taken


def weights_of(recipe: Recipe) -> tuple[int, int]:
    """Bytes of all that scores, and of the backbone in it."""
    networks = scorer_of(recipe, torch.device("cpu")).networks
    assert networks.features is not None
    whole, backbone = (
        sum(value.nbytes for value in part.state_dict().values()) for part in (networks, networks.features)
    )
    return whole, backbone


def ways_of_ours(scorer: Scorer, pixels: Tensor) -> dict[str, Callable[[], object]]:
    features, side = scorer.networks.features, scorer.config.image_size
    assert features is not None
    return {
        f"{HAZELNUT}, {side} pixels, to the verdict": lambda: scorer.score(pixels),
        f"its backbone alone, {side} pixels": lambda: features(pixels.float() / 255),
    }


def ways_of_patchcore(name: str, scorer: Scorer, pixels: Tensor) -> dict[str, Callable[[], object]]:
    features = scorer.networks.features
    assert features is not None
    small = F.interpolate(pixels.float(), size=(SIDE, SIDE)) / 255
    bank = F.normalize(torch.randn(BANK, scorer.config.feature_channels), dim=1)
    ways: dict[str, Callable[[], object]] = {
        f"{name}, {SIDE} pixels, to the map": lambda: map_of(nearest(features.directions(small), bank))
    }
    if name == PATCHCORE:
        found = features.directions(small)
        ways[f"its backbone alone, {SIDE} pixels"] = lambda: features.directions(small)
        ways["its search alone"] = lambda: nearest(found, bank)
    return ways


def nearest(features: Tensor, bank: Tensor) -> Tensor:
    """Distance of each place's features, of length one, from the nearest in the bank: (B, h, w)."""
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)
    distances = (2 - 2 * (flat @ bank.T).amax(dim=1)).clamp(min=0).sqrt()
    return distances.view(len(features), *features.shape[2:])


def map_of(distances: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, w) in pixels, smoothed as the baseline's, and its peak."""
    heights = smooth(enlarged(distances.unsqueeze(1), CELL), sigma=4)
    return heights, heights.amax()


def mebibytes(count: int) -> float:
    return round(count / 2**20, 1)


if __name__ == "__main__":
    typer.run(main)
