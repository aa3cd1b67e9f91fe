"""Conversations as prompts: rendered up to the answer, with special tokens encoded as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.data.chat.process import LONGEST, ChatProcess, TooExpensive
from btm_scale.data.chat.rows import ASSISTANT, TOOLS, messages_of, tools_of
from btm_scale.data.chat.template import ChatTemplate
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import UserError
from btm_scale.run_dir import RunDir
from btm_scale.util.bounded_json import parse_json, read_bounded

_MOST_BYTES = 64 << 20
_SHAPES = {"messages": "messages", "conversations": "sharegpt"}


@dataclass(frozen=True)
class ChatPrompts:
    """Rendered conversations, their token ids, and the text that ends an answer, if the template has one."""

    texts: list[str]
    ids: list[list[int]]
    stop: tuple[str, ...]


def chat_prompts(config: RunConfig, run: RunDir, path: Path, domain: str | None = None) -> ChatPrompts:
    """Return the conversations in a file of JSON lines as prompts for their next answer.

    The template is that of `domain`, or the tokenizer's, or that of the first domain of conversations. Raises
    UserError for a file that cannot be read, a conversation that cannot be rendered, and without a template.
    """
    process = _template(config, run, domain).process
    try:
        texts = [_rendered(process, path, number, chat) for number, chat in _chats(path)]
        end = process.end_of_turn()
    except TooExpensive as error:
        raise UserError(f"The chat template cannot render {path}: {error}. Use another template.") from None
    finally:
        process.close()
    if not texts:
        raise UserError(f"{path} has no conversation. Each line is an object with `messages`: add one.")
    tokenizer = Tokenizer.load(run.tokenizer)
    return ChatPrompts(texts, [tokenizer.encode_special(text) for text in texts], (end,) if end.strip() else ())


def _template(config: RunConfig, run: RunDir, domain: str | None) -> ChatTemplate:
    named = [one.template for name, one in config.all_domains.items() if one.template and domain in (None, name)]
    template = None
    if domain is None or not named:
        template = ChatTemplate.of(run.tokenizer)
    if template is None and named:
        template = ChatTemplate.named(named[0], run.tokenizer, config.text_root)
    if template is None:
        who = "no domain of the run names" if domain is None else f"domain '{domain}' does not name"
        raise UserError(
            f"The tokenizer in {run.tokenizer} has no chat template, and {who} one. A template "
            "renders conversations as prompts: add chat_template.jinja to that folder, or use --prompt."
        )
    return template


def _chats(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    try:
        lines = read_bounded(path, _MOST_BYTES).split(b"\n")
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read conversations from {path}: {error}. Give a file of JSON lines.") from None
    chats: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            row = {"messages": row} if isinstance(row, list) else row
            field = next((name for name in _SHAPES if isinstance(row, dict) and name in row), None)
            if field is None:
                raise ValueError("it has neither `messages` nor `conversations`")
            messages = messages_of(_SHAPES[field], [row[field]])
            if messages[-1]["role"] == ASSISTANT:
                raise ValueError("it ends with an answer, and the next answer is generated")
            chats.append((number, {"messages": messages, TOOLS: tools_of(row.get(TOOLS))}))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: {error}. Each line is an object with `messages`: correct it."
            ) from None
    return chats


def _rendered(process: ChatProcess, path: Path, number: int, chat: Mapping[str, Any]) -> str:
    try:
        text = process.render(chat["messages"], chat[TOOLS])
        if len(text) > LONGEST:
            raise ValueError(f"the text has more than {LONGEST:,} characters")
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: the chat template refuses it: {error}. Change the roles or their order."
        ) from None
    return text
