"""The server, over real connections: clients that stall are cut, slow ones are not, and how it stops."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter, TimerHandle
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from models.errors import ConfigError
from service.server import Refuse, Server, TimedProtocol, bound_socket, server_config, timed_protocol
from tests.conftest import until

QUIET = {"version": 1, "disable_existing_loggers": False}
END = b"0\r\n\r\n"  # of every answer: all are in chunks
PART = bytes(2**16)
PARTS = 800


class App:
    """/stream sends 50 MB in parts and /piece at once; /little stops as soon as the client leaves something; /wait
    waits for the client to leave; /refused answers before it has the body. Any other path is answered with itself."""

    def __init__(self) -> None:
        self.server: Server
        self.address: tuple[str, int]
        self.clients: list[Client] = []
        self.left: list[str] = []  # the paths whose client was gone before it had its answer
        self.ended: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for name in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{name}.complete"})
            return
        path = scope["path"]
        if path != "/refused":
            while (await receive()).get("more_body"):
                pass
        leaving = asyncio.ensure_future(receive())
        await self.answer(path, send, leaving)
        self.ended.append(path)

    async def answer(self, path: str, send: Send, leaving: "asyncio.Future[Message]") -> None:
        if path == "/wait":
            await leaving
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path == "/piece":
            await send(part(PART * PARTS))
        elif path == "/stream":
            for _ in range(PARTS):
                await send(part(PART))
        elif path == "/little":
            while not self.unsent():
                await send(part(PART[: 2**14]))
        await send(part(b""))  # once all before it is on its way
        await asyncio.sleep(0)
        if leaving.done():
            self.left.append(path)
        await send(part(path.encode(), more=False))
        await leaving

    async def connect(self) -> "Client":
        self.clients.append(Client(*await asyncio.open_connection(*self.address)))
        return self.clients[-1]

    def unsent(self) -> int:
        return sum(connection.transport.get_write_buffer_size() for connection in self.connections)

    @property
    def connections(self) -> list[TimedProtocol]:
        return [
            connection for connection in self.server.server_state.connections if isinstance(connection, TimedProtocol)
        ]


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Client:
    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        if not self.writer.is_closing():  # the server may have cut it
            self.writer.write(data)

    def get(self, path: str = "/", *, headers: str = "") -> None:
        self.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode())

    async def answer(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(END), 20)

    async def rest(self) -> bytes:
        """What comes until the server closes the connection, or cuts it."""
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := await asyncio.wait_for(self.reader.read(2**16), 20):
                received += data
        return bytes(received)


def run(
    test: Callable[[App], Coroutine[Any, Any, None]],
    *,
    header_seconds: float = 60,
    send_seconds: float = 60,
    refuse: Refuse = lambda *_: None,
    protocol: Callable[[type[TimedProtocol]], type[TimedProtocol]] = lambda given: given,
) -> None:
    app = App()
    limited = protocol(timed_protocol(header_seconds=header_seconds, send_seconds=send_seconds, refuse=refuse))
    config = server_config(app, host="127.0.0.1", port=0, protocol=limited, log_config=QUIET)

    async def whole() -> None:
        listener = bound_socket("127.0.0.1", 0)
        app.address = listener.getsockname()
        app.server = Server(config, begin_drain=lambda: None, drained=nothing, hangup=lambda: None, drain_seconds=1)
        serving = asyncio.ensure_future(app.server.serve(sockets=[listener]))
        await until(lambda: app.server.started)
        try:
            await asyncio.wait_for(test(app), 40)
        finally:
            for client in app.clients:
                client.writer.transport.abort()
            app.server.should_exit = True
            await serving

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(whole())


async def nothing() -> None: ...


def busy(_method: bytes, target: bytes, _headers: object) -> bytes | None:
    return b"content-length: 5\r\n\r\n" + END if target == b"/busy" else None


@pytest.mark.parametrize("beginning", [b"", b"G", b"GET / HTTP/1.1\r\nHost: te", b"\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_a_connection_without_whole_headers_is_closed_and_others_are_answered(beginning):
    async def test(app: App) -> None:
        stalled = await app.connect()
        stalled.send(beginning)
        normal = await app.connect()
        normal.get("/normal")
        assert b"/normal" in await normal.answer()
        received = await stalled.rest()
        assert received == b"" or received.startswith(b"HTTP/1.1 400 ")
        assert app.ended in (["/normal"], [])

    run(test, header_seconds=0.3)


def test_headers_that_trickle_in_are_late_as_well():
    async def test(app: App) -> None:
        trickling = await app.connect()
        closed = asyncio.ensure_future(trickling.rest())
        trickling.send(b"GET /late HTTP/1.1\r\n")
        while not closed.done():
            trickling.send(b"X-Slow: 1\r\n")
            await asyncio.sleep(0.05)
        assert await closed == b""
        assert app.ended == []

    run(test, header_seconds=0.3)


@pytest.mark.parametrize("data", [b"X-More: 1\r\n", b"x"], ids=["many", "one"])
def test_headers_without_end_are_cut(data):
    async def test(app: App) -> None:
        client = await app.connect()
        client.get()
        assert await client.answer()
        client.send(b"GET /more HTTP/1.1\r\nX: ")
        closed = asyncio.ensure_future(client.rest())
        while not closed.done():
            client.send(data * 1000)
            await asyncio.sleep(0)
        assert await closed == b""
        assert app.ended == ["/"]

    run(test)


def test_every_request_of_a_connection_has_its_own_time_for_its_headers():
    async def test(app: App) -> None:
        client = await app.connect()
        for number in range(4):
            client.send(f"GET /{number} HTTP/1.1\r\nX: {'x' * 20_000}\r\n".encode())
            await asyncio.sleep(0.2)
            client.send(b"Host: test\r\n\r\n")
            assert f"/{number}".encode() in await client.answer()
        client.send(b"GET /late HTTP/1.1\r\n")
        assert await client.rest() == b""
        assert app.ended == ["/0", "/1", "/2", "/3"]

    run(test, header_seconds=0.6)


def test_a_connection_may_be_silent_between_requests_for_longer_than_headers_may_take():
    async def test(app: App) -> None:
        client = await app.connect()
        for _ in range(2):
            client.get()
            await client.answer()
            await asyncio.sleep(0.6)
        client.get("/again")
        assert b"/again" in await client.answer()

    run(test, header_seconds=0.2)


def test_blank_lines_do_not_keep_a_connection():
    async def test(app: App) -> None:
        client = await app.connect()
        client.get()
        await client.answer()
        client.send(b"\r\n")
        assert await client.rest() == b""

    run(test, header_seconds=0.3)


def test_a_body_may_take_longer_than_headers():
    async def test(app: App) -> None:
        client = await app.connect()
        client.send(b"POST /body HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n")
        for _ in range(10):
            client.send(b"x")
            await asyncio.sleep(0.07)
        assert b"/body" in await client.answer()
        client.get("/again")
        assert b"/again" in await client.answer()

    run(test, header_seconds=0.3)


@pytest.mark.parametrize(("path", "answer"), [(b"/refused", b"/refused"), (b"/busy", b" 503 ")])
def test_a_body_that_nobody_waits_for_does_not_keep_a_connection(path, answer):
    async def test(app: App) -> None:
        client = await app.connect()
        client.send(b"POST %s HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n" % path)
        assert answer in await client.answer()
        closed = asyncio.ensure_future(client.rest())
        while not closed.done():
            client.send(b"x")
            await asyncio.sleep(0.05)
        assert await closed == b""

    run(test, header_seconds=0.3, refuse=busy)


def test_an_answer_on_its_way_is_finished_when_the_headers_after_it_are_late():
    async def test(app: App) -> None:
        client = await app.connect()
        client.get("/stream")
        client.send(b"GET /late HTTP/1.1\r\n")
        await asyncio.sleep(0.6)
        received = await client.rest()
        assert len(received) > len(PART) * PARTS
        assert received.endswith(b"/stream\r\n" + END)
        assert app.ended == ["/stream"]

    run(test, header_seconds=0.3)


@pytest.mark.parametrize("path", ["/stream", "/piece", "/little"])
def test_a_client_that_does_not_read_its_answer_is_cut_and_the_request_is_told(path):
    async def test(app: App) -> None:
        client, normal = await app.connect(), await app.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.get(path)
        normal.get("/normal")
        assert b"/normal" in await normal.answer()
        await until(lambda: path in app.ended)
        assert app.left == [path]
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await client.rest()) < len(PART) * PARTS

    run(test, send_seconds=0.3)


@pytest.mark.parametrize("path", ["/stream", "/piece"])
def test_a_client_that_reads_slowly_has_its_whole_answer(path):
    async def test(app: App) -> None:
        client = await app.connect()
        client.get(path, headers="Connection: close\r\n")
        size = 0
        while data := await client.reader.read(2**21):
            size += len(data)
            await asyncio.sleep(0.004)  # in all for longer than the limit
        assert size > len(PART) * PARTS
        assert app.left == []

    run(test, send_seconds=0.3)


def test_the_kernel_hides_little_of_what_a_client_does_not_read():
    async def test(app: App) -> None:
        client = await app.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.get("/piece")
        await until(app.unsent)
        await asyncio.sleep(0.2)
        assert app.unsent() > len(PART) * PARTS - 2**20

    run(test)


def test_every_request_of_a_connection_is_told_that_its_client_is_gone():
    async def test(app: App) -> None:
        client = await app.connect()
        client.get("/wait")
        client.get("/queued")
        await until(lambda: [connection.pipeline for connection in app.connections if connection.pipeline])
        client.writer.transport.abort()
        await until(lambda: app.ended)
        assert app.left == ["/wait"]

    run(test)


def test_what_is_refused_never_reaches_the_application_and_its_connection_is_kept():
    async def test(app: App) -> None:
        client = await app.connect()
        for body in (b"", PART * 8):
            client.send(b"POST /busy HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(body))
            answer = await client.answer()  # and none of the body has been sent
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\ndate: " in answer
            assert b"connection: close" not in answer
            client.send(body)
        client.get("/normal")
        assert b"/normal" in await client.answer()
        assert "/busy" not in app.ended
        assert len(app.clients) == len(app.connections) == 1

    run(test, refuse=busy)


@pytest.mark.parametrize("beginning", ["GET /busy HTTP/1.0\r\n", "GET /busy HTTP/1.1\r\nConnection: close\r\n"])
def test_a_refusal_closes_the_connection_of_a_client_that_wants_it_closed(beginning):
    async def test(app: App) -> None:
        client = await app.connect()
        client.send(f"{beginning}Host: test\r\n\r\n".encode())
        received = await asyncio.wait_for(client.rest(), 2)  # not by the keep-alive timeout
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nconnection: close\r\n" in received
        assert not app.connections

    run(test, refuse=busy)


def test_a_refusal_does_not_overtake_an_answer():
    async def test(app: App) -> None:
        client = await app.connect()
        client.get("/stream")
        client.get("/busy", headers="Connection: close\r\n")
        received = await client.rest()
        assert received.index(b"/stream\r\n" + END) < received.index(b"/busy\r\n" + END)

    run(test, refuse=busy)


def test_refusals_that_nobody_reads_do_not_pile_up():
    async def test(app: App) -> None:
        client = await app.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        ended = asyncio.ensure_future(until(lambda: not app.connections))
        most = 0
        while not ended.done():
            client.send(b"GET /busy HTTP/1.1\r\nHost: test\r\n\r\n" * 1000)
            await asyncio.sleep(0)
            most = max(most, app.unsent())
        assert most < 2**16

    run(test, refuse=busy, send_seconds=0.3)


def test_no_timer_outlives_its_request_or_its_connection():
    timers: list[TimerHandle] = []

    class Loop:
        """The protocol's; keeps the timers that it sets."""

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.create_task = loop.create_task
            self._call_later = loop.call_later

        def call_later(self, *arguments: Any) -> TimerHandle:
            timers.append(self._call_later(*arguments))
            return timers[-1]

    def watched(given: type[TimedProtocol]) -> type[TimedProtocol]:
        class Watched(given):  # type: ignore[misc, valid-type]
            def connection_made(self, transport: asyncio.Transport) -> None:
                self.loop: Any = Loop(self.loop)
                super().connection_made(transport)

        return Watched

    def running() -> int:
        return sum(not timer.cancelled() for timer in timers)

    async def test(app: App) -> None:
        client = await app.connect()
        for _ in range(50):
            client.get()
            await client.answer()
        assert len(timers) >= 100
        assert running() == 1, "more than the keep-alive timeout"
        client.send(b"GET / HTTP/1.1\r\n")
        client.writer.close()
        unread, silent = await app.connect(), await app.connect()
        unread.get("/piece")
        await until(app.unsent)
        assert running() == 2
        for leaving in (unread, silent):
            leaving.writer.transport.abort()
        await until(lambda: not app.connections)
        assert running() == 0

    run(test, protocol=watched)


