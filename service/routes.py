"""The endpoints. Each says what comes in, what goes out and which errors it knows; the work is done elsewhere."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Security
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from models.calibration import Calibration
from models.errors import CalibrationError, ConfigError, ImageError
from service.answers import answer_parts
from service.batching import BusyError
from service.clients import answered, not_ready, received
from service.draining import Drain
from service.errors import ServiceError, documented, logger
from service.forms import FIELD, Upload, read_uploads
from service.registry import Registry, ServedModel, Version
from service.schemas import Health, ModelDetails, ModelList, ModelSummary, ScoreAnswer, ScoreQuery
from service.scoring import Outcome, Running, score_uploads
from service.security import BEARER, HEADER, Keys, check_key, read_keys
from service.settings import Settings
from service.telemetry import Telemetry

router = APIRouter()
SCORE_PATH = "/score"


@dataclass
class Service:
    """What the routes share; `app.state.service`. It runs from start-up to shutdown."""

    settings: Settings
    telemetry: Telemetry
    registry: Registry
    drain: Drain
    keys: Keys | None  # None: whoever reaches the service may use it
    running: Running | None = None

    def refusal(self) -> BusyError | None:
        """Of an image that comes now. Before the service runs and when it stops, `ready_service` is for it."""
        return None if self.running is None or self.drain.begun else self.running.batcher.refusal(1, 0)

    def look_again(self) -> None:
        """At the folder of models and at the file of keys; what is wrong with them is logged, and nothing changes."""
        self.registry.look_now(forget=True)
        if self.settings.api_keys is not None:
            try:
                self.keys = read_keys(self.settings.api_keys)
            except ConfigError as error:
                logger.error("the keys stay as they were: %s", error)


def current_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def ready_service(service: Service) -> Running:
    """Raises ServiceError while it starts and when it stops."""
    if service.drain.begun:
        raise not_ready("stopping", close=True)
    if service.running is None:
        raise not_ready("starting", close=False)
    return service.running


async def admitted(
    request: Request, _bearer: Annotated[object, Security(BEARER)], _header: Annotated[object, Security(HEADER)]
) -> Running:
    """The service, for who has a key. One dependency for all of it: the framework takes 0.06 ms over each."""
    check_key(request)
    return ready_service(current_service(request))


Admitted = Annotated[Running, Depends(admitted)]

FILE_SCHEMA = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
IMAGE_KINDS = ("png", "jpeg", "webp", "bmp", "tiff")
SCORE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One or many images as PNG, JPEG, WebP, BMP or TIFF.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "additionalProperties": False,
                    "properties": {FIELD: {"type": "array", "minItems": 1, "items": FILE_SCHEMA}},
                }
            },
            **{f"image/{kind}": {"schema": FILE_SCHEMA} for kind in IMAGE_KINDS},
        },
    }
}
SCORE_ERRORS = (
    "unauthorized", "malformed_request", "no_files", "unknown_field", "not_a_file", "model_unknown", "body_too_large",
    "too_many_files", "image_too_large", "unsupported_media_type", "image_format", "image_animated", "image_mode",
    "invalid_parameter", "model_required", "alpha_out_of_range", "image_empty", "image_truncated", "image_corrupt",
    "image_unreadable", "image_failed", "receive_timeout", "busy", "not_ready", "model_unavailable", "deadline",
)  # fmt: skip


@router.post(
    SCORE_PATH,
    summary="Score images",
    response_class=Response,
    responses={200: {"model": ScoreAnswer, "description": "One result per image."}, **documented(*SCORE_ERRORS)},
    openapi_extra=SCORE_BODY,
)
async def score(request: Request, query: Annotated[ScoreQuery, Query()], running: Admitted) -> Response:
    """Find what is unlike the good parts that the model has seen.

    Of several images, one that cannot be read has an `error` in its result and the others have theirs; an image sent
    alone that cannot be read is an error of the request.
    """
    model = await running.registry.get(query.model)
    alpha = _checked_alpha(query.alpha, model.calibration)
    uploads, outcomes = await received_and_scored(request, running, model, alpha=alpha)
    parts = answer_parts(running, model, uploads, outcomes, map_format=query.map, alpha=alpha)
    if query.map == "none" or len(outcomes) == 1:
        return Response(b"".join([part async for part in parts]), media_type="application/json")
    return StreamingResponse(parts, media_type="application/json")


@router.get(
    "/models",
    summary="The models that are served",
    responses=documented("unauthorized", "not_ready"),
)
async def list_models(running: Admitted) -> ModelList:
    registry = running.registry
    return ModelList(models=[_summary(version, registry) for version in registry.answering()])


@router.get(
    "/models/{name}",
    summary="A model in detail",
    responses=documented(
        "unauthorized", "model_unknown", "invalid_parameter", "not_ready", "model_unavailable", "deadline"
    ),
)
async def model_details(name: Annotated[str, Path(max_length=255)], running: Admitted) -> ModelDetails:
    """The name may be NAME:VERSION."""
    version, model = await running.registry.get_version(name)
    checkpoint = model.checkpoint
    return ModelDetails(
        **_summary(version, running.registry).model_dump(),
        map_level=model.calibration.map_level(model.calibration.alpha),
        good_scores=model.calibration.good_scores.tolist(),
        device=str(running.device.kind),
        config=asdict(checkpoint.config),
        origin=checkpoint.origin,
        metrics=checkpoint.metrics,
    )


@router.get("/health/live", summary="The process answers")
async def live() -> Health:
    return Health(status="live")


@router.get("/health/ready", summary="The models are loaded and warm", responses=documented("not_ready"))
async def ready(request: Request) -> Health:
    ready_service(current_service(request))
    return Health(status="ready")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    content, media_type = current_service(request).telemetry.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": media_type})


async def received_and_scored(
    request: Request, running: Running, model: ServedModel, *, alpha: float
) -> tuple[list[Upload], list[Outcome]]:
    """A request's uploads and what became of each, within the times that clients have.

    Raises ServiceError, ClientDisconnect, and the ImageError of an image that was sent alone.
    """
    service = current_service(request)
    limits = service.settings
    with service.telemetry.stage("receive").time():
        reading = read_uploads(request, max_files=limits.max_files)
        uploads = await received(reading, seconds=limits.receive_seconds, drain=service.drain)
    request.state.images = len(uploads)
    scoring = score_uploads(running, model, uploads, alpha=alpha)
    outcomes = await answered(request, scoring, seconds=limits.answer_seconds)
    if len(outcomes) == 1 and isinstance(outcomes[0], ImageError):
        raise outcomes[0]
    return uploads, outcomes


def _checked_alpha(wanted: float | None, calibration: Calibration) -> float:
    try:
        return calibration.chosen_alpha(wanted)
    except CalibrationError as error:
        raise ServiceError("alpha_out_of_range", str(error)) from error


def _summary(version: Version, registry: Registry) -> ModelSummary:
    about = version.about
    return ModelSummary(
        name=about.name,
        version=version.found.version,
        sha256=about.sha256,
        alpha=about.calibration.alpha,
        calibration_images=about.calibration.n,
        smallest_alpha=about.calibration.smallest_alpha,
        versions=registry.versions(about.name),
        in_memory=version.model is not None,
        problem=registry.problem(about.name),
    )
