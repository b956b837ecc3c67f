"""From an upload's bytes to what a model sees, off the event loop.

Bytes go in and small arrays come out, so that the threads can give way to worker processes without anyone noticing.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from models.config import ModelConfig
from models.images import decode_image, image_tensor
from service.telemetry import Telemetry

# Pillow lets go of the interpreter lock. More threads hold more decoded images: 150 MB each at the pixel limit.
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Decoded:
    """pixels: uint8 (C, S, S). width and height: pixels of the upright original."""

    pixels: Tensor
    width: int
    height: int


class Decoder:
    """Decodes for one model, in a few threads."""

    def __init__(self, config: ModelConfig, *, max_pixels: int, telemetry: Telemetry) -> None:
        self._config = config
        self._max_pixels = max_pixels
        self._telemetry = telemetry
        self._pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="decode")

    async def decode(self, data: bytes) -> Decoded:
        """Raises ImageError."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._decode, data)

    async def picture(self, data: bytes, *, width: int, height: int) -> Image.Image:
        """The image itself at width x height pixels, in mode "L" or "RGB". Raises ImageError.

        Decodes again: keeping every image of every request from its decoding to its answer would cost far more memory
        than this costs time.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._picture, data, width, height)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, data: bytes) -> Decoded:
        with self._telemetry.stage("decode").time():
            image = decode_image(data, max_pixels=self._max_pixels)
            pixels = image_tensor(image, channels=self._config.channels, size=self._config.image_size)
        return Decoded(pixels=pixels, width=image.width, height=image.height)

    def _picture(self, data: bytes, width: int, height: int) -> Image.Image:
        return decode_image(data, max_pixels=self._max_pixels).resize((width, height))