# What stops is a process of its own. It says on its output what it does.
CHILD = """
import asyncio, signal, sys
from service.server import Server, bound_socket, server_config, timed_protocol

signal.alarm(60)  # no test that fails leaves it behind
draining, in_flight, released, idle = False, 0, asyncio.Event(), asyncio.Event()
idle.set()

def say(text):
    print(text, flush=True)

async def app(scope, receive, send):
    global in_flight
    if scope["type"] == "lifespan":
        for name in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{name}.complete"})
        say("shut down")
        return
    path, status, body = scope["path"], 503 if draining else 200, b"answer"
    if path == "/release":
        released.set()
    elif path == "/body":
        say("reading")
        while (await receive()).get("more_body"):
            pass
    elif path == "/hold":
        in_flight += 1
        idle.clear()
        say("holding")
        await released.wait()
    elif path == "/large":
        body = bytes(30_000_000)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})
    say("answered " + path)
    if path == "/hold":
        in_flight -= 1
        if not in_flight:
            idle.set()

def begin_drain():
    global draining
    draining = True
    say("draining")

listener = bound_socket("127.0.0.1", 0)
server = Server(
    server_config(
        app,
        host="127.0.0.1",
        port=listener.getsockname()[1],
        protocol=timed_protocol(header_seconds=60, send_seconds=60, refuse=lambda *_: None),
        log_config={
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
            "root": {"handlers": ["out"], "level": "INFO"},
        },
    ),
    begin_drain=begin_drain,
    drained=idle.wait,
    hangup=lambda: say("hangup"),
    drain_seconds=float(sys.argv[1]),
)
server.run(sockets=[listener])
"""


