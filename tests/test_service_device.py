"""The device's process: the scores are the library's, whatever dies, and whatever else it is told to do."""

import copy
import io
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Timer

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.networks import Standardisation
from models.scoring import Scores
from service import app
from service.app import create_app
from service.device import Device, DeviceDiedError
from service.device_worker import DeviceError, Waiting, _score, memory_of
from service.settings import Settings
from service.telemetry import Telemetry
from tests.conftest import png

CPU = torch.device("cpu")
DEADLY = 13  # of pixels


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device(CPU, Telemetry())
    yield device
    device.close()


def pixels_of(count: int, *, seed: int = 0) -> Tensor:
    drawn = np.random.default_rng(seed).integers(20, 256, (count, 3, 32, 32), dtype=np.uint8)
    return torch.from_numpy(drawn)


def wanted(checkpoint: Checkpoint, pixels: Tensor) -> Scores:
    return checkpoint.scorer(CPU).score(pixels)


def same(scores: Scores, expected: Scores) -> bool:
    names = ("scores", "anomaly_score", "p_value", "maps")
    return all(np.array_equal(getattr(scores, name), getattr(expected, name)) for name in names)


@pytest.fixture
def hasty(device, checkpoint, monkeypatch) -> Iterator[Device]:
    """Takes five seconds for a hang."""
    device.load(checkpoint)  # what processes are forked from has imported torch by now
    monkeypatch.setattr("service.device.HANG_SECONDS", 5)
    hasty = Device(CPU, Telemetry())
    yield hasty
    hasty.close()


@contextmanager
def hanging(device: Device) -> Iterator[None]:
    """Its process; but it dies where nobody notices, so that the test ends."""
    assert device.pid
    dying = Timer(30, os.kill, (device.pid, signal.SIGKILL))
    os.kill(device.pid, signal.SIGSTOP)
    dying.start()
    try:
        yield
        assert dying.is_alive(), "nobody noticed"
    finally:
        dying.cancel()


class Rigged(Standardisation):
    """The first that sees the pixels does something else too. `at`: a path."""

    at: Path


class Deadly(Rigged):
    """Ends the process over an image whose first pixel says so; where `at` is given, the first time alone."""

    def forward(self, pixels: Tensor) -> Tensor:
        if (pixels[:, 0, 0, 0] == DEADLY).any() and not (self.at.name and self.at.exists()):
            if self.at.name:
                self.at.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(pixels)


class SlowToLoad(Rigged):
    """Loading takes until `at` is there, or far too long."""

    def forward(self, pixels: Tensor) -> Tensor:
        end = time.monotonic() + 20
        while not self.at.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return super().forward(pixels)


class Faulty(Rigged):
    """Fails over an image whose first pixel says so, as the file `at` has it."""

    def forward(self, pixels: Tensor) -> Tensor:
        if (pixels[:, 0, 0, 0] == DEADLY).any():
            raise torch.OutOfMemoryError("no room") if self.at.name == "memory" else ValueError("odd")
        return super().forward(pixels)


class Mourned(Rigged):
    """Leaves a file when it is forgotten."""

    def __del__(self) -> None:
        if Path("/proc/self/comm").read_text() == "hazelnut-device\n":
            self.at.touch()


def rigged(checkpoint: Checkpoint, kind: type[Rigged], at: str | Path = "") -> Checkpoint:
    networks = copy.deepcopy(checkpoint.networks)
    networks.standardisation.__class__ = kind
    vars(networks.standardisation)["at"] = Path(at)
    return replace(checkpoint, networks=networks)


def deadly_pixels(count: int) -> Tensor:
    """The last is deadly."""
    pixels = pixels_of(count)
    pixels[-1] = DEADLY
    return pixels


def test_scores_are_those_of_the_library(device, checkpoint):
    scorer = device.load(checkpoint)
    for count in (1, 5, 16):
        pixels = pixels_of(count, seed=count)
        assert same(scorer.begin(pixels).result(), wanted(checkpoint, pixels))


