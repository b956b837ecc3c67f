"""What /metrics says, and that clients cannot make it grow."""

import random
import resource
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.app import create_app
from service.device_worker import memory_of
from service.errors import ServiceError
from service.settings import Settings
from tests.conftest import png

PAGE = resource.getpagesize()
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(client: TestClient) -> Series:
    response = client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(series: Series, name: str, labels: str = "") -> float:
    """labels: as Prometheus writes them, without quotes: "route=/score,method=POST"."""
    pairs = (pair.partition("=") for pair in labels.split(",") if pair)
    return series[(name, frozenset((key, text) for key, _, text in pairs))]


def test_metrics_count_images_and_requests(client):
    before = scrape(client)
    assert value(before, "hazelnut_images_total", "model=nut,verdict=normal") == 0
    files = [("files", ("a.png", png())), ("files", ("b.png", b"no image")), ("files", ("c.png", png(seed=1)))]
    assert client.post("/score?alpha=0.99", files=files).status_code == 200
    assert client.post("/score?alpha=0.05", files=files[:1]).status_code == 200
    assert client.post("/score", files=files[1:2]).status_code == 415
    after = scrape(client)
    assert value(after, "hazelnut_images_total", "model=nut,verdict=anomalous") == 2
    assert value(after, "hazelnut_images_total", "model=nut,verdict=normal") == 1
    assert value(after, "hazelnut_image_errors_total", "reason=image_format") == 2
    assert value(after, "hazelnut_image_errors_total", "reason=image_empty") == 0
    assert value(after, "hazelnut_requests_total", "route=/score,method=POST,status_class=2xx") == 2
    assert value(after, "hazelnut_requests_total", "route=/score,method=POST,status_class=4xx") == 1
    assert value(after, "hazelnut_request_seconds_count", "route=/score") == 3
    assert value(after, "hazelnut_anomaly_score_count", "model=nut") == 3
    assert value(after, "hazelnut_p_value_count", "model=nut") == 3
    assert value(after, "hazelnut_stage_seconds_count", "stage=decode") == 5
    assert value(after, "hazelnut_stage_seconds_count", "stage=encode") == 3
    batches = value(after, "hazelnut_stage_seconds_count", "stage=device")
    assert 2 <= batches <= 3  # two images of one request share a batch if both are decoded in time
    assert value(after, "hazelnut_batch_images_count") == batches
    assert value(after, "hazelnut_batch_images_sum") == 3
    assert value(after, "hazelnut_stage_seconds_count", "stage=queue") == 3
    assert value(after, "hazelnut_stage_seconds_count", "stage=receive") == 3
    assert value(after, "hazelnut_images_waiting") == 0


def test_metrics_route_is_a_template(client):
    assert client.get("/models/nut").status_code == 200
    assert client.get("/models/bolt").status_code == 404
    assert client.get("/docs").status_code == 200
    series = scrape(client)
    labels = "route=/models/{name},method=GET,status_class="
    assert value(series, "hazelnut_requests_total", labels + "2xx") == 1
    assert value(series, "hazelnut_requests_total", labels + "4xx") == 1
    assert value(series, "hazelnut_requests_total", "route=/docs,method=GET,status_class=2xx") == 1


def test_metrics_do_not_grow_with_what_clients_send(client):
    def send(name: str) -> None:
        client.get("/" + name)
        client.get("/models/" + name)
        client.get("/docs/" + name)
        client.post("/score?model=" + name)
        client.request(name.upper(), "/health/live")
        client.post("/score", files=[("files", (name, b"no image"))], headers={"X-Request-ID": name})

    send("first")
    scrape(client)  # the first scrape adds the series of its own route
    before = set(scrape(client))
    source = random.Random(0)
    for _ in range(200):
        send("".join(source.choices("abcdefghij", k=12)))
    after = scrape(client)
    assert set(after) == before
    assert value(after, "hazelnut_requests_total", "route=unmatched,method=GET,status_class=4xx") == 402
    assert value(after, "hazelnut_requests_total", "route=/health/live,method=other,status_class=4xx") == 201
    assert len(after) < 500


