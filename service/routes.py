"""The endpoints. Each says what comes in, what goes out and which errors it knows; the work is done elsewhere."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from models.calibration import Calibration
from models.errors import CalibrationError, ImageError
from service.answers import answer_parts
from service.batching import RETRY_SECONDS
from service.clients import answered, received
from service.errors import ServiceError, documented, shown
from service.forms import FIELD, read_uploads
from service.registry import ServedModel
from service.schemas import Health, ModelDetails, ModelList, ModelSummary, ScoreAnswer, ScoreQuery
from service.scoring import score_uploads
from service.settings import Settings
from service.telemetry import Telemetry

router = APIRouter()


@dataclass
class Service:
    """What the routes share; `app.state.service`. There is a model while the phase is ready, and only then."""

    settings: Settings
    telemetry: Telemetry
    phase: Literal["starting", "ready", "draining"] = "starting"
    model: ServedModel | None = None


async def current_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def ready_model(service: Annotated[Service, Depends(current_service)]) -> ServedModel:
    if service.model is None:
        headers = {"Retry-After": str(RETRY_SECONDS)}
        raise ServiceError("not_ready", f"the service is {service.phase}: try again soon.", headers=headers)
    return service.model


AService = Annotated[Service, Depends(current_service)]
AModel = Annotated[ServedModel, Depends(ready_model)]

FILE_SCHEMA = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
SCORE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One or many images as PNG, JPEG, WebP, BMP or TIFF.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "array", "minItems": 1, "items": FILE_SCHEMA}},
                }
            },
            "image/*": {"schema": FILE_SCHEMA},
        },
    }
}
SCORE_ERRORS = (
    "malformed_request", "no_files", "unknown_field", "not_a_file", "model_unknown", "body_too_large",
    "too_many_files", "image_too_large", "unsupported_media_type", "image_format", "image_animated", "image_mode",
    "invalid_parameter", "alpha_out_of_range", "image_empty", "image_truncated", "image_corrupt", "image_failed",
    "receive_timeout", "busy", "not_ready", "deadline",
)  # fmt: skip


@router.post(
    "/score",
    summary="Score images",
    response_class=Response,
    responses={200: {"model": ScoreAnswer, "description": "One result per image."}, **documented(*SCORE_ERRORS)},
    openapi_extra=SCORE_BODY,
)
async def score(request: Request, query: Annotated[ScoreQuery, Query()], service: AService, model: AModel) -> Response:
    """Find what is unlike the good parts that the model has seen.

    Of several images, one that cannot be read has an `error` in its result and the others have theirs; an image sent
    alone that cannot be read is an error of the request.
    """
    if query.model is not None:
        _check_name(query.model, model)
    alpha = _checked_alpha(query.alpha, model.calibration)
    limits = service.settings
    with service.telemetry.stage("receive").time():
        uploads = await received(read_uploads(request, max_files=limits.max_files), seconds=limits.receive_seconds)
    scoring = score_uploads(model, uploads, alpha=alpha, telemetry=service.telemetry)
    outcomes = await answered(request, scoring, seconds=limits.answer_seconds)
    if len(outcomes) == 1 and isinstance(outcomes[0], ImageError):
        raise outcomes[0]
    parts = answer_parts(model, uploads, outcomes, map_format=query.map, alpha=alpha, telemetry=service.telemetry)
    if query.map == "none" or len(outcomes) == 1:
        return Response(b"".join([part async for part in parts]), media_type="application/json")
    return StreamingResponse(parts, media_type="application/json")


@router.get("/models", summary="The models that are served", responses=documented("not_ready"))
async def list_models(model: AModel) -> ModelList:
    return ModelList(models=[_summary(model)])


@router.get(
    "/models/{name}",
    summary="A model in detail",
    responses=documented("model_unknown", "invalid_parameter", "not_ready"),
)
async def model_details(name: Annotated[str, Path(max_length=255)], model: AModel) -> ModelDetails:
    _check_name(name, model)
    checkpoint = model.checkpoint
    return ModelDetails(
        **_summary(model).model_dump(),
        map_level=model.calibration.map_level(model.calibration.alpha),
        device=str(model.device),
        config=asdict(checkpoint.config),
        origin=checkpoint.origin,
        metrics=checkpoint.metrics,
    )


@router.get("/health/live", summary="The process answers")
async def live() -> Health:
    return Health(status="live")


@router.get("/health/ready", summary="The model is loaded and warm", responses=documented("not_ready"))
async def ready(model: AModel) -> Health:  # noqa: ARG001 - the dependency is the check
    return Health(status="ready")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request, service: AService) -> Response:
    content, media_type = service.telemetry.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": media_type})


@router.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    return RedirectResponse("docs")


def _check_name(name: str, model: ServedModel) -> None:
    if name != model.name:
        raise ServiceError("model_unknown", f"there is no model {shown(name)}: allowed is {shown(model.name)}.")


def _checked_alpha(wanted: float | None, calibration: Calibration) -> float:
    try:
        return calibration.chosen_alpha(wanted)
    except CalibrationError as error:
        raise ServiceError("alpha_out_of_range", str(error)) from error


def _summary(model: ServedModel) -> ModelSummary:
    return ModelSummary(
        name=model.name,
        sha256=model.checkpoint.weights_sha256,
        alpha=model.calibration.alpha,
        calibration_images=model.calibration.n,
        smallest_alpha=model.calibration.smallest_alpha,
    )
