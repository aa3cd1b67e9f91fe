"""The responses of remote engines, which are not trusted: they are read within limits, and checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from btm_scale.util.bounded_json import parse_json

_MOST_ANSWER = 64 << 20  # bytes; prompt_logprobs of a long prompt take some
_MOST_LINE = 1 << 20  # bytes
_MOST_REASON = 1 << 14  # bytes of an answer that says why a request failed
_SHOWN = 300  # characters of it


async def read_answer(response: aiohttp.ClientResponse, seconds: float) -> bytes:
    """Return the body of a response. Raises ValueError if it is larger than 64 MiB.

    Like the other readers, it raises TimeoutError if nothing comes for this many seconds, and aiohttp.ClientError if
    the connection fails.
    """
    content = bytearray()
    async for piece in _pieces(response, seconds):
        content += piece
        if len(content) > _MOST_ANSWER:
            raise ValueError(f"its answer is larger than {_MOST_ANSWER >> 20} MiB")
    return bytes(content)


async def read_reason(response: aiohttp.ClientResponse, seconds: float) -> str:
    """Return the message of an error in OpenAI's form, or "" if there is none that can be read."""
    content = bytearray()
    try:
        async for piece in _pieces(response, seconds):
            content += piece
            if len(content) > _MOST_REASON:
                return ""
        answer = parse_object(bytes(content))
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return ""
    error = answer.get("error", answer)
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(message.split())[:_SHOWN] if isinstance(message, str) else ""


async def read_events(response: aiohttp.ClientResponse, seconds: float) -> AsyncIterator[list[dict[str, Any]]]:
    """Yield the JSON objects of a stream of events, those that arrive together in one list.

    Raises ValueError if one is invalid or reports an error.
    """
    async for lines in _lines(response, seconds):
        # A space after the colon is optional, and other fields and comments may be between the events.
        contents = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        events = [parse_object(content) for content in contents if content not in (b"", b"[DONE]")]
        if any(event.get("error") for event in events):
            raise ValueError("it reports an error")
        if events:
            yield events


async def _lines(response: aiohttp.ClientResponse, seconds: float) -> AsyncIterator[list[bytes]]:
    rest = b""
    async for piece in _pieces(response, seconds):
        *lines, rest = (rest + piece).split(b"\n")
        yield lines
        if len(rest) > _MOST_LINE:
            raise ValueError(f"a line of its stream is longer than {_MOST_LINE:,} bytes")
    yield [rest]


async def _pieces(response: aiohttp.ClientResponse, seconds: float) -> AsyncIterator[bytes]:
    while True:
        try:
            # aiohttp's own time-out ends with the connection, and a chunk that is invalid wakes no reader.
            async with asyncio.timeout(seconds):
                piece = await response.content.readany()
        except RuntimeError:  # aiohttp's error for a connection that was closed between two reads
            raise aiohttp.ClientPayloadError("the connection was closed") from None
        if not piece:
            return
        yield piece


def parse_object(content: bytes) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError if the content is not one."""
    try:
        value = parse_json(content, unique_keys=False)
    except ValueError as error:
        raise ValueError(f"its answer is {error}") from None
    if not isinstance(value, dict):
        raise ValueError("its answer is not a JSON object")
    return value
