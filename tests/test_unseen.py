"""Defects of kinds that training never draws: each changes a part of the image, most of it on the part."""

import pytest
import torch
from torch import Tensor

from training.unseen import KINDS, changes, drawn, figures, part_of

LIMITS = (-10.0, 10.0)  # wide


def textures(count: int, size: int) -> Tensor:
    """Standardised images whose rows differ from their columns."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.5, 0.5, size).view(1, 1, 1, size)
    return 0.3 * torch.randn((count, 3, size, size), generator=generator) + ramp


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_a_part_of_an_image_of_any_size(kind, size):
    (image,) = textures(1, size)
    before, random = image.clone(), seeded()
    damaged = torch.stack([KINDS[kind](image, random) for _ in range(50)])
    assert damaged.isfinite().all()
    assert torch.equal(image, before)
    share = changes(damaged, image).float().mean(dim=(1, 2))
    assert (share > 0).float().mean() > 0.3  # some are too faint or too small
    assert share.mean() < 0.3


@pytest.mark.parametrize("kind", ["dent", "ring", "stripes", "turned", "smear"])
def test_sizes_grow_with_the_image(kind):
    shares = []
    for size in (64, 256):
        image = textures(1, size)[0]
        random = seeded()
        damaged = torch.stack([KINDS[kind](image, random) for _ in range(100)])
        shares.append((damaged != image).any(dim=1).float().mean())
    assert 0.6 < shares[0] / shares[1] < 1.6


def test_each_image_comes_as_it_is_and_with_one_defect_of_each_kind():
    images = textures(3, 64)
    first, again, other = (list(drawn(images, LIMITS, seeded(seed))) for seed in (0, 0, 1))
    assert len(first) == 3
    for image, (damaged, masks) in zip(images, first, strict=True):
        assert damaged.shape == (1 + len(KINDS), 3, 64, 64)
        assert torch.equal(damaged[0], image)
        assert torch.equal(masks, changes(damaged[1:], image))
    assert torch.equal(first[2][0], again[2][0])
    assert not torch.equal(first[2][0], other[2][0])


def test_what_no_camera_shows_is_no_defect():
    """Of images that are white where they are bright: what would be brighter still."""
    images = textures(12, 64).clamp(max=0.0)
    for image, (damaged, masks) in zip(images, drawn(images, (-2.0, 0.0), seeded()), strict=True):
        assert -2 <= damaged.min() < damaged.max() <= 0
        assert torch.equal(masks, changes(damaged[1:], image))


def test_defects_lie_on_the_part():
    images = textures(20, 64)
    images[..., :32] = 0.1 * images[..., :32] + torch.linspace(-1, 1, 64).view(64, 1)  # the background, always the same
    part = part_of(images)
    assert part[:, 36:].all()
    assert not part[:, :28].any()
    masks = torch.stack([masks for _, masks in drawn(images, LIMITS, seeded())])
    on_part = (masks & part).sum(dim=(2, 3)) / masks.sum(dim=(2, 3)).clamp(min=1)
    assert (on_part > 0.5).float().mean() > 0.9


def test_figures_are_perfect_for_maps_of_the_masks_and_by_chance_for_noise():
    masks = torch.stack([masks for _, masks in drawn(textures(12, 64), LIMITS, seeded())])
    perfect = torch.cat([torch.zeros(12, 1, 64, 64), masks.float()], dim=1)
    for found in figures(perfect.amax(dim=(2, 3)), perfect, masks).values():
        assert found.image_auroc > 0.8  # some cannot be seen
        assert found.pixel_auroc == found.aupro == 1
    noise = torch.rand(perfect.shape, generator=seeded())
    for found in figures(noise.amax(dim=(2, 3)), noise, masks).values():
        assert abs(found.image_auroc - 0.5) < 0.35
        assert abs(found.pixel_auroc - 0.5) < 0.1
        assert abs(found.aupro - 0.15) < 0.1


def test_images_are_told_by_their_scores_and_pixels_by_their_maps():
    masks = torch.stack([masks for _, masks in drawn(textures(12, 64), LIMITS, seeded())])
    maps = torch.cat([torch.zeros(12, 1, 64, 64), masks.float()], dim=1)
    scores = torch.ones(12, 1 + len(KINDS))
    scores[:, 0] = 2  # good images alone
    for found in figures(scores, maps, masks).values():
        assert found == (0, 1, 1)


def test_kinds_that_cannot_be_seen_are_left_out():
    images = torch.zeros(4, 3, 64, 64)  # the same the wrong way round, and however it is wiped
    masks = torch.stack([masks for _, masks in drawn(images, LIMITS, seeded())])
    maps = torch.rand((4, 1 + len(KINDS), 64, 64), generator=seeded())
    found = figures(maps.amax(dim=(2, 3)), maps, masks)
    assert set(found) == set(KINDS) - {"turned", "smear"}
