"""Broken images over HTTP: no crash, no fault of the service, none slow, no memory that stays.

    python -m benchmarks.fuzz [--images 100000] [--kill-decoders 2]
    python -m benchmarks.fuzz --only INDEX [--save FILE]

Starts the service and sends images that benchmarks/mutations.py has broken, one after another on a few connections that
are kept. Latency is the client's, from its first byte to the last of the answer. An answer 503 with Retry-After is
counted, obeyed, and sent again.

With --kill-decoders a decoder process is killed every so many seconds. No request may fail of it, since the service
tries an image again on a new one: what was called unreadable meanwhile is sent again afterwards and has to be called so
again, and whole images must all be scored then. There is no bar on latency.

Every figure of one image is found again by --only and its index, with the same --seed.

Prints a table in Markdown, writes docs/benchmarks/reliability-fuzz.json.
"""

import heapq
import math
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.mutations import mutated, whole_images
from benchmarks.running import Running, report, running
from benchmarks.traffic import NO_ANSWER, Answer, Client, counted, in_threads, percentile_ms, picture

TARGET = "/score"
HEADERS = {"Content-Type": "image/any"}
WORKER = "hazelnut-decode"  # name of a decoder process in /proc
UNREADABLE = "image_unreadable"  # the code of an image of which a decoder died, or took too long
SLOWEST = 10
SLOW_MS = 500
GROWTH_MIB = 200
MEMORY_EVERY = 1000
AFTERWARDS = 100


