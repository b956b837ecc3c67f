"""A run's folder: what it holds, and that no kill and no full disk loses more than the steps since the last state."""

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.models import get_model

from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, DataError, TrainingDivergedError, TrainingError
from tests.conftest import largest_file
from training.config import Recipe, load_recipe
from training.run import read_run, train_folder

TINY = ["image_size=32", "width=8", "latent_dim=4", "batch_size=4", "alpha=0.2", "steps=12", "save_every=4"]
QUIET = Console(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "nuts"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(16):
        pixels = random.integers(100, 156, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("tiny", TINY)


def run(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    backbone_weights: Path | None = None,
    console: Console = QUIET,
) -> Path:
    return train_folder(
        data,
        out,
        recipe=recipe,
        resume=resume,
        device=torch.device("cpu"),
        command="hazelnut train",
        console=console,
        backbone_weights=backbone_weights,
    )


def command_line(data: Path, out: Path, *, steps: int) -> list[str]:
    settings = [f"--set={change}" for change in [*TINY, f"steps={steps}"]]
    return [sys.executable, "-m", "hazelnut", "train", str(data), "--recipe=tiny", *settings, f"--out={out}"]


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def test_a_run_leaves_its_checkpoint_its_log_and_its_state(data, tmp_path, recipe):
    checkpoint = load_checkpoint(run(data, tmp_path / "run", recipe))
    assert checkpoint.config == recipe.model_config()
    assert checkpoint.origin["name"] == "nuts"
    assert checkpoint.origin["recipe"]["steps"] == 12
    assert checkpoint.origin["training_images"] + checkpoint.calibration.n == 16
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 12]
    assert lines[0]["images_per_second"] > 0
    assert {"reconstruction", "latent_discriminator", "image_adversarial"} <= set(lines[0])


def test_training_says_what_the_product_chose(data, tmp_path, recipe):
    output = io.StringIO()
    checkpoint = load_checkpoint(run(data, tmp_path / "run", recipe, console=Console(file=output, width=200)))
    weights = checkpoint.fusion.weights
    by_place = weights[len(weights) // 2 :].sum() / weights.sum()
    of_map = checkpoint.calibration.weights[2] / sum(checkpoint.calibration.weights)
    text = output.getvalue()
    assert f"{by_place:.0%} of the map compares by place" in text
    assert f"anomaly_map {of_map:.0%}" in text


def test_tensorboard_shows_the_losses_that_the_log_holds(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("reconstruction")]
    assert shown == [(line["step"], pytest.approx(line["reconstruction"])) for line in lines]


def test_a_run_killed_and_resumed_equals_one_that_was_not(data, tmp_path):
    """SIGKILL at whatever step the process happens to be."""
    killed, steps = tmp_path / "killed", 60
    recipe = load_recipe("tiny", [*TINY, f"steps={steps}"])
    whole = run(data, tmp_path / "whole", recipe)
    process = subprocess.Popen(
        command_line(data, killed, steps=steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait_for_the_first_state(killed / "state.pt", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = run(data, killed, recipe, resume=True)
    assert weights(resumed) == weights(whole)
    origin = load_checkpoint(resumed).origin
    assert origin == {**load_checkpoint(whole).origin, "command": origin["command"]}
    logged = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(10, steps + 1, 10))


def _wait_for_the_first_state(path: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "training ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("left_behind", [[], [".run.json.new"]])
def test_a_run_killed_before_its_first_state_is_resumed_from_the_start(data, tmp_path, recipe, left_behind):
    whole = run(data, tmp_path / "whole", recipe)
    out = tmp_path / "run"
    out.mkdir()
    for name in left_behind:
        (out / name).write_text("{")
    assert weights(run(data, out, recipe, resume=True)) == weights(whole)


def test_a_finished_run_resumed_writes_the_same_checkpoint(data, tmp_path, recipe):
    checkpoint = run(data, tmp_path / "run", recipe)
    before = weights(checkpoint)
    shutil.rmtree(checkpoint)
    assert weights(run(data, tmp_path / "run", recipe, resume=True)) == before


def test_a_torn_log_line_is_written_again_on_resume(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    log = tmp_path / "run/log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 12, "images_pe')
    run(data, tmp_path / "run", recipe, resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 12]


def test_a_folder_with_a_run_is_refused_without_resume(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    with pytest.raises(TrainingError, match="holds a run already: --resume"):
        run(data, tmp_path / "run", recipe)


def test_a_folder_of_something_else_is_refused_and_kept(data, recipe):
    with pytest.raises(TrainingError, match="is not a run"):
        run(data, data, recipe)
    assert len(list(data.iterdir())) == 16


def test_resuming_with_another_recipe_is_refused_by_key(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    with pytest.raises(TrainingError, match=r"another recipe \(steps differ\)"):
        run(data, tmp_path / "run", load_recipe("tiny", [*TINY, "steps=13"]), resume=True)


def test_a_run_that_cannot_go_on_is_refused_before_any_image_is_read(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    for path in data.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(TrainingError, match="holds a run already"):
        run(data, tmp_path / "run", recipe)
    with pytest.raises(TrainingError, match=r"another recipe \(seed differ\)"):
        run(data, tmp_path / "run", load_recipe("tiny", [*TINY, "seed=1"]), resume=True)


def test_a_run_among_the_good_images_is_refused_and_nothing_is_written(data, recipe):
    with pytest.raises(TrainingError, match=r"runs/nuts lies in .*nuts, .*: --out names a folder outside"):
        run(data, data / "runs/nuts", recipe)
    assert len(list(data.iterdir())) == 16


def test_resuming_on_other_images_is_refused(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    for path in sorted(data.iterdir())[:8]:
        path.unlink()
    with pytest.raises(TrainingError, match="other images"):
        run(data, tmp_path / "run", recipe, resume=True)


def test_a_state_that_cannot_be_read_is_named(data, tmp_path, recipe):
    run(data, tmp_path / "run", recipe)
    (tmp_path / "run/state.pt").write_bytes(b"not a state")
    with pytest.raises(TrainingError, match=r"state\.pt cannot be read"):
        run(data, tmp_path / "run", recipe, resume=True)


def test_a_run_record_that_is_not_one_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match="does not describe a run"):
        read_run(tmp_path)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A file of weights, random ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def run_over_features(data: Path, out: Path, weights: Path | None, *, resume: bool = False) -> Path:
    changes = ["image_size=32", "features=resnet18", "width=8", "head_width=8", "latent_dim=4", "batch_size=4"]
    recipe = load_recipe("features", [*changes, "alpha=0.2", "steps=2", "save_every=1"])
    return run(data, out, recipe, resume=resume, backbone_weights=weights)


def test_a_run_over_features_resumes_without_the_file_of_weights(data, tmp_path, backbone):
    checkpoint = run_over_features(data, tmp_path / "run", backbone)
    written = weights(checkpoint)
    kept = read_run(tmp_path / "run")
    assert kept is not None
    assert kept.backbone is not None
    assert kept.backbone == load_checkpoint(checkpoint).origin["backbone"]
    assert kept.backbone["sha256"] == hashlib.sha256(backbone.read_bytes()).hexdigest()
    backbone.unlink()
    assert weights(run_over_features(data, tmp_path / "run", None, resume=True)) == written


def test_resuming_over_another_backbone_is_refused(data, tmp_path, backbone):
    run_over_features(data, tmp_path / "run", backbone)
    torch.save(get_model("resnet18", weights=None).state_dict(), backbone)
    with pytest.raises(TrainingError, match="has a backbone with other weights"):
        run_over_features(data, tmp_path / "run", backbone, resume=True)


def test_weights_of_a_backbone_that_is_not_used_are_refused(data, tmp_path, recipe, backbone):
    with pytest.raises(TrainingError, match="the recipe has features none"):
        run(data, tmp_path / "run", recipe, backbone_weights=backbone)
    assert not (tmp_path / "run").exists()


def test_one_training_image_is_refused(tmp_path, recipe):
    for index, folder in enumerate(["train/good", *4 * ["validation/good"]]):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / folder / f"{index}.png")
    with pytest.raises(DataError, match=r"^1 training images in .*: at least 2 are needed"):
        run(tmp_path, tmp_path / "run", recipe)


def test_a_diverging_run_stops_without_a_checkpoint(data, tmp_path):
    recipe = load_recipe("tiny", [*TINY, "l2_weight=1e39"])  # beyond float32
    with pytest.raises(TrainingDivergedError, match="reconstruction loss is inf at step 1"):
        run(data, tmp_path / "run", recipe)
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_full_disk_is_one_sentence_and_the_last_state_stays(data, tmp_path, recipe):
    out = tmp_path / "run"
    run(data, out, recipe)
    state, checkpoint = (out / "state.pt").read_bytes(), weights(out / "checkpoint")
    run_record = json.loads((out / "run.json").read_text())
    run_record["recipe"]["steps"] = 16  # so that there is something left to do, and to save
    (out / "run.json").write_text(json.dumps(run_record))
    with (
        largest_file(len(state) // 2),
        pytest.raises(TrainingError, match="File too large; --resume goes on from its last state"),
    ):
        run(data, out, replace(recipe, steps=16), resume=True)
    assert (out / "state.pt").read_bytes() == state
    assert weights(out / "checkpoint") == checkpoint
    assert not list(out.glob(".*"))


def test_a_full_disk_while_the_checkpoint_is_saved_keeps_the_last_good_one(data, tmp_path, recipe):
    checkpoint = run(data, tmp_path / "run", recipe)
    before = weights(checkpoint)
    with largest_file(len(before) // 2), pytest.raises(CheckpointError, match="File too large"):
        run(data, tmp_path / "run", recipe, resume=True)
    assert weights(checkpoint) == before
    assert {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")} == set()
    load_checkpoint(checkpoint)
