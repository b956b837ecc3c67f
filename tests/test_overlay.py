"""The picture of an anomaly map: where it colours, how strongly, and its boxes."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.overlay import BOX_COLOUR, HEAT, OPACITY, overlay
from models.scoring import Region

LEVEL = 0.4


def photo(*, width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(
    anomaly_map: NDArray[np.float32], *, image: Image.Image | None = None, regions: list[Region] | None = None
) -> NDArray[np.int64]:
    height, width = anomaly_map.shape
    image = image or photo(width=width, height=height)
    return np.asarray(overlay(image, anomaly_map, level=LEVEL, regions=regions or []), dtype=np.int64)


def flat(value: float, *, width: int = 60, height: int = 40) -> NDArray[np.float32]:
    return np.full((height, width), value, dtype=np.float32)


@pytest.mark.parametrize(("width", "height"), [(60, 40), (7, 90), (1, 1)])
def test_an_overlay_has_its_images_size(width, height):
    picture = overlay(photo(width=width, height=height), flat(1, width=width, height=height), level=LEVEL, regions=[])
    assert picture.mode == "RGB"
    assert picture.size == (width, height)


@pytest.mark.parametrize("level", [0.0, LEVEL])
def test_nothing_is_drawn_on_a_map_of_zeros(level):
    picture = overlay(photo(), flat(0), level=level, regions=[])
    assert np.array_equal(np.asarray(picture), np.asarray(photo()))


def test_nothing_is_drawn_up_to_three_quarters_of_the_level():
    assert np.array_equal(drawn(flat(LEVEL * 0.75)), np.asarray(photo()))
    assert not np.array_equal(drawn(flat(LEVEL * 0.85)), np.asarray(photo()))


def test_only_the_pixels_where_the_map_is_high_change():
    anomaly_map = flat(0)
    anomaly_map[10:20, 30:45] = 2 * LEVEL
    changed = (drawn(anomaly_map) != np.asarray(photo())).any(axis=-1)
    assert np.array_equal(changed, anomaly_map > 0)


@pytest.mark.parametrize(("times", "colour"), [(7 / 6, HEAT[1]), (19 / 12, HEAT[2]), (2, HEAT[3]), (50, HEAT[3])])
def test_colour_follows_the_map_from_the_level_to_twice_it(times, colour):
    expected = (1 - OPACITY) * np.asarray(photo()) + OPACITY * colour
    assert np.abs(drawn(flat(times * LEVEL)) - expected).max() <= 1


def test_a_higher_map_is_never_fainter_or_darker():
    ramp = np.linspace(0, 2 * LEVEL, 200, dtype=np.float32)[None]
    black = drawn(ramp, image=Image.new("RGB", (200, 1))) @ [0.299, 0.587, 0.114]
    assert (np.diff(black[0]) >= -0.5).all()  # half a gray level for rounding
    assert black[0, -1] > 100


def test_a_gray_image_is_coloured_too():
    gray = photo().convert("L")
    assert np.array_equal(drawn(flat(0), image=gray), np.asarray(gray.convert("RGB")))
    red, _, blue = np.moveaxis(drawn(flat(LEVEL), image=gray), -1, 0)
    assert (red > blue).all()


def test_an_image_of_another_size_is_brought_to_the_maps():
    picture = overlay(Image.new("RGB", (600, 400), (10, 20, 30)), flat(0), level=LEVEL, regions=[])
    assert picture.size == (60, 40)
    assert picture.getpixel((30, 20)) == (10, 20, 30)


@pytest.mark.parametrize(
    "region",
    [
        Region(left=10, top=5, width=20, height=12, peak=1),
        Region(left=0, top=0, width=60, height=40, peak=1),
        Region(left=57, top=37, width=3, height=3, peak=1),
        Region(left=8, top=9, width=1, height=1, peak=1),
        Region(left=8, top=9, width=30, height=1, peak=1),
    ],
)
def test_a_box_is_the_outline_of_its_region(region):
    picture = drawn(flat(0), regions=[region])
    expected = np.asarray(photo(), dtype=np.int64)
    box = expected[region.top : region.top + region.height, region.left : region.left + region.width]
    box[[0, -1]] = BOX_COLOUR
    box[:, [0, -1]] = BOX_COLOUR
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 8, 9, 40])
def test_a_box_in_a_large_picture_stays_within_its_region(side):
    """Lines are four pixels thick in a picture 800 wide, thicker than a small region."""
    region = Region(left=300, top=20, width=side, height=side, peak=1)
    picture = drawn(flat(0, width=800, height=80), regions=[region])
    changed = (picture != np.asarray(photo(width=800, height=80))).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == (20, 20 + side - 1)
    assert (columns.min(), columns.max()) == (300, 300 + side - 1)
    assert changed[20 : 20 + min(4, side), 300 : 300 + side].mean() > 0.5
    assert side < 9 or not changed[24 : 20 + side - 4, 304 : 300 + side - 4].any()


def test_every_region_gets_a_box():
    regions = [Region(left=left, top=10, width=5, height=5, peak=1) for left in (2, 20, 50)]
    picture = drawn(flat(0), regions=regions)
    assert all(tuple(picture[10, region.left]) == BOX_COLOUR for region in regions)


def test_the_image_that_came_in_is_left_as_it_was():
    image = photo()
    overlay(image, flat(1), level=LEVEL, regions=[Region(left=0, top=0, width=9, height=9, peak=1)])
    assert np.array_equal(np.asarray(image), np.asarray(photo()))


def test_a_large_overlay_takes_little_memory():
    image, anomaly_map = photo(width=1000, height=1000), flat(LEVEL, width=1000, height=1000)
    tracemalloc.start()
    overlay(image, anomaly_map, level=LEVEL, regions=[])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 1000 * 1000  # bytes; Pillow's own, which are not counted, are 16 for a pixel
