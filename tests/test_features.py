"""The features of a frozen backbone: where they lie, what they are, and that nothing moves them."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.config import FEATURE_LAYERS, ModelConfig
from models.errors import ConfigError
from models.features import Features, centred, starts
from models.maps import OF_FEATURES, OF_PIXELS, MapFusion, enlarged, smooth
from models.networks import ScoringNetworks, Standardisation, places_of
from models.scoring import in_tiles, outputs
from training.calibrating import good_maps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def config_of(**fields: object) -> ModelConfig:
    values: dict[str, object] = {"image_size": 64, "width": 8, "latent_dim": 4, "head_width": 8}
    return ModelConfig(**values | {"features": "resnet18", "feature_channels": 16} | fields)  # type: ignore[arg-type]


def textures(count: int, size: int, *, channels: int = 3) -> Tensor:
    """Soft noise in [0, 1], as different from place to place as a part is."""
    noise = torch.rand(count, channels, size // 8, size // 8)
    return torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear")


# Where they lie


@pytest.mark.parametrize(
    ("name", "padding"),
    [*((name, "torchvision") for name in FEATURE_LAYERS), ("mobilenet_v2", "tensorflow"), ("resnet18", "tensorflow")],
)
def test_the_map_peaks_where_the_spot_is(name, padding, monkeypatch):
    """Weights are random, and a single peak may be off: the median over places is what padding moves."""
    monkeypatch.setattr("models.features.SPOTS", 12)
    images = textures(8, 128)
    features = Features(config_of(image_size=128, features=name, feature_padding=padding, feature_channels=64))
    features.locate(images)
    places = torch.randint(44, 84, (16, 2))
    whole = images[:1].expand(16, -1, -1, -1)
    spotted = whole.clone()
    for image, (row, column) in zip(spotted, places.tolist(), strict=True):
        square = image[:, row - 2 : row + 3, column - 2 : column + 3]
        square.copy_(1 - square.mean().round())
    change = (features(spotted) - features(whole)).square().mean(dim=1, keepdim=True)
    peaks = smooth(enlarged(change, 8), sigma=4.0).flatten(1).argmax(dim=1)
    off = torch.stack([peaks // 128, peaks % 128], dim=1) - places
    assert off.median(dim=0).values.abs().max() <= 2, off


def test_where_cells_lie_is_found_for_either_padding():
    """Symmetric padding centres a cell on the first pixel of its stride, TensorFlow's on the last: half a stride more
    or less than the middle. The weights, random here, move it by little."""
    found = {}
    for padding in ("torchvision", "tensorflow"):
        torch.manual_seed(0)
        network = Features(config_of(feature_padding=padding, features="mobilenet_v2")).network
        found[padding] = starts(network, 2 * textures(8, 128) - 1)
    for layer, symmetric, tensorflow in (("features.6", 0, 7), ("features.13", 0, 15)):
        assert (found["torchvision"][layer] - symmetric).abs().max() < 3
        assert (found["tensorflow"][layer] - tensorflow).abs().max() < 3


def test_where_cells_lie_does_not_depend_on_how_strongly_they_answer():
    """Weights may be small, and a network may be blind: then nothing is known, and nothing is not a number."""
    images = 2 * textures(4, 64) - 1
    blurred = torch.nn.Conv2d(3, 1, 5, stride=4, padding=2, bias=False)
    found = []
    for scale in (1.0, 1e-8, 0.0):
        with torch.no_grad():
            blurred.weight.fill_(scale)
            found.append(starts(lambda image: {"blurred": blurred(image)}, images)["blurred"])
    assert torch.allclose(found[0], torch.zeros(2), atol=0.5)
    assert torch.allclose(found[1], found[0], atol=1e-3)
    assert found[2].isfinite().all()


@pytest.mark.parametrize(("stride", "start"), [(8, 0.0), (8, 3.5), (8, 7.0), (16, 0.0), (16, 15.0), (4, 1.5)])
def test_centred_cells_hold_what_lies_at_their_centres(stride, start):
    """Maps that hold their own cells' places, across and down, hold the centres' afterwards, except at the border."""
    size = 128
    places = start + stride * torch.arange(size // stride).float()
    maps = torch.stack([places.expand(len(places), -1), places.unsqueeze(1).expand(-1, len(places))]).unsqueeze(0)
    inside = slice(4, -4) if stride > 8 else slice(2, -2)  # of the cells' own borders
    found = centred(maps, torch.tensor([start, start]), size)[0, inside, inside].permute(2, 0, 1)
    expected = 8 * torch.arange(size // 8)[inside] + 3.5
    assert torch.allclose(found[0], expected.expand_as(found[0]), atol=1e-3)
    assert torch.allclose(found[1], expected.unsqueeze(1).expand_as(found[1]), atol=1e-3)


@pytest.mark.parametrize(("side", "start"), [(16, (0.0, 3.0)), (8, (15.0, -2.5)), (7, (4.0, 9.0))])
def test_centred_cells_are_means_of_three_by_three_interpolated(side, start):
    """As avg_pool2d and grid_sample do it, borders too."""
    maps, size = torch.rand(2, 5, side, side), 128
    means = torch.nn.functional.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    pixels = 8 * torch.arange(size // 8) + 3.5
    across, down = (((pixels - first) * side / size + 0.5) * 2 / side - 1 for first in start)
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).expand(2, -1, -1, -1)
    expected = torch.nn.functional.grid_sample(means, places, padding_mode="border", align_corners=False)
    assert torch.allclose(centred(maps, torch.tensor(start), size).permute(0, 3, 1, 2), expected, atol=1e-5)


# What they are


@pytest.mark.parametrize(("channels", "kept"), [(3, 16), (1, 16), (3, 128), (3, 384)])
def test_features_are_numbers_for_each_eight_pixels(channels, kept):
    features = Features(config_of(feature_channels=kept))
    assert features(textures(2, 64, channels=channels)).shape == (2, kept, 8, 8)


def test_gray_images_are_seen_as_the_same_gray_in_three_channels():
    features = Features(config_of())
    gray = textures(2, 64, channels=1)
    assert torch.equal(features(gray), features(gray.expand(-1, 3, -1, -1)))


def test_directions_have_length_one():
    lengths = Features(config_of()).directions(textures(2, 64)).norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)


def test_fitted_features_have_mean_zero_and_mean_square_one():
    features = Features(config_of())
    images = textures(6, 64)
    features.fit(features.directions(images))
    found = features(images)
    assert found.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert float(found.square().mean()) == pytest.approx(1, abs=1e-4)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if isinstance(found, Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


def test_features_are_fitted_few_images_at_once(monkeypatch):
    """All directions, in half precision, fill the memory."""
    monkeypatch.setattr("models.features.FITTED_AT_ONCE", 3)
    features, directions = Features(config_of()), torch.randn(8, 16, 8, 8).half()
    with Largest() as largest:
        features.fit(directions)
    assert largest.numbers == 3 * 16 * 8 * 8
    exact = directions.double()
    mean = exact.mean(dim=(0, 2, 3)).view(-1, 1, 1)
    assert torch.equal(features.mean, mean.float())
    assert torch.allclose(features.scale, (exact - mean).square().mean().sqrt().float(), rtol=1e-6)


def test_features_of_flat_images_stay_finite():
    features = Features(config_of())
    features.fit(features.directions(torch.full((2, 3, 64, 64), 0.5)))
    assert features(torch.full((1, 3, 64, 64), 0.5)).isfinite().all()


def test_features_do_not_depend_on_their_batch():
    features = Features(config_of())
    images = textures(3, 64)
    alone = torch.cat([features(image.unsqueeze(0)) for image in images])
    assert torch.allclose(features(images), alone, atol=1e-4)


# Frozen


def test_a_backbone_stays_in_eval_mode_and_learns_nothing():
    networks = ScoringNetworks(config_of(), Standardisation()).train()
    assert networks.features is not None
    before = copy.deepcopy(networks.features.state_dict())
    seen = networks.see(2 * textures(4, 64) - 1)
    assert not seen.requires_grad
    codes, reconstructions, logits, _ = networks(seen, places_of(64, CPU).unsqueeze(0))
    assert logits is not None
    (codes.mean() + reconstructions.square().mean() + logits.mean()).backward()
    assert not any(module.training for module in networks.features.modules())
    copied = copy.deepcopy(networks).train().features
    assert copied is not None
    assert not any(module.training for module in copied.modules())
    assert all(parameter.grad is None for parameter in networks.features.parameters())
    for key, value in networks.features.state_dict().items():
        assert torch.equal(value, before[key]), key


# Its weights


def test_weights_of_the_same_network_are_taken():
    features, given = Features(config_of()), get_model("resnet18", weights=None).eval()
    features.load(given.state_dict())
    image = features._expected(textures(1, 64))
    expected = given.layer1(given.maxpool(given.relu(given.bn1(given.conv1(image)))))
    assert torch.allclose(features.network(image)["layer2"], given.layer2(expected), atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "efficientnet_b0"])
def test_a_folded_backbone_answers_as_torchvisions(name):
    """Batch norms that do something: with the statistics of a fresh network they would not."""
    given = get_model(name, weights=None)
    with torch.no_grad():
        for _ in range(3):
            given(torch.rand(8, 3, 64, 64))
    config = config_of(features=name)
    features, images = Features(config), textures(2, 64)
    features.load(given.state_dict())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in features.modules())
    expected = create_feature_extractor(given.eval(), config.layers)(features._expected(images))
    for layer, answer in features.network(features._expected(images)).items():
        assert torch.allclose(
            answer, expected[layer], rtol=1e-3, atol=1e-4 * float(expected[layer].detach().abs().max())
        )


def test_tensorflows_padding_moves_what_a_strided_layer_sees():
    """A convolution of 3 x 3 that answers to the middle of its window alone: of every second pixel, from the first one
    with symmetric padding, from the second one with TensorFlow's."""
    image = textures(1, 64)
    for padding, start in (("torchvision", 0), ("tensorflow", 1)):
        config = config_of(features="mobilenet_v2", feature_layers="features.0", feature_padding=padding)
        features, given = Features(config), get_model("mobilenet_v2", weights=None)
        first = given.features[0][0]
        with torch.no_grad():
            first.weight.zero_()[:, :, 1, 1] = 1
        features.load(given.state_dict())
        expected = features._expected(image)
        answer = features.network(expected)["features.0"]
        assert torch.allclose(answer[:, 0], expected[:, :, start::2, start::2].sum(dim=1).clamp(0, 6), atol=1e-3)


