"""Which good images are held out: what alpha needs, whole parts, the same whatever the files are called."""

import hashlib
import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from models.calibration import images_needed
from models.errors import DataError
from tests.conftest import png
from training.data import Dataset, read_dataset
from training.split import ALIKE, THUMBNAIL, Split, correlations, fine_spectra, part_numbers, split_good_images

QUIET = Console(quiet=True)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def folder_of(root: Path, contents: list[bytes], *, start: int = 0) -> Dataset:
    for index, content in enumerate(contents, start=start):
        write(root / f"{index:03}.png", content)
    return read_dataset(root)


def numbered(count: int, *, start: int = 0) -> list[bytes]:
    """Images that have nothing in common."""
    return [png(seed=number) for number in range(start, start + count)]


def split(dataset: Dataset, *, fraction: float = 0.2, alpha: float = 0.2, seed: int = 0) -> Split:
    return split_good_images(dataset, fraction=fraction, alpha=alpha, seed=seed, console=QUIET)


def contents(paths: list[Path]) -> list[bytes]:
    return sorted(path.read_bytes() for path in paths)


def test_a_folder_of_test_images_alone_cannot_be_trained_on(tmp_path):
    write(tmp_path / "test/good/000.png", png())
    with pytest.raises(DataError, match=r"no good images in .*: training needs them in train/good"):
        split(read_dataset(tmp_path))


def test_too_few_images_for_alpha_are_refused_with_both_numbers(tmp_path):
    dataset = folder_of(tmp_path, numbered(37))
    with pytest.raises(DataError, match=r"37 different good images .* alpha of 0\.05 needs 19 held out"):
        split(dataset, alpha=0.05)


def test_just_enough_images_for_alpha_are_split_in_halves(tmp_path):
    halves = split(folder_of(tmp_path, numbered(38)), alpha=0.05)
    assert len(halves.training) == len(halves.calibration) == 19


def test_copies_do_not_count_as_images_for_alpha(tmp_path):
    dataset = folder_of(tmp_path, 2 * numbered(37))
    with pytest.raises(DataError, match="37 different good images"):
        split(dataset, alpha=0.05)


def test_a_fraction_of_one_half_of_an_odd_number_of_images_is_not_too_much(tmp_path):
    """Alpha needs 19 of the 41: there is nothing to refuse."""
    halves = split(folder_of(tmp_path, numbered(41)), fraction=0.5, alpha=0.05)
    assert {len(halves.training), len(halves.calibration)} == {20, 21}


def test_an_image_that_vanished_after_listing_is_refused_by_name(tmp_path):
    dataset = folder_of(tmp_path, numbered(20))
    dataset.good[3].unlink()
    with pytest.raises(DataError, match=r"003\.png"):
        split(dataset)


# Holding images out


def test_a_split_holds_out_the_fraction_and_loses_nothing(tmp_path):
    dataset = folder_of(tmp_path, numbered(40))
    parts = split(dataset, fraction=0.25)
    assert len(parts.calibration) == 10
    assert sorted(parts.training + parts.calibration) == dataset.good


def test_a_split_holds_out_what_alpha_needs_if_the_fraction_is_less(tmp_path):
    parts = split(folder_of(tmp_path, numbered(100)), fraction=0.01, alpha=0.05)
    assert len(parts.calibration) == 19


def test_a_split_is_decided_by_the_seed(tmp_path):
    dataset = folder_of(tmp_path, numbered(40))
    assert split(dataset, seed=1) == split(dataset, seed=1)
    assert len({tuple(split(dataset, seed=seed).calibration) for seed in range(10)}) == 10


def test_every_image_is_held_out_by_some_seed(tmp_path):
    dataset = folder_of(tmp_path, numbered(20))
    held_out = {path for seed in range(60) for path in split(dataset, seed=seed).calibration}
    assert held_out == set(dataset.good)


