"""Render a chat with its contents as the template reads them: text, or lists of parts, as vision models have."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from btm_scale.model.hf_load import render_chat

_PROBE = "Question7Q"

Messages = Sequence[Mapping[str, Any]]


def rendered(
    template: str, messages: Messages, special: Mapping[str, str], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return what `render_chat` returns for messages whose contents are text. Raises what the template raises."""
    if reads_parts(template, tuple(special.items())):
        messages = [{**message, "content": _parts(message["content"])} for message in messages]
    return render_chat(template, messages, special, **options)


@functools.lru_cache(maxsize=4)
def reads_parts(template: str, special: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a template writes contents only if they are lists of parts; it may drop a text without error."""
    return not _writes(template, _PROBE, special) and _writes(template, _parts(_PROBE), special)


def _writes(template: str, content: Any, special: tuple[tuple[str, str], ...]) -> bool:
    try:
        return _PROBE in render_chat(template, [{"role": "user", "content": content}], dict(special))[0]
    except Exception:  # a template may raise anything; a conversation that it refuses is reported with the reason
        return False


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
