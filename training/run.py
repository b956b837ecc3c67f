"""A training run is a folder: what was asked (run.json), how it goes (training/record.py), where it stands (state.pt)
and, at the end, the checkpoint. Killed at any moment, it goes on from its last state.
"""

import io
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.calibration import SCORE_NAMES, Calibration
from models.checkpoint import Checkpoint, save_checkpoint
from models.errors import DataError, TrainingDivergedError, TrainingError
from models.files import replace_file
from models.maps import MapFusion
from training.backbone import Backbone, load_backbone
from training.calibrating import calibrate, fit_distances
from training.config import Recipe, recipe_from_dict
from training.data import Dataset, is_searched, load_images, read_dataset
from training.loop import scoring_networks, train
from training.progress import progress_bar
from training.record import Record
from training.split import Split, split_good_images
from training.state import TrainingState

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Run:
    """What a run was asked to do; run.json. `command` is what reproduces it."""

    recipe: dict[str, Any]
    name: str
    training_images_sha256: str
    command: str
    backbone: dict[str, str] | None = None  # where its weights came from, and their sha256


def train_folder(
    data: Path,
    out: Path,
    *,
    recipe: Recipe,
    resume: bool,
    device: torch.device,
    command: str,
    console: Console,
    backbone_weights: Path | None = None,
) -> Path:
    """Train on a folder of images, from the start or from where the run in `out` stands.

    backbone_weights: see training.backbone. Returns the checkpoint's folder. Raises TrainingError if `out` holds
    another run, or one and not `resume`, or lies where good images are looked for; DataError for images that do not do.
    """
    if backbone_weights and not recipe.over_features:
        raise TrainingError(f"--backbone-weights is {backbone_weights}: the recipe has features none, no backbone.")
    # What needs no image read is refused first.
    before = read_run(out)
    if before and not resume:
        raise TrainingError(f"{out} holds a run already: --resume goes on with it, --out names another folder.")
    if before:
        _check_recipe(before, recipe, out)
    dataset = read_dataset(data)
    if is_searched(out, data):
        raise TrainingError(
            f"{out} lies in {data}, where its pictures would be taken for good images: --out names a folder outside."
        )
    split = split_images(dataset, recipe, console)
    saved = _read_state(out / "state.pt") if before else None
    backbone = None
    if recipe.over_features:
        if before and saved and not backbone_weights:
            backbone = _kept_backbone(before, saved)
        else:
            backbone = load_backbone(recipe.features, backbone_weights)
    run = Run(
        recipe=asdict(recipe),
        name=data.resolve().name,
        training_images_sha256=split.fingerprint,
        command=command,
        backbone=backbone.record if backbone else None,
    )
    if before:
        run = _continued(before, run, out)
    elif resume:
        console.print(f"no run in {out} yet: starting at step 0.", highlight=False)
    with progress_bar(console) as bar:
        task = bar.add_task("reading images", total=len(split.training) + len(split.calibration), detail="")
        training, calibration = (
            load_images(paths, channels=recipe.channels, size=recipe.image_size, advance=lambda: bar.advance(task))
            for paths in (split.training, split.calibration)
        )
    begin = time.perf_counter()
    state = TrainingState(recipe, training, device=device, backbone=backbone.weights if backbone else None)
    if state.batches.directions is not None:
        kept = state.batches.directions
        console.print(
            f"features of {len(kept)} images computed once: {time.perf_counter() - begin:.0f} s, "
            f"{kept.nbytes / 2**20:.0f} MiB in memory",
            highlight=False,
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "run.json", json.dumps(asdict(run), indent=1).encode())
        if saved is not None:
            _load_state(out / "state.pt", saved, state)
        with Record(out, state, recipe, console) as record:
            _train(state, recipe, out, record, console)
            networks = scoring_networks(state, recipe)
            record.interpolations(networks)
    except OSError as error:
        raise TrainingError(f"cannot write the run {out}: {error}; --resume goes on from its last state.") from error
    with console.status(f"calibrating by {len(calibration)} held-out good images"):
        fit_distances(networks, training)
        fusion, calibration_of_scores = calibrate(networks, training, calibration, split.parts, recipe)
    console.print(_chosen(fusion, calibration_of_scores), highlight=False)
    origin = {**asdict(run), "training_images": len(training)}
    save_checkpoint(
        out / CHECKPOINT,
        Checkpoint(
            networks=networks,
            fusion=fusion,
            calibration=calibration_of_scores,
            origin=origin,
            metrics={},
        ),
    )
    return out / CHECKPOINT


