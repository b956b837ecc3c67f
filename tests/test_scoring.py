"""The three scores, that tiles leave no trace, and that an image's score is its own."""

import math
from dataclasses import replace

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
from models.maps import MapFusion, smooth
from models.networks import ScoringNetworks, Standardisation, places_of
from models.scoring import (
    Region,
    Scorer,
    Scores,
    choose_device,
    in_tiles,
    latent_score,
    map_score,
    outputs,
    regions,
    resize_map,
    table,
)

CPU = torch.device("cpu")


def pixels_of(count: int, *, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def flat_pixels(size: int) -> Tensor:
    """One colour everywhere."""
    return torch.tensor([200, 90, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, size, size).contiguous()


@torch.no_grad()
def settle(networks: ScoringNetworks, *, seed: int) -> ScoringNetworks:
    """Give every batch norm statistics and factors of its own, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in networks.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.bias.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.uniform_(0.5, 2, generator=generator)
    return networks.eval()


def networks_of(*, seed: int = 0, **fields: object) -> ScoringNetworks:
    config = replace(ModelConfig(image_size=32, width=8, latent_dim=4, head_width=8), **fields)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = ScoringNetworks(config, Standardisation(110.0, 50.0))
    return settle(networks, seed=seed)


def with_other_config(networks: ScoringNetworks, **fields: int) -> ScoringNetworks:
    """The same weights."""
    other = ScoringNetworks(replace(networks.config, **fields), Standardisation())  # type: ignore[arg-type]
    other.distances = networks.distances  # how many there are depends on the tile
    other.load_state_dict(networks.state_dict())
    return other.eval()


@torch.no_grad()
def without_places(networks: ScoringNetworks) -> ScoringNetworks:
    """A head that does not know where it looks: what it says of a flat image is then the same everywhere."""
    assert networks.head is not None
    first = networks.head.first[0]
    assert isinstance(first, nn.Conv2d)
    first.weight[:, -8:] = 0  # two coordinates of 2 x 2 pixels
    return networks


@torch.no_grad()
def with_equal_phases(networks: ScoringNetworks) -> ScoringNetworks:
    """The last layers give 2 x 2 pixels from one place; untrained, each of the four has a shade of its own."""
    assert networks.head is not None
    for layer in (networks.decoder.layers[-2], networks.head.last):
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        for values in (layer.weight, layer.bias):
            values.copy_(values[::4].repeat_interleave(4, dim=0))
    return networks


@pytest.fixture
def scorer(checkpoint: Checkpoint) -> Scorer:
    settle(checkpoint.networks, seed=0)
    return checkpoint.scorer(CPU)


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


@torch.no_grad()
def constant_networks(config: ModelConfig, *, code: float, logit: float) -> ScoringNetworks:
    """Networks that answer the same whatever they are shown; reconstructions are 0, the training pixels' mean."""
    networks = ScoringNetworks(config, Standardisation(mean=102.0, deviation=25.0))
    assert networks.head is not None
    answers = [(networks.encoder.layers[-1], code), (networks.decoder.layers[-2], 0.0), (networks.head.last, logit)]
    for layer, answer in answers:
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        layer.weight.zero_()
        layer.bias.fill_(answer)
    return networks.eval()


def test_outputs_are_in_the_units_that_they_state(config):
    networks = constant_networks(config, code=2, logit=-3)
    pixels = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[1] = 0
    found = outputs(networks, pixels)
    # White, or black, rebuilt as the mean: intensity 0.4, everywhere.
    assert found.reconstruction.tolist() == pytest.approx([0.6**2, 0.4**2])
    assert found.latent.tolist() == pytest.approx([2.0**2 / 2 + math.log(2 * math.pi) / 2] * 2)
    assert found.reconstructions.numpy() == pytest.approx(np.full((2, 3, 32, 32), 0.4), abs=1e-6)
    # The residual is half the difference in standardised units, of 50 gray levels each.
    assert found.maps[0, 0].numpy() == pytest.approx(np.full((32, 32), 153 / 50 / 2), abs=1e-5)
    assert found.maps[1, 0].numpy() == pytest.approx(np.full((32, 32), 102 / 50 / 2), abs=1e-5)
    assert found.maps[:, 1].numpy() == pytest.approx(np.full((2, 32, 32), -3), abs=1e-5)


def test_outputs_of_networks_without_a_head_have_one_component_map():
    found = outputs(networks_of(head_width=0), pixels_of(2))
    assert found.maps.shape == (2, 1, 32, 32)
    assert outputs(networks_of(), pixels_of(2)).maps.shape == (2, 2, 32, 32)


def test_the_table_holds_the_scores_by_name_and_the_maps_peak(scorer):
    found = outputs(scorer.networks, pixels_of(3))
    maps = scorer.fusion(found.maps)
    scores = table(found, maps, scorer.config)
    assert scores.dtype == np.float64
    columns = {
        "reconstruction": found.reconstruction.numpy(),
        "latent": found.latent.numpy(),
        "anomaly_map": maps.numpy().max(axis=(1, 2)),
    }
    for index, name in enumerate(SCORE_NAMES):
        assert np.array_equal(scores[:, index], columns[name].astype(np.float64))


def test_a_map_scores_by_the_mean_of_its_highest_squares():
    config = ModelConfig(image_size=128, highest=4)
    assert config.square == 2
    maps = torch.zeros(3, 128, 128)
    maps[0, 10, 20] = 8  # one hot pixel: a quarter of one square
    maps[1, 40:44, 60:64] = 8  # a defect as large as four of them
    maps[2] = 1
    assert map_score(maps, config).tolist() == [0.5, 8, 1]
    assert map_score(maps, replace(config, highest=1)).tolist() == [8, 8, 1]


def test_squares_reach_the_border_of_any_map():
    config = ModelConfig(image_size=208, highest=1)  # 69 squares of three pixels, and one pixel
    maps = torch.zeros(1, 208, 208)
    maps[:, -1, -1] = 1
    assert map_score(maps, replace(config, highest=2)).item() == 0.5


def test_the_squares_of_a_map_are_as_large_as_what_the_networks_see_makes_them():
    """In an image that is scored in tiles a defect of as many pixels counts as much as in one that is not."""
    maps = torch.zeros(1, 256, 256)
    maps[0, 40:48, 60:68] = 1
    in_tiles = ModelConfig(image_size=256, tile=128, highest=16)
    assert map_score(maps, in_tiles).item() == 1
    assert map_score(maps, ModelConfig(image_size=256, highest=16)).item() == 0.25


@pytest.mark.parametrize("training", ["encoder", "decoder", "head"])
def test_outputs_refuse_a_network_in_training_mode(training):
    networks = networks_of()
    getattr(networks, training).train()
    with pytest.raises(ValueError, match="eval mode"):
        outputs(networks, pixels_of(1))


class ConvolutionRecorder(TorchFunctionMode):
    """Notes, for every convolution, whether a GPU would be allowed to round its inputs to TensorFloat-32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, torch.conv_transpose2d):
            self.rounded.append(torch.backends.cudnn.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fields", "windows"), [({}, 1), ({"image_size": 48, "tile": 32}, 4)])
def test_no_convolution_of_scoring_is_rounded_on_a_gpu(fields, windows):
    """The map's own filters count too. A score would otherwise depend on the card, and on the batch."""
    networks = networks_of(**fields)
    with ConvolutionRecorder() as recorder:
        outputs(networks, pixels_of(1, size=networks.config.image_size))
    # The head: two convolutions at each of four levels, three across, three on the way up, the last.
    of_a_window = 5 + 5 + (4 * 2 + 3 + 3 + 1)  # encoder, decoder, head
    assert len(recorder.rounded) == windows * of_a_window + 3 * 2 + 2  # edges at three scales, smoothing
    assert not any(recorder.rounded)


@pytest.mark.parametrize("seed", [0, 1])
def test_component_maps_of_a_flat_image_have_no_border(seed):
    """Whatever the weights: padding with zeros would draw an edge around every good part."""
    networks = with_equal_phases(without_places(networks_of(image_size=64, seed=seed)))
    maps = outputs(networks, flat_pixels(64)).maps[0]
    for component in maps:
        assert (component - component[30, 30]).abs().max() < 1e-5
    assert maps[0].min() > 0.01  # the image is not rebuilt: a border would have something to differ from


# Tiles

# (image_size, tile), and whether the last window begins where one step more would have put it.
FLUSH = [(48, 32), (64, 32), (80, 48), (112, 48), (160, 64)]
NOT_FLUSH = [(64, 48), (96, 48), (96, 64), (128, 96)]


class OnlyLogits(ScoringNetworks):
    evidence_maps = 1

    def evidence(self, logits: Tensor | None, *_: object) -> list[Tensor]:
        assert logits is not None
        return [logits]


class Echo(OnlyLogits):
    """Networks that give back what they are shown; the logits are the first coordinate of the places."""

    def forward(self, images: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        codes = nn.functional.avg_pool2d(images, 16)
        return codes, images, places[:, :1].expand(len(images), -1, -1, -1), []


class Disagreeing(OnlyLogits):
    """Networks that see something else in every window: a logit from 0 to 1."""

    shown = 0

    def forward(self, images: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:  # noqa: ARG002
        self.shown += 1
        logit = torch.rand(1, generator=torch.Generator().manual_seed(self.shown))
        return images[:, :1, ::16, ::16], images, logit.expand(len(images), 1, *images.shape[2:]), []


def test_the_sizes_are_flush_or_not_as_the_tests_say():
    for cases, flush in ((FLUSH, True), (NOT_FLUSH, False)):
        for size, tile in cases:
            step = 3 * tile // 4 // 16 * 16
            assert ((size - tile) % step == 0) == flush


@pytest.mark.parametrize(("size", "tile"), FLUSH + NOT_FLUSH)
def test_tiles_cover_every_pixel_and_know_its_place(config, size, tile):
    """Stitched from copies of itself an image is itself, so that no pixel lacks weight or has another's."""
    networks = Echo(replace(config, image_size=size, tile=tile), Standardisation())
    images = networks.standardisation(pixels_of(2, size=size))
    codes, _, stitched, logits = in_tiles(networks, images, tile=tile)
    assert torch.allclose(stitched, images, atol=1e-5)
    assert torch.allclose(logits, places_of(size, CPU)[:1].expand(2, -1, -1, -1), atol=1e-5)
    cells = tile // 16
    assert codes.shape[2] % cells == 0
    assert codes.shape[3] == cells
    # Every cell of the image is in some window's codes.
    seen = {round(float(value), 4) for value in codes[0, 0].flatten()}
    assert {round(float(value), 4) for value in nn.functional.avg_pool2d(images, 16)[0, 0].flatten()} <= seen


@pytest.mark.parametrize(("size", "tile"), FLUSH + NOT_FLUSH)
def test_windows_that_disagree_fade_into_each_other(config, size, tile):
    """No jump between neighbours is larger than a fade over the overlap makes it; a cut would jump by a half."""
    networks = Disagreeing(replace(config, image_size=size, tile=tile), Standardisation())
    *_, logits = in_tiles(networks, torch.zeros(1, 3, size, size), tile=tile)
    overlap = tile - 3 * tile // 4 // 16 * 16
    for jumps in (logits.diff(dim=2), logits.diff(dim=3)):
        assert 0 < jumps.abs().max() <= 1.01 / overlap
    assert logits.min() >= 0
    assert logits.max() <= 1


@pytest.mark.parametrize(("size", "tile"), FLUSH + NOT_FLUSH)
@torch.inference_mode()
def test_tiles_of_a_flat_image_are_the_image_in_one_piece(size, tile):
    networks = without_places(networks_of(image_size=size, tile=tile))
    images = networks.standardisation(flat_pixels(size))
    codes, _, reconstructions, evidence = in_tiles(networks, images, tile=tile)
    whole_codes, _, whole_reconstructions, whole_evidence = in_tiles(networks, images, tile=size)
    assert torch.allclose(latent_score(codes), latent_score(whole_codes), atol=1e-5)
    assert torch.allclose(reconstructions, whole_reconstructions, atol=1e-5)
    assert evidence.shape[1] == (1 if tile < 64 else 2)  # logits, and the distance of one level
    assert torch.allclose(evidence, whole_evidence, atol=1e-5)
    # An image with structure does differ at the windows' borders: the comparison is able to fail.
    noise = networks.standardisation(pixels_of(1, size=size))
    assert not torch.allclose(
        in_tiles(networks, noise, tile=tile)[2], in_tiles(networks, noise, tile=size)[2], atol=1e-5
    )


@pytest.mark.parametrize(("size", "tile"), [FLUSH[-1], NOT_FLUSH[-1]])
def test_outputs_in_tiles_of_a_flat_image_are_those_in_one_piece(size, tile):
    tiled = with_equal_phases(without_places(networks_of(image_size=size, tile=tile)))
    found = outputs(tiled, flat_pixels(size))
    whole = outputs(with_other_config(tiled, tile=0), flat_pixels(size))
    for name in ("reconstruction", "latent", "maps", "reconstructions"):
        assert torch.allclose(getattr(found, name), getattr(whole, name), atol=1e-5), name


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.inference_mode()
def test_no_seam_shows_in_a_noisy_image(seed):
    """On noise a map's own jumps drown a seam. What the tiles add to the map of the image in one piece has none of
    them: its mean jump across the windows' borders, along rows or columns, is at most half of its largest elsewhere.
    """
    size, tile = 288, 96
    borders = torch.tensor([64, 96, 128, 160, 192, 224])  # of windows that begin at 0, 64, 128 and 192
    networks = networks_of(image_size=size, tile=tile, seed=seed)
    images = networks.standardisation(pixels_of(1, size=size, seed=seed))
    tiled, whole = in_tiles(networks, images, tile=tile)[3], in_tiles(networks, images, tile=size)[3]
    added = (tiled - whole)[0, 0]
    for image in (added, added.T):
        jumps = image.diff(dim=0).abs().mean(dim=1)  # jumps[i] is between rows i and i + 1
        at_borders = jumps[borders - 1]
        jumps[borders - 1] = 0
        assert 0 < at_borders.max() <= 0.5 * jumps.max()


@pytest.mark.parametrize(("size", "tile", "sigma"), [(64, 0, 1.0), (64, 48, 0.75), (128, 64, 1.0)])
@torch.inference_mode()
def test_maps_are_smoothed_by_what_the_networks_see_at_once(size, tile, sigma):
    """A defect in a large image is no larger in pixels for the image's size."""
    networks = networks_of(image_size=size, tile=tile)
    pixels = pixels_of(1, size=size)
    images = networks.standardisation(pixels)
    _, seen, reconstructions, evidence = in_tiles(networks, images, tile=tile or size)
    expected = smooth(torch.cat([networks.residual(seen, reconstructions), evidence], dim=1), sigma=sigma)
    assert torch.allclose(outputs(networks, pixels).maps, expected, atol=1e-5)


def test_a_tile_as_large_as_the_image_changes_nothing():
    networks = networks_of(image_size=48)
    found = outputs(networks, pixels_of(2, size=48))
    tiled = outputs(with_other_config(networks, tile=48), pixels_of(2, size=48))
    for name in ("reconstruction", "latent", "maps", "reconstructions"):
        assert torch.equal(getattr(found, name), getattr(tiled, name))


# Scorer


def assert_same_scores(scores: Scores, others: Scores, *, order: list[int]) -> None:
    for name in ("scores", "anomaly_score", "p_value", "maps"):
        # The anomaly score divides by the calibration's small deviations, and by nothing else.
        tolerance = 1e-3 if name == "anomaly_score" else 1e-5
        assert getattr(scores, name)[order] == pytest.approx(getattr(others, name), abs=tolerance)


def scorer_of(networks: ScoringNetworks, checkpoint: Checkpoint) -> Scorer:
    components = 1 + networks.evidence_maps
    flat, ends = torch.zeros(components, 8, 8), torch.zeros(2 * components)
    return Scorer(networks, MapFusion(flat, flat + 1, ends, ends + 1), checkpoint.calibration)


@pytest.mark.parametrize("fields", [{}, {"image_size": 64, "tile": 48}, {"head_width": 0}])
def test_an_image_scores_alone_as_in_a_batch_and_in_any_order(checkpoint, fields):
    networks = networks_of(**fields)
    scorer = scorer_of(networks, checkpoint)
    pixels = pixels_of(7, size=networks.config.image_size)
    together = scorer.score(pixels)
    assert len(np.unique(together.anomaly_score)) == 7
    for index in range(7):
        assert_same_scores(together, scorer.score(pixels[index : index + 1]), order=[index])
    order = [4, 0, 6, 2, 5, 1, 3]
    reordered = scorer.score(pixels[order])
    assert_same_scores(together, reordered, order=order)


def test_an_image_scores_the_same_twice_and_leaves_the_networks_as_they_were(scorer):
    before = {key: value.clone() for key, value in scorer.networks.state_dict().items()}
    first, second = scorer.score(pixels_of(3)), scorer.score(pixels_of(3))
    assert np.array_equal(first.scores, second.scores)
    after = scorer.networks.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_scorer_freezes_networks_that_come_in_training_mode(config, checkpoint):
    networks = ScoringNetworks(config, Standardisation()).train()
    scorer = Scorer(networks, checkpoint.fusion, checkpoint.calibration)
    assert not any(module.training for module in scorer.networks.modules())
    assert not any(parameter.requires_grad for parameter in scorer.networks.parameters())
    assert scorer.score(pixels_of(2)).scores.shape == (2, 3)
    assert scorer.config == config
    assert scorer.device == CPU


def test_a_scorers_map_is_the_fusion_of_the_component_maps(scorer):
    pixels = pixels_of(2)
    expected = scorer.fusion(outputs(scorer.networks, pixels).maps)
    assert np.array_equal(scorer.score(pixels).maps, expected.numpy())


def test_scores_have_their_shapes_and_names(scorer):
    scores = scorer.score(pixels_of(5))
    assert scores.scores.shape == (5, 3)
    assert scores.anomaly_score.shape == (5,)
    assert scores.p_value.shape == (5,)
    assert scores.maps.shape == (5, 32, 32)
    assert scores.maps.dtype == np.float32
    assert scores.maps.min() >= 0
    named = scores.named(3)
    assert list(named) == ["reconstruction", "latent", "anomaly_map"]
    assert list(named.values()) == scores.scores[3].tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("latent", ["vector", "grid"])
@pytest.mark.parametrize("head_width", [0, 8])
@pytest.mark.parametrize("tile", [0, 32])
def test_every_kind_of_model_is_scored(channels, latent, head_width, tile, checkpoint):
    networks = networks_of(image_size=48, channels=channels, latent=latent, head_width=head_width, tile=tile)
    scores = scorer_of(networks, checkpoint).score(pixels_of(2, channels=channels, size=48))
    assert np.isfinite(scores.scores).all()
    assert scores.maps.shape == (2, 48, 48)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"image_size": 64, "tile": 48}])
def test_a_gpu_scores_as_the_cpu_does_and_whatever_the_batch(checkpoint, fields):
    networks = networks_of(**fields)
    pixels = pixels_of(17, size=networks.config.image_size)
    on_cpu = scorer_of(networks, checkpoint).score(pixels)
    scorer = scorer_of(networks.to("cuda"), checkpoint)
    scorer.fusion.to("cuda")
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
