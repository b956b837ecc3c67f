"""The losses against closed forms: what a penalty, a score or a gradient must be, worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.networks import ImageDiscriminator, LatentDiscriminator
from training.losses import discriminator_loss, generator_loss, gradient_penalty, reconstruction_loss

SHAPES = [(6, 5), (6, 3, 8, 8), (1, 4, 1, 1)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


class Linear(nn.Module):
    """x (B, ...) -> x W, one logit per column of W: (B, P)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, samples: Tensor) -> Tensor:
        return samples.flatten(1) @ self.weight


class Spy(nn.Module):
    """Linear, and a record of the samples and logits that it saw."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = Linear(random((math.prod(shape[1:]), 1), seed=9))
        self.samples = torch.empty(0)
        self.logits = torch.empty(0)

    def forward(self, samples: Tensor) -> Tensor:
        self.samples, self.logits = samples, self.linear(samples)
        return self.logits


def penalty_of(discriminator: nn.Module, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    return gradient_penalty(discriminator, random(shape, 1), random(shape, 2), generator=seeded(seed))


# Gradient penalty


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_the_penalty_of_a_linear_discriminator_is_the_square_of_its_slope_minus_one(shape, slope):
    weight = random((math.prod(shape[1:]), 1))
    penalty = penalty_of(Linear(slope * weight / weight.norm()), shape)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_penalty_of_a_patch_discriminator_is_of_the_mean_of_its_outputs(shape):
    weight = random((math.prod(shape[1:]), 7))
    expected = (weight.mean(dim=1).norm() - 1) ** 2
    assert penalty_of(Linear(weight), shape).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_penalty_of_a_patch_map_does_not_grow_with_the_number_of_patches():
    class Patches(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=1, keepdim=True).repeat(1, 1, 3, 3)

    once = penalty_of(Linear(torch.full((48, 1), 1 / 48)), (4, 3, 4, 4))
    assert penalty_of(Patches(), (4, 3, 4, 4)).item() == pytest.approx(once.item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_penalty_at_a_slope_of_zero_is_one_with_a_finite_gradient(shape):
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 4), nn.Tanh(), nn.Linear(4, 1))
    for parameter in discriminator.parameters():
        nn.init.zeros_(parameter)
    penalty = penalty_of(discriminator, shape)
    penalty.backward()
    assert penalty.item() == 1
    gradients = [parameter.grad for parameter in discriminator.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(64, 5), (64, 3, 8, 8)])
def test_the_penalty_takes_one_point_per_sample_between_real_and_fake(shape):
    real, fake = random(shape, 1), random(shape, 2)
    spy = Spy(shape)
    gradient_penalty(spy, real, fake, generator=seeded())
    share = ((spy.samples - fake) / (real - fake)).flatten(1)  # (B, ...) of one number per sample
    # Where the two are nearly equal the division says nothing.
    share[(real - fake).flatten(1).abs() < 0.05] = float("nan")
    middle = share.nanmedian(dim=1, keepdim=True).values
    assert ((share - middle).abs().nan_to_num() < 1e-4).all()
    assert ((middle >= 0) & (middle <= 1)).all()
    # Uniform on [0, 1]: all differ, and they reach both ends.
    assert middle.unique().numel() == len(real)
    assert middle.min() < 0.1
    assert middle.max() > 0.9


def test_the_penalty_is_drawn_from_its_generator_alone():
    discriminator = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = (penalty_of(discriminator, (6, 5), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert first != other


def test_the_gradient_of_the_penalty_is_the_one_worked_out_by_hand():
    """D(x) = w2 tanh(W1 x) has the slope W1' (w2 * (1 - tanh(W1 x)^2)): the rest is ordinary autograd, in float64."""
    first, second = random((4, 5), 3), random((4,), 4)
    discriminator = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
    discriminator.load_state_dict({"0.weight": first, "2.weight": second[None]})
    real, fake = random((6, 5), 1), random((6, 5), 2)
    penalty = gradient_penalty(discriminator, real, fake, generator=seeded())
    gradients = torch.autograd.grad(penalty, list(discriminator.parameters()))

    spy = Spy((6, 5))
    gradient_penalty(spy, real, fake, generator=seeded())
    points = spy.samples.detach().double()
    matrix, vector = first.double().requires_grad_(), second.double().requires_grad_()
    slope = (vector * (1 - torch.tanh(points @ matrix.T) ** 2)) @ matrix  # (B, 5)
    expected = ((slope.square().sum(dim=1).sqrt() - 1) ** 2).mean()
    expected_gradients = torch.autograd.grad(expected, [matrix, vector])
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, by_hand in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient.double().squeeze(0), by_hand, rtol=1e-4, atol=1e-6)


