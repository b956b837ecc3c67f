"""An hour of everything that clients do: memory and open files stay where they are.

    python -m benchmarks.soak [--minutes 60]

Clients send good images, now and then a large one, broken ones, forms of many, ask for maps, give wrong parameters, ask
for paths that do not exist, and vanish. Each kind first runs once over, so that every metric has been seen. Memory and
open files of all the service's processes are read every ten seconds and written at once; the first tenth, at most five
minutes, is warm-up. At the end ten thousand random paths are asked for: the number of series on /metrics may not have
changed.

Prints a table in Markdown, writes docs/benchmarks/reliability-soak.json as it goes.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.mutations import mutated, whole_images
from benchmarks.results import write_results
from benchmarks.running import RESULTS, Running, report, running
from benchmarks.traffic import NO_ANSWER, PNG, Answer, Client, counted, form_bytes, picture, request_bytes, vanish

SAMPLE_SECONDS = 10
SLOPE_MIB = 1  # per minute
FILES_DRIFT = 5
ROUNDS_BEFORE = 30
# A decoding process keeps up to 64 MiB of what it has freed, as much as the images before have left. One image in a
# hundred is large, so that this varies from the warm-up on, and does not begin some time in the hour, with a mutated
# header that claims much.
PHOTOGRAPHS = 0.01
PHOTOGRAPH_SIDES = [1200, 2000, 3200]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"]
WRONG = ["?alpha=2", "?alpha=0.0001", "?alpha=x", "?map=gif", "?model=nobody", "?colour=red", "?map=png&map=none&x="]
PAGES = ["/models", "/models/nobody", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json", "/"]


@dataclass
class Guest:
    """A client of its own connection, its own randomness and its own images."""

    port: int
    seed: int
    broken_from: list[bytes]
    photographs: list[bytes]
    client: Client = field(init=False)
    draws: random.Random = field(init=False)
    number: int = 0

    def __post_init__(self) -> None:
        self.client = Client(self.port)
        self.draws = random.Random(self.seed)

    def image(self) -> bytes:
        if self.draws.random() < PHOTOGRAPHS:
            return self.draws.choice(self.photographs)
        format_name, media_side = (
            self.draws.choice(["PNG", "JPEG", "WEBP", "BMP", "TIFF"]),
            self.draws.choice([64, 256]),
        )
        return picture(self.draws.randrange(1000), side=media_side, format_name=format_name)

    def good(self) -> Answer:
        return self.client.send("POST", "/score", self.image(), PNG)

    def broken(self) -> Answer:
        self.number += 1
        return self.client.send("POST", "/score", mutated(self.broken_from, self.seed, self.number)[1], PNG)

    def maps(self) -> Answer:
        kind = self.draws.choice(["png", "overlay", "float32"])
        return self.client.send("POST", f"/score?map={kind}", self.image(), PNG)

    def many(self) -> Answer:
        images = [self.image() for _ in range(self.draws.randrange(2, 12))]
        images.append(mutated(self.broken_from, self.seed, self.draws.randrange(10**6))[1])
        body, headers = form_bytes(images)
        return self.client.send("POST", f"/score?map={self.draws.choice(['none', 'png'])}", body, headers)

    def wrong_parameters(self) -> Answer:
        return self.client.send("POST", "/score" + self.draws.choice(WRONG), self.image(), PNG)

    def wrong_forms(self) -> Answer:
        body, headers = form_bytes([self.image()])
        body = self.draws.choice(
            [body[:-20], body.replace(b"files", b"file"), b"", body.replace(b"filename", b"name_")]
        )
        return self.client.send(
            "POST", "/score", body, self.draws.choice([headers, headers, {"Content-Type": "text/plain"}])
        )

    def pages(self) -> Answer:
        return self.client.send("GET", self.draws.choice(PAGES))

    def random_paths(self) -> Answer:
        return self.client.send(self.draws.choice(METHODS), f"/{self.draws.randbytes(8).hex()}")

    def vanishing(self) -> None:
        request = request_bytes("/score", self.image())
        cut = self.draws.choice([len(request), len(request) // 2, 20])
        vanish(self.port, request[:cut], reset=self.draws.random() < 0.5)


KINDS: list[Callable[[Guest], Answer | None]] = [
    Guest.good, Guest.good, Guest.broken, Guest.maps, Guest.many, Guest.wrong_parameters, Guest.wrong_forms,
    Guest.pages, Guest.random_paths, Guest.vanishing,
]  # fmt: skip


@dataclass
class Seen:
    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def send(self, guest: Guest, kind: Callable[[Guest], Answer | None]) -> None:
        name = kind.__name__.replace("_", " ")
        try:
            answer = kind(guest)
            outcome = "gone" if answer is None else str(answer.status)
        except NO_ANSWER as error:
            outcome = f"no answer: {type(error).__name__}"
        with self.lock:
            self.answers[f"{name}: {outcome}"] += 1
            if outcome.startswith(("5", "no")) and outcome != "503":
                self.faults.append(f"{name}: {outcome}")


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60,
    clients: Annotated[int, typer.Option(help="How many at the same time.")] = 4,
    paths: Annotated[int, typer.Option(help="Random paths at the end.")] = 10_000,
    out: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
) -> None:
    seen = Seen()
    images = whole_images()
    photographs = [picture(0, side=side, format_name="JPEG") for side in PHOTOGRAPH_SIDES]
    samples: list[dict[str, Any]] = []
    with running() as service:

        def guest_of(seed: int) -> Guest:
            return Guest(service.port, seed, images, photographs)

        for kind in KINDS:
            guest = guest_of(0)
            for _ in range(ROUNDS_BEFORE):
                seen.send(guest, kind)
        series_before = len(service.series())
        soak(service, seen, guest_of, minutes, clients, samples, out)
        guest = guest_of(clients + 1)
        for _ in range(paths):
            seen.send(guest, Guest.random_paths)
        series = len(service.series())
        tracebacks = service.tracebacks()
    after = [sample for sample in samples if sample["minutes"] >= min(5, minutes / 10)]
    slope = slope_of(after)
    quarter = max(1, len(after) // 4)
    drift = mean_files(after[-quarter:]) - mean_files(after[:quarter])
    record: dict[str, Any] = {
        "minutes": minutes,
        "clients": clients,
        "answers": counted(seen.answers),
        "faults": seen.faults[:50],
        "memory MiB first, last, highest": [after[0]["MiB"], after[-1]["MiB"], max(sample["MiB"] for sample in after)],
        "memory by process MiB first": after[0]["processes"],
        "memory by process MiB last": after[-1]["processes"],
        "memory slope MiB per minute": slope,
        "open files: last quarter less first": drift,
        "series on /metrics before and after": f"{series_before}, {series}",
        "tracebacks in the log": tracebacks,
        "samples": samples,
    }
    bars = {
        f"memory rises by less than {SLOPE_MIB} MiB per minute": slope < SLOPE_MIB,
        f"open files rise by less than {FILES_DRIFT}": drift < FILES_DRIFT,
        "no 5xx but 503, no request without an answer": not seen.faults,
        "the number of series does not change": series == series_before,
        "no traceback in the log": tracebacks == 0,
    }
    report("soak", out, record, bars | service.bars())


def soak(
    service: Running,
    seen: Seen,
    guest_of: Callable[[int], Guest],
    minutes: float,
    clients: int,
    samples: list[dict[str, Any]],
    out: Path | None,
) -> None:
    over = threading.Event()

    def visit(number: int) -> None:
        guest = guest_of(number + 1)
        while not over.is_set():
            seen.send(guest, guest.draws.choice(KINDS))

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    try:
        while (now := (time.monotonic() - begin) / 60) < minutes and service.process.poll() is None:
            memory = service.memory_of_processes()
            sample = {"minutes": now, "MiB": sum(memory.values()), "open files": service.open_files()}
            samples.append(sample | {"processes": {name: round(mib) for name, mib in memory.items()}})
            write_results(out or RESULTS / "reliability-soak.json", {"minutes": now, "samples": samples})
            over.wait(min(SAMPLE_SECONDS, 60 * (minutes - now)))
    finally:
        over.set()
        for thread in threads:
            thread.join()


def slope_of(samples: list[dict[str, Any]]) -> float:
    """MiB per minute, by least squares; zero where there are too few samples for one."""
    if len(samples) < 2:
        return 0.0
    return float(np.polyfit([sample["minutes"] for sample in samples], [sample["MiB"] for sample in samples], 1)[0])


def mean_files(samples: list[dict[str, Any]]) -> float:
    return float(np.mean([sample["open files"] for sample in samples]))


if __name__ == "__main__":
    typer.run(main)
