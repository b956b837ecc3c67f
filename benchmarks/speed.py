"""What makes training and scoring fast, each measured beside what it replaces.

    python -m benchmarks.speed [--device cuda] [--crop 128]

Rows are measured in turn, several rounds, and the median is given: this says how they compare on a machine that others
use too. Prints a table in Markdown, writes docs/benchmarks/speed-DEVICE.json.
"""

import io
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor

from benchmarks.results import write_results
from models.calibration import Calibration
from models.graphs import GraphedScorer
from models.images import decode_image, image_tensor
from models.maps import MapFusion, fusion_weights
from models.memory import keep_freed_memory
from models.networks import ScoringNetworks, Standardisation, places_of
from models.scoring import Scorer, choose_device
from training.config import Recipe, load_recipe
from training.loop import train
from training.state import Batches, TrainingState

ROUNDS = 7

Measured = Callable[[], object]


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    crop: Annotated[int, typer.Option(help="Side of the training windows.")] = 128,
    compiled: Annotated[bool, typer.Option(help="Measure torch.compile, which needs a compiler.")] = False,
) -> None:
    keep_freed_memory()
    where = choose_device(device)
    recipe = load_recipe("default", [f"crop={crop}"])
    rows: dict[str, Measured] = {}
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        for precision in ("float32", "bfloat16"):
            rows[f"forward and backward, {layout}, {precision}"] = step(recipe, where, memory_format, precision, False)
    if compiled:
        rows["forward and backward, channels last, bfloat16, compiled"] = step(
            recipe, where, torch.channels_last, "bfloat16", True
        )
    adversaries = [
        ("adversaries in every step", replace(recipe, adversary_every=1)),
        (f"adversaries in every {recipe.adversary_every}th step", recipe),
        ("no adversaries", replace(recipe, latent_weight=0.0, image_weight=0.0)),
    ]
    rows |= {f"four training steps, {name}": training_steps(changed, where) for name, changed in adversaries}
    rows["a batch, decoded beforehand, from memory"] = batch_from_memory(recipe, where)
    rows["a batch, decoded from PNG each time"] = batch_from_files(recipe)
    for count in (1, 16):
        scorer, pixels = scorer_of(recipe, where), noise(count, recipe)
        rows[f"scoring {count} x {recipe.image_size} pixels"] = partial(scorer.score, pixels)
        if where.type == "cuda":
            recorded = GraphedScorer(scorer)
            name = f"scoring {count} x {recipe.image_size} pixels, recorded as a graph"
            rows[name] = partial(one_by_one, recorded, [pixels])
            rows[f"ten times {name}, one after the other"] = partial(one_by_one, recorded, 10 * [pixels])
            rows[f"ten times {name}, copies beside the computation"] = partial(two_under_way, recorded, 10 * [pixels])

    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(ROUNDS + 1):
        for name, run in rows.items():
            begin = time.perf_counter()
            run()
            if where.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
    milliseconds = {name: 1000 * median(values) for name, values in seconds.items()}
    record = {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": f"{recipe.batch_size} x {recipe.channels} x {crop} x {crop}",
        "milliseconds": milliseconds,
    }
    path = Path(f"docs/benchmarks/speed-{where.type}.json")
    write_results(path, record)
    lines = ["| what | median, ms |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in milliseconds.items()]
    Console().print("\n".join(lines), markup=False, highlight=False)


def step(
    recipe: Recipe, device: torch.device, memory_format: torch.memory_format, precision: str, compiled: bool
) -> Measured:
    """Forward and backward through encoder, decoder and head, without an optimiser."""
    networks = ScoringNetworks(recipe.model_config(), Standardisation()).to(device).to(memory_format=memory_format)
    assert networks.head is not None
    encoder, decoder, head = networks.encoder, networks.decoder, networks.head
    if compiled:
        for network in (encoder, decoder, head):
            network.compile()
    images = torch.randn(recipe.batch_size, recipe.channels, recipe.window, recipe.window, device=device)
    images = images.contiguous(memory_format=memory_format)
    places = places_of(recipe.window, device).unsqueeze(0)

    def run() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            reconstructions = decoder(encoder(images))
            logits, _ = head(images, reconstructions.detach(), places)
        (reconstructions.float().mean() + logits.float().mean()).backward()

    return run


def training_steps(recipe: Recipe, device: torch.device) -> Measured:
    state = TrainingState(recipe, noise(64, recipe), device=device)

    def run() -> None:
        train(state, replace(recipe, steps=state.step + 4), lambda _: None)

    return run


def noise(count: int, recipe: Recipe) -> Tensor:
    return torch.randint(256, (count, recipe.channels, recipe.image_size, recipe.image_size), dtype=torch.uint8)


def batch_from_memory(recipe: Recipe, device: torch.device) -> Measured:
    batches = Batches(noise(64, recipe).to(device), batch_size=recipe.batch_size, crop=recipe.window, seed=0)
    return batches.next


def batch_from_files(recipe: Recipe) -> Measured:
    """What a loader would do that keeps files instead of pixels."""
    files = []
    for pixels in noise(recipe.batch_size, recipe):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        files.append(file.getvalue())

    def run() -> None:
        for data in files:
            image_tensor(decode_image(data), channels=recipe.channels, size=recipe.image_size)

    return run


def scorer_of(recipe: Recipe, device: torch.device) -> Scorer:
    """From pixels to verdicts, in float32, as the service does."""
    networks = ScoringNetworks(recipe.model_config(), Standardisation()).eval().to(device)
    components = 1 + networks.evidence_maps
    flat, ends = torch.zeros(components, 32, 32), torch.zeros(2 * components)
    config = networks.config
    fusion = MapFusion(flat, flat + 1, ends, ends + 1, fusion_weights(config)[0], config.cell).to(device)
    return Scorer(networks, fusion, Calibration(scores=np.random.default_rng(0).normal(size=(19, 3)), alpha=0.05))


def one_by_one(scorer: GraphedScorer, batches: list[Tensor]) -> None:
    for pixels in batches:
        scorer.begin(pixels).result()


def two_under_way(scorer: GraphedScorer, batches: list[Tensor]) -> None:
    """As the service's device thread does while more waits."""
    last = scorer.begin(batches[0])
    for pixels in batches[1:]:
        following = scorer.begin(pixels)
        last.result()
        last = following
    last.result()


if __name__ == "__main__":
    typer.run(main)
