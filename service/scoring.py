"""The uploads of one request on their way: each is decoded and scored by itself, and has its own outcome."""

import asyncio
from dataclasses import dataclass

from models.errors import ImageError
from models.scoring import MapArray
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
    """One outcome per upload, in order: a bad image never fails its neighbours. Raises BusyError.

    Cancelled, it gives up what is not on the device yet.
    """
    with model.batcher.places(len(uploads), sum(len(upload.data) for upload in uploads)):
        outcomes = await asyncio.gather(*(_outcome(model, upload.data, alpha=alpha) for upload in uploads))
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


async def _outcome(model: ServedModel, data: bytes, *, alpha: float) -> Outcome:
    try:
        image = await model.decoder.decode(data)
        scored = await model.batcher.score(image.pixels)
    except ImageError as error:
        return error
    scores, index = scored.batch, scored.index
    return Verdict(
        width=image.width,
        height=image.height,
        scores=scores.named(index),
        anomaly_score=float(scores.anomaly_score[index]),
        p_value=float(scores.p_value[index]),
        is_anomalous=bool(scores.p_value[index] <= alpha),
        anomaly_map=scores.maps[index],
    )
