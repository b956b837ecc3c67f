"""Which fusion of the component maps finds defects of kinds that training never draws.

    python -m benchmarks.unseen_defects DATA=RUN [DATA=RUN ...]

DATA is a folder in MVTec layout, RUN the run that was trained on it. The segmentation head finds what it was trained
on too easily for such defects to say what its logits are worth, and test images must choose nothing. Here seven other
kinds are drawn on the held-out good images, where these show a part, and each image is compared with what other parts
are like, as in training. OF_PIXELS and OF_FEATURES of models/maps.py were chosen by this. Prints a table in Markdown,
writes docs/benchmarks/unseen-defects.json.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.results import write_results
from models.checkpoint import load_checkpoint
from models.maps import OF_FEATURES, OF_PIXELS
from models.scoring import outputs
from training import metrics
from training.data import load_images, read_dataset
from training.run import good_maps, recipe_of, split_images

RESULTS = Path("docs/benchmarks/unseen-defects.json")
PIXEL_STRIDE = 4  # maps are smooth: every fourth pixel of every fourth row is enough
TRIES = 50

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
    "distances by place, residual 1/4 (chosen)": OF_PIXELS,
    "distances by place, residual 0": ((0, 1, 0, 0, 0), (0, 1, 0.5, 0.5, 0.5)),
}
# Over features there are no distances.
FEATURES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "residual as it is": ((1, 0), (0, 0)),
    "residual by place": ((0, 0), (1, 0)),
    "logits as they are": ((0, 1), (0, 0)),
    "logits by place": ((0, 0), (0, 1)),
    "residual and logits as they are (chosen)": OF_FEATURES,
    "residual 5/4, logits 1 as they are": ((1.25, 1), (0, 0)),
    "residual 3/2, logits 1 as they are": ((1.5, 1), (0, 0)),
    "residual 2, logits 1 as they are": ((2, 1), (0, 0)),
    "residual 1, logits 2 as they are": ((1, 2), (0, 0)),
    "residual and logits by place": ((0, 0), (1, 1)),
    "residual and logits in both views": ((1, 1), (1, 1)),
    "residual by place, logits as they are": ((0, 1), (1, 0)),
    "residual in both views, logits as they are": ((1, 1), (1, 0)),
    "residual in both views, by place 1/2, logits as they are": ((1, 1), (0.5, 0)),
}


def octaves(low: float, high: float, random: torch.Generator) -> float:
    return float(low * (high / low) ** torch.rand((), generator=random))


def around_a_place(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distances along and across a random direction from a random place, in pixels, (S, S) each."""
    axis = torch.arange(size).float()
    place = size * (0.1 + 0.8 * torch.rand(2, generator=random))
    across, down = axis.view(1, -1) - place[0], axis.view(-1, 1) - place[1]
    turn = math.pi * float(torch.rand((), generator=random))
    return across * math.cos(turn) + down * math.sin(turn), down * math.cos(turn) - across * math.sin(turn)


def dent(image: Tensor, random: torch.Generator) -> Tensor:
    """Lit on one side, in shade on the other."""
    along, across = around_a_place(image.shape[-1], random)
    radius, depth = octaves(3, 20, random), octaves(0.5, 2, random)
    return image + depth * along / radius * torch.exp(-(along.square() + across.square()) / (2 * radius**2))


def ring(image: Tensor, random: torch.Generator) -> Tensor:
    """A dried drop: dark or bright at its rim."""
    along, across = around_a_place(image.shape[-1], random)
    distance = torch.hypot(along, octaves(1, 1.5, random) * across) - octaves(6, 40, random)
    strength = octaves(0.25, 1, random) * (1 if torch.rand((), generator=random) < 0.3 else -1)
    rim = torch.exp(-((distance / octaves(0.8, 3, random)) ** 2) / 2)
    return image + strength * (rim + 0.25 * (distance < 0))


def stripes(image: Tensor, random: torch.Generator) -> Tensor:
    """Chatter of a tool."""
    along, across = around_a_place(image.shape[-1], random)
    patch = (1 - (torch.hypot(along, across) / octaves(6, 40, random)).square()).clamp(min=0).sqrt()
    return image + octaves(0.15, 0.7, random) * patch * torch.sin(2 * math.pi * along / octaves(3, 12, random))


def turned(image: Tensor, random: torch.Generator) -> Tensor:
    """A square of the part, the wrong way round."""
    size, side = image.shape[-1], int(octaves(16, 64, random))
    top, left = (int(torch.randint(size - side, (), generator=random)) for _ in range(2))
    damaged = image.clone()
    square = image[:, top : top + side, left : left + side]
    damaged[:, top : top + side, left : left + side] = square.rot90(
        int(torch.randint(1, 4, (), generator=random)), (1, 2)
    )
    return damaged


def wandering_crack(image: Tensor, random: torch.Generator) -> Tensor:
    """Dark, with a lit edge; its direction changes from pixel to pixel."""
    size, length = image.shape[-1], int(octaves(20, 140, random))
    turns = 2 * math.pi * torch.rand((), generator=random) + 0.25 * torch.randn(length, generator=random).cumsum(0)
    start = size * (0.1 + 0.8 * torch.rand(2, 1, generator=random))
    rows, columns = (start + torch.stack([turns.sin(), turns.cos()]).cumsum(1)).long()
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    line = torch.zeros(1, size, size)
    line[0, rows[inside], columns[inside]] = 1
    wide = 3 * F.avg_pool2d(line, 3, stride=1, padding=1)
    relief = 0.5 * torch.roll(wide, (1, 1), (1, 2)) - 0.4 * wide - 0.6 * line
    return image + octaves(0.4, 1.5, random) * relief.clamp(-2, 2)


