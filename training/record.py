"""What a run writes down while it trains: log.jsonl, findings.jsonl, pictures/ and tensorboard/."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from models.files import replace_file
from models.networks import ScoringNetworks
from training import pictures
from training.config import Recipe
from training.diagnostics import DIAGNOSE_EVERY, IMAGES, LOG_EVERY, Finding, Watch, fixed_images, measure
from training.state import TrainingState


class Record:
    """Goes on after the state's step: what was written of later steps is forgotten, as they will be taken again."""

    def __init__(self, out: Path, state: TrainingState, recipe: Recipe, console: Console) -> None:
        self.out, self.state, self.recipe, self.console = out, state, recipe, console
        self.watch = Watch(recipe)
        for line in _forget_steps_after(out / "log.jsonl", state.step):
            self.watch.see(line)
        _forget_steps_after(out / "findings.jsonl", state.step)
        images, _ = fixed_images(state, recipe, IMAGES)
        self.seen = state.networks.see(images)
        self.latest: dict[str, float] = {}  # the adversaries' losses are not those of every step
        self.last = (state.step, time.perf_counter())
        self.writer = SummaryWriter(out / "tensorboard", purge_step=state.step + 1)
        (out / "pictures").mkdir(exist_ok=True)
        for picture in (out / "pictures").glob("step-*.png"):
            if int(picture.stem.removeprefix("step-")) > state.step:
                picture.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.writer.close()

    def after_step(self, losses: dict[str, float]) -> str | None:
        """Write down what this step asks for; returns a line for the terminal if there is a new one."""
        step = self.state.step
        last = step == self.recipe.steps
        self.latest.update(losses)
        shown = None
        if step % LOG_EVERY == 0 or last:
            now = time.perf_counter()
            rate = (step - self.last[0]) * self.state.batches.batch_size / (now - self.last[1])
            self.last = (step, now)
            line = {"step": step, "images_per_second": round(rate, 1), **self.latest}
            if step % DIAGNOSE_EVERY == 0 or last:
                line |= measure(self.state, self.recipe, self.seen)
            self._log(line)
            shown = _shown(rate, self.latest)
        if pictures.is_drawn(step, self.recipe):
            self._keep("step", pictures.draw_step(self.state, self.recipe), f"step-{step:06}")
        return shown

    def interpolations(self, networks: ScoringNetworks) -> None:
        """Draw those of the networks that score."""
        picture = pictures.draw_interpolations(networks, self.state, self.recipe)
        self._keep("interpolations", picture, "interpolations")

    def _log(self, line: dict[str, Any]) -> None:
        _append(self.out / "log.jsonl", line)
        for name, value in line.items():
            if name not in ("step", "images_per_second"):
                self.writer.add_scalar(name, value, line["step"])
        for finding in self.watch.see(line):
            _append(self.out / "findings.jsonl", asdict(finding))
            self.writer.add_text(f"finding/{finding.name}", finding.message, finding.step)
            self._warn(finding)
        self.writer.flush()  # else TensorBoard lags two minutes behind

    def _warn(self, finding: Finding) -> None:
        self.console.print(f"[yellow]step {finding.step}:[/] {finding.message}", highlight=False, soft_wrap=True)

    def _keep(self, tag: str, picture: Image.Image, name: str) -> None:
        picture.save(self.out / "pictures" / f"{name}.png")
        self.writer.add_image(tag, np.asarray(picture), self.state.step, dataformats="HWC")
        self.writer.flush()


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _shown(rate: float, losses: dict[str, float]) -> str:
    # A narrow terminal cuts the end off.
    first = sorted(losses, key=lambda name: name != "reconstruction")
    return f"{rate:.0f} images/s  " + "  ".join(f"{name} {losses[name]:.3g}" for name in first)


def _forget_steps_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was written after the state was saved, and return the rest. The last line may be torn."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if entry["step"] <= step:
            kept.append(entry)
    replace_file(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return kept
