"""What a user gets for bad input: the same file through the command line and over HTTP, word for word."""

import csv
import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hazelnut import app
from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import CheckpointError
from service.app import create_app
from service.settings import Settings
from tests.conftest import largest_file, png

RUNNER = CliRunner()


def encoded(image: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def photo() -> Image.Image:
    return Image.open(io.BytesIO(png()))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb() -> bytes:
    """20000 x 20000 gray pixels, all black: 400 MB from 400 KB, every checksum right."""
    packer = zlib.compressobj(9)
    row = bytes(20001)
    content = b"".join(packer.compress(row) for _ in range(20000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def palette_with_transparency() -> bytes:
    image = photo().convert("RGB").quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=3)
    return file.getvalue()


@dataclass(frozen=True)
class Refusal:
    file: str
    data: bytes
    status: int
    code: str
    message: str


REFUSALS = [
    Refusal("empty.png", b"", 422, "image_empty", "the file is empty."),
    Refusal(
        "text.png",
        b"This is not an image.",
        415,
        "image_format",
        "the file is not a PNG, JPEG, WebP, BMP or TIFF image.",
    ),
    Refusal(
        "truncated.jpg",
        encoded(photo(), "JPEG")[:-200],
        422,
        "image_truncated",
        "the JPEG ends before its image does.",
    ),
    Refusal(
        "flipped.png",
        flipped(png()),
        422,
        "image_corrupt",
        "the PNG is corrupt: chunk b'IDAT' does not match its checksum.",
    ),
    Refusal(
        "bomb.png",
        png_bomb(),
        413,
        "image_too_large",
        "the image has 20000 x 20000 pixels: allowed are 50000000 in all.",
    ),
]

ACCEPTED = {
    "sixteen.png": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
    "cmyk.jpg": encoded(photo().convert("CMYK"), "JPEG"),
    "palette.png": palette_with_transparency(),
}


def score_rows(folder: Path, *files: Path) -> tuple[int, list[dict[str, str]]]:
    result = RUNNER.invoke(app, ["score", str(folder), *map(str, files), "--csv"])
    return result.exit_code, list(csv.DictReader(io.StringIO(result.stdout)))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.file)
def test_a_bad_image_is_refused_by_the_command_line_and_over_http(refusal, folder, client, tmp_path):
    bad, good = tmp_path / refusal.file, tmp_path / "good.png"
    bad.write_bytes(refusal.data)
    good.write_bytes(png())

    exit_code, (bad_row, good_row) = score_rows(folder, bad, good)
    assert exit_code == 1
    assert bad_row["error"] == f"{refusal.code}: {refusal.message}"
    assert bad_row["anomaly_score"] == ""
    assert good_row["error"] == ""
    assert float(good_row["p_value"]) > 0

    alone = client.post("/score", content=refusal.data, headers={"Content-Type": "image/png"})
    assert alone.status_code == refusal.status
    assert alone.json()["error"]["code"] == refusal.code
    assert alone.json()["error"]["message"] == refusal.message

    files = [("files", (refusal.file, refusal.data)), ("files", ("good.png", png()))]
    together = client.post("/score", files=files)
    assert together.status_code == 200
    first, second = together.json()["results"]
    assert first["error"] == {"code": refusal.code, "message": refusal.message}
    assert second["anomaly_score"] == pytest.approx(float(good_row["anomaly_score"]), abs=1e-4)


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_unusual_image_is_scored_alike_by_the_command_line_and_over_http(name, folder, client, tmp_path):
    path = tmp_path / name
    path.write_bytes(ACCEPTED[name])
    exit_code, (row,) = score_rows(folder, path)
    assert exit_code == 0
    (result,) = client.post("/score", files={"files": path.read_bytes()}).json()["results"]
    for score, value in result["scores"].items():
        assert float(row[score]) == pytest.approx(value, abs=1e-4)
    assert row["is_anomalous"] == str(result["is_anomalous"]).lower()


def refused(*arguments: str) -> str:
    """What the command line says, in one sentence and with exit code 1."""
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    return result.stderr.replace("\n", " ").strip()


def write_folder(root: Path, layout: dict[str, bytes]) -> Path:
    for name, data in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_an_empty_folder_is_refused(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"no images in {empty}" in refused("train", str(empty), f"--out={tmp_path / 'run'}")
    assert f"no images in {empty}" in refused("score", str(folder), str(empty))
    assert f"no images in {empty}" in refused("evaluate", str(folder), str(empty))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_no_good_images_is_refused(tmp_path):
    data = write_folder(tmp_path / "nuts", {"train/bad/0.png": png(), "test/crack/0.png": png()})
    message = refused("train", str(data), f"--out={tmp_path / 'run'}")
    assert message == f"hazelnut: no good images in {data}: training needs them in train/good."


def test_a_folder_that_does_not_exist_is_refused(folder, tmp_path):
    missing = tmp_path / "missing"
    assert refused("train", str(missing)) == f"hazelnut: {missing} is not a folder."
    assert refused("evaluate", str(folder), str(missing)) == f"hazelnut: {missing} is not a folder."


def test_a_folder_with_a_bad_training_image_is_refused_by_the_files_name(tmp_path):
    images = {f"{index}.png": png(seed=index) for index in range(12)} | {"bad.png": flipped(png())}
    data = write_folder(tmp_path / "nuts", images)
    message = refused("train", str(data), "--recipe=tiny", "--set=alpha=0.2", f"--out={tmp_path / 'run'}")
    assert f"{data / 'bad.png'}: the PNG is corrupt" in message
    assert not (tmp_path / "run").exists()


def test_a_mask_of_another_size_is_refused(folder, tmp_path):
    layout = {
        "test/good/0.png": png(),
        "test/crack/0.png": png(seed=1),
        "ground_truth/crack/0_mask.png": encoded(Image.new("L", (20, 30)), "PNG"),
    }
    data = write_folder(tmp_path / "nuts", layout)
    message = refused("evaluate", str(folder), str(data))
    assert f"{data / 'ground_truth/crack/0_mask.png'} is 20 x 30 pixels" in message
    assert f"{data / 'test/crack/0.png'} is 40 x 30" in message


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_a_checkpoint_with_one_changed_byte_is_refused_by_every_verb(file, folder, tmp_path):
    path = folder / file
    path.write_bytes(flipped(path.read_bytes()))
    (tmp_path / "nut.png").write_bytes(png())
    for arguments in (["score", str(folder), str(tmp_path / "nut.png")], ["serve", "--checkpoint", str(folder)]):
        message = refused(*arguments, *(["--port=0"] if arguments[0] == "serve" else []))
        assert str(path) in message
        assert "was changed" in message or "is not JSON" in message
    with pytest.raises(CheckpointError, match=file), TestClient(create_app(Settings(checkpoint=folder))):
        pass


def test_an_unknown_format_version_is_refused_by_every_verb(folder, tmp_path):
    path = folder / "model.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": 99}))
    (tmp_path / "nut.png").write_bytes(png())
    for arguments in (
        ["score", str(folder), str(tmp_path / "nut.png")],
        ["serve", f"--checkpoint={folder}", "--port=0"],
    ):
        assert refused(*arguments) == f"hazelnut: {path} has format 99: this Hazelnut reads format 4."


def test_an_alpha_that_the_calibration_cannot_resolve_is_refused(folder, client, tmp_path):
    (tmp_path / "nut.png").write_bytes(png())
    expected = "alpha is 0.001: 19 calibration images allow 0.05 up to, but not including, 1."
    assert refused("score", str(folder), str(tmp_path / "nut.png"), "--alpha=0.001") == f"hazelnut: {expected}"
    answer = client.post("/score", params={"alpha": 0.001}, files={"files": png()})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == expected


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(folder, checkpoint):
    """See also test_run.py, where a training run meets it."""
    before = load_checkpoint(folder).weights_sha256
    with largest_file(1000), pytest.raises(CheckpointError, match="cannot save the checkpoint"):
        save_checkpoint(folder, checkpoint)
    assert load_checkpoint(folder).weights_sha256 == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