@dataclass
class Findings:
    """What the threads have seen. Lists are of indices of images."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    busy: int = 0
    faults: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    odd_scores: list[int] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    killed: int = 0

    def add(self, index: int, mutation: str, answer: Answer | None) -> None:
        with self.lock:
            if answer is None:
                self.unanswered.append(index)
                return
            self.answers[f"{answer.status} {answer.code}"] += 1
            self.seconds.append(answer.seconds)
            entry = (answer.seconds * 1000, index, f"{mutation}: {answer.status} {answer.code}")
            heapq.heappush(self.slowest, entry)
            if len(self.slowest) > SLOWEST:
                heapq.heappop(self.slowest)
            if answer.status >= 500:
                self.faults.append(index)
            if answer.code == UNREADABLE:
                self.unreadable.append(index)
            if answer.status == 200 and not finite(answer):
                self.odd_scores.append(index)


def main(
    images: Annotated[int, typer.Option(help="How many.")] = 100_000,
    connections: Annotated[int, typer.Option(help="How many at the same time.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the mutations.")] = 0,
    kill_decoders: Annotated[float, typer.Option(help="Seconds between kills; 0 kills none.")] = 0,
    only: Annotated[int | None, typer.Option(help="Send the image of this index alone, and print the answer.")] = None,
    save: Annotated[Path | None, typer.Option(help="With --only: write the image's bytes there.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
) -> None:
    whole = whole_images()
    if only is not None:
        send_one(whole, seed, only, save)
        return
    found = Findings()
    with running() as service:
        over = threading.Event()
        killer = threading.Thread(target=kill_now_and_then, args=(service, kill_decoders, found, over))
        if kill_decoders:
            killer.start()
        try:
            seconds = send_all(service, whole, seed, range(images), connections, found)
        finally:
            over.set()
        if kill_decoders:
            killer.join()
        wronged = [index for index in found.unreadable if readable(service, mutated(whole, seed, index)[1])]
        afterwards = [Client(service.port).send("POST", TARGET, picture(n), HEADERS).status for n in range(AFTERWARDS)]
        crashed = service.process.poll() is not None
        tracebacks = service.tracebacks()
    record = {
        "images": images,
        "seed": seed,
        "connections": connections,
        "images per second": images / seconds,
        "answers": counted(found.answers),
        "503, sent again": found.busy,
        "p50 ms": percentile_ms(found.seconds, 50),
        "p99 ms": percentile_ms(found.seconds, 99),
        "slowest ms": percentile_ms(found.seconds, 100),
        "slowest": [[round(ms, 1), index, what] for ms, index, what in sorted(found.slowest, reverse=True)],
        "answers 5xx": found.faults,
        "without an answer": found.unanswered,
        "200 without finite scores": found.odd_scores,
        "memory MiB by images sent": [list(pair) for pair in found.memory],
        "memory growth MiB": growth_mib(found.memory, images),
        "tracebacks in the log": tracebacks,
        "decoders killed": found.killed,
        UNREADABLE: found.unreadable,
        f"{UNREADABLE}, and another answer when sent again": wronged,
        f"whole images afterwards, of {AFTERWARDS} scored": afterwards.count(200),
    }
    report("fuzz", out, record, bars(record, found, crashed=crashed, kill_decoders=kill_decoders) | service.bars())


def bars(record: dict[str, Any], found: Findings, *, crashed: bool, kill_decoders: float) -> dict[str, bool]:
    met = {
        "no crash, every image answered": not crashed and not found.unanswered,
        "no 5xx but 503 with Retry-After": not found.faults,
        "finite scores in every answer 200": not found.odd_scores,
        f"memory grows by less than {GROWTH_MIB} MiB": record["memory growth MiB"] < GROWTH_MIB,
        "no image is called unreadable that is not": not record[f"{UNREADABLE}, and another answer when sent again"],
        "whole images are scored afterwards": record[f"whole images afterwards, of {AFTERWARDS} scored"] == AFTERWARDS,
    }
    if kill_decoders:
        return met | {"decoders were killed": found.killed > 0}
    return met | {f"no answer slower than {SLOW_MS} ms": record["slowest ms"] < SLOW_MS}


def send_all(
    service: Running, whole: list[bytes], seed: int, indices: range, connections: int, found: Findings
) -> float:
    """Seconds that it took. Memory is read in between, by the thread whose turn it is."""
    turns = iter(indices)

    def work(_: int) -> None:
        client = Client(service.port)
        while service.process.poll() is None:
            with found.lock:
                index = next(turns, None)
            if index is None:
                return
            mutation, data = mutated(whole, seed, index)
            found.add(index, mutation, answer_to(client, data, found))
            if index % MEMORY_EVERY == 0 or index == warm_up(len(indices)):
                found.memory.append((index, service.memory_mib()))

    begin = time.perf_counter()
    in_threads(connections, work)
    found.memory.append((len(indices), service.memory_mib()))
    return time.perf_counter() - begin


def answer_to(client: Client, data: bytes, found: Findings) -> Answer | None:
    """None where none came. A refusal that says when to come back is not the answer yet."""
    while True:
        try:
            answer = client.send("POST", TARGET, data, HEADERS)
        except NO_ANSWER:
            return None
        if answer.status != 503 or "Retry-After" not in answer.headers:
            return answer
        with found.lock:
            found.busy += 1
        time.sleep(float(answer.headers["Retry-After"]))


def readable(service: Running, data: bytes) -> bool:
    return Client(service.port).send("POST", TARGET, data, HEADERS).code != UNREADABLE


def warm_up(images: int) -> int:
    """The image after which memory counts."""
    return min(5000, images // 20)


def growth_mib(memory: list[tuple[int, float]], images: int) -> float:
    """The highest after the warm-up above what it was then."""
    after = [mib for index, mib in sorted(memory) if index >= warm_up(images)]
    return max(after) - after[0]


def finite(answer: Answer) -> bool:
    result = answer.json()["results"][0]
    values = [*result["scores"].values(), result["anomaly_score"], result["p_value"]]
    return all(isinstance(value, float | int) and math.isfinite(value) for value in values)


def kill_now_and_then(service: Running, seconds: float, found: Findings, over: threading.Event) -> None:
    draws = random.Random(0)
    while not over.wait(seconds):
        workers = service.pids_named(WORKER)
        if workers:
            try:
                os.kill(draws.choice(workers), signal.SIGKILL)
            except ProcessLookupError:
                continue
            found.killed += 1


def send_one(whole: list[bytes], seed: int, index: int, save: Path | None) -> None:
    mutation, data = mutated(whole, seed, index)
    if save:
        save.write_bytes(data)
    with running() as service:
        answer = Client(service.port).send("POST", TARGET, data, HEADERS)
    print(f"{index}: {mutation}, {len(data)} bytes, begins {data[:16]!r}")
    print(f"{answer.status} after {answer.seconds * 1000:.1f} ms: {answer.body[:2000].decode()}")


if __name__ == "__main__":
    typer.run(main)
