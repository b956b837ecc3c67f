"""What each part of scoring is worth: the same trained networks, scored with a part taken out.

    python -m benchmarks.scoring_ablation DATA=RUN [DATA=RUN ...]

DATA is a folder in MVTec layout, RUN the run that was trained on it. What needs no new training is measured here, what
does in benchmarks.quality. Every variant is calibrated anew on the held-out good images, as training does. Prints a
table in Markdown, writes docs/benchmarks/scoring-ablation.json. Nothing is chosen by these figures.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.results import write_results
from models.calibration import Calibration, FloatArray
from models.checkpoint import load_checkpoint
from models.config import ModelConfig
from models.images import decode_image
from models.maps import GoodMaps, MapFusion, Weights, smooth
from models.networks import ScoringNetworks
from models.scoring import MapArray, Outputs, outputs, resize_map, table
from training import metrics
from training.config import Recipe
from training.data import load_images, load_mask, read_dataset
from training.run import recipe_of, split_images

RESULTS = Path("docs/benchmarks/scoring-ablation.json")
CHUNK = 16
FIGURES = ("image AUROC", "pixel AUROC", "AUPRO@0.3", "false alarms at 0.05")


@dataclass(frozen=True)
class Variant:
    """How the component maps are chosen, how they are fused, of how many of its highest squares a map's score is the
    mean, and what the three scores count for (None: as trained)."""

    components: Callable[[Tensor], Tensor] = lambda maps: maps[:, :-1]
    fusion: Callable[[MapFusion], MapFusion] = lambda fusion: fusion
    highest: int | None = None
    weights: tuple[float, float, float] | None = None


def without_places(fusion: MapFusion) -> MapFusion:
    """The same mean and deviation everywhere."""
    mean, deviation = (
        value.mean(dim=(1, 2), keepdim=True).expand_as(value) for value in (fusion.mean, fusion.deviation)
    )
    flat = copy.deepcopy(fusion)
    flat.mean, flat.deviation = mean, deviation
    return flat


def without(components: slice) -> Callable[[Tensor], Tensor]:
    """These component maps are 0 everywhere, so that each of the others keeps its place and its weight."""

    def chosen_maps(maps: Tensor) -> Tensor:
        maps = maps[:, :-1].clone()
        maps[:, components] = 0
        return maps

    return chosen_maps


VARIANTS = {
    "whole": Variant(),
    "without the head: the residual alone": Variant(components=lambda maps: maps[:, :1]),
    "without the residual": Variant(components=without(slice(0, 1))),
    "without the head's logits": Variant(components=without(slice(1, 2))),
    "without the distances of its features": Variant(components=without(slice(2, None))),
    "without the gradient residual": Variant(components=lambda maps: torch.cat([maps[:, -1:], maps[:, 1:-1]], dim=1)),
    "without comparison by place": Variant(fusion=without_places),
    "the map's peak instead of its highest squares": Variant(highest=1),
    "without fusion: the map alone": Variant(weights=(0, 0, 1)),
    "without fusion: the reconstruction score alone": Variant(weights=(1, 0, 0)),
    "without fusion: the latent score alone": Variant(weights=(0, 1, 0)),
    "the three scores alike": Variant(weights=(1, 1, 1)),
}


def chosen(found: list[Outputs], variant: Variant) -> list[Outputs]:
    return [replace(one, maps=variant.components(one.maps)) for one in found]


def main(
    pairs: Annotated[list[str], typer.Argument(help="DATA=RUN.")],
    out: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS,
) -> None:
    rows = []
    for pair in pairs:
        data, _, run = pair.partition("=")
        rows += measure(Path(data), Path(run))
    write_results(out, rows)
    Console(soft_wrap=True).print(markdown(rows), markup=False, highlight=False)


def measure(data: Path, run: Path) -> list[dict[str, Any]]:
    checkpoint = load_checkpoint(run / "checkpoint")
    recipe = recipe_of(run)
    dataset = read_dataset(data)
    split = split_images(dataset, recipe, Console(stderr=True))
    held_out = score(checkpoint.networks, split.calibration, recipe)
    of_maps = Weights.halves(checkpoint.fusion.weights)
    test = score(checkpoint.networks, [image.path for image in dataset.test], recipe)
    labels = np.array([image.defect != "good" for image in dataset.test])
    masks = []
    for image in dataset.test:
        width, height = size_of(image.path)
        masks.append(load_mask(image, width=width, height=height))
    rows = []
    for name, variant in VARIANTS.items():
        weights = variant.weights or checkpoint.calibration.weights
        config = replace(checkpoint.config, highest=variant.highest or checkpoint.config.highest)
        good = GoodMaps(of_maps)
        calibration, fusion = calibrated(
            chosen(held_out, variant), split.parts, variant, good, config, recipe.alpha, weights
        )
        scores, maps = [], []
        for found in chosen(test, variant):
            fused = fusion(found.maps)
            scores.append(table(found, fused, config))
            maps += list(fused.numpy())
        anomaly = calibration.anomaly_score(np.concatenate(scores))
        full: list[MapArray] = [
            resize_map(one, width=mask.shape[1], height=mask.shape[0]) for one, mask in zip(maps, masks, strict=True)
        ]
        pixels = metrics.pixel_statistics(full, masks)
        figures = (
            metrics.image_auroc(labels, anomaly),
            metrics.pixel_auroc(pixels),
            float(metrics.region_areas(pixels, fpr_limit=0.3).mean()),
            float((calibration.p_value(anomaly[~labels]) <= recipe.alpha).mean()),
        )
        rows.append({"data": data.name, "variant": name, **dict(zip(FIGURES, figures, strict=True))})
    return rows


def score(networks: ScoringNetworks, paths: list[Path], recipe: Recipe) -> list[Outputs]:
    """What the networks give. Maps: the components, and then the plain difference."""
    found = []
    for start in range(0, len(paths), CHUNK):
        pixels = load_images(paths[start : start + CHUNK], channels=recipe.channels, size=recipe.image_size)
        images = networks.standardisation(pixels)
        one = outputs(networks, pixels)
        rebuilt = networks.standardisation(255 * one.reconstructions)
        difference = (images - rebuilt).abs().mean(dim=1, keepdim=True) / 2
        plain = smooth(difference, sigma=networks.config.smoothing)
        found.append(replace(one, maps=torch.cat([one.maps, plain], dim=1), reconstructions=images[:, :0]))
    return found


def size_of(path: Path) -> tuple[int, int]:
    return decode_image(path.read_bytes()).size


def calibrated(
    held_out: list[Outputs],
    parts: list[int],
    variant: Variant,
    good: GoodMaps,
    config: ModelConfig,
    alpha: float,
    weights: tuple[float, ...],
) -> tuple[Calibration, MapFusion]:
    for found in held_out:
        good.add(found.maps)
    fusion, others = good.fusions(parts)
    scores: list[FloatArray] = []
    singles = [one for found in held_out for one in singly(found)]
    for own, one in zip(others, singles, strict=True):
        scores.append(table(one, variant.fusion(own)(one.maps), config))
    return Calibration(scores=np.concatenate(scores), alpha=alpha, weights=weights), variant.fusion(fusion)


def singly(found: Outputs) -> list[Outputs]:
    parts = (found.reconstruction, found.latent, found.maps, found.reconstructions)
    return [Outputs(*(part[i : i + 1] for part in parts)) for i in range(len(found.maps))]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [f"| data | scoring | {' | '.join(FIGURES)} |", "|---" * (2 + len(FIGURES)) + "|"]
    for row in rows:
        figures = " | ".join(f"{row[figure]:.3f}" for figure in FIGURES)
        lines.append(f"| {row['data']} | {row['variant']} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
