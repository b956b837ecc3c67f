"""A product drawn by the program: photos of a steel gear, good ones and ones with a defect, and exact masks.

No two gears are photographed alike: each lies a little differently, in a little different light. Lengths are in
pixels of the picture; shapes are signed distances, negative inside; the lamp is at the upper left.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from models.errors import DataError
from training.data import GOOD

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

SIZE = 192
FINE = 2  # metal is drawn with this many times the pixels on each side, then averaged

# The gear, as radii from the outside in.
TEETH, TIP, ROOT = 24, 83.0, 71.5
RIM, HUB, BUSHING, BORE = 59.0, 32.0, 22.5, 14.0
HOLES, HOLE_CIRCLE, HOLE_RADIUS = 6, 45.5, 9.5
KEYWAY_WIDTH, KEYWAY_TOP = 7.0, 19.0

LAMP = np.array([-0.45, -0.60, 0.66], dtype=np.float32)  # towards it: right, down, out of the picture; length 1
STEEL = np.array([0.80, 0.84, 0.89], dtype=np.float32)
BRASS = np.array([1.00, 0.66, 0.25], dtype=np.float32)
FILLING = np.array([146, 136, 116], dtype=np.float32)  # grey levels, not light
MAT = np.array([0.040, 0.052, 0.067], dtype=np.float32)

NOTICEABLE = 8  # grey levels: a pixel belongs to the defect if a channel changes by more
SMALLEST, LARGEST = 0.005, 0.04  # share of the picture that a defect covers


@dataclass(frozen=True)
class Pose:
    """How a gear lies before the camera."""

    across: float  # the centre, pixels
    down: float
    turn: float  # radians
    scale: float


@dataclass(frozen=True, eq=False)
class Part:
    """A photo of a good part, and what it takes to damage it."""

    image: Image.Image  # RGB, SIZE x SIZE
    pose: Pose
    mat: Array  # (SIZE, SIZE, 3): the photo with the part cut out of it, grey levels
    coverage: Array  # (SIZE, SIZE) in [0, 1]: how much of a pixel is part


def write_demo(folder: Path, *, seed: int, training: int = 240, good: int = 40, per_kind: int = 12) -> None:
    """Write photos as an MVTec-layout folder: train/good, test/good, test/KIND and ground_truth/KIND.

    The same arguments give the same bytes. Raises DataError if the folder exists and is not empty, or cannot be
    written.
    """
    kinds = [("train", GOOD, training), ("test", GOOD, good), *(("test", kind, per_kind) for kind in KINDS)]
    photos = [(split, kind, f"{number:03}") for split, kind, count in kinds for number in range(count)]

    def write(index: int) -> None:
        split, kind, stem = photos[index]
        rng = np.random.default_rng([seed, index])  # of its own, so that threads may draw in any order
        part = draw_part(rng)
        image = part.image
        if kind != GOOD:
            image, mask = draw_defect(part, rng, kind)
            Image.fromarray(mask).convert("L").save(folder / "ground_truth" / kind / f"{stem}_mask.png")
        image.save(folder / split / kind / f"{stem}.png")

    try:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists and is not empty: the demo's photos go into a new folder.")
        for split, kind, _ in kinds:
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            if kind != GOOD:
                (folder / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:  # NumPy lets go of the interpreter's lock while it computes
            list(pool.map(write, range(len(photos))))
    except OSError as error:
        raise DataError(f"cannot write the demo's photos to {folder}: {error}.") from error


def draw_part(rng: np.random.Generator) -> Part:
    """Photograph a good part. The same state of `rng` gives the same pixels."""
    # Python's floats, unlike NumPy's, leave an array float32.
    across, down, turn, scale, gain, warmth = rng.uniform(-1, 1, 6).tolist()
    pose = Pose(SIZE / 2 + 2.5 * across, SIZE / 2 + 2.5 * down, turn=0.05 * turn, scale=1 + 0.015 * scale)
    warmth = 0.025 * warmth
    light = (1 + 0.06 * gain) * np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)
    metal, coverage = _metal(pose, rng)
    grain = rng.normal(0, 1.5, (SIZE, SIZE, 1)).astype(np.float32)
    mat = _mat(coverage, rng)
    photo = _developed(light * (metal + (1 - coverage[..., None]) * mat)) + grain
    return Part(image=_picture(photo), pose=pose, mat=_developed(light * mat) + grain, coverage=coverage)


def draw_defect(part: Part, rng: np.random.Generator, kind: str) -> tuple[Image.Image, Mask]:
    """Damage a part in one of the ways of KINDS. Returns its photo and the defect's mask, (SIZE, SIZE).

    The mask is True where the photo differs from the part's by more than NOTICEABLE grey levels; elsewhere the two
    are equal. It covers SMALLEST to LARGEST of the picture.
    """
    before = np.asarray(part.image)
    while True:  # most draws do; a scratch that falls into a hole is too small
        paint, opacity = KINDS[kind](part, rng)
        after = np.asarray(_picture(before + opacity[..., None] * (paint - before)))
        mask = np.abs(after.astype(int) - before).max(axis=-1) > NOTICEABLE
        if SMALLEST <= mask.mean() <= LARGEST:
            return Image.fromarray(np.where(mask[..., None], after, before)), mask


def _scratch(part: Part, rng: np.random.Generator) -> tuple[Array, Array]:
    """A slightly bent groove: dark, with a bright burr on one side."""
    place = rng.uniform(-math.pi, math.pi)
    across, down = _around(part, at=rng.uniform(30, 64), place=place)
    turn = place + math.pi / 2 + rng.uniform(-0.7, 0.7)
    along, beside = across * math.cos(turn) + down * math.sin(turn), down * math.cos(turn) - across * math.sin(turn)
    share = along / rng.uniform(28, 38)  # from -1 at one end to 1 at the other
    beside = beside + rng.uniform(-5, 5) * share**2
    width = rng.uniform(3.6, 4.4) * np.sqrt(np.clip(1 - share**2, 0, 1)) - 0.6
    burr = _step(beside - 0.3 * width, 1.2)[..., None]
    metal = np.asarray(part.image)
    paint = burr * (0.4 * metal + 0.6 * 255) + (1 - burr) * 0.35 * metal
    return paint, part.coverage * _step(width - np.abs(beside), 1.2)


def _stain(part: Part, rng: np.random.Generator) -> tuple[Array, Array]:
    """Dried, rusty oil: what lies under it shows through, its rim is darker."""
    across, down = _around(part, at=rng.uniform(30, 68), place=rng.uniform(-math.pi, math.pi))
    distance = _blob(across, down, rng, radius=rng.uniform(10, 15), roughness=2.0)
    tint = np.array([0.66, 0.45, 0.26]) * (1 - 0.3 * np.exp(-((distance + 1.5) ** 2) / 3))[..., None]
    return np.asarray(part.image) * tint, part.coverage * _step(-distance, 1.5)


def _chip(part: Part, rng: np.random.Generator) -> tuple[Array, Array]:
    """A tooth or two broken off: the mat shows, and along the break the grain of the metal."""
    across, down = _around(part, at=rng.uniform(TIP - 7, TIP - 1), place=rng.uniform(-math.pi, math.pi))
    distance = _blob(across, down, rng, radius=rng.uniform(13, 17), roughness=1.2)
    grain = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE), dtype=np.float32), 0.8)
    face = part.coverage * _step(distance + 4, 1.0)
    paint = part.mat + face[..., None] * (80 + 40 * grain[..., None] - part.mat)
    # Beside the part the mat is painted on itself.
    return paint, _step(-distance, 1.0)


def _blocked_hole(part: Part, rng: np.random.Generator) -> tuple[Array, Array]:
    """One of the holes is filled with something."""
    place = part.pose.turn + 2 * math.pi / HOLES * int(rng.integers(HOLES))
    across, down = _around(part, at=HOLE_CIRCLE, place=place)
    distance = _blob(across, down, rng, radius=rng.uniform(10, 12), roughness=0.7)
    lumps = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE), dtype=np.float32), 1.2)
    brightness = 1 + 0.25 * (LAMP[0] * across + LAMP[1] * down) / HOLE_RADIUS + 0.3 * lumps
    return brightness[..., None] * FILLING, _step(-distance, 1.2)


KINDS: dict[str, Callable[[Part, np.random.Generator], tuple[Array, Array]]] = {
    "scratch": _scratch,
    "stain": _stain,
    "chip": _chip,
    "blocked_hole": _blocked_hole,
}


def _around(part: Part, *, at: float, place: float) -> tuple[Array, Array]:
    """Across and down from a point of the gear: `at` is its radius, `place` its angle."""
    across, down = _coordinates(part.pose)
    return across - at * math.cos(place), down - at * math.sin(place)


def _blob(across: Array, down: Array, rng: np.random.Generator, *, radius: float, roughness: float) -> Array:
    """Distance to the edge of an uneven disc."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE), dtype=np.float32), 3.5)
    distance: Array = np.hypot(across, down) - radius + roughness * noise / noise.std()
    return distance


