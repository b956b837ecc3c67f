"""What training would do, from a few real steps; nothing is written."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from models.networks import parameter_count
from training.config import Recipe
from training.data import load_images, read_dataset
from training.loop import train
from training.progress import peak_memory_bytes
from training.run import split_images
from training.state import TrainingState

STEPS = 9  # the first warms up; the eight after it hold two with adversaries, where these take part in every fourth
SAMPLE = 64  # images that are read for it


def dry_run(data: Path, *, recipe: Recipe, device: torch.device, console: Console, progress: Console) -> None:
    """Print the resolved recipe, the splits, the parameter counts and an estimate of time and memory."""
    dataset = read_dataset(data)
    split = split_images(dataset, recipe, progress)
    console.print("[bold]recipe")
    for key, value in asdict(recipe).items():
        console.print(f"  {key} = {json.dumps(value)}", highlight=False)

    console.print("[bold]images")
    counts = f"{len(split.training)} training, {len(split.calibration)} calibration, {len(dataset.test)} test"
    console.print(f"  {counts}")

    sample = load_images(split.training[:SAMPLE], channels=recipe.channels, size=recipe.image_size)
    state = TrainingState(recipe, sample, device=device)
    console.print("[bold]parameters")
    networks = {
        "encoder": state.networks.encoder,
        "decoder": state.networks.decoder,
        "segmentation_head": state.networks.head,
        "latent_discriminator": state.latent_discriminator,
        "image_discriminator": state.image_discriminator,
    }
    for name, network in networks.items():
        if network is not None:
            console.print(f"  {name} {parameter_count(network):,}")

    ends: list[float] = []
    train(state, replace(recipe, steps=STEPS), lambda _: ends.append(time.perf_counter()))
    minutes = (ends[-1] - ends[0]) / (STEPS - 1) * recipe.steps / 60
    kept = sample[0].nbytes
    if state.batches.directions is not None:
        kept += state.batches.directions[0].nbytes
    unread = len(split.training) - len(sample)
    memory = (peak_memory_bytes(device) + unread * kept) / 2**30
    console.print("[bold]estimate")
    console.print(f"  {minutes:.1f} minutes for {recipe.steps} steps on {device.type}, {memory:.2f} GiB at the peak")
