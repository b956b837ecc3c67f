"""Tiny real networks and images that many tests share."""

import io
import os

# Tiny networks are faster on one thread, and threads that wait for one another stall on a busy machine. Set before
# torch is imported, so that the processes which tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import resource
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from models.calibration import Calibration
from models.checkpoint import Checkpoint, save_checkpoint
from models.config import ModelConfig
from models.maps import MapFusion
from models.networks import ScoringNetworks, Standardisation
from service.app import create_app
from service.settings import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own HAZELNUT_ variables must not decide a test."""
    for name in list(os.environ):
        if name.startswith("HAZELNUT_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Networks that a test makes do not depend on which tests this process ran before."""
    torch.manual_seed(0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to make a file larger, as a full disk does. Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(image_size=32, channels=3, width=8, latent="grid", latent_dim=4, head_width=8)


@pytest.fixture
def checkpoint(config: ModelConfig) -> Checkpoint:
    """Untrained networks, with a calibration of nineteen images: alpha = 0.05 is just resolved."""
    networks = ScoringNetworks(config, Standardisation()).eval()
    scores = np.random.default_rng(0).normal(loc=[0.03, 0.92, 0.101], scale=0.01, size=(19, 3))
    return Checkpoint(
        networks=networks,
        fusion=MapFusion(torch.zeros(2, 8, 8), torch.ones(2, 8, 8), torch.zeros(4), torch.ones(4)),
        calibration=Calibration(scores=scores, alpha=0.05),
        origin={"name": "nut", "command": "drawn by a test"},
        metrics={},
    )


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The checkpoint, saved."""
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    return tmp_path / "checkpoint"


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    """Of a service that serves it."""
    with TestClient(create_app(Settings(checkpoint=folder, device="cpu"))) as client:
        yield client


def png(*, size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    """A PNG of noise; the same bytes for the same arguments."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What tests log goes from one process to another, and a lone surrogate, which a client may send, cannot."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


async def until(condition: Callable[[], object]) -> None:
    """Wait, in turns with the event loop's other work, for what has to become so."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "this never became so"
        await asyncio.sleep(0.001)
