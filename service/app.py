"""The application, and the server that runs it."""

import asyncio
import gc
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.scoring import choose_device
from service import lookout, pages
from service.batching import Batcher
from service.decoding import Decoder
from service.device import Device
from service.draining import Drain
from service.errors import add_error_handlers, documented
from service.logs import log_config
from service.middleware import BodyLimitMiddleware, RequestMiddleware
from service.refusing import Refusals
from service.registry import Registry
from service.routes import SCORE_PATH, Service, router
from service.scoring import Running
from service.security import check_exposure, read_keys
from service.server import Server, bound_socket, server_config, timed_protocol
from service.settings import Settings, load_settings
from service.telemetry import Telemetry, package_version

CLOSE_SECONDS = 5.0  # for a batch or a model that is under way; a device or a disk may hang


def create_app(settings: Settings | None = None, *, checkpoint: Checkpoint | None = None) -> FastAPI:
    """The service as an ASGI application, with its models in memory.

    settings: None reads the environment. checkpoint: serve this one, whatever the settings name. Raises ConfigError,
    and CheckpointError where nothing can be served.
    """
    settings, telemetry = settings or load_settings(), Telemetry()
    keys = None if settings.api_keys is None else read_keys(settings.api_keys)
    device = Device(choose_device(settings.device), telemetry)
    try:
        registry = Registry(settings, telemetry, load=device.load, given=checkpoint)
    except CheckpointError:
        device.close()
        raise
    service = Service(settings, telemetry, registry, Drain(), keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        decoder = await Decoder(max_pixels=settings.max_pixels, telemetry=telemetry).start()
        batcher = Batcher(max_images=settings.max_waiting, max_bytes=settings.max_waiting_bytes, telemetry=telemetry)
        watching = asyncio.create_task(registry.watch(settings.look_seconds))
        service.running = Running(device, registry, decoder, batcher, telemetry)
        try:
            yield
        finally:
            service.drain.begin()
            service.running = None
            watching.cancel()
            await decoder.close()
            # Off the loop: it has to hear what else it is told.
            closing = [asyncio.create_task(asyncio.to_thread(each.close)) for each in (registry, batcher)]
            await asyncio.wait(closing, timeout=CLOSE_SECONDS)
            await asyncio.to_thread(device.close)

    app = FastAPI(
        title="Hazelnut",
        description="Finds defects in images of parts.",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,  # theirs asks a public server: service.pages has one
        redoc_url=None,
        redirect_slashes=False,  # a redirect names the host that the client claims
        responses=documented("internal"),
        middleware=[
            Middleware(RequestMiddleware, telemetry=telemetry, drain=service.drain),
            Middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes),
        ],
    )
    app.state.service = service
    add_error_handlers(app)
    app.include_router(router)
    app.include_router(lookout.router)
    app.include_router(pages.router)
    return app


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; answers on their way are finished first.

    Raises ConfigError for an address or a device that cannot be had, and CheckpointError, before anything starts.
    """
    logging.captureWarnings(True)  # into the log, like everything else
    check_exposure(settings.host, settings.api_keys, behind_loopback=settings.behind_loopback)
    with bound_socket(settings.host, settings.port) as listener:
        app = create_app(settings)
        service: Service = app.state.service
        refusals = Refusals(SCORE_PATH, service.refusal, service.telemetry)
        config = server_config(
            app,
            host=settings.host,
            port=listener.getsockname()[1],
            protocol=timed_protocol(
                header_seconds=settings.header_seconds,
                send_seconds=settings.send_seconds,
                refuse=refusals.answer,
            ),
            log_config=log_config(terminal=sys.stderr.isatty()),
        )
        server = Server(
            config,
            begin_drain=service.drain.begin,
            drained=service.drain.finished,
            hangup=service.look_again,
            drain_seconds=settings.drain_seconds,
        )
        # What is here by now, torch above all, stays: looking through it for garbage stops everything for 0.3 seconds.
        gc.collect()
        gc.freeze()
        server.run(sockets=[listener])
        refusals.log()
        gc.unfreeze()  # else what torch brought is said to have leaked
