"""The service's answers: what it scores, how it says so, and that it is what the library says."""

import base64
import io
import json
import threading
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from models.checkpoint import Checkpoint
from models.errors import CheckpointError, ImageUnreadableError
from models.images import decode_image, image_tensor
from models.overlay import overlay
from models.scoring import Scores, regions, resize_map
from service import answers
from service.app import create_app
from service.schemas import ScoreAnswer
from service.settings import Settings
from tests.conftest import png

ALPHA = 0.5  # ten of the nineteen calibration images of the fixture


def library_scores(checkpoint: Checkpoint, data: bytes) -> Scores:
    config = checkpoint.config
    pixels = image_tensor(decode_image(data), channels=config.channels, size=config.image_size)
    return checkpoint.scorer(torch.device("cpu")).score(pixels[None])


def upload(client: TestClient, *images: bytes, query: str = "") -> httpx2.Response:
    files = [("files", (f"{index}.png", data)) for index, data in enumerate(images)]
    return client.post(f"/score?{query}", files=files)


def results(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    ScoreAnswer.model_validate_json(response.content)
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def map_bytes(result: dict[str, Any]) -> bytes:
    return base64.b64decode(result["map"]["data"])


@pytest.mark.parametrize("raw", [False, True], ids=["multipart", "raw"])
def test_score_equals_the_library(client, checkpoint, raw):
    data = png(size=(50, 37), seed=3)
    if raw:
        response = client.post("/score", content=data, headers={"Content-Type": "image/png"})
    else:
        response = upload(client, data)
    (result,) = results(response)
    expected = library_scores(checkpoint, data)
    assert result["scores"] == pytest.approx(expected.named(0), abs=1e-4)
    assert result["anomaly_score"] == pytest.approx(expected.anomaly_score[0], abs=1e-4)
    assert result["p_value"] == expected.p_value[0]
    assert (result["width"], result["height"]) == (50, 37)
    assert result["filename"] == (None if raw else "0.png")
    assert result["error"] is None
    assert result["map"] is None


def test_score_names_the_model_and_the_level_behind_it(client, checkpoint):
    model = upload(client, png(), query=f"model=nut&alpha={ALPHA}").json()["model"]
    assert model == {
        "name": "nut",
        "version": 1,
        "sha256": client.get("/models/nut").json()["sha256"],
        "alpha": ALPHA,
        "map_level": checkpoint.calibration.map_level(ALPHA),
        "calibration_images": 19,
        "smallest_alpha": 0.05,
    }


def test_score_keeps_the_order_of_the_upload_over_several_batches(client, checkpoint):
    images = [png(seed=seed) for seed in range(20)]
    found = results(upload(client, *images))
    assert [result["filename"] for result in found] == [f"{index}.png" for index in range(20)]
    for result, data in zip(found, images, strict=True):
        assert result["scores"] == pytest.approx(library_scores(checkpoint, data).named(0), abs=1e-4)


def test_score_of_a_large_map_says_the_same_off_the_loop(client, monkeypatch):
    at_once = results(upload(client, png(), png(seed=1)))
    monkeypatch.setattr(answers, "QUICK_PIXELS", 0)
    threads: list[str] = []
    write = answers._result_json

    def watched(*arguments: Any, **options: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return write(*arguments, **options)

    monkeypatch.setattr(answers, "_result_json", watched)
    assert results(upload(client, png(), png(seed=1))) == at_once
    assert len(threads) == 2
    assert all(name.startswith("asyncio") for name in threads), threads


def test_score_of_a_bad_image_leaves_its_neighbours_alone(client):
    alone = results(upload(client, png(seed=1)))[0]
    first, bad, last = results(upload(client, png(seed=1), b"no image", png(seed=2)))
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-4)
    assert (first["p_value"], first["width"], first["filename"]) == (alone["p_value"], 40, "0.png")
    assert last["error"] is None
    assert last["scores"] is not None
    assert bad["error"]["code"] == "image_format"
    assert bad["filename"] == "1.png"
    assert {key for key, value in bad.items() if value is not None} == {"filename", "error"}


def test_score_of_bad_images_alone_has_an_error_each(client):
    found = results(upload(client, b"", b"no image"))
    assert [result["error"]["code"] for result in found] == ["image_empty", "image_format"]


def test_score_alpha_decides_the_verdict(client, checkpoint):
    expected = library_scores(checkpoint, png())
    p_value = expected.p_value[0]
    assert 0.05 < p_value < 0.9, "the fixture's image no longer lies between two levels"
    strict, lenient = (results(upload(client, png(), query=f"alpha={alpha}"))[0] for alpha in (0.05, p_value))
    assert strict["p_value"] == lenient["p_value"] == p_value
    assert strict["is_anomalous"] is False
    assert lenient["is_anomalous"] is True


def test_score_default_alpha_is_the_checkpoints(checkpoint):
    p_value = float(library_scores(checkpoint, png()).p_value[0])
    calibration = replace(checkpoint.calibration, alpha=p_value)
    with TestClient(create_app(Settings(), checkpoint=replace(checkpoint, calibration=calibration))) as client:
        response = upload(client, png())
    assert response.json()["model"]["alpha"] == p_value
    assert results(response)[0]["is_anomalous"] is True


def test_score_regions_are_boxes_of_the_original_image(client, checkpoint):
    data = png(size=(40, 30))
    (result,) = results(upload(client, data, query="alpha=0.95"))
    level = checkpoint.calibration.map_level(0.95)
    boxes = regions(library_scores(checkpoint, data).maps[0], level=level, width=40, height=30)
    assert boxes, "the fixture's map no longer exceeds the level"
    found = [tuple(box[key] for key in ("left", "top", "width", "height")) for box in result["regions"]]
    assert found == [(box.left, box.top, box.width, box.height) for box in boxes]
    assert [box["peak"] for box in result["regions"]] == pytest.approx([box.peak for box in boxes], abs=1e-4)


def test_map_float32_is_the_resized_map(client, checkpoint):
    data = png(size=(50, 37))
    (result,) = results(upload(client, data, query="map=float32"))
    expected = resize_map(library_scores(checkpoint, data).maps[0], width=50, height=37)
    values = np.frombuffer(map_bytes(result), dtype="<f4").reshape(37, 50)
    np.testing.assert_array_equal(values, expected)
    assert {key: result["map"][key] for key in ("format", "width", "height")} == {
        "format": "float32",
        "width": 50,
        "height": 37,
    }


def test_map_png_reaches_white_at_twice_the_level(client, checkpoint):
    data = png(size=(50, 37))
    (result,) = results(upload(client, data, query=f"map=png&alpha={ALPHA}"))
    picture = Image.open(io.BytesIO(map_bytes(result)))
    assert (picture.mode, picture.size) == ("L", (50, 37))
    expected = resize_map(library_scores(checkpoint, data).maps[0], width=50, height=37)
    level = checkpoint.calibration.map_level(ALPHA)
    np.testing.assert_allclose(np.asarray(picture), np.minimum(expected / (2 * level) * 255, 255), atol=0.51)


def test_map_overlay_is_the_librarys_picture(client, checkpoint):
    data = png(size=(40, 30))
    (result,) = results(upload(client, data, query="map=overlay&alpha=0.95"))
    picture = Image.open(io.BytesIO(map_bytes(result)))
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    small = library_scores(checkpoint, data).maps[0]
    level = checkpoint.calibration.map_level(0.95)
    boxes = regions(small, level=level, width=40, height=30)
    assert boxes, "the fixture's map no longer exceeds the level"
    large = resize_map(small, width=40, height=30)
    expected = overlay(decode_image(data), large, level=level, regions=boxes)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize("map_format", ["png", "overlay", "float32"])
def test_map_of_a_large_image_is_reduced(client, map_format):
    data = png(size=(4096, 20))
    (result,) = results(upload(client, data, query=f"map={map_format}"))
    assert (result["width"], result["height"]) == (4096, 20)
    assert (result["map"]["width"], result["map"]["height"]) == (2048, 10)
    if map_format == "float32":
        assert len(map_bytes(result)) == 2048 * 10 * 4
    else:
        assert Image.open(io.BytesIO(map_bytes(result))).size == (2048, 10)


def test_maps_of_several_images_are_streamed_in_order(client):
    sizes = [(20, 30), (30, 20), (25, 25)]
    images = [png(size=size) for size in sizes]
    response = upload(client, *images[:2], b"no image", images[2], query="map=overlay")
    assert "Content-Length" not in response.headers
    found = results(response)
    assert found[2]["error"]["code"] == "image_format"
    maps = [result["map"] for result in found if result["map"]]
    assert [(each["width"], each["height"]) for each in maps] == sizes
    assert [Image.open(io.BytesIO(map_bytes(found[index]))).size for index in (0, 1, 3)] == sizes


def test_an_image_that_cannot_be_drawn_leaves_its_neighbours_alone(client, monkeypatch):
    decoder = client.app.state.service.running.decoder
    drawn = decoder.picture

    async def drawn_or_not(data: bytes, **size: int) -> Image.Image:
        if data == png(seed=1):
            raise ImageUnreadableError("decoding the image makes the decoder crash.")
        picture: Image.Image = await drawn(data, **size)
        return picture

    monkeypatch.setattr(decoder, "picture", drawn_or_not)
    first, bad, last = results(upload(client, *(png(seed=seed) for seed in range(3)), query="map=overlay"))
    assert first["map"]["format"] == last["map"]["format"] == "overlay"
    assert bad["error"]["code"] == "image_unreadable"
    assert {key for key, value in bad.items() if value is not None} == {"filename", "error"}
    alone = upload(client, png(seed=1), query="map=overlay")
    assert (alone.status_code, alone.json()["error"]["code"]) == (422, "image_unreadable")


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def palette_with_transparency() -> bytes:
    image = Image.open(io.BytesIO(png())).quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=3)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        saved(Image.open(io.BytesIO(png())).convert("CMYK"), "JPEG"),
        palette_with_transparency(),
        png(size=(1, 1)),
        saved(Image.open(io.BytesIO(png())), "WEBP"),
    ],
    ids=["16-bit gray", "CMYK JPEG", "palette with transparency", "one pixel", "WebP"],
)
def test_score_takes_every_kind_of_image(client, checkpoint, data):
    (result,) = results(upload(client, data, query="map=overlay"))
    assert result["scores"] == pytest.approx(library_scores(checkpoint, data).named(0), abs=1e-4)


