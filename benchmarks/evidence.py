"""Does the score come from the defect? Where the map is highest, and what is left when the defect is painted over.

    python -m benchmarks.evidence DATA=RUN [DATA=RUN ...]

DATA is a folder in MVTec layout with masks, RUN the run that was trained on it. Each defect is painted over with the
same place of the good image that looks most alike around it; as a control, a region of the same shape elsewhere in the
image is painted over in the same way. Prints a table in Markdown, writes docs/benchmarks/evidence.json, and a picture
per data set into --pictures: images with the highest pixels of their map in red, and the border of the mask in green.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from scipy import ndimage
from torch import Tensor

from benchmarks.results import write_results
from models.checkpoint import load_checkpoint
from models.images import decode_image, image_tensor
from models.scoring import MapArray, Scorer
from training.data import GOOD, load_images, load_mask, read_dataset
from training.run import recipe_of, split_images

RESULTS = Path("docs/benchmarks/evidence.json")
TOP = 0.002  # share of pixels that are shown
BORDER = 1 / 32  # of the side
CHUNK = 16

Mask = NDArray[np.bool_]


def main(
    pairs: Annotated[list[str], typer.Argument(help="DATA=RUN.")],
    pictures: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("runs/evidence"),
    out: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS,
) -> None:
    rows = []
    for pair in pairs:
        data, _, run = pair.partition("=")
        rows.append(measure(Path(data), Path(run), pictures))
    write_results(out, rows)
    Console(soft_wrap=True).print(markdown(rows), markup=False, highlight=False)


def measure(data: Path, run: Path, pictures: Path) -> dict[str, Any]:
    scorer = load_checkpoint(run / "checkpoint").scorer(torch.device("cpu"))
    recipe = recipe_of(run)
    dataset = read_dataset(data)
    size = recipe.image_size
    good = load_images(
        split_images(dataset, recipe, Console(stderr=True)).training, channels=recipe.channels, size=size
    )
    test = load_images([image.path for image in dataset.test], channels=recipe.channels, size=size)
    masks = []
    for image in dataset.test:
        width, height = decode_image(image.path.read_bytes()).size
        mask = Image.fromarray(load_mask(image, width=width, height=height))
        masks.append(image_tensor(mask.convert("L"), channels=1, size=size)[0].numpy() > 127)
    scores, maps = score(scorer, test)

    defective = [i for i, mask in enumerate(masks) if mask.any()]
    whole = [i for i, image in enumerate(dataset.test) if image.defect == GOOD]
    generator = np.random.default_rng(0)
    painted, control = [], []
    for i in defective:
        region = ndimage.binary_dilation(masks[i], iterations=size // 64)
        elsewhere = moved(region, generator)
        painted.append(paint_over(test[i], region, good))
        control.append(paint_over(test[i], elsewhere, good))
    painted_scores, control_scores = (score(scorer, torch.stack(images))[0] for images in (painted, control))
    before = scores[defective]
    middle = float(np.median(scores[whole]))
    draw(pictures / f"{data.name}.png", test, maps, masks, [*defective[:: len(defective) // 8][:8], *whole[:8]])
    return {
        "data": data.name,
        "defects": len(defective),
        "peak on the defect": float(np.mean([on_mask(maps[i], masks[i], size) for i in defective])),
        "share of the image that would be by chance": float(
            np.mean([ndimage.binary_dilation(masks[i], iterations=size // 64).mean() for i in defective])
        ),
        "peak at the border, good images": float(np.mean([at_border(maps[i]) for i in whole])),
        "peak at the border, defects": float(np.mean([at_border(maps[i]) for i in defective])),
        "border's share of the image": 1 - (1 - 2 * BORDER) ** 2,
        "median score, good images": middle,
        "median score, defects": float(np.median(before)),
        "median score, defects painted over": float(np.median(painted_scores)),
        "median score, painted over elsewhere": float(np.median(control_scores)),
        "score falls, defect painted over": float(np.mean(painted_scores < before)),
        "score falls, painted over elsewhere": float(np.mean(control_scores < before)),
    }


def score(scorer: Scorer, pixels: Tensor) -> tuple[NDArray[np.float64], MapArray]:
    parts = [scorer.score(chunk) for chunk in torch.split(pixels, CHUNK)]
    return np.concatenate([part.anomaly_score for part in parts]), np.concatenate([part.maps for part in parts])


def on_mask(anomaly_map: MapArray, mask: Mask, size: int) -> bool:
    return bool(ndimage.binary_dilation(mask, iterations=size // 64).flat[int(anomaly_map.argmax())])


def at_border(anomaly_map: MapArray) -> bool:
    size = len(anomaly_map)
    row, column = divmod(int(anomaly_map.argmax()), size)
    margin = BORDER * size
    return min(row, column) < margin or max(row, column) >= size - margin


def moved(region: Mask, generator: np.random.Generator) -> Mask:
    """The region somewhere else, where it does not meet itself if that can be had."""
    size = len(region)
    for _ in range(100):
        shifted = np.roll(region, generator.integers(size, size=2), axis=(0, 1))
        if not (shifted & region).any():
            break
    return np.asarray(shifted)


def paint_over(image: Tensor, region: Mask, good: Tensor) -> Tensor:
    """uint8 (C, S, S), with a soft border."""
    around = torch.from_numpy(ndimage.binary_dilation(region, iterations=12) & ~region)
    distance = (good[:, :, around].float() - image[:, around].float()).square().mean(dim=(1, 2))
    patch = good[int(distance.argmin())].float()
    soft = torch.from_numpy(ndimage.gaussian_filter(region.astype(np.float32), 1.5)).clamp(0, 1)
    soft = torch.maximum(soft, torch.from_numpy(region).float())
    return torch.lerp(image.float(), patch, soft).round().byte()


def draw(path: Path, images: Tensor, maps: MapArray, masks: list[Mask], chosen: list[int]) -> None:
    """Two rows: defects, good images."""
    tiles = []
    for i in chosen:
        picture = images[i].expand(3, -1, -1).permute(1, 2, 0).numpy().copy()
        picture[maps[i] >= np.quantile(maps[i], 1 - TOP)] = (255, 0, 0)
        picture[ndimage.binary_dilation(masks[i], iterations=3) & ~ndimage.binary_dilation(masks[i], iterations=2)] = (
            0,
            255,
            0,
        )
        tiles.append(picture)
    rows = [np.concatenate(tiles[:8], axis=1), np.concatenate(tiles[8:], axis=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(row["data"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in list(rows[0])[1:]:
        values = [row[name] for row in rows]
        lines.append(f"| {name} | " + " | ".join(f"{v}" if isinstance(v, int) else f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
