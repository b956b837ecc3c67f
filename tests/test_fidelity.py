"""How true images are to others, against closed forms: cosines, Gaussians, and torchmetrics where it has the same."""

import math

import numpy as np
import pytest
import torch
from scipy import fft, linalg
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from training import fidelity


def pictures(count: int = 3, *, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def blurred(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def cosine(period: float, *, amplitude: float = 0.5, side: int = 64, across: bool = True) -> torch.Tensor:
    """(1, 1, S, S), mirrored at its borders."""
    wave = amplitude * torch.cos(2 * math.pi * (torch.arange(side) + 0.5) / period)
    return (wave if across else wave.unsqueeze(1)).expand(1, 1, side, side)


# Image by image


def test_psnr_is_the_mean_of_the_images_decibels():
    # 20 log10(range / error) with a range of 2: 26.02 dB for an error of 0.1, 46.02 dB for 0.01.
    images = pictures(2)
    error = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert fidelity.psnr(images + error, images) == pytest.approx(20 * math.log10(2) + (20 + 40) / 2, abs=1e-3)


def test_psnr_of_equal_images_is_finite():
    assert fidelity.psnr(pictures(), pictures()) == pytest.approx(126.02, abs=0.01)


def test_ssim_is_one_for_equal_images_and_torchmetrics_mean_for_others():
    images = pictures(19)
    assert fidelity.ssim(images, images) == pytest.approx(1, abs=1e-6)
    noisy = images + 0.3 * pictures(19, seed=1) * torch.linspace(0, 1, 19).view(19, 1, 1, 1)
    expected = structural_similarity_index_measure(noisy, images, data_range=2.0)
    assert isinstance(expected, torch.Tensor)
    assert fidelity.ssim(noisy, images) == pytest.approx(float(expected), abs=1e-5)
    assert fidelity.ssim(noisy, images) < 0.99


def test_ms_ssim_is_torchmetrics_mean_from_176_pixels_and_none_below():
    images = pictures(9, side=fidelity.SMALLEST_MS_SSIM)
    assert fidelity.ms_ssim(images, images) == pytest.approx(1, abs=1e-6)
    expected = multiscale_structural_similarity_index_measure(blurred(images), images, data_range=2.0)
    assert fidelity.ms_ssim(blurred(images), images) == pytest.approx(float(expected), abs=1e-5)
    assert fidelity.ms_ssim(images[..., 16:, 16:], images[..., 16:, 16:]) is None


# Octaves


@pytest.mark.parametrize(("period", "octave"), [(2.5, 0), (4, 0), (4.2, 1), (8, 1), (16, 2), (32, 3)])
def test_a_cosine_has_half_its_squared_amplitude_in_the_octave_of_its_period(period, octave):
    side = round(10 * period)  # whole half periods: it is one coefficient of the transform
    energies = fidelity.octave_energies(cosine(period, amplitude=0.5, side=side))
    assert energies[octave] == pytest.approx(0.5**2 / 2, rel=1e-5)
    assert energies.sum() == pytest.approx(energies[octave], rel=1e-5)


def test_a_wave_along_the_diagonal_counts_by_its_own_period():
    # Periods of 5 across and down are 5 / sqrt(2) = 3.5 along the diagonal.
    diagonal = cosine(5, side=50) * cosine(5, side=50, across=False)
    assert fidelity.octave_energies(diagonal)[0] == pytest.approx(fidelity.octave_energies(diagonal).sum(), rel=1e-5)


def test_brightness_and_a_slope_that_ends_at_another_height_are_no_fine_detail():
    slope = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    fine = fidelity.octave_energies(slope)[0]
    edge = slope.roll(32, dims=3)  # what Fourier's transform would see: a jump of 2
    assert fine < 1e-3 * fidelity.octave_energies(edge)[0]
    assert fidelity.octave_energies(torch.full((1, 1, 64, 64), 0.7)).sum() < 1e-12


def test_a_blurred_image_loses_exactly_its_upper_octaves():
    images = pictures(4, side=64)
    along = np.arange(64) / 128
    kept = np.hypot(along[:, None], along) < 1 / 8
    coefficients = fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho") * kept
    smooth = torch.from_numpy(fft.idctn(coefficients, axes=(2, 3), norm="ortho"))
    ratios = fidelity.octave_ratios(smooth, images)
    assert list(ratios) == ["2-4", "4-8", "8-16", "16-32"]
    assert [ratios["2-4"], ratios["4-8"]] == pytest.approx([0, 0], abs=1e-6)
    assert [ratios["8-16"], ratios["16-32"]] == pytest.approx([1, 1], rel=1e-6)
    assert fidelity.sharpness_ratio(smooth, images) == pytest.approx(0, abs=1e-6)


def test_sharpness_ratio_is_one_for_equal_images_and_less_for_blurred_ones():
    images = pictures()
    assert fidelity.sharpness_ratio(images, images) == 1
    assert fidelity.sharpness_ratio(blurred(images), images) < 0.2
    assert fidelity.sharpness_ratio(images, blurred(images)) > 5


def test_sharpness_ratio_is_the_square_of_the_contrast_and_blind_to_brightness():
    images = pictures()
    assert fidelity.sharpness_ratio(images / 2 + 0.3, images) == pytest.approx(1 / 4, rel=1e-4)


def test_sharpness_ratio_of_sets_of_other_sizes_compares_means():
    few, many = pictures(2), pictures(2).repeat(5, 1, 1, 1)
    assert fidelity.sharpness_ratio(few, many) == pytest.approx(1)


def test_sharpness_ratio_of_a_flat_image_is_one_where_the_reconstruction_is_flat():
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert fidelity.sharpness_ratio(flat - 0.5, flat) == pytest.approx(1, rel=1e-3)


def test_variety_ratio_is_that_of_the_variances_and_zero_for_one_picture():
    images = pictures(6)
    assert fidelity.variety_ratio(images, images) == 1
    middle = images.mean(dim=0)
    assert fidelity.variety_ratio(middle + (images - middle) / 2, images) == pytest.approx(1 / 4, rel=1e-4)
    assert fidelity.variety_ratio(images[:1].expand(6, -1, -1, -1), images) < 1e-6


# Fréchet distance


def standard_normal(count: int, dimensions: int, *, seed: int = 0) -> np.ndarray:
    """(N, D) with mean 0 and covariance I, exactly."""
    drawn = np.random.default_rng(seed).normal(size=(count, dimensions))
    orthogonal, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
    return orthogonal * math.sqrt(count - 1)


def test_frechet_distance_of_gaussians_with_the_same_axes_is_that_of_means_and_deviations():
    first, second = standard_normal(40, 3), standard_normal(60, 3, seed=1)
    shift, deviations = np.array([1.0, -2.0, 0.0]), np.array([1.0, 0.5, 3.0])
    expected = 1 + 4 + 0.5**2 + 2**2  # |m - n|^2 + sum (s - t)^2
    assert fidelity.frechet_distance(first, second * deviations + shift) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_any_gaussians_is_the_formula_with_a_root_of_a_matrix():
    random = np.random.default_rng(0)
    first = standard_normal(50, 4) @ random.normal(size=(4, 4))
    second = standard_normal(30, 4, seed=1) @ random.normal(size=(4, 4)) + 1
    root = linalg.sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    expected = 4 + np.trace(np.cov(first.T) + np.cov(second.T) - 2 * root)
    assert fidelity.frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics_on_the_same_features():
    images, others = pictures(50), blurred(pictures(50, seed=1))
    reference = FrechetInceptionDistance(feature=fidelity.RandomFeatures(), normalize=True, input_img_size=(3, 32, 32))
    reference.update(images, real=True)
    reference.update(others, real=False)
    found = fidelity.frechet_distance(fidelity.random_features(images), fidelity.random_features(others))
    assert found == pytest.approx(float(reference.compute()), rel=1e-3)


def test_frechet_distance_of_a_set_to_itself_is_zero_with_fewer_images_than_features():
    features = np.random.default_rng(0).normal(size=(5, 35))
    assert fidelity.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert fidelity.frechet_distance(features, features[::-1] + 1) == pytest.approx(35)


def test_frechet_distance_refuses_one_image():
    with pytest.raises(ValueError, match="1 and 5 images"):
        fidelity.frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_frechet_floor_is_the_bias_of_so_few_images_and_shrinks_with_more():
    random = np.random.default_rng(0)
    few, many = (fidelity.frechet_floor(random.normal(size=(count, 4))) for count in (20, 400))
    assert few is not None
    assert many is not None
    assert few > 5 * many > 0
    assert fidelity.frechet_floor(random.normal(size=(3, 4))) is None


# Random features


def test_random_features_are_the_same_on_every_call_and_of_any_batch():
    torch.manual_seed(1)
    first = fidelity.random_features(pictures(9))
    torch.manual_seed(2)
    assert first.shape == (9, 35)
    np.testing.assert_allclose(fidelity.random_features(pictures(9)[3:5]), first[3:5], rtol=1e-5)
    # Figures of one version are not to be compared with those of another if the weights ever change.
    assert first[0, 3:7] == pytest.approx([-1.3887, -1.4929, -1.1191, -1.3687], abs=1e-3)


def test_random_features_see_brightness_in_the_mean_colour_alone():
    images = pictures(2)
    moved = fidelity.random_features(images + 0.1) - fidelity.random_features(images)
    assert moved[:, :3] == pytest.approx(0.1, abs=1e-5)
    assert moved[:, 3:] == pytest.approx(0, abs=1e-4)


def test_random_features_of_gray_images_are_those_of_the_same_in_colour():
    gray = pictures(2)[:, :1]
    colour = fidelity.random_features(gray.expand(-1, 3, -1, -1))
    np.testing.assert_allclose(fidelity.random_features(gray), colour, rtol=1e-6)


def test_random_features_tell_blur_noise_and_one_repeated_picture_from_the_images():
    """Parts: a common picture, and what differs."""
    images = 0.5 * blurred(pictures(1, seed=5)) + 0.3 * blurred(pictures(24))
    features = fidelity.random_features(images)
    floor = fidelity.frechet_floor(features)
    assert floor is not None
    others = fidelity.random_features(0.5 * blurred(pictures(1, seed=5)) + 0.3 * blurred(pictures(24, seed=9)))
    assert fidelity.frechet_distance(others, features) < floor
    for made in (blurred(images), images + 0.1 * pictures(24, seed=3), images[:1].expand(24, -1, -1, -1)):
        assert fidelity.frechet_distance(fidelity.random_features(made), features) > floor
