"""The device as the service sees it: a process of its own, and its successors.

A process that dies over a batch is replaced, and the batch gets one more try: it may not have been its fault. The
batcher halves one that fails again, until only the image at fault does. One that hangs is killed, and so dies too.
"""

import itertools
import pickle
import socket
import struct
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import Checkpoint
from models.scoring import Scores
from service.device_worker import DeviceError, Memory, work
from service.errors import logger
from service.forking import forking_context
from service.telemetry import Telemetry

TRIES = 2
# Whole, and without a byte either way. A full batch of large images in tiles takes minutes on a slow CPU.
HANG_SECONDS = 300
END_SECONDS = 5.0  # not even a kill ends a process that waits for a GPU's driver


class DeviceDiedError(DeviceError):
    """The process is gone, and with it what it was doing."""


class Device:
    """One thread may load models while another one begins and awaits batches."""

    def __init__(self, kind: torch.device, telemetry: Telemetry) -> None:
        self.kind = kind
        self._telemetry = telemetry
        telemetry.running_on(kind)
        self._keys = itertools.count()
        self._gone: deque[int] = deque()
        self._loading = threading.Lock()
        self._process: _Process | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def load(self, checkpoint: Checkpoint) -> "DeviceScorer":
        """Raises CheckpointError for a model that cannot be served, torch.OutOfMemoryError and DeviceError."""
        scorer = DeviceScorer(self, next(self._keys), checkpoint)
        self._process_with(scorer)
        # Whichever thread forgets it last only leaves word: the next model to come makes use of the room.
        weakref.finalize(scorer, self._gone.append, scorer.key).atexit = False
        return scorer

    def close(self) -> None:
        """Whatever is still under way fails."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # who brings a model to it holds the lock until then
        with self._loading:
            if self._process is not None:
                self._process.end()
                self._process = None

    def sent(self, batch: "Batch") -> "_Process":
        """The process that has it now. Raises DeviceError."""
        process = self._process_with(batch.scorer)
        process.send(batch)
        return process

    def received(self, process: "_Process") -> None:
        """Wait for the outcome of the oldest batch that the process has. Raises DeviceDiedError."""
        self._telemetry.device_has(process.receive())

    def _process_with(self, scorer: "DeviceScorer") -> "_Process":
        """The one that is alive and has the model."""
        process = self._process
        if process is not None and process.is_alive() and scorer.key in process.loaded:
            return process  # and is not waited for while it loads another one
        with self._loading:
            if self._closed:
                raise DeviceDiedError("the device is closed")
            if self._process is not None and not self._process.is_alive():
                logger.error("the device's process died and is replaced")
                self._telemetry.device_lost()
                self._process = None
            if self._process is None:
                self._process = _Process(self.kind)
            if scorer.key not in self._process.loaded:  # it came after the one that died
                gone = [self._gone.popleft() for _ in range(len(self._gone))]
                self._telemetry.device_has(self._process.load(scorer, gone))
            return self._process


@dataclass(frozen=True, eq=False)
class DeviceScorer:
    """A model on the device. The checkpoint stays for the process that may have to follow."""

    device: Device
    key: int
    checkpoint: Checkpoint

    def begin(self, pixels: Tensor) -> "Batch":
        """As models.graphs.GraphedScorer does it."""
        return Batch(self, pixels.numpy())


class Batch:
    """On the device. As a Future: `done`, and `result`, which waits."""

    def __init__(self, scorer: DeviceScorer, pixels: NDArray[np.uint8]) -> None:
        self.scorer, self.pixels = scorer, pixels
        self.outcome: Scores | Exception | None = None
        self._device = scorer.device
        self._process: _Process | None = None
        with suppress(DeviceDiedError):  # `result` tries again
            self._process = self._device.sent(self)

    def done(self) -> bool:
        return self.outcome is not None or self._process is None or self._process.has_answered()

    def result(self) -> Scores:
        """Raises torch.OutOfMemoryError and DeviceError."""
        tries = 1
        while self.outcome is None:
            try:
                if self._process is None:
                    self._process = self._device.sent(self)
                self._device.received(self._process)
            except DeviceDiedError:
                if tries == TRIES:
                    raise
                tries += 1
                self._process = None
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class _Process:
    """With two ways to it, or a model that loads would hold up the batches."""

    def __init__(self, kind: torch.device) -> None:
        self._models, models = _pipe()
        self._batches, batches = _pipe()
        self._process = forking_context().Process(
            target=work, args=(models, batches, kind, torch.get_num_threads()), daemon=True
        )
        self.loaded: set[int] = set()
        self._sent: deque[Batch] = deque()
        self._lost = False  # known before the system says that it has ended
        with models, batches:
            self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def is_alive(self) -> bool:
        return not self._lost and self._process.is_alive()

    def load(self, scorer: DeviceScorer, gone: list[int]) -> Memory:
        # Not by `send`, which would pass tensors in /dev/shm, of which a container has little.
        message = pickle.dumps((gone, scorer.key, scorer.checkpoint))
        try:
            self._models.send_bytes(message)
            failure: Exception | None
            memory: Memory
            failure, memory = self._models.recv()
        except (EOFError, OSError) as error:
            raise self._died(error, over="a model") from error
        if failure is not None:
            raise failure
        self.loaded.add(scorer.key)
        return memory

    def send(self, batch: Batch) -> None:
        self._sent.append(batch)
        try:
            self._batches.send((batch.scorer.key, batch.pixels))
        except OSError as error:  # who waits for the answer finds out
            self._died(error, over="a batch")

    def has_answered(self) -> bool:
        """Or never will."""
        return self._batches.poll()

    def receive(self) -> Memory:
        """Batches are answered in their order."""
        memory: Memory
        try:
            outcome, memory = self._batches.recv()
        except (EOFError, OSError) as error:
            raise self._died(error, over="a batch") from error
        self._sent.popleft().outcome = outcome
        return memory

    def _died(self, error: Exception, *, over: str) -> DeviceDiedError:
        if isinstance(error, BlockingIOError):
            logger.error("the device's process hangs over %s and is killed: no answer for %d s", over, HANG_SECONDS)
        self.kill()
        return DeviceDiedError(f"the device's process died over {over}")

    def kill(self) -> None:
        self._lost = True
        if self._process.is_alive():  # else its number may be another's by now
            self._process.kill()

    def end(self) -> None:
        self.kill()
        self._process.join(END_SECONDS)


def _pipe() -> tuple[Connection, Connection]:
    """As multiprocessing's. Ours raises BlockingIOError when the process takes or gives nothing for HANG_SECONDS."""
    ours, theirs = socket.socketpair()
    for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        ours.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", HANG_SECONDS, 0))
    return Connection(ours.detach()), Connection(theirs.detach())
