"""From an upload's bytes to what a model sees, in worker processes that may die without taking the service along.

A worker that dies over an image is replaced, and the image gets one more try: it may not have been its fault.
"""

import asyncio
import io
import json
import math
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import errors
from models.config import ModelConfig
from models.errors import ImageError, ImageUnreadableError
from service.decode_worker import Job, Pixels, work
from service.errors import logger
from service.forking import forking_context
from service.telemetry import Telemetry

WORKERS = min(8, os.cpu_count() or 1)
TRIES = 2
DECODE_SECONDS = 10.0  # the largest images take about one
# The hungriest formats take 20 bytes per pixel (RGBA, laid over black); the rest is for the upload itself and for air.
BYTES_PER_PIXEL, MORE_BYTES = 24, 2**28
MOST_WORDS = 2**16  # bytes of what a worker says beside pixels; a traceback fits

KINDS = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ImageError)}


@dataclass(frozen=True, eq=False)
class Decoded:
    """pixels: uint8 (C, S, S). width and height: pixels of the upright original."""

    pixels: Tensor
    width: int
    height: int


class Decoder:
    """Decodes for all models. A thread waits for each worker: a process that dies wakes it."""

    def __init__(self, *, max_pixels: int, telemetry: Telemetry, workers: int = WORKERS) -> None:
        self._max_pixels = max_pixels
        self._telemetry = telemetry
        memory_bytes = BYTES_PER_PIXEL * max_pixels + MORE_BYTES
        self._workers = [_Worker(memory_bytes, lost=telemetry.decoder_lost) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")

    async def start(self) -> Self:
        """Wait until every worker has decoded an image; the first one takes the seconds that torch's import does."""
        loop, file = asyncio.get_running_loop(), io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "PNG")
        job = Job(file.getvalue(), self._max_pixels, channels=3, width=1, height=1)
        await asyncio.gather(*(loop.run_in_executor(self._threads, worker.ask, job) for worker in self._workers))
        return self

    async def decode(self, data: bytes, config: ModelConfig) -> Decoded:
        """Raises ImageError."""
        size = config.image_size
        job = Job(data, self._max_pixels, channels=config.channels, width=size, height=size)
        head, pixels = await self._run(job)
        return Decoded(pixels=torch.from_numpy(pixels), width=head["width"], height=head["height"])

    async def picture(self, data: bytes, *, width: int, height: int) -> Image.Image:
        """The image itself at width x height pixels, in mode "L" or "RGB". Raises ImageError.

        Decodes again: keeping every image of every request from its decoding to its answer would cost far more memory
        than this costs time.
        """
        _, pixels = await self._run(Job(data, self._max_pixels, channels=None, width=width, height=height))
        return Image.fromarray(pixels)

    def close(self) -> None:
        """Jobs that have not begun are cancelled."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    async def _run(self, job: Job) -> tuple[dict[str, Any], Pixels]:
        since = time.perf_counter()
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, job, since)

    def _ask(self, job: Job, since: float) -> tuple[dict[str, Any], Pixels]:
        """In a thread: there is always an idle worker, because there are as many as threads."""
        self._telemetry.stage("wait").observe(time.perf_counter() - since)
        worker = self._idle.get()
        try:
            with self._telemetry.stage("decode").time():
                return worker.ask(job)
        finally:
            self._idle.put(worker)


class _DiedError(Exception):
    """The process is gone."""


class _SlowError(Exception):
    """The process is still at it."""


Answer = tuple[dict[str, Any], Pixels | None]


class _Worker:
    """A process that decodes, and its successors."""

    def __init__(self, memory_bytes: int, *, lost: Callable[[str], None]) -> None:
        """lost: told the reason, died or slow, when a process has to be replaced."""
        self._memory_bytes = memory_bytes
        self._lost = lost
        self._context = forking_context()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, job: Job) -> tuple[dict[str, Any], Pixels]:
        """Raises ImageError."""
        for _ in range(TRIES):
            try:
                head, pixels = self._exchange(job)
            except _DiedError:
                logger.warning("a decoding process died over an image of %d bytes and is replaced", len(job.data))
                self._lost("died")
                self.stop()
            except _SlowError:
                logger.warning(
                    "a decoding process took too long over an image of %d bytes and is replaced", len(job.data)
                )
                self._lost("slow")
                self.stop()
                raise ImageUnreadableError(f"decoding the image takes longer than {DECODE_SECONDS:g} s.") from None
            else:
                if "fault" in head:
                    raise RuntimeError(f"decoding failed: {head['fault']}")
                if pixels is None:
                    raise KINDS[head["code"]](head["message"])
                return head, pixels
        raise ImageUnreadableError("decoding the image makes the decoder crash.")

    def start(self) -> Connection:
        """The way to the process, which is started where there is none, or has died since the last image."""
        if self._process is not None and not self._process.is_alive():
            self._lost("died")
            self.stop()
        if self._connection is None:
            self._connection, theirs = multiprocessing.Pipe()
            process = self._context.Process(target=work, args=(theirs, self._memory_bytes), daemon=True)
            process.start()
            theirs.close()
            self._process = process
        return self._connection

    def stop(self) -> None:
        """Leaves nothing behind; the next job starts a new process."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None

    def _exchange(self, job: Job) -> Answer:
        connection = self.start()
        try:
            connection.send(tuple(job))
            if not connection.poll(DECODE_SECONDS):
                raise _SlowError
            head: dict[str, Any] = json.loads(connection.recv_bytes(maxlength=MOST_WORDS))
            if "shape" not in head:
                return head, None
            pixels = np.empty(math.prod(head["shape"]), dtype=np.uint8)
            connection.recv_bytes_into(pixels.data)
        except (EOFError, OSError) as error:
            raise _DiedError from error
        return head, pixels.reshape(head["shape"])
