"""The way to the device: one thread that scores, and a bound on how many images wait for it."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from models.scoring import Scorer, Scores
from service.errors import ServiceError
from service.telemetry import Telemetry

MAX_BATCH = 16
RETRY_SECONDS = 1


class BusyError(ServiceError):
    def __init__(self, message: str) -> None:
        super().__init__("busy", message, headers={"Retry-After": str(RETRY_SECONDS)})


class Batcher:
    """Scores images in one thread, so that requests take turns. Its methods belong to one event loop."""

    def __init__(self, scorer: Scorer, *, max_waiting: int, telemetry: Telemetry) -> None:
        self._scorer = scorer
        self._max_waiting = max_waiting
        self._waiting = 0
        self._telemetry = telemetry
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold places for a request's images while they are decoded and scored.

        Taken for all at once and before anything is spent on them: a request is refused at once or answered whole.
        Raises BusyError.
        """
        if self._waiting + count > self._max_waiting:
            raise BusyError(
                f"{self._waiting} of {self._max_waiting} places for waiting images are taken: {count} more do not fit."
            )
        self._set_waiting(self._waiting + count)
        try:
            yield
        finally:
            self._set_waiting(self._waiting - count)

    async def score(self, pixels: Tensor) -> Scores:
        """Score uint8 (B, C, S, S), B >= 1, for which the caller holds places; at most 16 at a time."""
        loop = asyncio.get_running_loop()
        batches = torch.split(pixels, MAX_BATCH)
        parts = [await loop.run_in_executor(self._thread, self._score, batch) for batch in batches]
        return parts[0] if len(parts) == 1 else await loop.run_in_executor(self._thread, _joined, parts)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _score(self, pixels: Tensor) -> Scores:
        with self._telemetry.stage("device").time():
            return self._scorer.score(pixels)

    def _set_waiting(self, waiting: int) -> None:
        self._waiting = waiting
        self._telemetry.images_waiting.set(waiting)


def _joined(parts: list[Scores]) -> Scores:
    return Scores(
        scores=np.concatenate([part.scores for part in parts]),
        anomaly_score=np.concatenate([part.anomaly_score for part in parts]),
        p_value=np.concatenate([part.p_value for part in parts]),
        maps=np.concatenate([part.maps for part in parts]),
        reconstructions=torch.cat([part.reconstructions for part in parts]),
    )