def _metal(pose: Pose, rng: np.random.Generator) -> tuple[Array, Array]:
    """The light from the gear times its coverage, (SIZE, SIZE, 3), and the coverage, (SIZE, SIZE)."""
    across, down = _coordinates(pose, FINE)
    radius, angle = np.hypot(across, down), np.arctan2(down, across)
    outline, openings = _outline(radius, angle - pose.turn), _openings(radius, angle - pose.turn)
    inside = np.clip(0.5 - FINE * np.maximum(outline, -openings), 0, 1)

    # Relief: a raised rim and hub around a sunken web, a bushing, and a chamfer along every edge.
    height = 2.2 * (_step(radius - RIM, 2.5) + _step(HUB - radius, 2.5)) + 0.8 * _step(BUSHING - radius, 1.2)
    height += 3.0 * ndimage.gaussian_filter(inside, 1.1 * FINE)
    slope_down, slope_across = np.gradient(height, 1 / FINE)
    towards_lamp = -(LAMP[0] * slope_across + LAMP[1] * slope_down) / np.sqrt(1 + slope_across**2 + slope_down**2)

    # Turned on a lathe: the grooves run around the centre and mirror the lamp in two opposite fans. Each groove is
    # a little brighter or darker, and mirrors in a little different direction.
    grooves = np.interp(radius, np.arange(0, 100, 0.4), rng.normal(size=250)).astype(np.float32)
    half = LAMP + np.array([0, 0, 1], dtype=np.float32)
    half /= np.linalg.norm(half)
    around = angle + 0.05 * grooves
    fans = (1 - (half[1] * np.cos(around) - half[0] * np.sin(around)) ** 2) ** 18
    web = _step(RIM - radius, 2.5) * _step(radius - HUB, 2.5)
    brightness = (0.17 - 0.08 * web + (0.70 - 0.40 * web) * fans) * (1 + 0.08 * grooves)
    brightness *= 1 + 0.04 * rng.standard_normal(radius.shape, dtype=np.float32)
    brightness += np.where(towards_lamp > 0, 0.45, 0.25) * towards_lamp

    # The rim and the hub throw a shadow on the web.
    from_lamp = np.hypot(across + 7 * LAMP[0], down + 7 * LAMP[1])
    shadow = web * np.maximum(_step(from_lamp - RIM + 1, 5), _step(HUB - 1 - from_lamp, 5))
    brightness = np.maximum(brightness * (1 - 0.6 * shadow), 0.02)

    brass = _step(BUSHING - radius, 0.8)[..., None]
    light = (brightness * inside)[..., None] * (STEEL + brass * (BRASS - STEEL))
    return _averaged(light), _averaged(inside)