def test_models_are_kept_apart(device, checkpoint):
    other = replace(checkpoint, calibration=replace(checkpoint.calibration, scores=checkpoint.calibration.scores + 0.1))
    scorers = [device.load(each) for each in (checkpoint, other)]
    for scorer, each in zip(scorers, (checkpoint, other), strict=True):
        assert same(scorer.begin(pixels_of(2)).result(), wanted(each, pixels_of(2)))


def test_batches_under_way_get_their_own_scores_whichever_is_asked_for_first(device, checkpoint):
    scorer = device.load(checkpoint)
    first, second = (scorer.begin(pixels_of(2, seed=seed)) for seed in (1, 2))
    assert same(second.result(), wanted(checkpoint, pixels_of(2, seed=2)))
    assert first.done()
    assert same(first.result(), wanted(checkpoint, pixels_of(2, seed=1)))


def test_large_batches_may_be_sent_before_the_last_is_asked_for(device, checkpoint):
    """Both ends may be full: whoever sends must find somebody who reads."""
    scorer = device.load(checkpoint)
    pixels = pixels_of(512)
    batches = [scorer.begin(pixels) for _ in range(4)]
    expected = wanted(checkpoint, pixels).scores
    assert all(batch.result().scores == pytest.approx(expected) for batch in batches)


def test_a_process_that_died_is_replaced_and_its_models_are_there_again(device, checkpoint):
    scorers = [device.load(checkpoint) for _ in range(2)]
    for scorer in scorers:
        before = device.pid
        os.kill(before, signal.SIGKILL)
        assert same(scorer.begin(pixels_of(3)).result(), wanted(checkpoint, pixels_of(3)))
        assert device.pid != before


def test_batches_that_were_under_way_when_it_died_are_scored_by_the_next(device, checkpoint, tmp_path):
    scorer = device.load(rigged(checkpoint, Deadly, tmp_path / "died"))
    pixels = deadly_pixels(3)
    batches = [scorer.begin(each) for each in (pixels, pixels_of(2))]
    assert same(batches[0].result(), wanted(checkpoint, pixels))
    assert same(batches[1].result(), wanted(checkpoint, pixels_of(2)))
    assert (tmp_path / "died").exists()


def test_a_batch_over_which_it_dies_twice_is_given_up_and_the_next_one_scored(device, checkpoint):
    scorer = device.load(rigged(checkpoint, Deadly))
    with pytest.raises(DeviceDiedError, match="died over a batch"):
        scorer.begin(deadly_pixels(2)).result()
    assert same(scorer.begin(pixels_of(2)).result(), wanted(checkpoint, pixels_of(2)))


@pytest.mark.parametrize("count", [1, 512], ids=["that it has", "that it does not even take"])
def test_a_process_that_hangs_over_a_batch_is_killed_and_the_batch_scored_by_the_next(hasty, checkpoint, count):
    scorer = hasty.load(checkpoint)
    before = hasty.pid
    with hanging(hasty):
        scores = scorer.begin(pixels_of(count)).result()
    assert scores.scores == pytest.approx(wanted(checkpoint, pixels_of(count)).scores)
    assert hasty.pid != before
    assert hasty._telemetry.registry.get_sample_value("hazelnut_device_processes_lost_total") == 1


def test_a_process_that_hangs_over_a_model_is_killed(hasty, checkpoint):
    scorer = hasty.load(checkpoint)
    with hanging(hasty), pytest.raises(DeviceDiedError, match="died over a model"):
        hasty.load(checkpoint)
    assert same(scorer.begin(pixels_of(2)).result(), wanted(checkpoint, pixels_of(2)))


def test_a_service_whose_device_hangs_can_be_stopped(checkpoint, monkeypatch):
    monkeypatch.setattr(app, "CLOSE_SECONDS", 0.1)
    settings = Settings(device="cpu", answer_seconds=0.2)
    with ExitStack() as stack:
        with TestClient(create_app(settings, checkpoint=checkpoint)) as client:
            device = client.app.state.service.running.device  # type: ignore[attr-defined]
            process = Path(f"/proc/{device.pid}")
            stack.enter_context(hanging(device))
            assert client.post("/score", files=[("files", ("a.png", png()))]).status_code == 504
        assert not process.exists()