def echoed_name(client: TestClient, disposition: bytes, *, content_type: str) -> str | None:
    body = b"--b\r\nContent-Disposition: form-data; name=files; " + disposition + b"\r\n\r\n" + png() + b"\r\n--b--\r\n"
    (result,) = results(client.post("/score", content=body, headers={"Content-Type": content_type}))
    assert result["scores"] is not None
    name = result["filename"]
    assert name is None or isinstance(name, str)
    return name


def test_filename_is_echoed_safely(client):
    plain = "multipart/form-data; boundary=b"
    unicode = "Mutter\u202fN\u00fc\u00df\U0001f330.png"
    assert echoed_name(client, f'filename="{unicode}"'.encode(), content_type=plain) == unicode
    assert echoed_name(client, 'filename="a\x1b[31m\u2028.png"'.encode(), content_type=plain) == "a\ufffd[31m\ufffd.png"
    assert echoed_name(client, b'filename="' + b"x" * 3000 + b'"', content_type=plain) == "x" * 255
    assert echoed_name(client, b'filename=""', content_type=plain) == ""
    # A charset that decodes to half of a surrogate pair, which no JSON can hold.
    escapes = plain + "; charset=unicode_escape"
    assert echoed_name(client, b"filename=a\\ud800.png", content_type=escapes) == "a\ufffd.png"


