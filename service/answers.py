"""From outcomes to the bytes of the answer, with the maps that were asked for.

Written one result at a time: sixty-four maps of 2048 x 2048 pixels are more than a gigabyte of JSON.
"""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from functools import partial

import numpy as np
from PIL import Image

from models.errors import ImageError
from models.overlay import overlay
from models.scoring import MapArray, regions, resize_map
from service.forms import Upload
from service.registry import ServedModel
from service.schemas import (
    MAX_MAP_SIDE,
    AnsweringModel,
    ImageProblem,
    ImageResult,
    MapFormat,
    MapImage,
    NamedScores,
    RegionBox,
)
from service.scoring import Outcome, Running, Verdict
from service.telemetry import Telemetry

QUICK_PIXELS = 2**16  # of a map in which regions are found in less time than two changes of thread take


async def answer_parts(
    running: Running,
    model: ServedModel,
    uploads: list[Upload],
    outcomes: list[Outcome],
    *,
    map_format: MapFormat,
    alpha: float,
) -> AsyncIterator[bytes]:
    """The pieces of a ScoreAnswer in JSON. Each image's is made when it is its turn, off the loop if that is long."""
    head = _answering_model(model, alpha)
    yield b'{"model":' + head.model_dump_json().encode() + b',"results":['
    for index, (upload, outcome) in enumerate(zip(uploads, outcomes, strict=True)):
        picture = None
        if map_format == "overlay" and isinstance(outcome, Verdict):
            width, height = map_size(outcome.width, outcome.height)
            try:
                picture = await running.decoder.picture(upload.data, width=width, height=height)
            except ImageError as error:  # its decoder dies or is slow this time
                if len(outcomes) == 1:
                    raise  # nothing of the answer is on its way
                outcome = error
        if isinstance(outcome, ImageError):
            problem = ImageProblem(code=outcome.code, message=str(outcome))
            part = ImageResult(filename=upload.filename, error=problem).model_dump_json().encode()
        else:
            write = partial(
                _result_json,
                upload.filename,
                outcome,
                map_format=map_format,
                level=head.map_level,
                picture=picture,
                telemetry=running.telemetry,
            )
            quick = map_format == "none" and outcome.anomaly_map.size <= QUICK_PIXELS
            part = write() if quick else await asyncio.to_thread(write)
        yield b"," + part if index else part
    yield b"]}"


def _answering_model(model: ServedModel, alpha: float) -> AnsweringModel:
    calibration = model.calibration
    return AnsweringModel(
        name=model.name,
        version=model.version,
        sha256=model.checkpoint.weights_sha256,
        alpha=alpha,
        map_level=calibration.map_level(alpha),
        calibration_images=calibration.n,
        smallest_alpha=calibration.smallest_alpha,
    )


def _result_json(
    filename: str | None,
    verdict: Verdict,
    *,
    map_format: MapFormat,
    level: float,
    picture: Image.Image | None,
    telemetry: Telemetry,
) -> bytes:
    with telemetry.stage("encode").time():
        boxes = regions(verdict.anomaly_map, level=level, width=verdict.width, height=verdict.height)
        result = ImageResult(
            filename=filename,
            width=verdict.width,
            height=verdict.height,
            scores=NamedScores.model_validate(verdict.scores),
            anomaly_score=verdict.anomaly_score,
            p_value=verdict.p_value,
            is_anomalous=verdict.is_anomalous,
            regions=[
                RegionBox(left=box.left, top=box.top, width=box.width, height=box.height, peak=box.peak)
                for box in boxes
            ],
            map=_map_image(verdict, map_format=map_format, level=level, picture=picture),
        )
        return result.model_dump_json().encode()


def map_size(width: int, height: int) -> tuple[int, int]:
    """An image's own size, reduced where its longer side exceeds MAX_MAP_SIDE."""
    scale = min(1.0, MAX_MAP_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _map_image(
    verdict: Verdict, *, map_format: MapFormat, level: float, picture: Image.Image | None
) -> MapImage | None:
    if map_format == "none":
        return None
    width, height = map_size(verdict.width, verdict.height)
    anomaly_map = resize_map(verdict.anomaly_map, width=width, height=height)
    if picture is not None:
        boxes = regions(verdict.anomaly_map, level=level, width=width, height=height)
        data = png_bytes(overlay(picture, anomaly_map, level=level, regions=boxes))
    elif map_format == "png":
        data = png_bytes(_gray(anomaly_map, level))
    else:
        data = anomaly_map.astype("<f4").tobytes()
    return MapImage(format=map_format, width=width, height=height, data=base64.b64encode(data).decode("ascii"))


def _gray(anomaly_map: MapArray, level: float) -> Image.Image:
    scaled = anomaly_map * (255 / max(2 * level, 1e-12))
    return Image.fromarray(np.clip(scaled, 0, 255).round().astype(np.uint8))


def png_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # four times faster than the default, a third larger
    return file.getvalue()
