"""Conversations in rows: three common shapes, read into one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from btm_scale.util.bounded_json import parse_json, shown

ASSISTANT = "assistant"
TOOLS = "tools"  # a column beside the messages
_KEPT = ("role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "name")
_ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_ROLE_OF = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "function_call": ASSISTANT,
    "function_response": "tool",
    "observation": "tool",
    "function": "tool",
}


def conversation_of(shape: str, values: Sequence[Any], tools: Any) -> str:
    """Return a conversation as JSON, the same for the same turns in every shape.

    `values` are those of the domain's fields, one of `messages` and `sharegpt`, two of `prompt_completion`. Raises
    ValueError if there is no conversation with an answer in them.
    """
    messages = messages_of(shape, values)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError("the conversation has no assistant turn")
    chat: dict[str, Any] = {"messages": messages}
    if (given := tools_of(tools)) is not None:
        chat[TOOLS] = given
    return json.dumps(chat, ensure_ascii=False, separators=(",", ":"), default=str)


def messages_of(shape: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the messages of a conversation, with or without answers. Raises ValueError."""
    return _SHAPES[shape](*values)


def tools_of(value: Any) -> list[Any] | None:
    """Return the tools that a conversation may call, or None. Raises ValueError."""
    tools = _parsed(value)
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"field '{TOOLS}' must be a list of objects, and is {shown(tools)}")
    return [_without_null(tool) for tool in tools]


def turns_of(conversation: str) -> dict[str, Any]:
    """Return the messages and tools of a conversation of `conversation_of`."""
    chat: dict[str, Any] = json.loads(conversation)
    return chat


def spoken(conversation: str) -> str:
    """Return the text of a conversation's turns without roles, which a tokenizer is trained on."""
    return "\n".join(message["content"] for message in turns_of(conversation)["messages"] if message.get("content"))


def _messages(value: Any) -> list[dict[str, Any]]:
    return [_message(turn, number, "role", "content") for number, turn in enumerate(_turns(value), 1)]


def _sharegpt(value: Any) -> list[dict[str, Any]]:
    turns = _turns(value)
    keys = ("from", "value") if all("from" in turn for turn in turns if isinstance(turn, Mapping)) else _KEPT[:2]
    return [_message(turn, number, *keys) for number, turn in enumerate(turns, 1)]


def _prompt_completion(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    return _either(prompt, "user") + _either(completion, ASSISTANT)


_SHAPES: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
}


def _either(value: Any, role: str) -> list[dict[str, Any]]:
    """Return the messages of a text, or of a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value)


def _turns(value: Any) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"a conversation must be a list of messages, and is {shown(value)}")
    return value


def _parsed(value: Any) -> Any:
    """Return what a text of JSON holds: cells of tables, and some columns of Parquet."""
    return parse_json(value.encode()) if isinstance(value, str) and value else value


def _message(turn: Any, number: int, role_key: str, content_key: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} must be an object, and is {shown(turn)}")
    role = turn.get(role_key)
    if not isinstance(role, str):
        raise ValueError(f"message {number} has no '{role_key}'")
    role = _ROLE_OF.get(role, role)
    if role not in _ROLES:
        raise ValueError(f"message {number} has the role {shown(role)}, and roles are {', '.join(_ROLES)}")
    message = {"role": role, "content": _text(turn.get(content_key), number)}
    for key in _KEPT[2:]:
        if turn.get(key):
            message[key] = _without_null(turn[key])
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = _parsed(message["tool_calls"])
    is_blank = not (message["content"].strip() if role == ASSISTANT else message["content"])
    if is_blank and (role == "user" or (role == ASSISTANT and "tool_calls" not in message)):
        raise ValueError(f"message {number} ({role}) is empty")
    return message


def _text(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str | None) for text in texts):
            return "".join(text or "" for text in texts)
    raise ValueError(f"message {number} has content other than text: {shown(content)}")


def _without_null(value: Any) -> Any:
    """Return a value without empty keys: tables have every key in every row."""
    if isinstance(value, Mapping):
        return {str(key): _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value
