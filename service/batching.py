"""The way to the device: a bounded queue, and one thread that takes whatever waits, up to the largest batch."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch

from models.errors import ImageFailedError
from models.graphs import SIZES
from models.scoring import Scores
from service.decode_worker import Pixels
from service.device_worker import Scoring, UnderWay
from service.errors import ServiceError, logger
from service.telemetry import Telemetry

LARGEST_BATCH = SIZES[0]
LATELY = 0.1  # weight of the newest request in the time that requests have taken lately


class BusyError(ServiceError):
    def __init__(self, message: str, *, retry_seconds: int) -> None:
        super().__init__("busy", message, headers={"Retry-After": str(retry_seconds)})


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


@dataclass(frozen=True, eq=False)
class _Begun:
    scorer: Scoring
    pixels: list[Pixels]
    scores: UnderWay
    since: float


class Batcher:
    """Scores the images of all models in one thread. While a batch is on the device the next one gathers, so that a
    lone image never waits for others and a crowd shares the device. A full one has nothing to wait for: it is sent
    before the last one is done, and the device makes no pause. Its methods belong to the event loop that made it.
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
        self._last_end = 0.0  # of a batch on the device
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
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            # At once: it would keep its pixels as long as the device does not come to it.
            with self._changed, suppress(ValueError):  # it is on the device
                self._queue.remove(waiting)
            raise

    def close(self) -> None:
        """Stop once nothing waits any more. For any thread: the device may take long."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _age(self) -> float:
        """Seconds that the oldest image has waited for the device."""
        with self._changed:
            return time.perf_counter() - self._queue[0].since if self._queue else 0.0

    def _work(self) -> None:
        on_device: deque[tuple[list[_Waiting], _Begun]] = deque()
        while True:
            batch = self._next_batch(wait=not on_device)
            if batch:
                on_device.append((batch, self._begin(batch[0].scorer, [waiting.pixels for waiting in batch])))
            elif not on_device:
                return  # closed
            while on_device and (not batch or len(on_device) == 2 or on_device[0][1].scores.done()):
                finished, begun = on_device.popleft()
                # One call for all: each wakes the loop.
                answers = zip(finished, self._outcomes(begun), strict=True)
                self._loop.call_soon_threadsafe(self._deliver, answers)

    def _next_batch(self, *, wait: bool) -> list[_Waiting]:
        """wait: sleep while nothing waits; then empty when closed. Otherwise empty where no full one waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed or not wait)
            if not self._queue or not (wait or self._is_full()):
                return []
            batch = self._take()
        now = time.perf_counter()
        for waiting in batch:
            self._telemetry.stage("queue").observe(now - waiting.since)
        self._telemetry.batch_images.observe(len(batch))
        return batch

    def _is_full(self) -> bool:
        scorer = self._queue[0].scorer
        return sum(waiting.scorer is scorer for waiting in self._queue) >= self._largest_of(scorer)

    def _take(self) -> list[_Waiting]:
        """The oldest image and those of the same model, up to the largest batch; the others keep their order."""
        batch: list[_Waiting] = []
        others: list[_Waiting] = []
        while self._queue and (not batch or len(batch) < self._largest_of(batch[0].scorer)):
            waiting = self._queue.popleft()
            (batch if not batch or waiting.scorer is batch[0].scorer else others).append(waiting)
        self._queue.extendleft(reversed(others))
        return batch

    def _largest_of(self, scorer: Scoring) -> int:
        return self._largest.get(scorer, LARGEST_BATCH)

    def _begin(self, scorer: Scoring, pixels: list[Pixels]) -> _Begun:
        since = time.perf_counter()
        scores: UnderWay
        try:
            scores = scorer.begin(torch.from_numpy(np.stack(pixels)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread and the other images go on
            scores = Future()
            scores.set_exception(error)
        return _Begun(scorer, pixels, scores, since)

    def _outcomes(self, begun: _Begun) -> list[Scored | ImageFailedError]:
        """One for each image. A batch that fails is halved until only the image at fault does."""
        scorer, pixels = begun.scorer, begun.pixels
        half = len(pixels) // 2
        try:
            scores = begun.scores.result()
            return [_checked(Scored(scores, index)) for index in range(len(pixels))]
        except Exception as error:  # noqa: BLE001 - the same
            if len(pixels) == 1:
                logger.exception("an image could not be scored")
                return [ImageFailedError("scoring the image failed; the service's log has the traceback.")]
            if isinstance(error, torch.OutOfMemoryError):
                self._largest[scorer] = half
            logger.warning("a batch of %d images failed and is halved: %s", len(pixels), error)
        finally:
            # A full batch is sent while the device still has the one before.
            now = time.perf_counter()
            self._telemetry.stage("device").observe(now - max(begun.since, self._last_end))
            self._last_end = now
        return self._outcomes_of_parts(scorer, pixels, half)

    def _outcomes_of_parts(self, scorer: Scoring, pixels: list[Pixels], size: int) -> list[Scored | ImageFailedError]:
        outcomes: list[Scored | ImageFailedError] = []
        while rest := pixels[len(outcomes) :]:
            # The first part may have found that the device has memory for less.
            outcomes += self._outcomes(self._begin(scorer, rest[: min(size, self._largest_of(scorer))]))
        return outcomes

    def _deliver(self, answers: Iterator[tuple[_Waiting, Scored | ImageFailedError]]) -> None:
        """One after the other, and between them the loop looks at what comes in: what an answer costs it, 16 times, is
        long for a request that is only refused."""
        for waiting, outcome in answers:
            if waiting.answer.done():
                continue  # its caller left while it was on the device
            if isinstance(outcome, ImageFailedError):
                waiting.answer.set_exception(outcome)
            else:
                waiting.answer.set_result(outcome)
            self._loop.call_soon(self._deliver, answers)
            return


def _checked(scored: Scored) -> Scored | ImageFailedError:
    """Not a number is no score, and JSON cannot hold it."""
    if np.isfinite(scored.batch.scores[scored.index]).all():
        return scored
    return ImageFailedError("scoring the image gave what is not a finite number.")
