"""The service beside what a user would put around the same model: a plain FastAPI app, LitServe, BentoML.

    python -m benchmarks.serving --peers-python PEERS/bin/python [--checkpoint FOLDER] [--seconds 10] [--repeats 3]

wrk, the Debian package, drives them: a closed loop, in which a connection's next request follows its answer. The peers'
Python is that of an environment of its own:

    uv venv --python 3.11 PEERS
    uv pip install --python PEERS --requirements pyproject.toml --extra service --group peers

All decode and score by the library, in batches of at most 16 where they batch. Each peer is one process, or has one for
the model, unless --workers says otherwise. Bodies are multipart/form-data with one file, because LitServe takes nothing
else but JSON; this service also takes raw images, which cost it less. Everything else, logs included, is as it comes. A
server that answers with other scores than the library's is not measured.

Two kinds of load: JPEGs of 1024 x 1024 pixels for real checkpoints, and small PNGs for networks that cost next to
nothing, so that what is left is the serving. Every round goes through the ceiling and all servers, each started afresh.

The ceiling is decoding and scoring in one process without HTTP: a pool of threads, or of processes, decodes ahead, and
this thread scores batches of 16. Which is faster depends on the images and the networks: threads share the interpreter,
processes copy; scoring in several threads takes cores from decoding. All four ways are measured, for half the seconds
each, and the fastest counts. wrk takes its share of the cores from the servers, not from the ceiling.

The overhead is that of a lone request: the median over one connection, less the median of decoding and scoring the same
images in this process, in turns of a second or two. Memory is that of all processes under load: PSS, and RSS, which
counts a shared page once per process. Prints one table in Markdown, writes the JSON after every round.
"""

import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.peers.common import LARGEST_BATCH, pixel_array, pixels, results
from benchmarks.peers.server import HOST, Server, served
from benchmarks.peers.workloads import CONTENT_TYPE, Workload, form, workloads
from benchmarks.results import write_results
from models.memory import keep_freed_memory
from models.scoring import choose_device

OURS = "Hazelnut"
CEILING = "ceiling, no HTTP"
WARM_SECONDS = 2
LONE_TURNS = 3
LEAST_SECONDS = 5  # of a load: a peer may take more than two to its first answer
# What scores and their cost depend on has to be the same in both environments; of the others the version is recorded.
SAME = ("torch", "torchvision", "numpy", "pillow")
RECORDED = ("fastapi", "uvicorn", "litserve", "bentoml")

Turn = dict[str, Any]


