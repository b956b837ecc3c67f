"""Which fusion of the component maps finds defects of kinds that training never draws.

    python -m benchmarks.unseen_defects DATA=RUN [DATA=RUN ...]

DATA is a folder in MVTec layout, RUN the run that was trained on it. The kinds of training/unseen.py are drawn on the
held-out good images, and each image is compared with what other parts are like, as in training. OF_PIXELS and
OF_FEATURES of models/maps.py were chosen by this. Prints a table in Markdown, writes
docs/benchmarks/unseen-defects.json.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.results import write_results
from models.checkpoint import load_checkpoint
from models.maps import OF_FEATURES, OF_PIXELS
from models.scoring import map_score, outputs
from training.calibrating import good_maps
from training.data import load_images, read_dataset
from training.run import recipe_of, split_images
from training.unseen import KINDS, drawn, figures

RESULTS = Path("docs/benchmarks/unseen-defects.json")
PIXEL_STRIDE = 4  # maps are smooth: every fourth pixel of every fourth row is enough

# What the residual, the logits and the three distances count for: as they are, by place.
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "residual as it is": ((1, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    "residual by place": ((0, 0, 0, 0, 0), (1, 0, 0, 0, 0)),
    "logits as they are": ((0, 1, 0, 0, 0), (0, 0, 0, 0, 0)),
    "logits by place": ((0, 0, 0, 0, 0), (0, 1, 0, 0, 0)),
    "distance at stride 4 as it is": ((0, 0, 1, 0, 0), (0, 0, 0, 0, 0)),
    "distance at stride 4 by place": ((0, 0, 0, 0, 0), (0, 0, 1, 0, 0)),
    "distance at stride 8 as it is": ((0, 0, 0, 1, 0), (0, 0, 0, 0, 0)),
    "distance at stride 8 by place": ((0, 0, 0, 0, 0), (0, 0, 0, 1, 0)),
    "distance at stride 16 as it is": ((0, 0, 0, 0, 1), (0, 0, 0, 0, 0)),
    "distance at stride 16 by place": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 1)),
    "everything alike": ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    "before: both views 1, 2, 2/3": ((1, 2, 2 / 3, 2 / 3, 2 / 3), (1, 2, 2 / 3, 2 / 3, 2 / 3)),
    "the same without the residual": ((0, 2, 2 / 3, 2 / 3, 2 / 3), (0, 2, 2 / 3, 2 / 3, 2 / 3)),
    "by place only": ((0, 0, 0, 0, 0), (1, 2, 2 / 3, 2 / 3, 2 / 3)),
    "distances by place only": ((0, 0, 0, 0, 0), (0, 0, 1, 1, 1)),
    "distances by place, residual 1": ((1, 1, 0, 0, 0), (1, 1, 0.5, 0.5, 0.5)),
    "distances by place, residual 1/2": ((0.5, 1, 0, 0, 0), (0.5, 1, 0.5, 0.5, 0.5)),
    "distances by place, residual 1/4 (to choose from)": OF_PIXELS[0],
    "the same, a quarter of what is by place (to choose from)": OF_PIXELS[1],
    "distances by place, residual 0": ((0, 1, 0, 0, 0), (0, 1, 0.5, 0.5, 0.5)),
}
# Over features there are no distances.
FEATURES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "residual as it is": ((1, 0), (0, 0)),
    "residual by place": ((0, 0), (1, 0)),
    "logits as they are": ((0, 1), (0, 0)),
    "logits by place": ((0, 0), (0, 1)),
    "residual and logits as they are (to choose from)": OF_FEATURES[0],
    "residual 5/4, logits 1 as they are": ((1.25, 1), (0, 0)),
    "residual 3/2, logits 1 as they are": ((1.5, 1), (0, 0)),
    "residual 2, logits 1 as they are": ((2, 1), (0, 0)),
    "residual 1, logits 2 as they are": ((1, 2), (0, 0)),
    "residual and logits by place": ((0, 0), (1, 1)),
    "residual and logits in both views": ((1, 1), (1, 1)),
    "residual by place, logits as they are (to choose from)": OF_FEATURES[1],
    "residual in both views, logits as they are": ((1, 1), (1, 0)),
    "residual in both views, by place 1/2, logits as they are": ((1, 1), (0.5, 0)),
}


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
    networks = load_checkpoint(run / "checkpoint").networks
    recipe = recipe_of(run)
    split = split_images(read_dataset(data), recipe, Console(stderr=True))
    held_out = load_images(split.calibration, channels=recipe.channels, size=recipe.image_size)
    _, fusions = good_maps(networks, held_out).fusions(split.parts)
    random = torch.Generator().manual_seed(recipe.seed)
    compared = PIXELS if networks.features is None else FEATURES
    maps: dict[str, list[Tensor]] = {name: [] for name in compared}
    scores: dict[str, list[Tensor]] = {name: [] for name in compared}
    masks = []
    images = drawn(networks.standardisation(held_out), networks.standardisation.limits, random)
    for (damaged, changed), fusion in zip(images, fusions, strict=True):
        views = fusion.views(outputs(networks, networks.standardisation.pixels(damaged)).maps)
        for name, (as_they_are, by_place) in compared.items():
            found = fusion.joined(views, torch.tensor([*as_they_are, *by_place], dtype=torch.float32))
            scores[name].append(map_score(found, networks.config))
            maps[name].append(found[..., ::PIXEL_STRIDE, ::PIXEL_STRIDE])
        masks.append(changed[..., ::PIXEL_STRIDE, ::PIXEL_STRIDE])
    rows = []
    for name in compared:
        kinds = figures(torch.stack(scores[name]), torch.stack(maps[name]), torch.stack(masks))
        means = np.mean(list(kinds.values()), axis=0)
        rows.append(
            {
                "data": data.name,
                "fusion": name,
                "image AUROC": float(means[0]),
                "pixel AUROC": float(means[1]),
                "AUPRO@0.3": float(means[2]),
                **{kind: found.image_auroc for kind, found in kinds.items()},
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    figures = ["image AUROC", "pixel AUROC", "AUPRO@0.3", *KINDS]
    lines = [["data", "fusion", *figures], ["---"] * (2 + len(figures))]
    lines += [[row["data"], row["fusion"], *(f"{row[figure]:.3f}" for figure in figures)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
