"""A server as a process: started, waited for, measured and stopped with all that it started. For Linux."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

HOST = "127.0.0.1"
READY_SECONDS = 120
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """One that is up. ready_seconds: from the start of its process to its first answer with status 200."""

    name: str
    process: "subprocess.Popen[bytes]"
    url: str
    client: httpx2.Client
    ready_seconds: float

    def memory(self) -> dict[str, float]:
        """MiB of all its processes together. Pss shares a page among all processes that have it, Rss counts it in each.

        The pages of libraries are shared with every other process of the machine that has loaded them.
        """
        total = {"Pss": 0.0, "Rss": 0.0}
        for pid, _ in tree(self.process.pid):
            with suppress(OSError):  # it has ended
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                    name, value = line.split()[:2]
                    if name.rstrip(":") in total:
                        total[name.rstrip(":")] += int(value) / 2**10
        return total


@contextmanager
def served(
    name: str, command: list[str], environment: Mapping[str, str], request: Mapping[str, Any]
) -> Iterator[Server]:
    """Start a server on a free port and POST the request until it is answered. Raises SystemExit if it never is."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = str(probe.getsockname()[1])
    # The developer's own settings must not decide a measurement.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HAZELNUT_")}
    variables = {**inherited, **environment, "HAZELNUT_HOST": HOST, "HAZELNUT_PORT": port}
    with (
        tempfile.TemporaryFile() as log,
        httpx2.Client(timeout=60, trust_env=False) as client,
    ):
        url = f"http://{HOST}:{port}/score"
        begin = time.perf_counter()
        process = subprocess.Popen(
            [part.replace("PORT", port) for part in command], env=variables, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not _answers(client, url, request):
                if process.poll() is not None or time.perf_counter() - begin > READY_SECONDS:
                    log.seek(0)
                    raise SystemExit(f"{name} gave no answer; its log ends: {log.read().decode()[-2000:]}")
                time.sleep(0.02)
            yield Server(name, process, url, client, time.perf_counter() - begin)
        finally:
            _stop(process)


def _answers(client: httpx2.Client, url: str, request: Mapping[str, Any]) -> bool:
    """Raises SystemExit where it is the request that does not do: waiting would not help."""
    try:
        response = client.post(url, **request)
    except httpx2.TransportError:
        return False
    if response.is_client_error:
        raise SystemExit(f"{url} refuses with status {response.status_code}: {response.text[:500]}")
    return response.status_code == 200


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Not every server takes its own processes with it."""
    started = tree(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_SECONDS)
    for pid, since in started:
        with suppress(OSError):
            if _stat(pid)[19] == since:  # the number may be another process's by now
                os.kill(pid, signal.SIGKILL)
    process.wait()


def tree(root: int) -> list[tuple[int, str]]:
    """Number and time of start of a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    since: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended
                stat = _stat(int(entry.name))
                children.setdefault(int(stat[1]), []).append(int(entry.name))
                since[int(entry.name)] = stat[19]
    found = [root] if root in since else []
    for pid in found:  # it grows on the way
        found += children.get(pid, [])
    return [(pid, since[pid]) for pid in found]


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may itself have blanks and brackets: state, parent, ... 19 is the start."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
