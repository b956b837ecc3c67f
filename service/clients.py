"""Clients that take too long, and clients that leave: neither holds a place for longer than the settings say."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.errors import ServiceError

Result = TypeVar("Result")


async def received(reading: Coroutine[Any, Any, Result], *, seconds: float) -> Result:
    """What a client sends. Raises ServiceError if it takes longer than that."""
    try:
        async with asyncio.timeout(seconds):
            return await reading
    except TimeoutError as error:
        # What it is still sending is not read any more.
        headers = {"Connection": "close"}
        message = f"the request did not arrive within {seconds:g} seconds."
        raise ServiceError("receive_timeout", message, headers=headers) from error


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
        leaving.cancel()
        working.cancel()
        # The work gives its places back before the next request asks for some.
        await asyncio.wait({working, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
