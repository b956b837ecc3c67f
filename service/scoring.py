"""The uploads of one request on their way: decoded side by side, scored together, each with its own outcome."""

import asyncio
from dataclasses import dataclass

import torch

from models.errors import ImageError
from models.scoring import MapArray
from service.decoding import Decoded
from service.forms import Upload
from service.registry import ServedModel
from service.telemetry import Telemetry


@dataclass(frozen=True, eq=False)
class Verdict:
    """width and height: pixels of the upright original. anomaly_map: (S, S)."""

    width: int
    height: int
    scores: dict[str, float]
    anomaly_score: float
    p_value: float
    is_anomalous: bool
    anomaly_map: MapArray


Outcome = Verdict | ImageError


async def score_uploads(
    model: ServedModel, uploads: list[Upload], *, alpha: float, telemetry: Telemetry
) -> list[Outcome]:
    """One outcome per upload, in order: a bad image never fails its neighbours. Raises BusyError."""
    with model.batcher.places(len(uploads)):
        images = await asyncio.gather(*(_decoded(model, upload.data) for upload in uploads))
        good = [image for image in images if isinstance(image, Decoded)]
        verdicts = iter(await _verdicts(model, good, alpha=alpha))
    outcomes = [next(verdicts) if isinstance(image, Decoded) else image for image in images]
    for outcome in outcomes:
        if isinstance(outcome, ImageError):
            telemetry.image_refused(outcome.code)
        else:
            telemetry.image_scored(
                model.name,
                anomaly_score=outcome.anomaly_score,
                p_value=outcome.p_value,
                is_anomalous=outcome.is_anomalous,
            )
    return outcomes


async def _decoded(model: ServedModel, data: bytes) -> Decoded | ImageError:
    try:
        return await model.decoder.decode(data)
    except ImageError as error:
        return error


async def _verdicts(model: ServedModel, images: list[Decoded], *, alpha: float) -> list[Verdict]:
    if not images:
        return []
    scores = await model.batcher.score(torch.stack([image.pixels for image in images]))
    return [
        Verdict(
            width=image.width,
            height=image.height,
            scores=scores.named(index),
            anomaly_score=float(scores.anomaly_score[index]),
            p_value=float(scores.p_value[index]),
            is_anomalous=bool(scores.p_value[index] <= alpha),
            anomaly_map=scores.maps[index],
        )
        for index, image in enumerate(images)
    ]
