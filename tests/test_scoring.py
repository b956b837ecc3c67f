"""The anomaly map, the three scores, and that an image's score is its own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.calibration import SCORE_NAMES
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.errors import ConfigError
from models.networks import Decoder, Encoder
from models.scoring import (
    GRADIENT_CONSTANT,
    Region,
    Scorer,
    choose_device,
    gradient_magnitude_similarity,
    latent_score,
    normalise,
    raw_scores,
    regions,
    residual_map,
    resize_map,
)

CPU = torch.device("cpu")


def images_of(count: int, *, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pixels_of(count: int, *, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture
def scorer(checkpoint: Checkpoint) -> Scorer:
    """Networks whose batch norms hold statistics of their own, as after training."""
    with torch.no_grad():
        for seed in range(3):
            images = normalise(pixels_of(8, seed=100 + seed))
            checkpoint.decoder.train()(checkpoint.encoder.train()(images))
    return checkpoint.scorer(CPU)


# Gradient magnitude similarity and the map


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_magnitude_similarity_is_one_for_equal_images(channels):
    images = images_of(2, channels=channels)
    similarity = gradient_magnitude_similarity(images, images)
    assert similarity.shape == (2, 1, 32, 32)
    assert torch.allclose(similarity, torch.ones_like(similarity), atol=1e-6)


def test_gradient_magnitude_similarity_is_symmetric_and_in_its_range():
    first, second = images_of(4), images_of(4, seed=1)
    similarity = gradient_magnitude_similarity(first, second)
    assert similarity.min() > 0
    assert similarity.min() < 0.5  # two noise images differ: the range is used
    assert similarity.max() <= 1 + 1e-6
    assert torch.equal(similarity, gradient_magnitude_similarity(second, first))


def test_gradient_magnitude_similarity_ignores_a_shift_in_brightness():
    images = images_of(2) / 2
    assert torch.allclose(gradient_magnitude_similarity(images, images + 0.3), torch.ones(2, 1, 32, 32), atol=1e-4)


def test_gradient_magnitude_similarity_of_a_ramp_and_a_flat_image_is_the_closed_form():
    ramp = torch.linspace(-1, 1, 33).expand(1, 1, 33, 33)  # the gray level in [0, 1] rises by 1/32 per column
    similarity = gradient_magnitude_similarity(ramp, torch.zeros_like(ramp))[0, 0]
    # The Prewitt operator spans two columns and sums three rows of a third each.
    slope = 2 / 32
    expected = GRADIENT_CONSTANT / (slope**2 + GRADIENT_CONSTANT)  # 0.40
    # A flat image's magnitude is 1e-4, not 0: that is where the tolerance comes from.
    assert torch.allclose(similarity[:, 1:-1], torch.full((33, 31), expected), atol=3e-3)
    # The same turned by a quarter: neither direction is favoured.
    turned = gradient_magnitude_similarity(ramp.mT, torch.zeros_like(ramp))[0, 0]
    assert torch.allclose(turned, similarity.T, atol=1e-6)


@pytest.mark.parametrize("size", [32, 48, 112])
def test_residual_map_of_equal_images_is_zero(size):
    images = images_of(2, size=size)
    maps = residual_map(images, images)
    assert maps.shape == (2, size, size)
    assert maps.abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_residual_map_stays_in_its_range(channels):
    black, white = -torch.ones(1, channels, 32, 32), torch.ones(1, channels, 32, 32)
    for first, second in [(images_of(4, channels=channels), images_of(4, channels=channels, seed=1)), (black, white)]:
        maps = residual_map(first, second)
        assert maps.min() >= 0
        assert maps.max() <= 2
    # No edges at all, and the largest difference of intensity.
    assert torch.allclose(residual_map(black, white), torch.ones(1, 32, 32), atol=1e-5)


@pytest.mark.parametrize("difference", [1e-7, 1e-6, 1e-5])
def test_residual_map_of_nearly_equal_images_is_not_negative(difference):
    """In float32 a similarity can round to just above one."""
    images = images_of(32)
    assert residual_map(images, images + difference * images_of(32, seed=1)).min() >= 0


@pytest.mark.parametrize(("row", "column"), [(20, 9), (0, 0), (31, 31), (0, 17)])
def test_residual_map_peaks_where_the_defect_is(row, column):
    images = torch.zeros(1, 3, 32, 32)
    defect = images.clone()
    defect[..., row, column] = 1
    peak = int(residual_map(defect, images)[0].argmax())
    # At the border itself a slope is half as steep, as the row outside repeats the last one.
    assert abs(peak // 32 - row) <= 1
    assert abs(peak % 32 - column) <= 1


def test_residual_map_is_higher_at_a_defect_than_far_from_it():
    images = torch.zeros(1, 3, 128, 128)
    defect = images.clone()
    defect[..., 60:70, 60:70] = 0.8
    maps = residual_map(defect, images)[0]
    assert maps[60:70, 60:70].min() > 0.1
    assert maps[:40].max() < 1e-6


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.4), (-1.0, 1.0)])
def test_residual_map_of_two_flat_images_has_no_border(first, second):
    maps = residual_map(torch.full((1, 3, 64, 64), first), torch.full((1, 3, 64, 64), second))
    assert torch.allclose(maps, torch.full_like(maps, abs(first - second) / 2), atol=1e-5)


def test_residual_map_adds_the_difference_to_the_mean_over_three_scales():
    """A ramp rebuilt as flat gray: pooling doubles its slope per pixel from scale to scale."""
    column = 16
    ramp = torch.linspace(-1, 1, 65)[:-1].expand(1, 3, 64, 64)  # the gray level rises by 1/64 per column
    changes = [1 - GRADIENT_CONSTANT / ((2 / 64 * 2**scale) ** 2 + GRADIENT_CONSTANT) for scale in range(3)]
    expected = abs(float(ramp[0, 0, 0, column])) / 2 + sum(changes) / 3
    assert float(residual_map(ramp, torch.zeros_like(ramp))[0, 32, column]) == pytest.approx(expected, abs=0.01)


def test_residual_map_has_a_defect_in_its_middle_at_every_scale():
    images = torch.zeros(1, 3, 64, 64)
    defect = images.clone()
    defect[..., 8:16, 48:56] = 0.1
    weights = residual_map(defect, images)[0].double()
    positions = torch.arange(64, dtype=torch.float64)
    row, column = (weights.sum(dim=axis) @ positions / weights.sum() for axis in (1, 0))
    assert float(row) == pytest.approx(11.5, abs=0.05)
    assert float(column) == pytest.approx(51.5, abs=0.05)


def test_residual_map_sees_a_defect_of_colour_alone():
    images = torch.zeros(1, 3, 32, 32)
    defect = images.clone()
    defect[:, 0, 10:20, 10:20], defect[:, 1, 10:20, 10:20] = 0.5, -0.5  # as bright as before
    maps = residual_map(defect, images)[0]
    assert maps[14, 14] > 0.1
    assert maps[0, 0] < 1e-3


# Scores


def test_latent_score_at_the_origin_is_half_the_log_of_two_pi():
    assert torch.allclose(latent_score(torch.zeros(2, 4, 3, 3)), torch.full((2,), math.log(2 * math.pi) / 2))


@pytest.mark.parametrize("shape", [(5, 8, 1, 1), (5, 4, 3, 3)])
def test_latent_score_is_the_normal_distributions_negative_log_likelihood(shape):
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(codes).flatten(1).mean(dim=1)
    assert torch.allclose(latent_score(codes), expected, atol=1e-6)


def test_latent_score_of_the_prior_is_its_entropy():
    codes = torch.randn(1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float(latent_score(codes)) == pytest.approx(math.log(2 * math.pi * math.e) / 2, abs=0.01)


def test_normalise_maps_the_ends_of_the_range():
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert normalise(torch.tensor([7], dtype=torch.uint8)).dtype == torch.float32


class Constant(nn.Module):
    """A network that answers the same whatever it is shown. The parameter tells its device."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, batch: Tensor) -> Tensor:
        return self.answer.expand(len(batch), -1, -1, -1)