def test_an_image_over_which_it_dies_fails_and_its_neighbours_do_not(checkpoint):
    # Five processes take their time to start on a busy machine.
    settings = Settings(device="cpu", answer_seconds=300)
    with TestClient(create_app(settings, checkpoint=rigged(checkpoint, Deadly))) as client:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (DEADLY,) * 3).save(file, "PNG")
        images = [png(seed=seed, size=(32, 32)) for seed in range(4)]
        images.insert(2, file.getvalue())
        answer = client.post("/score", files=[("files", (f"{n}.png", image)) for n, image in enumerate(images)])
        outcomes = [result["error"] and result["error"]["code"] for result in answer.json()["results"]]
        assert outcomes == [None, None, "image_failed", None, None]
        assert client.get("/health/ready").status_code == 200


def test_a_model_that_cannot_be_served_says_why(device, checkpoint):
    networks = copy.deepcopy(checkpoint.networks)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="black image"):
        device.load(replace(checkpoint, networks=networks))
    assert same(device.load(checkpoint).begin(pixels_of(1)).result(), wanted(checkpoint, pixels_of(1)))


@pytest.mark.parametrize(
    ("at", "error", "says"), [("memory", torch.OutOfMemoryError, "no room"), ("", DeviceError, "odd")]
)
def test_what_a_batch_raises_arrives_and_the_next_one_is_scored(device, checkpoint, at, error, says):
    scorer = device.load(rigged(checkpoint, Faulty, at))
    before = device.pid
    with pytest.raises(error, match=says):
        scorer.begin(deadly_pixels(2)).result()
    assert same(scorer.begin(pixels_of(2)).result(), wanted(checkpoint, pixels_of(2)))
    assert device.pid == before


def test_a_model_that_loads_holds_up_no_batch(device, checkpoint, tmp_path):
    scorer = device.load(checkpoint)
    with ThreadPoolExecutor(1) as loading:
        slow = loading.submit(device.load, rigged(checkpoint, SlowToLoad, tmp_path / "go"))
        for _ in range(3):
            assert same(scorer.begin(pixels_of(1)).result(), wanted(checkpoint, pixels_of(1)))
        assert not slow.done()
        (tmp_path / "go").touch()
        assert same(slow.result().begin(pixels_of(1)).result(), wanted(checkpoint, pixels_of(1)))


def test_a_model_that_nobody_needs_leaves_when_another_one_comes(device, checkpoint, tmp_path):
    device.load(rigged(checkpoint, Mourned, tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()
    device.load(checkpoint)
    assert (tmp_path / "gone").exists()


def test_closed_it_leaves_no_process(device, checkpoint):
    device.load(checkpoint)
    process = Path(f"/proc/{device.pid}")
    assert (process / "comm").read_text() == "hazelnut-device\n"
    device.close()
    assert not process.exists()


def test_a_light_model_leaves_half_of_the_cores_to_decoding_and_a_heavy_one_takes_all():
    threads: dict[float, list[int]] = {0.0: [], 0.02: []}

    class Busy:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def begin(self, pixels: Tensor) -> Future[Scores]:
            threads[self.seconds].append(torch.get_num_threads())
            time.sleep(self.seconds * len(pixels))
            scored: Future[Scores] = Future()
            scored.set_exception(ValueError("none"))
            return scored

    waiting: SimpleQueue[Waiting | None] = SimpleQueue()
    outcomes: SimpleQueue[Scores | Exception] = SimpleQueue()
    for _ in range(3):
        for key in (1, 2):
            waiting.put((key, np.zeros((1, 3, 2, 2), dtype=np.uint8)))
    waiting.put(None)
    before = torch.get_num_threads()
    _score(waiting, outcomes, {1: Busy(0.0), 2: Busy(0.02)}, cores=4)
    torch.set_num_threads(before)
    assert threads == {0.0: [2, 2, 2], 0.02: [2, 4, 4]}
    assert all(isinstance(outcomes.get(), DeviceError) for _ in range(6))


def test_memory_is_what_the_container_may_have_or_else_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("service.device_worker.CONTAINER_MEMORY", tmp_path / "memory.max")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_of(CPU)[1] == machine > memory_of(CPU)[0] > 0  # no such file
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_of(CPU)[1] == machine
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory_of(CPU)[1] == 2**30
