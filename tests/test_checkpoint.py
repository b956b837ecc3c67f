"""What is saved is what is loaded, and what is not a whole checkpoint is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from models.calibration import Calibration
from models.checkpoint import FIELDS, Checkpoint, load_checkpoint, save_checkpoint
from models.config import ModelConfig
from models.errors import CheckpointError
from models.maps import MapFusion, Weights
from models.networks import ScoringNetworks, Standardisation, places_of
from tests.conftest import largest_file

CPU = torch.device("cpu")


def pixels_of(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    save_checkpoint(tmp_path / "nut", checkpoint)
    return tmp_path / "nut"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder: Path, changes: dict[str, Any], *, weights: bytes | None = None) -> None:
    """Write the record with other values, or without those that are None, and with checksums that are right."""
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
        changes = {"weights_sha256": hashlib.sha256(weights).hexdigest(), **changes}
    record = json.loads((folder / "model.json").read_bytes()) | changes
    record = {name: value for name, value in record.items() if value is not None and name != "record_sha256"}
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(record | {"record_sha256": checksum}))


# There and back


def fusion_of(config: ModelConfig) -> MapFusion:
    """No number in it is like another."""
    components = 2 if config.head_width else 1
    numbers = torch.rand(2, components, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = torch.linspace(-1, 1, 4 * components)
    weights = Weights((0.3, 0.9), (0.1, 0.2))
    return MapFusion(numbers[0], 1 + numbers[1], ends[: 2 * components], ends[2 * components :], weights)


def with_config(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    return replace(checkpoint, networks=ScoringNetworks(config, Standardisation(100.0, 30.0)), fusion=fusion_of(config))


def assert_same_weights(saved: Checkpoint, loaded: Checkpoint) -> None:
    for module, other in [(saved.networks, loaded.networks), (saved.fusion, loaded.fusion)]:
        state, other_state = module.state_dict(), other.state_dict()
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[key], other_state[key]) for key in state)
        assert all(state[key].dtype == other_state[key].dtype for key in state)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("latent", ["vector", "grid"])
@pytest.mark.parametrize("batch_norm", ["before", "after"])
@pytest.mark.parametrize("head_width", [0, 8])
@pytest.mark.parametrize("tile", [0, 32])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, checkpoint, channels, latent, batch_norm, head_width, tile):
    config = ModelConfig(
        image_size=48,
        tile=tile,
        channels=channels,
        width=8,
        latent=latent,
        latent_dim=5,
        batch_norm=batch_norm,
        head_width=head_width,
    )
    parts = tuple(range(7, 7 + checkpoint.calibration.n))
    calibration = replace(checkpoint.calibration, weights=(0.01, 0.1 + 0.2, 0.4), parts=parts)
    saved = replace(with_config(checkpoint, config), calibration=calibration)
    save_checkpoint(tmp_path / "nut", saved)
    loaded = load_checkpoint(tmp_path / "nut")
    assert loaded.config == config
    assert_same_weights(saved, loaded)
    assert (loaded.networks.head is None) == (head_width == 0)
    assert np.array_equal(loaded.calibration.scores, saved.calibration.scores)
    assert loaded.calibration.scores.dtype == np.float64
    assert loaded.calibration.alpha == saved.calibration.alpha
    assert loaded.calibration.weights == (0.01, 0.1 + 0.2, 0.4)
    assert loaded.calibration.parts == parts
    assert loaded.origin == saved.origin
    assert loaded.metrics == saved.metrics


def test_origin_and_metrics_come_back_as_they_were(tmp_path, checkpoint):
    origin = {"recipe": {"steps": 2, "lr": 1e-4, "ema": True}, "name": "Mutter Größe 8 \u2713", "list": [1, None, "a"]}
    metrics = {"image_auroc": 0.1 + 0.2, "nested": {"a": []}}
    save_checkpoint(tmp_path / "nut", replace(checkpoint, origin=origin, metrics=metrics))
    loaded = load_checkpoint(tmp_path / "nut")
    assert loaded.origin == origin
    assert loaded.metrics == metrics


def test_a_loaded_checkpoint_is_in_eval_mode_and_scores_the_same(tmp_path, checkpoint):
    # Statistics of its own in every batch norm: they are part of what must come back.
    images = checkpoint.networks.standardisation(pixels_of(8, seed=1))
    with torch.no_grad():
        checkpoint.networks.train()(images, places_of(32, CPU)[None])
    saved = replace(checkpoint, fusion=fusion_of(checkpoint.config))
    save_checkpoint(tmp_path / "nut", saved)  # in training mode
    loaded = load_checkpoint(tmp_path / "nut")
    assert not any(module.training for module in loaded.networks.modules())
    before, after = saved.scorer(CPU).score(pixels_of(4)), loaded.scorer(CPU).score(pixels_of(4))
    for name in ("scores", "anomaly_score", "p_value", "maps"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


def test_a_tiled_checkpoint_scores_the_same_after_loading(tmp_path, checkpoint):
    saved = with_config(checkpoint, replace(checkpoint.config, image_size=64, tile=48))
    save_checkpoint(tmp_path / "nut", saved)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = saved.scorer(CPU).score(pixels)
    after = load_checkpoint(tmp_path / "nut").scorer(CPU).score(pixels)
    assert np.array_equal(before.scores, after.scores)
    assert np.array_equal(before.maps, after.maps)


def test_a_checkpoint_keeps_what_a_map_scores_by_and_the_peaks_beside(tmp_path, checkpoint):
    saved = with_config(checkpoint, replace(checkpoint.config, highest=16))
    peaks = np.random.default_rng(1).normal(size=19)
    saved = replace(saved, calibration=replace(saved.calibration, peaks=peaks))
    save_checkpoint(tmp_path / "nut", saved)
    loaded = load_checkpoint(tmp_path / "nut")
    assert loaded.calibration.map_level(0.05) == peaks.max()
    before, after = (one.scorer(CPU).score(pixels_of(4)) for one in (saved, loaded))
    assert np.array_equal(before.scores, after.scores)
    assert (after.scores[:, 2] < after.maps.max(axis=(1, 2))).all()


def test_a_checkpoint_whose_maps_score_by_squares_needs_the_peaks_too(tmp_path, checkpoint):
    save_checkpoint(tmp_path / "nut", with_config(checkpoint, replace(checkpoint.config, highest=16)))
    with pytest.raises(CheckpointError, match="holds no peaks of maps: with highest 16 it must"):
        load_checkpoint(tmp_path / "nut")


def test_saving_what_was_loaded_gives_the_same_files(tmp_path, folder):
    save_checkpoint(tmp_path / "again", load_checkpoint(folder))
    assert files_of(tmp_path / "again") == files_of(folder)


def test_a_checkpoint_is_two_files_that_anyone_may_read(folder):
    assert set(files_of(folder)) == {"model.safetensors", "model.json"}
    assert folder.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in folder.parent.iterdir()] == ["nut"]
    record = json.loads((folder / "model.json").read_text())
    assert set(record) == FIELDS
    assert record["format"] == 4
    assert record["versions"]["torch"] == torch.__version__
    weights = (folder / "model.safetensors").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest() == load_checkpoint(folder).weights_sha256


def test_weights_are_named_by_their_part(folder):
    names = safetensors.torch.load_file(folder / "model.safetensors")
    assert {".".join(name.split(".")[: 2 if name.startswith("networks") else 1]) for name in names} == {
        "networks.encoder",
        "networks.decoder",
        "networks.head",
        "networks.standardisation",
        "fusion",
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_networks_of_any_memory_format_are_saved(tmp_path, checkpoint, memory_format):
    weights = checkpoint.networks.encoder.state_dict()["layers.0.weight"].clone()
    checkpoint.networks.to(memory_format=memory_format)
    save_checkpoint(tmp_path / "nut", checkpoint)
    assert torch.equal(load_checkpoint(tmp_path / "nut").networks.encoder.state_dict()["layers.0.weight"], weights)


# Changed files


def test_a_changed_byte_anywhere_in_the_weights_is_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    # The header's length, the header, its end, the first number, some between, the last one.
    middles = range(header_bytes, len(content), len(content) // 20)
    for position in [0, 7, 8, header_bytes // 2, header_bytes - 1, *middles, len(content) - 1]:
        changed = bytearray(content)
        changed[position] ^= 0x01
        path.write_bytes(bytes(changed))
        with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256 .* the file was changed"):
            load_checkpoint(folder)


@pytest.mark.parametrize("flip", [0x01, 0x10])
def test_a_changed_byte_anywhere_in_the_record_is_refused(folder, flip):
    path = folder / "model.json"
    content = path.read_bytes()
    refused = 0
    positions = range(0, len(content), max(1, len(content) // 300))
    for position in positions:
        altered = bytearray(content)
        altered[position] ^= flip
        path.write_bytes(bytes(altered))
        try:
            load_checkpoint(folder)
        except CheckpointError as error:
            assert "model.json" in str(error)  # noqa: PT017 (the record may also be as good as before)
            refused += 1
        else:
            # A number's seventeenth digit need not change the number.
            assert json.loads(altered) == json.loads(content)
    assert refused > 0.98 * len(positions)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_a_file_that_was_cut_or_goes_on_is_refused(folder, file):
    content = (folder / file).read_bytes()
    for changed in (b"", content[:1], content[: len(content) // 2], content[:-1], content + b"x"):
        (folder / file).write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)


def test_files_of_two_checkpoints_are_refused(tmp_path, folder, checkpoint):
    other = with_config(checkpoint, checkpoint.config)
    save_checkpoint(tmp_path / "other", other)
    (folder / "model.json").write_bytes((tmp_path / "other" / "model.json").read_bytes())
    with pytest.raises(CheckpointError, match="the file was changed"):
        load_checkpoint(folder)


# Records that say something else, with checksums that are right


def test_the_rewritten_record_is_read(folder):
    """What the tests below change is refused for the change, not for the way of writing it."""
    rewrite(folder, {"metrics": {"image_auroc": 0.5}})
    assert load_checkpoint(folder).metrics == {"image_auroc": 0.5}


@pytest.mark.parametrize("version", [0, 1, 2, 99, "3", None, [3]])
def test_another_format_is_refused_by_its_name(folder, version):
    record = json.loads((folder / "model.json").read_bytes())
    (folder / "model.json").write_text(json.dumps(record | {"format": version}))
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(folder)
    assert str(raised.value) == f"{folder / 'model.json'} has format {version!r}: this Hazelnut reads format 4."


@pytest.mark.parametrize("name", sorted(FIELDS - {"format", "record_sha256"}))
def test_a_missing_field_is_refused_by_its_name(folder, name):
    rewrite(folder, {name: None})
    with pytest.raises(CheckpointError, match=f"missing or unknown fields: {name}"):
        load_checkpoint(folder)


def test_an_unknown_field_is_refused_by_its_name(folder):
    rewrite(folder, {"thresholds": [1, 2]})
    with pytest.raises(CheckpointError, match="missing or unknown fields: thresholds"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [b"not JSON", b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"3", b'"format"', b"{}", b"[" * 100_000],
    ids=["text", "empty", "open", "binary", "list", "null", "number", "string", "no format", "deep"],
)
def test_a_record_that_is_not_one_is_refused(folder, content):
    (folder / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json (is not JSON|names no format)"):
        load_checkpoint(folder)


CALIBRATION = {"scores": [[1, 2, 3]] * 19, "alpha": 0.05, "weights": [1, 1, 1], "parts": [], "peaks": None}


def test_the_calibration_that_the_next_test_changes_is_read(folder):
    rewrite(folder, {"calibration": CALIBRATION})
    assert load_checkpoint(folder).calibration.weights == (1, 1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config": {}},
        {"model_config": {"image_size": 32, "depth": 4}},
        {"model_config": {"image_size": 33}},
        {"model_config": {"image_size": "32"}},
        {"model_config": {"image_size": 32, "width": 8.0}},
        {"model_config": {"image_size": 32, "head_width": 12}},
        {"model_config": {"image_size": 64, "tile": 40}},
        {"model_config": [32, 3, 8]},
        {"calibration": {}},
        {"calibration": CALIBRATION | {"scores": [[1, 2]] * 19}},
        {"calibration": CALIBRATION | {"scores": [[1, 2, 3]] * 3}},
        {"calibration": CALIBRATION | {"scores": [[1, 2, 3], [4]]}},
        {"calibration": CALIBRATION | {"scores": [["a", "b", "c"]] * 19}},
        {"calibration": CALIBRATION | {"scores": [[1, 2, float("nan")]] * 19}},
        {"calibration": CALIBRATION | {"alpha": 0.01}},
        {"calibration": CALIBRATION | {"alpha": "5 %"}},
        {"calibration": CALIBRATION | {"weights": []}},
        {"calibration": CALIBRATION | {"weights": [1, 1]}},
        {"calibration": CALIBRATION | {"weights": [0, 0, 0]}},
        {"calibration": CALIBRATION | {"weights": [1, -1, 1]}},
        {"calibration": CALIBRATION | {"weights": [1, 1, float("nan")]}},
        {"calibration": CALIBRATION | {"weights": ["a", "b", "c"]}},
        {"calibration": CALIBRATION | {"weights": 1}},
        {"calibration": CALIBRATION | {"parts": [1, 2, 3]}},
        {"calibration": CALIBRATION | {"parts": ["a"] * 19}},
        {"calibration": CALIBRATION | {"parts": 5}},
        *(
            {"calibration": {key: CALIBRATION[key] for key in CALIBRATION if key != left_out}}
            for left_out in CALIBRATION
        ),
        {"calibration": 5},
        {"weights_sha256": "0" * 64},
        {"weights_sha256": 5},
    ],
    ids=lambda changes: json.dumps(changes)[-60:],
)
def test_a_record_that_describes_no_model_is_refused(folder, changes):
    rewrite(folder, changes)
    with pytest.raises(CheckpointError, match=str(folder)):
        load_checkpoint(folder)


@pytest.mark.parametrize("field", ["width", "latent_dim", "channels", "latent", "batch_norm", "head_width"])
def test_weights_of_another_shape_are_refused(folder, config, field):
    other = {"width": 16, "latent_dim": 5, "channels": 1, "latent": "vector", "batch_norm": "after", "head_width": 16}
    rewrite(folder, {"model_config": {**vars(config), field: other[field]}})
    with pytest.raises(CheckpointError, match="does not describe a model"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("had", "named"), [(8, 0), (0, 8)])
def test_a_head_that_is_missing_or_too_many_is_refused(tmp_path, checkpoint, had, named):
    config = replace(checkpoint.config, head_width=had)
    save_checkpoint(tmp_path / "nut", with_config(checkpoint, config))
    rewrite(tmp_path / "nut", {"model_config": vars(replace(config, head_width=named))})
    with pytest.raises(CheckpointError, match=r"(?s)does not describe a model.*head"):
        load_checkpoint(tmp_path / "nut")


@pytest.mark.parametrize(
    "name",
    [
        "networks.encoder.layers.0.weight",
        "networks.decoder.layers.0.bias",
        "networks.head.last.bias",
        "networks.standardisation.mean",
        "fusion.mean",
        "fusion.high",
        "fusion.weights",
    ],
)
def test_weights_that_are_missing_are_refused_by_their_name(folder, name):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state[name]
    rewrite(folder, {}, weights=safetensors.torch.save(state))
    with pytest.raises(CheckpointError, match=f"(?s)does not describe a model.*{name.removeprefix('networks.')}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["image_discriminator.layers.0.bias", "networks.encoder.layers.99.bias", "networks.tail", "fusion.extra"]
)
def test_weights_that_are_unknown_are_refused_by_their_name(folder, name):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    rewrite(folder, {}, weights=safetensors.torch.save(state | {name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"(?s)does not describe a model.*{name.removeprefix('networks.')}"):
        load_checkpoint(folder)
    # For the weight, not for having been written anew.
    rewrite(folder, {}, weights=safetensors.torch.save(state))
    load_checkpoint(folder)


def test_no_weights_at_all_are_refused(folder):
    rewrite(folder, {}, weights=safetensors.torch.save({}))
    with pytest.raises(CheckpointError, match="does not describe a model"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["mean", "deviation", "low", "high", "weights"])
def test_a_fusion_of_another_number_of_components_is_refused(folder, name):
    """Means of one component would be taken for those of all."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state[f"fusion.{name}"] = state[f"fusion.{name}"][:1].clone()
    rewrite(folder, {}, weights=safetensors.torch.save(state))
    with pytest.raises(CheckpointError, match=r"does not describe a model.*2 component maps"):
        load_checkpoint(folder)


