"""Where a backbone's weights come from, and what is said of a file that does not do."""

import hashlib
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torchvision.models import ResNet18_Weights, get_model

from models.errors import ConfigError, TrainingError
from training.backbone import load_backbone


@pytest.fixture(scope="module")
def weights():
    return get_model("resnet18", weights=None).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_are_read_from_a_file_with_their_digest(tmp_path, weights, suffix):
    file = tmp_path / f"resnet18{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, file)
    else:
        torch.save(weights, file)
    backbone = load_backbone("resnet18", file)
    assert backbone.record == {"weights": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert backbone.weights.keys() == weights.keys()
    assert all(torch.equal(backbone.weights[key], value) for key, value in weights.items())


class Opened:
    """What unpickling would run."""

    def __reduce__(self):
        return print, ("this was run",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys):
    torch.save({"conv1.weight": Opened()}, tmp_path / "evil.pth")
    with pytest.raises(TrainingError, match=r"evil\.pth cannot be read as weights"):
        load_backbone("resnet18", tmp_path / "evil.pth")
    assert "this was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "text.pth", "empty.safetensors"])
def test_a_broken_file_is_refused(tmp_path, weights, name):
    file = tmp_path / name
    if name == "cut.safetensors":
        file.write_bytes(safetensors.torch.save(weights)[:1000])
    elif name == "cut.pth":
        torch.save(weights, file)
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.write_text("" if name.startswith("empty") else "these are no weights")
    with pytest.raises(TrainingError, match="cannot be read as weights"):
        load_backbone("resnet18", file)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(TrainingError, match="is no state dict"):
        load_backbone("resnet18", tmp_path / "list.pth")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"cannot read the backbone's weights .*absent\.pth: No such file"):
        load_backbone("resnet18", tmp_path / "absent.pth")


def test_without_a_network_a_file_is_asked_for(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(TrainingError, match=r"weights of resnet18 cannot be fetched .*give --backbone-weights"):
        load_backbone("resnet18", None)


@pytest.mark.parametrize("name", ["resnet81", "fcn_resnet50"])
def test_a_network_that_does_not_classify_images_is_refused_before_its_weights_are_fetched(name):
    with pytest.raises(ConfigError, match=f"features is '{name}': torchvision has no such network"):
        load_backbone(name, None)


@pytest.mark.parametrize("content", ["", "these are no weights", "cut"])
def test_a_broken_file_that_was_fetched_before_is_named(tmp_path, monkeypatch, weights, content):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir()
    if content == "cut":
        torch.save(weights, file)
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.write_text(content)
    with pytest.raises(TrainingError, match=rf"weights of resnet18 are broken .*: remove {file}"):
        load_backbone("resnet18", None)


def test_torchvisions_own_weights_are_taken_from_where_it_keeps_them(tmp_path, monkeypatch, weights):
    """As if they had been fetched before: torchvision then asks no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(weights, file)
    backbone = load_backbone("resnet18", None)
    assert backbone.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert backbone.source == "ResNet18_Weights.IMAGENET1K_V1"
    assert torch.equal(backbone.weights["conv1.weight"], weights["conv1.weight"])