class Child:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.process, self.output = process, process.stdout
        self.port = int(self.wait_for("serving on http").split(":")[-1].split()[0])

    def wait_for(self, text: str) -> str:
        for line in self.output:
            if text in line:
                return line
        raise AssertionError(f"it ended before it said {text!r}")

    def connect(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def request(self, path: str) -> socket.socket:
        return self.connect(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def child(*, drain_seconds: float) -> Iterator[Child]:
    command = [sys.executable, "-c", CHILD, str(drain_seconds)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


def everything(connection: socket.socket) -> bytes:
    with connection:
        received = bytearray()
        while data := connection.recv(2**20):
            received += data
        return bytes(received)


def test_a_drain_answers_what_is_in_flight_refuses_what_is_new_and_waits_for_nobody_else():
    with child(drain_seconds=30) as server:
        held = server.request("/hold")
        server.wait_for("holding")
        late_headers = server.connect(b"GET / HTTP/1.1\r\n")
        late_body = server.connect(b"POST /body HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n")
        server.wait_for("reading")
        server.stop()
        server.wait_for("draining")
        time.sleep(0.5)  # a server that did not wait would not listen any more
        assert everything(server.request("/")).startswith(b"HTTP/1.1 503 ")
        assert server.process.poll() is None
        assert everything(server.request("/release")).startswith(b"HTTP/1.1 503 ")
        assert everything(held).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(20) == 0
        for connection in (late_headers, late_body):
            connection.close()
        server.wait_for("shut down")


def test_a_drain_waits_until_the_client_has_its_whole_answer():
    with child(drain_seconds=30) as server:
        large = server.request("/large")
        server.wait_for("answered /large")
        server.stop()
        server.wait_for("draining")
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(2)
        assert len(everything(large)) > 30_000_000
        assert server.process.wait(20) == 0


def test_a_drain_ends_when_its_time_is_over():
    with child(drain_seconds=0.3) as server:
        held = server.request("/hold")
        server.wait_for("holding")
        server.stop(signal.SIGINT)
        server.wait_for("draining")
        server.wait_for("stopping with requests unanswered after 0.3 seconds")
        assert server.process.wait(20) == 0
        held.close()


def test_a_second_signal_ends_a_drain():
    with child(drain_seconds=1000) as server:
        held = server.request("/hold")
        server.wait_for("holding")
        server.stop()
        server.wait_for("draining")
        server.stop()
        assert server.process.wait(20) == 0
        held.close()


def test_sighup_calls_hangup_and_stops_nothing():
    with child(drain_seconds=30) as server:
        for _ in range(2):
            server.stop(signal.SIGHUP)
            server.wait_for("hangup")
        assert everything(server.request("/")).startswith(b"HTTP/1.1 200 ")
        server.stop()
        assert server.process.wait(20) == 0


def test_bound_socket_names_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
            bound_socket("127.0.0.1", port)
