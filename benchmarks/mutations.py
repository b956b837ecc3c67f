"""Broken images, each from its own seed: the same number gives the same bytes, on every machine with this Pillow."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

SIZES = [(1, 1), (3, 200), (17, 31), (64, 64), (160, 120), (400, 300)]
# format, Pillow's mode, options of save
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("JPEG", "L", {"quality": 80}),
    ("JPEG", "RGB", {"quality": 80}),
    ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
    ("JPEG", "RGB", {"quality": 80, "progressive": True}),
    ("JPEG", "CMYK", {"quality": 80}),
    ("WEBP", "RGB", {"quality": 80}),
    ("WEBP", "RGBA", {"lossless": True}),
    *(
        ("TIFF", mode, {"compression": compression})
        for mode in ("L", "RGB", "RGBA", "I;16")
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
    ),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "CMYK", {"compression": "raw"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
]
SIGNATURES = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x00\x10\x00\x00WEBPVP8 ", b"BM", b"II*\0", b"MM\0*"]
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 20_000, 50_000_001]
HEADER_BYTES = 64  # where a file says how large it is, and how it is coded


def whole_images() -> list[bytes]:
    """One of every kind in every size; the same at each call."""
    images = []
    for kind, (format_name, mode, options) in enumerate(KINDS):
        for width, height in SIZES:
            draws = np.random.default_rng([kind, width, height])
            coarse = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
            noise = draws.integers(0, 24, (height, width, 3), dtype=np.uint8)
            picture = Image.fromarray((np.asarray(coarse) // 2 + noise).astype(np.uint8))
            file = io.BytesIO()
            _in_mode(picture, mode).save(file, format_name, **options)
            images.append(file.getvalue())
    return images


def _in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    return picture.convert(mode)


def mutated(images: list[bytes], seed: int, index: int) -> tuple[str, bytes]:
    """What was done to an image, and its bytes."""
    draws = random.Random(f"{seed}/{index}")
    if draws.random() < 0.03:
        return "random bytes", draws.choice(SIGNATURES) + draws.randbytes(draws.choice([0, 1, 30, 500, 50_000]))
    data = bytearray(draws.choice(images))
    done = []
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        mutate = draws.choice(MUTATIONS)
        data = mutate(draws, data, images)
        done.append(mutate.__name__.replace("_", " "))
    return ", ".join(done), bytes(data)


def flip_bits(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    for place in _places(draws, data, [1, 1, 2, 8, 50]):
        data[place] ^= 1 << draws.randrange(8)
    return data


def change_bytes(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    for place in _places(draws, data, [1, 2, 8, 50]):
        data[place] = draws.choice([0, 0xFF, draws.randrange(256)])
    return data


def _places(draws: random.Random, data: bytearray, numbers: list[int]) -> list[int]:
    return [draws.randrange(len(data)) for _ in range(draws.choice(numbers))] if data else []


def cut_the_end(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    return data[: draws.randrange(len(data) + 1)]


def overwrite_the_header(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    return _with_number(draws, data, HEADER_BYTES)


def overwrite_a_number(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    return _with_number(draws, data, len(data))


def _with_number(draws: random.Random, data: bytearray, end: int) -> bytearray:
    form = draws.choice(["<H", ">H", "<I", ">I"])
    size = struct.calcsize(form)
    if len(data) >= size:
        place = draws.randrange(max(1, min(end, len(data)) - size))
        struct.pack_into(form, data, place, draws.choice(NUMBERS) % 256**size)
    return data


def insert_bytes(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    place = draws.randrange(len(data) + 1)
    data[place:place] = draws.randbytes(draws.choice([1, 4, 100, 5000]))
    return data


def remove_bytes(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    place = draws.randrange(len(data) + 1)
    del data[place : place + draws.choice([1, 4, 100, 5000])]
    return data


def splice_two_files(draws: random.Random, data: bytearray, images: list[bytes]) -> bytearray:
    other = draws.choice(images)
    return data[: draws.randrange(len(data) + 1)] + other[draws.randrange(len(other)) :]


def rearrange_chunks(draws: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    """Swaps, repeats or leaves out whole chunks; of a file without chunks, blocks of bytes."""
    chunks = _chunks(bytes(data))
    first, second = draws.randrange(len(chunks)), draws.randrange(len(chunks))
    action = draws.choice(["swap", "repeat", "remove"])
    if action == "swap":
        chunks[first], chunks[second] = chunks[second], chunks[first]
    elif action == "repeat":
        chunks[second:second] = [chunks[first]] * draws.choice([1, 2, 40])
    else:
        del chunks[first]
    return bytearray(b"".join(chunks))


def change_and_mend_checksums(draws: random.Random, data: bytearray, images: list[bytes]) -> bytearray:
    """A PNG whose every checksum is right again, so that what is wrong gets past them."""
    chunks = _chunks(bytes(draws.choice([flip_bits, overwrite_the_header])(draws, data, images)))
    if not data.startswith(SIGNATURES[0]):
        return data
    mended = [
        chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk for chunk in chunks[1:]
    ]
    return bytearray(b"".join([chunks[0], *mended]))


def _chunks(data: bytes) -> list[bytes]:
    """Signature and chunks of a PNG, segments of a JPEG, chunks of a WebP; of others, blocks of 64 bytes. Joined, the
    file again.
    """
    steps: Callable[[int], int]
    if data.startswith(SIGNATURES[0]):
        place, steps = 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        place, steps = 2, lambda at: 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    elif data.startswith(b"RIFF"):
        place, steps = 12, lambda at: 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    else:
        place, steps = 8, lambda _: 64
    chunks = [data[:place]]
    while place < len(data):
        end = place + steps(place)
        chunks.append(data[place:end])
        place = end
    return chunks


MUTATIONS = [
    flip_bits,
    change_bytes,
    cut_the_end,
    overwrite_the_header,
    overwrite_a_number,
    insert_bytes,
    remove_bytes,
    splice_two_files,
    rearrange_chunks,
    change_and_mend_checksums,
]
