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
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from models.calibration import SCORE_NAMES, Calibration, FloatArray
from models.checkpoint import Checkpoint, save_checkpoint
from models.density import FeatureDistance, GoodFeatures
from models.errors import DataError, TrainingDivergedError, TrainingError
from models.files import replace_file
from models.maps import GoodMaps, MapFusion, fusion_weights
from models.networks import ScoringNetworks, SegmentationHead, cells_of, places_of
from models.scoring import outputs, table, windows
from training import metrics
from training.backbone import Backbone, load_backbone
from training.config import Recipe, recipe_from_dict
from training.corruption import corrupt
from training.data import Dataset, load_images, read_dataset
from training.loop import scoring_networks, train
from training.progress import progress_bar
from training.record import Record
from training.split import Split, split_good_images
from training.state import TrainingState

CHECKPOINT = "checkpoint"
SCORING_BATCH = 32
WEIGHT_IMAGES = 256  # training images that the weights of the scores are measured on


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
    another run, or one and not `resume`; DataError for images that do not do.
    """
    if backbone_weights and not recipe.over_features:
        raise TrainingError(f"--backbone-weights is {backbone_weights}: the recipe has features none, no backbone.")
    split = split_images(read_dataset(data), recipe)
    before = read_run(out)
    saved = _read_state(out / "state.pt") if before and resume else None
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
    if before and not resume:
        raise TrainingError(f"{out} holds a run already: --resume goes on with it, --out names another folder.")
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
    fit_distances(networks, training)
    fusion, calibration_of_scores = calibrate(networks, training, calibration, split.parts, recipe)
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


def split_images(dataset: Dataset, recipe: Recipe) -> Split:
    split = split_good_images(dataset, fraction=recipe.calibration_fraction, alpha=recipe.alpha, seed=recipe.seed)
    if len(split.training) < 2:
        raise DataError(f"{len(split.training)} training images in {dataset.root}: at least 2 are needed.")
    return split


@torch.inference_mode()
def fit_distances(networks: ScoringNetworks, pixels: Tensor) -> None:
    """Learn what the head's features are like on good images, uint8 (N, C, S, S): those it was trained on."""
    known = [GoodFeatures(cast(FeatureDistance, distance)) for distance in networks.distances]
    config = networks.config
    for chunk in torch.split(pixels, SCORING_BATCH) if known else ():
        images = networks.standardisation(chunk.to(next(networks.parameters()).device))
        places = places_of(config.image_size, images.device).unsqueeze(0)
        for window in windows(config.image_size, config.side):
            *_, features = networks(networks.see(images[..., *window]), places[..., *window])
            for good, stride, level in zip(known, SegmentationHead.strides(config), features, strict=False):
                good.add(level, *cells_of(window, stride))
    for good in known:
        good.fit()


def calibrate(
    networks: ScoringNetworks, training: Tensor, held_out: Tensor, parts: list[int], recipe: Recipe
) -> tuple[MapFusion, Calibration]:
    """Fit what turns the networks' outputs into verdicts. Images are uint8 (N, C, S, S).

    parts: which part each held-out image shows.

    By the held-out good images: the fusion of the maps, and the scores that p-values are counted from. By synthetic
    defects on training images: the weights of the three scores, so that the held-out images decide nothing that would
    make them look better than the parts to come.
    """
    fusion, fusions_of_the_others = good_maps(networks, held_out).fusions(parts)
    scores = []
    for image, own in zip(torch.split(held_out, 1), fusions_of_the_others, strict=True):
        found = outputs(networks, image)
        scores.append(table(found, own.to(found.maps.device)(found.maps)))
    fusion = fusion.to(next(networks.parameters()).device)
    weights = score_weights(networks, fusion, training[:WEIGHT_IMAGES], recipe)
    return fusion, Calibration(np.concatenate(scores), alpha=recipe.alpha, weights=weights, parts=tuple(parts))


def good_maps(networks: ScoringNetworks, held_out: Tensor) -> GoodMaps:
    """What the fusion is made from, of good images uint8 (N, C, S, S)."""
    good = GoodMaps(fusion_weights(networks.config), networks.config.cell)
    for chunk in torch.split(held_out, SCORING_BATCH):
        good.add(outputs(networks, chunk).maps)
    return good


def score_weights(networks: ScoringNetworks, fusion: MapFusion, pixels: Tensor, recipe: Recipe) -> tuple[float, ...]:
    """How much each score counts, by its AUROC of synthetic defects on these good images."""
    generator = torch.Generator(fusion.mean.device).manual_seed(recipe.seed)
    found: dict[bool, list[FloatArray]] = {False: [], True: []}
    for chunk in torch.split(pixels, SCORING_BATCH):
        images = networks.standardisation(chunk.to(fusion.mean.device))
        damaged, _ = corrupt(images, probability=1.0, generator=generator)
        damaged_pixels = networks.standardisation.pixels(damaged)
        for anomalous, batch in ((False, chunk), (True, damaged_pixels)):
            found_outputs = outputs(networks, batch)
            found[anomalous].append(table(found_outputs, fusion(found_outputs.maps)))
    good, bad = (np.concatenate(found[anomalous]) for anomalous in (False, True))
    labels = np.repeat([False, True], len(good))
    return weights_of(
        [
            metrics.image_auroc(labels, np.concatenate([good[:, index], bad[:, index]]))
            for index in range(len(SCORE_NAMES))
        ]
    )


def weights_of(aurocs: list[float]) -> tuple[float, ...]:
    """How far each AUROC is above chance, as a share of the best of them, to the eighth power: a weak score would add
    more of its noise to a strong one than it knows.

    Plus 0.001: synthetic defects are not all defects, and no score is to be without a say.
    """
    above = [max(auroc - 0.5, 0.0) for auroc in aurocs]
    best = max(*above, 1e-9)
    return tuple((share / best) ** 8 + 0.001 for share in above)


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


def _continued(before: Run, run: Run, out: Path) -> Run:
    changed = [key for key, value in run.recipe.items() if before.recipe.get(key) != value]
    if changed:
        raise TrainingError(f"the run in {out} has another recipe ({', '.join(changed)} differ): start a new run.")
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
