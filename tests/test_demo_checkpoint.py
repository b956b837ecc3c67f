"""The checkpoint that ships: small, honest about itself, and good on parts that it has never seen."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hazelnut import app
from models.checkpoint import load_checkpoint
from service.settings import DEFAULT_CHECKPOINT
from training.config import load_recipe
from training.demo import KINDS, write_demo
from training.evaluation import evaluate_folder


def test_the_shipped_checkpoint_is_small_and_names_what_made_it():
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    assert sum(file.stat().st_size for file in DEFAULT_CHECKPOINT.iterdir()) < 4_000_000
    assert checkpoint.origin["command"] == "hazelnut demo --no-serve"
    assert checkpoint.config == load_recipe("tiny", []).model_config()
    assert checkpoint.origin["recipe"]["steps"] == load_recipe("tiny", []).steps
    assert checkpoint.metrics["command"] == checkpoint.origin["command"]
    assert checkpoint.metrics["image"]["auroc"]["value"] >= 0.98
    assert checkpoint.metrics["pixel"]["aupro_0.3"]["value"] >= 0.90


def test_the_shipped_checkpoint_finds_defects_on_parts_that_it_has_never_seen(tmp_path):
    """Another seed draws other parts and other defects."""
    write_demo(tmp_path / "gears", seed=12345, training=1, good=24, per_kind=6)
    scorer = load_checkpoint(DEFAULT_CHECKPOINT).scorer(torch.device("cpu"))
    report = evaluate_folder(scorer, tmp_path / "gears", alpha=None, command="", console=Console(quiet=True))
    assert report["image"]["auroc"]["value"] >= 0.98
    assert report["pixel"]["aupro_0.3"]["value"] >= 0.90
    assert set(report["defects"]) == set(KINDS)
    alarms = report["false_alarms"]
    assert alarms["promised_low"] <= alarms["rate"] <= alarms["promised_high"]


@pytest.fixture
def _short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own way, with fewer parts and steps."""
    from training import demo_run

    small = load_recipe("tiny", ["steps=4", "alpha=0.2"])
    monkeypatch.setattr(demo_run, "load_recipe", lambda *_: small)
    monkeypatch.setattr(
        demo_run, "write_demo", lambda folder, *, seed: write_demo(folder, seed=seed, training=12, good=3, per_kind=1)
    )


@pytest.mark.usefixtures("_short_demo")
def test_the_demo_draws_trains_evaluates_and_writes_overlays(tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", f"--out={out}", "--no-serve", "--device=cpu"])
    assert result.exit_code == 0, result.output
    assert "image AUROC" in result.stdout
    overlays = sorted(str(path.relative_to(out / "overlays")) for path in (out / "overlays").rglob("*.png"))
    assert overlays == sorted([*(f"{kind}/000.png" for kind in KINDS), *(f"good/{index:03}.png" for index in range(3))])
    checkpoint = load_checkpoint(out / "run/checkpoint")
    assert checkpoint.origin["name"] == "gears"
    assert checkpoint.metrics["images"] == {"good": 3, "anomalous": 4}
    assert "details" not in checkpoint.metrics  # of each image: in evaluation.json alone
    assert len(json.loads((out / "run/evaluation.json").read_text())["details"]["images"]) == 7
    assert len(list((out / "run/evaluation").iterdir())) == 7

    again = CliRunner().invoke(app, ["demo", f"--out={out}", "--no-serve", "--device=cpu"])
    assert again.exit_code == 0, again.output
    assert load_checkpoint(out / "run/checkpoint").weights_sha256 == checkpoint.weights_sha256


@pytest.mark.usefixtures("_short_demo")
def test_a_demo_that_was_stopped_while_it_drew_draws_its_parts_again(tmp_path):
    half_drawn = tmp_path / "demo/.gears.new/train/good/000.png"
    half_drawn.parent.mkdir(parents=True)
    half_drawn.write_bytes(b"")
    result = CliRunner().invoke(app, ["demo", f"--out={tmp_path / 'demo'}", "--no-serve", "--device=cpu"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "demo/gears/train/good").iterdir())) == 12
    assert not half_drawn.parents[2].exists()
