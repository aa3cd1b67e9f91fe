"""Conversations in rows of three shapes, and rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_samples import turns, write_chats

from btm_scale.config.data import DomainConfig
from btm_scale.data.chat.rows import spoken, turns_of
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.sources import resolve_domain
from btm_scale.errors import DataError

CHATS = [turns("q1", "a1", system="s"), turns("q1", "a1", "q2", "a2")]
SHAPES = ("messages", "sharegpt", "prompt_completion")


def texts_of(path: Path, bad: BadLines | None = None, **settings: Any) -> list[str]:
    config = DomainConfig.model_validate({"text": path.name, **settings})
    return [one.text for one in read_documents(resolve_domain("d", config, path.parent), bad or BadLines())]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_is_the_same_in_every_shape(shape: str, tmp_path: Path) -> None:
    texts = texts_of(write_chats(tmp_path / "c.jsonl", CHATS, shape), chat=shape)
    assert [turns_of(text)["messages"] for text in texts] == CHATS


def test_texts_are_a_prompt_and_a_completion(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('question,answer\nwhat?,"so, that"\n')
    [text] = texts_of(tmp_path / "c.csv", chat="prompt_completion", field=["question", "answer"])
    assert turns_of(text)["messages"] == turns("what?", "so, that")
    assert spoken(text) == "what?\nso, that"


def test_a_part_without_text_is_empty(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": None}, {"type": "text", "text": "what?"}]
    path = write_chats(tmp_path / "c.jsonl", [[{"role": "user", "content": parts}, *turns("", "that")[1:]]])
    [text] = texts_of(path, chat="messages")
    assert turns_of(text)["messages"] == turns("what?", "that")


def test_tools_and_calls_stay_in_place_in_every_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tool = {"type": "function", "function": {"name": "weather"}}
    call = {"function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, "tools": json.dumps([tool]), "id": 1}) + "\n")
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "tools": [tool], "id": 1}]), tmp_path / "c.parquet")
    [one], [other] = (texts_of(tmp_path / name, chat="messages") for name in ("c.jsonl", "c.parquet"))
    assert one == other
    assert turns_of(one) == {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [tool],
    }


BAD: dict[str, tuple[Any, str]] = {
    "no answer": (turns("hello"), "the conversation has no assistant turn"),
    "empty": ([], "a conversation must be a list of messages"),
    "a text": ("hello", "not valid JSON"),
    "a role": ([{"role": "pirate", "content": "arr"}], "message 1 has the role 'pirate', and roles are system"),
    "no role": ([{"content": "arr"}], "message 1 has no 'role'"),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "message 1 has content other than text",
    ),
    "an empty answer": (turns("a", ""), r"message 2 \(assistant\) is empty"),
    "an answer of white space": (turns("a", " \n"), r"message 2 \(assistant\) is empty"),
    "a part that is not text": (
        [{"role": "user", "content": [{"type": "text", "text": 7}]}],
        "message 1 has content other than text",
    ),
}


@pytest.mark.parametrize(("messages", "reason"), BAD.values(), ids=BAD)
def test_a_row_without_a_conversation_is_reported_with_its_line(messages: Any, reason: str, tmp_path: Path) -> None:
    path = write_chats(tmp_path / "c.jsonl", [CHATS[0], messages, CHATS[1]])
    with pytest.raises(DataError, match=rf"c\.jsonl, line 2: {reason}"):
        texts_of(path, chat="messages")
    bad = BadLines("skip")
    assert len(texts_of(path, bad, chat="messages")) == 2
    assert bad.skipped == 1


def test_a_column_that_is_missing_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    with pytest.raises(DataError, match="no field 'conversations'; fields are 'messages'"):
        texts_of(path, chat="sharegpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "last"}, "has loss and no `chat`"),
        ({"template": "x.jinja"}, "has template and no `chat`"),
        ({"chat": "messages", "passages": "10KB"}, "a setting of plain text"),
        ({"chat": "messages", "split_by": "position"}, "a setting of plain text"),
        ({"chat": "prompt_completion", "field": "prompt"}, "names 1 fields for `chat: prompt_completion`, which has 2"),
        ({"chat": "alpaca"}, "'messages', 'sharegpt' or 'prompt_completion'"),
    ],
)
def test_settings_that_do_not_fit_conversations_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainConfig.model_validate({"text": "c.jsonl", **settings})
