"""Every way in which a request fails: each error code by a real request, all in one shape."""

import asyncio
import io
import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from models import errors as model_errors
from models.checkpoint import Checkpoint
from service.app import create_app
from service.draining import Drain
from service.errors import ERRORS
from service.middleware import RequestMiddleware
from service.settings import Settings
from service.telemetry import Telemetry
from tests.conftest import png

MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}
MAX_BODY_BYTES = 200_000


@pytest.fixture
def client(checkpoint: Checkpoint) -> Iterator[TestClient]:
    settings = Settings(device="cpu", max_body_bytes=MAX_BODY_BYTES)
    with TestClient(create_app(settings, checkpoint=checkpoint)) as client:
        yield client


def assert_error(response: httpx2.Response, status: int, code: str) -> str:
    """Check the one shape of an error; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "request_id"}
    assert body["error"]["code"] == code
    assert body["error"]["request_id"] == response.headers["X-Request-ID"]
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb() -> bytes:
    """A valid header that promises 400 million pixels."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(20001))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, *, frames: int = 1) -> bytes:
    file = io.BytesIO()
    if frames == 1:
        image.save(file, kind)
    else:
        others = [Image.new("RGB", image.size, (index, 0, 0)) for index in range(1, frames)]
        image.save(file, kind, save_all=True, append_images=others)
    return file.getvalue()


