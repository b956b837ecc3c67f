"""The process that has the device: the interpreter's lock, the threads and the memory of scoring are its own, so that
who waits for a score holds nobody up who sends an image, and a crash over one takes nothing else along.
"""

import gc
import math
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.graphs import GraphedScorer
from models.memory import keep_freed_memory
from models.scoring import Scores
from service.decode_worker import YIELDING

NAME = "hazelnut-device"  # in ps and top
CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")
# Of one core for one image, twice what decoding a photograph of a megapixel takes. A model that is quicker scores on
# half of the cores: decoding is what its images wait for, and threads that wait for one another on a core that is taken
# cost more than they bring.
HEAVY_SECONDS = 0.016

Memory = tuple[float, float]  # bytes in use and at most, as in memory_of
Waiting = tuple[int, NDArray[np.uint8]]  # a model's key, and pixels (B, C, S, S)


class UnderWay(Protocol):
    """A batch on the device: a Future, a models.graphs.BatchUnderWay, or a service.device.Batch."""

    def done(self) -> bool: ...

    def result(self) -> Scores:
        """Waits for it. Raises what made it fail."""


class Scoring(Protocol):
    """A models.scoring.Scorer, a models.graphs.GraphedScorer, a service.device.DeviceScorer, or what a test has in its
    place."""

    def begin(self, pixels: Tensor, /) -> UnderWay:
        """uint8 (B, C, S, S)."""


def work(models: Connection, batches: Connection, device: torch.device, cores: int) -> None:
    """Load what comes by `models`, and score what comes by `batches`, until their other ends are closed.

    models: keys of those that are needed no more, a key and a Checkpoint, pickled; answered by None, or what made it
    fail, and the memory. batches: a key and pixels, uint8 (B, C, S, S); answered in their order, by Scores or what made
    them fail, and the memory. cores: that scoring may take.
    """
    _settle()
    loaded: dict[int, Scoring] = {}
    waiting: SimpleQueue[Waiting | None] = SimpleQueue()
    outcomes: SimpleQueue[Scores | Exception] = SimpleQueue()
    # In threads of their own, so that scoring waits neither for a model that loads nor for the service, which may be
    # about to send and has to be read from meanwhile.
    threading.Thread(target=_load, args=(models, loaded, device), name="loading", daemon=True).start()
    threading.Thread(target=_receive, args=(batches, waiting), name="receiving", daemon=True).start()
    threading.Thread(target=_send, args=(batches, outcomes, device), name="sending", daemon=True).start()
    _score(waiting, outcomes, loaded, cores)


def _settle() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to all; the service ends this one when it is done
    os.nice(YIELDING)
    if sys.platform == "linux":
        keep_freed_memory()
        Path("/proc/self/comm").write_text(NAME)
    # What is here by now, torch above all, stays: looking through it for garbage stops everything for 0.3 seconds.
    gc.collect()
    gc.freeze()


def _load(models: Connection, loaded: dict[int, Scoring], device: torch.device) -> None:
    # Every thread that computes with several keeps as many others ready, and where these are more than there are cores,
    # GNU's OpenMP lets them sleep between two operations: an image that takes 36 ms would take 55.
    torch.set_num_threads(1)
    while True:
        try:
            gone, key, checkpoint = pickle.loads(models.recv_bytes())
        except EOFError:
            return
        for each in gone:
            loaded.pop(each, None)
        failure: Exception | None = None
        try:
            loaded[key] = warm_scorer(checkpoint, device)
        except Exception as error:  # noqa: BLE001 - whatever it is, the service says it
            failure = _sendable(error)
        models.send((failure, memory_of(device)))


def _receive(batches: Connection, waiting: "SimpleQueue[Waiting | None]") -> None:
    with suppress(EOFError):
        while True:
            waiting.put(batches.recv())
    waiting.put(None)


def _send(batches: Connection, outcomes: "SimpleQueue[Scores | Exception]", device: torch.device) -> None:
    with suppress(OSError):  # the other end is closed
        while True:
            batches.send((outcomes.get(), memory_of(device)))


def _score(
    waiting: "SimpleQueue[Waiting | None]",
    outcomes: "SimpleQueue[Scores | Exception]",
    loaded: dict[int, Scoring],
    cores: int,
) -> None:
    under_way: deque[UnderWay] = deque()
    core_seconds: dict[int, float] = {}
    while True:
        if not under_way or (len(under_way) < 2 and not under_way[0].done() and not waiting.empty()):
            batch = waiting.get()
            if batch is None:
                return
            key, pixels = batch
            # The least that it has taken tells most: what else the cores do only adds to it.
            least = core_seconds.get(key, math.inf)
            threads = cores if HEAVY_SECONDS < least < math.inf else max(1, cores // 2)
            torch.set_num_threads(threads)
            since = time.perf_counter()
            under_way.append(_begun(loaded[key], torch.from_numpy(pixels)))
            # On a GPU it is only begun by now, and takes no core.
            core_seconds[key] = min(least, threads * (time.perf_counter() - since) / len(pixels))
        else:
            outcomes.put(_outcome(under_way.popleft()))


def _begun(scorer: Scoring, pixels: Tensor) -> UnderWay:
    try:
        return scorer.begin(pixels)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other batches go on
        failed: Future[Scores] = Future()
        failed.set_exception(error)
        return failed


def _outcome(batch: UnderWay) -> Scores | Exception:
    try:
        return batch.result()
    except Exception as error:  # noqa: BLE001 - the same
        return _sendable(error)


class DeviceError(RuntimeError):
    """What a batch or a model raised in the device's process; its traceback."""


def _sendable(error: Exception) -> Exception:
    """An exception may hold what cannot be sent."""
    if isinstance(error, torch.OutOfMemoryError | CheckpointError):
        return type(error)(str(error))
    return DeviceError("".join(traceback.format_exception(error)))


def warm_scorer(checkpoint: Checkpoint, device: torch.device) -> Scoring:
    """The checkpoint's scorer on its device, after one black image. Raises CheckpointError for one not to be served."""
    config = checkpoint.config
    scorer = checkpoint.scorer(device)
    black = torch.zeros(1, config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    if not np.isfinite(scorer.score(black).scores).all():
        raise CheckpointError("the checkpoint scores a black image with what is not a finite number.")
    return GraphedScorer(scorer) if device.type == "cuda" else scorer


def memory_of(device: torch.device) -> Memory:
    """Of a GPU: what all processes use of it. Of a CPU: what this process uses, and what the container or the machine
    has."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    used = math.nan
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    try:
        return used, float(CONTAINER_MEMORY.read_text())
    except (OSError, ValueError):  # no container, or one with the limit "max"
        return used, os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
