"""The decode path: golden files of every pixel type, and files that must be refused."""

import io
import random
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from models.errors import (
    ImageAnimatedError,
    ImageCorruptError,
    ImageEmptyError,
    ImageError,
    ImageFailedError,
    ImageFormatError,
    ImageModeError,
    ImageTooLargeError,
    ImageTruncatedError,
    ImageUnreadableError,
)
from models.images import decode_image, image_tensor
from tests.golden.make import (
    COLOUR,
    GRAY,
    colour_picture,
    golden_files,
    gray_picture,
    png_chunk,
    png_file,
    png_rows,
    sixteen_bit,
    tiff_file,
)

GOLDEN_FOLDER = Path(__file__).parent / "golden"
EXPECTED: dict[str, NDArray[np.uint8]] = dict(np.load(GOLDEN_FOLDER / "expected.npz"))
GOLDEN = {name: (GOLDEN_FOLDER / name).read_bytes() for name in EXPECTED}

# Against the drawn picture, in gray levels. What is not named here is equal.
LARGEST_DIFFERENCE = {".jpg": 10, "_lossy.webp": 12, "alpha.png": 1, "rgba.png": 1, "trns.png": 1}
MEAN_DIFFERENCE = 2.0

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of a TIFF that is cut or changed, Pillow warns; only what decode_image raises and returns is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encoded(*images: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    if len(images) == 1:
        images[0].save(file, file_format)
    else:
        images[0].save(file, file_format, save_all=True, append_images=images[1:])
    return file.getvalue()


def png_of(*chunks: bytes) -> bytes:
    return SIGNATURE + b"".join(chunks)


def header(width: int, height: int) -> bytes:
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, COLOUR, 0, 0, 0))


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode_image(data))


# What is taken


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_decodes_to_the_drawn_picture(name):
    assert len(GOLDEN[name]) < 4096
    expected = EXPECTED[name]
    image = decode_image(GOLDEN[name])
    assert image.mode == ("L" if expected.ndim == 2 else "RGB")
    assert image.size == (expected.shape[1], expected.shape[0])
    difference = np.abs(np.asarray(image).astype(int) - expected.astype(int))
    allowed = [levels for ending, levels in LARGEST_DIFFERENCE.items() if name.endswith(ending)]
    assert difference.max() <= max(allowed, default=0)
    assert difference.mean() <= MEAN_DIFFERENCE


def test_the_golden_files_are_those_that_make_writes():
    made = {name: pixels for name, (_, pixels) in golden_files().items()}
    assert made.keys() == EXPECTED.keys()
    assert {path.name for path in GOLDEN_FOLDER.glob("*.*")} == {*EXPECTED, "expected.npz", "make.py"}
    assert all(np.array_equal(pixels, EXPECTED[name]) for name, pixels in made.items())


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_after_the_end_of_an_image_are_allowed(name):
    # A file can be an image and something else, and cameras append records of their own. FF DA and FF D9 begin and
    # end the coded data of a JPEG: out there they mean nothing.
    for trailer in (b"PK\x03\x04 an archive", b"\0" * 100, b"\xff\xda", b"\xff\xd8\xff\xda\xff\xd9\xff\xda"):
        assert np.array_equal(pixels_of(GOLDEN[name] + trailer), pixels_of(GOLDEN[name]))


def test_sixteen_bit_samples_keep_their_high_byte():
    samples = np.array([[0, 255, 256, 511, 32767, 65535]], dtype=np.uint16)
    for data in (
        png_file(samples, depth=16, colour_type=GRAY),
        tiff_file(samples, photometric=1, depth=16),
        tiff_file(samples, photometric=1, depth=16, order=">"),
    ):
        assert pixels_of(data).tolist() == [[0, 0, 1, 1, 127, 255]]


def test_a_picture_of_exactly_the_largest_size_is_taken():
    data = GOLDEN["gray.png"]  # 24 x 16
    assert decode_image(data, max_pixels=384).size == (24, 16)
    with pytest.raises(ImageTooLargeError, match=r"24 x 16 pixels: allowed are 383 in all"):
        decode_image(data, max_pixels=383)


# What is refused


