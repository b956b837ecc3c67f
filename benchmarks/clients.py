"""Clients that dawdle and clients that vanish: the others do not notice, and nothing is left of them.

    python -m benchmarks.clients [--seconds 60]

First a normal client sends one image after another, alone. Then it does so while a crowd is connected: a third sends
its headers a byte a second, a third its body, a third says nothing at all; some more read a large answer a byte a
second. Counted is how the server has treated them by the end.

Then 200 clients send an image and leave at once, half of them with RST; within a second no image may be waiting.

Prints a table in Markdown, writes docs/benchmarks/reliability-clients.json.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.running import Running, report, running
from benchmarks.traffic import (
    PNG,
    Client,
    SlowClients,
    counted,
    in_threads,
    percentile_ms,
    picture,
    request_bytes,
    vanish,
)

READERS = 10
READ_SIDE = 1024  # its map has 5.6 MB as an answer: more than the kernel keeps for a client that does not read
TIMES_SLOWER = 2
VANISH_THREADS = 20
EMPTY_SECONDS = 1
WATCHED_SECONDS = 5


def main(
    seconds: Annotated[float, typer.Option(help="How long the crowd is there.")] = 60,
    slow: Annotated[int, typer.Option(help="Slow sockets, besides those that read slowly.")] = 500,
    vanishing: Annotated[int, typer.Option(help="Clients that leave at once.")] = 200,
    side: Annotated[int, typer.Option(help="Pixels of an image's side; PNG.")] = 256,
    out: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
) -> None:
    with running() as service:
        slow_clients = measure_slow(service, slow, picture(0, side=side), seconds)
        left = measure_vanishing(service, vanishing, picture(1, side=side))
        tracebacks = service.tracebacks()
    record = {"seconds": seconds, "side": side, **slow_clients, **left, "tracebacks in the log": tracebacks}
    bars = {
        "a normal client is always answered with 200": set(record["the normal client's answers"]) == {"200"},
        f"its p99 below {TIMES_SLOWER} times that without the crowd": record["times slower at p99"] < TIMES_SLOWER,
        f"no image waits {EMPTY_SECONDS} s after the last has vanished": record["seconds until none waited"]
        <= EMPTY_SECONDS,
    }
    report("clients", out, record, bars | service.bars())


def measure_slow(service: Running, slow: int, image: bytes, seconds: float) -> dict[str, Any]:
    one_after_another(service, image, seconds=min(seconds, 3))  # warm
    alone, answers = one_after_another(service, image, seconds=min(seconds, 30))
    before = service.memory_mib()
    counts = {"headers": slow // 3, "body": slow // 3, "silent": slow - 2 * (slow // 3), "reads": READERS}
    wanted = request_bytes("/score?map=float32", picture(2, side=READ_SIDE))
    with SlowClients(service.port, counts, wanted=wanted) as crowd:
        crowded, crowded_answers = one_after_another(service, image, seconds=seconds)
        outcomes = crowd.outcomes()
        files, memory = service.open_files(), service.memory_mib()
    for status, number in crowded_answers.items():
        answers[status] = answers.get(status, 0) + number
    return {
        "slow sockets": counts,
        "the normal client's answers": counted(answers),
        "alone, p50 ms": percentile_ms(alone, 50),
        "alone, p99 ms": percentile_ms(alone, 99),
        "with the crowd, p50 ms": percentile_ms(crowded, 50),
        "with the crowd, p99 ms": percentile_ms(crowded, 99),
        "times slower at p99": percentile_ms(crowded, 99) / percentile_ms(alone, 99),
        "the slow sockets at the end": outcomes,
        "memory MiB without and with the crowd": [before, memory],
        "open files at the end": files,
    }


def one_after_another(service: Running, image: bytes, *, seconds: float) -> tuple[list[float], dict[str, int]]:
    """Seconds of each request, and how many were answered with which status."""
    client = Client(service.port)
    latencies = []
    answers: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = client.send("POST", "/score", image, PNG)
        latencies.append(answer.seconds)
        answers[str(answer.status)] = answers.get(str(answer.status), 0) + 1
    return latencies, answers


def measure_vanishing(service: Running, clients: int, image: bytes) -> dict[str, Any]:
    request = request_bytes("/score", image)

    def leave(thread: int) -> None:
        for number in range(thread, clients, VANISH_THREADS):
            vanish(service.port, request, reset=number % 2 == 0)

    gone = 'hazelnut_requests_total{method="POST",route="/score",status_class="none"}'
    before = service.metric(gone)
    in_threads(VANISH_THREADS, leave)
    begin = time.perf_counter()
    waited = 0.0
    while (now := time.perf_counter() - begin) < WATCHED_SECONDS:
        if service.metric("hazelnut_images_waiting"):
            waited = now
        time.sleep(0.01)
    return {
        "clients that vanished": clients,
        "of them noticed before their answer": service.metric(gone) - before,
        "seconds until none waited": waited,
    }


if __name__ == "__main__":
    typer.run(main)
