"""Shapes, ranges and independence of the four networks, and what a ModelConfig refuses."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.errors import ConfigError
from models.networks import Decoder, Encoder, ImageDiscriminator, LatentDiscriminator, parameter_count

# Side of the code's grid, and of the encoder's last feature map for a vector.
GRID_SIDE = {32: 2, 48: 3, 112: 7, 512: 32}
VECTOR_SIDE = {32: 2, 48: 3, 112: 7, 512: 4}


def config_of(size: int = 32, *, latent: str = "grid", channels: int = 3, batch_norm: str = "before") -> ModelConfig:
    return ModelConfig(
        image_size=size,
        channels=channels,
        width=8,
        latent=latent,  # type: ignore[arg-type]
        latent_dim=4,
        batch_norm=batch_norm,  # type: ignore[arg-type]
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def settled(network: nn.Module, batch: Tensor) -> nn.Module:
    """The network in eval mode after a few batches, so that its batch norms hold statistics of their own."""
    for _ in range(3):
        network(batch)
    return network.eval()


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
def test_reconstructions_stay_within_the_range_of_an_image():
    config = config_of()
    decoder = Decoder(config)
    codes = 5 * torch.randn(16, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for images in (decoder.train()(codes), decoder.eval()(codes)):
        assert images.abs().max() < 1
    # An extreme code saturates: the range is the last layer's, not the weights' smallness.
    final = decoder.layers[-2]
    assert isinstance(final, nn.Conv2d)
    final.weight.mul_(1000)
    saturated = decoder.eval()(codes)
    assert 0.99 < saturated.abs().max() <= 1


@pytest.mark.parametrize("network", [LatentDiscriminator, ImageDiscriminator])
def test_a_discriminator_is_unbounded(network):
    # A Wasserstein loss needs outputs without a last squashing function.
    assert isinstance(network(config_of()).layers[-1], nn.Conv2d)


@pytest.mark.parametrize("network", [LatentDiscriminator, ImageDiscriminator])
def test_a_discriminator_has_no_batch_norm(network):
    modules = list(network(config_of()).modules())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)


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
    assert len(activations) == (4 if network is Encoder else 5)
    assert all(isinstance(layers[index + offset], nn.BatchNorm2d) for index in activations)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == len(activations)


def test_parameter_count_counts_every_number():
    # 1 x 1 convolutions 4 -> 64 -> 64 -> 1, each with biases.
    assert parameter_count(LatentDiscriminator(config_of())) == (4 * 64 + 64) + (64 * 64 + 64) + (64 + 1)


# ModelConfig


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("image_size", 16, "multiples of 16 from 32 to 512"),
        ("image_size", 100, "multiples of 16 from 32 to 512"),
        ("image_size", 528, "multiples of 16 from 32 to 512"),
        ("channels", 2, "1 (gray) and 3 (colour)"),
        ("channels", 4, "1 (gray) and 3 (colour)"),
        ("width", 0, "multiples of 8 from 8 to 256"),
        ("width", 12, "multiples of 8 from 8 to 256"),
        ("width", 264, "multiples of 8 from 8 to 256"),
        ("latent", "line", "vector, grid"),
        ("latent_dim", 0, "1 to 1024"),
        ("latent_dim", 1025, "1 to 1024"),
        ("batch_norm", "none", "before, after"),
    ],
)
def test_a_config_refuses_by_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as raised:
        replace(ModelConfig(), **{field: value})
    assert str(raised.value) == f"{field} is {value!r}: allowed are {allowed}."


@pytest.mark.parametrize(
    ("field", "values"),
    [("image_size", (32, 512)), ("channels", (1, 3)), ("width", (8, 256)), ("latent_dim", (1, 1024))],
)
def test_a_config_takes_both_ends_of_a_range(field, values):
    for value in values:
        assert getattr(replace(ModelConfig(), **{field: value}), field) == value


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().width = 8  # type: ignore[misc]