def test_the_penalty_leaves_its_samples_without_a_gradient():
    """Whoever made the fakes does not learn here, even of a discriminator whose slope depends on the sample."""
    real, fake = random((6, 5), 1).requires_grad_(), random((6, 5), 2).requires_grad_()
    discriminator = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    gradient_penalty(discriminator, real, fake, generator=seeded()).backward()
    assert real.grad is None
    assert fake.grad is None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_the_penalty_is_computed_in_float32_under_autocast(kind):
    real, fake = random((6, 5), 1).to(kind), random((6, 5), 2).to(kind)
    plain, under_autocast = Spy((6, 5)), Spy((6, 5))
    expected = gradient_penalty(plain, real.float(), fake.float(), generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (random((2, 2)) @ random((2, 2))).dtype == torch.bfloat16  # autocast is on here
        penalty = gradient_penalty(under_autocast, real, fake, generator=seeded())
        assert (random((2, 2)) @ random((2, 2))).dtype == torch.bfloat16  # and still is
    assert under_autocast.samples.dtype == under_autocast.logits.dtype == penalty.dtype == torch.float32
    assert torch.equal(penalty, expected)


@pytest.mark.parametrize(
    ("real", "fake"),
    [((6, 5), (5, 5)), ((6, 5), (6, 4)), ((6, 3, 8, 8), (6, 1, 8, 8)), ((6, 5), (6, 5, 1, 1)), ((6, 5), (1, 5))],
)
def test_samples_of_different_shapes_are_refused_with_both_shapes(real, fake):
    with pytest.raises(ValueError, match="real samples are") as refusal:
        gradient_penalty(Spy(real), random(real), random(fake), generator=seeded())
    assert str(real) in str(refusal.value)
    assert str(fake) in str(refusal.value)


def discriminators() -> list[tuple[nn.Module, tuple[int, ...]]]:
    grid = ModelConfig(image_size=32, channels=3, width=8, latent="grid", latent_dim=4)
    vector = ModelConfig(image_size=32, channels=1, width=8, latent="vector", latent_dim=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            (LatentDiscriminator(grid), (5, 4, 2, 2)),
            (LatentDiscriminator(vector), (5, 4, 1, 1)),
            (ImageDiscriminator(grid), (5, 3, 32, 32)),
            (ImageDiscriminator(vector), (5, 1, 32, 32)),
        ]


@pytest.mark.parametrize(("discriminator", "shape"), discriminators())
def test_the_penalty_of_a_batch_is_the_mean_of_its_samples_penalties(discriminator, shape):
    """A batch norm in a discriminator would break this: its gradient at one sample depends on the others."""
    samples = random(shape)  # real and fake alike, so that the point between them is the same in any batch
    discriminator.train()
    together = gradient_penalty(discriminator, samples, samples, generator=seeded())
    alone = [gradient_penalty(discriminator, one, one, generator=seeded()) for one in samples.split(1)]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-4)


def test_minimising_the_penalty_brings_the_slope_to_one():
    discriminator = Linear(3 * random((5, 1)))
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    for step in range(100):
        optimizer.zero_grad()
        penalty_of(discriminator, (6, 5), seed=step).backward()
        optimizer.step()
    assert discriminator.weight.norm().item() == pytest.approx(1, abs=1e-3)


# Adversarial losses


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 4, 4)])
def test_the_bce_losses_are_binary_cross_entropies(shape):
    real, fake = 3 * random(shape, 1), 3 * random(shape, 2)
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    expected = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    assert torch.allclose(discriminator_loss("bce", real, fake), expected)
    # Non-saturating: the generator wants its fakes called real.
    assert torch.allclose(generator_loss("bce", fake), F.binary_cross_entropy_with_logits(fake, ones))


def test_the_bce_loss_of_an_undecided_discriminator_is_twice_the_logarithm_of_two():
    zeros = torch.zeros(4, 1)
    assert discriminator_loss("bce", zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert generator_loss("bce", zeros).item() == pytest.approx(math.log(2))


def test_the_bce_losses_stay_finite_and_keep_their_slope_at_extreme_logits():
    """The generator's slope is largest where its fakes are found out: -log(1 - D) would have none there."""
    real, fake = torch.tensor([-1e4]).requires_grad_(), torch.tensor([1e4]).requires_grad_()
    loss = discriminator_loss("bce", real, fake)
    loss.backward()
    assert loss.item() == 2e4
    assert (real.grad, fake.grad) == (torch.tensor([-1.0]), torch.tensor([1.0]))
    found_out = torch.tensor([-1e4]).requires_grad_()
    generator_loss("bce", found_out).backward()
    assert found_out.grad == torch.tensor([-1.0])


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 4, 4)])
def test_the_wgan_losses_are_differences_of_means(shape):
    real, fake = random(shape, 1), random(shape, 2)
    assert torch.allclose(discriminator_loss("wgan-gp", real, fake), fake.mean() - real.mean())
    assert torch.allclose(generator_loss("wgan-gp", fake), -fake.mean())


