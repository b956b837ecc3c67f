"""Write the golden files: one small image for every pixel type that the decoder takes, and what it must become.

    python tests/golden/make.py

The expected pixels, expected.npz, are computed here from the rules in models/images.py by numpy alone, from the drawn
picture and never by decoding a file. Files of a type that Pillow cannot write are put together by hand. All are
committed: other versions of Pillow and its libraries write other bytes for the same pixels.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Samples = NDArray[np.uint16]

WIDTH, HEIGHT = 24, 16
ORIENTATION_TAG = 0x112
PALETTE = np.array([[250, 10, 20], [0, 200, 30], [5, 60, 220], [240, 230, 90]], dtype=np.uint8)
PALETTE_ALPHA = (0, 85, 170, 255)
# Gray, colour, palette, gray with alpha, colour with alpha: the colour types of a PNG.
GRAY, COLOUR, INDEXED, GRAY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6


def colour_picture() -> Pixels:
    """(H, W, 3): slopes, smooth enough for a JPEG, and no mirror image or quarter turn of it is itself."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([255 * columns / (WIDTH - 1), 255 * rows / (HEIGHT - 1), 40 + 4 * columns + 6 * rows], -1).astype(
        np.uint8
    )


def gray_picture() -> Pixels:
    """(H, W), from 0 to 255."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.asarray((columns * 7 + rows * 6 + 4) % 256, dtype=np.uint8)


def alpha_picture() -> Pixels:
    """(H, W), from clear to opaque."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.asarray(255 * (columns + rows) / (WIDTH + HEIGHT - 2), dtype=np.uint8)


def sixteen_bit(picture: Pixels) -> Samples:
    """The picture in the high bytes. The low bytes are large, so that rounding differs from taking the high byte."""
    low = 255 - np.arange(picture.size, dtype=np.uint16).reshape(picture.shape) % 128
    return np.asarray(picture.astype(np.uint16) << 8 | low, dtype=np.uint16)


def over_black(picture: Pixels, alpha: Pixels) -> Pixels:
    if picture.ndim == 3:
        alpha = alpha[..., None]
    return np.asarray(np.rint(picture * (alpha / 255)), dtype=np.uint8)


