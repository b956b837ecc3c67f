"""The whole path on real data: train, evaluate, score, serve, POST every test image, compare.

    python -m benchmarks.whole_path DATA [DATA ...]

Each DATA is a folder in MVTec layout with a test split. Every stage is the command that a user would run, as a process
of its own. Prints a table in Markdown, writes docs/benchmarks/whole-path.json.
"""

import csv
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from rich.console import Console
from sklearn.metrics import roc_auc_score

from benchmarks.results import write_results
from models.calibration import SCORE_NAMES
from training.data import read_dataset

HAZELNUT = [sys.executable, "-m", "hazelnut"]
RESULTS = Path("docs/benchmarks")


@dataclass(frozen=True)
class Stage:
    seconds: float
    peak_gib: float


@dataclass(frozen=True)
class Row:
    """One data set. Differences are the largest over all test images and scores, HTTP against `hazelnut score`."""

    data: str
    train: Stage
    training_images_per_second: float
    evaluation: dict[str, Any]
    score: Stage
    http_images: int
    http_images_per_second: float
    http_peak_gib: float
    http_largest_difference: float
    http_image_auroc: float


def main(
    data: Annotated[list[Path], typer.Argument(help="Folders in MVTec layout.")],
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/whole-path"),
    recipe: Annotated[str, typer.Option(help="Name of a recipe.")] = "default",
) -> None:
    rows = [measure(folder, runs / folder.name, recipe) for folder in data]
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.whole_path", *[f"PACK/{folder.name}" for folder in data]]),
        "recipe": recipe,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "rows": [asdict(row) for row in rows],
    }
    write_results(RESULTS / "whole-path.json", record)
    Console(soft_wrap=True).print(markdown(rows), markup=False, highlight=False)


def measure(data: Path, run: Path, recipe: str) -> Row:
    checkpoint = run / "checkpoint"
    resume = ["--resume"] if run.exists() else []
    train = stage([*HAZELNUT, "train", str(data), "--recipe", recipe, "--out", str(run), *resume])
    rates = [json.loads(line)["images_per_second"] for line in (run / "log.jsonl").read_text().splitlines()]
    stage([*HAZELNUT, "evaluate", str(checkpoint), str(data)])
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation.pop("command")  # it names folders of this machine; the record has its own
    evaluation.pop("details")  # of each image

    test = read_dataset(data).test
    paths = [str(image.path) for image in test]
    with (run / "scores.csv").open("w") as file:
        score = stage([*HAZELNUT, "score", str(checkpoint), *paths, "--csv"], stdout=file)
    with (run / "scores.csv").open() as file:
        expected = list(csv.DictReader(file))

    with served(checkpoint) as (client, process):
        begin = time.perf_counter()
        answers = [post(client, image.path) for image in test]
        seconds = time.perf_counter() - begin
        http_peak = peak_gib(process)
    difference = max(
        abs(answer["scores"][name] - float(row[name]))
        for answer, row in zip(answers, expected, strict=True)
        for name in SCORE_NAMES
    )
    labels = [image.defect != "good" for image in test]
    return Row(
        data=data.name,
        train=train,
        training_images_per_second=sorted(rates)[len(rates) // 2],
        evaluation=evaluation,
        score=score,
        http_images=len(test),
        http_images_per_second=len(test) / seconds,
        http_peak_gib=http_peak,
        http_largest_difference=difference,
        http_image_auroc=float(roc_auc_score(labels, [answer["anomaly_score"] for answer in answers])),
    )


def stage(command: list[str], *, stdout: Any = None) -> Stage:
    """Run to the end; its seconds, and its own peak memory."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=stdout)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return Stage(seconds=time.perf_counter() - begin, peak_gib=usage.ru_maxrss / 2**20)


@contextmanager
def served(checkpoint: Path) -> Iterator[tuple[httpx2.Client, "subprocess.Popen[bytes]"]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([*HAZELNUT, "serve", "--checkpoint", str(checkpoint), "--port", str(port)])
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client, process)
            yield client, process
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(client: httpx2.Client, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the service ended before it was ready")
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx2.ConnectError:
            time.sleep(0.1)
    raise SystemExit("the service was not ready after a minute")


def post(client: httpx2.Client, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = client.post("/score", files={"files": (path.name, file)})
    answer.raise_for_status()
    result: dict[str, Any] = answer.json()["results"][0]
    return result


def peak_gib(process: "subprocess.Popen[bytes]") -> float:
    """The most memory that a running process has had, as Linux tells it."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def markdown(rows: list[Row]) -> str:
    """A line per figure, a column per data set."""
    lines: list[tuple[str, list[str]]] = [
        ("training, minutes", [f"{row.train.seconds / 60:.1f}" for row in rows]),
        ("training, images per second", [f"{row.training_images_per_second:.0f}" for row in rows]),
        ("training, peak GiB", [f"{row.train.peak_gib:.2f}" for row in rows]),
        ("image AUROC, `evaluate`", [f"{row.evaluation['image']['auroc']['value']:.4f}" for row in rows]),
        ("image AUROC, from the HTTP answers", [f"{row.http_image_auroc:.4f}" for row in rows]),
        ("pixel AUROC", [f"{row.evaluation['pixel']['auroc']:.4f}" for row in rows]),
        ("AUPRO@0.3", [f"{row.evaluation['pixel']['aupro_0.3']['value']:.4f}" for row in rows]),
        ("test images POSTed", [str(row.http_images) for row in rows]),
        ("largest difference of a score, HTTP - `score`", [f"{row.http_largest_difference:.1e}" for row in rows]),
        (
            "`score`, images per second, start-up included",
            [f"{row.http_images / row.score.seconds:.0f}" for row in rows],
        ),
        ("`score`, peak GiB", [f"{row.score.peak_gib:.2f}" for row in rows]),
        ("HTTP, one client, images per second", [f"{row.http_images_per_second:.0f}" for row in rows]),
        ("`serve`, peak GiB", [f"{row.http_peak_gib:.2f}" for row in rows]),
    ]
    head = ["| | " + " | ".join(row.data for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    return "\n".join([*head, *(f"| {name} | " + " | ".join(values) + " |" for name, values in lines)]) + "\n"


if __name__ == "__main__":
    typer.run(main)