def test_raw_scores_are_in_the_units_that_they_state():
    encoder, decoder = Constant(torch.full((1, 4, 2, 2), 2.0)), Constant(torch.zeros(1, 3, 32, 32))
    pixels = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[1] = 0
    raw = raw_scores(encoder.eval(), decoder.eval(), pixels)
    # White, or black, rebuilt as middle gray: half the range away, everywhere.
    expected = [0.5**2, 2.0**2 / 2 + math.log(2 * math.pi) / 2, 0.5]
    assert raw.scores == pytest.approx(np.array([expected, expected]), abs=1e-5)
    assert raw.scores.dtype == np.float64
    assert raw.maps == pytest.approx(np.full((2, 32, 32), 0.5), abs=1e-5)
    assert raw.maps.dtype == np.float32
    assert torch.equal(raw.reconstructions, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("training", ["encoder", "decoder"])
def test_raw_scores_refuse_a_network_in_training_mode(config, training):
    networks = {"encoder": Encoder(config).eval(), "decoder": Decoder(config).eval()}
    networks[training].train()
    with pytest.raises(ValueError, match="eval mode"):
        raw_scores(networks["encoder"], networks["decoder"], pixels_of(1))


class ConvolutionRecorder(TorchFunctionMode):
    """Notes, for every convolution, whether a GPU would be allowed to round its inputs to TensorFloat-32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, torch.conv_transpose2d):
            self.rounded.append(torch.backends.cudnn.allow_tf32)
        return func(*args, **(kwargs or {}))


def test_no_convolution_of_scoring_is_rounded_on_a_gpu(scorer):
    """The map's own filters count too. A score would otherwise depend on the card, and on the batch."""
    with ConvolutionRecorder() as recorder:
        scorer.score(pixels_of(1))
    assert len(recorder.rounded) == 5 + 6 + 3 * 2 + 2  # encoder, decoder, edges at three scales, smoothing
    assert not any(recorder.rounded)


def test_the_image_level_map_score_is_the_maps_peak(scorer):
    raw = raw_scores(scorer.encoder, scorer.decoder, pixels_of(3))
    highest = raw.maps.max(axis=(1, 2)).astype(np.float64)
    assert np.array_equal(raw.scores[:, SCORE_NAMES.index("anomaly_map")], highest)


# Scorer


def assert_same_scores(scores, others, *, order):
    for name in ("scores", "anomaly_score", "p_value", "maps"):
        assert getattr(scores, name)[order] == pytest.approx(getattr(others, name), abs=1e-5)


def test_an_image_scores_alone_as_in_a_batch_and_in_any_order(scorer):
    pixels = pixels_of(7)
    together = scorer.score(pixels)
    assert len(np.unique(together.anomaly_score)) == 7
    for index in range(7):
        assert_same_scores(together, scorer.score(pixels[index : index + 1]), order=[index])
    order = [4, 0, 6, 2, 5, 1, 3]
    assert_same_scores(together, scorer.score(pixels[order]), order=order)


def test_an_image_scores_the_same_twice_and_leaves_the_networks_as_they_were(scorer):
    before = {key: value.clone() for key, value in scorer.encoder.state_dict().items()}
    first, second = scorer.score(pixels_of(3)), scorer.score(pixels_of(3))
    assert np.array_equal(first.scores, second.scores)
    after = scorer.encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_scorer_freezes_networks_that_come_in_training_mode(config, checkpoint):
    encoder, decoder = Encoder(config).train(), Decoder(config).train()
    scorer = Scorer(config, encoder, decoder, checkpoint.calibration)
    for network in (scorer.encoder, scorer.decoder):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert scorer.score(pixels_of(2)).scores.shape == (2, 3)
    assert scorer.device == CPU


def test_scores_have_their_shapes_and_names(scorer):
    scores = scorer.score(pixels_of(5))
    assert scores.scores.shape == (5, 3)
    assert scores.anomaly_score.shape == (5,)
    assert scores.p_value.shape == (5,)
    assert scores.maps.shape == (5, 32, 32)
    assert scores.maps.min() >= 0
    assert scores.reconstructions.shape == (5, 3, 32, 32)
    named = scores.named(3)
    assert list(named) == ["reconstruction", "latent", "anomaly_map"]
    assert list(named.values()) == scores.scores[3].tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("latent", ["vector", "grid"])
def test_every_kind_of_model_is_scored(channels, latent, checkpoint):
    config = ModelConfig(image_size=48, channels=channels, width=8, latent=latent, latent_dim=4)
    scorer = Scorer(config, Encoder(config), Decoder(config), checkpoint.calibration)
    scores = scorer.score(pixels_of(2, channels=channels, size=48))
    assert np.isfinite(scores.scores).all()
    assert scores.maps.shape == (2, 48, 48)


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does_and_whatever_the_batch(checkpoint):
    pixels = pixels_of(17)
    on_cpu = checkpoint.scorer(CPU).score(pixels)
    scorer = checkpoint.scorer(torch.device("cuda"))
    on_gpu = scorer.score(pixels)
    assert on_gpu.scores == pytest.approx(on_cpu.scores, abs=1e-4)
    assert on_gpu.maps == pytest.approx(on_cpu.maps, abs=1e-4)
    for index in (0, 16):
        assert_same_scores(on_gpu, scorer.score(pixels[index : index + 1]), order=[index])


def test_choose_device_knows_three_names():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="device is 'tpu': allowed are auto, cpu, cuda"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_choose_device_refuses_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match="torch finds no GPU here"):
        choose_device("cuda")


