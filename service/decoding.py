"""From an upload's bytes to what a model sees, in worker processes that may die without taking the service along.

A worker that dies over an image is replaced, and the image gets one more try: it may not have been its fault.
"""

import asyncio
import io
import json
import math
import os
import socket
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, Self

import numpy as np
from PIL import Image

from models import errors
from models.config import ModelConfig
from models.errors import ImageError, ImageUnreadableError
from service.decode_worker import ANSWER_HEAD, Job, Pixels, work
from service.errors import logger
from service.forking import forking_context
from service.telemetry import Telemetry

WORKERS = min(8, os.cpu_count() or 1)
TRIES = 2
DECODE_SECONDS = 10.0  # the largest images take about one
START_SECONDS = 120.0  # of a process's first image: torch is imported before it, at worst by a machine that is busy
# The hungriest formats take 20 bytes per pixel (RGBA, laid over black); the rest is for the upload itself and for air.
BYTES_PER_PIXEL, MORE_BYTES = 24, 2**28
MOST_WORDS = 2**16  # bytes of what a worker says beside pixels; a traceback fits
BUFFER_BYTES = 2**20  # of a worker's answer, before it is read

KINDS = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ImageError)}


@dataclass(frozen=True, eq=False)
class Decoded:
    """pixels: (C, S, S), read-only. width and height: pixels of the upright original."""

    pixels: Pixels
    width: int
    height: int


Answer = tuple[dict[str, Any], Pixels]


@dataclass(frozen=True, eq=False)
class _Waiting:
    job: Job
    answer: "asyncio.Future[Answer]"
    since: float = field(default_factory=time.perf_counter)


class Decoder:
    """Decodes for all models, an image at a time in each of its processes."""

    def __init__(self, *, max_pixels: int, telemetry: Telemetry, workers: int = WORKERS) -> None:
        self._max_pixels = max_pixels
        self._telemetry = telemetry
        memory_bytes = BYTES_PER_PIXEL * max_pixels + MORE_BYTES
        self._workers = [_Worker(memory_bytes, lost=telemetry.decoder_lost) for _ in range(workers)]
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Self:
        """Wait until every worker has decoded an image; the first one takes the seconds that torch's import does."""
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "PNG")
        job = Job(file.getvalue(), self._max_pixels, channels=3, width=1, height=1)
        await asyncio.gather(*(worker.ask(job, seconds=START_SECONDS) for worker in self._workers))
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in self._workers]
        return self

    async def decode(self, data: bytes, config: ModelConfig) -> Decoded:
        """Raises ImageError."""
        size = config.image_size
        job = Job(data, self._max_pixels, channels=config.channels, width=size, height=size)
        head, pixels = await self._answer(job)
        return Decoded(pixels=pixels, width=head["width"], height=head["height"])

    async def picture(self, data: bytes, *, width: int, height: int) -> Image.Image:
        """The image itself at width x height pixels, in mode "L" or "RGB". Raises ImageError.

        Decodes again: keeping every image of every request from its decoding to its answer would cost far more memory
        than this costs time.
        """
        _, pixels = await self._answer(Job(data, self._max_pixels, channels=None, width=width, height=height))
        return Image.fromarray(pixels)

    async def close(self) -> None:
        """Who still waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait().answer.cancel()
        for worker in self._workers:
            await worker.stop()

    async def _answer(self, job: Job) -> Answer:
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def _work(self, worker: "_Worker") -> None:
        while True:
            waiting = await self._queue.get()
            answer = waiting.answer
            if answer.done():
                continue  # its caller left
            self._telemetry.stage("wait").observe(time.perf_counter() - waiting.since)
            try:
                with self._telemetry.stage("decode").time():
                    found = await worker.ask(waiting.job, seconds=DECODE_SECONDS)
                if not answer.done():
                    answer.set_result(found)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's, and the others go on
                if not answer.done():
                    answer.set_exception(error)
            finally:
                answer.cancel()  # of one that is there by now this changes nothing


class _DiedError(Exception):
    """The process is gone."""


class _SlowError(Exception):
    """The process is still at it."""


class _Worker:
    """A process that decodes, and its successors."""

    def __init__(self, memory_bytes: int, *, lost: Callable[[str], None]) -> None:
        """lost: told the reason, died or slow, when a process has to be replaced."""
        self._memory_bytes = memory_bytes
        self._lost = lost
        self._context = forking_context()
        self._process: BaseProcess | None = None
        self._streams: tuple[StreamReader, StreamWriter] | None = None

    async def ask(self, job: Job, *, seconds: float) -> Answer:
        """Raises ImageError. Not for two at a time."""
        for _ in range(TRIES):
            try:
                head, pixels = await self._exchange(job, seconds)
            except _DiedError:
                logger.warning("a decoding process died over an image of %d bytes and is replaced", len(job.data))
                self._lost("died")
                await self.stop()
            except _SlowError:
                logger.warning(
                    "a decoding process took too long over an image of %d bytes and is replaced", len(job.data)
                )
                self._lost("slow")
                await self.stop()
                raise ImageUnreadableError(f"decoding the image takes longer than {seconds:g} s.") from None
            else:
                if "fault" in head:
                    raise RuntimeError(f"decoding failed: {head['fault']}")
                if pixels is None:
                    raise KINDS[head["code"]](head["message"])
                return head, pixels
        raise ImageUnreadableError("decoding the image makes the decoder crash.")

    async def start(self) -> tuple[StreamReader, StreamWriter]:
        """The way to the process, which is started where there is none, or has died since the last image."""
        if self._streams is not None and self._streams[0].at_eof():
            self._lost("died")
            await self.stop()
        if self._streams is None:
            ours, theirs = socket.socketpair()
            self._process = self._context.Process(target=work, args=(theirs, self._memory_bytes), daemon=True)
            self._streams = await asyncio.open_unix_connection(sock=ours, limit=BUFFER_BYTES)
            with theirs:
                await asyncio.to_thread(self._process.start)
        return self._streams

    async def stop(self) -> None:
        """Leaves nothing behind; the next job starts a new process."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(_end, process)

    async def _exchange(self, job: Job, seconds: float) -> tuple[dict[str, Any], Pixels | None]:
        reader, writer = await self.start()
        try:
            async with asyncio.timeout(seconds):
                writer.writelines([job.head(), job.data])
                (length,) = ANSWER_HEAD.unpack(await reader.readexactly(ANSWER_HEAD.size))
                head: dict[str, Any] = json.loads(await reader.readexactly(min(length, MOST_WORDS)))
                if "shape" not in head:
                    return head, None
                pixels = await reader.readexactly(math.prod(head["shape"]))
        except TimeoutError as error:
            raise _SlowError from error
        except (EOFError, OSError, ValueError) as error:  # or has lost its mind
            raise _DiedError from error
        return head, np.frombuffer(pixels, dtype=np.uint8).reshape(head["shape"])


def _end(process: BaseProcess) -> None:
    if process.pid is not None:  # it may have failed to start
        process.kill()
        process.join()
    process.close()
