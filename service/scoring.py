"""The uploads of one request on their way: each is decoded and scored by itself, and has its own outcome."""

import asyncio
from dataclasses import dataclass

from models.errors import ImageError
from models.scoring import MapArray
from service.batching import Batcher
from service.decoding import Decoder
from service.device import Device
from service.forms import Upload
from service.registry import Registry, ServedModel
from service.telemetry import Telemetry


@dataclass(frozen=True, eq=False)
class Running:
    """What a service has from the moment that it is ready."""

    device: Device
    registry: Registry
    decoder: Decoder
    batcher: Batcher
    telemetry: Telemetry


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


async def score_uploads(running: Running, model: ServedModel, uploads: list[Upload], *, alpha: float) -> list[Outcome]:
    """One outcome per upload, in order: a bad image never fails its neighbours. Raises BusyError.

    Cancelled, it gives up what is not on the device yet.
    """
    with running.batcher.places(len(uploads), sum(len(upload.data) for upload in uploads)):
        scoring = [_outcome(running, model, upload.data, alpha=alpha) for upload in uploads]
        # No task for the usual one: that costs as much as decoding a small image.
        outcomes = await asyncio.gather(*scoring) if len(scoring) > 1 else [await scoring[0]]
    for outcome in outcomes:
        if isinstance(outcome, ImageError):
            running.telemetry.image_refused(outcome.code)
        else:
            model.drift.add(outcome.p_value)
            running.telemetry.image_scored(
                model.name,
                anomaly_score=outcome.anomaly_score,
                p_value=outcome.p_value,
                is_anomalous=outcome.is_anomalous,
            )
    return outcomes


async def _outcome(running: Running, model: ServedModel, data: bytes, *, alpha: float) -> Outcome:
    try:
        image = await running.decoder.decode(data, model.checkpoint.config)
        scored = await running.batcher.score(model.scorer, image.pixels)
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
