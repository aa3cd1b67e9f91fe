"""Chats as prompts: the chat template of the run's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btm_scale.errors import DataError
from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.chat_process import LONGEST, ChatProcess, TooExpensive
from btm_scale.serve.schemas import Message
from btm_scale.util.bounded_json import read_bounded
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object

_MOST_BYTES = 1 << 20


class ChatTemplate:
    """A Jinja template, and the special tokens that it may name."""

    def __init__(self, template: str, special: dict[str, str]) -> None:
        self.template, self.special = template, special
        self._process = ChatProcess(template, special)

    @classmethod
    def of(cls, tokenizer: Path) -> ChatTemplate | None:
        """Return the template in a tokenizer's directory, or None. Raises DataError if it cannot be read."""
        settings: dict[str, Any] = {}
        if (path := file_inside(tokenizer, "tokenizer_config.json")).is_file():
            settings = read_object(path, DataError)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        if (path := file_inside(tokenizer, "chat_template.jinja")).is_file():
            try:
                template = read_bounded(path, _MOST_BYTES).decode("utf-8")
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path} cannot be read as a chat template: {error}. Copy the tokenizer again, or remove the file."
                ) from None
        if not isinstance(template, str):
            return None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
        return cls(template, special)

    def start(self) -> None:
        """Start the process that renders, so that the first chat does not wait for it."""
        self._process.start()

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a chat, up to the answer. Raises ApiError if the template refuses it."""
        try:
            text = self._process.render([{"role": message.role, "content": message.text} for message in messages])
        except TooExpensive as error:
            raise ApiError(
                400,
                f"The chat template cannot render these messages: {error}. Use /v1/completions.",
                param="messages",
                code="chat_template_error",
            ) from None
        except ValueError as error:
            raise ApiError(
                400,
                f"The chat template refuses these messages: {error}. Change their roles or order.",
                param="messages",
                code="chat_template_error",
            ) from None
        if len(text) > LONGEST:
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
