"""DetectAnomalies of Lookout for Vision, a cloud service that was shut down: its clients move by their endpoint alone.

    POST /2020-11-20/projects/{project}/models/{version}/detect       one image as the body

The project is the model's name. Nothing is known here but the shapes: scores and limits are those of /score.
"""

import asyncio
import base64
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path
from PIL import Image
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from models.errors import ImageError
from models.scoring import resize_map
from service.answers import map_size, png_bytes
from service.errors import ERRORS, ServiceError, documented, shown
from service.registry import ServedModel
from service.routes import FILE_SCHEMA, IMAGE_KINDS, current_service, ready_service, received_and_scored
from service.scoring import Running, Verdict
from service.security import check_key

router = APIRouter()

BACKGROUND, ANOMALY = "#FFFFFF", "#E53935"
# What its clients know, by our status. The rest of the 4xx is a ValidationException.
EXCEPTIONS = {
    401: (403, "AccessDeniedException"),
    404: (404, "ResourceNotFoundException"),
    500: (500, "InternalServerException"),
    503: (429, "ThrottlingException"),
    504: (500, "InternalServerException"),
}


class PixelAnomaly(BaseModel):
    TotalPercentageArea: float = Field(description="Share of the image, from 0 to 1.")
    Color: str = Field(description="In the mask.")


class Anomaly(BaseModel):
    Name: str = Field(description="background or anomaly.")
    PixelAnomaly: PixelAnomaly


class ImageSource(BaseModel):
    Type: str = Field(description="direct: the image came with the request.")


class DetectAnomalyResult(BaseModel):
    Source: ImageSource
    IsAnomalous: bool = Field(description="The p-value is at most the model's own alpha.")
    Confidence: float = Field(
        description="From 0.5, where the p-value is alpha, to 1, where it is 0 or 1; in between a straight line. "
        "No probability: /score says what is known."
    )
    Anomalies: list[Anomaly] = Field(description="The background, and the anomaly where the mask shows one.")
    AnomalyMask: str = Field(description="RGB PNG in base64, in the image's size or reduced to 2048 pixels.")


class DetectAnomaliesAnswer(BaseModel):
    DetectAnomalyResult: DetectAnomalyResult


class LookoutError(BaseModel):
    Message: str = Field(description="One sentence for a person.")
    Code: str = Field(description="Ours, for those who look: docs/service.md.")


IMAGES = {f"image/{kind}": {"schema": FILE_SCHEMA} for kind in IMAGE_KINDS}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": LookoutError, "description": f"{name}, in the header x-amzn-ErrorType."}
    for status, name in [(400, "ValidationException"), *EXCEPTIONS.values()]
}


@router.post(
    "/2020-11-20/projects/{project}/models/{version}/detect",
    summary="Score one image in the shape of Lookout for Vision",
    response_class=Response,
    responses={200: {"model": DetectAnomaliesAnswer}, **RESPONSES, **documented("invalid_parameter")},
    openapi_extra={"requestBody": {"required": True, "content": IMAGES}},
)
async def detect(
    project: Annotated[str, Path(max_length=255)], version: Annotated[str, Path(max_length=255)], request: Request
) -> Response:
    """Errors have that service's shape too: a name in the header x-amzn-ErrorType, and a Message."""
    try:
        check_key(request)
        service = current_service(request)
        running = ready_service(service)
        model = await running.registry.get(f"{project}:{version}")
        verdict = await _verdict(request, running, model)
    except (ServiceError, ImageError) as error:
        return _exception(error)
    with service.telemetry.stage("encode").time():
        answer = await asyncio.to_thread(_answer, verdict, model)
    return Response(answer.model_dump_json(), media_type="application/json")


async def _verdict(request: Request, running: Running, model: ServedModel) -> Verdict:
    media_type = request.headers.get("content-type", "")
    if not media_type.lower().startswith("image/"):
        raise ServiceError("unsupported_media_type", f"the Content-Type is {shown(media_type)}: allowed is image/*.")
    alpha = model.calibration.alpha
    _, (outcome,) = await received_and_scored(request, running, model, alpha=alpha)
    assert isinstance(outcome, Verdict)  # an error of an image that comes alone is raised
    return outcome


def _answer(verdict: Verdict, model: ServedModel) -> DetectAnomaliesAnswer:
    alpha = model.calibration.alpha
    width, height = map_size(verdict.width, verdict.height)
    anomaly_map = resize_map(verdict.anomaly_map, width=width, height=height)
    above = anomaly_map > model.calibration.map_level(alpha)  # (H, W)
    colours = np.array([_rgb(BACKGROUND), _rgb(ANOMALY)], dtype=np.uint8)
    share = float(above.mean())
    anomalies = [_anomaly("background", 1 - share, BACKGROUND)]
    if share:
        anomalies.append(_anomaly("anomaly", share, ANOMALY))
    return DetectAnomaliesAnswer(
        DetectAnomalyResult=DetectAnomalyResult(
            Source=ImageSource(Type="direct"),
            IsAnomalous=verdict.is_anomalous,
            Confidence=confidence(verdict.p_value, alpha),
            Anomalies=anomalies,
            AnomalyMask=base64.b64encode(png_bytes(Image.fromarray(colours[above.astype(np.intp)]))).decode("ascii"),
        )
    )


def confidence(p_value: float, alpha: float) -> float:
    """How far the p-value is from alpha, in [0.5, 1]: those clients compare it with a threshold of theirs."""
    if p_value <= alpha:
        return 1 - p_value / (2 * alpha)
    return 0.5 + (p_value - alpha) / (2 * (1 - alpha))


def _anomaly(name: str, share: float, colour: str) -> Anomaly:
    return Anomaly(Name=name, PixelAnomaly=PixelAnomaly(TotalPercentageArea=share, Color=colour))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _exception(error: ServiceError | ImageError) -> JSONResponse:
    # A 503 that is no refusal: nobody knows when to come back.
    ours = 500 if error.code == "model_unavailable" else ERRORS[error.code].status
    status, name = EXCEPTIONS.get(ours, (400, "ValidationException"))
    kept = error.headers or {} if isinstance(error, ServiceError) else {}
    headers = {**kept, "x-amzn-ErrorType": name}
    return JSONResponse({"Message": str(error), "Code": error.code}, status_code=status, headers=headers)