def flipped() -> bytes:
    data = bytearray(png())
    data[len(data) // 2] ^= 1
    return bytes(data)


FLOAT_IMAGE = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
IMAGES = {
    "image_empty": b"",
    "image_format": b"part number 7, in words",
    "image_truncated": saved(Image.open(io.BytesIO(png())), "JPEG")[:-300],
    "image_corrupt": flipped(),
    "image_animated": saved(Image.new("RGB", (8, 8)), "PNG", frames=3),
    "image_mode": saved(FLOAT_IMAGE, "TIFF"),
    "image_too_large": bomb(),
}


@pytest.mark.parametrize("code", IMAGES)
def test_image_that_cannot_be_read_fails_a_request_of_one(client, code):
    status = ERRORS[code].status
    assert_error(client.post("/score", files=[("files", ("part.png", IMAGES[code]))]), status, code)
    raw = client.post("/score", content=IMAGES[code], headers={"Content-Type": "image/png"})
    assert_error(raw, status, code)


@pytest.mark.parametrize("code", IMAGES)
def test_image_that_cannot_be_read_is_a_result_among_several(client, code):
    response = client.post("/score", files=[("files", ("good.png", png())), ("files", ("bad.png", IMAGES[code]))])
    assert response.status_code == 200
    good, bad = response.json()["results"]
    assert good["error"] is None
    assert bad["error"]["code"] == code


def test_every_image_error_of_the_library_has_a_status():
    classes = [each for each in vars(model_errors).values() if isinstance(each, type)]
    codes = {each.code for each in classes if issubclass(each, model_errors.ImageError)} - {"image"}
    assert codes == set(IMAGES) | {"image_failed", "image_unreadable"}  # which no bytes of a client make
    assert codes <= set(ERRORS)


def part(disposition: str, content: str = "x") -> str:
    return f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{content}\r\n"


FILE = part('name="files"; filename="a.png"')


@dataclass(frozen=True)
class Case:
    code: str
    method: str = "POST"
    path: str = "/score"
    headers: dict[str, str] = field(default_factory=lambda: dict(MULTIPART))
    body: str = FILE + "--b--\r\n"
    says: str = ""


CASES = {
    "no boundary": Case("malformed_request", headers={"Content-Type": "multipart/form-data"}, says="boundary"),
    "empty form": Case("malformed_request", body=""),
    "not a form": Case("malformed_request", body="\x89PNG"),
    "other boundary": Case("malformed_request", body=FILE.replace("--b", "--c") + "--c--"),
    "no end": Case("malformed_request", body=FILE, says="closing boundary"),
    "cut within a file": Case("malformed_request", body=FILE + FILE[:-4], says="closing boundary"),
    "no name": Case("malformed_request", body=part('filename="a.png"') + "--b--\r\n"),
    "long name": Case("malformed_request", body=part(f'name="files"; filename="{"x" * 9000}"') + "--b--\r\n"),
    "odd charset": Case(
        "malformed_request", headers={"Content-Type": MULTIPART["Content-Type"] + "; charset=undefined"}
    ),
    "no part": Case("no_files", body="--b--\r\n"),
    "field of another name": Case(
        "unknown_field", body=part('name="image"; filename="a.png"') + "--b--\r\n", says="image"
    ),
    "second field": Case("unknown_field", body=FILE + part('name="note"') + "--b--\r\n", says="note"),
    "text": Case("not_a_file", body=part('name="files"') + "--b--\r\n"),
    "no path": Case("not_found", path="/scores", says="'/scores'"),
    "slash": Case("not_found", path="/score/"),
    "host": Case("not_found", path="/x", headers={"Host": "["}),
    "model": Case("model_unknown", path="/score?model=bolt", says="'bolt': allowed are nut"),
    "no model": Case("model_unknown", method="GET", path="/models/bolt", says="'bolt'"),
    "long model": Case("invalid_parameter", method="GET", path="/models/" + "x" * 256, says="255"),
    "get": Case("method_not_allowed", method="GET", says="allowed are POST"),
    "odd method": Case("method_not_allowed", method="BREW", path="/health/live", says="'BREW'"),
    "json": Case("unsupported_media_type", headers={"Content-Type": "application/json"}, says="'application/json'"),
    "curl": Case("unsupported_media_type", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    "no type": Case("unsupported_media_type", headers={}),
    "map": Case("invalid_parameter", path="/score?map=jpg", says="'map' is 'jpg': input should be 'none', 'png'"),
    "alpha": Case("invalid_parameter", path="/score?alpha=low", says="'alpha' is 'low'"),
    "parameter": Case("invalid_parameter", path="/score?apha=0.1", says="'apha': allowed are model, map, alpha"),
    "long value": Case("invalid_parameter", path="/score?map=" + "x" * 500, says="x..."),
    "small alpha": Case("alpha_out_of_range", path="/score?alpha=0.01", says="19 calibration images allow 0.05"),
    "alpha of one": Case("alpha_out_of_range", path="/score?alpha=1"),
    "alpha that is no number": Case("alpha_out_of_range", path="/score?alpha=nan"),
    "body": Case("body_too_large", body="x" * (MAX_BODY_BYTES + 1), says=str(MAX_BODY_BYTES)),
    "body for no one": Case("body_too_large", path="/nowhere", body="x" * (MAX_BODY_BYTES + 1)),
    "parts": Case("too_many_files", body=FILE * 65 + "--b--\r\n", says="64"),
}


@pytest.mark.parametrize("name", CASES)
def test_request_is_refused(client, name):
    case = CASES[name]
    response = client.request(case.method, case.path, content=case.body.encode("latin-1"), headers=case.headers)
    message = assert_error(response, ERRORS[case.code].status, case.code)
    assert case.says in message


def test_method_not_allowed_names_the_allowed_ones(client):
    assert client.get("/score").headers["Allow"] == "POST"


def test_as_many_files_as_allowed_are_scored(client):
    response = client.post("/score", files=[("files", ("a.png", png(size=(4, 4))))] * 64)
    assert response.status_code == 200
    assert len(response.json()["results"]) == 64


@pytest.mark.parametrize("content_type", ["image/png", MULTIPART["Content-Type"]])
def test_body_without_a_length_is_cut_off(client, content_type):
    def endless() -> Iterator[bytes]:
        yield FILE.encode()
        for _ in range(MAX_BODY_BYTES // 1000):
            yield bytes(1000)

    response = client.post("/score", content=endless(), headers={"Content-Type": content_type})
    assert_error(response, 413, "body_too_large")


def test_body_of_just_the_limit_is_read(checkpoint):
    data = png()
    with TestClient(create_app(Settings(max_body_bytes=len(data)), checkpoint=checkpoint)) as client:
        assert client.post("/score", content=data, headers={"Content-Type": "image/png"}).status_code == 200
        longer = client.post("/score", content=data + b"x", headers={"Content-Type": "image/png"})
        assert_error(longer, 413, "body_too_large")


def test_pixel_limit_is_the_settings(checkpoint):
    with TestClient(create_app(Settings(max_pixels=100), checkpoint=checkpoint)) as client:
        send = [client.post("/score", files=[("files", ("a.png", png(size=size)))]) for size in ((10, 10), (101, 1))]
    assert send[0].status_code == 200
    assert_error(send[1], 413, "image_too_large")


def test_busy_when_too_many_images_wait(checkpoint):
    app = create_app(Settings(max_files=2, max_waiting=2), checkpoint=checkpoint)
    two = [("files", ("a.png", png()))] * 2
    with TestClient(app) as client:
        batcher = app.state.service.running.batcher
        with batcher.places(1, 10):
            assert client.post("/score", files=two[:1]).status_code == 200
            response = client.post("/score", files=two)
            message = assert_error(response, 503, "busy")
        assert "1 of 2 places for waiting images are taken: 2 more do not fit" in message
        assert int(response.headers["Retry-After"]) >= 1
        # What waited is forgotten, whether it was scored or failed.
        assert client.post("/score", files=[("files", ("a.png", b""))]).status_code == 422
        assert client.post("/score", files=two).status_code == 200


def test_internal_error_is_logged_with_its_request_id(checkpoint, caplog):
    app = create_app(Settings(), checkpoint=checkpoint)
    with TestClient(app) as client:
        app.state.service.running.batcher.close()  # the device's thread is gone
        with caplog.at_level(logging.ERROR, logger="hazelnut"):
            response = client.post("/score", files=[("files", ("a.png", png()))], headers={"X-Request-ID": "seven"})
    message = assert_error(response, 500, "internal")
    assert "closed" not in message, "the fault's own words are for the log"
    assert "request seven failed" in caplog.text
    assert "Traceback" in caplog.text


def test_not_ready_before_the_start_and_after_the_end(checkpoint):
    app = create_app(Settings(), checkpoint=checkpoint)
    before = TestClient(app)
    assert before.get("/health/live").status_code == 200
    assert "starting" in assert_error(before.get("/health/ready"), 503, "not_ready")
    response = before.post("/score", files=[("files", ("a.png", png()))])
    assert_error(response, 503, "not_ready")
    assert response.headers["Retry-After"]
    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 200
    after = TestClient(app).get("/health/ready")
    assert "stopping" in assert_error(after, 503, "not_ready")
    assert after.headers["Connection"] == "close"


def test_every_code_is_provoked_here():
    elsewhere = {
        "image_failed", "receive_timeout", "deadline",  # test_service_clients.py
        "image_unreadable",  # test_service_decoding.py
        "model_required", "model_unavailable",  # test_service_registry.py
        "unauthorized",  # test_service_security.py
    }  # fmt: skip
    provoked = {case.code for case in CASES.values()} | set(IMAGES) | {"internal", "busy", "not_ready"} | elsewhere
    assert provoked == set(ERRORS)


def test_every_code_of_a_route_is_in_the_openapi_document(client):
    document = json.dumps(client.get("/openapi.json").json())
    assert "HTTPValidationError" not in document
    for code in set(ERRORS) - {"not_found", "method_not_allowed"}:
        assert f"`{code}`" in document


SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/score",
    "raw_path": b"/score",
    "root_path": "",
    "query_string": b"",
    "headers": [(b"content-type", b"image/png")],
    "client": ("test", 1),
    "server": ("test", 80),
}


def test_client_that_leaves_during_its_upload_is_no_error(client, caplog):
    sent = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    with caplog.at_level(logging.INFO):
        client.portal.call(client.app, {**SCOPE, "state": {}}, receive, send)
    assert sent == []
    assert [record.message for record in caplog.records if record.name == "hazelnut"] == ["request"]
    assert 'route="/score",status_class="none"} 1.0' in client.get("/metrics").text


def test_half_an_answer_is_never_ended_as_a_whole_one():
    async def breaks_off(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"model":', "more_body": True})
        raise RuntimeError("the second map cannot be drawn")

    sent = []

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    telemetry = Telemetry()
    with pytest.raises(RuntimeError, match="second map"):
        asyncio.run(RequestMiddleware(breaks_off, telemetry, Drain())({**SCOPE}, receive, send))
    assert sent == ["http.response.start", "http.response.body"]
    counted = telemetry.exposition("")[0].decode()
    assert 'route="/score",status_class="5xx"} 1.0' in counted
    assert 'route="/score",status_class="2xx"} 1.0' not in counted