def test_filename_with_line_ends_stays_one_json_string(client):
    response = client.post("/score", files=[("files", ("a\r\nX-Evil: 1.png", png()))])
    (result,) = results(response)
    assert "\r" not in result["filename"]
    assert "\n" not in result["filename"]
    assert "x-evil" not in response.headers


def test_models_lists_what_is_served(client, checkpoint):
    (model,) = client.get("/models").json()["models"]
    details = client.get("/models/nut").json()
    assert model == {key: details[key] for key in model}
    assert details["alpha"] == 0.05
    assert details["calibration_images"] == 19
    assert details["smallest_alpha"] == 0.05
    assert details["map_level"] == checkpoint.calibration.map_level(0.05)
    assert details["good_scores"] == checkpoint.calibration.good_scores.tolist()
    assert details["device"] == "cpu"
    assert details["config"]["image_size"] == 32
    assert details["origin"] == checkpoint.origin
    assert details["metrics"] == {}
    assert len(details["sha256"]) == 64


def test_health(client):
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_request_id_is_kept_where_it_is_harmless(client):
    assert client.get("/health/live", headers={"X-Request-ID": "line-7.A_1"}).headers["X-Request-ID"] == "line-7.A_1"
    for odd in ("", "a b", "x" * 65, "\u00b2".encode("latin-1"), "a\tb"):
        made = client.get("/health/live", headers={"X-Request-ID": odd}).headers["X-Request-ID"]
        assert len(made) == 16
        assert int(made, 16) >= 0