def ink_to_light(ink: Pixels) -> Pixels:
    """CMYK (H, W, 4) -> RGB: what each ink and the black let through."""
    return np.asarray(np.rint((255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255), dtype=np.uint8)


def stored_as(picture: Pixels, orientation: int) -> Pixels:
    """The array to store so that a reader of EXIF 2.32, tag 0x112, sees the picture upright."""
    # Where the stored row 0 and column 0 lie in the upright picture: 1 top left, 2 top right, 3 bottom right, 4 bottom
    # left, 5 left top, 6 right top, 7 right bottom, 8 left bottom.
    flipped_rows = orientation in (3, 4, 7, 8)
    flipped_columns = orientation in (2, 3, 6, 7)
    stored = picture[::-1] if flipped_rows else picture
    stored = stored[:, ::-1] if flipped_columns else stored
    return np.ascontiguousarray(stored.swapaxes(0, 1) if orientation >= 5 else stored)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_rows(samples: NDArray[np.generic], depth: int) -> bytes:
    """Scanlines, each after its filter byte 0."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    elif depth == 8:
        packed = rows.astype(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(len(rows), -1), axis=-1)
    return b"".join(b"\0" + row.tobytes() for row in packed)


def png_file(
    samples: NDArray[np.generic], *, depth: int, colour_type: int, extra: bytes = b"", interlaced: bool = False
) -> bytes:
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    if interlaced:
        # Adam7: first row, first column, step down, step across of each pass.
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        content = b"".join(png_rows(samples[top::down, left::across], depth) for top, left, down, across in passes)
    else:
        content = png_rows(samples, depth)
    image_data = png_chunk(b"IDAT", zlib.compress(content, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + image_data + png_chunk(b"IEND", b"")


def tiff_file(
    samples: NDArray[np.generic],
    *,
    order: str = "<",
    photometric: int,
    depth: int = 8,
    orientation: int = 1,
    sample_format: int = 1,
) -> bytes:
    """One uncompressed strip, the pixels before the directory. photometric: 0 and 1 gray, 2 RGB, 5 CMYK."""
    height, width, bands = samples.reshape(*samples.shape[:2], -1).shape
    kind = f"{order}{'f' if sample_format == 3 else 'u'}{depth // 8}"
    pixels = np.packbits(samples.astype(np.uint8), axis=-1).tobytes() if depth == 1 else samples.astype(kind).tobytes()
    depths = struct.pack(f"{order}{bands}H", *[depth] * bands)
    content = pixels + depths if bands > 2 else pixels
    short, long = 3, 4
    tags = [
        (0x100, long, 1, width),
        (0x101, long, 1, height),
        (0x102, short, bands, 8 + len(pixels) if bands > 2 else depth),  # three depths and more stand apart
        (0x103, short, 1, 1),
        (0x106, short, 1, photometric),
        (0x111, long, 1, 8),
        (ORIENTATION_TAG, short, 1, orientation),
        (0x115, short, 1, bands),
        (0x116, long, 1, height),
        (0x117, long, 1, len(pixels)),
        (0x153, short, 1, sample_format),
    ]
    content += b"\0" * (len(content) % 2)
    directory = struct.pack(f"{order}H", len(tags))
    for tag, field, count, value in tags:
        inline = field == short and count == 1
        packed = struct.pack(f"{order}HH", value, 0) if inline else struct.pack(f"{order}I", value)
        directory += struct.pack(f"{order}HHI", tag, field, count) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(content)) + content + directory + struct.pack(f"{order}I", 0)


def bmp_file(indices: Pixels, palette: Pixels) -> bytes:
    """8 bits per pixel with a palette, bottom row first. The width must be a multiple of 4."""
    colours = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    height, width = indices.shape
    start = 14 + 40 + len(colours)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 0, indices.size, 0, 0, len(palette), 0)
    rows = indices[::-1].tobytes()
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + header + colours + rows


def encoded(
    pixels: Pixels,
    file_format: str,
    *,
    mode: str | None = None,
    quality: int | None = None,
    lossless: bool | None = None,
    subsampling: int | None = None,
    progressive: bool | None = None,
    compression: str | None = None,
    orientation: int | None = None,
    append: Image.Image | None = None,
) -> bytes:
    """A file that Pillow writes; what is None is left to it."""
    image = Image.fromarray(pixels)
    if mode == "CMYK":
        image = Image.frombytes("CMYK", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    options: dict[str, object] = {
        "quality": quality,
        "lossless": lossless,
        "subsampling": subsampling,
        "progressive": progressive,
        "compression": compression,
    }
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        options["exif"] = exif
    if append is not None:
        options |= {"save_all": True, "append_images": [append]}
    file = io.BytesIO()
    image.save(file, file_format, **{name: value for name, value in options.items() if value is not None})
    return file.getvalue()


def png_golden() -> dict[str, tuple[bytes, Pixels]]:
    gray, colour, alpha = gray_picture(), colour_picture(), alpha_picture()
    black_white = np.asarray(gray > 120, dtype=np.uint8)
    indices = np.asarray(gray // 64, dtype=np.uint8)
    # One colour of the picture is declared clear.
    clear_gray, clear_colour = int(gray[5, 7]), colour[5, 7]
    gray_key = np.where(gray == clear_gray, 0, gray).astype(np.uint8)
    colour_key = np.where((colour == clear_colour).all(axis=-1, keepdims=True), 0, colour).astype(np.uint8)
    palette = png_chunk(b"PLTE", PALETTE.tobytes())
    orientation_6 = Image.Exif()
    orientation_6[ORIENTATION_TAG] = 6
    exif = png_chunk(b"eXIf", orientation_6.tobytes().removeprefix(b"Exif\0\0"))

    def trns(*values: int) -> bytes:
        return png_chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))

    palette_alpha = np.array(PALETTE_ALPHA, dtype=np.uint8)
    return {
        "1.png": (png_file(black_white, depth=1, colour_type=GRAY), black_white * 255),
        "1_trns.png": (png_file(black_white, depth=1, colour_type=GRAY, extra=trns(1)), black_white * 0),
        "gray_2bit.png": (png_file(indices, depth=2, colour_type=GRAY), indices * 85),
        "gray_4bit.png": (png_file(gray // 16, depth=4, colour_type=GRAY), gray // 16 * 17),
        "gray.png": (png_file(gray, depth=8, colour_type=GRAY), gray),
        "gray_interlaced.png": (png_file(gray, depth=8, colour_type=GRAY, interlaced=True), gray),
        "gray_trns.png": (png_file(gray, depth=8, colour_type=GRAY, extra=trns(clear_gray)), gray_key),
        "gray_alpha.png": (
            png_file(np.dstack([gray, alpha]), depth=8, colour_type=GRAY_ALPHA),
            over_black(gray, alpha),
        ),
        "palette.png": (png_file(indices, depth=8, colour_type=INDEXED, extra=palette), PALETTE[indices]),
        "palette_2bit.png": (png_file(indices, depth=2, colour_type=INDEXED, extra=palette), PALETTE[indices]),
        "palette_trns.png": (
            png_file(
                indices, depth=8, colour_type=INDEXED, extra=palette + png_chunk(b"tRNS", palette_alpha.tobytes())
            ),
            over_black(PALETTE[indices], palette_alpha[indices]),
        ),
        "rgb.png": (png_file(colour, depth=8, colour_type=COLOUR), colour),
        "rgb_trns.png": (png_file(colour, depth=8, colour_type=COLOUR, extra=trns(*clear_colour)), colour_key),
        "rgba.png": (
            png_file(np.dstack([colour, alpha]), depth=8, colour_type=COLOUR_ALPHA),
            over_black(colour, alpha),
        ),
        "gray_16bit.png": (png_file(sixteen_bit(gray), depth=16, colour_type=GRAY), gray),
        "gray_alpha_16bit.png": (
            png_file(np.dstack([sixteen_bit(gray), sixteen_bit(alpha)]), depth=16, colour_type=GRAY_ALPHA),
            np.dstack([over_black(gray, alpha)] * 3),  # Pillow has no 16 bit gray with alpha, and takes it for colour
        ),
        "rgb_16bit.png": (png_file(sixteen_bit(colour), depth=16, colour_type=COLOUR), colour),
        "rgba_16bit.png": (
            png_file(np.dstack([sixteen_bit(colour), sixteen_bit(alpha)]), depth=16, colour_type=COLOUR_ALPHA),
            over_black(colour, alpha),
        ),
        "orientation_6.png": (png_file(stored_as(colour, 6), depth=8, colour_type=COLOUR, extra=exif), colour),
    }


def jpeg_golden() -> dict[str, tuple[bytes, Pixels]]:
    gray, colour = gray_picture() // 2 + np.uint8(40), colour_picture()
    gray = np.sort(gray, axis=1)  # a slope without a step
    ink = np.dstack([colour, alpha_picture() // 2])
    other = Image.fromarray(255 - colour)
    golden = {
        "gray.jpg": (encoded(gray, "JPEG", quality=95), gray),
        "rgb_444.jpg": (encoded(colour, "JPEG", quality=95, subsampling=0), colour),
        "rgb_420.jpg": (encoded(colour, "JPEG", quality=95, subsampling=2), colour),
        "rgb_progressive.jpg": (encoded(colour, "JPEG", quality=95, progressive=True), colour),
        "cmyk_adobe.jpg": (encoded(ink, "JPEG", mode="CMYK", quality=95), ink_to_light(ink)),
        "several_pictures.jpg": (encoded(colour, "MPO", quality=95, append=other), colour),
    }
    for orientation in range(1, 9):
        stored = stored_as(colour, orientation)
        file = encoded(stored, "JPEG", quality=95, subsampling=0, orientation=orientation)
        golden[f"orientation_{orientation}.jpg"] = (file, colour)
    return golden


def other_golden() -> dict[str, tuple[bytes, Pixels]]:
    gray, colour, alpha = gray_picture(), colour_picture(), alpha_picture()
    with_alpha = np.dstack([colour, alpha])
    black_white = np.asarray(gray > 120, dtype=np.uint8)
    indices = np.asarray(gray // 64, dtype=np.uint8)
    ink = np.dstack([colour, alpha // 2])
    return {
        "rgb_lossless.webp": (encoded(colour, "WEBP", lossless=True), colour),
        "rgba_lossless.webp": (encoded(with_alpha, "WEBP", lossless=True), over_black(colour, alpha)),
        "rgb_lossy.webp": (encoded(colour, "WEBP", quality=95), colour),
        "orientation_6.webp": (encoded(stored_as(colour, 6), "WEBP", lossless=True, orientation=6), colour),
        "gray.bmp": (encoded(gray, "BMP"), gray),
        "palette.bmp": (bmp_file(indices, PALETTE), PALETTE[indices]),
        "rgb.bmp": (encoded(colour, "BMP"), colour),
        "1.tif": (tiff_file(black_white, photometric=1, depth=1), black_white * 255),
        "gray.tif": (tiff_file(gray, photometric=1), gray),
        "gray_white_is_zero.tif": (tiff_file(255 - gray, photometric=0), gray),
        "rgb.tif": (tiff_file(colour, photometric=2), colour),
        "rgb_lzw.tif": (encoded(colour, "TIFF", compression="tiff_lzw"), colour),
        "gray_16bit_little_endian.tif": (tiff_file(sixteen_bit(gray), photometric=1, depth=16), gray),
        "gray_16bit_big_endian.tif": (tiff_file(sixteen_bit(gray), photometric=1, depth=16, order=">"), gray),
        "rgb_16bit_little_endian.tif": (tiff_file(sixteen_bit(colour), photometric=2, depth=16), colour),
        "rgb_16bit_big_endian.tif": (tiff_file(sixteen_bit(colour), photometric=2, depth=16, order=">"), colour),
        "gray_16bit_white_is_zero.tif": (tiff_file(65535 - sixteen_bit(gray), photometric=0, depth=16), gray),
        "gray_16bit_lzw.tif": (encoded_sixteen_bit(sixteen_bit(gray)), gray),
        "gray_alpha.tif": (encoded(np.dstack([gray, alpha]), "TIFF"), over_black(gray, alpha)),
        "rgba.tif": (encoded(with_alpha, "TIFF"), over_black(colour, alpha)),
        "cmyk.tif": (tiff_file(ink, photometric=5), ink_to_light(ink)),
        "orientation_6.tif": (tiff_file(stored_as(colour, 6), photometric=2, orientation=6), colour),
    }


def encoded_sixteen_bit(samples: Samples) -> bytes:
    file = io.BytesIO()
    Image.fromarray(samples).save(file, "TIFF", compression="tiff_lzw")
    return file.getvalue()


def golden_files() -> dict[str, tuple[bytes, Pixels]]:
    """By name: the file, and the pixels that decode_image must give, (H, W) or (H, W, 3)."""
    return png_golden() | jpeg_golden() | other_golden()


def main() -> None:
    folder = Path(__file__).parent
    golden = golden_files()
    for name, (data, _) in golden.items():
        (folder / name).write_bytes(data)
    expected: dict[str, Any] = {name: pixels for name, (_, pixels) in golden.items()}
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main()