def _mat(coverage: Array, rng: np.random.Generator) -> Array:
    """The light from the mat under the gear, which shades it: (SIZE, SIZE, 3)."""
    down, across = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    lit = 1 - 0.25 * (across + down) - 0.15 * (across**2 + down**2)
    fabric = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE), dtype=np.float32), 0.7)
    shadow = ndimage.gaussian_filter(ndimage.shift(coverage, (7, 5), order=1), 4.5)
    light: Array = (lit * (1 + 0.10 * fabric) * (1 - 0.85 * shadow))[..., None] * MAT
    return light


def _coordinates(pose: Pose, fine: int = 1) -> tuple[Array, Array]:
    """Across and down from the gear's centre, of each of (fine x SIZE)^2 pixels, in a gear's own pixels."""
    axis = (np.arange(SIZE * fine, dtype=np.float32) + 0.5) / fine
    down, across = np.meshgrid((axis - pose.down) / pose.scale, (axis - pose.across) / pose.scale, indexing="ij")
    return across, down


def _outline(radius: Array, angle: Array) -> Array:
    """Distance to the toothed edge; a tooth is a wave with its top and bottom flattened."""
    flat = 2.2
    wave = np.tanh(flat * np.cos(TEETH * angle))
    tooth = (TIP - ROOT) / 2 / math.tanh(flat)
    edge = (TIP + ROOT) / 2 + tooth * wave
    # The way along the radius is longer than the shortest way where the edge is steep.
    steepness = tooth * flat * TEETH * (1 - wave**2) * np.sin(TEETH * angle) / edge
    return (radius - edge) / np.sqrt(1 + steepness**2)


def _openings(radius: Array, angle: Array) -> Array:
    """Distance to the nearest of the holes, the bore and its keyway."""
    sector = 2 * math.pi / HOLES
    folded = (angle + sector / 2) % sector - sector / 2
    holes = np.hypot(radius * np.cos(folded) - HOLE_CIRCLE, radius * np.sin(folded)) - HOLE_RADIUS
    up, side = -radius * np.sin(angle), np.abs(radius * np.cos(angle))
    keyway = np.maximum(side - KEYWAY_WIDTH / 2, np.maximum(up - KEYWAY_TOP, -up))
    distance: Array = np.minimum(np.minimum(holes, radius - BORE), keyway)
    return distance


def _step(distance: Array, width: float) -> Array:
    """From 0 to 1 around distance 0, smoothly."""
    share = np.clip(distance / width + 0.5, 0, 1)
    smooth: Array = share * share * (3 - 2 * share)
    return smooth


def _averaged(values: Array) -> Array:
    rows = values.reshape(SIZE, FINE, -1).mean(axis=1)
    averaged: Array = rows.reshape(SIZE, SIZE, FINE, *values.shape[2:]).mean(axis=2)
    return averaged


def _developed(light: Array) -> Array:
    """Light, 0 and up, as grey levels: highlights roll off softly, gamma 2.2."""
    levels: Array = 255 * (1 - np.exp(-1.6 * light)) ** (1 / 2.2)
    return levels


def _picture(photo: Array) -> Image.Image:
    return Image.fromarray(np.clip(photo, 0, 255).round().astype(np.uint8))