def smear(image: Tensor, random: torch.Generator) -> Tensor:
    """Texture wiped along rows or columns."""
    along, across = around_a_place(image.shape[-1], random)
    radius = octaves(8, 40, random)
    patch = (4 * (1 - torch.hypot(along / radius, across / (0.6 * radius)).square())).clamp(0, 1)
    kernel, border = ((1, 15), (7, 7, 0, 0)) if torch.rand((), generator=random) < 0.5 else ((15, 1), (0, 0, 7, 7))
    wiped = F.avg_pool2d(F.pad(image[None], border, mode="reflect"), kernel, stride=1)[0]
    return torch.lerp(image, wiped, patch)


def pitting(image: Tensor, random: torch.Generator) -> Tensor:
    """A field of dark dots."""
    size = image.shape[-1]
    field = torch.hypot(*around_a_place(size, random)) < octaves(5, 30, random)
    dots = (field & (torch.rand(size, size, generator=random) < 0.06)).float().unsqueeze(0)
    return image - 1.5 * octaves(0.3, 1.2, random) * F.avg_pool2d(F.max_pool2d(dots, 3, 1, 1), 3, 1, 1)


Draw = Callable[[Tensor, torch.Generator], Tensor]

KINDS: dict[str, Draw] = {
    "dent": dent,
    "ring": ring,
    "stripes": stripes,
    "turned": turned,
    "wandering crack": wandering_crack,
    "smear": smear,
    "pitting": pitting,
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
    split = split_images(read_dataset(data), recipe)
    held_out = load_images(split.calibration, channels=recipe.channels, size=recipe.image_size)
    _, fusions = good_maps(networks, held_out).fusions(split.parts)
    random = torch.Generator().manual_seed(recipe.seed)
    part = part_of(networks.standardisation(held_out))
    compared = PIXELS if networks.features is None else FEATURES
    peaks: dict[str, list[Tensor]] = {name: [] for name in compared}  # (1 + kinds,) of each image
    pixels: dict[str, list[Tensor]] = {name: [] for name in compared}
    changed = []
    for pixels_of_one, fusion in zip(held_out, fusions, strict=True):
        image = networks.standardisation(pixels_of_one)
        damaged = torch.stack([image, *(drawn_on(part, image, draw, random) for draw in KINDS.values())])
        levels = networks.standardisation.pixels(damaged)
        views = fusion.views(outputs(networks, levels).maps)
        for name, weights in compared.items():
            maps = fusion.joined(views, torch.tensor(weights).view(1, -1, 1, 1))
            peaks[name].append(maps.flatten(1).amax(dim=1))
            pixels[name].append(maps[1:, ::PIXEL_STRIDE, ::PIXEL_STRIDE])
        changed.append(changes(damaged[1:], image)[:, ::PIXEL_STRIDE, ::PIXEL_STRIDE])
    masks = torch.stack(changed).numpy()  # (n, kinds, S / 4, S / 4)
    rows = []
    for name in compared:
        peak, heights = torch.stack(peaks[name]).double().numpy(), torch.stack(pixels[name]).numpy()
        labels = np.repeat([False, True], len(peak))
        of_kinds = {
            kind: metrics.image_auroc(labels, np.concatenate([peak[:, 0], peak[:, index]]))
            for index, kind in enumerate(KINDS, start=1)
        }
        pixel = [
            metrics.pixel_statistics(list(heights[:, index]), list(masks[:, index])) for index in range(len(KINDS))
        ]
        rows.append(
            {
                "data": data.name,
                "fusion": name,
                "image AUROC": float(np.mean(list(of_kinds.values()))),
                "pixel AUROC": float(np.mean([metrics.pixel_auroc(statistics) for statistics in pixel])),
                "AUPRO@0.3": float(np.mean([metrics.aupro(statistics) for statistics in pixel])),
                **of_kinds,
            }
        )
    return rows


def part_of(images: Tensor) -> Tensor:
    """Where good images, (n, C, S, S), differ from one another as much as on the average: (S, S). No real defect lies
    on the background, where a comparison by place makes much of the least change."""
    differences = images.mean(dim=1, keepdim=True).std(dim=0, keepdim=True)
    around = 2 * (images.shape[-1] // 32) + 1
    differences = F.avg_pool2d(differences, around, stride=1, padding=around // 2, count_include_pad=False)[0, 0]
    return differences > differences.mean() / 2


def changes(damaged: Tensor, image: Tensor) -> Tensor:
    """Where it can be seen, (B, S, S)."""
    squares = (damaged - image).square().mean(dim=1, keepdim=True)
    return F.avg_pool2d(squares, 5, stride=1, padding=2)[:, 0] > 0.1**2


def drawn_on(part: Tensor, image: Tensor, draw: Draw, random: torch.Generator) -> Tensor:
    """The image with a defect of which most lies on the part; somewhere, if TRIES are not enough."""
    for _ in range(TRIES):
        damaged = draw(image, random)
        changed = changes(damaged.unsqueeze(0), image)[0]
        if changed.any() and part[changed].float().mean() > 0.5:
            break
    return damaged


def markdown(rows: list[dict[str, Any]]) -> str:
    figures = ["image AUROC", "pixel AUROC", "AUPRO@0.3", *KINDS]
    lines = [["data", "fusion", *figures], ["---"] * (2 + len(figures))]
    lines += [[row["data"], row["fusion"], *(f"{row[figure]:.3f}" for figure in figures)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
