"""The process that decodes: hostile bytes can take it down, and nothing else.

It imports no more than decoding needs, because every worker is forked from one process that has imported this.
"""

import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models.errors import ImageError, ImageUnreadableError
from models.images import decode_image, image_tensor
from models.memory import keep_freed_memory

KEPT_BYTES = 2**26  # of what decoding an image has freed
# To the event loop: it has little to do, and whoever is refused or asks for metrics waits for it alone.
YIELDING = 5
NAME = "hazelnut-decode"  # in ps and top, which show 15 letters

# Both ways: how long what follows is. Job: bytes of the file, max_pixels, channels or 0, width, height.
JOB_HEAD, ANSWER_HEAD = struct.Struct("!QQIII"), struct.Struct("!I")

Pixels = NDArray[np.uint8]


class Job(NamedTuple):
    """channels: 1 or 3, resized as a model of this size wants it; None: the picture itself, at width x height."""

    data: bytes
    max_pixels: int
    channels: int | None
    width: int
    height: int

    def head(self) -> bytes:
        return JOB_HEAD.pack(len(self.data), self.max_pixels, self.channels or 0, self.width, self.height)


def work(connection: socket.socket, memory_bytes: int) -> None:
    """Answer jobs until the other end is closed: the length of some JSON, the JSON, then the pixels if there are any.

    The answer is not pickled: what hostile bytes make of this process must not run in the service.
    """
    _settle(memory_bytes)
    with connection, connection.makefile("rb") as jobs:
        while head := jobs.read(JOB_HEAD.size):
            length, max_pixels, channels, width, height = JOB_HEAD.unpack(head)
            answer, pixels = _answer(Job(jobs.read(length), max_pixels, channels or None, width, height))
            words = json.dumps(answer).encode()
            connection.sendall(ANSWER_HEAD.pack(len(words)) + words)
            if pixels is not None:
                connection.sendall(pixels.data.cast("B"))


def _settle(memory_bytes: int) -> None:
    """Bound this process's memory, and keep it from disturbing the service's terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to all; the service ends this one when it is done
    torch.set_num_threads(1)
    os.nice(YIELDING)
    Image.init()  # imports what reads each format, so that the first image of one does not wait for it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and libjpeg write what they think of a file
    if sys.platform == "linux":
        keep_freed_memory(KEPT_BYTES)
        Path("/proc/self/comm").write_text(NAME)
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # torch alone has mapped gigabytes
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(job: Job) -> tuple[dict[str, object], Pixels | None]:
    try:
        image = decode_image(job.data, max_pixels=job.max_pixels)
        if job.channels is None:
            pixels = np.asarray(image.resize((job.width, job.height)))
        else:
            pixels = image_tensor(image, channels=job.channels, size=job.width).numpy()
    except ImageError as error:
        return {"code": error.code, "message": str(error)}, None
    except (MemoryError, RuntimeError) as error:  # torch's word for it
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            return {"fault": traceback.format_exc()}, None
        return {"code": ImageUnreadableError.code, "message": "decoding the image takes too much memory."}, None
    except Exception:  # noqa: BLE001 - a fault of ours: the service raises it, this process goes on
        return {"fault": traceback.format_exc()}, None
    return {"width": image.width, "height": image.height, "shape": pixels.shape}, np.ascontiguousarray(pixels)
