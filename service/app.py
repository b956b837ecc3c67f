"""The application, and the server that runs it."""

import asyncio
import copy
import signal
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
import uvicorn.config
from fastapi import FastAPI
from starlette.middleware import Middleware

from models.checkpoint import Checkpoint, load_checkpoint
from models.errors import ConfigError
from models.scoring import choose_device
from service.errors import add_error_handlers, documented, logger
from service.middleware import BodyLimitMiddleware, RequestMiddleware
from service.registry import open_model, warm_scorer
from service.routes import Service, router
from service.settings import Settings, load_settings
from service.telemetry import Telemetry, package_version

DRAIN_SECONDS = 30  # for the answers that are on their way when the service is told to stop


def create_app(settings: Settings | None = None, *, checkpoint: Checkpoint | None = None) -> FastAPI:
    """The service as an ASGI application.

    settings: None reads the environment and may raise ConfigError. checkpoint: None loads the one that the settings
    name when the application starts; start-up then fails with CheckpointError where that does not do.
    """
    service = Service(settings=settings or load_settings(), telemetry=Telemetry())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        given = checkpoint
        if given is None:
            given = await asyncio.to_thread(load_checkpoint, service.settings.checkpoint)
        model = await open_model(given, settings=service.settings, telemetry=service.telemetry)
        service.model, service.phase = model, "ready"
        try:
            yield
        finally:
            service.model, service.phase = None, "draining"
            model.close()

    app = FastAPI(
        title="Hazelnut",
        description="Finds defects in images of parts.",
        version=package_version(),
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # a redirect names the host that the client claims
        responses=documented("internal"),
        middleware=[
            Middleware(RequestMiddleware, telemetry=service.telemetry),
            Middleware(BodyLimitMiddleware, max_bytes=service.settings.max_body_bytes),
        ],
    )
    app.state.service = service
    add_error_handlers(app)
    app.include_router(router)
    return app


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; answers on their way are finished first.

    Raises ConfigError for an address or a device that cannot be had, and CheckpointError, before anything starts.
    """
    with _bound_socket(settings.host, settings.port) as listener:
        device = choose_device(settings.device)
        checkpoint = load_checkpoint(settings.checkpoint)
        warm_scorer(checkpoint, device)  # the lifespan does so again, but its errors come as tracebacks of the server
        app = create_app(settings, checkpoint=checkpoint)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=listener.getsockname()[1],
            log_config=_log_config(),
            log_level="info",
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it listens, and leaves with status 0 when it was told to: uvicorn kills itself by the same signal."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        logger.info("serving on http://%s:%d (Ctrl+C to stop)", host, self.config.port)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _bound_socket(host: str, port: int) -> socket.socket:
    """Taken first, so that a taken port is known at once; nobody can connect before the model is ready."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}.") from error
    return listener


def _log_config() -> dict[str, Any]:
    """Uvicorn's own, with our logger beside it, and without a line for every malformed form."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"][logger.name] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config["loggers"]["python_multipart"] = {"level": "ERROR"}
    return config