def main(
    peers_python: Annotated[Path, typer.Option(help="Python of the environment that has the peers.")],
    checkpoint: Annotated[list[Path] | None, typer.Option(help="Measure it too; repeatable.")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Of each load.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds through all servers.")] = 3,
    connections: Annotated[int, typer.Option(min=1, max=64, help="Of wrk; more than 64 are refused as busy.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each peer.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="The JSON.")] = Path("docs/benchmarks/serving.json"),
) -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: it is the Debian package wrk.")
    keep_freed_memory()
    where = choose_device(device)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.serving --peers-python PEERS/bin/python --seconds {seconds} "
        f"--repeats {repeats} --connections {connections} --workers {workers} --device {where.type}",
        "device": torch.cuda.get_device_name() if where.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "body": "multipart/form-data, one file",
        "versions": versions(peers_python),
        "workloads": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for workload in workloads(Path(scratch), checkpoint or [], where):
            turns: dict[str, list[Turn]] = {}
            described = {"model": workload.name, "file_bytes": [len(image) for image in workload.images]}
            record["workloads"].append(described)
            for _ in range(repeats):
                turns.setdefault(CEILING, []).append(ceiling(workload, seconds))
                for name, command in servers(peers_python).items():
                    environment = {
                        "HAZELNUT_CHECKPOINT": str(workload.checkpoint.resolve()),
                        "HAZELNUT_DEVICE": where.type,
                        "WORKERS": str(workers),
                        "BENTOML_HOME": scratch,
                        "BENTOML_DO_NOT_TRACK": "True",
                    }
                    with served(name, command, environment, form(workload.images[0])) as server:
                        turns.setdefault(name, []).append(measure(server, workload, seconds, connections))
                described["rows"] = [row(name, taken, turns[CEILING]) for name, taken in turns.items()]
                write_results(out, record)
    Console(soft_wrap=True).print(markdown(record["workloads"]), markup=False, highlight=False)


def servers(peers_python: Path) -> dict[str, list[str]]:
    """Commands by name; PORT stands for the port where there is no other way to say it."""
    peer = [str(peers_python), "-m"]
    bentoml = ["bentoml", "serve", "benchmarks.peers.bentoml_app:Peer", "--host", HOST, "--port", "PORT"]
    return {
        OURS: [sys.executable, "-m", "hazelnut", "serve"],
        "plain FastAPI": [*peer, "benchmarks.peers.plain_fastapi"],
        "LitServe": [*peer, "benchmarks.peers.litserve_app"],
        "BentoML": [*peer, *bentoml],
    }


def versions(peers_python: Path) -> dict[str, str]:
    """Of both environments. Raises SystemExit where they cannot be compared."""
    names = (*SAME, *RECORDED)
    script = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    try:
        asked = subprocess.run([peers_python, "-c", script], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{peers_python} is not a Python that has {', '.join(names)}.") from error
    found: dict[str, str] = json.loads(asked.stdout)
    for name in SAME:
        if found[name] != version(name):
            raise SystemExit(f"the peers have {name} {found[name]}, this environment has {version(name)}.")
    return {"python": platform.python_version(), **found}


def measure(server: Server, workload: Workload, seconds: int, connections: int) -> Turn:
    check(server, workload)
    load(server, workload, LEAST_SECONDS, connections)
    turn: Turn = {"ready_seconds": server.ready_seconds}
    with ThreadPoolExecutor(1) as thread:
        loaded = thread.submit(load, server, workload, seconds, connections)
        time.sleep(seconds / 2)
        turn["memory_mib"] = server.memory()
        turn |= loaded.result()
    part = max(math.ceil(seconds / 5), LEAST_SECONDS)
    lone, alone = [], []
    for _ in range(LONE_TURNS):
        lone.append(load(server, workload, part, 1)["p50_ms"])
        alone.append(in_process(workload, part))
    return {**turn, "lone_ms": median(lone), "in_process_ms": median(alone)}


def check(server: Server, workload: Workload) -> None:
    """All images at once, so that batches and mixed-up answers show. Raises SystemExit."""
    with ThreadPoolExecutor(len(workload.images)) as threads:
        responses = list(threads.map(lambda image: server.client.post(server.url, **form(image)), workload.images))
    for image, response in zip(workload.images, responses, strict=True):
        if response.status_code != 200:
            raise SystemExit(f"{server.name} answers with status {response.status_code}: {response.text[:500]}")
        answer = response.json()
        (result,) = answer["results"] if isinstance(answer, dict) else answer
        (wanted,) = results(workload.scorer.score(pixels(image, workload.scorer.config).unsqueeze(0)))
        for name, value in wanted["scores"].items():
            # Batches of another size may differ in the last bits.
            if not math.isclose(result["scores"][name], value, rel_tol=1e-4):
                raise SystemExit(f"{server.name} says {name} {result['scores'][name]}: the library says {value}.")


def load(server: Server, workload: Workload, seconds: int, connections: int) -> Turn:
    """Of answers with status 200 alone. p50 and p99 are wrk's own, over all answers."""
    script = Path(__file__).with_name("peers") / "post.lua"
    options = [f"-c{connections}", "-t1", f"-d{seconds}s", "--timeout=30s", "-s", str(script), server.url]
    command = ["wrk", *options, "--", CONTENT_TYPE, *map(str, workload.bodies)]
    printed = subprocess.run(command, capture_output=True, text=True, check=False)
    if printed.returncode != 0:
        raise SystemExit(f"wrk failed: {printed.stderr or printed.stdout}")
    said = json.loads(printed.stdout.splitlines()[-1])
    answered = said["answers"] - said["refused"]
    if answered == 0:  # the median of nothing would read as 0 ms
        raise SystemExit(f"{server.name} answered none of {connections} connections within {seconds} seconds.")
    return {
        "requests_per_second": answered / said["seconds"],
        "p50_ms": said["p50_ms"],
        "p99_ms": said["p99_ms"],
        "errors": said["refused"] + said["broken"],
    }


def in_process(workload: Workload, seconds: int) -> float:
    """Median milliseconds to decode and score one image."""
    taken = []
    begin = time.perf_counter()
    for image in itertools.cycle(workload.images):
        start = time.perf_counter()
        workload.scorer.score(pixels(image, workload.scorer.config).unsqueeze(0))
        taken.append(time.perf_counter() - start)
        if time.perf_counter() - begin > seconds:
            break
    return 1000 * median(taken)


def ceiling(workload: Workload, seconds: int) -> Turn:
    # torch's own threads would only get in the way of the other decoders.
    single: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    pools: dict[str, Callable[[], Executor]] = {
        "threads": lambda: ThreadPoolExecutor(os.cpu_count(), **single),
        "processes": lambda: ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), **single),
    }
    scoring_threads = torch.get_num_threads()
    rates = {}
    for name, pool in pools.items():
        with pool() as decoders:
            for threads in {scoring_threads, 1}:
                torch.set_num_threads(threads)
                rates[f"{name}, {threads} for scoring"] = pipeline(decoders, workload, math.ceil(seconds / 2))
    torch.set_num_threads(scoring_threads)
    return {"requests_per_second": max(rates.values()), "ways": rates}


def pipeline(decoders: Executor, workload: Workload, seconds: int) -> float:
    """Images per second, decoded ahead by the pool and scored here in the largest batches."""
    images = itertools.cycle(workload.images)
    ahead: deque[Future[NDArray[Any]]] = deque()
    # The first span fills what is ahead, and does not count.
    for span in (WARM_SECONDS, seconds):
        scored, begin = 0, time.perf_counter()
        while (taken := time.perf_counter() - begin) < span:
            while len(ahead) < 4 * LARGEST_BATCH:
                ahead.append(decoders.submit(pixel_array, next(images), workload.scorer.config))
            batch = np.stack([ahead.popleft().result() for _ in range(LARGEST_BATCH)])
            workload.scorer.score(torch.from_numpy(batch))
            scored += LARGEST_BATCH
    return scored / taken


def row(name: str, turns: list[Turn], ceilings: list[Turn]) -> Turn:
    """Medians over the rounds, each beside the ceiling of its own round, and the rounds themselves."""
    rates = [turn["requests_per_second"] for turn in turns]
    summary: Turn = {
        "server": name,
        "requests_per_second": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "share_of_ceiling": median(
            rate / top["requests_per_second"] for rate, top in zip(rates, ceilings, strict=True)
        ),
    }
    if name != CEILING:
        summary |= {key: median(turn[key] for turn in turns) for key in ("p50_ms", "p99_ms", "ready_seconds")}
        summary["overhead_ms"] = median(turn["lone_ms"] - turn["in_process_ms"] for turn in turns)
        summary |= {f"{key}_mib": median(turn["memory_mib"][key] for turn in turns) for key in ("Pss", "Rss")}
        summary["errors"] = sum(turn["errors"] for turn in turns)
    return {**summary, "turns": turns}


def markdown(measured: list[dict[str, Any]]) -> str:
    heads = ["model", "server", "requests/s (lowest-highest)", "of the ceiling", "p50, ms", "p99, ms"]
    heads += ["overhead of a lone one, ms", "PSS (RSS), MiB", "ready, s", "errors"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for workload in measured:
        for row in workload["rows"]:
            cells = [
                workload["model"],
                row["server"],
                f"{row['requests_per_second']:.0f} ({row['lowest']:.0f}-{row['highest']:.0f})",
                f"{row['share_of_ceiling']:.0%}",
            ]
            if row["server"] == CEILING:
                cells += [""] * 6
            else:
                cells += [f"{row[key]:.1f}" for key in ("p50_ms", "p99_ms", "overhead_ms")]
                cells += [f"{row['Pss_mib']:.0f} ({row['Rss_mib']:.0f})", f"{row['ready_seconds']:.1f}"]
                cells.append(str(row["errors"]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
