"""hazelnut demo: the whole way on parts that the program draws, in about a minute on two cores."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from models.checkpoint import load_checkpoint, save_checkpoint
from training.config import load_recipe
from training.data import read_dataset
from training.demo import write_demo
from training.evaluation import evaluate_folder, pictures_folder, print_report, without_details, write_report
from training.inference import ScoredImage, score_images, write_overlay
from training.run import train_folder

SEED = 0


def run_demo(out: Path, *, device: torch.device, command: str, progress: Console, console: Console) -> Path:
    """Draw, train, evaluate, write overlays; returns the checkpoint's folder. What is there already is kept."""
    parts = out / "gears"
    if not parts.exists():
        unfinished = out / ".gears.new"  # a demo that was stopped while it drew is not taken for a whole one
        shutil.rmtree(unfinished, ignore_errors=True)
        write_demo(unfinished, seed=SEED)
        unfinished.rename(parts)
    checkpoint_folder = train_folder(
        parts,
        out / "run",
        recipe=load_recipe("tiny", []),
        resume=(out / "run").exists(),
        device=device,
        command=command,
        console=progress,
    )
    checkpoint = load_checkpoint(checkpoint_folder)
    scorer = checkpoint.scorer(device)
    evaluation = out / "run" / "evaluation.json"
    report = evaluate_folder(
        scorer, parts, alpha=None, command=command, console=progress, pictures=pictures_folder(evaluation)
    )
    save_checkpoint(checkpoint_folder, replace(checkpoint, metrics=without_details(report)))
    write_report(report, evaluation)
    print_report(report, console)
    level = scorer.calibration.map_level(scorer.calibration.alpha)
    test = [image.path for image in read_dataset(parts).test]
    for result in score_images(scorer, test):
        assert isinstance(result, ScoredImage)  # the program drew it
        relative = result.path.relative_to(parts / "test")
        write_overlay(result, out / "overlays" / relative, level=level)
    console.print(f"overlays: {out / 'overlays'}", highlight=False)
    console.print(f"checkpoint: {checkpoint_folder}", highlight=False)
    return checkpoint_folder
