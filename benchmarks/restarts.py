"""Restarts and new checkpoints under load: no request is lost.

    python -m benchmarks.restarts [--restarts 20] [--swaps 20] [--kills 20]

Restarts: while clients send images, each another one, the service gets SIGTERM. Every request of which all was sent is
answered whole, or refused with 503 and Retry-After; the service exits with status 0 in time. Every second time twenty
slow clients are connected as well. How requests are told apart is in benchmarks/exchange.py.

Swaps: the service serves a folder of versions. While clients send images, the next version is put there, and the
service is told by SIGHUP: answers change to its sha256, and none fails. Then a version whose weights are damaged: the
one before goes on, /models says what is wrong, and none fails. Then a good one again.

Kills: while clients send images, the process that scores is killed by SIGKILL again and again. Every request is
answered with scores.

Prints tables in Markdown, writes docs/benchmarks/reliability-restarts.json.
"""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.exchange import ANSWERED, LOST, NOT_READ, NOT_SENT, REFUSED, Exchanges
from benchmarks.running import DidNotStopError, Running, report, running
from benchmarks.traffic import Client, SlowClients, picture
from models.checkpoint import WEIGHTS_FILE, load_checkpoint, save_checkpoint
from service.device_worker import NAME as DEVICE

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
SLOW = {"headers": 10, "body": 10}
IN_TIME_SECONDS = 31  # the 30 that the service gives answers on their way, and a moment to leave
SWITCH_SECONDS = 20


