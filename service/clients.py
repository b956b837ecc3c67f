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
    read, stopped = asyncio.ensure_future(reading), asyncio.ensure_future(drain.begun.wait())
    try:
        await asyncio.wait({read, stopped}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if read.done():
            return read.result()
        if stopped.done():
            raise not_ready("stopping", close=True)
        # What it is still sending is not read any more.
        headers = {"Connection": "close"}
        message = f"the request did not arrive within {seconds:g} seconds."
        raise ServiceError("receive_timeout", message, headers=headers)
    finally:
        await _cancelled(read, stopped)


async def answered(request: Request, work: Coroutine[Any, Any, Result], *, seconds: float) -> Result:
    """The result of the work on a request whose body has been read. The work is cancelled when the client leaves, and
    when it takes longer than that. Raises ClientDisconnect, or ServiceError.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            raise ClientDisconnect
        raise ServiceError("deadline", f"the images were not scored within {seconds:g} seconds: try fewer, or later.")
    finally:
        # The work gives its places back before the next request asks for some.
        await _cancelled(working, leaving)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Wait until they have ended, whatever their outcome."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def not_ready(phase: str, *, close: bool) -> ServiceError:
    """close: the client had better come back over a new connection, to another one perhaps."""
    headers = {"Retry-After": str(RETRY_SECONDS), **({"Connection": "close"} if close else {})}
    return ServiceError("not_ready", f"the service is {phase}: try again soon.", headers=headers)