def test_openapi_describes_the_upload_and_the_answer(client):
    document = client.get("/openapi.json").json()
    score = document["paths"]["/score"]["post"]
    assert set(score["requestBody"]["content"]) == {
        "multipart/form-data", "image/png", "image/jpeg", "image/webp", "image/bmp", "image/tiff",
    }  # fmt: skip
    assert score["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/ScoreAnswer")
    assert {parameter["name"] for parameter in score["parameters"]} == {"model", "map", "alpha"}
    schemas = document["components"]["schemas"]
    assert "2048" in json.dumps(schemas["MapImage"])
    assert "2 x map_level" in json.dumps(schemas["MapImage"])
    undocumented = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, about in schema.get("properties", {}).items()
        if not {"description", "$ref", "const", "enum", "anyOf"} & set(about)
    ]
    assert undocumented == []


def test_start_fails_on_a_changed_checkpoint(folder):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with (
        pytest.raises(CheckpointError, match="the file was changed"),
        TestClient(create_app(Settings(checkpoint=folder))),
    ):
        pass


def test_start_fails_on_an_unknown_format(folder):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"), TestClient(create_app(Settings(checkpoint=folder))):
        pass


def test_start_fails_on_a_model_without_a_name(checkpoint):
    nameless = replace(checkpoint, origin={})
    with pytest.raises(CheckpointError, match="name None"), TestClient(create_app(Settings(), checkpoint=nameless)):
        pass


def test_start_fails_on_scores_that_are_not_finite(checkpoint):
    with torch.no_grad():
        next(checkpoint.networks.decoder.parameters()).fill_(float("nan"))
    with (
        pytest.raises(CheckpointError, match="not a finite"),
        TestClient(create_app(Settings(), checkpoint=checkpoint)),
    ):
        pass


@pytest.mark.gpu
def test_score_on_the_gpu_equals_the_library_on_the_cpu(folder, checkpoint):
    images = [png(seed=seed) for seed in range(3)]
    with TestClient(create_app(Settings(checkpoint=folder, device="cuda"))) as client:
        assert client.get("/models/nut").json()["device"].startswith("cuda")
        found = results(upload(client, *images))
    for result, data in zip(found, images, strict=True):
        assert result["scores"] == pytest.approx(library_scores(checkpoint, data).named(0), abs=1e-4)
