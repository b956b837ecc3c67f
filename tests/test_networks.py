"""Shapes, borders and independence of the networks, and what a ModelConfig refuses."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.errors import ConfigError
from models.networks import (
    Convolution,
    Decoder,
    Encoder,
    ImageDiscriminator,
    LatentDiscriminator,
    ScoringNetworks,
    SegmentationHead,
    Standardisation,
    parameter_count,
    places_of,
)

# Side of the code's grid, and of the encoder's last feature map for a vector.
GRID_SIDE = {32: 2, 48: 3, 112: 7, 512: 32}
VECTOR_SIDE = {32: 2, 48: 3, 112: 7, 512: 4}


def config_of(
    size: int = 32, *, latent: str = "grid", channels: int = 3, batch_norm: str = "before", head_width: int = 0
) -> ModelConfig:
    return ModelConfig(
        image_size=size,
        channels=channels,
        width=8,
        latent=latent,  # type: ignore[arg-type]
        latent_dim=4,
        batch_norm=batch_norm,  # type: ignore[arg-type]
        head_width=head_width,
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def settled(network: nn.Module, batch: Tensor) -> nn.Module:
    """The network in eval mode after a few batches, so that its batch norms hold statistics of their own."""
    for _ in range(3):
        network(batch)
    return network.eval()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (2, 2), (5, 4)])
def test_a_convolution_replicates_its_borders_and_so_does_its_gradient(height, width):
    convolution = Convolution(3, 2, kernel_size=3).double()
    own = draw(2, 3, height, width).double().requires_grad_()
    torchs = own.detach().clone().requires_grad_()
    found = convolution(own)
    expected = F.conv2d(F.pad(torchs, (1, 1, 1, 1), mode="replicate"), convolution.weight, convolution.bias)
    assert torch.allclose(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert own.grad is not None
    assert torchs.grad is not None
    assert torch.allclose(own.grad, torchs.grad)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 48, 112, 512])
@pytest.mark.parametrize("latent", ["vector", "grid"])
@torch.no_grad()
def test_shapes_of_the_four_networks(size, latent, channels):
    config = config_of(size, latent=latent, channels=channels)
    side = 1 if latent == "vector" else GRID_SIDE[size]
    assert config.latent_side == side
    assert config.bottleneck_side == (VECTOR_SIDE[size] if latent == "vector" else side)
    images = draw(1, channels, size, size)
    codes = Encoder(config).eval()(images)
    assert codes.shape == (1, 4, side, side)
    assert Decoder(config).eval()(codes).shape == images.shape
    assert LatentDiscriminator(config)(codes).shape == (1, 1, side, side)
    assert ImageDiscriminator(config)(images).shape == (1, 1, size // 16, size // 16)


@pytest.mark.parametrize("size", range(32, 513, 16))
@pytest.mark.parametrize("latent", ["vector", "grid"])
def test_every_allowed_size_has_a_whole_number_of_cells(size, latent):
    config = config_of(size, latent=latent)
    assert config.bottleneck_side * 2 ** len(config.stage_widths) == size
    if latent == "grid":
        assert config.latent_side == size // 16
    else:
        assert config.bottleneck_side <= 4 or config.bottleneck_side % 2 == 1


def test_widths_double_up_to_eight_times():
    assert config_of(512, latent="vector").stage_widths == [8, 16, 32, 64, 64, 64, 64]
    assert config_of(512, latent="grid").stage_widths == [8, 16, 32, 64]


@torch.no_grad()
def test_reconstructions_are_unbounded():
    """Standardised images have no common range: the last layer must not squash."""
    decoder = Decoder(config_of()).eval()
    codes = 5 * torch.randn(16, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    final = decoder.layers[-2]
    assert isinstance(final, nn.Conv2d)
    assert final.bias is not None
    before = decoder(codes)
    final.weight.mul_(1000)
    final.bias.mul_(1000)
    assert torch.allclose(decoder(codes), 1000 * before, rtol=1e-4, atol=1e-2)
    assert decoder(codes).abs().max() > 10


@torch.no_grad()
@pytest.mark.parametrize("batch_norm", ["before", "after"])
def test_a_flat_image_has_no_border_in_the_networks_that_score(batch_norm):
    """Zeros outside would be an edge around every image. Pixel shuffles give each of 2 x 2 pixels a shade of its own:
    one of them at a time."""
    config = config_of(64, batch_norm=batch_norm, head_width=8)
    networks = ScoringNetworks(config, Standardisation())
    for seed in range(3):
        networks(draw(4, 3, 64, 64, seed=seed), torch.zeros(1, 2, 64, 64))
    flat = torch.tensor([0.8, -0.3, 0.1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    codes, reconstructions, logits, _ = networks.eval()(flat, torch.full((1, 2, 64, 64), 0.4))
    assert logits is not None
    phases = [
        image[..., row::2, column::2] for image in (reconstructions, logits) for row in (0, 1) for column in (0, 1)
    ]
    for values in (codes, *phases):
        assert torch.allclose(values, values[..., 1:2, 1:2].expand_as(values), atol=1e-5)
    # The image discriminator does see the border, as it does not score: the comparison is able to fail.
    seen = ImageDiscriminator(config)(flat)
    assert not torch.allclose(seen, seen[..., 1:2, 1:2].expand_as(seen), atol=1e-5)


@pytest.mark.parametrize("network", [LatentDiscriminator, ImageDiscriminator])
def test_a_discriminator_is_unbounded(network):
    # A Wasserstein loss needs outputs without a last squashing function.
    assert isinstance(network(config_of()).layers[-1], nn.Conv2d)


@pytest.mark.parametrize("network", [LatentDiscriminator, ImageDiscriminator])
def test_a_discriminator_has_no_batch_norm(network):
    modules = list(network(config_of()).modules())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)


@pytest.mark.parametrize(("network", "norms"), [(LatentDiscriminator, 2), (ImageDiscriminator, 3)])
@pytest.mark.parametrize("position", ["before", "after"])
def test_a_discriminator_with_batch_norm_has_it_on_the_asked_side_and_no_other_norm(network, norms, position):
    layers = list(network(config_of(batch_norm=position), batch_norm=True).layers)
    found = [index for index, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d)]
    assert len(found) == norms
    offset = 1 if position == "before" else -1
    assert all(isinstance(layers[index + offset], nn.LeakyReLU) for index in found)
    assert not any(isinstance(layer, nn.GroupNorm) for layer in layers)
    assert sum(isinstance(layer, nn.LeakyReLU) for layer in layers) == (2 if network is LatentDiscriminator else 4)


@torch.no_grad()
@pytest.mark.parametrize(("network", "shape"), [(LatentDiscriminator, (4, 2, 2)), (ImageDiscriminator, (3, 32, 32))])
def test_a_discriminator_with_batch_norm_mixes_the_samples_of_a_batch(network, shape):
    """Which is why it is refused under a gradient penalty."""
    discriminator = network(config_of(), batch_norm=True).train()
    batch = draw(5, *shape)
    assert not torch.allclose(discriminator(batch)[:2], discriminator(batch[:2]), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("network", "shape"), [(LatentDiscriminator, (4, 2, 2)), (ImageDiscriminator, (3, 32, 32))])
def test_batch_norm_after_the_last_activation_leaves_a_discriminator_no_margin(network, shape):
    """A batch norm's outputs have the mean that it has learned, whatever it sees; what follows is linear."""
    real, fake = draw(8, *shape), 3 + draw(8, *shape, seed=1)
    margins = {}
    for position in ("before", "after"):
        discriminator = network(config_of(batch_norm=position), batch_norm=True).train()
        margins[position] = float((discriminator(real).mean() - discriminator(fake).mean()).abs())
    assert margins["after"] < 1e-5
    assert margins["before"] > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("network", "shape"), [(LatentDiscriminator, (4, 2, 2)), (ImageDiscriminator, (3, 32, 32))])
