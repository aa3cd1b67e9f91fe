"""Chats as prompts: the chat template of the run's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from btm_scale.data.chat import template
from btm_scale.data.chat.process import LONGEST, TooExpensive
from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.schemas import Message


class ChatTemplate(template.ChatTemplate):
    """A template whose refusals are answers of the API."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The text that ends an answer, with which experts were trained to end it; none if it cannot be determined."""
        try:
            end = self._end_of_turn
        except TooExpensive:
            end = ""
        return (end,) if end.strip() else ()

    @cached_property
    def _end_of_turn(self) -> str:
        return self.process.end_of_turn()

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a chat, up to the answer. Raises ApiError if the template refuses it."""
        try:
            text = self.process.render([{"role": message.role, "content": message.text} for message in messages])
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