def test_a_split_depends_on_the_content_and_not_on_names_or_order(tmp_path):
    first = split(folder_of(tmp_path / "first", numbered(40)))
    second = split(folder_of(tmp_path / "second", numbered(40)[::-1], start=500))
    assert contents(first.calibration) == contents(second.calibration)
    assert contents(first.training) == contents(second.training)
    assert first.fingerprint == second.fingerprint


def test_a_new_image_moves_at_most_one_other_across(tmp_path):
    before = split(folder_of(tmp_path, numbered(40)))
    after = split(folder_of(tmp_path, numbered(41)))
    assert len(set(before.calibration) - set(after.calibration)) <= 1


def test_the_fingerprint_changes_with_any_byte_of_a_training_image(tmp_path):
    dataset = folder_of(tmp_path, numbered(20))
    before = split(dataset)
    write(before.training[0], before.training[0].read_bytes() + b"!")
    assert split(dataset).fingerprint != before.fingerprint


def test_the_fingerprint_is_a_sha256_over_those_of_the_training_images(tmp_path):
    """It is stored in checkpoints and compared on resume: its value must not change between versions."""
    parts = split(folder_of(tmp_path, numbered(20)))
    digests = sorted(hashlib.sha256(path.read_bytes()).digest() for path in parts.training)
    assert parts.fingerprint == hashlib.sha256(b"".join(digests)).hexdigest()


def test_the_fingerprint_is_not_changed_by_images_that_are_not_trained_on(tmp_path):
    good = folder_of(tmp_path / "good", numbered(30)).good
    held = folder_of(tmp_path / "held", numbered(7, start=100)).good
    first, second = (
        split(Dataset(root=tmp_path, good=good, validation=validation, test=[])) for validation in (held[:6], held)
    )
    assert len(second.calibration) == len(first.calibration) + 1
    assert first.fingerprint == second.fingerprint


def test_the_folders_own_validation_images_are_calibrated_on_and_never_trained_on(tmp_path):
    for number, content in enumerate(numbered(30)):
        write(tmp_path / f"train/good/{number:03}.png", content)
    validation = [write(tmp_path / f"validation/good/{number}.png", png(seed=100 + number)) for number in range(6)]
    dataset = read_dataset(tmp_path)
    assert dataset.validation == validation
    parts = split(dataset)
    assert set(validation) <= set(parts.calibration)
    assert not set(validation) & set(parts.training)
    assert set(parts.training) <= set(dataset.good)


def test_validation_images_count_towards_what_alpha_needs(tmp_path):
    for number, content in enumerate(numbered(30)):
        write(tmp_path / f"train/good/{number:03}.png", content)
    for number in range(15):
        write(tmp_path / f"validation/good/{number}.png", png(seed=100 + number))
    parts = split(read_dataset(tmp_path), fraction=0.01, alpha=0.05)
    assert len(parts.calibration) == 19
    assert len(parts.training) == 26


def test_a_training_image_that_is_also_a_validation_image_is_not_trained_on(tmp_path):
    for number, content in enumerate(numbered(30)):
        write(tmp_path / f"train/good/{number:03}.png", content)
    copy = write(tmp_path / "validation/good/copy.png", numbered(30)[7])
    parts = split(read_dataset(tmp_path))
    assert copy in parts.calibration
    assert tmp_path / "train/good/007.png" not in parts.training
    assert tmp_path / "train/good/007.png" not in parts.calibration


