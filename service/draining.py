"""The end of the service: what was begun is finished, what comes later is refused."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Drain:
    """`begun` is set once the service is told to stop."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._requests = 0
        self._over = asyncio.Event()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, to the last byte of its answer. Those that come when the drain has begun do not count:
        they are refused, and there may be no end of them.
        """
        counts = not self.begun.is_set()
        self._requests += counts
        try:
            yield
        finally:
            self._requests -= counts
            if self.begun.is_set() and not self._requests:
                self._over.set()

    def begin(self) -> None:
        self.begun.set()
        if not self._requests:
            self._over.set()

    async def finished(self) -> None:
        """Wait until none of those that count is left."""
        await self._over.wait()