def run_length_bmp() -> bytes:
    """76 bytes that say "50 million pixels, the rest of the row is empty". Pillow expands runs in Python: 8 seconds."""
    header = struct.pack("<IiiHHIIiiII", 40, 50_000_000, 1, 1, 8, 1, 6, 0, 0, 4, 0)
    return struct.pack("<2sIHHI", b"BM", 76, 0, 0, 70) + header + bytes(16) + b"\x01\x00\x00\x00\x00\x01"


def two_frames() -> list[Image.Image]:
    return [Image.fromarray(colour_picture()), Image.fromarray(255 - colour_picture())]


REFUSED = {
    "nothing": (b"", ImageEmptyError),
    "text": (b"width,height\n24,16\n", ImageFormatError),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="16"/>', ImageFormatError),
    "gif": (encoded(two_frames()[0], file_format="GIF"), ImageFormatError),
    "a sound in RIFF": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), ImageFormatError),
    "signature alone": (SIGNATURE, ImageTruncatedError),
    "no end": (GOLDEN["rgb.png"][:-12], ImageTruncatedError),
    "no header": (png_of(png_chunk(b"IDAT", b""), png_chunk(b"IEND", b"")), ImageCorruptError),
    "end alone": (png_of(png_chunk(b"IEND", b"")), ImageCorruptError),
    "no width": (png_of(header(0, 16), png_chunk(b"IEND", b"")), ImageCorruptError),
    "400 megapixels": (png_of(header(20000, 20000), png_chunk(b"IEND", b"")), ImageTooLargeError),
    "animated png": (encoded(*two_frames(), file_format="PNG"), ImageAnimatedError),
    "animated png that says so late": (
        GOLDEN["rgb.png"][:-12] + png_chunk(b"acTL", struct.pack(">II", 2, 0)) + png_chunk(b"IEND", b""),
        ImageAnimatedError,
    ),
    "animated webp": (encoded(*two_frames(), file_format="WEBP"), ImageAnimatedError),
    "two pages": (encoded(*two_frames(), file_format="TIFF"), ImageAnimatedError),
    "run-length bmp": (run_length_bmp(), ImageModeError),
    "float": (tiff_file(gray_picture() / 255, photometric=1, depth=32, sample_format=3), ImageModeError),
    "32 bit": (tiff_file(gray_picture().astype(np.uint32), photometric=1, depth=32), ImageModeError),
    "signed": (tiff_file(sixteen_bit(gray_picture()), photometric=1, depth=16, sample_format=2), ImageModeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_taken_is_refused_by_its_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(ImageError) as raised:
        decode_image(data)
    assert type(raised.value) is reason


def test_every_reason_has_a_file():
    of_the_service = {ImageUnreadableError, ImageFailedError}
    assert {reason for _, reason in REFUSED.values()} | of_the_service == set(ImageError.__subclasses__())


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The same file, whose header names another size."""
    frame = next(index for index in range(len(data)) if data[index : index + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_a_jpeg_that_claims_more_blocks_than_it_has_bits_is_truncated(options):
    file = io.BytesIO()
    Image.effect_noise((400, 300), 50).convert("RGB").save(file, "JPEG", **options)
    started = time.process_time()
    with pytest.raises(ImageTruncatedError):
        decode_image(with_jpeg_size(file.getvalue(), 7000, 7000))
    assert time.process_time() - started < 0.1, "libjpeg would take half a second"


@pytest.mark.parametrize("size", [(8, 8), (401, 299), (4000, 3000)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_of_one_colour_has_bits_enough(size, options, mode):
    """The smallest files that there are for their size."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, "JPEG", quality=1, **options)
    assert decode_image(file.getvalue()).size == size


def test_an_oversized_image_of_every_format_is_refused_before_it_is_decoded():
    for file_format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        data = encoded(Image.new("RGB", (400, 300)), file_format=file_format)
        with pytest.raises(ImageTooLargeError, match="400 x 300 pixels"):
            decode_image(data, max_pixels=100_000)


def test_a_size_that_pillow_calls_a_bomb_is_too_large_whatever_our_own_limit():
    data = bytearray(GOLDEN["rgb.bmp"])
    struct.pack_into("<ii", data, 18, 20000, 20000)
    with pytest.raises(ImageTooLargeError, match="the BMP is too large"):
        decode_image(bytes(data), max_pixels=10**9)


@pytest.mark.parametrize("name", ["rgb.png", "rgb_444.jpg", "rgb_lossless.webp", "rgb.bmp", "rgb.tif"])
def test_a_header_without_sense_is_corrupt_in_words_for_its_sender(name):
    start = {".png": 33, ".jpg": 4, "webp": 12, ".bmp": 14, ".tif": 8}[name[-4:]]
    with pytest.raises((ImageCorruptError, ImageTruncatedError)) as raised:
        decode_image(GOLDEN[name][:start] + b"\x55" * 60)
    assert "object at 0x" not in str(raised.value)  # Pillow names the buffer, by its address in memory


# Parts of an image


def picture_end(name: str) -> int:
    """How many bytes of a golden file hold its whole picture; behind them may be another picture."""
    if name == "several_pictures.jpg":
        return GOLDEN[name].index(b"\xff\xd9") + 2
    return len(GOLDEN[name])


@pytest.mark.parametrize("name", GOLDEN)
def test_no_prefix_of_a_golden_file_decodes(name):
    data, end = GOLDEN[name], picture_end(name)
    # All near both ends, where headers, directories and end markers are; a sample between.
    lengths = {*range(min(100, end)), *range(100, end, 23), *range(max(0, end - 100), end)}
    for length in sorted(lengths):
        with pytest.raises(ImageError):
            pytest.fail(f"{length} of {len(data)} bytes gave {decode_image(data[:length])}")
    for length in range(end, len(data)):
        with suppress(ImageTruncatedError):
            assert np.array_equal(pixels_of(data[:length]), pixels_of(data))


@pytest.mark.parametrize("name", ["rgb.png", "rgb_444.jpg", "rgb_lossless.webp", "rgb.bmp", "rgb.tif"])
def test_a_file_without_its_end_is_called_truncated(name):
    with pytest.raises(ImageTruncatedError, match="ends"):
        decode_image(GOLDEN[name][:-10])


@pytest.mark.parametrize("rows", [0, 1, 8, 15])
def test_a_png_with_rows_missing_is_refused_though_every_checksum_is_right(rows):
    scanline = 1 + 24 * 3
    content = zlib.compress(png_rows(colour_picture(), 8)[: rows * scanline])
    with pytest.raises(ImageTruncatedError):
        decode_image(png_of(header(24, 16), png_chunk(b"IDAT", content), png_chunk(b"IEND", b"")))


def test_a_png_without_image_data_is_refused():
    with pytest.raises((ImageTruncatedError, ImageCorruptError)):
        decode_image(png_of(header(24, 16), png_chunk(b"IEND", b"")))


def test_an_interlaced_png_with_its_last_pass_missing_is_refused():
    gray = gray_picture()
    whole = png_file(gray, depth=8, colour_type=GRAY, interlaced=True)
    start = whole.index(b"IDAT") - 4
    content = zlib.decompress(whole[start + 8 : -16])
    last_pass = 8 * (1 + 24)
    cut = png_chunk(b"IDAT", zlib.compress(content[:-last_pass]))
    with pytest.raises(ImageTruncatedError):
        decode_image(whole[:start] + cut + png_chunk(b"IEND", b""))


def test_a_tiff_with_a_strip_missing_is_refused():
    """Strips of 8 rows in an image of 16, and only one of them listed."""
    data = bytearray(tiff_file(gray_picture(), photometric=1))
    entry = data.index(struct.pack("<HHI", 0x116, 4, 1)) + 8  # rows per strip
    assert struct.unpack_from("<I", data, entry) == (16,)
    struct.pack_into("<I", data, entry, 8)
    with pytest.raises((ImageTruncatedError, ImageCorruptError)):
        decode_image(bytes(data))


# Changed and hostile files


def test_any_one_changed_byte_of_a_png_is_refused():
    data = png_file(gray_picture()[:4, :6], depth=8, colour_type=GRAY)
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[position] ^= flip
            with pytest.raises(ImageError):
                pytest.fail(f"byte {position} changed by {flip:#x} gave {decode_image(bytes(changed))}")


def test_a_png_chunk_of_four_gigabytes_is_refused_at_once():
    data = bytearray(png_of(header(24, 16), png_chunk(b"IDAT", bytes(48)), png_chunk(b"IEND", b"")))
    assert len(data) == 105
    struct.pack_into(">I", data, 33, 2**32 - 1)
    started = time.perf_counter()
    with pytest.raises(ImageCorruptError, match="4294967295 bytes long"):
        decode_image(bytes(data))
    assert time.perf_counter() - started < 0.05


def test_a_tiff_of_very_many_pages_is_refused_at_once():
    """Counting 8000 pages takes Pillow most of a second; the second page is enough to know."""
    page = tiff_file(gray_picture(), photometric=1)
    (start,) = struct.unpack_from("<I", page, 4)
    directory, data = page[start:-4], bytearray(page[:start])
    for index in range(8000):
        after = len(data) + len(directory) + 4
        data += directory + struct.pack("<I", after if index < 7999 else 0)
    started = time.perf_counter()
    with pytest.raises(ImageAnimatedError):
        decode_image(bytes(data))
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(
    ("depth", "colour_type"), [(2, GRAY), (4, GRAY), (16, GRAY), (16, COLOUR)], ids=["2", "4", "16", "16 colour"]
)
def test_a_clear_colour_that_pillow_would_compare_wrongly_is_refused(depth, colour_type):
    """Pillow compares the key, which counts in the file's own depth, with pixels that it has scaled to 8 bits."""
    picture = sixteen_bit(colour_picture() if colour_type == COLOUR else gray_picture()) >> (16 - depth)
    key = png_chunk(b"tRNS", np.atleast_1d(picture[5, 7]).astype(">u2").tobytes())
    with pytest.raises(ImageModeError):
        decode_image(png_file(picture, depth=depth, colour_type=colour_type, extra=key))


@given(
    name=st.sampled_from(sorted(GOLDEN)),
    seed=st.integers(0, 2**32 - 1),
    changes=st.integers(1, 6),
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_changed_golden_file_is_refused_or_still_an_image(name, seed, changes):
    random_numbers = random.Random(seed)
    data = bytearray(GOLDEN[name])
    for _ in range(changes):
        position = random_numbers.randrange(len(data) + 1)
        action = random_numbers.choice(["set", "delete", "insert", "long"])
        if action == "set":
            data[position : position + 1] = random_numbers.randbytes(1)
        elif action == "delete":
            del data[position : position + random_numbers.randint(1, 20)]
        elif action == "insert":
            other = GOLDEN[random_numbers.choice(sorted(GOLDEN))]
            start = random_numbers.randrange(len(other))
            data[position:position] = other[start : start + random_numbers.randint(1, 40)]
        else:
            data[position : position + 4] = random_numbers.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
    try:
        image = decode_image(bytes(data), max_pixels=100_000)
    except ImageError:
        return
    assert image.mode in ("L", "RGB")
    assert np.asarray(image).dtype == np.uint8


# From a decoded image to a tensor


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(40, 30), (32, 32), (1, 500), (500, 1), (1, 1)])
def test_image_tensor_has_the_models_shape(size, mode, channels):
    tensor = image_tensor(Image.new(mode, size, 77 if mode == "L" else (77, 77, 77)), channels=channels, size=32)
    assert tensor.shape == (channels, 32, 32)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert tensor.unique().tolist() == [77]


def test_image_tensor_gives_a_gray_image_three_equal_channels():
    tensor = image_tensor(Image.fromarray(gray_picture()), channels=3, size=32)
    assert torch.equal(tensor[0], tensor[1])
    assert torch.equal(tensor[0], tensor[2])
    assert torch.equal(tensor[:1], image_tensor(Image.fromarray(gray_picture()), channels=1, size=32))


def test_image_tensor_takes_the_luma_of_a_colour_image():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert image_tensor(image, channels=1, size=8).unique().tolist() == [luma]


def test_image_tensor_keeps_rows_and_columns_apart():
    picture = colour_picture()[:16, :16]
    tensor = image_tensor(Image.fromarray(picture), channels=3, size=16)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), picture)


@pytest.mark.parametrize("size", [(24, 16), (7, 90), (200, 150), (1, 500), (500, 1)])
def test_image_tensor_resizes_with_antialiasing(size):
    """As Pillow does, which is another implementation of the same filter. One gray level is rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tensor = image_tensor(image, channels=3, size=32)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(tensor.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
