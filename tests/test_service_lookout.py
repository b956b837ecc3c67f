"""The shape of Lookout for Vision: its clients get what they expect, errors included."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from models.checkpoint import Checkpoint
from models.scoring import resize_map
from service.app import create_app
from service.errors import ServiceError
from service.lookout import confidence
from service.settings import Settings
from tests.conftest import png
from tests.test_service_app import library_scores

PATH = "/2020-11-20/projects/nut/models/1/detect"


@pytest.fixture
def lenient(checkpoint: Checkpoint) -> Checkpoint:
    """Its map exceeds the level on the images of the tests."""
    return replace(checkpoint, calibration=replace(checkpoint.calibration, alpha=0.95))


@pytest.fixture
def client(lenient: Checkpoint) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(device="cpu", max_body_bytes=50_000), checkpoint=lenient)) as client:
        yield client


def detect(client: TestClient, data: bytes, *, path: str = PATH, kind: str = "image/png") -> httpx2.Response:
    return client.post(path, content=data, headers={"Content-Type": kind})


def result_of(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"DetectAnomalyResult"}
    found: dict[str, Any] = response.json()["DetectAnomalyResult"]
    assert set(found) == {"Source", "IsAnomalous", "Confidence", "Anomalies", "AnomalyMask"}
    return found


def test_detect_says_what_score_says(client):
    data = png(size=(50, 37))
    found = result_of(detect(client, data))
    score = client.post("/score", content=data, headers={"Content-Type": "image/png"}).json()["results"][0]
    assert found["IsAnomalous"] == score["is_anomalous"]
    assert found["Confidence"] == pytest.approx(confidence(score["p_value"], 0.95))
    assert found["Source"] == {"Type": "direct"}


def test_detect_masks_where_the_map_is_above_its_level(client, lenient):
    data = png(size=(50, 37))
    found = result_of(detect(client, data))
    anomaly_map = resize_map(library_scores(lenient, data).maps[0], width=50, height=37)
    above = anomaly_map > lenient.calibration.map_level(0.95)
    assert 0 < above.mean() < 1
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["AnomalyMask"]))))
    assert mask.shape == (37, 50, 3)
    background, anomaly = found["Anomalies"]
    assert (background["Name"], anomaly["Name"]) == ("background", "anomaly")
    for each, where in ((background, ~above), (anomaly, above)):
        colour = bytes.fromhex(each["PixelAnomaly"]["Color"].removeprefix("#"))
        np.testing.assert_array_equal((mask == list(colour)).all(axis=2), where)
        assert each["PixelAnomaly"]["TotalPercentageArea"] == pytest.approx(where.mean())


def test_detect_of_a_part_without_an_anomaly_has_the_background_alone(checkpoint):
    with TestClient(create_app(Settings(device="cpu"), checkpoint=checkpoint)) as client:
        found = result_of(detect(client, png()))
    assert found["IsAnomalous"] is False
    assert [each["Name"] for each in found["Anomalies"]] == ["background"]
    assert found["Anomalies"][0]["PixelAnomaly"]["TotalPercentageArea"] == 1


@pytest.mark.parametrize(
    ("data", "path", "kind", "status", "name"),
    [
        (png(), PATH.replace("nut", "bolt"), "image/png", 404, "ResourceNotFoundException"),
        (png(), PATH.replace("/1/", "/2/"), "image/png", 404, "ResourceNotFoundException"),
        (b"no image", PATH, "image/png", 400, "ValidationException"),
        (b"", PATH, "image/jpeg", 400, "ValidationException"),
        (png(), PATH, "text/plain", 400, "ValidationException"),
        (bytes(50_001), PATH, "image/png", 400, "ValidationException"),
    ],
    ids=["project", "version", "no image", "empty", "type", "too large"],
)
def test_detect_errors_have_names_that_its_clients_know(client, data, path, kind, status, name):
    def body() -> Iterator[bytes]:
        yield data  # without a Content-Length, by which a large one would be refused earlier

    response = client.post(path, content=body(), headers={"Content-Type": kind})
    assert response.status_code == status
    assert response.headers["x-amzn-ErrorType"] == name
    assert response.json()["Message"].endswith(".")


def test_detect_is_throttled_when_busy(client):
    with client.app.state.service.running.batcher.places(64, 10):
        response = detect(client, png())
    assert response.status_code == 429
    assert response.headers["x-amzn-ErrorType"] == "ThrottlingException"
    assert int(response.headers["Retry-After"]) >= 1


def test_detect_fails_where_the_model_cannot_be_read(client, monkeypatch):
    async def unreadable(_: str) -> None:
        raise ServiceError("model_unavailable", "the disk is gone.")

    monkeypatch.setattr(client.app.state.service.registry, "get", unreadable)
    response = detect(client, png())
    assert response.status_code == 500
    assert response.headers["x-amzn-ErrorType"] == "InternalServerException"
    assert response.json() == {"Message": "the disk is gone.", "Code": "model_unavailable"}


def test_confidence_is_a_half_at_alpha_and_grows_on_both_sides():
    assert confidence(0.05, 0.05) == pytest.approx(0.5)
    assert confidence(1.0, 0.05) == pytest.approx(1)
    values = [confidence(p, 0.05) for p in (0.05, 0.04, 0.02, 0.001)]
    assert values == sorted(values)
    assert values[-1] > 0.98
    values = [confidence(p, 0.05) for p in (0.051, 0.3, 0.7, 1.0)]
    assert values == sorted(values)