# Maps in the image's own pixels


def test_resize_map_gives_the_images_shape():
    anomaly_map = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    resized = resize_map(anomaly_map, width=50, height=20)
    assert resized.shape == (20, 50)
    assert resized.dtype == np.float32
    assert resized.min() >= anomaly_map.min()
    assert resized.max() <= anomaly_map.max()
    assert np.array_equal(resize_map(anomaly_map, width=32, height=32), anomaly_map)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (33, 31), (1, 500), (3, 7)])
def test_resize_map_keeps_a_flat_map(width, height):
    assert resize_map(np.full((32, 32), 0.3, dtype=np.float32), width=width, height=height) == pytest.approx(0.3)


def test_resize_map_puts_a_peak_where_it_was():
    anomaly_map = np.zeros((32, 32), dtype=np.float32)
    anomaly_map[8, 24] = 1
    resized = resize_map(anomaly_map, width=320, height=160)
    row, column = np.unravel_index(resized.argmax(), resized.shape)
    assert 8 * 5 <= row < 9 * 5
    assert 24 * 10 <= column < 25 * 10


def hand_drawn(*rows: str) -> NDArray[np.float32]:
    """Digits are tenths, dots are zero."""
    return np.array([[0 if cell == "." else int(cell) / 10 for cell in row] for row in rows], dtype=np.float32)


