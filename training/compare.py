"""hazelnut compare: figures of several runs side by side. Runs that differ in nothing but their seed are one row."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table
from scipy import stats

from models.errors import TrainingError
from training import charts
from training.metrics import CONFIDENCE
from training.pages import chart, write_page
from training.run_folder import RunFolder, read_run_folder

# Where each figure is in evaluation.json, and how it is headed.
DETECTION = {
    "image AUROC": ("image", "auroc"),
    "image AP": ("image", "ap"),
    "pixel AUROC": ("pixel", "auroc"),
    "AUPRO@0.3": ("pixel", "aupro_0.3"),
    "AUPRO@0.05": ("pixel", "aupro_0.05"),
    "false alarms": ("false_alarms", "rate"),
}
FIDELITY = {
    "PSNR, dB": ("reconstruction", "psnr_db"),
    "SSIM": ("reconstruction", "ssim"),
    "MS-SSIM": ("reconstruction", "ms_ssim"),
    "sharpness": ("reconstruction", "sharpness_ratio"),
    "Fréchet": ("reconstruction", "frechet_random_features"),
    "samples' sharpness": ("generation", "sharpness_ratio"),
    "samples' variety": ("generation", "variety_ratio"),
    "samples' Fréchet": ("generation", "frechet_random_features"),
}
FIGURES = DETECTION | FIDELITY
IN_THE_TERMINAL = ("image AUROC", "AUPRO@0.3", "sharpness", "Fréchet", "samples' Fréchet")
DRAWN = (*IN_THE_TERMINAL, "PSNR, dB", "samples' sharpness", "samples' variety")
INTERVALS = "Mean over seeds ± half of its 95 % interval (Student's t); one run alone has none."


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one recipe on the same data, with different seeds."""

    label: str
    data: str
    runs: list[RunFolder]

    def values(self, figure: str) -> list[float]:
        return [value for run in self.runs if (value := figure_of(run, figure)) is not None]


def compare_runs(folders: list[Path], out: Path, console: Console) -> None:
    """Print a table and write a page. Raises TrainingError for a folder without a run or an evaluation."""
    groups = grouped([_evaluated(folder) for folder in folders])
    print_comparison(groups, console)
    with charts.style():
        content = _content(groups)
    write_page(out, "compare.html.j2", content)


def _evaluated(folder: Path) -> RunFolder:
    found = read_run_folder(folder)
    again = f"hazelnut evaluate {folder}/checkpoint DATA writes it"
    if found.evaluation is None:
        raise TrainingError(f"{folder} has no evaluation.json: {again}.")
    if "generation" not in found.evaluation:  # its sharpness is another one
        raise TrainingError(f"{folder}/evaluation.json was written by an older Hazelnut: {again} anew.")
    return found