@settings(max_examples=40, deadline=None, database=None)
@given(
    images=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    validation=st.lists(st.integers(0, 60), max_size=6),
    fraction=st.floats(0.01, 0.5),
    alpha=st.sampled_from([0.1, 0.2, 0.3]),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_content_is_on_both_sides_of_a_split_and_none_is_lost(images, validation, fraction, alpha, seed):
    images, validation = ([png(seed=number) for number in numbers] for numbers in (images, validation))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        good = [write(root / f"good/{index}.png", content) for index, content in enumerate(images)]
        held = [write(root / f"held/{index}.png", content) for index, content in enumerate(validation)]
        dataset = Dataset(root=root, good=good, validation=held, test=[])
        different = len(set(images) - set(validation))
        needed = images_needed(alpha) - len(set(validation))
        try:
            parts = split(dataset, fraction=fraction, alpha=alpha, seed=seed)
        except DataError:
            assert needed > different / 2
            return
        training, calibration = contents(parts.training), contents(parts.calibration)
        assert not set(training) & set(calibration)
        assert set(training) | set(calibration) == set(images) | set(validation)
        assert set(validation) <= set(calibration)
        assert len(calibration) == len(set(calibration)) >= images_needed(alpha)
        # Copies stay with the original on the side of training, as they were given.
        assert training == sorted(content for content in images if content not in calibration)
        assert len(set(training)) >= different / 2


def test_an_image_that_cannot_be_read_is_refused_by_name(tmp_path):
    dataset = folder_of(tmp_path, [*numbered(20), b"not an image"])
    with pytest.raises(DataError, match=r"1 of 21 images cannot be read:\n.*020\.png"):
        split(dataset)


# Pictures of one part


def part(seed: int) -> np.ndarray:
    """(60, 60) of a texture that no other seed has, with more around it than a picture shows."""
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(60, 60)), 0.8)


def picture(seed: int, *, gain: float = 1.0, light: float = 0.0, shift: int = 0, noise: float = 0.0) -> Tensor:
    """uint8 (1, S, S): a part at some exposure, unevenly lit, not quite in its place."""
    found = part(seed)[6 + shift : 54 + shift, 6:54]
    found = (
        110
        + 60 * gain * found
        + light * np.linspace(-1, 1, 48)
        + np.random.default_rng(99).normal(size=(48, 48), scale=noise + 1e-9)
    )
    return torch.from_numpy(found.clip(0, 255)).byte().unsqueeze(0)


def test_pictures_are_of_the_size_that_parts_are_compared_at():
    assert picture(0).shape == (1, THUMBNAIL, THUMBNAIL)


@pytest.mark.parametrize(
    "other", [{"gain": 0.5}, {"light": 40.0}, {"shift": 3}, {"noise": 5.0}, {"gain": 1.3, "light": -20.0, "shift": -2}]
)
def test_pictures_of_one_part_are_found_whatever_the_exposure_the_light_and_the_place(other):
    pictures = torch.stack([picture(0), picture(1), picture(0, **other), picture(2)])
    assert part_numbers(pictures, most=2) == [0, 1, 0, 2]


def test_the_correlation_of_a_picture_with_itself_is_one_and_with_another_part_far_below():
    spectra = fine_spectra(torch.stack([picture(number) for number in range(6)]))
    found = torch.stack([correlations(spectrum, spectra) for spectrum in spectra])
    assert torch.allclose(found, found.T, atol=1e-6)
    assert torch.allclose(found.diagonal(), torch.ones(6), atol=1e-6)
    assert found[~torch.eye(6, dtype=torch.bool)].max() < 0.6 * ALIKE


def test_parts_are_those_of_all_pairs_compared():
    """Each picture shows its part more or less, and something else: many correlate by nearly as much as parts do."""
    shares = torch.linspace(0.5, 0.7, 8).tolist()
    shown = [(part, share) for part in range(6) for share in shares]
    others = [picture(100 + index).float() for index in range(len(shown))]
    pictures = torch.stack(
        [
            (share * picture(part) + (1 - share) * other).byte()
            for (part, share), other in zip(shown, others, strict=True)
        ]
    )
    spectra = fine_spectra(pictures)
    found = torch.stack([correlations(spectrum, spectra) for spectrum in spectra])
    assert ((found - ALIKE).abs() < 0.1).sum() > 50
    count, expected = connected_components((found >= ALIKE).numpy(), directed=False)
    assert 6 < count < len(pictures)
    assert part_numbers(pictures, most=len(pictures)) == expected.tolist()


