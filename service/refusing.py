"""Refusing images for which there is no place: before the framework sees the request, and before its body is read.

In an overload most requests end here, and what they cost is missing from the images that are scored.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Iterable

from service.batching import BusyError
from service.errors import ERRORS, error_answer, logger
from service.telemetry import Telemetry

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
REQUEST_ID_HEADER = "X-Request-ID"
LOG_SECONDS = 1.0  # refusals of so long have one line: to write one costs more than to refuse


def request_id_of(given: str) -> str:
    """The client's own if it is one, or one of ours."""
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


class Refusals:
    """Of POST requests for `path`. refusal: why an image that comes now finds no place, or None.

    Its methods belong to the event loop.
    """

    def __init__(self, path: str, refusal: Callable[[], BusyError | None], telemetry: Telemetry) -> None:
        self._path, self._refusal, self._telemetry = path, refusal, telemetry
        self._target = path.encode()
        self._unlogged = 0

    def answer(self, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """Headers and body of the answer 503 to a request that is refused, else None; as TimedProtocol wants it."""
        if method != b"POST" or target.partition(b"?")[0] != self._target:
            return None
        refusal = self._refusal()
        if refusal is None:
            return None
        given = dict(headers).get(REQUEST_ID_HEADER.lower().encode(), b"")
        request_id = request_id_of(given.decode("latin-1"))
        body = error_answer(request_id, refusal.code, str(refusal)).model_dump_json().encode()
        named = {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            REQUEST_ID_HEADER: request_id,
            **(refusal.headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        if not self._unlogged:
            asyncio.get_running_loop().call_later(LOG_SECONDS, self.log)
        self._unlogged += 1
        self._telemetry.request_ended(self._path, "POST", status=ERRORS[refusal.code].status, seconds=None)
        return f"{head}\r\n".encode() + body

    def log(self) -> None:
        """A line for those that have none yet: the loop's to call, and the server's when the loop has ended."""
        if self._unlogged:
            logger.warning("refused as busy", extra={"requests": self._unlogged, "within_seconds": LOG_SECONDS})
            self._unlogged = 0