def grouped(runs: list[RunFolder]) -> list[Group]:
    """Groups in the order of their first runs. Raises TrainingError where a recipe, its data and a seed come twice."""
    groups: dict[tuple[Any, ...], list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    for members in groups.values():
        seeds: dict[int, RunFolder] = {}
        for run in members:
            other = seeds.setdefault(run.run.recipe["seed"], run)
            if other is not run:
                raise TrainingError(
                    f"{other.folder} and {run.folder} have the same recipe, data and seed, {run.run.recipe['seed']}: "
                    "runs of one seed tell nothing of how results vary with it; leave one out."
                )
    labels = _labels([members[0] for members in groups.values()])
    return [
        Group(label=label, data=_data(members[0]), runs=sorted(members, key=lambda run: int(run.run.recipe["seed"])))
        for label, members in zip(labels, groups.values(), strict=True)
    ]


def _key(run: RunFolder) -> tuple[Any, ...]:
    """What is the same in runs that differ in their seed alone."""
    evaluation = run.evaluation or {}
    recipe = tuple(sorted((key, value) for key, value in run.run.recipe.items() if key != "seed"))
    files = tuple(row["file"] for row in evaluation.get("details", {}).get("images", []))
    return recipe, _data(run), tuple(evaluation["images"].items()), files


def _data(run: RunFolder) -> str:
    tested = str((run.evaluation or {})["data"])
    return tested if tested == run.run.name else f"{tested}, trained on {run.run.name}"


def _labels(runs: list[RunFolder]) -> list[str]:
    """The nearest recipe, and what was changed in it, as far as that is not the same in all runs."""
    changes = [set(run.recipe[1].items()) for run in runs]
    common = set.intersection(*changes) if len(runs) > 1 else set()
    labels = [
        ", ".join([run.recipe[0], *(f"{key}={shown}" for key, shown in run.recipe[1].items() if (key, shown) in own)])
        for run, own in zip(runs, (own - common for own in changes), strict=True)
    ]
    # Two groups on one data set need two names; what tells them apart may be a key that older runs do not have.
    places = [(label, _data(run)) for label, run in zip(labels, runs, strict=True)]
    return [
        f"{label} ({run.folder.name})" if places.count((label, data)) > 1 else label
        for (label, data), run in zip(places, runs, strict=True)
    ]


def figure_of(run: RunFolder, figure: str) -> float | None:
    """None where the evaluation could not tell it."""
    level, name = FIGURES[figure]
    found = ((run.evaluation or {}).get(level) or {}).get(name)
    return found["value"] if isinstance(found, dict) else found


def mean_interval(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % interval by Student's t: None of a single value. Raises ValueError of none."""
    if not values:
        raise ValueError("no values: a mean takes at least one.")
    if len(values) == 1:
        return values[0], None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean, half = mean_interval(values)
    digits = 3 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def print_comparison(groups: list[Group], console: Console) -> None:
    """A table for each data set."""
    for data in dict.fromkeys(group.data for group in groups):
        table = Table(Column("run", overflow="fold"), title=data, title_justify="left", box=box.SIMPLE_HEAD)
        table.pad_edge, table.collapse_padding = False, True  # a terminal is narrow
        for figure in IN_THE_TERMINAL:
            table.add_column(figure.replace(" ", "\n"), justify="right")
        for group in (group for group in groups if group.data == data):
            figures = (shown(group.values(figure)).replace(" ±", "\n±") for figure in IN_THE_TERMINAL)
            seeds = f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
            table.add_row(f"{group.label}\n({seeds})", *figures)
        console.print(table)
    console.print(INTERVALS, highlight=False)


def _content(groups: list[Group]) -> dict[str, Any]:
    data_sets = list(dict.fromkeys(group.data for group in groups))
    runs = [run for group in groups for run in group.runs]
    return {
        "title": f"{len(runs)} runs on {', '.join(data_sets)}",
        "intervals": INTERVALS,
        "parts": [
            _part(number, data, [group for group in groups if group.data == data])
            for number, data in enumerate(data_sets)
        ],
        "differences": _differences(groups),
        "run_head": ["run", "seed", "steps", "minutes", "findings", "image AUROC", "image AUROC, 95 %"],
        "runs": [_run_row(run) for run in runs],
    }


def _differences(groups: list[Group]) -> list[tuple[str, ...]]:
    """A row for each key that is not the same in all recipes, a column for each recipe; the first row is the head."""
    keys = dict.fromkeys(key for group in groups for key in group.runs[0].run.recipe if key != "seed")
    differing = [key for key in keys if len({_recipe_value(group, key) for group in groups}) > 1]
    recipes = dict.fromkeys((group.label, *(_recipe_value(group, key) for key in differing)) for group in groups)
    columns = [("recipe", *differing), *recipes] if differing else []
    return list(zip(*columns, strict=True))


def _part(number: int, data: str, groups: list[Group]) -> dict[str, Any]:
    figures = [figure for figure in FIGURES if any(group.values(figure) for group in groups)]
    evaluation = groups[0].runs[0].evaluation or {}
    images, floor = evaluation["images"], (evaluation["reconstruction"] or {}).get("frechet_floor")
    caption = f"{images['good']} good and {images['anomalous']} anomalous test images."
    if floor is not None:
        caption += f" Two halves of the good ones are at a Fréchet distance of {floor:.3g} from each other."
    drawn = []
    for figure in (figure for figure in DRAWN if figure in figures):
        points = {group.label: group.values(figure) for group in groups}
        svg = charts.dots(f"part-{number}-{FIGURES[figure][0]}-{FIGURES[figure][1]}", figure, points, label=figure)
        drawn.append(chart(figure, svg))
    return {
        "data": data,
        "tables": [
            {
                "head": ["run", "seeds", *columns],
                "rows": [
                    (group.label, len(group.runs), *(shown(group.values(figure)) for figure in columns))
                    for group in groups
                ],
            }
            for columns in ([name for name in figures if name in of] for of in (DETECTION, FIDELITY))
            if columns
        ],
        "caption": caption,
        "charts": drawn,
    }


def _recipe_value(group: Group, key: str) -> str:
    return str(group.runs[0].run.recipe.get(key, "-"))


def _run_row(run: RunFolder) -> tuple[str, ...]:
    auroc = ((run.evaluation or {})["image"] or {}).get("auroc")
    return (
        str(run.folder),
        str(run.run.recipe["seed"]),
        str(run.step),
        "-" if run.minutes is None else f"{run.minutes:.1f}",
        str(len(run.findings)),
        "-" if auroc is None else f"{auroc['value']:.3f}",
        "-" if auroc is None else f"{auroc['low']:.2f} to {auroc['high']:.2f}",
    )
