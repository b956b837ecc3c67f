"""What a run writes down: figures, findings and pictures, as if it had never been stopped."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from training import record
from training.config import Recipe, load_recipe
from training.diagnostics import fixed_images, measure
from training.loop import scoring_networks, train
from training.record import Record
from training.state import TrainingState

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture
def recipe() -> Recipe:
    """The wrong flags of the diary, which raise findings soon."""
    return load_recipe("diary-2021-03-31", ["image_size=32", "latent_dim=4", "batch_size=4", "steps=24"])


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(100, 156, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LOG_EVERY", 1)
    monkeypatch.setattr(record, "DIAGNOSE_EVERY", 5)


def lines(path: Path) -> list[dict[str, float]]:
    """Without the speed, which is never the same."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in found]


def record_training(
    state: TrainingState, recipe: Recipe, written: Record, *, after: Callable[[], None] | None = None
) -> None:
    def after_step(losses: dict[str, float]) -> None:
        written.after_step(losses)
        if after is not None:
            after()

    train(state, recipe, after_step)


def trained(out: Path, recipe: Recipe, pixels: Tensor, console: Console = QUIET) -> TrainingState:
    out.mkdir(exist_ok=True)
    state = TrainingState(recipe, pixels, device=CPU)
    with Record(out, state, recipe, console) as written:
        record_training(state, recipe, written)
        written.interpolations(scoring_networks(state, recipe))
    return state


def test_the_log_has_losses_in_every_line_and_figures_in_some(tmp_path, recipe, pixels):
    state = trained(tmp_path, recipe, pixels)
    found = lines(tmp_path / "log.jsonl")
    assert [line["step"] for line in found] == list(range(1, 25))
    assert all({"reconstruction", "image_adversarial", "latent_discriminator"} <= set(line) for line in found)
    assert [line["step"] for line in found if "code/std" in line] == [5, 10, 15, 20, 24]
    last = measure(state, recipe, fixed_images(state, recipe, 32)[0])
    assert {name: found[-1][name] for name in last} == last


def test_findings_are_lines_and_warnings(tmp_path, recipe, pixels):
    output = io.StringIO()
    trained(tmp_path, recipe, pixels, Console(file=output, width=60))
    found = lines(tmp_path / "findings.jsonl")
    assert {"collapsed_code", "collapsed_generator"} <= {str(finding["name"]) for finding in found}
    assert all(set(finding) == {"step", "name", "figure", "message"} for finding in found)
    # A line each, however narrow the terminal.
    assert output.getvalue().splitlines() == [f"step {finding['step']}: {finding['message']}" for finding in found]


def test_tensorboard_shows_the_figures_and_the_pictures(tmp_path, recipe, pixels):
    trained(tmp_path, recipe, pixels)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("code/std")}
    logged = {line["step"]: line["code/std"] for line in lines(tmp_path / "log.jsonl") if "code/std" in line}
    assert shown == pytest.approx(logged)
    for tag, name in (("step", "step-000024"), ("interpolations", "interpolations")):
        (event,) = events.Images(tag)
        assert event.step == 24
        picture = Image.open(tmp_path / f"pictures/{name}.png")
        assert Image.open(io.BytesIO(event.encoded_image_string)).tobytes() == picture.tobytes()


def test_tensorboard_shows_a_run_while_it_goes_on(tmp_path, recipe, pixels, monkeypatch):
    """And what was found in it."""
    monkeypatch.setattr("training.pictures.FIRST", 10)
    state = TrainingState(recipe, pixels, device=CPU)
    seen = 0

    def look() -> None:
        nonlocal seen
        if state.step not in (10, 20):
            return
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("reconstruction")][-1] == state.step
        assert [event.step for event in events.Images("step")][-1] == state.step
        for finding in lines(tmp_path / "findings.jsonl"):
            (event,) = events.Tensors(f"finding/{finding['name']}/text_summary")
            assert event.step == finding["step"]
            assert event.tensor_proto.string_val[0].decode() == finding["message"]
            seen += 1

    with Record(tmp_path, state, recipe, QUIET) as written:
        (tmp_path / "findings.jsonl").touch()
        record_training(state, recipe, written, after=look)
    assert seen


def test_pictures_are_kept_at_their_steps(tmp_path, recipe, pixels, monkeypatch):
    monkeypatch.setattr("training.pictures.FIRST", 3)
    trained(tmp_path, recipe, pixels)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "interpolations.png",
        *(f"step-{step:06}.png" for step in (3, 6, 12, 24)),
    ]


def test_pictures_of_steps_that_are_taken_again_are_forgotten(tmp_path, recipe, pixels, monkeypatch):
    monkeypatch.setattr("training.pictures.FIRST", 3)
    trained(tmp_path, recipe, pixels)
    resumed = TrainingState(recipe, pixels, device=CPU)
    resumed.step = 6
    with Record(tmp_path, resumed, recipe, QUIET):
        assert sorted(path.name for path in (tmp_path / "pictures").glob("step-*")) == [
            "step-000003.png",
            "step-000006.png",
        ]


@pytest.mark.parametrize("stop", [12, 22])
def test_a_run_that_was_stopped_writes_what_one_that_was_not_does(tmp_path, recipe, pixels, stop):
    """Its state is older than what it wrote last, and it was torn off in the middle of a line."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    trained(whole, recipe, pixels)
    out.mkdir()
    state, saved = TrainingState(recipe, pixels, device=CPU), io.BytesIO()

    def save_and_stop() -> None:
        if state.step == stop - 4:
            torch.save(state.state_dict(), saved)
        if state.step == stop:
            raise KeyboardInterrupt

    with Record(out, state, recipe, QUIET) as written, pytest.raises(KeyboardInterrupt):
        record_training(state, recipe, written, after=save_and_stop)
    for name in ("log.jsonl", "findings.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 3, "na')
    resumed = TrainingState(recipe, pixels, device=CPU)
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    with Record(out, resumed, recipe, QUIET) as written:
        record_training(resumed, recipe, written)
    assert [line["step"] for line in lines(out / "log.jsonl")] == list(range(1, 25))
    assert lines(out / "log.jsonl") == lines(whole / "log.jsonl")
    assert lines(out / "findings.jsonl") == lines(whole / "findings.jsonl")
    assert len(lines(out / "findings.jsonl")) > 2


@pytest.mark.parametrize("name", ["diary-2021-03-31", "diary-2021-04-06"])
def test_the_recording_leaves_no_trace_in_the_weights(tmp_path, name, pixels):
    """Nor in batch norm's statistics, where they move."""
    recipe = load_recipe(name, ["image_size=32", "latent_dim=4", "batch_size=4", "steps=12"])
    recorded, alone = trained(tmp_path, recipe, pixels), TrainingState(recipe, pixels, device=CPU)
    train(alone, recipe, lambda _: None)
    for part in ("networks", "image_discriminator", "latent_discriminator", "averaged"):
        expected, found = getattr(alone, part).state_dict(), getattr(recorded, part).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
