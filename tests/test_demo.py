"""The drawn parts: the same every time, with defects exactly where the masks say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from models.errors import DataError
from models.images import image_tensor
from training.data import GOOD, load_mask, read_dataset
from training.demo import (
    HOLE_RADIUS,
    HOLES,
    KINDS,
    LARGEST,
    NOTICEABLE,
    SIZE,
    SMALLEST,
    TIP,
    draw_defect,
    draw_part,
    write_demo,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "gears"
    write_demo(folder, seed=0, training=4, good=3, per_kind=2)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_demo_has_the_same_bytes_for_the_same_seed(folder, tmp_path):
    tmp_path.joinpath("again").mkdir()  # an empty folder is as good as none
    write_demo(tmp_path / "again", seed=0, training=4, good=3, per_kind=2)
    assert contents(tmp_path / "again") == contents(folder)


def test_demo_has_other_photos_for_another_seed(folder, tmp_path):
    write_demo(tmp_path / "other", seed=1, training=4, good=3, per_kind=2)
    photos = {name: digest for name, digest in contents(folder).items() if "ground_truth" not in name}
    assert len(set(photos.values())) == len(photos)  # no photo twice
    assert not set(photos.values()) & set(contents(tmp_path / "other").values())


def test_demo_is_read_as_a_dataset_with_its_counts(folder):
    dataset = read_dataset(folder)
    assert [path.name for path in dataset.good] == ["000.png", "001.png", "002.png", "003.png"]
    assert dataset.validation == []
    defects = [image.defect for image in dataset.test]
    assert {defect: defects.count(defect) for defect in defects} == {GOOD: 3, **dict.fromkeys(KINDS, 2)}
    for image in dataset.test:
        with Image.open(image.path) as photo:
            assert (photo.mode, photo.size) == ("RGB", (SIZE, SIZE))
        assert (image.mask is None) == (image.defect == GOOD)
        mask = load_mask(image, width=SIZE, height=SIZE)
        assert mask.any() == (image.defect != GOOD)
        if image.mask:
            with Image.open(image.mask) as written:
                assert set(np.unique(np.asarray(written))) == {0, 255}


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_where_the_photo_changed(kind):
    rng = np.random.default_rng(0)
    part = draw_part(rng)
    before = np.array(part.image)
    for _ in range(8):
        damaged, mask = draw_defect(part, rng, kind)
        changed = np.abs(np.asarray(damaged, dtype=int) - before).max(axis=-1)  # (SIZE, SIZE) in grey levels
        np.testing.assert_array_equal(mask, changed > NOTICEABLE)
        assert not changed[~mask].any()
    np.testing.assert_array_equal(part.image, before)  # the good part stays good


@pytest.mark.parametrize("kind", KINDS)
def test_defect_is_neither_tiny_nor_huge(kind):
    rng = np.random.default_rng(0)
    part = draw_part(rng)
    for _ in range(60):
        _, mask = draw_defect(part, rng, kind)
        assert SMALLEST <= mask.mean() <= LARGEST


@pytest.mark.parametrize("kind", KINDS)
def test_defect_stays_on_the_part(kind):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        part = draw_part(rng)
        _, mask = draw_defect(part, rng, kind)
        down, across = np.nonzero(mask)
        from_centre = np.hypot(across + 0.5 - part.pose.across, down + 0.5 - part.pose.down)
        assert from_centre.max() <= TIP * part.pose.scale + 1
        if kind != "blocked_hole":
            assert (part.coverage[mask] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_defect_is_seen_at_64_pixels(kind):
    """The demo trains at that size: a defect must outlive the resize, far above the camera's noise."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        part = draw_part(rng)
        damaged, _ = draw_defect(part, rng, kind)
        small = [image_tensor(image, channels=3, size=64).int() for image in (part.image, damaged)]
        strong = (small[1] - small[0]).abs().amax(dim=0) > 30
        assert strong.sum() >= 10


def test_blocked_hole_closes_one_hole():
    rng = np.random.default_rng(0)
    part = draw_part(rng)
    closed = set()
    for _ in range(40):
        _, mask = draw_defect(part, rng, "blocked_hole")
        opened = mask & (part.coverage == 0)
        area = np.pi * (HOLE_RADIUS * part.pose.scale) ** 2
        assert 0.8 * area <= opened.sum() <= area
        down, across = np.argwhere(opened).mean(axis=0)
        angle = np.arctan2(down + 0.5 - part.pose.down, across + 0.5 - part.pose.across) - part.pose.turn
        closed.add(round(angle / (2 * np.pi / HOLES)) % HOLES)
    assert closed == set(range(HOLES))


def test_chip_takes_metal_away_from_the_edge():
    rng = np.random.default_rng(0)
    part = draw_part(rng)
    damaged, mask = draw_defect(part, rng, "chip")
    mat = np.abs(np.asarray(damaged) - part.mat).max(axis=-1) <= 1
    assert (mask & mat & (part.coverage == 1)).sum() >= 50  # where there was metal, the mat shows
    assert (ndimage.binary_dilation(mask) & (part.coverage == 0)).any()  # and it is open to the outside


def test_demo_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_demo(tmp_path, seed=0, training=1, good=1, per_kind=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_demo_refuses_a_file(tmp_path):
    (tmp_path / "gears").write_text("mine")
    with pytest.raises(DataError, match="gears"):
        write_demo(tmp_path / "gears", seed=0, training=1, good=1, per_kind=1)
    assert (tmp_path / "gears").read_text() == "mine"
