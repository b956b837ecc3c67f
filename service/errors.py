"""Every way in which a request fails: one table of codes, one shape of answer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from models.errors import HazelnutError, ImageError
from service.schemas import ErrorAnswer, ErrorDetail, ScoreQuery

logger = logging.getLogger("hazelnut")

SHOWN_CHARACTERS = 64  # how much of a client's own text an error message repeats


@dataclass(frozen=True)
class ErrorKind:
    status: int
    meaning: str


ERRORS = {
    "malformed_request": ErrorKind(400, "The multipart form cannot be read: no boundary, no end, a broken part."),
    "no_files": ErrorKind(400, "The form has no part named files."),
    "unknown_field": ErrorKind(400, "The form has a part whose name is not files."),
    "not_a_file": ErrorKind(400, "A part named files is text, not a file: it has no filename."),
    "unauthorized": ErrorKind(401, "The key is missing, or is not one of those in HAZELNUT_API_KEYS."),
    "not_found": ErrorKind(404, "There is no such path."),
    "model_unknown": ErrorKind(404, "There is no model of this name, or it has no such version."),
    "method_not_allowed": ErrorKind(405, "The path does not take this method; the header Allow names those it takes."),
    "receive_timeout": ErrorKind(408, "The request did not arrive within HAZELNUT_RECEIVE_SECONDS."),
    "body_too_large": ErrorKind(413, "The body has more bytes than HAZELNUT_MAX_BODY_BYTES."),
    "too_many_files": ErrorKind(413, "The form has more files than HAZELNUT_MAX_FILES."),
    "image_too_large": ErrorKind(413, "The image has more pixels than HAZELNUT_MAX_PIXELS."),
    "unsupported_media_type": ErrorKind(415, "The Content-Type is neither multipart/form-data nor image/*."),
    "image_format": ErrorKind(415, "Not a PNG, JPEG, WebP, BMP or TIFF, whatever its name says."),
    "image_animated": ErrorKind(415, "The image has more than one frame or page."),
    "image_mode": ErrorKind(415, "A pixel type without an agreed range, 32-bit float say."),
    "invalid_parameter": ErrorKind(422, "A parameter is unknown, or its value is not one of those allowed."),
    "model_required": ErrorKind(422, "Several models are served, and the request names none."),
    "alpha_out_of_range": ErrorKind(422, "alpha is smaller than the calibration images can resolve, or not below 1."),
    "image_empty": ErrorKind(422, "The image has no bytes."),
    "image_truncated": ErrorKind(422, "The file ends before its image does."),
    "image_corrupt": ErrorKind(422, "A checksum, a length or the coded data is wrong."),
    "image_unreadable": ErrorKind(422, "Decoding the image crashes, or takes too long or too much memory."),
    "image_failed": ErrorKind(500, "Scoring the image failed, by itself too; the log has the traceback."),
    "internal": ErrorKind(500, "A fault of the service; its log has the traceback under the request's id."),
    "busy": ErrorKind(503, "Too many images are waiting; try again after the seconds in Retry-After."),
    "not_ready": ErrorKind(503, "The service is starting or stopping; try again after Retry-After."),
    "model_unavailable": ErrorKind(503, "The model's files can no longer be read; the answer says why."),
    "deadline": ErrorKind(504, "The answer was not ready within HAZELNUT_ANSWER_SECONDS; the request was given up."),
}
IMAGE_ERRORS = tuple(code for code in ERRORS if code.startswith("image_"))

# What the framework itself raises, by status.
FRAMEWORK_CODES = {404: "not_found", 405: "method_not_allowed"}


class ServiceError(HazelnutError):
    """A request that is refused. `code` is a key of ERRORS; the message is for the client to read."""

    def __init__(self, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers


def error_response(
    request_id: str, code: str, message: str, *, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    answer = error_answer(request_id, code, message)
    return JSONResponse(answer.model_dump(), status_code=ERRORS[code].status, headers=headers)


def error_answer(request_id: str, code: str, message: str) -> ErrorAnswer:
    return ErrorAnswer(error=ErrorDetail(code=code, message=message, request_id=request_id))


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for OpenAPI: its error codes by status."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = ERRORS[code]
        entry = by_status.setdefault(kind.status, {"model": ErrorAnswer, "description": ""})
        entry["description"] = f"{entry['description']}\n\n`{code}`: {kind.meaning}".strip()
    return by_status


def shown(text: str) -> str:
    """A client's own text, quoted, and cut where it is long."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def as_clause(sentence: str) -> str:
    """Pydantic's sentence, to stand after a colon."""
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(ImageError, _image_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _framework_error)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return error_response(request.state.request_id, error.code, str(error), headers=error.headers)


async def _image_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ImageError)
    return error_response(request.state.request_id, error.code, str(error))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = shown(str(first["loc"][-1]))
    if first["type"] == "extra_forbidden":
        message = f"there is no parameter {name}: allowed are {', '.join(ScoreQuery.model_fields)}."
    else:
        message = f"parameter {name} is {shown(str(first['input']))}: {as_clause(first['msg'])}."
    return error_response(request.state.request_id, "invalid_parameter", message)


async def _framework_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = FRAMEWORK_CODES.get(error.status_code)
    if code is None:  # none of ours, and none that the framework is known to raise: a fault, not a refusal
        raise error
    path = shown(request.scope["path"])  # request.url would parse the Host, which may be nonsense
    headers = error.headers or {}
    messages = {
        "not_found": f"there is no {path}.",
        "method_not_allowed": f"{path} does not take {shown(request.method)}: allowed are {headers.get('Allow')}.",
    }
    return error_response(request.state.request_id, code, messages[code], headers=headers)
