"""The development diary, run again: its four recipes, and what its open questions ask.

    python -m benchmarks.study DATA [DATA ...] [--seeds 3] [--workers 2]            # on two cores
    python -m benchmarks.study DATA [DATA ...] --image-size 128 --workers 1 --device cuda

Each recipe with batch norm before and after the activation, then how often the discriminators learn, and what may make
reconstructions sharper, one change of one recipe at a time. `hazelnut train` and `hazelnut evaluate` as processes of
their own, one thread each, so many at a time as there are workers. Runs are kept and resumed; what is there is not done
again. A row is printed as each ends.
Nothing is chosen by these figures in any run: training ends at the recipe's last step.

Prints tables in Markdown, writes docs/benchmarks/study.json after every run.
"""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from scipy import stats

from benchmarks.results import write_results
from training.run_folder import RunFolder, read_run_folder

HAZELNUT = [sys.executable, "-m", "hazelnut"]
RESULTS = Path("docs/benchmarks/study.json")
STEPS = 600

DIARY = ("diary-2021-03-31", "diary-2021-04-06", "diary-2021-04-09", "diary-next")
POSITIONS = ("before", "after")
# Changes of the recipe that costs least of those with the right flags. Its discriminators learn in one of five steps.
CHANGED = "diary-2021-04-06"
TURNS = {"discriminators in each step": ["discriminator_every=1"]}
# The weights are half of l2_weight's, as in the default recipe.
SHARPER = {
    "gradient loss": ["gradient_weight=50"],
    "SSIM loss": ["ssim_weight=50"],
    "grid of codes": ["latent=grid"],
    "grid of codes, gradient loss": ["latent=grid", "gradient_weight=50"],
    "256 numbers in the code": ["latent_dim=256"],
    "twice the channels": ["width=16"],
    "image adversary ten times": ["image_weight=10"],
}

# Of the last third of the steps.
LOSSES = ("latent_discriminator", "latent_adversarial", "image_discriminator", "image_adversarial")
TABLE = {
    "reconstruction sharpness": ".2f", "reconstruction PSNR, dB": ".1f", "reconstruction distance": ".2f",
    "sample sharpness": ".2f", "sample distance": ".1f", "code std": ".2f", "code dimensions": ".1f",
    "image AUROC": ".3f", "pixel AUROC": ".3f", "AUPRO@0.3": ".3f",
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    data: Path
    group: str  # diary, turns or sharper
    name: str
    recipe: str
    batch_norm: str
    seed: int
    overrides: list[str]

    def folder(self, runs: Path) -> Path:
        return runs / self.data.name / f"{self.name}-{self.batch_norm}-{self.seed}".replace(" ", "-").replace(",", "")


def plan(data: list[Path], seeds: int) -> list[Planned]:
    """Seed by seed, so that what is there early covers everything."""
    diary = [
        Planned(folder, "diary", recipe, recipe, position, seed, [f"batch_norm={position}"])
        for seed in range(seeds)
        for folder in data
        for recipe in DIARY
        for position in POSITIONS
    ]
    changed = [
        Planned(folder, group, name, CHANGED, "before", seed, changes)
        for group, variants in (("turns", TURNS), ("sharper", SHARPER))
        for seed in range(seeds)
        for folder in data
        for name, changes in variants.items()
    ]
    return diary + changed


def main(
    data: Annotated[list[Path], typer.Argument(help="Folders in MVTec layout.")],
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    image_size: Annotated[int, typer.Option(help="Pixels on each side.")] = 64,
    steps: Annotated[int, typer.Option(help="Of every run.")] = STEPS,
    workers: Annotated[int, typer.Option(help="Runs at the same time, one thread each.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/study"),
    out: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS,
) -> None:
    console = Console(soft_wrap=True, highlight=False)
    rows: list[dict[str, Any]] = []
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.study", *(f"PACK/{folder.name}" for folder in data)]),
        "image_size": image_size,
        "steps": steps,
        "seeds": seeds,
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "rows": rows,
    }
    planned = plan(data, seeds)
    common = [f"image_size={image_size}", f"steps={steps}", f"save_every={max(1, steps // 4)}"]
    with ThreadPoolExecutor(workers) as pool:
        # A run that fails ends the study; those under way end first, and all that is done stays.
        futures = [pool.submit(done, each, each.folder(runs), common, device) for each in planned]
        for future in as_completed(futures):
            if error := future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"{error}")
            rows.append(future.result())
            write_results(out, record)
            console.print(shown(rows[-1], number=len(rows), of=len(planned)), markup=False)
    console.print(markdown(rows), markup=False)


def done(each: Planned, run: Path, common: list[str], device: str) -> dict[str, Any]:
    if not (run / "evaluation.json").exists():
        sets = [
            argument for change in [*common, *each.overrides, f"seed={each.seed}"] for argument in ("--set", change)
        ]
        resume = ["--resume"] if run.exists() else []
        chosen = ["--device", device, "--out", str(run)]
        call([*HAZELNUT, "train", str(each.data), "--recipe", each.recipe, *sets, *chosen, *resume])
        call([*HAZELNUT, "evaluate", str(run / "checkpoint"), str(each.data), "--device", device])
    return row_of(each, read_run_folder(run))


