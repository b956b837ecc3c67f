"""What happens around every request: its id, the last resort for errors, the limit of its body, its metrics."""

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from service.draining import Drain
from service.errors import ServiceError, error_response, logger
from service.logs import log_request
from service.refusing import REQUEST_ID_HEADER, request_id_of
from service.routes import SCORE_PATH
from service.telemetry import Telemetry, route_template

# Where there may be no route in the scope: the framework's own page, and what is refused before there is one.
PAGES = frozenset({"/openapi.json", SCORE_PATH})


class RequestMiddleware:
    """Gives each request an id, turns an unforeseen exception into the answer 500, and counts.

    The outermost of ours, so that no answer goes without an id. Pure ASGI: a BaseHTTPMiddleware would hide the
    client's leaving from the routes.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, drain: Drain) -> None:
        self.app = app
        self.telemetry = telemetry
        self.drain = drain
        telemetry.route_begins(SCORE_PATH, "POST")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self.drain.request():
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(Headers(scope=scope).get(REQUEST_ID_HEADER, ""))
        scope.setdefault("state", {})["request_id"] = request_id
        bind_contextvars(request_id=request_id)  # for the log; each request runs in a context of its own
        status: int | None = None
        refused = False
        start = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status, refused
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                status, refused = message["status"], "Retry-After" in headers
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = None  # nobody is left to be answered
        except Exception:
            if status is not None:
                status = 500  # for the metrics and the log: half an answer is none
                raise  # the server then cuts the connection: it must not pass for a whole one
            logger.exception("request %s failed", request_id)
            message = "the service failed; its log has the traceback under this request_id."
            await error_response(request_id, "internal", message)(scope, receive, send_with_id)
        finally:
            route = route_template(scope.get("route"), scope["path"], PAGES)
            seconds = time.perf_counter() - start
            self.telemetry.request_ended(route, scope["method"], status=status, seconds=None if refused else seconds)
            log_request(
                method=scope["method"],
                route=route,
                path=scope["path"],
                status=status,
                seconds=seconds,
                key_name=scope["state"].get("key_name"),
                images=scope["state"].get("images"),
            )


class BodyLimitMiddleware:
    """Refuses a body of more than max_bytes: by its Content-Length, or as soon as more has arrived.

    Starlette's own limit (1.10) answers with text instead of our shape, and older ones have none.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _content_length(scope) > self.max_bytes:
            refusal = self._refusal()
            response = error_response(scope["state"]["request_id"], refusal.code, str(refusal))
            await response(scope, receive, send)
            return
        received = 0

        async def receive_at_most() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._refusal()
            return message

        await self.app(scope, receive_at_most, send)

    def _refusal(self) -> ServiceError:
        return ServiceError("body_too_large", f"the body is too large: allowed are {self.max_bytes} bytes.")


def _content_length(scope: Scope) -> int:
    try:
        return int(Headers(scope=scope).get("content-length", "0"))
    except ValueError:
        return 0  # what really arrives is counted