def test_the_gradient_of_a_discriminator_at_one_sample_ignores_the_others(network, shape, training):
    discriminator = network(config_of()).train(training)
    batch = draw(5, *shape).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(batch)[2].sum(), batch)
    assert gradient[2].abs().max() > 0
    assert gradient[[0, 1, 3, 4]].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(("network", "shape"), [(LatentDiscriminator, (4, 2, 2)), (ImageDiscriminator, (3, 32, 32))])
def test_a_discriminator_in_training_mode_judges_a_sample_as_if_it_were_alone(network, shape):
    discriminator = network(config_of()).train()
    batch = draw(5, *shape)
    alone = torch.cat([discriminator(sample[None]) for sample in batch])
    assert torch.allclose(discriminator(batch), alone, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch_norm", ["before", "after"])
@pytest.mark.parametrize("latent", ["vector", "grid"])
@pytest.mark.parametrize("network", [Encoder, Decoder])
def test_a_sample_in_eval_mode_does_not_depend_on_its_batch(network, latent, batch_norm):
    config = config_of(latent=latent, batch_norm=batch_norm)
    side = config.latent_side
    batch = draw(6, 3, 32, 32) if network is Encoder else draw(6, 4, side, side)
    settled_network = settled(network(config), batch)
    together = settled_network(batch)
    alone = torch.cat([settled_network(sample[None]) for sample in batch])
    assert torch.allclose(together, alone, atol=1e-5)
    order = [3, 0, 5, 1, 4, 2]
    assert torch.allclose(settled_network(batch[order]), together[order], atol=1e-5)
    # Batch norm does couple the samples in training: the comparison is able to fail.
    settled_network.train()
    assert not torch.allclose(settled_network(batch)[:2], settled_network(batch[:2]), atol=1e-3)


@torch.no_grad()
def test_a_cell_of_a_grid_sees_only_its_surroundings():
    config = config_of(112)
    encoder = settled(Encoder(config), draw(4, 3, 112, 112))
    images = draw(1, 3, 112, 112)
    changed = images.clone()
    changed[..., :16, :16] *= -1  # the top left cell's own pixels
    difference = (encoder(images) - encoder(changed)).abs().sum(dim=1)[0]  # (7, 7)
    assert difference[0, 0] > 0
    # Four convolutions of kernel 4 and stride 2 see 46 pixels: 15 beyond the cell on each side.
    assert difference[2:].max() == 0
    assert difference[:, 2:].max() == 0


@pytest.mark.parametrize("network", [Encoder, Decoder])
@pytest.mark.parametrize(("position", "offset"), [("before", -1), ("after", 1)])
def test_batch_norm_stands_on_the_asked_side_of_the_activation(network, position, offset):
    layers = list(network(config_of(batch_norm=position)).layers)
    activations = [index for index, layer in enumerate(layers) if isinstance(layer, nn.LeakyReLU | nn.ReLU)]
    assert len(activations) == 4
    assert all(isinstance(layers[index + offset], nn.BatchNorm2d) for index in activations)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == len(activations)


@pytest.mark.parametrize(("position", "offset"), [("before", -1), ("after", 1)])
def test_batch_norm_of_the_head_stands_on_the_asked_side_too(position, offset):
    head = SegmentationHead(config_of(batch_norm=position, head_width=8))
    rows = [list(block) for block in head.modules() if isinstance(block, nn.Sequential)]
    found = [(row, index) for row in rows for index, layer in enumerate(row) if isinstance(layer, nn.LeakyReLU)]
    assert len(found) == 2 + 3 * 2 + 3  # at its finest, on the way down, on the way up
    assert all(isinstance(row[index + offset], nn.BatchNorm2d) for row, index in found)
    # A bias between convolution and batch norm would do nothing; before an activation it does.
    convolutions = [layer for row in rows for layer in row if isinstance(layer, Convolution)]
    assert all((layer.bias is None) == (position == "before") for layer in convolutions)


def test_parameter_count_counts_every_number():
    # 1 x 1 convolutions 4 -> 64 -> 64 -> 1, each with biases.
    assert parameter_count(LatentDiscriminator(config_of())) == (4 * 64 + 64) + (64 * 64 + 64) + (64 + 1)


# Segmentation head


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 48, 256])
@torch.no_grad()
def test_the_head_gives_one_logit_per_pixel(size, channels):
    head = SegmentationHead(config_of(size, channels=channels, head_width=8)).eval()
    images, reconstructions = draw(2, channels, size, size), draw(2, channels, size, size, seed=1)
    places = places_of(size, images.device)[None]
    assert head(images, reconstructions, places)[0].shape == (2, 1, size, size)
    # Places of every window by itself, as in training, are as good as those that all share.
    assert torch.equal(
        head(images, reconstructions, places.repeat(2, 1, 1, 1))[0], head(images, reconstructions, places)[0]
    )


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_head_starts_near_one_pixel_in_twenty(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = SegmentationHead(config_of(64, head_width=16))
    logits, _ = head(draw(4, 3, 64, 64), draw(4, 3, 64, 64, seed=1), places_of(64, torch.device("cpu"))[None])
    assert 0.03 < float(logits.sigmoid().mean()) < 0.08


@pytest.mark.parametrize("part", ["images", "reconstructions", "places"])
@torch.no_grad()
def test_the_head_looks_at_all_that_it_is_given(part):
    head = SegmentationHead(config_of(head_width=8)).eval()
    given = {"images": draw(1, 3, 32, 32), "reconstructions": draw(1, 3, 32, 32, seed=1), "places": draw(1, 2, 32, 32)}
    changed = given | {part: -given[part]}
    assert (head(**given)[0] - head(**changed)[0]).abs().max() > 1e-3


def test_the_heads_loss_teaches_the_head_alone():
    networks = ScoringNetworks(config_of(head_width=8), Standardisation())
    places = places_of(32, torch.device("cpu"))[None]
    _, reconstructions, logits, _ = networks(draw(4, 3, 32, 32), places)
    assert networks.head is not None
    assert logits is not None
    F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    assert all(parameter.grad is not None for parameter in networks.head.parameters())
    autoencoder = [*networks.encoder.parameters(), *networks.decoder.parameters()]
    assert all(parameter.grad is None for parameter in autoencoder)
    # The reconstructions that it was shown do teach the autoencoder, by their own loss.
    reconstructions.square().mean().backward()
    assert all(parameter.grad is not None for parameter in autoencoder)


# Networks that score


@torch.no_grad()
def test_scoring_networks_are_their_parts_in_a_row():
    networks = ScoringNetworks(config_of(head_width=8), Standardisation()).eval()
    images, places = draw(3, 3, 32, 32), places_of(32, torch.device("cpu"))[None]
    codes, reconstructions, logits, features = networks(images, places)
    assert networks.head is not None
    assert torch.allclose(codes, networks.encoder(images), atol=1e-6)
    assert torch.allclose(reconstructions, networks.decoder(codes), atol=1e-6)
    head_logits, head_features = networks.head(images, reconstructions, places)
    assert torch.allclose(logits, head_logits, atol=1e-6)
    assert [level.shape for level in features] == [(3, 16, 8, 8), (3, 32, 4, 4), (3, 32, 2, 2)]
    assert all(torch.allclose(*levels, atol=1e-6) for levels in zip(features, head_features, strict=True))


@torch.no_grad()
def test_scoring_networks_without_a_head_give_no_logits():
    networks = ScoringNetworks(config_of(), Standardisation()).eval()
    assert networks.head is None
    assert networks(draw(1, 3, 32, 32), places_of(32, torch.device("cpu"))[None])[2] is None


def test_places_go_across_and_then_down_from_minus_one_to_one():
    across, down = places_of(33, torch.device("cpu"))
    assert across[5].tolist() == pytest.approx([-1 + column / 16 for column in range(33)])
    assert torch.equal(down, across.T)
    assert (across == across[:1]).all()


# Standardisation


def test_standardisation_gives_mean_zero_and_deviation_a_half():
    generator = torch.Generator().manual_seed(0)
    pixels = (90 + 30 * torch.randn(8, 3, 32, 32, generator=generator)).clamp(0, 255).byte()
    mean, deviation = float(pixels.double().mean()), float(pixels.double().std(correction=0))
    images = Standardisation(mean, deviation)(pixels)
    assert images.dtype == torch.float32
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std(correction=0)) == pytest.approx(0.5, abs=1e-5)


