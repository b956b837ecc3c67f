"""The one path from a file's bytes to the pixels that a model sees. Training, command line and service use it.

Pillow alone decodes: on hostile bytes it raises, where other decoders crash or swell. What can be checked before
the decoder is checked before it. Each pixel type has one rule:

    1, 8 bit          as they are; 1 bit becomes 0 and 255
    16 bit            the high byte of each sample, gray or colour: a 12-bit camera should shift its samples up
    32 bit, float     refused: they have no agreed range
    palette           its colours
    alpha, tRNS       laid over black; tRNS of 2, 4 and 16 bit samples, which Pillow misreads, is refused
    run-length BMP    refused
    CMYK, YCbCr       Pillow's conversion to RGB; colour profiles and gamma are not applied, in any format
    EXIF orientation  applied
    animation, pages  refused; of a multi-picture JPEG the first picture is taken, the others are previews
"""

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from models.errors import (
    ImageAnimatedError,
    ImageCorruptError,
    ImageEmptyError,
    ImageFormatError,
    ImageModeError,
    ImageTooLargeError,
    ImageTruncatedError,
)

# 150 MB as RGB: twice a 24 megapixel camera. Pillow itself warns from 89 million pixels on.
MAX_PIXELS = 50_000_000

SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}
# 8 and 4 bit. Pillow expands the runs in Python: 76 bytes can keep it busy for seconds.
BMP_RUN_LENGTH = (1, 2)
PHOTOMETRIC_TAG = 262
PNG_SAMPLES = {2: 3, 4: 2, 6: 4}  # per pixel, by colour type; one in the others
# First row, first column, step down, step across of each pass of an interlaced PNG.
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
# In coded data 0xFF comes before 0 or a restart mark, and before a marker it may be repeated.
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
HUFFMAN_FRAMES = {b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"}  # of the others, arithmetic coding needs less than a bit
GRAY_MODES = {"1", "L", "LA", "La"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"}
GRAY_16_MODES = {"I;16", "I;16B", "I;16L", "I;16N"}
# What Pillow was seen to raise on hostile files. SyntaxError is its word for a header that makes no sense.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG, WebP, BMP or TIFF, upright, to mode "L" or "RGB", 8 bits per sample.

    Raises a subclass of ImageError, one per reason: see models.errors. A part of an image is never returned as the
    whole, with one exception: a JPEG has no checksum, so that one whose coded bytes were changed, or left out before
    its end mark, decodes to a changed image.
    """
    if not data:
        raise ImageEmptyError("the file is empty.")
    format_name = _format(data)
    try:
        _check_container(data, format_name, max_pixels)
        with Image.open(io.BytesIO(data), formats=[format_name]) as image:
            _check_pixels(image.width, image.height, max_pixels)
            # Not n_frames: Pillow would read the directory of every page to count them.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ImageAnimatedError(f"the {format_name} has more than one frame or page: allowed is one.")
            if format_name == "TIFF":
                _check_strips(image)
            if format_name == "BMP" and image.info["compression"] in BMP_RUN_LENGTH:
                raise ImageModeError("the BMP is run-length coded: allowed is an uncompressed one.")
            # Of white-is-zero images Pillow turns over those of 8 bits, not those of 16.
            inverted = image.mode in GRAY_16_MODES and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_TAG) == 0
            pixels = _eight_bit(ImageOps.exif_transpose(image))
            return ImageOps.invert(pixels) if inverted else pixels
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"the {format_name} is too large: {error}.") from error
    except UnidentifiedImageError as error:  # its text is an address in memory
        raise ImageCorruptError(f"the {format_name} is corrupt: its header makes no sense.") from error
    except DECODER_ERRORS as error:
        if "truncated" in str(error).lower():
            raise ImageTruncatedError(f"the {format_name} ends before its image does.") from error
        raise ImageCorruptError(f"the {format_name} is corrupt: {error or type(error).__name__}.") from error


def image_tensor(image: Image.Image, *, channels: int, size: int) -> Tensor:
    """Pixels of a decoded image, resized with antialiasing: uint8 (channels, size, size).

    channels: 1 (ITU-R 601 luma of a colour image) or 3 (a gray image three times). The aspect ratio is not kept.
    """
    converted = image.convert("L" if channels == 1 else "RGB")
    pixels = np.array(converted, ndmin=3).reshape(converted.height, converted.width, channels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)  # (C, H, W)
    resized: Tensor = transforms.resize(tensor, [size, size], antialias=True)
    return resized.contiguous()


def _format(data: bytes) -> str:
    for signature, name in SIGNATURES.items():
        if data.startswith(signature) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return name
    raise ImageFormatError("the file is not a PNG, JPEG, WebP, BMP or TIFF image.")


def _check_container(data: bytes, format_name: str, max_pixels: int) -> None:
    if format_name == "PNG":
        _check_png(data, max_pixels)
    elif format_name == "JPEG":
        _check_jpeg(data)
    elif format_name == "TIFF":
        _check_tiff(data)
    elif format_name == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageTruncatedError("the WebP ends before its image does.")


def _check_png(data: bytes, max_pixels: int) -> None:
    """One picture with all its rows: where some are missing, Pillow leaves them black."""
    chunks = _png_chunks(data)
    kind, header = next(chunks, (b"", memoryview(b"")))
    if kind != b"IHDR" or len(header) != 13:
        raise ImageCorruptError("the PNG is corrupt: it does not begin with its header.")
    width, height, depth, colour_type, interlaced = struct.unpack(">IIBBxxB", header)
    _check_pixels(width, height, max_pixels)
    missing = _png_bytes(width, height, depth * PNG_SAMPLES.get(colour_type, 1), interlaced=bool(interlaced))
    inflate = zlib.decompressobj()
    for kind, content in chunks:
        if kind == b"acTL":
            raise ImageAnimatedError("the PNG is animated: allowed is one frame.")
        # Pillow compares the clear colour, given in the file's own depth, with samples that it has scaled to 8 bits.
        if kind == b"tRNS" and (depth == 16 or (colour_type == 0 and depth in (2, 4))):
            raise ImageModeError(f"the PNG has {depth} bits per sample and a clear colour: allowed are 1 and 8 bits.")
        if kind == b"IDAT":
            # In pieces, so that a bomb of a thousand to one stays small, and no further than the last row.
            for start in range(0, len(content), 2**14):
                if missing > 0:
                    missing -= len(inflate.decompress(content[start : start + 2**14]))
    if missing > 0:
        raise ImageTruncatedError("the PNG ends before its image does.")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each chunk up to the end mark, its length checked against the file, and its checksum."""
    position = 8
    while position < len(data):
        if len(data) < position + 12:
            raise ImageTruncatedError("the PNG ends within a chunk.")
        length, kind = struct.unpack_from(">I4s", data, position)
        if length >= 2**31:
            raise ImageCorruptError(f"the PNG is corrupt: a chunk says that it is {length} bytes long.")
        end = position + 12 + length
        if end > len(data):
            raise ImageTruncatedError("the PNG ends within a chunk.")
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
            raise ImageCorruptError(f"the PNG is corrupt: chunk {kind!r} does not match its checksum.")
        if kind == b"IEND":
            return
        yield kind, memoryview(data)[position + 8 : end - 4]
        position = end
    raise ImageTruncatedError("the PNG ends before its image does.")


def _png_bytes(width: int, height: int, bits: int, *, interlaced: bool) -> int:
    """How many bytes the rows of a PNG are, each with its filter byte. bits: per pixel."""
    total = 0
    for top, left, down, across in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        rows, columns = math.ceil((height - top) / down), math.ceil((width - left) / across)
        if rows > 0 and columns > 0:
            total += rows * (1 + math.ceil(columns * bits / 8))
    return total


def _check_jpeg(data: bytes) -> None:
    """Go from marker to marker to the end mark: libjpeg fills what is missing with gray."""
    position = 2
    while marker := JPEG_MARKER.search(data, position):
        position = marker.end()
        # Every block has a bit at least, for its mean. Where there are more blocks, most of the image is not there.
        if marker[0] == b"\xff\xd9" or (marker[0] in HUFFMAN_FRAMES and 8 * len(data) < _jpeg_blocks(data, position)):
            break
        position += int.from_bytes(data[position : position + 2], "big")
    if marker is None or marker[0] != b"\xff\xd9":
        raise ImageTruncatedError("the JPEG ends before its image does.")


def _jpeg_blocks(data: bytes, position: int) -> int:
    """How many blocks of 8 x 8 samples a frame has, whose header is at that position; 0 where it makes no sense."""
    try:
        height, width, components = struct.unpack_from(">HHB", data, position + 3)
        factors = [data[position + 9 + 3 * index] for index in range(components)]
    except (struct.error, IndexError):
        return 0
    across, down = max((each >> 4 for each in factors), default=0), max((each & 15 for each in factors), default=0)
    if not across or not down:
        return 0
    units: int = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    return units * sum((each >> 4) * (each & 15) for each in factors)


def _check_tiff(data: bytes) -> None:
    """The directory is whole and the only one: of a cut directory Pillow takes what is left, with a warning."""
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (tags,) = struct.unpack_from(f"{order}H", data, start)
        (next_page,) = struct.unpack_from(f"{order}I", data, start + 2 + 12 * tags)
    except struct.error as error:
        raise ImageTruncatedError("the TIFF ends before its directory does.") from error
    if next_page:
        raise ImageAnimatedError("the TIFF has more than one frame or page: allowed is one.")


def _check_strips(image: ImageFile.ImageFile) -> None:
    """The strips cover the image, once or once per band: where one is missing, Pillow leaves it black."""
    boxes = [tile.extents for tile in image.tile if tile.extents]
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if covered == 0 or covered % (image.width * image.height):
        raise ImageTruncatedError("the TIFF ends before its image does.")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(f"the image has {width} x {height} pixels: allowed are {max_pixels} in all.")


def _eight_bit(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in GRAY_16_MODES:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mode not in GRAY_MODES | COLOUR_MODES:
        raise ImageModeError(f"the image's pixel type {mode!r} has no agreed range: allowed are 1, 8 and 16 bit.")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return image.convert("L" if mode in GRAY_MODES else "RGB")
