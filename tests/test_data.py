"""Folders of images: what is listed, what is read, what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import DataError
from models.images import decode_image, image_tensor
from tests.conftest import png
from training.data import (
    Dataset,
    TestImage,
    images_below,
    is_searched,
    load_images,
    load_mask,
    read_dataset,
)


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or path.name.encode())
    return path


def write_image(path: Path, colour: object, *, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


# Listing a folder


def test_an_mvtec_folder_is_listed_with_its_masks(tmp_path):
    good = write(tmp_path / "train/good/000.png")
    test_good = write(tmp_path / "test/good/000.png")
    crack = write(tmp_path / "test/crack/000.png")
    scratch = write(tmp_path / "test/scratch/000.png")
    crack_mask = write(tmp_path / "ground_truth/crack/000_mask.png")
    scratch_mask = write(tmp_path / "ground_truth/scratch/000.png")
    assert read_dataset(tmp_path) == Dataset(
        root=tmp_path,
        good=[good],
        validation=[],
        test=[
            TestImage(path=crack, defect="crack", mask=crack_mask),
            TestImage(path=test_good, defect="good", mask=None),
            TestImage(path=scratch, defect="scratch", mask=scratch_mask),
        ],
    )


def test_an_mvtec_folder_without_masks_has_test_images_without(tmp_path):
    write(tmp_path / "train/good/000.png")
    crack = write(tmp_path / "test/crack/000.png")
    assert read_dataset(tmp_path).test == [TestImage(path=crack, defect="crack", mask=None)]


def test_one_defect_may_have_masks_and_another_none(tmp_path):
    write(tmp_path / "test/crack/000.png")
    write(tmp_path / "test/scratch/000.png")
    mask = write(tmp_path / "ground_truth/crack/000_mask.png")
    assert [image.mask for image in read_dataset(tmp_path).test] == [mask, None]


def test_an_mvtec_folder_without_test_images_is_listed(tmp_path):
    good = [write(tmp_path / f"train/good/{name}.png") for name in "ab"]
    assert read_dataset(tmp_path) == Dataset(root=tmp_path, good=good, validation=[], test=[])


def test_a_folder_of_test_images_alone_is_listed(tmp_path):
    write(tmp_path / "test/good/000.png")
    dataset = read_dataset(tmp_path)
    assert dataset.good == []
    assert len(dataset.test) == 1


def test_other_folders_beside_train_good_are_not_good(tmp_path):
    good = write(tmp_path / "train/good/000.png")
    write(tmp_path / "train/crack/000.png")
    write(tmp_path / "000.png")
    assert read_dataset(tmp_path).good == [good]


def test_a_mask_named_as_mvtec_names_it_goes_before_one_of_the_images_own_name(tmp_path):
    write(tmp_path / "test/crack/000.png")
    write(tmp_path / "ground_truth/crack/000.png")
    mask = write(tmp_path / "ground_truth/crack/000_mask.png")
    assert read_dataset(tmp_path).test[0].mask == mask


def test_a_good_test_image_has_no_mask_even_if_there_is_a_file(tmp_path):
    write(tmp_path / "test/good/000.png")
    write(tmp_path / "ground_truth/good/000_mask.png")
    assert read_dataset(tmp_path).test[0].mask is None


def test_test_images_of_one_name_in_two_subfolders_have_their_own_masks(tmp_path):
    for batch in ("monday", "tuesday"):
        write(tmp_path / f"test/crack/{batch}/000.png")
        write(tmp_path / f"ground_truth/crack/{batch}/000_mask.png")
    masks = [image.mask for image in read_dataset(tmp_path).test]
    assert masks == [tmp_path / f"ground_truth/crack/{batch}/000_mask.png" for batch in ("monday", "tuesday")]


def test_a_defect_with_masks_for_some_images_only_is_refused_by_file(tmp_path):
    for number in range(3):
        write(tmp_path / f"test/crack/{number:03}.png")
    for number in (0, 2):
        write(tmp_path / f"ground_truth/crack/{number:03}_mask.png")
    with pytest.raises(DataError, match=r"test/crack/001\.png has no mask 001_mask\.png"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("name", ["000_gt.png", "000_mask.bmp", "mask_000.png"])
def test_a_defect_whose_masks_have_other_names_is_refused_and_not_taken_for_one_without(tmp_path, name):
    write(tmp_path / "test/crack/000.png")
    write(tmp_path / f"ground_truth/crack/{name}")
    with pytest.raises(DataError, match=r"test/crack/000\.png has no mask"):
        read_dataset(tmp_path)


def test_a_plain_folder_is_listed_with_its_subfolders(tmp_path):
    paths = [write(tmp_path / name) for name in ("a.png", "shift 1/b.png", "shift 1/deep/c.png", "z.png")]
    assert read_dataset(tmp_path) == Dataset(root=tmp_path, good=paths, validation=[], test=[])


@pytest.mark.parametrize("extension", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".PNG", ".JpG"])
def test_images_are_known_by_their_extension_in_either_case(tmp_path, extension):
    path = write(tmp_path / f"nut{extension}")
    assert images_below(tmp_path) == [path]


def test_other_files_hidden_files_and_folders_named_as_images_are_not_listed(tmp_path):
    path = write(tmp_path / "nut.png")
    for name in ("notes.txt", "nut.gif", "nut", "._nut.png", ".png", "deep/.nut.jpg"):
        write(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    assert images_below(tmp_path) == [path]


def test_images_in_hidden_folders_are_not_listed(tmp_path):
    path = write(tmp_path / "nut.png")
    write(tmp_path / ".thumbnails/nut.png")
    write(tmp_path / "deep/.ipynb_checkpoints/nut-checkpoint.png")
    assert images_below(tmp_path) == [path]


def test_a_folder_below_a_hidden_one_is_listed(tmp_path):
    path = write(tmp_path / ".cache/nuts/000.png")
    assert images_below(tmp_path / ".cache/nuts") == [path]


def test_stray_files_and_hidden_folders_among_the_defects_are_not_a_defect(tmp_path):
    write(tmp_path / "test/good/000.png")
    write(tmp_path / "test/readme.txt")
    write(tmp_path / "test/stray.png")
    write(tmp_path / "test/.thumbnails/000.png")
    assert [image.defect for image in read_dataset(tmp_path).test] == ["good"]


def test_there_is_nothing_below_a_folder_that_does_not_exist(tmp_path):
    assert images_below(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("folder", "plain", "mvtec"),
    [
        ("", True, False),
        ("runs/nut", True, False),
        (".runs/nut", False, False),
        ("train/good/runs", True, True),
        ("validation/good/runs", True, True),
        ("test/good/runs", True, False),
        ("../runs", False, False),
        ("runs/../../nuts2", False, False),
    ],
)
def test_good_images_are_searched_in_all_of_a_plain_folder_and_where_an_mvtec_one_has_them(
    tmp_path, monkeypatch, folder, plain, mvtec
):
    root = tmp_path / "nuts"
    write(root / "000.png")
    monkeypatch.chdir(root)
    assert is_searched(Path(folder), root) == is_searched(root / folder, Path(".")) == plain
    write(root / "train/good/000.png")
    assert is_searched(root / folder, root) == mvtec


# Folders that are refused


@pytest.mark.parametrize("name", ["absent", "nut.png"])
def test_what_is_not_a_folder_is_refused_by_name(tmp_path, name):
    write(tmp_path / "nut.png")
    with pytest.raises(DataError, match=rf"{name} is not a folder"):
        read_dataset(tmp_path / name)


@pytest.mark.parametrize("names", [[], ["notes.txt"], [".nut.png"]])
def test_a_plain_folder_without_images_is_refused_with_what_was_looked_for(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(DataError, match=r"no images in .*nor a folder train/good.*\.bmp, \.jpeg, \.jpg"):
        read_dataset(tmp_path)


def test_an_mvtec_folder_without_good_images_is_refused_with_where_they_belong(tmp_path):
    write(tmp_path / "train/000.png")
    with pytest.raises(DataError, match=r"no images in .*train/good: "):
        read_dataset(tmp_path)


def test_a_folder_of_mvtec_folders_is_refused_and_its_defects_are_not_taken_for_good(tmp_path):
    for product in ("bottle", "hazelnut"):
        write(tmp_path / product / "train/good/000.png")
        write(tmp_path / product / "test/crack/000.png")
        write(tmp_path / product / "ground_truth/crack/000_mask.png")
    with pytest.raises(DataError, match="bottle"):
        read_dataset(tmp_path)


# Reading images


def test_images_are_loaded_in_their_order_as_the_model_sees_them(tmp_path):
    paths = [write(tmp_path / f"{index}.png", png(seed=index)) for index in (3, 1, 2)]
    images = load_images(paths, channels=3, size=32)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.uint8
    for image, path in zip(images, paths, strict=True):
        assert torch.equal(image, image_tensor(decode_image(path.read_bytes()), channels=3, size=32))


def test_images_of_different_sizes_and_kinds_are_loaded_together(tmp_path):
    paths = [
        write_image(tmp_path / "a.png", (10, 20, 30)),
        write_image(tmp_path / "b.bmp", 77, mode="L", size=(50, 9)),
        write_image(tmp_path / "c.tif", (10, 20, 30, 255), mode="RGBA", size=(33, 33)),
    ]
    assert load_images(paths, channels=3, size=16)[:, :, 5, 5].tolist() == [[10, 20, 30], [77, 77, 77], [10, 20, 30]]


def test_a_gray_image_fills_three_channels_and_a_colour_image_one(tmp_path):
    gray = write_image(tmp_path / "gray.png", 77, mode="L")
    colour = write_image(tmp_path / "colour.png", (255, 0, 0))
    assert load_images([gray], channels=3, size=16)[0, :, 0, 0].tolist() == [77, 77, 77]
    one = load_images([gray, colour], channels=1, size=16)
    assert one.shape == (2, 1, 16, 16)
    assert one[:, 0, 0, 0].tolist() == [77, 76]  # 0.299 of 255


def test_progress_is_told_once_per_image(tmp_path):
    paths = [write(tmp_path / f"{index}.png", png(seed=index)) for index in range(5)]
    calls = []
    load_images(paths, channels=3, size=16, advance=lambda: calls.append(1))
    assert len(calls) == 5


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    paths = [
        write(tmp_path / "fine.png", png()),
        write(tmp_path / "text.png", b"not an image"),
        write(tmp_path / "short.png", png()[:-20]),
        tmp_path / "absent.png",
    ]
    with pytest.raises(DataError) as refusal:
        load_images(paths, channels=3, size=16)
    first, *lines = str(refusal.value).splitlines()
    assert first == "3 of 4 images cannot be read:"
    assert [line.strip().split(":")[0] for line in lines] == [str(path) for path in paths[1:]]
    assert "not a PNG, JPEG, WebP, BMP or TIFF" in lines[0]
    assert "ends" in lines[1]
    assert "No such file" in lines[2]


def test_of_many_bad_files_ten_are_named_and_all_are_counted(tmp_path):
    paths = [write(tmp_path / f"{index:02}.png", b"not an image") for index in range(12)]
    with pytest.raises(DataError) as refusal:
        load_images(paths, channels=3, size=16)
    first, *lines = str(refusal.value).splitlines()
    assert first.startswith("12 of 12 images")
    assert [line.strip().split(":")[0] for line in lines] == [str(path) for path in paths[:10]]


# Reading masks


def mask_image(mask: Path | None) -> TestImage:
    return TestImage(path=Path("test/crack/000.png"), defect="crack", mask=mask)


def saved_mask(path: Path, pixels: list[list[int]]) -> TestImage:
    Image.fromarray(np.array(pixels, dtype=np.uint8)).save(path)
    return mask_image(path)


def test_a_mask_is_true_where_it_is_more_than_half_white(tmp_path):
    image = saved_mask(tmp_path / "mask.png", [[0, 127, 128], [255, 1, 200]])
    mask = load_mask(image, width=3, height=2)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[False, False, True], [True, False, True]]


@pytest.mark.parametrize(("mode", "white"), [("1", 1), ("L", 255), ("RGB", (255, 255, 255)), ("I;16", 65535)])
def test_a_mask_may_be_of_any_pixel_type(tmp_path, mode, white):
    mask = Image.new(mode, (2, 1))
    mask.putpixel((1, 0), white)
    mask.save(tmp_path / "mask.png")
    assert load_mask(mask_image(tmp_path / "mask.png"), width=2, height=1).tolist() == [[False, True]]


def test_an_image_without_a_mask_has_no_defect_pixel():
    mask = load_mask(mask_image(None), width=5, height=4)
    assert mask.shape == (4, 5)
    assert mask.dtype == np.bool_
    assert not mask.any()


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path):
    image = saved_mask(tmp_path / "mask.png", [[0, 255, 0], [0, 0, 0]])
    with pytest.raises(DataError, match=r"mask\.png is 3 x 2 pixels, its image test/crack/000\.png is 2 x 3"):
        load_mask(image, width=2, height=3)


def test_a_mask_that_cannot_be_read_is_refused_by_name(tmp_path):
    file = io.BytesIO()
    Image.new("L", (30, 30)).save(file, "PNG")
    path = write(tmp_path / "mask.png", file.getvalue()[:-15])
    with pytest.raises(DataError, match=r"mask\.png: the PNG ends"):
        load_mask(mask_image(path), width=30, height=30)


def test_a_mask_that_vanished_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"absent\.png"):
        load_mask(mask_image(tmp_path / "absent.png"), width=2, height=2)