def test_metrics_count_waiting_images(client):
    batcher = client.app.state.service.running.batcher
    with batcher.places(3, 10), batcher.places(4, 10):
        assert value(scrape(client), "hazelnut_images_waiting") == 7
    assert value(scrape(client), "hazelnut_images_waiting") == 0
    assert value(scrape(client), "hazelnut_images_waiting_limit") == Settings().max_waiting


def test_metrics_count_failures_and_refusals_apart(client, monkeypatch):
    service = client.app.state.service
    lookout = "/2020-11-20/projects/nut/models/1/detect"
    counted = "hazelnut_requests_failed_total", "hazelnut_requests_refused_total"

    def send(path: str) -> object:
        return client.post(path, content=png(), headers={"Content-Type": "image/png"}).status_code

    def counts(route: str) -> list[float]:
        return [value(scrape(client), name, f"route={route}") for name in counted]

    assert value(scrape(client), "hazelnut_requests_total", "route=/score,method=POST,status_class=5xx") == 0
    assert counts("/score") == [0, 0]
    with service.running.batcher.places(Settings().max_waiting, 10):
        assert (send("/score"), send(lookout)) == (503, 429)
    assert counts("/score") == counts("/2020-11-20/projects/{project}/models/{version}/detect") == [0, 1]
    assert client.post("/score", content=b"", headers={"Content-Type": "image/png"}).status_code == 422

    async def unreadable(_: str | None) -> None:
        raise ServiceError("model_unavailable", "the disk is gone")  # a 503, and yet no refusal

    monkeypatch.setattr(service.registry, "get", unreadable)
    assert (send("/score"), send(lookout)) == (503, 500)
    assert counts("/score") == counts("/2020-11-20/projects/{project}/models/{version}/detect") == [1, 1]


def test_the_seconds_of_requests_are_those_of_the_ones_that_were_not_refused(client):
    def sent() -> float:
        client.post("/score", content=png(), headers={"Content-Type": "image/png"})
        return value(scrape(client), "hazelnut_request_seconds_count", "route=/score")

    with client.app.state.service.running.batcher.places(Settings().max_waiting, 10):
        assert sent() == 0
    assert sent() == 1


def test_metrics_say_what_is_running(client):
    (labels,) = (dict(labels) for name, labels in scrape(client) if name == "hazelnut_build_info")
    assert labels["device"] == "cpu"
    assert set(labels) == {"version", "torch", "device"}


def test_metrics_say_how_many_images_a_models_calibration_has(client, checkpoint):
    assert value(scrape(client), "hazelnut_calibration_images", "model=nut") == checkpoint.calibration.n == 19


def test_metrics_say_how_much_memory_the_process_that_scores_has_and_may_have(client):
    device = client.app.state.service.running.device
    assert client.post("/score", files=[("files", ("a.png", png()))]).status_code == 200
    pages = int(Path(f"/proc/{device.pid}/statm").read_text().split()[1])
    assert value(scrape(client), "hazelnut_device_memory_bytes") == pytest.approx(pages * PAGE, rel=0.05)
    assert value(scrape(client), "hazelnut_device_memory_limit_bytes") == memory_of(torch.device("cpu"))[1]


def test_metrics_have_help_and_a_prefix(client):
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    assert all(family.documentation for family in families)
    names = {family.name for family in families}
    assert {name for name in names if not name.startswith("hazelnut_")} >= {"process_resident_memory_bytes"}
    assert all(name.startswith(("hazelnut_", "process_")) for name in names)
    assert not any(name.endswith("_created") for name in names)


def test_metrics_come_as_openmetrics_where_asked(client):
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_metrics_of_two_apps_in_one_process_are_apart(client, checkpoint):
    with TestClient(create_app(Settings(device="cpu"), checkpoint=checkpoint)) as other:
        assert other.post("/score", files=[("files", ("a.png", png()))]).status_code == 200
        label = "model=nut,verdict=normal"
        total = [value(scrape(each), "hazelnut_images_total", label) for each in (client, other)]
    assert total == [0, 1]
