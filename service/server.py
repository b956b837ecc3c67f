"""The server under the application: how long it waits for clients, and how it stops."""

import asyncio
import signal
import socket
from asyncio import TimerHandle
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from models.errors import ConfigError
from service.errors import logger

GRACE_SECONDS = 1  # after the drain, for clients that are still attached; uvicorn takes whole seconds
HEADER_BYTES = 2**16  # of one request; a client can send a gigabyte of them before it is late
UNSENT_BYTES = 2**17  # that the kernel takes for a client; its own megabytes hide for many seconds that a client reads

# Of a request's method, target and headers, their names in lower case: headers and body of an answer 503, or None.
Refuse = Callable[[bytes, bytes, list[tuple[bytes, bytes]]], bytes | None]


class TimedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP, which by itself waits for ever for headers, however many, and for a client that does not read.
    It also refuses before there is a request for the application, which costs less than half.

    Two waits are not of this class: uvicorn's timeout_keep_alive is for the silence between two requests, and the time
    that a body may take is the application's.
    """

    header_seconds: float
    send_seconds: float
    refuse: Refuse

    _header_timer: TimerHandle | None = None
    _header_bytes = 0
    _send_timer: TimerHandle | None = None
    _unsent = 0  # bytes, when the timer was set
    _in_body = False
    _is_refused = False
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Writing counts as paused as soon as, and as long as, there is anything that the client has not taken. With
        # the usual limits the last 64 KiB of an answer could stay for ever: closing waits for them.
        transport.set_write_buffer_limits(high=0)
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_arrived()
        self._stop_send_timer()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            # Where requests are pipelined, uvicorn tells only the last of them, which has not even begun.
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        # Not left to on_message_begin: blank lines before a request begin no message, but any byte makes uvicorn
        # forget its keep-alive timeout.
        if not self._in_body:
            self._await_headers()
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_timer is not None and self._header_bytes > HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_refused = False
        self._await_headers()  # it may have come in the same data as the end of the request before it

    def on_headers_complete(self) -> None:
        self._in_body = True
        self._headers_arrived()
        # Not where answers wait, that a client pipelines or does not read: the application waits with them.
        at_once = (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused
        refusal = self.refuse(self.parser.get_method(), self.url, self.headers) if at_once else None
        if refusal is None:
            super().on_headers_complete()
        else:
            self._send_refusal(refusal)

    def _send_refusal(self, headers_and_body: bytes) -> None:
        self._is_refused = True
        is_kept = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        own = [*self.server_state.default_headers, *([] if is_kept else [(b"connection", b"close")])]
        head = [STATUS_LINE[503], *(name + b": " + value + b"\r\n" for name, value in own)]
        self.transport.write(b"".join([*head, headers_and_body]))
        if not is_kept:
            self.transport.close()
        self.on_response_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            # Answered before the body was there. No application times the rest of it, and it makes uvicorn forget its
            # keep-alive timeout.
            self._await_headers()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._headers_are_late)

    def _headers_arrived(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._header_bytes = 0

    def _headers_are_late(self) -> None:
        # Uvicorn's way to end a connection: an answer that is on its way to a client that pipelines is finished first,
        # and what is unsent is sent, both within their own limits. Aborting would take them from the client.
        self.shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_send_timer()

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def _start_send_timer(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self.send_seconds, self._look_for_progress)

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _look_for_progress(self) -> None:
        # An answer in one piece keeps writing paused until its end: a slow client that reads it is no idle one.
        if self.transport.get_write_buffer_size() < self._unsent:
            self._start_send_timer()
        else:
            self.transport.abort()


def timed_protocol(*, header_seconds: float, send_seconds: float, refuse: Refuse) -> type[TimedProtocol]:
    """For uvicorn.Config, which takes a class and no arguments for it.

    header_seconds: from the opening of a connection, or from the first byte of a further request on it, until the
    headers are whole; the connection is then closed. send_seconds: for how long a client may take nothing of its
    answer; the connection is then cut, and the request receives http.disconnect.
    """

    class Protocol(TimedProtocol):
        pass

    Protocol.header_seconds, Protocol.send_seconds = header_seconds, send_seconds
    Protocol.refuse = staticmethod(refuse)
    return Protocol


def server_config(
    app: ASGIApp, *, host: str, port: int, protocol: type[TimedProtocol], log_config: dict[str, Any]
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",  # another protocol would take the connection over, without these limits
        log_config=log_config,
        log_level="info",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


class Server(uvicorn.Server):
    """Says where it listens, drains when it is told to stop, and leaves with status 0.

    SIGINT or SIGTERM begins the drain: new connections are still taken, so that the application can refuse their
    requests. A second one ends it at once. SIGHUP calls hangup.

    begin_drain, drained and hangup are called on the event loop; begin_drain and hangup must not block. Any of them may
    be called before the application has started. drained: returns when no request that must be answered is left; it is
    cancelled after drain_seconds.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        begin_drain: Callable[[], None],
        drained: Callable[[], Awaitable[None]],
        hangup: Callable[[], None],
        drain_seconds: float,
    ) -> None:
        super().__init__(config)
        self._begin_drain = begin_drain
        self._drained = drained
        self._hangup = hangup
        self._drain_seconds = drain_seconds
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        logger.info("serving on http://%s:%d (Ctrl+C to stop)", host, self.config.port)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """In place of uvicorn's, which at the end kills the process by the signal that stopped it."""
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop, signal.SIGHUP: self._hangup}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)  # runs it on the loop, and wakes the loop up
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_then_exit())
        else:
            self.should_exit = self.force_exit = True

    async def _drain_then_exit(self) -> None:
        try:
            self._begin_drain()
            async with asyncio.timeout(self._drain_seconds):
                await self._drained()
                # The application is done with an answer before the client has all of it.
                for connection in list(self.server_state.connections):
                    if isinstance(connection, TimedProtocol):
                        await connection.flow.drain()
        except TimeoutError:
            logger.warning("stopping with requests unanswered after %g seconds", self._drain_seconds)
        finally:
            self.should_exit = True


def bound_socket(host: str, port: int) -> socket.socket:
    """Taken first, so that a taken port is known at once; nobody can connect before the model is ready.

    Raises ConfigError.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}.") from error
    return listener
