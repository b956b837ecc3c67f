"""Three times more images than the service can score: what it accepts is quick, what it refuses is refused at once.

    python -m benchmarks.overload [--seconds 60] [--times 3]

First the unloaded latency, of one connection; then the peak, by 32 connections that send one image after another; then
the overload: requests of one image each arrive at a constant rate, whether or not others have been answered. Latency
counts from the moment at which a request was due, so that a slow service does not slow its own measurement down.

The requests come from this process, over connections that are kept. Both share the processors, so the service is
started with --nice 5: where both want one, this process goes first, its clock stays right, and what it takes is missing
from the peak and from the overload alike. How late its requests left is in the table: figures mean little where that is
not far below them.

Prints a table in Markdown, writes docs/benchmarks/reliability-overload.json.
"""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.crowd import Crowd, Sent
from benchmarks.running import Running, report, running
from benchmarks.traffic import counted, percentile_ms, picture, request_bytes

PEAK_CONNECTIONS = 32
REFUSAL_MS = 20
GOODPUT = 0.95
GROWTH_MIB = 50


def main(
    seconds: Annotated[float, typer.Option(help="Of overload.")] = 60,
    peak_seconds: Annotated[float, typer.Option(help="Of each of the two measurements before it.")] = 10,
    times: Annotated[float, typer.Option(help="The overload's rate, in peaks.")] = 3,
    side: Annotated[int, typer.Option(help="Pixels of an image's side; PNG.")] = 256,
    max_waiting: Annotated[int, typer.Option(help="HAZELNUT_MAX_WAITING.")] = 64,
    out: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
) -> None:
    requests = [request_bytes("/score", picture(seed, side=side)) for seed in range(16)]
    with running(nice=5, max_waiting=max_waiting, max_files=max_waiting) as service:
        record = uvloop.run(measure(service, requests, seconds=seconds, peak_seconds=peak_seconds, times=times))
        record["tracebacks in the log"] = service.tracebacks()
    bound = 2 * record["unloaded p99 ms"] + 1000 * max_waiting / record["peak images per second"]
    record = {"side": side, "max waiting": max_waiting, **record, "bound of the accepted p99 ms": bound}
    bars = {
        "p99 of the accepted below twice the unloaded one and a full queue": record["accepted p99 ms"] < bound,
        f"p99 of the refused below {REFUSAL_MS} ms": record["refused p99 ms"] < REFUSAL_MS,
        "every refusal says when to come back": record["refused without Retry-After"] == 0,
        "every request is accepted or refused": set(record["statuses"]) <= {"200", "503"},
        f"goodput at least {GOODPUT} of the peak": record["goodput of the peak"] >= GOODPUT,
        f"memory grows by less than {GROWTH_MIB} MiB": record["memory growth MiB"] < GROWTH_MIB,
    }
    report("overload", out, record, bars | service.bars())


async def measure(
    service: Running, requests: list[bytes], *, seconds: float, peak_seconds: float, times: float
) -> dict[str, Any]:
    await closed_loop(service.port, requests, connections=PEAK_CONNECTIONS, seconds=min(2, peak_seconds))  # warm
    unloaded = await closed_loop(service.port, requests, connections=1, seconds=peak_seconds)
    busy = [time.process_time()]
    crowd = await closed_loop(service.port, requests, connections=PEAK_CONNECTIONS, seconds=peak_seconds)
    busy.append(time.process_time())
    peak = sum(sent.status == 200 for sent in crowd) / peak_seconds
    before = await asyncio.to_thread(service.memory_mib)
    busy.append(time.process_time())
    load, memory = await open_loop(service, requests, rate=times * peak, seconds=seconds)
    busy.append(time.process_time())
    after = await asyncio.to_thread(service.memory_mib)
    accepted = [sent for sent in load.all_sent if sent.status == 200]
    refused = [sent.latency for sent in load.all_sent if sent.status == 503]
    begin = load.all_sent[0].due
    in_time = sum(sent.answered - begin <= seconds for sent in accepted)
    late = [sent.left - sent.due for sent in load.all_sent]
    return {
        "unloaded p50 ms": percentile_ms([sent.latency for sent in unloaded], 50),
        "unloaded p99 ms": percentile_ms([sent.latency for sent in unloaded], 99),
        "peak images per second": peak,
        "overload seconds": seconds,
        "sent per second": len(load.all_sent) / seconds,
        "sent": len(load.all_sent),
        "statuses": counted(Counter(str(sent.status or "no answer") for sent in load.all_sent)),
        "goodput images per second": in_time / seconds,
        "goodput of the peak": in_time / seconds / peak,
        "accepted p50 ms": percentile_ms([sent.latency for sent in accepted], 50),
        "accepted p99 ms": percentile_ms([sent.latency for sent in accepted], 99),
        "refused p50 ms": percentile_ms(refused, 50),
        "refused p99 ms": percentile_ms(refused, 99),
        "refused without Retry-After": sum(s.status == 503 and not s.retry_after for s in load.all_sent),
        "left late p50 ms": percentile_ms(late, 50),
        "left late p99 ms": percentile_ms(late, 99),
        "left late at most ms": percentile_ms(late, 100),
        "cores of the sender at the peak": (busy[1] - busy[0]) / peak_seconds,
        "cores of the sender in the overload": (busy[3] - busy[2]) / seconds,
        "connections": len(load.connections),
        "most that waited for a connection": load.most_waiting,
        "memory MiB before": before,
        "memory MiB during, at most": max(memory),
        "memory MiB after": after,
        "memory growth MiB": max(*memory, after) - before,
    }


async def closed_loop(port: int, requests: list[bytes], *, connections: int, seconds: float) -> list[Sent]:
    """Each connection sends when its last answer is there. What was answered within that time."""
    crowd = Crowd(port, requests, limit=connections)
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while clock() < end:
        crowd.send(clock())
        await crowd.pending_at_most(connections - 1)
    await crowd.all_answered()
    crowd.close()
    return [sent for sent in crowd.all_sent if sent.answered <= end]


async def open_loop(
    service: Running, requests: list[bytes], *, rate: float, seconds: float
) -> tuple[Crowd, list[float]]:
    """All that was sent, and the memory of the service meanwhile."""
    crowd = Crowd(service.port, requests)
    memory: list[float] = []
    watching = asyncio.ensure_future(watch(service, memory))
    clock = asyncio.get_running_loop().time
    begin = clock()
    for number in range(int(rate * seconds)):
        due = begin + number / rate
        if (early := due - clock()) > 0:
            await asyncio.sleep(early)
        crowd.send(due)
    await crowd.all_answered()
    watching.cancel()
    crowd.close()
    return crowd, memory


async def watch(service: Running, memory: list[float]) -> None:
    while True:
        memory.append(await asyncio.to_thread(service.memory_mib))
        await asyncio.sleep(15)  # reading it holds the service up for some 15 ms for each process


if __name__ == "__main__":
    typer.run(main)