@pytest.mark.parametrize("weights", [b"", b"\x80\x04pickle", b"\xff" * 64, bytes(1000)])
def test_weights_that_are_no_safetensors_are_refused(folder, weights):
    rewrite(folder, {}, weights=weights)
    with pytest.raises(CheckpointError, match="does not describe a model"):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_a_missing_file_is_refused_by_its_name(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read the checkpoint {folder}.*{file}"):
        load_checkpoint(folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "file")


# Saving over what is there


def changed(checkpoint: Checkpoint) -> Checkpoint:
    scores = checkpoint.calibration.scores + 1
    return replace(with_config(checkpoint, checkpoint.config), calibration=Calibration(scores=scores, alpha=0.1))


def test_saving_again_replaces_the_checkpoint(folder, checkpoint):
    save_checkpoint(folder, changed(checkpoint))
    loaded = load_checkpoint(folder)
    assert loaded.calibration.alpha == 0.1
    assert np.array_equal(loaded.calibration.scores, checkpoint.calibration.scores + 1)
    assert [path.name for path in folder.parent.iterdir()] == ["nut"]


@pytest.mark.parametrize("fails", ["weights", "record"])
def test_a_failed_write_leaves_the_old_checkpoint_whole(folder, checkpoint, fails):
    before = files_of(folder)
    weights = len(before["model.safetensors"])
    # A record of twice that size fails after the weights have been written.
    limit, note = (weights // 2, "") if fails == "weights" else (weights, "x" * 2 * weights)
    with largest_file(limit), pytest.raises(CheckpointError, match=f"cannot save the checkpoint {folder}"):
        save_checkpoint(folder, replace(changed(checkpoint), origin={"note": note}))
    assert files_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["nut"]


def test_a_failed_first_write_leaves_nothing(tmp_path, checkpoint):
    with largest_file(1000), pytest.raises(CheckpointError):
        save_checkpoint(tmp_path / "nut", checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_json_leaves_the_old_one_whole(folder, checkpoint):
    before = files_of(folder)
    with pytest.raises(TypeError):
        save_checkpoint(folder, replace(checkpoint, origin={"folder": Path("data")}))
    assert files_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["nut"]


@pytest.mark.parametrize("other", ["notes.txt", "model.pt", ".git"])
def test_a_folder_with_other_files_is_refused_and_left_as_it_was(folder, checkpoint, other):
    (folder / other).write_text("mine")
    before = files_of(folder)
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        save_checkpoint(folder, changed(checkpoint))
    assert files_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["nut"]


def test_a_file_in_the_way_is_refused_and_left_as_it_was(tmp_path, checkpoint):
    path = tmp_path / "nut"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        save_checkpoint(path, checkpoint)
    assert path.read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot save the checkpoint"):
        save_checkpoint(path / "below", checkpoint)
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_folder_is_made_with_its_parents_and_an_empty_one_is_taken(tmp_path, checkpoint):
    save_checkpoint(tmp_path / "runs" / "first" / "checkpoint", checkpoint)
    load_checkpoint(tmp_path / "runs" / "first" / "checkpoint")
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", checkpoint)
    load_checkpoint(tmp_path / "empty")


def test_saving_through_a_link_replaces_what_it_points_to(folder, checkpoint):
    link = folder.with_name("current")
    link.symlink_to(folder)
    save_checkpoint(link, changed(checkpoint))
    assert link.is_symlink()
    assert load_checkpoint(folder).calibration.alpha == 0.1
    assert {path.name for path in folder.parent.iterdir()} == {"nut", "current"}


def test_saving_to_the_current_folder(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_checkpoint(Path(), checkpoint)
    load_checkpoint(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
