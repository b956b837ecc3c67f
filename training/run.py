"""A training run is a folder: what was asked (run.json), how it goes (log.jsonl, tensorboard/), where it stands
(state.pt) and, at the end, the checkpoint. Killed at any moment, it goes on from its last state.
"""

import io
import json
import pickle
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from models.calibration import Calibration
from models.checkpoint import Checkpoint, save_checkpoint
from models.errors import DataError, TrainingDivergedError, TrainingError
from models.files import replace_file
from models.scoring import raw_scores
from training.config import Recipe
from training.data import Dataset, Split, load_images, read_dataset, split_good_images
from training.loop import TrainingState, scoring_networks, train
from training.progress import progress_bar

CHECKPOINT = "checkpoint"
LOG_EVERY = 10  # steps between two lines of log.jsonl
SCORING_BATCH = 32


@dataclass(frozen=True)
class Run:
    """What a run was asked to do; run.json. `command` is what reproduces it."""

    recipe: dict[str, Any]
    name: str
    training_images_sha256: str
    command: str


def train_folder(
    data: Path, out: Path, *, recipe: Recipe, resume: bool, device: torch.device, command: str, console: Console
) -> Path:
    """Train on a folder of images, from the start or from where the run in `out` stands.

    Returns the checkpoint's folder. Raises TrainingError if `out` holds another run, or one and not `resume`;
    DataError for images that do not do.
    """
    split = split_images(read_dataset(data), recipe)
    run = Run(
        recipe=asdict(recipe),
        name=data.resolve().name,
        training_images_sha256=split.fingerprint,
        command=command,
    )
    before = read_run(out)
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
    state = TrainingState(recipe, training, device=device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "run.json", json.dumps(asdict(run), indent=1).encode())
        if (out / "state.pt").exists():
            _load_state(out / "state.pt", state)
        _train_and_log(state, recipe, out, console)
    except OSError as error:
        raise TrainingError(f"cannot write the run {out}: {error}; --resume goes on from its last state.") from error
    encoder, decoder = scoring_networks(state)
    origin = {**asdict(run), "training_images": len(training)}
    save_checkpoint(
        out / CHECKPOINT,
        Checkpoint(
            config=recipe.model_config(),
            encoder=encoder,
            decoder=decoder,
            calibration=calibrate(encoder, decoder, calibration, alpha=recipe.alpha),
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


def calibrate(encoder: nn.Module, decoder: nn.Module, pixels: Tensor, *, alpha: float) -> Calibration:
    """Score the held-out good images, uint8 (N, C, S, S)."""
    scores = [raw_scores(encoder, decoder, chunk).scores for chunk in torch.split(pixels, SCORING_BATCH)]
    return Calibration(scores=np.concatenate(scores), alpha=alpha)


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
    return before


def _train_and_log(state: TrainingState, recipe: Recipe, out: Path, console: Console) -> None:
    log_path = out / "log.jsonl"
    _forget_steps_after(log_path, state.step)
    writer = SummaryWriter(out / "tensorboard", purge_step=state.step + 1)
    last = (state.step, time.perf_counter())
    with progress_bar(console) as bar, log_path.open("a") as log, writer:
        task = bar.add_task("training", total=recipe.steps, completed=state.step, detail="")

        def after_step(losses: dict[str, float]) -> None:
            nonlocal last
            step = state.step
            if step % LOG_EVERY == 0 or step == recipe.steps:
                now = time.perf_counter()
                rate = (step - last[0]) * state.batches.batch_size / (now - last[1])
                last = (step, now)
                log.write(json.dumps({"step": step, "images_per_second": round(rate, 1), **losses}) + "\n")
                log.flush()
                for name, value in losses.items():
                    writer.add_scalar(name, value, step)
                bar.update(task, detail=_shown(rate, losses))
            if step % recipe.save_every == 0 or step == recipe.steps:
                _write_state(out / "state.pt", state)
            bar.update(task, completed=step)

        train(state, recipe, after_step)


def _shown(rate: float, losses: dict[str, float]) -> str:
    # A narrow terminal cuts the end off.
    first = sorted(losses, key=lambda name: name != "reconstruction")
    return f"{rate:.0f} images/s  " + "  ".join(f"{name} {losses[name]:.3g}" for name in first)


def _forget_steps_after(log: Path, step: int) -> None:
    """Drop what was logged after the state was saved: it will be logged again. The last line may be torn."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if entry["step"] <= step:
            kept.append(line + "\n")
    replace_file(log, "".join(kept).encode())


def _write_state(path: Path, state: TrainingState) -> None:
    # A step may break the weights although its losses were finite; such a state must not replace the last good one.
    if not all(torch.isfinite(parameter).all() for parameter in state.averaged.parameters()):
        raise TrainingDivergedError(f"a weight is not finite at step {state.step}: a smaller learning rate may help.")
    content = io.BytesIO()
    torch.save(state.state_dict(), content)
    replace_file(path, content.getvalue())


def _load_state(path: Path, state: TrainingState) -> None:
    try:
        state.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        device = state.generator.device.type
        raise TrainingError(
            f"{path} cannot be read, or was written on another kind of device than {device}: {error}."
        ) from error