def test_the_weights_that_another_one_holds_are_taken():
    first, second = Features(config_of()), Features(config_of())
    second.load(first.network.state_dict())
    image = textures(1, 64)
    assert torch.equal(first(image), second(image))


@pytest.mark.gpu
def test_weights_are_taken_to_where_the_features_are():
    features = Features(config_of()).to("cuda")
    features.load(get_model("resnet18", weights=None).state_dict())
    assert features(textures(1, 64).to("cuda")).device.type == "cuda"


def test_half_precision_weights_are_made_single():
    features, given = Features(config_of()), get_model("resnet18", weights=None).half()
    features.load(given.state_dict())
    assert all(value.dtype != torch.float16 for value in features.state_dict().values())


def test_weights_of_another_network_are_refused():
    with pytest.raises(ConfigError, match=r"not of resnet18: conv1\.weight are missing"):
        Features(config_of()).load(get_model("mobilenet_v2", weights=None).state_dict())
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight have shape \(64, 64, 1, 1\), not"):
        Features(config_of()).load(get_model("resnet50", weights=None).state_dict())


def test_a_backbone_that_torchvision_lacks_is_refused():
    with pytest.raises(ConfigError, match="features is 'resnet19'"):
        Features(config_of(features="resnet19", feature_layers="layer2"))
    with pytest.raises(ConfigError, match="feature_layers is 'layer2, layer9'"):
        Features(config_of(feature_layers="layer2,layer9"))


