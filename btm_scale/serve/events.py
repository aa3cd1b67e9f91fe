"""Events of jobs on their way to a client that may leave: until the first token, and as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from btm_scale.serve.work import Delta, Event

Events = AsyncIterator[tuple[int, Event]]


class EventStream(StreamingResponse):
    """Server-sent events; the jobs behind them end with the response, however it ends."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        events: AsyncGenerator[tuple[int, Event], None],
        hung_up: Callable[[], object],
        partial_done: Callable[[], object],
    ) -> None:
        # nginx, and other proxies, hold a stream back until it is complete, unless they are asked not to.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._counted(chunks), media_type="text/event-stream", headers=headers)
        self._chunks, self._events, self._hung_up, self._finish = chunks, events, hung_up, partial_done
        self._complete = False

    async def _counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            yield chunk
        self._complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that leaves ends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with contextlib.suppress(RuntimeError):  # the generator still runs: it closes itself
                await self._events.aclose()
            self._finish()
            if not self._complete:
                self._hung_up()


async def unless_hung_up(request: Request, work: Awaitable[Any]) -> Any:
    """Return the result of `work`, or None if the client leaves first; the work is then cancelled."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def until_first_token(events: Events) -> list[tuple[int, Event]]:
    """Return the events up to the first token."""
    begun = []
    async for one in events:
        begun.append(one)
        if isinstance(one[1], Delta):
            break
    return begun


async def resumed(begun: Sequence[tuple[int, Event]], events: Events) -> Events:
    """Yield the events that were received already, and those that follow."""
    for one in begun:
        yield one
    async for one in events:
        yield one


def event_bytes(chunk: dict[str, Any]) -> bytes:
    """Return a server-sent event. Raises ValueError for a number that JSON lacks, such as NaN."""
    return b"data: " + json.dumps(chunk, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
