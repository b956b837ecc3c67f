"""Scoring by CUDA graphs: what can be recorded, and that what is recorded says the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.checkpoint import Checkpoint
from models.graphs import SIZES, GraphedScorer
from models.networks import ScoringNetworks, Standardisation
from models.scoring import Scorer

# What brings a constant to the device or a value from it, or makes a shape that depends on values.
NOT_TO_BE_RECORDED = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "item", "_pin_memory"}


class Operations(TorchDispatchMode):
    """The names of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@contextmanager
def operations() -> Iterator[set[str]]:
    with Operations() as seen:
        yield seen.names


def pixels_of(scorer: Scorer, count: int, *, seed: int = 0) -> Tensor:
    config = scorer.config
    shape = count, config.channels, config.image_size, config.image_size
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", ["none", "resnet18"])
def test_what_the_device_computes_can_be_recorded(checkpoint: Checkpoint, features):
    if features != "none":
        networks = ScoringNetworks(replace(checkpoint.config, features=features), Standardisation()).eval()
        checkpoint = replace(checkpoint, networks=networks)
    scorer = checkpoint.scorer(torch.device("cpu"))
    pixels = pixels_of(scorer, 2)
    scorer.compute(pixels)  # as the warm-up does: constants are made once
    with operations() as names:
        scorer.compute(pixels)
    assert "conv2d" in names
    assert not names & NOT_TO_BE_RECORDED


def test_operations_that_cannot_be_recorded_would_be_seen():
    with torch.inference_mode(), operations() as names:
        constant = torch.ones(2).new_tensor([1.0, 0.0])
        float(constant.sum())
        constant.nonzero()
    assert {"lift_fresh", "item", "nonzero"} <= names


def test_training_can_use_what_scoring_made_first(checkpoint: Checkpoint):
    from models.maps import _prewitt, gradient_magnitude_similarity

    _prewitt.cache_clear()
    scorer = checkpoint.scorer(torch.device("cpu"))
    scorer.compute(pixels_of(scorer, 1))
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    gradient_magnitude_similarity(images, torch.rand(1, 3, 32, 32)).mean().backward()
    assert images.grad is not None


def test_sizes_fall_to_one_so_that_every_batch_has_one_it_fits_in():
    assert list(SIZES) == sorted(SIZES, reverse=True)
    assert SIZES[-1] == 1


@pytest.fixture
def on_gpu(checkpoint: Checkpoint) -> Scorer:
    return checkpoint.scorer(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_a_recorded_batch_has_the_scores_of_one_that_is_not(on_gpu: Scorer, count: int):
    recorded = GraphedScorer(on_gpu)
    for seed in range(2):  # the second finds the first's images where it is padded
        pixels = pixels_of(on_gpu, count, seed=seed)
        wanted, scores = on_gpu.score(pixels), recorded.begin(pixels).result()
        assert scores.scores == pytest.approx(wanted.scores, abs=1e-4)
        assert scores.maps == pytest.approx(wanted.maps, abs=1e-4)
        assert scores.p_value == pytest.approx(wanted.p_value)


@pytest.mark.gpu
def test_batches_under_way_at_the_same_time_keep_apart(on_gpu: Scorer):
    recorded = GraphedScorer(on_gpu)
    batches = [pixels_of(on_gpu, 1 + number % 5, seed=number) for number in range(40)]
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        under_way = recorded.begin(first), recorded.begin(second)
        for pixels, begun in zip((first, second), under_way, strict=True):
            scores = begun.result()
            assert begun.done()
            assert scores.scores == pytest.approx(on_gpu.score(pixels).scores, abs=1e-4)


@pytest.mark.gpu
def test_more_images_than_were_recorded_are_refused_as_too_much_for_the_memory(on_gpu: Scorer):
    with pytest.raises(torch.OutOfMemoryError, match="not for 17"):
        GraphedScorer(on_gpu).begin(pixels_of(on_gpu, 17))