NUT = hand_drawn(
    "........",
    ".68.....",
    ".66.....",
    "........",
    "......9.",
    ".....7..",
    "3.......",
    "........",
)


def boxes(found: list[Region]) -> list[tuple[int, int, int, int]]:
    return [(region.left, region.top, region.width, region.height) for region in found]


def peaks(found: list[Region]) -> list[float]:
    return [region.peak for region in found]


def test_regions_are_boxes_in_a_square_original():
    found = regions(NUT, level=0.5, width=8, height=8)
    # Highest first. The first is connected over a corner.
    assert boxes(found) == [(5, 4, 2, 2), (1, 1, 2, 2)]
    assert peaks(found) == pytest.approx([0.9, 0.8])


def test_regions_are_scaled_to_an_original_of_another_shape():
    found = regions(NUT, level=0.5, width=80, height=16)
    assert boxes(found) == [(50, 8, 20, 4), (10, 2, 20, 4)]
    assert peaks(found) == pytest.approx([0.9, 0.8])
    # 8 cells over 12 x 20 pixels: a box takes every pixel that a cell of it touches. The first reaches from 7.5 to
    # 10.5 across and 10 to 15 down, the second from 1.5 to 4.5 and 2.5 to 7.5.
    assert boxes(regions(NUT, level=0.5, width=12, height=20)) == [(7, 10, 4, 5), (1, 2, 4, 6)]


def test_regions_above_a_lower_level_are_more():
    assert peaks(regions(NUT, level=0.2, width=8, height=8)) == pytest.approx([0.9, 0.8, 0.3])


def test_regions_take_what_is_above_the_level_and_not_what_equals_it():
    assert regions(NUT, level=float(NUT.max()), width=8, height=8) == []


def test_regions_of_a_quiet_map_are_none():
    assert regions(np.zeros((8, 8), dtype=np.float32), level=0.5, width=100, height=50) == []


@pytest.mark.parametrize(("width", "height"), [(8, 8), (1000, 37), (3, 5), (1, 1)])
def test_regions_of_a_map_that_is_high_everywhere_are_the_whole_image(width, height):
    whole = Region(left=0, top=0, width=width, height=height, peak=1)
    assert regions(np.ones((8, 8), dtype=np.float32), level=0.5, width=width, height=height) == [whole]


def test_a_regions_peak_is_its_own_when_boxes_overlap():
    ring = hand_drawn("666666", "6....6", "6.99.6", "6....6", "666666")
    found = regions(ring, level=0.5, width=6, height=5)
    assert boxes(found) == [(2, 2, 2, 1), (0, 0, 6, 5)]
    assert peaks(found) == pytest.approx([0.9, 0.6])


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    level=st.floats(0.1, 1.2),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_regions_lie_in_the_image_and_hold_every_high_pixel(seed, width, height, level):
    noise = np.random.default_rng(seed).random((16, 16))
    anomaly_map = np.asarray(4 * ndimage.gaussian_filter(noise, 1) ** 2, dtype=np.float32)
    found = regions(anomaly_map, level=level, width=width, height=height)
    covered = np.zeros((height, width), dtype=bool)
    for region in found:
        assert region.width >= 1
        assert region.height >= 1
        assert 0 <= region.left <= region.left + region.width <= width
        assert 0 <= region.top <= region.top + region.height <= height
        assert region.peak > level
        covered[region.top : region.top + region.height, region.left : region.left + region.width] = True
    assert peaks(found) == sorted(peaks(found), reverse=True)
    # Each pixel belongs to the cell that its middle lies in.
    rows = ((np.arange(height) + 0.5) * 16 / height).astype(int)
    columns = ((np.arange(width) + 0.5) * 16 / width).astype(int)
    assert covered[(anomaly_map > level)[np.ix_(rows, columns)]].all()
