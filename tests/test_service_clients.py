"""Clients that are slow, that leave, and that wait for too long: what they cost, and what they are told."""

import asyncio
import io
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Message
from torch import Tensor

from models.checkpoint import Checkpoint
from service.app import create_app
from service.device import Batch, DeviceScorer
from service.settings import Settings
from tests.conftest import png, until

DATA = png()
FAILED = "scoring the image failed; the service's log has the traceback."


class Device:
    """Holds every batch back while the gate is closed, and fails on a black image if it is told to. Keeps how many
    images each batch had."""

    def __init__(self) -> None:
        self.fails_on_black = False
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device, begin = Device(), DeviceScorer.begin

    def gated(self: DeviceScorer, pixels: Tensor) -> Batch:
        device.batches.append(len(pixels))
        assert device.gate.wait(30)
        if device.fails_on_black and not pixels.flatten(1).any(dim=1).all():
            raise RuntimeError("a black image")
        return begin(self, pixels)

    monkeypatch.setattr(DeviceScorer, "begin", gated)
    yield device
    device.gate.set()


class Client:
    """One request with a raw image, from which the test sends and receives piece by piece."""

    def __init__(self, app: FastAPI) -> None:
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.received: list[Message] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/score",
            "raw_path": b"/score",
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        self.received.append(message)

    def send(self, data: bytes, *, more: bool = False) -> None:
        self._inbox.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def answer(self) -> tuple[int, dict[bytes, bytes], dict[str, Any]]:
        await asyncio.wait_for(self.task, 20)
        start, *bodies = self.received
        body = b"".join(message["body"] for message in bodies)
        return start["status"], dict(start["headers"]), json.loads(body)


def run(checkpoint: Checkpoint, test: Callable[[FastAPI], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def whole() -> None:
        app = create_app(Settings(device="cpu", **settings), checkpoint=checkpoint)
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(test(app), 30)

    asyncio.run(whole())


def waiting(app: FastAPI) -> float:
    value = app.state.service.telemetry.registry.get_sample_value("hazelnut_images_waiting")
    return value or 0.0


def test_an_image_whose_client_leaves_gives_its_place_back_and_is_never_scored(checkpoint, device):
    async def test(app: FastAPI) -> None:
        device.gate.clear()
        device.batches.clear()
        first = Client(app)
        first.send(DATA)
        await until(lambda: device.batches == [1])
        leaving = [Client(app) for _ in range(5)]
        for client in leaving:
            client.send(DATA)
        await until(lambda: waiting(app) == 6)
        for client in leaving:
            client.leave()
        await until(lambda: waiting(app) == 1)
        await asyncio.gather(*(client.task for client in leaving))
        assert all(client.received == [] for client in leaving)
        device.gate.set()
        status, _, _ = await first.answer()
        assert status == 200
        later = Client(app)
        later.send(DATA)
        assert (await later.answer())[0] == 200
        assert device.batches == [1, 1]

    run(checkpoint, test)


def test_an_image_that_is_not_scored_in_time_is_given_up(checkpoint, device):
    async def test(app: FastAPI) -> None:
        device.gate.clear()
        client = Client(app)
        client.send(DATA)
        status, _, answer = await client.answer()
        assert (status, answer["error"]["code"]) == (504, "deadline")
        assert "not scored within 0.3 seconds" in answer["error"]["message"]
        assert waiting(app) == 0
        device.gate.set()
        later = Client(app)
        later.send(DATA)
        assert (await later.answer())[0] == 200

    run(checkpoint, test, answer_seconds=0.3)


def test_a_request_that_arrives_too_slowly_is_refused(checkpoint):
    async def test(app: FastAPI) -> None:
        client = Client(app)
        client.send(DATA[:100], more=True)
        status, headers, answer = await client.answer()
        assert (status, answer["error"]["code"]) == (408, "receive_timeout")
        assert "did not arrive within 0.3 seconds" in answer["error"]["message"]
        assert headers[b"connection"] == b"close"
        assert waiting(app) == 0

    run(checkpoint, test, receive_seconds=0.3)


def test_a_request_that_arrives_in_pieces_and_in_time_is_answered(checkpoint):
    async def test(app: FastAPI) -> None:
        client = Client(app)
        for start in range(0, len(DATA), 50):
            client.send(DATA[start : start + 50], more=True)
            await asyncio.sleep(0)
        client.send(b"")
        status, _, answer = await client.answer()
        assert (status, answer["results"][0]["error"]) == (200, None)

    run(checkpoint, test)


def test_a_drain_finishes_what_was_admitted_and_refuses_the_rest(checkpoint, device):
    async def test(app: FastAPI) -> None:
        drain = app.state.service.drain
        device.gate.clear()
        admitted, slow = Client(app), Client(app)
        admitted.send(DATA)
        slow.send(DATA[:100], more=True)
        await until(lambda: waiting(app) == 1)
        await asyncio.sleep(0.01)
        drain.begin()
        finished = asyncio.ensure_future(drain.finished())
        for refused in (slow, late := Client(app)):
            if refused is late:
                late.send(DATA)
            status, headers, answer = await refused.answer()
            assert (status, answer["error"]["code"]) == (503, "not_ready")
            assert int(headers[b"retry-after"]) >= 1
            assert headers[b"connection"] == b"close"
        await asyncio.sleep(0.05)
        assert not finished.done()
        device.gate.set()
        status, _, answer = await admitted.answer()
        assert (status, answer["results"][0]["error"]) == (200, None)
        await asyncio.wait_for(finished, 20)

    run(checkpoint, test)


def test_a_drain_with_nothing_to_finish_is_over_at_once(checkpoint):
    async def test(app: FastAPI) -> None:
        drain = app.state.service.drain
        assert not drain.begun
        drain.begin()
        await asyncio.wait_for(drain.finished(), 20)

    run(checkpoint, test)


def test_a_client_that_leaves_in_the_middle_of_its_upload_costs_nothing(checkpoint, device):
    async def test(app: FastAPI) -> None:
        device.batches.clear()
        client = Client(app)
        client.send(DATA[:100], more=True)
        await asyncio.sleep(0.01)
        client.leave()
        await asyncio.wait_for(client.task, 20)
        assert client.received == []
        assert (waiting(app), device.batches) == (0, [])

    run(checkpoint, test)


def test_an_image_that_cannot_be_scored_fails_alone(checkpoint, device):
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    images = [DATA, file.getvalue(), png(seed=1)]
    with TestClient(create_app(Settings(device="cpu"), checkpoint=checkpoint)) as client:
        device.fails_on_black = True
        response = client.post("/score", files=[("files", ("a.png", data)) for data in images])
        assert response.status_code == 200
        first, black, last = response.json()["results"]
        assert black["error"] == {"code": "image_failed", "message": FAILED}
        assert first["error"] is last["error"] is None
        assert first["p_value"] > 0 < last["p_value"]
        alone = client.post("/score", content=images[1], headers={"Content-Type": "image/png"})
        assert (alone.status_code, alone.json()["error"]["code"]) == (500, "image_failed")
        text = client.get("/metrics").text
    assert 'hazelnut_image_errors_total{reason="image_failed"} 2.0' in text
