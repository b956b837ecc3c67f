"""The one path from a file's bytes to the pixels that a model sees. Training, command line and service use it.

Pillow alone decodes: on hostile bytes it raises, where other decoders crash or swell. What can be checked before
the decoder is checked before it. Each pixel type has one rule:

    1, 8 bit          as they are; 1 bit becomes 0 and 255
    16 bit            the high byte of each sample, gray or colour: a 12-bit camera should shift its samples up
    32 bit, float     refused: they have no agreed range
    palette           its colours
    alpha, tRNS       laid over black
    CMYK, YCbCr       Pillow's conversion to RGB; colour profiles and gamma are not applied, in any format
    EXIF orientation  applied
    animation, pages  refused; of a multi-picture JPEG the first picture is taken, the others are previews
"""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
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

    Raises a subclass of ImageError, one per reason: see models.errors. What cannot be known without decoding (a
    JPEG has no checksum) may decode to a changed image; a part of an image is never returned as the whole.
    """
    if not data:
        raise ImageEmptyError("the file is empty.")
    format_name = _format(data)
    if format_name == "PNG":
        _check_png(data, max_pixels)
    # Neither marker occurs in coded data. A thumbnail has both, but stands before the image's own scan.
    elif format_name == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise ImageTruncatedError("the JPEG ends before its image does.")
    elif format_name == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageTruncatedError("the WebP ends before its image does.")
    try:
        with Image.open(io.BytesIO(data), formats=[format_name]) as image:
            _check_pixels(image.width, image.height, max_pixels)
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ImageAnimatedError(f"the {format_name} has more than one frame or page: allowed is one.")
            return _eight_bit(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"the {format_name} is too large: {error}.") from error
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


def _check_png(data: bytes, max_pixels: int) -> None:
    """Walk the chunks: each one's length against the file, its checksum, one picture, an end."""
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
        if position == 8:
            if kind != b"IHDR" or length != 13:
                raise ImageCorruptError("the PNG is corrupt: it does not begin with its header.")
            width, height = struct.unpack_from(">II", data, position + 8)
            _check_pixels(width, height, max_pixels)
        if kind == b"acTL":
            raise ImageAnimatedError("the PNG is animated: allowed is one frame.")
        if kind == b"IEND":
            return
        position = end
    raise ImageTruncatedError("the PNG ends before its image does.")


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