@dataclass
class Load:
    """What the clients have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    digests: Counter[str] = field(default_factory=Counter)


def main(
    restarts: Annotated[int, typer.Option(help="How many.")] = 20,
    swaps: Annotated[int, typer.Option(help="How many new versions; 0 leaves out the damaged one, too.")] = 20,
    kills: Annotated[int, typer.Option(help="How often the process that scores is killed.")] = 20,
    clients: Annotated[int, typer.Option(help="How many send at the same time.")] = 8,
    load_seconds: Annotated[float, typer.Option(help="Of load before each restart or swap.")] = 2,
    out: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
) -> None:
    record: dict[str, Any] = {"clients": clients}
    bars: dict[str, bool] = {}
    if restarts:
        load, seconds = restart_all(restarts, clients, load_seconds)
        record |= {"restarts": restarts, **told(load, "restarts"), "stopped as promised": len(seconds)}
        record |= {
            "seconds until it had ended, at most": max(seconds, default=None),
            "seconds until it had ended": seconds,
        }
        bars["restarts: no request lost"] = not load.counts[LOST] and load.counts[ANSWERED] > 0
        in_time = [each for each in seconds if each <= IN_TIME_SECONDS]
        bars[f"restarts: exit with status 0 within {IN_TIME_SECONDS} s"] = len(in_time) == restarts
    if swaps:
        found = swap_all(swaps, clients, load_seconds)
        record |= {"swaps": swaps, **told(found.load, "swaps")}
        record["seconds until the new one answered, at most"] = max(found.seconds)
        record["seconds until the new one answered"] = found.seconds
        record["answers of the versions"] = len(found.load.digests)
        record["what /models says of the damaged one"] = found.problem
        failed = found.load.counts.total() - found.load.counts[ANSWERED]
        bars["swaps: every request answered"] = not failed and found.load.counts[ANSWERED] > 0
        bars["swaps: answers are of the published versions alone"] = set(found.load.digests) <= found.published
        bars["a damaged version: the one before goes on, and /models says so"] = found.old_went_on and bool(
            found.problem
        )
    if kills:
        load, lost = kill_all(kills, clients, load_seconds)
        record |= {"kills": kills, **told(load, "kills"), "processes of the device that were replaced": lost}
        bars["kills: every request answered"] = load.counts.total() == load.counts[ANSWERED] > 0
        bars["kills: each was noticed"] = lost == kills
    report("restarts", out, record, bars)


def told(load: Load, part: str) -> dict[str, Any]:
    counts = {name: load.counts[name] for name in (ANSWERED, REFUSED, NOT_SENT, NOT_READ, LOST)}
    return {f"{part}: requests": counts, f"{part}: losses": load.losses[:20]}


def restart_all(restarts: int, clients: int, load_seconds: float) -> tuple[Load, list[float]]:
    load, seconds = Load(), []
    for number in range(restarts):
        try:
            with running() as service:
                slow = SLOW if number % 2 else {}
                with SlowClients(service.port, slow), loaded(service, clients, load, "/score"):
                    time.sleep(load_seconds)
                    seconds.append(service.stop())
        except DidNotStopError as error:
            load.losses.append(f"restart {number}: {error}")
    return load, seconds


@contextmanager
def loaded(service: Running, clients: int, load: Load, target: str) -> Iterator[None]:
    """Clients that send while the block runs, or until the service is gone."""
    over = threading.Event()
    lock = threading.Lock()

    def send(number: int) -> None:
        exchanges = Exchanges(service.port)
        seed = number
        while not over.is_set() and not exchanges.gone:
            answer = exchanges.post(target, picture(seed, side=96))
            seed += clients  # no image twice
            if answer is None:
                time.sleep(0.02)
            else:
                with lock:
                    load.digests[answer["model"]["sha256"]] += 1
        with lock:
            load.counts.update(exchanges.counts)
            load.losses += exchanges.losses

    threads = [threading.Thread(target=send, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def kill_all(kills: int, clients: int, load_seconds: float) -> tuple[Load, int]:
    """What the clients have seen, and how often the service has replaced its process."""
    load = Load()
    with running() as service:
        with loaded(service, clients, load, "/score"):
            for _ in range(kills):
                time.sleep(load_seconds)
                (pid,) = service.pids_named(DEVICE)
                os.kill(pid, signal.SIGKILL)
            time.sleep(load_seconds)
        lost = service.metric("hazelnut_device_processes_lost_total")
    return load, int(lost)


@dataclass
class Swaps:
    load: Load = field(default_factory=Load)
    seconds: list[float] = field(default_factory=list)
    published: set[str] = field(default_factory=set)
    problem: str | None = None
    old_went_on: bool = False


def swap_all(swaps: int, clients: int, load_seconds: float) -> Swaps:
    found = Swaps()
    name = load_checkpoint(DEMO).origin["name"]
    with tempfile.TemporaryDirectory() as folder:
        versions = Path(folder) / name
        found.published.add(publish(versions, 1))
        with running(checkpoint=folder) as service, loaded(service, clients, found.load, f"/score?model={name}"):
            for version in range(2, swaps + 2):
                time.sleep(load_seconds)
                found.seconds.append(swap(service, versions, version, found))
            time.sleep(load_seconds)
            damage(versions, swaps + 2)
            service.process.send_signal(signal.SIGHUP)
            wait_until(lambda: model(service)["problem"], "/models does not say that a version is damaged")
            time.sleep(load_seconds)
            found.problem = model(service)["problem"].replace(folder, "")
            found.old_went_on = model(service)["version"] == swaps + 1
            swap(service, versions, swaps + 3, found)
    return found


def swap(service: Running, versions: Path, version: int, found: Swaps) -> float:
    """Seconds from the new version's being there to the first answer of it."""
    digest = publish(versions, version)
    found.published.add(digest)
    begin = time.perf_counter()
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: found.load.digests[digest], f"no answer of version {version}")
    return time.perf_counter() - begin


def publish(versions: Path, version: int) -> str:
    """The demo's checkpoint with weights a little different, under its final name at once; their sha256."""
    checkpoint = load_checkpoint(DEMO)
    with torch.no_grad():
        next(checkpoint.networks.parameters()).mul_(1 + 1e-6 * version)
    save_checkpoint(versions / str(version), checkpoint)
    return load_checkpoint(versions / str(version)).weights_sha256


def damage(versions: Path, version: int) -> None:
    """The version before with one byte of its weights changed, under its final name at once."""
    with tempfile.TemporaryDirectory() as hidden:
        copy = shutil.copytree(versions / str(version - 1), Path(hidden) / "copy")
        weights = bytearray((copy / WEIGHTS_FILE).read_bytes())
        weights[len(weights) // 2] ^= 1
        (copy / WEIGHTS_FILE).write_bytes(weights)
        copy.rename(versions / str(version))


def model(service: Running) -> Any:
    """The one model of /models."""
    return Client(service.port).send("GET", "/models").json()["models"][0]


def wait_until(condition: Callable[[], object], otherwise: str) -> None:
    end = time.monotonic() + SWITCH_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{otherwise} after {SWITCH_SECONDS} seconds")
        time.sleep(0.02)


if __name__ == "__main__":
    typer.run(main)
