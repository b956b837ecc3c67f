"""Pixel figures of a whole test set of large maps: how long, how much memory, and are they right?

    python -m benchmarks.aupro

Draws 110 maps of 1024 x 1024 pixels, each the same in every run. Measures them with training.metrics, in a process that
loads nothing else and in one that has loaded all that `hazelnut evaluate` loads. Then computes the figures once more,
in another way: along the curves, one step for each distinct value. Prints a table, writes docs/benchmarks/aupro.json.
"""

import importlib
import os
import platform
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from scipy import ndimage

from benchmarks.results import write_results
from training import metrics

RESULT = Path("docs/benchmarks/aupro.json")
LIMITS = (0.3, 0.05)
FloatArray = NDArray[np.float64]
KeyArray = NDArray[np.uint64]


@dataclass(frozen=True)
class Row:
    """What one process found. Its peak memory includes the maps, the masks and every import.

    Its seconds do not, but along the curves they include the drawing: no map is kept there.
    """

    process: str
    seconds: float
    peak_gib: float
    regions: int
    defect_pixels: int
    figures: dict[str, float]


def main(
    maps: Annotated[int, typer.Option(help="How many maps.", min=2)] = 110,
    size: Annotated[int, typer.Option(help="Their width and height, in pixels.", min=64)] = 1024,
) -> None:
    # Every measurement gets a process of its own: a peak never falls again.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = [
            pool.submit(measure, maps, size).result(),
            pool.submit(measure, maps, size, beside="training.evaluation").result(),
            pool.submit(walk, maps, size).result(),
        ]
    record = {
        "command": f"python -m benchmarks.aupro --maps {maps} --size {size}",
        "maps": maps,
        "size": size,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rows": [asdict(row) for row in rows],
    }
    write_results(RESULT, record)
    title = f"{maps} maps of {size} x {size}: {rows[0].regions} regions, {rows[0].defect_pixels} defect pixels"
    table = Table("", *(Column(row.process, justify="right") for row in rows), title=title)
    table.add_row("seconds", *(f"{row.seconds:.1f}" for row in rows))
    table.add_row("peak memory, GiB", *(f"{row.peak_gib:.2f}" for row in rows))
    for name in rows[0].figures:
        table.add_row(name, *(f"{row.figures[name]:.12f}" for row in rows))
    Console().print(table)


def measure(maps: int, size: int, *, beside: str | None = None) -> Row:
    """training.metrics; beside: a module that is loaded too, for the memory that it takes."""
    if beside is not None:
        importlib.import_module(beside)
    drawn = [draw(index, size) for index in range(maps)]
    begin = time.perf_counter()
    statistics = metrics.pixel_statistics([picture for picture, _ in drawn], [mask for _, mask in drawn])
    figures = {f"aupro_{limit}": metrics.aupro(statistics, fpr_limit=limit) for limit in LIMITS}
    figures["pixel_auroc"] = metrics.pixel_auroc(statistics)
    figures["pixel_ap"] = metrics.pixel_ap(statistics)
    return Row(
        process="training.metrics" if beside is None else f"with {beside}",
        seconds=time.perf_counter() - begin,
        peak_gib=peak_gib(),
        regions=len(statistics.starts),
        defect_pixels=len(statistics.values),
        figures=figures,
    )


