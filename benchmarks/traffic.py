"""What the reliability benchmarks send: clients that keep their connection, clients that dawdle, and images."""

import http.client
import io
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

NO_ANSWER = (OSError, http.client.HTTPException)  # what Client.send raises where no whole answer came
PNG = {"Content-Type": "image/png"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error; "ok" where there is none."""
        return "ok" if self.status < 400 else str(self.json()["error"]["code"])


@dataclass
class Client:
    """A connection that is kept, and made anew where the server has closed it."""

    port: int
    timeout: float = 60
    connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)

    def send(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Raises one of NO_ANSWER."""
        begin = time.perf_counter()
        try:
            self.connection.request(method, target, body=body, headers=headers or {})
            response = self.connection.getresponse()
            content = response.read()
        except NO_ANSWER:
            self.connection.close()
            raise
        return Answer(response.status, response.headers, content, time.perf_counter() - begin)


def request_bytes(target: str, body: bytes, *, content_type: str = "image/png", length: int | None = None) -> bytes:
    """A POST as it goes over the wire. length: what its header claims, the body's own if None."""
    head = (
        f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def form_bytes(images: Sequence[bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart form of them, and its headers."""
    boundary = "hazelnut-form-boundary"
    head = 'Content-Disposition: form-data; name="files"; filename="{}.png"\r\nContent-Type: image/png'
    parts = [
        f"--{boundary}\r\n{head.format(index)}\r\n\r\n".encode() + image + b"\r\n" for index, image in enumerate(images)
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def picture(seed: int, *, side: int = 256, format_name: str = "PNG") -> bytes:
    """A soft pattern with a little noise, so that it compresses as a photograph does; its bytes are the seed's own."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(40, 216, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = np.clip(smooth + draws.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_name)
    return file.getvalue()


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Call work(0) ... work(count - 1) at the same time, and wait. Raises what one of them raises."""
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(work, range(count)):
            pass


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    """NaN of nothing."""
    return float(np.percentile(seconds, percent)) * 1000 if len(seconds) else float("nan")


@dataclass
class Slow:
    """A socket that sends its request a byte a second, or reads its answer a byte a second."""

    kind: str
    connection: socket.socket
    rest: bytes
    received: bytes = b""
    closed: bool = False

    def step(self) -> None:
        """Its byte of this second; the server's answer, if it has given up, and whether it has closed."""
        try:
            if self.rest:
                self.connection.send(self.rest[:1])
                self.rest = self.rest[1:]
            content = self.connection.recv(1 if self.kind == "reads" else 4096)
            self.received = (self.received + content)[:4096]
            self.closed = not content
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    @property
    def outcome(self) -> str:
        answer = f"answered {self.received[9:12].decode()}" if self.received else ""
        return " and ".join(part for part in (answer, "closed" if self.closed else "open") if part)


class SlowClients:
    """A crowd of slow sockets, stepped by a thread of its own while the block runs.

    counts: by kind. "headers" and "body" send theirs a byte a second, "silent" connects and says nothing, "reads" sends
    `wanted` at once and reads the answer a byte a second.
    """

    def __init__(self, port: int, counts: Mapping[str, int], *, wanted: bytes = b"") -> None:
        whole = request_bytes("/score", b"\0" * 1_000_000)
        end_of_headers = whole.index(b"\r\n\r\n") + 4
        at_once = {"headers": b"", "body": whole[:end_of_headers], "silent": b"", "reads": wanted}
        # Long headers, or they would be whole before the minute is over.
        slowly = {"headers": whole[: end_of_headers - 2] + b"X-Slow: " + b"a" * 2000, "body": whole[end_of_headers:]}
        self.slow = [
            Slow(kind, _connected(port, at_once[kind], small=kind == "reads"), slowly.get(kind, b""))
            for kind, count in counts.items()
            for _ in range(count)
        ]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._step)

    def __enter__(self) -> "SlowClients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for slow in self.slow:
            slow.connection.close()

    def _step(self) -> None:
        while not self._over.wait(1):
            for slow in self.slow:
                if not slow.closed:
                    slow.step()

    def outcomes(self) -> dict[str, dict[str, int]]:
        """By kind, how many ended or stand how."""
        kinds = dict.fromkeys(slow.kind for slow in self.slow)
        return {kind: counted(Counter(slow.outcome for slow in self.slow if slow.kind == kind)) for kind in kinds}


def _connected(port: int, at_once: bytes, *, small: bool) -> socket.socket:
    """small: the kernel shall keep little of the answer for a client that does not read it."""
    connection = socket.socket()
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(at_once)
    connection.setblocking(False)
    return connection


def vanish(port: int, request: bytes, *, reset: bool) -> None:
    """Send it and leave at once: with RST, as a client that dies does, or with an orderly close."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def counted(counter: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counter.items()))
