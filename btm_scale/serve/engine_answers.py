"""What engines elsewhere answer: other programs, so answers are read within bounds and checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2

from btm_scale.util.bounded_json import parse_json

_MOST_ANSWER = 64 << 20  # bytes; prompt_logprobs of a long prompt take some
_MOST_LINE = 1 << 20  # characters
_REASONS = {"stop": "stop", "length": "length"}


async def read_answer(response: httpx2.Response) -> dict[str, Any]:
    """Return the JSON object of a response. Raises ValueError if it is another or larger than 64 MiB."""
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > _MOST_ANSWER:
            raise ValueError(f"its answer is larger than {_MOST_ANSWER >> 20} MiB")
    return _object(bytes(content))


def prompt_log_probs(answer: dict[str, Any], prompt: Sequence[int]) -> list[float]:
    """Return the log-probability in nats of each token of a prompt but the first, from vLLM's answer.

    Raises LookupError, TypeError or ValueError if the answer has none.
    """
    rows = answer["choices"][0].get("prompt_logprobs") or answer["prompt_logprobs"]
    if len(rows) != len(prompt):
        raise ValueError("other tokens")
    return [float(rows[place][str(token)]["logprob"]) for place, token in enumerate(prompt) if place]


async def stream_of(response: httpx2.Response) -> AsyncIterator[tuple[str, str | None, int | None]]:
    """Yield the text, the reason of the end and the number of tokens, as far as known, of each event of a stream.

    Raises ValueError for an event that reports an error, or is not as OpenAI's API has it.
    """
    async for line in _lines(response):
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = _object(line.removeprefix("data: ").encode("utf-8", "surrogatepass"))
        if "error" in chunk:
            raise ValueError("it reports an error")
        usage = chunk.get("usage") or {}
        try:
            count = usage.get("completion_tokens")
            for choice in chunk.get("choices") or ():
                text, reason = choice.get("text") or "", choice.get("finish_reason")
                if not isinstance(text, str):
                    raise TypeError
                yield text, None if reason is None else _REASONS.get(str(reason), "stop"), None
        except (AttributeError, TypeError):
            raise ValueError("an event of its stream is not as OpenAI's API has it") from None
        if type(count) is int and count >= 0:
            yield "", None, count


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
