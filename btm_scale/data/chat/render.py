"""Render a chat in the form that its template reads.

The content of a message is text, or a list of parts, as vision models have. The arguments of a tool's call are an
object, or its JSON. In the wrong form a template fails, drops the content, or writes JSON within JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from btm_scale.model.hf_load import render_chat

_PROBE = "Question7Q"
_CALL_ID = "call7Q123"  # Mistral's have nine letters and digits

Messages = Sequence[Mapping[str, Any]]
Special = tuple[tuple[str, str], ...]


def rendered(
    template: str, messages: Messages, special: Mapping[str, str], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return what `render_chat` returns for messages whose contents are text. Raises what the template raises."""
    pairs = tuple(special.items())
    if any(message.get("tool_calls") for message in messages):
        as_text = _reads_arguments_as_text(template, pairs)
        messages = [_with_arguments(message, as_text=as_text) for message in messages]
    if _reads_parts(template, pairs):
        messages = [{**message, "content": _parts(message["content"])} for message in messages]
    return render_chat(template, messages, special, **options)


@functools.lru_cache(maxsize=4)
def _reads_parts(template: str, special: Special) -> bool:
    """Return whether a template writes contents only if they are lists of parts."""
    text, parts = ([{"role": "user", "content": content}] for content in (_PROBE, _parts(_PROBE)))
    return not _writes(template, text, special) and _writes(template, parts, special)


@functools.lru_cache(maxsize=4)
def _reads_arguments_as_text(template: str, special: Special) -> bool:
    """Return whether a template writes calls of tools only if their arguments are JSON."""
    function = {"name": "function", "arguments": {"key": _PROBE}}
    calls = [{"type": "function", "id": _CALL_ID, "function": function}]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    question = {"role": "user", "content": "question"}
    read, text = ([question, _with_arguments(call, as_text=as_text)] for as_text in (False, True))
    return not _writes(template, read, special) and _writes(template, text, special)


def _writes(template: str, messages: Messages, special: Special) -> bool:
    try:
        return _PROBE in render_chat(template, messages, dict(special))[0]
    except Exception:  # a template may raise anything; a conversation that it refuses is reported with the reason
        return False


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _with_arguments(message: Mapping[str, Any], *, as_text: bool) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(call, as_text) for call in calls]}


def _call(call: Any, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function, as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": read} if isinstance(read, dict) else call
    return call