def _chosen(fusion: MapFusion, calibration: Calibration) -> str:
    """What this product chose, in a sentence: see training/calibrating.py."""
    as_they_are, by_place = fusion.weights.view(2, -1).sum(dim=1).tolist()
    whole = sum(calibration.weights)
    shares = (f"{name} {weight / whole:.0%}" for name, weight in zip(SCORE_NAMES, calibration.weights, strict=True))
    return (
        f"by defects drawn on good images, {by_place / (as_they_are + by_place):.0%} of the map compares by place, and "
        f"the anomaly score is {', '.join(shares)}"
    )


def split_images(dataset: Dataset, recipe: Recipe, console: Console) -> Split:
    split = split_good_images(
        dataset, fraction=recipe.calibration_fraction, alpha=recipe.alpha, seed=recipe.seed, console=console
    )
    if len(split.training) < 2:
        raise DataError(f"{len(split.training)} training images in {dataset.root}: at least 2 are needed.")
    return split


def recipe_of(out: Path) -> Recipe:
    """The recipe of the run in a folder. Raises TrainingError if there is none."""
    run = read_run(out)
    if run is None:
        raise TrainingError(f"there is no run in {out}.")
    return recipe_from_dict(run.recipe)


def read_run(out: Path) -> Run | None:
    """What the run in a folder was asked to do; None if there is no run. Raises TrainingError."""
    path = out / "run.json"
    if not path.exists():
        # A run that was killed at once leaves no more than a hidden, half-written file.
        if out.exists() and (not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir())):
            raise TrainingError(f"{out} exists and is not a run: --out names another folder.")
        return None
    try:
        return Run(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} does not describe a run: {error}.") from error


def _check_recipe(before: Run, recipe: Recipe, out: Path) -> None:
    changed = [key for key, value in asdict(recipe).items() if before.recipe.get(key) != value]
    if changed:
        raise TrainingError(f"the run in {out} has another recipe ({', '.join(changed)} differ): start a new run.")


def _continued(before: Run, run: Run, out: Path) -> Run:
    if before.training_images_sha256 != run.training_images_sha256:
        raise TrainingError(f"the run in {out} was trained on other images: start a new run.")
    if (before.backbone or {}).get("sha256") != (run.backbone or {}).get("sha256"):
        raise TrainingError(f"the run in {out} has a backbone with other weights: start a new run.")
    return before


def _train(state: TrainingState, recipe: Recipe, out: Path, record: Record, console: Console) -> None:
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=state.step, detail="")

        def after_step(losses: dict[str, float]) -> None:
            shown = record.after_step(losses)
            if shown is not None:
                bar.update(task, detail=shown)
            if state.step % recipe.save_every == 0 or state.step == recipe.steps:
                _write_state(out / "state.pt", state)
            bar.update(task, completed=state.step)

        train(state, recipe, after_step)


def _write_state(path: Path, state: TrainingState) -> None:
    # A step may break the weights although its losses were finite; such a state must not replace the last good one.
    if not all(torch.isfinite(parameter).all() for parameter in state.averaged.parameters()):
        raise TrainingDivergedError(f"a weight is not finite at step {state.step}: a smaller learning rate may help.")
    content = io.BytesIO()
    torch.save(state.state_dict(), content)
    replace_file(path, content.getvalue())


def _read_state(path: Path) -> dict[str, Any] | None:
    """None if there is none yet."""
    if not path.exists():
        return None
    with _unreadable(path):
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return saved


def _load_state(path: Path, saved: dict[str, Any], state: TrainingState) -> None:
    with _unreadable(path, f", or was written on another kind of device than {state.generator.device.type}"):
        state.load_state_dict(saved)


@contextmanager
def _unreadable(path: Path, otherwise: str = "") -> Iterator[None]:
    try:
        yield
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} cannot be read{otherwise}: {error}.") from error


def _kept_backbone(run: Run, saved: dict[str, Any]) -> Backbone:
    """That of a run that goes on: its state holds the weights."""
    prefix, record = "features.network.", run.backbone or {}
    weights = {key.removeprefix(prefix): value for key, value in saved["networks"].items() if key.startswith(prefix)}
    return Backbone(weights, record.get("weights", ""), record.get("sha256", ""))
