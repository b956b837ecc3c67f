"""Detection, measured against what a user would pick instead.

    python -m benchmarks.quality DATA [DATA ...] --baseline PATCHCORE.py [--seeds 3] [--variant NAME ...]
    python -m benchmarks.quality DATA [DATA ...] --baseline PATCHCORE.py --recipe features --backbone-weights FILE

Each DATA is a folder in MVTec layout with a test split. Per data set and seed: `hazelnut train`, `hazelnut evaluate`
and the baseline, each as a process of its own. The baseline is a script that is called with DATA and --seed and prints
image AUROC, pixel AUROC and AUPRO@0.3. Runs are kept and resumed: what is there is not measured again.

A variant is the recipe with a part taken out, trained anew. Nothing is chosen by these figures.
Prints tables in Markdown, writes docs/benchmarks/quality.json after every run.
"""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.results import write_results

HAZELNUT = [sys.executable, "-m", "hazelnut"]
RESULTS = Path("docs/benchmarks/quality.json")
FIGURES = ("image AUROC", "pixel AUROC", "AUPRO@0.3")
BASELINE = "PatchCore, pretrained"

VARIANTS = {
    "whole": [],
    "without the latent discriminator": ["latent_weight=0"],
    "without the image discriminator": ["image_weight=0"],
    "without both discriminators": ["latent_weight=0", "image_weight=0"],
    "without the head": ["head_width=0"],
    # There is nothing for a head to find then.
    "without corruption": ["corruption=0", "head_width=0"],
    "without the gradient loss": ["gradient_weight=0"],
    "without jitter": ["jitter=0"],
    "whole images instead of windows": ["crop=0", "batch_size=4"],
    # Over features.
    "without corruption in features": ["feature_corruption=0", "batch_size=8"],
    "without corruption in pixels, and so without the head": ["feature_corruption=1", "head_width=0"],
}


def main(
    data: Annotated[list[Path], typer.Argument(help="Folders in MVTec layout.")],
    baseline: Annotated[Path | None, typer.Option(help="Script of the baseline.")] = None,
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    recipe: Annotated[str, typer.Option(help="Name of a recipe.")] = "default",
    backbone_weights: Annotated[Path | None, typer.Option(help="As of `hazelnut train`.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, for every run.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(VARIANTS)}.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/quality"),
    out: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS,
) -> None:
    overrides = overrides or []
    weights = [f"--backbone-weights={backbone_weights.resolve()}"] if backbone_weights else []
    rows: list[dict[str, Any]] = []
    command = ["python", "-m", "benchmarks.quality", *(f"PACK/{folder.name}" for folder in data), f"--recipe={recipe}"]
    record = {
        "command": shlex.join([*command, *(f"--set={override}" for override in overrides)]),
        "recipe": recipe,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "rows": rows,
    }
    for seed in range(seeds):
        for folder in data:
            for name in variant or ["whole"]:
                run = runs / folder.name / f"{name.replace(' ', '-')}-{seed}"
                rows.append(
                    measure(folder, run, name, recipe, [*overrides, *VARIANTS[name], f"seed={seed}"], seed, weights)
                )
                write_results(out, record)
            if baseline:
                rows.append(measure_baseline(folder, runs / folder.name / f"baseline-{seed}.json", baseline, seed))
                write_results(out, record)
    Console(soft_wrap=True).print(markdown(rows), markup=False, highlight=False)


def measure(
    data: Path, run: Path, name: str, recipe: str, overrides: list[str], seed: int, weights: list[str]
) -> dict[str, Any]:
    checkpoint = run / "checkpoint"
    if not (run / "evaluation.json").exists():
        sets = [argument for override in overrides for argument in ("--set", override)]
        resume = ["--resume"] if run.exists() else []
        call([*HAZELNUT, "train", str(data), "--recipe", recipe, *sets, *weights, "--out", str(run), *resume])
        call([*HAZELNUT, "evaluate", str(checkpoint), str(data)])
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation.pop("command")  # it names folders of this machine
    evaluation.pop("details", None)  # of each image
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch = json.loads((run / "run.json").read_text())["recipe"]["batch_size"]
    return {
        "data": data.name,
        "method": name,
        "seed": seed,
        "image AUROC": evaluation["image"]["auroc"]["value"],
        "pixel AUROC": evaluation["pixel"]["auroc"],
        "AUPRO@0.3": evaluation["pixel"]["aupro_0.3"]["value"],
        # Of the steps alone, so that a run that was resumed does not look shorter.
        "training_minutes": log[-1]["step"] * batch / statistics.median(e["images_per_second"] for e in log) / 60,
        "evaluation": evaluation,
    }


def measure_baseline(data: Path, kept: Path, script: Path, seed: int) -> dict[str, Any]:
    if not kept.exists():
        begin = time.perf_counter()
        printed = subprocess.check_output([sys.executable, str(script), str(data), "--seed", str(seed)], text=True)
        seconds = time.perf_counter() - begin
        found = {figure: re.search(rf"{re.escape(figure)} (\d\.\d+)", printed) for figure in FIGURES}
        if not all(found.values()):
            raise SystemExit(f"the baseline did not print {', '.join(FIGURES)}: {printed}")
        figures = {figure: float(match[1]) for figure, match in found.items() if match}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({**figures, "seconds": seconds}))
    return {"data": data.name, "method": BASELINE, "seed": seed, **json.loads(kept.read_text())}


def call(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and in brackets the lowest and the highest."""
    lines = [f"| data | method | seeds | {' | '.join(FIGURES)} |", "|---" * (3 + len(FIGURES)) + "|"]
    for data in dict.fromkeys(row["data"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if (row["data"], row["method"]) == (data, method)]
            if chosen:
                figures = [spread([row[figure] for row in chosen]) for figure in FIGURES]
                lines.append(f"| {data} | {method} | {len(chosen)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    typer.run(main)
