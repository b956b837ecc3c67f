"""Synthetic defects: where they are, what fills them, what their masks say, and that nothing else changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from training.corruption import (
    BLOCK,
    DEFECTS,
    SMALL,
    VISIBLE,
    Draws,
    altered,
    corrupt,
    corrupt_features,
    fillings,
    moved,
    painted,
    radii_on,
    relit,
    roughened,
    shapes,
    warped,
)

SIZE = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, *, channels: int = 3, size: int = SIZE) -> Tensor:
    """Standardised images, in which every defect shows."""
    return 0.5 * torch.randn((count, channels, size, size), generator=seeded(7))


def labelled(count: int) -> Tensor:
    """Images that say who they are: channel 0 is one number per image, channel 1 a ramp across, channel 2 one down."""
    ramp = torch.arange(SIZE) / SIZE
    images = torch.empty((count, 3, SIZE, SIZE))
    images[:, 0] = torch.arange(count).view(count, 1, 1) / count
    images[:, 1] = ramp
    images[:, 2] = ramp.view(SIZE, 1)
    return images


def flat(count: int, *, size: int = 16) -> Tensor:
    """Images of one colour each: a number per image, and 10 more from channel to channel."""
    numbers = torch.arange(count).view(count, 1, 1, 1) / count
    return (numbers + torch.tensor([0.0, 10.0, 20.0]).view(1, 3, 1, 1)).expand(count, 3, size, size).contiguous()


def visible_blocks(damaged: Tensor, images: Tensor) -> Tensor:
    """(B, 1, S, S), True where the root mean square of the change, over a block, is above VISIBLE."""
    count, _, size, _ = images.shape
    blocks = (damaged - images).square().view(count, 3, size // BLOCK, BLOCK, size // BLOCK, BLOCK)
    seen = blocks.mean(dim=(1, 3, 5)).sqrt() > VISIBLE
    return seen.repeat_interleave(BLOCK, dim=1).repeat_interleave(BLOCK, dim=2).unsqueeze(1)


def corrupted(
    images: Tensor, *, probability: float = 1.0, seed: int = 0, over_features: bool = False
) -> tuple[Tensor, Tensor]:
    return corrupt(images, probability=probability, generator=seeded(seed), over_features=over_features)


def regions(mask: Tensor) -> NDArray[np.int64]:
    """Areas of the connected parts of a mask (1, S, S), in pixels."""
    labels, _ = ndimage.label(mask[0].numpy(), structure=np.ones((3, 3)))
    return np.bincount(labels.flatten())[1:]


def widened(mask: Tensor, *, by: int) -> Tensor:
    """A mask (B, 1, S, S), grown by that many pixels on each side."""
    return F.max_pool2d(mask.float(), kernel_size=2 * by + 1, stride=1, padding=by)


def any_pixel(images: Tensor) -> Tensor:
    return (images != 0).flatten(1).any(dim=1)


def share(chosen: Tensor) -> float:
    return float(chosen.float().mean())


# Images and masks


@pytest.mark.parametrize("over_features", [False, True])
@pytest.mark.parametrize("size", [SIZE, 144, 256, 320])
def test_images_with_a_probability_of_zero_are_not_changed(size, over_features):
    images = noise(4, size=size)
    damaged, masks = corrupted(images, probability=0.0, over_features=over_features)
    assert torch.equal(damaged, images)
    assert not masks.any()


def test_each_of_the_defects_is_drawn_with_the_given_probability():
    images = noise(500, size=32)
    for probability in (0.2, 0.5, 1.0):
        damaged, masks = corrupted(images, probability=probability)
        expected = 1 - (1 - probability) ** DEFECTS
        # Some defects are too small or too faint: less than a pixel, or a fleck of which nothing is left.
        assert expected - 0.2 < share(any_pixel(masks)) <= share(any_pixel(damaged - images)) < expected + 0.05


@pytest.mark.parametrize("contrast", [1.0, 0.2])
@pytest.mark.parametrize("size", [32, 128, 192])
def test_masks_mark_the_blocks_that_change_visibly_and_no_others(size, contrast):
    images = contrast * noise(256 if size == 32 else 48, size=size)
    damaged, masks = corrupted(images)
    assert ((masks == 0) | (masks == 1)).all()
    seen = visible_blocks(damaged, images)
    # Of two defects one may undo the other; at its border a block is marked where the defect lies.
    assert share(seen[masks == 1]) > 0.95
    assert share(widened(masks, by=BLOCK - 1)[seen]) > 0.98
    assert 0.01 < share(masks) < 0.2  # most of an image is outside


def test_large_images_get_more_defects_and_most_are_as_small_as_those_of_small_ones():
    areas = []
    for size, count in ((SMALL, 256), (2 * SMALL, 64)):  # as many pixels
        areas.append(np.concatenate([regions(mask) for mask in corrupted(noise(count, size=size))[1]]))
    small, large = areas
    assert 0.7 < len(large) / len(small) < 1.5
    assert 0.5 < np.median(large) / np.median(small) < 2
    assert large.max() > 1.5 * small.max()


def test_over_features_half_of_the_large_images_have_small_defects_on_every_piece_too():
    found = [regions(mask) for mask in corrupted(noise(64, size=320), over_features=True)[1]]  # of 16 pieces
    crowded = [areas for areas in found if len(areas) > 8]
    others = [areas for areas in found if len(areas) <= 8]  # two defects, of which a speck has several parts
    assert 0.35 < len(crowded) / len(found) < 0.65
    assert np.mean([len(areas) for areas in crowded]) > 4 * np.mean([len(areas) for areas in others])
    assert np.median(np.concatenate(crowded)) < np.median(np.concatenate(others))
    assert np.concatenate(crowded).sum() / len(crowded) < 0.12 * 320**2  # larger ones would cover twice as much


def test_over_features_small_images_have_the_defects_of_other_small_images():
    images = noise(8)
    for damaged, expected in zip(corrupted(images, over_features=True), corrupted(images), strict=True):
        assert torch.equal(damaged, expected)


def test_large_images_have_defects_everywhere_also_across_the_middle():
    masks = torch.cat([corrupted(noise(16, size=160), seed=seed)[1] for seed in range(8)])
    covered = F.avg_pool2d(masks.mean(dim=0), 20)
    assert covered.min() > 0.25 * covered.mean()
    across = (masks[..., 79] * masks[..., 80]).mean() / masks[..., 78:82].mean()  # in both columns at the middle
    assert across > 0.5


def test_noise_that_is_replaced_by_other_noise_is_not_marked():
    images = 0.06 * torch.randn((256, 3, 32, 32), generator=seeded())
    images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1) * 3**0.5
    damaged, masks = corrupted(images)
    seen = any_pixel(visible_blocks(damaged, images))
    replaced = any_pixel((damaged - images).abs() > 0.1)
    assert share(replaced & ~seen) > 0.1  # a pixel here and there changes by more
    assert not masks[~seen].any()


def test_what_is_pasted_onto_its_equal_is_not_marked():
    images = torch.full((400, 3, 32, 32), 0.3)
    damaged, masks = corrupted(images)
    unchanged = ~any_pixel((damaged - images).abs() > 1e-5)
    # Half of the fillings are copies or blurs, and both defects of an image must be.
    assert 0.2 < share(unchanged) < 0.35
    assert not masks[unchanged].any()
    assert share(any_pixel(masks)[~unchanged]) > 0.7  # the others are faint


def test_defects_are_faint_or_cover_what_was_there():
    images = torch.zeros((3200, 1, SIZE, SIZE))
    images[1::2] = 1000.0
    damaged, _ = corrupted(images)
    opacity = damaged[::2].flatten(1).amax(dim=1) / 1000  # of what came from the other part
    opacity = opacity[opacity > 0.05]
    assert 0.25 < share(opacity < 0.65) < 0.65
    assert opacity.max() > 0.95


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
    first, second = (corrupt(images, probability=1.0, generator=generator)[1] for _ in range(2))
    assert not torch.equal(first, second)


def test_what_an_image_gets_does_not_depend_on_its_place_in_the_batch():
    images, generator = flat(8), seeded()
    grainy = torch.zeros(8)
    for _ in range(400):
        damaged, _ = corrupt(images, probability=0.5, generator=generator)
        grainy += (damaged - images).flatten(1).abs().amax(dim=1) > 1e-4
    assert (grainy / 400 - grainy.mean() / 400).abs().max() < 0.1


def test_the_images_of_a_batch_get_different_defects():
    damaged, _ = corrupted(noise(1).expand(16, 3, SIZE, SIZE))
    assert len(damaged.flatten(1).unique(dim=0)) == 16


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "over_features"), [*((size, False) for size in (32, 48, 64, 128, 144, 176, 272)), (160, True), (288, True)]
)
def test_batches_of_any_size_channels_and_resolution_keep_their_shape(count, channels, size, over_features):
    damaged, masks = corrupted(noise(count, channels=channels, size=size), over_features=over_features)
    assert damaged.shape == (count, channels, size, size)
    assert masks.shape == (count, 1, size, size)
    assert damaged.dtype == masks.dtype == torch.float32
    assert damaged.isfinite().all()
    assert ((masks == 0) | (masks == 1)).all()


def test_the_layout_in_memory_decides_nothing():
    images = noise(16)
    damaged, masks = corrupted(images)
    others = corrupted(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(others[0], damaged)
    assert torch.equal(others[1], masks)


# Fillings


def test_each_filling_is_computed_for_the_images_that_get_it():
    images = flat(1000)
    filled = torch.cat([filling for _, filling in fillings(images, Draws(len(images), seeded()))])
    number, step = filled[:, 0].mean(dim=(1, 2)), (filled[:, 1] - filled[:, 0]).mean(dim=(1, 2))
    expected = images[:, 0, 0, 0]
    level = filled.std(dim=(2, 3)).amax(dim=1) < 1e-4  # neither grainy nor painted, which always has some texture
    same_step = (step - 10).abs() < 1e-4
    of_itself = level & same_step & ((number - expected).abs() < 1e-4)
    of_another = level & same_step & ((number - expected.roll(1)).abs() < 1e-4)
    own_colour = same_step & ~level
    contrast = ~same_step & (step > 5.9) & (step < 14.1)
    rest = ~(of_itself | of_another | own_colour | contrast)
    assert 0.43 < share(of_itself) < 0.53  # roughened, moved on the same part, or moved and relit
    assert 0.05 < share(of_another) < 0.1  # moved from another part
    assert 0.05 < share(own_colour) < 0.11  # painted
    assert 0.16 < share(contrast) < 0.25  # altered
    assert 0.13 < share(rest) < 0.23  # painted in a gray or a colour


def test_paint_is_a_gray_or_a_colour_or_one_that_the_part_has():
    images = flat(600)
    images += torch.arange(16.0)  # a ramp across, the same in all channels
    paint = painted(images, Draws(len(images), seeded()))
    step = paint[:, 1:] - paint[:, :-1]  # (B, 2, 16, 16), from channel to channel: the texture cancels out
    assert (step - step[..., :1, :1]).abs().max() < 1e-4
    own = ((step - 10).abs() < 1e-4).flatten(1).all(dim=1)
    gray = (step.abs() < 1e-4).flatten(1).all(dim=1)
    assert 0.24 < share(own) < 0.36
    assert 0.28 < share(gray) < 0.42
    assert 0.28 < share(~own & ~gray) < 0.42
    where = (paint[own, 0] - images[own, 0, :, :1]).mean(dim=(1, 2)).round()
    assert set(range(16)) <= set(where.int().tolist())  # from anywhere on the part
    assert paint[gray].mean(dim=(1, 2, 3)).std() > 1  # dark and bright ones, well beyond the part's own grays


def test_paint_is_flat_or_has_a_texture():
    texture = painted(noise(200), Draws(200, seeded())).std(dim=(2, 3))[:, 0]
    assert texture.min() < 0.04
    assert texture.max() > 0.6
    assert 0.1 < texture.median() < 0.3


def test_what_is_moved_comes_from_another_part_or_the_same_one():
    images = labelled(300)
    number = moved(images, images.roll(1, dims=0), Draws(len(images), seeded()))[:, 0]
    expected = images[:, 0]
    same = ((number - expected).abs() < 1e-5).flatten(1).all(dim=1)
    other = ((number - expected.roll(1, dims=0)).abs() < 1e-5).flatten(1).all(dim=1)
    assert (same ^ other).all()
    assert 0.25 < share(other) < 0.45


def test_what_is_moved_on_the_same_part_is_warped_or_comes_from_elsewhere():
    images = labelled(300)
    source = moved(images, images, Draws(len(images), seeded()))
    shift = SIZE * (source - images)[:, 1:].square().sum(dim=1).sqrt()  # in pixels
    distance = shift.flatten(1).mean(dim=1)
    # A warp is small and differs from place to place. A jump is as far as another place.
    near = distance < 8
    assert 0.25 < share(near) < 0.45
    assert distance.min() > 0.2
    assert distance.max() > SIZE / 2
    assert shift[near].max() < 30
    assert shift[near].std(dim=(1, 2)).min() > 0.05


def test_what_is_moved_from_another_part_is_turned_and_scaled():
    images, others = labelled(300), labelled(300)
    others[:, 0] = 2
    source = moved(images, others, Draws(len(images), seeded()))
    ramp = SIZE * source[source[:, 0, 0, 0] > 1.5, 1]
    # What is reflected at the border of the image runs the other way.
    across = ramp.diff(dim=2).abs().flatten(1).median(dim=1).values
    down = ramp.diff(dim=1).abs().flatten(1).median(dim=1).values
    scale = torch.hypot(across, down)
    assert 0.65 < scale.min() < 0.8
    assert 1.25 < scale.max() < 1.45
    turn = torch.atan2(down, across)
    assert 0.35 < share(turn < 1e-3) < 0.65
    assert 0.4 < turn.max() < 0.55


def test_altered_places_are_brighter_or_darker_and_perhaps_grainy():
    images = torch.zeros((400, 3, SIZE, SIZE))
    brightness = altered(images, Draws(400, seeded()))
    assert torch.equal(brightness[:, :1].expand_as(brightness), brightness)  # light has no colour
    grain = brightness[:, 0].std(dim=(1, 2))
    assert 0.4 < share(grain < 1e-5) < 0.6
    level = brightness[grain < 1e-5, 0, 0, 0]
    assert 0.4 < share(level > 0) < 0.6
    assert 0.099 < level.abs().min() < 0.15
    assert 0.8 < level.abs().max() < 1.001
    grainy = brightness[grain > 1e-5, 0]
    step = grainy.diff(dim=2).std(dim=(1, 2)) / grainy.std(dim=(1, 2))
    assert 0.35 < share(step > 1.2) < 0.65  # of pixels, the others of patches


def test_altered_places_have_more_or_less_contrast():
    images = labelled(400)
    slope = SIZE * altered(images, Draws(400, seeded()))[:, 1:].diff(dim=1).std(dim=(1, 2, 3))  # the grain cancels out
    contrast = slope / (SIZE * images[:, 1:].diff(dim=1).std(dim=(1, 2, 3)))
    assert 0.599 < contrast.min() < 0.65
    assert 1.35 < contrast.max() < 1.401


def test_what_is_relit_keeps_its_texture_and_half_take_on_the_light_of_their_place():
    texture, slope = noise(200), 10 * labelled(200)[:, 1:2]
    found = relit(5 + texture, slope.expand_as(texture), Draws(200, seeded()))
    unchanged = (found - 5 - texture).abs().flatten(1).amax(dim=1) < 1e-5
    assert 0.4 < share(unchanged) < 0.6
    taken = found[~unchanged]
    inside = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    light = slope[:1, :, 16:-16, 16:-16]
    assert (taken[inside] - light).mean(dim=(2, 3)).abs().max() < 0.5  # 5 is gone, and the slope is there
    fine = (taken - slope[:1])[inside]
    original = texture[~unchanged][inside]
    assert (fine - original).std() < 0.3 * original.std()


def test_a_roughened_place_keeps_its_light_and_has_less_or_more_texture():
    images = 3 + noise(300)
    found = roughened(images, Draws(300, seeded()))
    assert (found.mean(dim=(2, 3)) - images.mean(dim=(2, 3))).abs().max() < 0.05
    gain = (found - 3).std(dim=(1, 2, 3)) / (images - 3).std(dim=(1, 2, 3))
    worn = gain < 1
    assert 0.5 < share(worn) < 0.7
    assert gain[worn].max() < 0.55
    assert 1.6 < gain[~worn].min() < 1.9
    assert 2.6 < gain.max() < 3.05
    ramp = labelled(1).expand(30, -1, -1, -1)
    inside = roughened(ramp, Draws(30, seeded()))[..., 6:-6, 6:-6]
    torch.testing.assert_close(inside, ramp[..., 6:-6, 6:-6])  # nothing is displaced


# Shapes


def drawn_shapes(count: int, size: int) -> Tensor:
    return shapes(Draws(count, seeded()), size, radii_on(size))


@pytest.mark.parametrize("size", [32, 48, 64, 128])
def test_shapes_lie_between_outside_and_inside(size):
    drawn = drawn_shapes(64, size)
    assert drawn.shape == (64, 1, size, size)
    assert drawn.min() == 0
    assert drawn.max() == 1


def test_shapes_are_of_all_sizes_from_a_few_pixels_to_a_large_share():
    area = (drawn_shapes(1024, SIZE) > 0.5).float().mean(dim=(1, 2, 3))
    assert share(area == 0) < 0.1
    assert area[area > 0].quantile(0.1) * SIZE**2 < 8
    assert 0.003 < area.median() < 0.015
    assert area.quantile(0.9) > 0.04
    assert 0.15 < area.max() < 0.5


def test_thin_long_lines_and_thick_shapes_occur():
    inside = (drawn_shapes(512, SIZE) > 0.5).float()
    eroded = 1 - widened(1 - inside, by=3)
    across, down = inside.amax(dim=(1, 2)).sum(dim=1), inside.amax(dim=(1, 3)).sum(dim=1)
    length, thick = torch.hypot(across, down), any_pixel(eroded)
    assert share(~thick & (length > SIZE / 4)) > 0.1
    assert share(thick) > 0.15


def test_lines_run_in_every_direction():
    inside = (drawn_shapes(1024, SIZE) > 0.5).float()
    across, down = inside.amax(dim=(1, 2)).sum(dim=1), inside.amax(dim=(1, 3)).sum(dim=1)
    assert share(across > 3 * down) > 0.03
    assert share(down > 3 * across) > 0.03


def test_shapes_reach_every_place():
    reached = (drawn_shapes(2048, 32) > 0.5).float().mean(dim=(0, 1))
    assert reached.min() > 0.003
    assert reached.max() < 0.1


def test_borders_are_sharp_or_soft():
    drawn = drawn_shapes(1024, SIZE)
    thick = drawn[any_pixel(1 - widened(drawn <= 0.5, by=4))]
    steepest = torch.maximum(thick.diff(dim=2).abs().amax(dim=(1, 2, 3)), thick.diff(dim=3).abs().amax(dim=(1, 2, 3)))
    assert share(steepest > 0.9) > 0.3
    assert share(steepest < 0.4) > 0.08


# Draws


@pytest.mark.parametrize(("filling", "images"), [(painted, flat(1)), (altered, flat(1)), (warped, labelled(1))])
def test_each_image_has_noise_of_its_own(filling, images):
    images = images.expand(64, -1, -1, -1)
    change = (filling(images, Draws(64, seeded())) - images)[:, 1].flatten(1)
    change = change - change.mean(dim=1, keepdim=True)
    change = change / change.norm(dim=1, keepdim=True).clamp(min=1e-3)
    assert (change @ change.T).abs().triu(diagonal=1).max() < 0.99


def test_parts_are_as_large_as_their_shares_and_make_up_the_whole():
    assert [part.count for part in Draws(3, seeded()).parts(0.0, 1.0, 0.0)] == [0, 3, 0]
    counts = [part.count for part in Draws(4096, seeded()).parts(0.2, 0.5, 0.3)]
    assert sum(counts) == 4096
    assert abs(counts[0] / 4096 - 0.2) < 0.03
    assert abs(counts[1] / 4096 - 0.5) < 0.03


@pytest.mark.parametrize("size", [32, 48, 64, 128])
@pytest.mark.parametrize("channels", [1, 2])
def test_noise_has_the_shape_asked_for_and_is_smooth_without_roughness(channels, size):
    step = []
    for roughness in (0.0, 0.4, 0.9):
        field = Draws(32, seeded()).noise(channels, size, roughness=roughness)
        assert field.shape == (32, channels, size, size)
        step.append(field.diff(dim=3).std() / field.std())
    assert step[0] < step[1] < step[2]
    assert step[2] > 2 * step[0]


def test_octaves_stay_within_their_bounds_and_each_is_as_likely():
    values = Draws(4096, seeded()).octaves(0.5, 8)
    assert values.shape == (4096, 1, 1, 1)
    assert 0.5 <= values.min() < 0.51
    assert 7.9 < values.max() <= 8
    counts = torch.histc(values.log2(), bins=4, min=-1, max=3)
    assert (counts / 4096 - 0.25).abs().max() < 0.03


def test_uniform_draws_and_chances_are_as_asked_for():
    draws = Draws(4096, seeded())
    values = draws.uniform(-2, 6)
    assert -2 <= values.min() < -1.9
    assert 5.9 < values.max() <= 6
    assert (torch.histc(values, bins=4, min=-2, max=6) / 4096 - 0.25).abs().max() < 0.03
    assert 0.27 < share(draws.chance(0.3)) < 0.33


# In a backbone's features


def damaged_features(*, probability: float = 1.0, count: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(count, 16, 32, 32, generator=torch.Generator().manual_seed(seed + 100))
    generator = torch.Generator().manual_seed(seed)
    return features, *corrupt_features(features, probability=probability, generator=generator)


def test_features_change_where_the_mask_says_and_are_kept():
    features, damaged, masks = damaged_features(count=32)
    kept = features.clone()
    assert damaged.shape == features.shape
    assert masks.shape == (32, 1, 32, 32)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    change = (damaged - features).square().mean(dim=1, keepdim=True)
    assert change[masks == 0].max() < 0.5
    assert change[masks == 1].mean() > 0.5
    assert torch.equal(features, kept)


def test_without_a_chance_features_stay_as_they_are():
    features, damaged, masks = damaged_features(probability=0.0)
    assert torch.equal(damaged, features)
    assert not masks.any()


def test_defects_in_features_are_small_and_in_most_images():
    _, _, masks = damaged_features(count=64)
    shares = masks.flatten(1).mean(dim=1)
    assert (shares > 0).float().mean() > 0.9
    assert 0.002 < float(shares.median()) < 0.3


def test_features_with_the_same_seed_get_the_same_defects():
    assert torch.equal(damaged_features(seed=3)[1], damaged_features(seed=3)[1])
    assert not torch.equal(damaged_features(seed=3)[2], damaged_features(seed=4)[2])


def test_half_of_the_pasted_features_come_from_another_image():
    """Each image's features have a mean of their own: that of a pasted place says whose they are."""
    features = torch.arange(200.0).view(200, 1, 1, 1) * 100 + torch.randn(200, 4, 32, 32)
    damaged, masks = corrupt_features(features, probability=0.5, generator=torch.Generator().manual_seed(0))
    foreign = (damaged - features).abs().flatten(1).amax(dim=1) > 20
    assert 0.2 < float(foreign.float().mean() / (masks.flatten(1).amax(dim=1) > 0).float().mean()) < 0.7
