"""What the verbs print, write and refuse; their work itself is tested where it is done."""

import socket
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from hazelnut import app
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from service.security import read_keys
from tests.conftest import png
from training.config import Recipe

TINY = [
    "--recipe=tiny",
    *(f"--set={change}" for change in ["image_size=32", "width=8", "batch_size=4", "alpha=0.2", "steps=3"]),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "nuts"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02}.png").write_bytes(png(seed=index))
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_dry_run_tells_all_and_writes_nothing(data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = call("train", data, *TINY, f"--out={tmp_path / 'run'}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "  image_size = 32\n" in result.stdout
    assert '  latent = "grid"\n' in result.stdout
    assert "  8 training, 4 calibration, 0 test\n" in result.stdout
    for network in ("encoder", "decoder", "latent_discriminator", "image_discriminator"):
        assert f"  {network} " in result.stdout
    assert "minutes for 3 steps on cpu" in result.stdout
    assert "GiB at the peak" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_counts_the_features_that_are_kept_of_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr("training.dry_run.SAMPLE", 2)
    monkeypatch.setattr("training.dry_run.peak_memory_bytes", lambda _: 0)
    for index in range(40):
        (tmp_path / f"{index:02}.png").write_bytes(png(seed=index))
    changes = [
        "image_size=128",
        "features=resnet18",
        "feature_channels=1024",
        "width=8",
        "latent_dim=4",
        "head_width=0",
    ]
    options = [f"--set={change}" for change in [*changes, "batch_size=2", "alpha=0.2"]]
    result = call("train", tmp_path, "--recipe=features", *options, "--dry-run", "--device=cpu")
    assert result.exit_code == 0, result.output
    each = 3 * 128**2 + 2 * 1024 * (128 // 8) ** 2
    assert f"{30 * each / 2**30:.2f} GiB at the peak" in result.stdout
    assert "0.00 GiB" not in result.stdout


def test_a_wrong_key_is_refused_with_all_that_are_allowed(data):
    result = call("train", data, "--set=learning_rat=1")
    assert result.exit_code == 1
    assert "recipe key 'learning_rat' does not exist: allowed are " in result.stderr
    assert all(name in result.stderr for name in Recipe.__dataclass_fields__)


def test_a_wrong_value_and_a_wrong_recipe_are_refused_with_what_is_allowed(data):
    assert "image_loss is 'gan': allowed are bce, wgan-gp." in call("train", data, "--set=image_loss=gan").stderr
    wrong = call("train", data, "--recipe=tinny")
    assert wrong.exit_code == 1
    diary = "diary-2021-03-31, diary-2021-04-06, diary-2021-04-09, diary-next"
    assert wrong.stderr == f"hazelnut: recipe 'tinny' does not exist: there are default, {diary}, features, tiny.\n"


def test_resume_keeps_the_runs_recipe(data, tmp_path):
    out = tmp_path / "run"
    assert call("train", data, *TINY, f"--out={out}").exit_code == 0
    again = call("train", data, f"--out={out}", "--resume")
    assert again.exit_code == 0, again.output
    assert load_checkpoint(out / "checkpoint").origin["recipe"]["image_size"] == 32
    other = call("train", data, *TINY, "--set=seed=1", f"--out={out}", "--resume")
    assert other.exit_code == 1
    assert "another recipe (seed differ)" in other.stderr


def test_a_run_goes_to_runs_and_the_name_of_the_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train", data, *TINY)
    assert result.stdout == "checkpoint: runs/nuts/checkpoint\n"
    assert load_checkpoint(tmp_path / "runs/nuts/checkpoint").origin["name"] == "nuts"


@pytest.mark.parametrize(("inside", "name"), [("", "."), ("", "../checkpoint"), ("deeper", "..")])
def test_an_evaluation_is_written_beside_the_checkpoint_however_that_is_named(
    folder, tmp_path, monkeypatch, inside, name
):
    for image in ("good/0", "good/1", "crack/0"):
        path = tmp_path / f"nuts/test/{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    (folder / inside).mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder / inside)
    result = call("evaluate", name, tmp_path / "nuts")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "evaluation.json").is_file()
    assert sorted(folder.rglob("*")) == before


def test_a_gpu_with_too_little_memory_is_one_sentence(data, tmp_path, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("training.run.train", failing)
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    result = call("train", data, *TINY, f"--out={tmp_path / 'run'}")
    assert result.exit_code == 1
    assert "hazelnut: the GPU has too little memory: train with a smaller batch_size" in result.stderr
    error = RuntimeError("something else")
    assert call("train", data, *TINY, f"--out={tmp_path / 'other'}").exception is error


@pytest.mark.parametrize("image_size", [32, 48, 112])
@pytest.mark.parametrize("latent", ["vector", "grid"])
@pytest.mark.parametrize("channels", [1, 3])
def test_training_takes_every_kind_of_model(data, tmp_path, image_size, latent, channels):
    changes = [f"--set=image_size={image_size}", f"--set=latent={latent}", f"--set=channels={channels}"]
    result = call("train", data, *TINY, *changes, "--set=latent_loss=wgan-gp", f"--out={tmp_path / 'run'}")
    assert result.exit_code == 0, result.output
    rows = call("score", tmp_path / "run/checkpoint", data)
    assert rows.exit_code == 0, rows.output
    assert len(rows.stdout.splitlines()) == 12


def test_score_writes_an_overlay_per_image(data, tmp_path, checkpoint: Checkpoint):
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    result = call("score", tmp_path / "checkpoint", data, f"--overlays={tmp_path / 'overlays'}")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "overlays").iterdir())) == 12


def test_a_gpu_that_is_not_there_is_refused(data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = call("train", data, *TINY, "--device=cuda")
    assert result.exit_code == 1
    assert result.stderr == "hazelnut: device is 'cuda': torch finds no GPU here; allowed are auto and cpu.\n"


def test_serve_names_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = call("serve", f"--port={port}")
    assert result.exit_code == 1
    assert result.stderr == f"hazelnut: cannot listen on 127.0.0.1, port {port}: Address already in use.\n"


def test_serve_reads_its_flags_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HAZELNUT_CHECKPOINT", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HAZELNUT_PORT", "0")
    result = call("serve")
    assert result.exit_code == 1
    assert f"cannot read the checkpoint {tmp_path / 'nowhere'}" in result.stderr
    monkeypatch.setenv("HAZELNUT_HOST", "no such host")
    assert "HAZELNUT_HOST is 'no such host'" in call("serve").stderr


def test_publish_names_the_version_that_it_made(folder, tmp_path):
    for version in (1, 2):
        result = call("publish", folder, tmp_path / "models", "--name=bolt")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"published: {tmp_path / 'models' / 'bolt' / str(version)}\n"
    refused = call("publish", folder, tmp_path / "models", "--name=Bolt")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("hazelnut: the name 'Bolt' does not do")


def test_key_prints_a_line_for_the_file_and_the_key_beside_it(tmp_path):
    result = call("key", "camera-1")
    assert result.exit_code == 0, result.output
    (tmp_path / "keys").write_text(result.stdout)
    key = result.stderr.splitlines()[0].removeprefix("key: ")
    assert read_keys(tmp_path / "keys").owner(key) == "camera-1"
    assert key not in result.stdout
    assert call("key", "camera 1").exit_code == 1
