"""Clients that take too long, and clients that leave: neither holds a place for longer than the settings say."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.draining import Drain
from service.errors import ServiceError

RETRY_SECONDS = 1  # for a service that is starting or stopping

Result = TypeVar("Result")


async def received(reading: Coroutine[Any, Any, Result], *, seconds: float, drain: Drain) -> Result:
    """What a client sends. Raises ServiceError if it takes longer than that, or if the service is to stop before."""
    try:
        async with asyncio.timeout(seconds) as limit:
            with drain.ends(limit):
                return await reading
    except TimeoutError as error:
        if drain.begun:
            raise not_ready("stopping", close=True) from error
        # What it is still sending is not read any more.
        headers = {"Connection": "close"}
        message = f"the request did not arrive within {seconds:g} seconds."
        raise ServiceError("receive_timeout", message, headers=headers) from error


async def answered(request: Request, work: Coroutine[Any, Any, Result], *, seconds: float) -> Result:
    """The result of the work on a request whose body has been read. The work is cancelled when the client leaves, and
    when it takes longer than that. Raises ClientDisconnect, or ServiceError.
    """
    leaving: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(seconds) as limit:
            leaving = asyncio.create_task(_end_when_left(request, limit))
            return await work
    except TimeoutError as error:
        if leaving is not None and leaving.done():
            raise ClientDisconnect from error
        message = f"the images were not scored within {seconds:g} seconds: try fewer, or later."
        raise ServiceError("deadline", message) from error
    finally:
        if leaving is not None:
            leaving.cancel()


async def _end_when_left(request: Request, limit: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if not limit.expired():
        limit.reschedule(0)


def not_ready(phase: str, *, close: bool) -> ServiceError:
    """close: the client had better come back over a new connection, to another one perhaps."""
    headers = {"Retry-After": str(RETRY_SECONDS), **({"Connection": "close"} if close else {})}
    return ServiceError("not_ready", f"the service is {phase}: try again soon.", headers=headers)
