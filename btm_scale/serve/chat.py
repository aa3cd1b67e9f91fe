"""Chats as prompts: the chat template of the run's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.errors import DataError
from btm_scale.model.hf_load import render_chat
from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.schemas import Message
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object

_LONGEST = 1_000_000


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and the special tokens that it may name."""

    template: str
    special: dict[str, str]

    @classmethod
    def of(cls, tokenizer: Path) -> ChatTemplate | None:
        """Return the template in a tokenizer's directory, or None. Raises DataError if its config is damaged."""
        settings: dict[str, Any] = {}
        if (path := file_inside(tokenizer, "tokenizer_config.json")).is_file():
            settings = read_object(path, DataError)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        if (path := file_inside(tokenizer, "chat_template.jinja")).is_file():
            template = path.read_text(encoding="utf-8")
        if not isinstance(template, str):
            return None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
        return cls(template, special)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a chat, up to the answer. Raises ApiError if the template refuses it."""
        chat = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text = render_chat(self.template, chat, self.special)
        except Exception as error:  # a template may raise anything, of Jinja and of Python
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ApiError(
                400,
                f"The chat template refuses these messages: {reason}. Change their roles or order.",
                param="messages",
                code="chat_template_error",
            ) from None
        if len(text) > _LONGEST:
            raise ApiError(400, "The chat is too long. Send fewer messages.", code="context_length_exceeded")
        return text


def no_template() -> ApiError:
    """Return the error of a run without a chat template."""
    return ApiError(
        400,
        "The run's tokenizer has no chat template, so a chat cannot become a prompt. Use /v1/completions, or add "
        "chat_template.jinja to the run's tokenizer directory.",
        param="messages",
        code="no_chat_template",
    )