def draw(index: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A map (size, size), non-negative, of smooth noise, and its mask. Two of three have one to four defects."""
    random = np.random.default_rng(index)
    mask = np.zeros((size, size), dtype=np.bool_)
    height = np.zeros((size, size), dtype=np.float32)
    y, x = np.ogrid[:size, :size]
    for _ in range(random.integers(1, 5) if index % 3 else 0):
        center_y, center_x = random.uniform(0, size, 2)
        radius_y, radius_x = random.uniform(0.01, 0.12, 2) * size
        ellipse = ((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2 <= 1
        mask |= ellipse
        height[ellipse] = random.uniform(0, 4)  # some defects hardly rise above the noise
    noise = random.standard_normal((size, size), dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, 6)
    picture = ndimage.gaussian_filter(height, 4) + smooth / smooth.std()
    return np.abs(picture), mask


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# The same figures in another way


def walk(maps: int, size: int) -> Row:
    """From the highest value down, one step for each distinct value, as the textbook draws the curves."""
    begin = time.perf_counter()
    keys, sizes = sorted_keys(maps, size)
    share = np.array([0.0, *(1 / (len(sizes) - 1) / sizes[1:])])  # what a pixel of each region adds to the overlap
    figures = dict.fromkeys([*(f"aupro_{limit}" for limit in LIMITS), "pixel_auroc", "pixel_ap"], 0.0)
    good, defect, overlap = 0.0, 0.0, 0.0
    for part in from_the_highest(keys):
        number = (part & np.uint64(0xFFFFFFFF)).astype(np.int64)
        step = np.flatnonzero(np.diff(part >> np.uint64(32), append=np.uint64(2**32)))  # the last of equal values
        goods = np.array([good, *(good + np.cumsum(number == 0)[step])])
        defects = np.array([defect, *(defect + np.cumsum(number > 0)[step])])
        overlaps = np.array([overlap, *(overlap + np.cumsum(share[number])[step])])
        for limit in LIMITS:
            figures[f"aupro_{limit}"] += area(goods / sizes[0], overlaps, limit) / limit
        recalls = defects / sizes[1:].sum()
        figures["pixel_auroc"] += area(goods / sizes[0], recalls, 1.0)
        figures["pixel_ap"] += float(np.sum(np.diff(recalls) * defects[1:] / (defects[1:] + goods[1:])))
        good, defect, overlap = goods[-1], defects[-1], overlaps[-1]
    return Row(
        process="along the curves",
        seconds=time.perf_counter() - begin,
        peak_gib=peak_gib(),
        regions=len(sizes) - 1,
        defect_pixels=int(sizes[1:].sum()),
        figures=figures,
    )


def sorted_keys(maps: int, size: int) -> tuple[KeyArray, NDArray[np.int64]]:
    """A key per pixel: the bits of its value, which sort as the value does, then its region's number, 0 for none.

    Also the number of pixels of each region, (1 + R,). Sorted keys need no permutation beside them: 8 bytes a pixel.
    """
    keys = np.empty((maps, size, size), dtype=np.uint64)
    sizes = [0]
    for index in range(maps):
        picture, mask = draw(index, size)
        labels, regions = ndimage.label(mask, structure=np.ones((3, 3)))
        counts = np.bincount(labels.ravel(), minlength=regions + 1)
        keys[index] = picture.view(np.uint32)
        keys[index] <<= np.uint64(32)
        keys[index] |= np.where(mask, labels + len(sizes) - 1, 0).astype(np.uint64)
        sizes[0] += int(counts[0])
        sizes.extend(counts[1:].tolist())
    flat = keys.reshape(-1)
    flat.sort()
    return flat, np.array(sizes)


def from_the_highest(keys: KeyArray, *, at_once: int = 2**20) -> Iterator[KeyArray]:
    """Parts of the sorted keys, in descending order; equal values stay in one part."""
    end = len(keys)
    while end:
        value = keys[max(0, end - at_once)] >> np.uint64(32)
        begin = int(np.searchsorted(keys, value << np.uint64(32)))
        yield keys[begin:end][::-1]
        end = begin


def area(x: FloatArray, y: FloatArray, limit: float) -> float:
    """Below the straight lines from point to point, x rising, as far as x = limit."""
    width = np.diff(x)
    within = np.clip(limit - x[:-1], 0, width)
    slope = np.divide(np.diff(y), width, out=np.zeros_like(width), where=width > 0)
    return float(np.sum(within * (y[:-1] + slope * within / 2)))


if __name__ == "__main__":
    typer.run(main)
