"""The end of the service: what was begun is finished, what comes later is refused."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Drain:
    """`begun` once the service is told to stop."""

    def __init__(self) -> None:
        self.begun = False
        self._requests = 0
        self._over = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, to the last byte of its answer. Those that come when the drain has begun do not count:
        they are refused, and there may be no end of them.
        """
        counts = not self.begun
        self._requests += counts
        try:
            yield
        finally:
            self._requests -= counts
            if self.begun and not self._requests:
                self._over.set()

    @contextmanager
    def ends(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Within the block the limit is reached when the drain begins."""
        self._limits.add(limit)
        try:
            yield
        finally:
            self._limits.remove(limit)

    def begin(self) -> None:
        if self.begun:
            return
        self.begun = True
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(0)
        if not self._requests:
            self._over.set()

    async def finished(self) -> None:
        """Wait until none of those that count is left."""
        await self._over.wait()
