"""The service as a child process, as `hazelnut serve` starts it: waited for, watched, told to stop. And how the
reliability benchmarks report.

Linux only: memory, open files and processes are read from /proc.
"""

import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from benchmarks.results import write_results
from benchmarks.traffic import NO_ANSWER, Answer, Client

HAZELNUT = [sys.executable, "-m", "hazelnut"]
RESULTS = Path("docs/benchmarks")
READY_SECONDS = 300
LEAVE_SECONDS = 10  # for its processes, after itself
GRACE_SECONDS = 35  # the service's own 30 for the answers on their way, and some to leave


class DidNotStopError(SystemExit):
    """The service was told to stop and did not do so as it promises."""


@dataclass(frozen=True)
class Running:
    """A service that is ready."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: IO[bytes]
    problems: list[str] = field(default_factory=list)  # of its end

    def pids(self) -> list[int]:
        """Its process and all that descend from it."""
        parents = {pid: parent for pid in _processes() if (parent := _parent(pid)) is not None}
        tree = [self.process.pid]
        for pid in tree:  # grows while it is gone through
            tree += [child for child, parent in parents.items() if parent == pid]
        return tree

    def pids_named(self, name: str) -> list[int]:
        return [pid for pid in self.pids() if _proc_text(pid, "comm").strip() == name]

    def memory_mib(self) -> float:
        return sum(self.memory_of_processes().values())

    def memory_of_processes(self) -> dict[str, float]:
        """What each process of the tree has allocated, in MiB, by its name and number. Pages shared since a fork count
        once; files, such as libraries, do not: their share depends on who else has them open.
        """
        memory = {}
        for pid in self.pids():
            lines = [line for line in _proc_text(pid, "smaps_rollup").splitlines() if line.startswith("Pss_Anon:")]
            if lines:
                memory[f"{_proc_text(pid, 'comm').strip()} {pid}"] = int(lines[0].split()[1]) / 2**10
        return memory

    def open_files(self) -> int:
        """Descriptors of the whole tree, sockets included."""
        total = 0
        for pid in self.pids():
            try:
                total += len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:  # it has just ended
                continue
        return total

    def metric(self, series: str) -> float:
        """A sample of /metrics by its name and labels, as they stand there; 0 where there is none."""
        values = dict(line.rsplit(" ", 1) for line in self.series())
        return float(values.get(series, 0))

    def series(self) -> list[str]:
        text = self._get("/metrics").body.decode()
        return [line for line in text.splitlines() if not line.startswith("#")]

    def tracebacks(self) -> int:
        return self._log_text().count("Traceback (most recent call last)")

    def _get(self, path: str) -> Answer:
        """Raises one of NO_ANSWER."""
        client = Client(self.port)
        with closing(client.connection):
            return client.send("GET", path)

    def _log_text(self) -> str:
        return os.pread(self.log.fileno(), 2**30, 0).decode(errors="replace")

    def stop(self) -> float:
        """SIGTERM; seconds until it has ended. Raises DidNotStopError if it does not do so in time, with status 0 and
        with all its processes.
        """
        begin = time.perf_counter()
        pids = self.pids()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DidNotStopError(f"the service did not end within {GRACE_SECONDS} seconds of SIGTERM") from error
        seconds = time.perf_counter() - begin
        if code != 0:
            raise DidNotStopError(f"the service ended with status {code}; its log ends:\n{self._log_text()[-4000:]}")
        end = time.monotonic() + LEAVE_SECONDS
        while alive := [pid for pid in pids if _parent(pid) is not None]:
            if time.monotonic() > end:
                left = [_proc_text(pid, "cmdline").replace("\0", " ") for pid in alive]
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                raise DidNotStopError(f"the service left processes behind: {left}")
            time.sleep(0.05)
        return seconds

    def bars(self) -> dict[str, bool]:
        """After the block of `running`."""
        return {"the service ends with status 0 and leaves no process behind": not self.problems}

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"the service ended before it was ready; its log:\n{self._log_text()}")
            try:
                if self._get("/health/ready").status == 200:
                    return
            except NO_ANSWER:
                time.sleep(0.05)
        raise SystemExit(f"the service was not ready after {READY_SECONDS} seconds")


@contextmanager
def running(*, nice: int = 0, **settings: object) -> Iterator[Running]:
    """Start the service; at the end of the block it is told to stop, if the block has not done so.

    settings: by the names of docs/service.md, in small letters and without HAZELNUT_; the environment's own do not
    count. nice: how far the service stands behind this process when both want the processor.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HAZELNUT_")}
    environment |= {f"HAZELNUT_{name.upper()}": str(value) for name, value in settings.items()}
    environment["HAZELNUT_PORT"] = str(port)
    command = [*(["nice", "-n", str(nice)] if nice else []), *HAZELNUT, "serve"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        service = Running(process, port, log)
        try:
            service.wait_until_ready()
            yield service
            if process.poll() is None:
                try:
                    service.stop()
                except DidNotStopError as error:  # the figures are worth more than the end
                    service.problems.append(str(error))
                    print(error, file=sys.stderr)
        finally:
            if process.poll() is None:
                for pid in service.pids():
                    os.kill(pid, signal.SIGKILL)
                process.wait()


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int | None:
    """None where there is no such process any more."""
    after_name = _proc_text(pid, "stat").rpartition(")")[2].split()
    return int(after_name[1]) if after_name and after_name[0] != "Z" else None


def _proc_text(pid: int, name: str) -> str:
    """Empty where there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def report(name: str, out: Path | None, record: dict[str, Any], bars: Mapping[str, bool]) -> None:
    """Print it with the bars as a table in Markdown, and write the JSON. Exits with status 1 if a bar is missed."""
    record = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *map(_without_folder, sys.argv[1:])]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **record,
        "bars": dict(bars),
    }
    write_results(out or RESULTS / f"reliability-{name}.json", record)
    rows = [(key, shown(value)) for key, value in record.items() if not isinstance(value, list) and key != "bars"]
    rows += [(sentence, "met" if met else "**missed**") for sentence, met in bars.items()]
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)
    if not all(bars.values()):
        raise SystemExit(1)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(content)}" for key, content in value.items())
    return str(value)


def _without_folder(argument: str) -> str:
    """Where things are on the machine that measured is nobody's business."""
    return Path(argument).name if argument.startswith("/") else argument