def call(command: list[str]) -> None:
    """Raises RuntimeError with what the command said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if finished.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{finished.stderr[-2000:]}")


def row_of(each: Planned, folder: RunFolder) -> dict[str, Any]:
    evaluation = folder.evaluation
    assert evaluation is not None
    last_third = [entry for entry in folder.log if entry["step"] > folder.step * 2 / 3]
    measured = [entry for entry in folder.log if "code/std" in entry][-1]
    reconstruction, generation = evaluation["reconstruction"], evaluation["generation"]
    losses = {}
    for name in LOSSES:
        values = [entry[name] for entry in last_third]
        losses[name] = {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    return {
        "data": each.data.name,
        "group": each.group,
        "name": each.name,
        "batch_norm": each.batch_norm,
        "seed": each.seed,
        "minutes": folder.minutes,
        "findings": [{key: finding[key] for key in ("step", "name", "figure")} for finding in folder.findings],
        "losses": losses,
        "last measurement": {name: value for name, value in measured.items() if "/" in name},
        "reconstruction sharpness": reconstruction["sharpness_ratio"],
        "reconstruction PSNR, dB": reconstruction["psnr_db"],
        "reconstruction distance": reconstruction["frechet_random_features"],
        "distance floor": reconstruction["frechet_floor"],
        "sample sharpness": generation["sharpness_ratio"],
        "sample distance": generation["frechet_random_features"],
        "sample variety": generation["variety_ratio"],
        "code std": measured["code/std"],
        "code dimensions": measured["code/effective_dimensions"],
        "image AUROC": evaluation["image"]["auroc"]["value"],
        "pixel AUROC": evaluation["pixel"]["auroc"],
        "AUPRO@0.3": evaluation["pixel"]["aupro_0.3"]["value"],
    }


def shown(row: dict[str, Any], *, number: int, of: int) -> str:
    figures = "  ".join(f"{name} {row[name]:{form}}" for name, form in TABLE.items())
    found = ", ".join(f"{finding['name']} at {finding['step']}" for finding in row["findings"]) or "nothing found"
    named = f"{row['data']}  {row['name']}  norm {row['batch_norm']}  seed {row['seed']}"
    return f"{number}/{of}  {named}  {row['minutes']:.1f} min  {figures}  {found}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The runs, mean over seeds; their losses; and what batch norm after the activation changes, run by run."""
    lines = []
    for group in ("diary", "turns", "sharper"):
        lines += [
            "",
            f"| data | run | norm | seeds | {' | '.join(TABLE)} | findings |",
            "|---" * (5 + len(TABLE)) + "|",
        ]
        for key, chosen in grouped(rows, group).items():
            figures = [f"{statistics.mean(row[name] for row in chosen):{form}}" for name, form in TABLE.items()]
            counts = Counter(name for row in chosen for name in {finding["name"] for finding in row["findings"]})
            found = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            lines.append(f"| {' | '.join(key)} | {len(chosen)} | {' | '.join(figures)} | {found} |")
    lines += ["", f"| data | run | norm | {' | '.join(LOSSES)} |", "|---" * (3 + len(LOSSES)) + "|"]
    for key, chosen in (grouped(rows, "diary") | grouped(rows, "turns")).items():
        losses = [
            f"{statistics.mean(row['losses'][name]['mean'] for row in chosen):.2f} ± "
            f"{statistics.mean(row['losses'][name]['deviation'] for row in chosen):.2f}"
            for name in LOSSES
        ]
        lines.append(f"| {' | '.join(key)} | {' | '.join(losses)} |")
    lines += ["", "| figure | after less before | 95 % | pairs |", "|---|---|---|---|"]
    for name, form in TABLE.items():
        if not (differences := pairs(rows, name)):
            continue
        mean, (low, high) = statistics.mean(differences), interval(differences)
        lines.append(f"| {name} | {mean:+{form}} | {low:+{form}} to {high:+{form}} | {len(differences)} |")
    return "\n".join(lines) + "\n"


def grouped(rows: list[dict[str, Any]], group: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    order = [*DIARY, *TURNS, *SHARPER]
    of_group = [row for row in rows if row["group"] == group]
    for row in sorted(of_group, key=lambda row: (row["data"], order.index(row["name"]), row["batch_norm"] == "after")):
        found.setdefault((row["data"], row["name"], row["batch_norm"]), []).append(row)
    return found


def pairs(rows: list[dict[str, Any]], figure: str) -> list[float]:
    """After less before, of runs that are alike otherwise. Where the flags are wrong batch norm normalises nothing."""
    found = {(row["data"], row["name"], row["seed"], row["batch_norm"]): row[figure] for row in rows}
    return [
        value - found[*key, "before"]
        for (*key, position), value in found.items()
        if position == "after" and key[1] != DIARY[0] and (*key, "before") in found
    ]


def interval(values: list[float]) -> tuple[float, float]:
    """Student's, of the mean. Pairs share packs and recipes: an honest one would be wider."""
    if len(values) < 2:
        return values[0], values[0]
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


if __name__ == "__main__":
    typer.run(main)
