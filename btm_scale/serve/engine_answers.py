"""The responses of remote engines, which are not trusted: they are read within limits, and checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2

from btm_scale.util.bounded_json import parse_json

_MOST_ANSWER = 64 << 20  # bytes; prompt_logprobs of a long prompt take some
_MOST_LINE = 1 << 20  # characters


async def read_answer(response: httpx2.Response) -> dict[str, Any]:
    """Return the JSON object of a response. Raises ValueError if it is not one, or larger than 64 MiB."""
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > _MOST_ANSWER:
            raise ValueError(f"its answer is larger than {_MOST_ANSWER >> 20} MiB")
    return _object(bytes(content))


async def read_events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON object of each event of a stream. Raises ValueError if one is invalid or reports an error."""
    async for line in _lines(response):
        if line.startswith("data: ") and line != "data: [DONE]":
            event = _object(line.removeprefix("data: ").encode("utf-8", "surrogatepass"))
            if "error" in event:
                raise ValueError("it reports an error")
            yield event


async def _lines(response: httpx2.Response) -> AsyncIterator[str]:
    rest = ""
    async for piece in response.aiter_text():
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line.rstrip("\r")
        if len(rest) > _MOST_LINE:
            raise ValueError(f"a line of its stream is longer than {_MOST_LINE:,} characters")
    yield rest


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content, unique_keys=False)
    except ValueError as error:
        raise ValueError(f"its answer is {error}") from None
    if not isinstance(value, dict):
        raise ValueError("its answer is not a JSON object")
    return value