def test_standardisation_by_hand():
    images = Standardisation(mean=100, deviation=25)(torch.tensor([100, 150, 0, 255], dtype=torch.uint8))
    assert images.tolist() == pytest.approx([0, 1, -2, 3.1])


def test_limits_are_black_and_white():
    black, white = Standardisation(100.0, 50.0).limits
    assert (black, white) == pytest.approx((-1.0, 1.55))


def test_standardisation_without_arguments_maps_the_ends_of_the_range():
    assert Standardisation()(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


@pytest.mark.parametrize(("mean", "deviation"), [(127.5, 63.75), (12.0, 3.0), (250.0, 0.0)])
def test_intensities_undo_standardisation(mean, deviation):
    pixels = torch.arange(256, dtype=torch.uint8)
    standardisation = Standardisation(mean, deviation)
    back = standardisation.intensities(standardisation(pixels))
    assert torch.allclose(back, pixels.float() / 255, atol=1e-5)
    assert torch.equal((255 * back).round().byte(), pixels)
    assert torch.equal(standardisation.pixels(standardisation(pixels)), pixels)
    assert standardisation.pixels(torch.tensor([-1e4, 1e4])).tolist() == [0, 255]


@pytest.mark.parametrize("gray", [0, 128, 255])
def test_images_of_one_flat_colour_are_standardised_to_zero(gray):
    images = Standardisation(mean=float(gray), deviation=0)(torch.full((2, 3, 8, 8), gray, dtype=torch.uint8))
    assert torch.equal(images, torch.zeros(2, 3, 8, 8))
    # And another colour is far from it, but finite.
    assert Standardisation(mean=float(gray), deviation=0)(torch.tensor([255 - gray])).isfinite().all()


# ModelConfig


# Of the default image size.
TILES_ALLOWED = "0 (the image in one piece) and multiples of 16 from 32 to 512 and to image_size, 128"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("image_size", 16, "multiples of 16 from 32 to 512, with a tile to 8192"),
        ("image_size", 100, "multiples of 16 from 32 to 512, with a tile to 8192"),
        ("image_size", 528, "multiples of 16 from 32 to 512, with a tile to 8192"),
        ("channels", 2, "1 (gray) and 3 (colour)"),
        ("channels", 4, "1 (gray) and 3 (colour)"),
        ("width", 0, "multiples of 8 from 8 to 256"),
        ("width", 12, "multiples of 8 from 8 to 256"),
        ("width", 264, "multiples of 8 from 8 to 256"),
        ("latent", "line", "vector, grid"),
        ("latent_dim", 0, "1 to 1024"),
        ("latent_dim", 1025, "1 to 1024"),
        ("batch_norm", "none", "before, after"),
        ("head_width", -8, "0 (no head) and multiples of 8 to 256"),
        ("head_width", 12, "0 (no head) and multiples of 8 to 256"),
        ("head_width", 264, "0 (no head) and multiples of 8 to 256"),
        ("highest", 0, "1 to 4096, the squares of the anomaly map"),
        ("highest", 4097, "1 to 4096, the squares of the anomaly map"),
        *(("tile", tile, TILES_ALLOWED) for tile in (-32, 16, 40, 144)),
    ],
)
def test_a_config_refuses_by_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as raised:
        replace(ModelConfig(), **{field: value})
    assert str(raised.value) == f"{field} is {value!r}: allowed are {allowed}."


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("image_size", (32, 512)),
        ("channels", (1, 3)),
        ("width", (8, 256)),
        ("latent_dim", (1, 1024)),
        ("head_width", (0, 8, 256)),
        ("tile", (0, 32, 128)),
        ("highest", (1, 4096)),
    ],
)
def test_a_config_takes_both_ends_of_a_range(field, values):
    for value in values:
        assert getattr(replace(ModelConfig(), **{field: value}), field) == value


def test_a_large_image_needs_a_tile():
    config = ModelConfig(image_size=8192, tile=512)
    assert (config.side, config.bottleneck_side) == (512, 32)
    with pytest.raises(ConfigError, match="image_size is 8192"):
        ModelConfig(image_size=8192)
    with pytest.raises(ConfigError, match="image_size is 8208"):
        ModelConfig(image_size=8208, tile=512)
    with pytest.raises(ConfigError, match="tile is 528"):
        ModelConfig(image_size=8192, tile=528)


@pytest.mark.parametrize("latent", ["vector", "grid"])
def test_a_tile_is_what_the_networks_are_made_for(latent):
    tiled, small = replace(config_of(512, latent=latent), tile=112), config_of(112, latent=latent)
    assert (tiled.side, config_of(512).side) == (112, 512)
    for name in ("stage_widths", "bottleneck_side", "latent_side"):
        assert getattr(tiled, name) == getattr(small, name)


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().width = 8  # type: ignore[misc]
