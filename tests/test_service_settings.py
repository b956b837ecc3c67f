"""Settings from the environment, what keeps the server from starting, and that the documentation names it all."""

import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import save_checkpoint
from models.errors import CheckpointError, ConfigError
from models.images import MAX_PIXELS
from service.app import create_app, serve
from service.errors import ERRORS
from service.security import new_key
from service.settings import DEFAULT_CHECKPOINT, PREFIX, Settings, load_settings
from service.telemetry import Telemetry

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "service.md").read_text()


def test_settings_have_defaults():
    settings = load_settings()
    assert settings.checkpoint == DEFAULT_CHECKPOINT == ROOT / "checkpoints" / "demo"
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")
    assert settings.max_pixels == MAX_PIXELS
    assert settings.max_body_bytes == 33_554_432


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("HAZELNUT_MAX_FILES", "3")
    monkeypatch.setenv("HAZELNUT_PORT", "9000")
    monkeypatch.setenv("HAZELNUT_DEVICE", "")
    monkeypatch.setenv("HAZELNUT_NONSENSE", "1")
    settings = load_settings(port=9001)
    assert (settings.max_files, settings.port, settings.device) == (3, 9001, "auto")
    assert create_app().state.service.settings.port == 9000


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "high", "HAZELNUT_PORT is 'high': input should be a valid integer"),
        ("PORT", "65536", "HAZELNUT_PORT is '65536': input should be less than or equal to 65535"),
        ("DEVICE", "tpu", "HAZELNUT_DEVICE is 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
        ("MAX_PIXELS", str(MAX_PIXELS + 1), "HAZELNUT_MAX_PIXELS is"),
        ("MAX_BODY_BYTES", "0", "HAZELNUT_MAX_BODY_BYTES is '0'"),
        ("MAX_WAITING", "63", "HAZELNUT_MAX_WAITING is 63: allowed is HAZELNUT_MAX_FILES, 64, or more"),
    ],
)
def test_settings_are_refused_in_one_sentence(monkeypatch, name, value, says):
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        create_app()
    assert "\n" not in str(caught.value)


def test_serve_refuses_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            serve(Settings(port=port, checkpoint=tmp_path))


def test_serve_refuses_an_address_that_is_not_its_own(tmp_path):
    (tmp_path / "keys").write_text(new_key("line-1")[1])
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1, port 0: "):
        serve(Settings(host="203.0.113.1", port=0, checkpoint=tmp_path, api_keys=tmp_path / "keys"))


def test_serve_refuses_other_machines_without_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"HAZELNUT_HOST is '0\.0\.0\.0'.*HAZELNUT_API_KEYS"):
        serve(Settings(host="0.0.0.0", port=0, checkpoint=tmp_path))


def test_serve_refuses_a_file_of_keys_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        serve(Settings(port=0, device="cpu", api_keys=tmp_path / "keys"))


def test_serve_refuses_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        serve(Settings(port=0, device="cpu", checkpoint=tmp_path / "nowhere"))


def test_serve_refuses_a_checkpoint_without_a_name(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "nameless", replace(checkpoint, origin={}))
    with pytest.raises(CheckpointError, match="name None"):
        serve(Settings(port=0, device="cpu", checkpoint=tmp_path / "nameless"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_serve_refuses_cuda_where_there_is_none(tmp_path):
    with pytest.raises(ConfigError, match="'cuda'"):
        serve(Settings(port=0, device="cuda", checkpoint=tmp_path))


def test_docs_name_every_setting_with_its_default():
    for name, field in Settings.model_fields.items():
        assert field.description
        default = "checkpoints/demo" if name == "checkpoint" else str(field.default)
        assert f"| `{PREFIX}{name.upper()}` | `{default}` | {field.description} |" in DOCS


def test_docs_name_every_error_with_its_status():
    for code, kind in ERRORS.items():
        assert f"| `{code}` | {kind.status} | {kind.meaning} |" in DOCS


def test_docs_name_every_metric():
    for metric in Telemetry().registry.collect():
        name = metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")
        assert f"| `{name}` |" in DOCS or name.startswith("process_")