def test_a_layer_that_is_no_map_is_refused():
    features = Features(config_of(feature_layers="layer2,fc"))
    with pytest.raises(ConfigError, match="feature_layers has 'fc'"):
        features.locate(textures(1, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_layers": "", "features": "vgg11"}, "features is 'vgg11': without feature_layers allowed are none"),
        ({"features": "none", "feature_layers": "layer2"}, "feature_layers is 'layer2'"),
        ({"latent": "vector"}, "latent is 'vector'"),
        ({"feature_channels": 12}, "feature_channels is 12"),
        ({"feature_padding": "same"}, "feature_padding is 'same'"),
        ({"image_size": 80}, "image_size is 80: allowed are multiples of 32"),
        ({"image_size": 128, "tile": 48}, "tile is 48"),
    ],
)
def test_a_config_over_features_that_does_not_go_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**fields)


# Scores


def test_outputs_over_features_are_of_cells_and_the_anomaly_map_of_pixels():
    networks = ScoringNetworks(config_of(), Standardisation()).eval()
    found = outputs(networks, torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert found.maps.shape == (2, 1 + networks.evidence_maps, 8, 8)
    fusion, fusions_of_the_others = good_maps(
        networks, torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    ).fusions()
    for one in (fusion, fusions_of_the_others[0]):
        assert one(found.maps).shape == (2, 64, 64)
    assert found.reconstructions.shape == (2, 16, 8, 8)
    assert found.maps.isfinite().all()


@torch.inference_mode()
def test_tiles_over_features_of_a_flat_image_are_the_image_in_one_piece():
    """Where the backbone's zero padding does not reach: its windows' borders count little."""
    networks = ScoringNetworks(config_of(image_size=192, tile=128, head_width=0), Standardisation()).eval()
    images = torch.zeros(1, 3, 192, 192)
    tiled, whole = in_tiles(networks, images, tile=128)[1], in_tiles(networks, images, tile=192)[1]
    assert tiled.shape == whole.shape == (1, 16, 24, 24)
    assert torch.allclose(tiled[..., 11:13, 11:13], whole[..., 11:13, 11:13], atol=0.05)
    assert not torch.allclose(tiled, whole + 0.1, atol=0.05)


def test_a_checkpoint_carries_its_backbone(tmp_path, checkpoint: Checkpoint):
    networks = ScoringNetworks(config_of(), Standardisation()).eval()
    assert networks.features is not None
    networks.features.locate(textures(4, 64))
    components = 1 + networks.evidence_maps
    flat, ends = torch.zeros(components, 8, 8), torch.zeros(2 * components)
    fusion = MapFusion(flat, flat + 1, ends, ends + 1, OF_FEATURES[1], cell=8)
    saved = replace(checkpoint, networks=networks, fusion=fusion)
    save_checkpoint(tmp_path / "saved", saved)
    loaded = load_checkpoint(tmp_path / "saved")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = outputs(networks, pixels)
    assert torch.equal(outputs(loaded.networks, pixels).maps, found.maps)
    assert torch.equal(loaded.fusion.weights, fusion.weights)
    assert torch.equal(loaded.fusion(found.maps), fusion(found.maps))
    assert not torch.equal(loaded.fusion.weights, MapFusion(flat, flat + 1, ends, ends + 1, OF_PIXELS[0]).weights)