@pytest.mark.parametrize("kind", ["bce", "wgan-gp"])
def test_a_discriminator_gains_by_high_logits_on_real_samples_and_a_generator_on_fake_ones(kind):
    low, high = torch.full((4, 1), -1.0), torch.full((4, 1), 1.0)
    assert discriminator_loss(kind, high, low) < discriminator_loss(kind, low, high)
    assert generator_loss(kind, high) < generator_loss(kind, low)


@pytest.mark.parametrize("kind", ["bce", "wgan-gp"])
def test_a_discriminator_without_real_samples_learns_from_the_fakes_alone(kind):
    """Of a small batch every patch may be damaged."""
    real, fake = torch.empty(0), random((6,)).requires_grad_()
    loss = discriminator_loss(kind, real, fake)
    assert torch.equal(loss, F.softplus(fake).mean() if kind == "bce" else fake.mean())
    loss.backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


# Reconstruction loss


def images(seed: int = 0) -> Tensor:
    return torch.rand((2, 3, 32, 32), generator=seeded(seed)) * 2 - 1


def loss_of(
    reconstructions: Tensor, originals: Tensor, *, l2: float = 0, ssim: float = 0, gradient: float = 0
) -> Tensor:
    return reconstruction_loss(reconstructions, originals, l2_weight=l2, ssim_weight=ssim, gradient_weight=gradient)


def test_the_loss_of_a_perfect_reconstruction_is_zero():
    assert loss_of(images(), images(), l2=1, ssim=1, gradient=1).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_squared_error_is_the_mean_over_pixels_and_channels(channels):
    originals = torch.full((2, channels, 32, 32), 0.25)
    originals[0] = -0.75
    reconstructions = torch.full_like(originals, 0.25)
    assert loss_of(reconstructions, originals, l2=3).item() == pytest.approx(3 * 0.5)


def test_the_ssim_term_of_two_flat_images_compares_their_brightness():
    """Wang et al. 2004, equation 6, without variance: (2 a b + C1) / (a^2 + b^2 + C1), C1 = (0.01 L)^2, L = 2."""
    first, second = 0.5, 0.2
    similarity = (2 * first * second + 0.02**2) / (first**2 + second**2 + 0.02**2)
    loss = loss_of(torch.full((1, 3, 32, 32), first), torch.full((1, 3, 32, 32), second), ssim=2)
    assert loss.item() == pytest.approx(2 * (1 - similarity), rel=1e-4)


def test_the_gradient_term_is_blind_to_brightness_and_sees_edges():
    flat, edge = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1
    assert loss_of(flat, flat + 0.5, gradient=1).item() == pytest.approx(0, abs=1e-6)
    # The edge touches two of 32 columns; the similarity there is near 0.
    assert loss_of(flat, edge, gradient=1).item() == pytest.approx(2 / 32, rel=0.05)


def test_the_terms_add_up_by_their_weights():
    pair = images(1), images(2)
    l2, ssim, gradient = loss_of(*pair, l2=1), loss_of(*pair, ssim=1), loss_of(*pair, gradient=1)
    assert min(l2.item(), ssim.item(), gradient.item()) > 0.1
    together = loss_of(*pair, l2=0.5, ssim=2, gradient=3)
    assert together.item() == pytest.approx((0.5 * l2 + 2 * ssim + 3 * gradient).item(), rel=1e-5)


def test_a_blurred_reconstruction_costs_more_than_an_equal_error_of_brightness_by_the_gradient_term():
    originals = images()
    blurred = F.avg_pool2d(F.pad(originals, (1, 1, 1, 1), mode="replicate"), kernel_size=3, stride=1)
    error = F.mse_loss(blurred, originals).sqrt()
    shifted = originals + error
    assert loss_of(blurred, originals, l2=1).item() == pytest.approx(loss_of(shifted, originals, l2=1).item(), rel=1e-5)
    assert loss_of(blurred, originals, gradient=1) > loss_of(shifted, originals, gradient=1) + 0.1


@pytest.mark.parametrize("term", ["l2", "ssim", "gradient"])
def test_every_term_alone_brings_a_reconstruction_closer(term):
    originals = images()
    reconstructions = (0.8 * originals + 0.05 * images(1)).requires_grad_()
    loss = loss_of(reconstructions, originals, **{term: 1.0})
    (gradient,) = torch.autograd.grad(loss, reconstructions)
    assert gradient.isfinite().all()
    step = 1e-3 * gradient / gradient.norm()
    assert loss_of(reconstructions - step, originals, **{term: 1.0}) < loss


@pytest.mark.parametrize("originals", [images(), torch.zeros(2, 3, 32, 32)])
def test_the_slope_of_a_perfect_reconstruction_is_finite(originals):
    reconstructions = originals.clone().requires_grad_()
    loss_of(reconstructions, originals, l2=1, ssim=1, gradient=1).backward()
    assert reconstructions.grad is not None
    assert reconstructions.grad.isfinite().all()
