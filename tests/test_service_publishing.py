"""Publishing: the next version of a product, whole or not at all."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import CheckpointError, ConfigError
from service.device_worker import warm_scorer
from service.publishing import publish
from service.registry import Registry
from service.settings import Settings
from service.telemetry import Telemetry


def test_publish_makes_the_next_version_and_the_registry_serves_it(folder, tmp_path):
    root = tmp_path / "models"
    assert [publish(folder, root, name=None) for _ in range(2)] == [root / "nut" / "1", root / "nut" / "2"]
    assert publish(folder, root, name="bolt") == root / "bolt" / "1"
    (root / "nut" / "10").mkdir()
    assert publish(folder, root, name="nut").name == "11"
    for name in ("model.safetensors", "model.json"):
        assert (root / "nut" / "11" / name).read_bytes() == (folder / name).read_bytes()
    registry = Registry(Settings(checkpoint=root), Telemetry(), load=partial(warm_scorer, device=torch.device("cpu")))
    assert [(each.name, each.found.version) for each in registry.answering()] == [("bolt", 1), ("nut", 11)]
    assert (root / "nut" / "11").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["Nut", "../nut", "a/b", "-nut", "", "x" * 65, "nut:2"])
def test_publish_refuses_a_name_that_does_not_do(folder, tmp_path, name):
    if name:
        with pytest.raises(ConfigError, match="does not do for a folder"):
            publish(folder, tmp_path / "models", name=name)
    save_checkpoint(folder, replace(load_checkpoint(folder), origin={"name": name or "Großes Teil"}))
    with pytest.raises(ConfigError, match="--name"):
        publish(folder, tmp_path / "models", name=None)
    assert not (tmp_path / "models").exists()


def test_publish_refuses_a_broken_checkpoint_and_leaves_nothing(folder, tmp_path):
    (folder / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        publish(folder, tmp_path / "models", name="nut")
    assert not (tmp_path / "models").exists()


def test_publish_refuses_a_checkpoint_as_the_folder(folder):
    with pytest.raises(ConfigError, match="is itself a checkpoint"):
        publish(folder, folder, name=None)


def test_publish_that_fails_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CheckpointError, match="No space left"):
        publish(folder, tmp_path / "models", name=None)
    assert list((tmp_path / "models" / "nut").iterdir()) == []
