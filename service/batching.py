"""The way to the device: a bounded queue, and one thread that takes whatever waits, up to the largest batch."""

import asyncio
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from models.errors import ImageFailedError
from models.scoring import Scores
from service.decode_worker import YIELDING, Pixels
from service.errors import ServiceError, logger
from service.telemetry import Telemetry

LARGEST_BATCH = 16
LATELY = 0.1  # weight of the newest request in the time that requests have taken lately


class BusyError(ServiceError):
    def __init__(self, message: str, *, retry_seconds: int) -> None:
        super().__init__("busy", message, headers={"Retry-After": str(retry_seconds)})


class Scoring(Protocol):
    """A models.scoring.Scorer, or what a test has in its place."""

    def score(self, pixels: Tensor, /) -> Scores:
        """uint8 (B, C, S, S)."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One image of a batch."""

    batch: Scores
    index: int


@dataclass(frozen=True, eq=False)
class _Waiting:
    scorer: Scoring
    pixels: Pixels  # (C, S, S)
    answer: "asyncio.Future[Scored]"
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Scores the images of all models in one thread. While a batch is on the device the next one gathers, so that a
    lone image never waits for others and a crowd shares the device. Its methods belong to the event loop that made it.
    """

    def __init__(self, *, max_images: int, max_bytes: int, telemetry: Telemetry) -> None:
        self._max_images, self._max_bytes = max_images, max_bytes
        self._images = self._bytes = 0
        self._request_seconds = 0.0
        self._largest: WeakKeyDictionary[Scoring, int] = WeakKeyDictionary()
        self._telemetry = telemetry
        telemetry.images_waiting_limit.set(max_images)
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        telemetry.queue_age.set_function(self._age)
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def refusal(self, images: int, size: int) -> BusyError | None:
        """Why a request of so many images, `size` bytes together, would be refused now; None where it would not."""
        # What waits now is done after about as long as requests have taken lately.
        retry = max(1, math.ceil(self._request_seconds))
        if self._images + images > self._max_images:
            taken = f"{self._images} of {self._max_images} places for waiting images are taken"
            return BusyError(f"{taken}: {images} more do not fit.", retry_seconds=retry)
        # One that is larger than all places goes when nothing waits: the limit of the body has let it in.
        if self._images and self._bytes + size > self._max_bytes:
            held = f"the waiting images have {self._bytes} of {self._max_bytes} bytes"
            return BusyError(f"{held}: {size} more do not fit.", retry_seconds=retry)
        return None

    @contextmanager
    def places(self, images: int, size: int) -> Iterator[None]:
        """Hold places for a request's images, `size` bytes together, while they are decoded and scored.

        Taken for all at once and before anything is spent on them: a request is refused at once or answered whole.
        Raises BusyError.
        """
        if refusal := self.refusal(images, size):
            raise refusal
        since = time.perf_counter()
        self._hold(images, size)
        try:
            yield
        finally:
            self._hold(-images, -size)
            self._request_seconds += LATELY * (time.perf_counter() - since - self._request_seconds)

    def _hold(self, images: int, size: int) -> None:
        self._images += images
        self._bytes += size
        self._telemetry.images_waiting.set(self._images)

    async def score(self, scorer: Scoring, pixels: Pixels) -> Scored:
        """Score an image (C, S, S), for which the caller holds a place.

        An image whose caller is cancelled before its batch begins is never scored. Raises ImageFailedError for one
        that makes the scoring fail by itself.
        """
        waiting = _Waiting(scorer, pixels, self._loop.create_future())
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queue.append(waiting)
            self._changed.notify()
        return await waiting.answer

    def close(self) -> None:
        """Stop once nothing waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _age(self) -> float:
        """Seconds that the oldest image has waited for the device."""
        with self._changed:
            return time.perf_counter() - self._queue[0].since if self._queue else 0.0

    def _work(self) -> None:
        if sys.platform == "linux":  # where this is the priority of the thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + YIELDING)
        # The other half of the processor decodes. Threads of torch that wait for one another on a core that is taken
        # cost more than they bring.
        torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // 2)))
        while batch := self._next_batch():
            outcomes = self._outcomes(batch[0].scorer, [waiting.pixels for waiting in batch])
            # One call for all: each wakes the loop.
            self._loop.call_soon_threadsafe(_deliver, batch, outcomes)

    def _next_batch(self) -> list[_Waiting]:
        """Sleeps while nothing waits; empty when closed."""
        batch: list[_Waiting] = []
        with self._changed:
            while not batch:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                batch = self._take()
        now = time.perf_counter()
        for waiting in batch:
            self._telemetry.stage("queue").observe(now - waiting.since)
        self._telemetry.batch_images.observe(len(batch))
        return batch

    def _take(self) -> list[_Waiting]:
        """The oldest image and those of the same model, up to the largest batch; the others keep their order."""
        batch: list[_Waiting] = []
        others: list[_Waiting] = []
        while self._queue and (not batch or len(batch) < self._largest_of(batch[0].scorer)):
            waiting = self._queue.popleft()
            if waiting.answer.cancelled():
                continue
            (batch if not batch or waiting.scorer is batch[0].scorer else others).append(waiting)
        self._queue.extendleft(reversed(others))
        return batch

    def _largest_of(self, scorer: Scoring) -> int:
        return self._largest.get(scorer, LARGEST_BATCH)

    def _outcomes(self, scorer: Scoring, pixels: list[Pixels]) -> list[Scored | ImageFailedError]:
        """One for each image. A batch that fails is halved until only the image at fault does."""
        half = len(pixels) // 2
        if len(pixels) <= self._largest_of(scorer):
            try:
                with self._telemetry.stage("device").time():
                    scores = scorer.score(torch.from_numpy(np.stack(pixels)))
                return [_checked(Scored(scores, index)) for index in range(len(pixels))]
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread and the other images go on
                if len(pixels) == 1:
                    logger.exception("an image could not be scored")
                    return [ImageFailedError(f"scoring the image failed: {type(error).__name__}.")]
                if isinstance(error, torch.OutOfMemoryError):
                    self._largest[scorer] = half
                logger.warning("a batch of %d images failed and is halved: %s", len(pixels), error)
        return self._outcomes(scorer, pixels[:half]) + self._outcomes(scorer, pixels[half:])


def _checked(scored: Scored) -> Scored | ImageFailedError:
    """Not a number is no score, and JSON cannot hold it."""
    if np.isfinite(scored.batch.scores[scored.index]).all():
        return scored
    return ImageFailedError("scoring the image gave what is not a finite number.")


def _deliver(batch: list[_Waiting], outcomes: list[Scored | ImageFailedError]) -> None:
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.answer.done():
            continue  # its caller left while it was on the device
        if isinstance(outcome, ImageFailedError):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)
