"""What a client is told, and the operator, where an image is refused before the framework sees its request."""

import asyncio
import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service import refusing
from service.app import create_app
from service.refusing import Refusals
from service.settings import Settings

MEANT = (b"POST", b"/score", [(b"x-request-id", b"seven")])


@pytest.fixture
def app(checkpoint):
    """One that runs, with two places."""
    app = create_app(Settings(max_files=2, max_waiting=2), checkpoint=checkpoint)
    with TestClient(app):
        yield app


def refusals(app: FastAPI) -> Refusals:
    return Refusals("/score", app.state.service.refusal, app.state.service.telemetry)


def answer(refusals: Refusals, request: Any) -> Any:
    """Its headers, as a dict, and its body; None where nothing is refused."""

    async def ask() -> bytes | None:
        return refusals.answer(*request)

    given = asyncio.run(ask())
    if given is None:
        return None
    head, _, body = given.partition(b"\r\n\r\n")
    return dict(line.split(": ") for line in head.decode().split("\r\n")), json.loads(body)


def test_a_refusal_is_an_answer_like_those_of_the_framework(app):
    with app.state.service.running.batcher.places(2, 10):
        headers, body = answer(refusals(app), MEANT)
        by_framework = TestClient(app).post("/score", content=b"x", headers={"Content-Type": "image/png"})
    error = by_framework.json()["error"]
    assert body == {"error": {**error, "request_id": "seven"}}
    assert error["message"] == "2 of 2 places for waiting images are taken: 1 more do not fit."
    assert headers == {
        "Content-Type": "application/json",
        "Content-Length": str(len(json.dumps(body, separators=(",", ":")))),
        "X-Request-ID": "seven",
        "Retry-After": by_framework.headers["Retry-After"],
    }


@pytest.mark.parametrize("given", [b"", b"a b", b"x\r\nSet-Cookie: a", "\xe4".encode("latin-1"), b"x" * 65])
def test_a_request_id_that_is_none_is_replaced(app, given):
    with app.state.service.running.batcher.places(2, 10):
        headers, body = answer(refusals(app), (b"POST", b"/score", [(b"x-request-id", given)]))
    assert headers["X-Request-ID"] == body["error"]["request_id"]
    assert refusing.REQUEST_ID.fullmatch(headers["X-Request-ID"])
    assert len(headers) == 4


@pytest.mark.parametrize("target", [b"/score", b"/score?map=png", b"/score?"])
def test_nothing_is_refused_while_there_is_a_place(app, target):
    request: tuple[bytes, bytes, list[Any]] = (b"POST", target, [])
    with app.state.service.running.batcher.places(1, 10):
        assert answer(refusals(app), request) is None
    with app.state.service.running.batcher.places(2, 10):
        assert answer(refusals(app), request) is not None


@pytest.mark.parametrize(
    "request_line", [(b"GET", b"/score"), (b"POST", b"/scores"), (b"GET", b"/health/live"), (b"POST", b"/")]
)
def test_only_images_are_refused(app, request_line):
    with app.state.service.running.batcher.places(2, 10):
        assert answer(refusals(app), (*request_line, [])) is None


def test_nothing_is_refused_as_busy_before_the_service_runs(checkpoint):
    assert answer(refusals(create_app(Settings(), checkpoint=checkpoint)), MEANT) is None


def test_a_service_that_stops_says_so_and_not_that_it_is_busy(app):
    with app.state.service.running.batcher.places(2, 10):
        app.state.service.drain.begin()
        assert answer(refusals(app), MEANT) is None
        response = TestClient(app).post("/score", content=b"x", headers={"Content-Type": "image/png"})
    assert response.json()["error"]["code"] == "not_ready"
    assert response.headers["Connection"] == "close"


def test_each_refusal_is_counted_and_many_have_one_line(app, caplog, monkeypatch):
    monkeypatch.setattr(refusing, "LOG_SECONDS", 0.02)
    counting = refusals(app)

    async def overload() -> None:
        for _ in range(5):
            counting.answer(*MEANT)
        await asyncio.sleep(0.1)
        counting.answer(*MEANT)
        await asyncio.sleep(0.1)
        counting.answer(*MEANT)  # the loop ends before this one's line

    with app.state.service.running.batcher.places(2, 10), caplog.at_level(logging.WARNING, logger="hazelnut"):
        asyncio.run(overload())
        counting.log()
        counting.log()
    lines = [record for record in caplog.records if record.message == "refused as busy"]
    assert [(line.requests, line.within_seconds, line.levelname) for line in lines] == [
        (5, 0.02, "WARNING"),
        (1, 0.02, "WARNING"),
        (1, 0.02, "WARNING"),
    ]
    text = app.state.service.telemetry.exposition("")[0].decode()
    counted = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels in ({"route": "/score"}, {"route": "/score", "method": "POST", "status_class": "5xx"})
    }
    assert counted["hazelnut_requests_refused_total"] == 7
    assert counted["hazelnut_requests_total"] == 7
    assert counted["hazelnut_requests_failed_total"] == counted["hazelnut_request_seconds_count"] == 0
