"""The whole path with real processes: train, score from the command line, serve, POST, and the numbers agree."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

from models.checkpoint import load_checkpoint
from models.images import decode_image, image_tensor

HAZELNUT = [sys.executable, "-m", "hazelnut"]
SETTINGS = ["image_size=32", "width=8", "latent_dim=4", "batch_size=4", "alpha=0.2", "steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "nuts"
    random = np.random.default_rng(0)
    for name in [*(f"train/good/{index:02}.png" for index in range(12)), "test/good/0.png", "test/crack/0.jpg"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(100, 156, (24, 36, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture(scope="module", params=["tiny", "features"])
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Over pixels, and over the features of a backbone, whose weights are random here."""
    out = tmp_path_factory.mktemp("runs") / "nuts"
    changes = [f"--set={change}" for change in SETTINGS]
    command = [*HAZELNUT, "train", str(data), f"--recipe={request.param}", *changes, f"--out={out}"]
    if request.param == "features":
        torch.save(get_model("resnet18", weights=None).state_dict(), out.parent / "backbone.pth")
        command += ["--set=features=resnet18", f"--backbone-weights={out.parent / 'backbone.pth'}"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout == f"checkpoint: {out / 'checkpoint'}\n"
    return out / "checkpoint"


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[httpx2.Client]:
    command = [*HAZELNUT, "serve", f"--checkpoint={checkpoint}", "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = None
        for line in process.stderr:
            if address := re.search(r"serving on (http://127\.0\.0\.1:\d+)", line):
                break
        assert address is not None, "the service ended before it listened"
        with httpx2.Client(base_url=address[1]) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        # To its very end the log is one JSON object a line.
        for line in process.stderr:
            assert json.loads(line)["timestamp"]
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_scores_agree_over_http_from_the_command_line_and_in_the_library(data, checkpoint, service):
    paths = [data / "test/good/0.png", data / "test/crack/0.jpg"]
    result = subprocess.run(
        [*HAZELNUT, "score", str(checkpoint), *map(str, paths), "--csv"], check=True, capture_output=True, text=True
    )
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    scorer = load_checkpoint(checkpoint).scorer(torch.device("cpu"))
    pixels = [image_tensor(decode_image(path.read_bytes()), channels=3, size=32) for path in paths]
    scores = scorer.score(torch.stack(pixels))

    answer = service.post("/score", files=[("files", (path.name, path.read_bytes())) for path in paths])
    assert answer.status_code == 200
    for index, (path, row, result) in enumerate(zip(paths, rows, answer.json()["results"], strict=True)):
        assert row["file"] == str(path)
        assert result["filename"] == path.name
        for name, value in scores.named(index).items():
            assert result["scores"][name] == pytest.approx(value, abs=1e-4)
            assert float(row[name]) == pytest.approx(value, abs=1e-4)
        assert result["anomaly_score"] == pytest.approx(float(row["anomaly_score"]), abs=1e-4)
        assert result["p_value"] == float(row["p_value"]) == scores.p_value[index]
        raw = service.post("/score", content=path.read_bytes(), headers={"Content-Type": "image/png"})
        assert raw.json()["results"][0]["scores"] == pytest.approx(result["scores"], abs=1e-4)


@pytest.mark.parametrize("checkpoint", ["tiny"], indirect=True, scope="module")
def test_the_service_is_ready_and_names_its_model(checkpoint, service):
    assert service.get("/health/ready").status_code == 200
    (model,) = service.get("/models").json()["models"]
    assert model["name"] == "nuts"
    assert model["sha256"] == load_checkpoint(checkpoint).weights_sha256
    assert "hazelnut_requests_total" in service.get("/metrics").text


@pytest.mark.parametrize("checkpoint", ["tiny"], indirect=True, scope="module")
def test_evaluation_writes_its_report_beside_the_checkpoint(data, checkpoint):
    result = subprocess.run(
        [*HAZELNUT, "evaluate", str(checkpoint), str(data)], check=True, capture_output=True, text=True
    )
    report = json.loads((checkpoint.parent / "evaluation.json").read_text())
    assert report["images"] == {"good": 1, "anomalous": 1}
    assert f"{report['image']['auroc']['value']:.3f}" in result.stdout


def test_help_waits_for_no_torch():
    code = """
import sys
import hazelnut
try:
    hazelnut.app(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Find defects in images of parts" in result.stdout
