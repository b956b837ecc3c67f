"""Many requests at once, from one thread and at little cost: prepared bytes over connections that are kept."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

CONNECTIONS = 512
LAST_ANSWERS_SECONDS = 60
IDLE_SECONDS = 4  # the service closes a connection after five; a request that meets that has no answer


@dataclass
class Sent:
    """A request. Times are of the event loop's clock; status is None while no whole answer is there."""

    due: float
    left: float = 0
    answered: float = 0
    status: int | None = None
    retry_after: bool = False

    @property
    def latency(self) -> float:
        return self.answered - self.due


class Connection(asyncio.Protocol):
    """One request at a time; calls `done` when the answer is whole, or when there will be none."""

    def __init__(self, done: Callable[["Connection"], None]) -> None:
        self._done = done
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self.sent: Sent | None = None
        self._since = asyncio.get_running_loop().time()

    @property
    def is_open(self) -> bool:
        fresh = asyncio.get_running_loop().time() - self._since < IDLE_SECONDS
        return fresh and self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def send(self, request: bytes, sent: Sent) -> None:
        assert self._transport is not None
        self.sent, self._received = sent, b""
        sent.left = asyncio.get_running_loop().time()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or self.sent is None:
            return
        headers = head.lower()
        if len(body) >= int(headers.partition(b"content-length:")[2].split(b"\r\n")[0]):
            self.sent.status = int(head[9:12])
            self.sent.retry_after = b"\r\nretry-after:" in headers
            if b"\r\nconnection: close" in headers:
                self.close()
            self._finish()

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        if self.sent is not None:
            self._finish()

    def _finish(self) -> None:
        assert self.sent is not None
        self.sent.answered = self._since = asyncio.get_running_loop().time()
        self._done(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Crowd:
    """Requests over as many connections as they need, up to a limit; beyond it they wait for one, and it counts."""

    port: int
    requests: list[bytes]
    limit: int = CONNECTIONS
    all_sent: list[Sent] = field(default_factory=list)
    most_waiting: int = 0
    connections: set[Connection] = field(default_factory=set)
    _idle: list[Connection] = field(default_factory=list)
    _waiting: deque[Sent] = field(default_factory=deque)
    _pending: int = 0
    _opening: set["asyncio.Task[None]"] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, due: float) -> Sent:
        sent = Sent(due)
        self.all_sent.append(sent)
        self._pending += 1
        self._waiting.append(sent)
        self._go_on()
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        return sent

    def _go_on(self) -> None:
        while self._waiting and self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                request = self.requests[len(self.all_sent) % len(self.requests)]
                connection.send(request, self._waiting.popleft())
            else:
                connection.close()
                self.connections.discard(connection)
        while len(self._opening) < len(self._waiting) and len(self.connections) + len(self._opening) < self.limit:
            task = asyncio.ensure_future(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self._done), "127.0.0.1", self.port)
        except OSError:  # one request fewer waits for one; it has no status
            self._waiting.popleft()
            self._pending -= 1
            self._changed.set()
            return
        self.connections.add(connection)
        self._idle.append(connection)
        self._go_on()

    def _done(self, connection: Connection) -> None:
        connection.sent = None
        self._pending -= 1
        self._idle.append(connection)
        self._changed.set()
        self._go_on()

    async def pending_at_most(self, number: int) -> None:
        """Wait until no more requests than that have no answer."""
        while self._pending > number:
            self._changed.clear()
            await self._changed.wait()

    async def all_answered(self) -> None:
        """Or as many as are within a minute: the others have no status."""
        try:
            async with asyncio.timeout(LAST_ANSWERS_SECONDS):
                await self.pending_at_most(0)
        except TimeoutError:
            return

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
