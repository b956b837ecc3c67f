"""Synthetic defects: where they are, what fills them, and that nothing else changes."""

import pytest
import torch
from torch import Tensor

from training.corruption import corrupt

SIZE = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, *, channels: int = 3, size: int = SIZE) -> Tensor:
    return torch.rand((count, channels, size, size), generator=seeded(7)) * 2 - 1


def corrupted(images: Tensor, *, probability: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return corrupt(images, probability=probability, generator=seeded(seed))


def labelled(count: int) -> Tensor:
    """Images that say who they are: channel 0 is one number per image, channel 1 a ramp across, channel 2 one down."""
    images = torch.empty((count, 3, SIZE, SIZE))
    ramp = torch.arange(SIZE) / SIZE
    images[:, 0] = torch.linspace(-0.97, 0.97, count).view(count, 1, 1)
    images[:, 1] = ramp
    images[:, 2] = ramp.view(SIZE, 1)
    return images


def filling(image: Tensor, damaged: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What was laid over an image where its defect is not faint, (C, N), and what was there before."""
    where = mask[0] > 0.25
    before = image[:, where]
    return before + (damaged[:, where] - before) / mask[:, where], before


def kind_of_filling(images: Tensor, index: int, damaged: Tensor, mask: Tensor) -> str:
    """The kind that filled an image of `labelled`; "none" where the defect is too faint to tell."""
    values, _ = filling(images[index], damaged[index], mask[index])
    if values.shape[1] < 10:
        return "none"
    if (values - values[:, :1]).abs().max() < 1e-3:
        return "flat colour"
    number = values[0]
    if (number - images[index, 0, 0, 0]).abs().max() < 1e-3:
        return "another place"
    if (number - images[index - 1, 0, 0, 0]).abs().max() < 1e-3:
        return "another part"
    return "noise"


def test_images_with_a_probability_of_zero_are_not_changed():
    images = noise(16)
    damaged, mask = corrupted(images, probability=0.0)
    assert torch.equal(damaged, images)
    assert not mask.any()


@pytest.mark.parametrize("size", [32, 128])
def test_every_image_with_a_probability_of_one_is_changed_where_its_mask_is(size):
    images = noise(64, size=size)
    damaged, mask = corrupted(images)
    change = (damaged - images).abs().amax(dim=1, keepdim=True)
    assert (mask.flatten(1).amax(dim=1) > 0).all()
    assert (change.flatten(1).amax(dim=1) > 0).all()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_defect_is_never_too_faint_to_be_seen(size):
    """The least opacity is 0.3; a small blob between the pixels of a small image must not fade below it."""
    _, mask = corrupted(noise(512, channels=1, size=size))
    assert mask.amax(dim=(1, 2, 3)).min() > 0.25


def test_about_the_given_share_of_images_is_changed():
    images = noise(400, size=32)
    damaged, mask = corrupted(images, probability=0.3)
    changed = (damaged != images).flatten(1).any(dim=1)
    assert torch.equal(changed, (mask > 0).flatten(1).any(dim=1))
    assert 0.2 < changed.float().mean() < 0.4


def test_nothing_changes_outside_the_mask():
    images = noise(64)
    damaged, mask = corrupted(images)
    change = (damaged - images).abs().amax(dim=1, keepdim=True)
    assert not change[mask == 0].any()
    # The opacity bounds the change: nothing differs by more than 2 within [-1, 1].
    assert (change <= 2 * mask + 1e-6).all()
    # Most of an image is outside.
    assert ((mask < 1e-3).float().mean(dim=(1, 2, 3)) > 0.5).all()


@pytest.mark.parametrize(("count", "channels", "size"), [(2, 1, 32), (2, 3, 512), (1, 3, 64), (3, 1, 48), (0, 3, 32)])
def test_batches_of_any_size_channels_and_resolution_keep_their_shape_and_range(count, channels, size):
    damaged, mask = corrupted(noise(count, channels=channels, size=size))
    assert damaged.shape == (count, channels, size, size)
    assert mask.shape == (count, 1, size, size)
    assert damaged.dtype == mask.dtype == torch.float32
    assert damaged.isfinite().all()
    assert ((damaged >= -1) & (damaged <= 1)).all()
    assert ((mask >= 0) & (mask <= 1)).all()


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_black_and_white_images_stay_in_range(value):
    damaged, _ = corrupted(torch.full((128, 3, 32, 32), value))
    assert ((damaged >= -1) & (damaged <= 1)).all()
    assert (damaged != value).any()


def test_the_images_given_are_not_changed_themselves():
    images = noise(8)
    before = images.clone()
    corrupted(images)
    assert torch.equal(images, before)


def test_defects_are_drawn_from_the_generator_alone():
    images = noise(8)
    state = torch.get_rng_state()
    first, second, other = corrupted(images), corrupted(images), corrupted(images, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_successive_draws_of_one_generator_differ():
    images, generator = noise(8), seeded()
    masks = [corrupt(images, probability=1.0, generator=generator)[1] for _ in range(2)]
    assert not torch.equal(masks[0], masks[1])


def test_the_images_of_a_batch_get_different_defects():
    _, mask = corrupted(noise(16))
    assert len({tuple(one.flatten().tolist()) for one in mask}) == 16


def test_each_of_the_four_fillings_occurs_about_equally_often():
    images = labelled(32)
    kinds: list[str] = []
    for seed in range(20):
        damaged, mask = corrupted(images, seed=seed)
        kinds += [kind_of_filling(images, index, damaged, mask) for index in range(len(images))]
    told = [kind for kind in kinds if kind != "none"]
    assert len(told) > 300
    for kind in ("flat colour", "noise", "another part", "another place"):
        assert 0.17 < told.count(kind) / len(told) < 0.33, kind


def test_another_place_is_at_least_an_eighth_of_the_image_away():
    images = labelled(32)
    shifts = []
    for seed in range(20):
        damaged, mask = corrupted(images, seed=seed)
        for index in range(len(images)):
            if kind_of_filling(images, index, damaged, mask) != "another place":
                continue
            values, before = filling(images[index], damaged[index], mask[index])
            shift = ((before - values)[1:] * SIZE).round() % SIZE  # (2, N): across and down, in pixels
            assert (shift == shift[:, :1]).all()
            shifts.append(shift[:, 0])
    across, down = torch.stack(shifts).T
    for shift in (across, down):
        assert ((shift >= SIZE / 8) & (shift <= SIZE - SIZE / 8)).all()
        assert shift.unique().numel() > 5


def test_a_flat_colour_differs_from_image_to_image_and_by_channel():
    images = labelled(32)
    damaged, mask = corrupted(images)
    colours = [
        filling(images[index], damaged[index], mask[index])[0][:, 0]
        for index in range(len(images))
        if kind_of_filling(images, index, damaged, mask) == "flat colour"
    ]
    assert len(colours) > 3
    assert torch.stack(colours).std(dim=0).min() > 0.1
    assert torch.stack(colours).std(dim=1).min() > 0.01


@pytest.mark.parametrize("size", [64, 256])
def test_defects_are_of_all_sizes_up_to_a_sixth_of_the_image(size):
    """A side of 3 to 40 % is 0.07 to 13 % of the area as an ellipse; the ragged border adds or takes some."""
    _, mask = corrupted(noise(512 if size == 64 else 64, channels=1, size=size))
    area = (mask > mask.amax(dim=(1, 2, 3), keepdim=True) / 2).float().mean(dim=(1, 2, 3))
    assert area.max() < 0.18
    assert 0.004 < area.median() < 0.025
    assert area.quantile(0.9) > 0.04
    assert area.quantile(0.1) < 0.003


def test_defects_lie_anywhere_in_the_image():
    _, mask = corrupted(noise(512, channels=1, size=32))
    assert (mask.amax(dim=(0, 1)) > 0.3).float().mean() > 0.95


def test_opacities_reach_from_faint_to_full():
    _, mask = corrupted(noise(256, channels=1, size=128))
    peak = mask.flatten(1).amax(dim=1)
    assert peak.min() < 0.4
    assert peak.max() > 0.95


def test_defects_are_longer_than_wide_in_every_direction():
    """The main axis of a defect, from its second moments: across, down and both diagonals are about as frequent."""
    _, mask = corrupted(noise(256, channels=1, size=128))
    axis = torch.linspace(-1, 1, 128)
    weight = mask[:, 0] / mask[:, 0].sum(dim=(1, 2), keepdim=True)
    across, down = weight.sum(dim=1), weight.sum(dim=2)  # (B, S)
    x, y = (across * axis).sum(dim=1), (down * axis).sum(dim=1)
    xx = (across * axis**2).sum(dim=1) - x**2
    yy = (down * axis**2).sum(dim=1) - y**2
    xy = torch.einsum("bij,i,j->b", weight, axis, axis) - x * y
    spread = ((xx - yy) ** 2 / 4 + xy**2).sqrt()
    ratio = (((xx + yy) / 2 + spread) / ((xx + yy) / 2 - spread)).sqrt()
    assert ratio.median() > 1.5
    angle = torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2)[ratio > 1.5]  # -90 to 90
    share = torch.histc((angle + 22.5) % 180, bins=4, min=0, max=180) / len(angle)
    assert (share > 0.15).all()
