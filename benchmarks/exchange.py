"""A request told apart by what became of it, while the server is stopping: answered, refused, never read, or lost."""

import json
import select
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.traffic import PNG, Client

TCP_CLOSED = 7  # as Linux tells it in TCP_INFO: the other side has sent RST, or both have ended

ANSWERED = "answered"
REFUSED = "refused with Retry-After"
NOT_SENT = "not sent: no connection, or closed before the whole request had left"
NOT_READ = "not admitted: closed before read"
LOST = "lost"


@dataclass
class Exchanges:
    """Of one client. A request is lost if all of it was sent and it was neither answered whole nor refused.

    One that was sent in the moment in which the server closed a connection on which nothing was going on has not been
    admitted: every server that keeps connections has this race. It counts apart, and only where the kernel can tell:
    closing a socket with bytes that were not read sends RST, and one whose bytes were all read ends without it. The
    latter is lost.
    """

    port: int
    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    gone: bool = False  # nobody listens any more
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(self.port)

    def post(self, target: str, image: bytes) -> Any:
        """The answer's JSON if there is a whole one with status 200."""
        connection = self.client.connection
        try:
            if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
                connection.close()  # the server has closed it: any client sees so and takes another
            connection.request("POST", target, body=image, headers=PNG)
        except OSError as error:
            connection.close()
            self.counts[NOT_SENT] += 1
            self.gone = isinstance(error, ConnectionRefusedError)
            return None
        try:
            return self._read()
        except (OSError, EOFError, ValueError) as error:
            connection.close()
            self._lost(f"{type(error).__name__}: {error}")
            return None

    def _read(self) -> Any:
        """Raises OSError, EOFError, and ValueError for what is no whole answer."""
        connection = self.client.connection
        stream: socket.socket = connection.sock
        try:
            first = stream.recv(1, socket.MSG_PEEK)
        except ConnectionResetError:
            first = b""
            reset = True
        else:
            reset = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSED
        if not first:
            if not reset:
                raise EOFError("closed without an answer after all of it had been read")
            connection.close()
            self.counts[NOT_READ] += 1
            return None
        response = connection.getresponse()
        content = response.read()
        if response.status == 503 and "Retry-After" in response.headers:
            self.counts[REFUSED] += 1
            return None
        if response.status != 200:
            raise ValueError(f"status {response.status}: {content[:200]!r}")
        answer = json.loads(content)
        self.counts[ANSWERED] += 1
        return answer

    def _lost(self, why: str) -> None:
        self.counts[LOST] += 1
        self.losses.append(why)
