"""What a run left in its folder, read for reports: no network is run, and no image of the data is needed."""

import json
import re
import statistics
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from models.checkpoint import RECORD_FILE
from models.errors import TrainingError
from training.config import RECIPES, recipe_names
from training.run import CHECKPOINT, Run, read_run


@dataclass(frozen=True, eq=False)
class RunFolder:
    """log, findings: an object per line of log.jsonl and findings.jsonl. evaluation: None before `hazelnut evaluate`.
    record: model.json of the checkpoint, None before the last step.
    """

    folder: Path
    run: Run
    log: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    record: dict[str, Any] | None

    @cached_property
    def recipe(self) -> tuple[str, dict[str, Any]]:
        """The recipe that comes nearest, and what differs from it, the seed aside."""
        distances = {}
        for name in recipe_names():
            values = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
            recipe = self.run.recipe.items()
            distances[name] = {key: value for key, value in recipe if key != "seed" and values.get(key) != value}
        nearest = min(distances, key=lambda name: len(distances[name]))
        return nearest, distances[nearest]

    @property
    def step(self) -> int:
        """The last that was logged."""
        return int(self.log[-1]["step"]) if self.log else 0

    @property
    def watched(self) -> bool:
        """Whether diagnostics were logged: their names have a slash."""
        return any("/" in name for entry in self.log for name in entry)

    @property
    def minutes(self) -> float | None:
        """Of the steps alone, so that a run that was resumed does not look shorter."""
        rates = [entry["images_per_second"] for entry in self.log if entry.get("images_per_second")]
        return self.step * self.run.recipe["batch_size"] / statistics.median(rates) / 60 if rates else None

    @property
    def grids(self) -> list[tuple[int, Path]]:
        """Pictures by the step that they were made at."""
        named = [(re.fullmatch(r"step-(\d+)", path.stem), path) for path in (self.folder / "pictures").glob("*.png")]
        return sorted((int(match[1]), path) for match, path in named if match)

    @property
    def interpolations(self) -> Path | None:
        path = self.folder / "pictures" / "interpolations.png"
        return path if path.exists() else None


def read_run_folder(folder: Path) -> RunFolder:
    """Raises TrainingError for a folder that holds no run, or files that are not what a run writes."""
    run = read_run(folder)
    if run is None:
        raise TrainingError(f"there is no run in {folder}.")
    return RunFolder(
        folder=folder,
        run=run,
        log=_lines(folder / "log.jsonl"),
        findings=_lines(folder / "findings.jsonl"),
        evaluation=_object(folder / "evaluation.json"),
        record=_object(folder / CHECKPOINT / RECORD_FILE),
    )


def _object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{path} holds no JSON object.")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The last line of a run that goes on, or was killed, may be torn."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