def test_what_a_split_is_busy_with_is_shown(tmp_path):
    output = io.StringIO()
    console = Console(file=output, width=100)
    split_good_images(folder_of(tmp_path, numbered(20)), fraction=0.2, alpha=0.2, seed=0, console=console)
    reading, comparing = output.getvalue().splitlines()
    assert reading.startswith("reading thumbnails")
    assert comparing.startswith("comparing parts")
    assert "20/20" in reading
    assert "20/20" in comparing


def test_what_all_pictures_share_makes_no_two_of_them_alike():
    shared = part(50)[6:54, 6:54]
    pictures = torch.stack(
        [(picture(number).float() + 60 * torch.from_numpy(shared)).clamp(0, 255).byte() for number in range(8)]
    )
    assert part_numbers(pictures, most=4) == list(range(8))


def test_flat_pictures_are_parts_of_their_own():
    assert part_numbers(torch.full((3, 1, 48, 48), 77, dtype=torch.uint8), most=2) == [0, 1, 2]


def test_if_all_are_alike_every_picture_is_a_part_of_its_own():
    """Then it is the product, placed alike each time, that is the same."""
    alike = [picture(0, noise=3.0), picture(0, gain=0.8), picture(0, shift=1)]
    pictures = torch.stack([*alike, picture(1), picture(2)])
    assert part_numbers(pictures, most=3) == [0, 0, 0, 1, 2]
    assert part_numbers(pictures, most=2) == [0, 1, 2, 3, 4]


def test_all_pictures_of_a_part_are_on_one_side(tmp_path):
    for number in range(20):
        for exposure, gain in enumerate((0.6, 0.8, 1.0)):
            Image.fromarray(picture(number, gain=gain)[0].numpy()).save(tmp_path / f"{number:02}-{exposure}.png")
    dataset = read_dataset(tmp_path)
    for seed in range(5):
        parts = split(dataset, seed=seed)
        held_out = {path.name[:2] for path in parts.calibration}
        assert not held_out & {path.name[:2] for path in parts.training}
        assert len(parts.calibration) == 3 * len(held_out) == 12
        same = {(path.name[:2], number) for path, number in zip(parts.calibration, parts.parts, strict=True)}
        assert len(same) == len({number for _, number in same}) == 4


def write_pictures(folder: Path, numbers: range, gains: tuple[float, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        for exposure, gain in enumerate(gains):
            Image.fromarray(picture(number, gain=gain)[0].numpy()).save(folder / f"{number:02}-{gain}-{exposure}.png")


def test_no_picture_of_a_part_that_validation_shows_is_trained_on(tmp_path):
    write_pictures(tmp_path / "train/good", range(20), (0.6, 0.8))
    write_pictures(tmp_path / "validation/good", range(5), (1.0,))
    dataset = read_dataset(tmp_path)
    for seed in range(5):
        parts = split(dataset, fraction=0.3, seed=seed)
        assert {path.name[:2] for path in parts.training}.isdisjoint(path.name[:2] for path in dataset.validation)
        assert len(parts.training) == 28  # they count towards what is held out: 12 of 40
        numbers = {path.name[:2]: number for path, number in zip(parts.calibration, parts.parts, strict=True)}
        assert [numbers[path.name[:2]] for path in parts.calibration] == parts.parts


def test_validation_images_say_how_many_pictures_a_part_may_have(tmp_path):
    """None of the others need be held out here: half of none would take alike pictures for the product."""
    write_pictures(tmp_path / "train/good", range(20), (0.8,))
    write_pictures(tmp_path / "validation/good", range(30, 35), (0.8, 1.0))
    parts = split(read_dataset(tmp_path), fraction=0.01)
    assert len(parts.calibration) == 10
    assert len(set(parts.parts)) == 5


def test_validation_that_shows_most_of_the_parts_is_refused(tmp_path):
    write_pictures(tmp_path / "train/good", range(20), (0.6, 0.8))
    write_pictures(tmp_path / "validation/good", range(11), (1.0,))
    with pytest.raises(DataError, match=r"22 of 40 different images in .*train/good show parts that validation/good"):
        split(read_dataset(tmp_path))
