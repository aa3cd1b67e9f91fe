"""Which parts of a conversation are answers: exactly the assistant's text and its end of turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from helpers.chat_samples import (
    CHATML,
    END_OF_TURN,
    MARKED,
    QWEN3,
    SPECIAL,
    TEMPLATES,
    turns,
    write_sentencepiece,
    write_tokenizer,
)

from btm_scale.data.chat.answers import answer_frame, find_answers
from btm_scale.data.chat.encode import (
    TRAINED,
    ChatEncoding,
    EncodedChat,
    encode_chats,
    end_rendering,
    is_special_token,
    reader_of,
)
from btm_scale.data.chat.rows import conversation_of
from btm_scale.data.chat.template import ChatTemplate
from btm_scale.data.eval_text import _answer_bytes
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.tokenizer_files import DOCUMENT_START
from btm_scale.errors import DataError
from btm_scale.model.hf_load import render_chat

CHATS = [
    turns("hello", "Good morning."),
    turns("the end", "the", "and then?", "the end", "a", "a"),
    turns("system?", "Yes:\n\n- one\n- two", system="Answer in lists."),
    turns("assistant", "assistant\nuser", "<|im_start|>", "Answer7Qn0e"),
    turns("naïve 北京?", "🎉 café", "more", "…"),
]
NO_THOUGHT = "<think>\n\n</think>\n\n"
ODD = turns("spaces", "  before and after \n", "and", "\n\nlines")


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_the_assistants_text_and_the_end_of_its_turn(name: str) -> None:
    for chat in CHATS:
        found = find_answers(TEMPLATES[name], chat, SPECIAL)
        expected = [message["content"] + END_OF_TURN[name] for message in chat if message["role"] == "assistant"]
        before = " " if name == "mistral" else ""  # which the model generates
        expected = [before + text for text in expected]
        if name == "qwen3":
            expected[-1] = NO_THOUGHT + expected[-1]
        assert [found.text[begin:end] for begin, end in found.answers] == expected


def test_thoughts_that_a_template_drops_are_not_trained_on() -> None:
    chat = turns("q", "<think>\nhm\n</think>\n\nyes", "again", "<think>so</think>no")
    found = find_answers(TEMPLATES["qwen3"], chat, SPECIAL)
    assert [found.text[begin:end] for begin, end in found.answers] == ["yes<|im_end|>", NO_THOUGHT + "no<|im_end|>"]


def test_a_thought_that_a_template_keeps_is_part_of_the_answer() -> None:
    """And not the empty thought that another answer in its place gets."""
    keeps = QWEN3.replace("loop.last %}", "loop.last and not '<think>' in m.content %}").replace(
        "m.content.split('</think>')[-1]", "(m.content if loop.last else m.content.split('</think>')[-1])"
    )
    found = find_answers(keeps, turns("q", "<think>\nhm\n</think>\n\nyes", "again", "<think>so</think>no"), SPECIAL)
    assert [found.text[begin:end] for begin, end in found.answers] == ["yes<|im_end|>", "<think>so</think>no<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_begins_where_the_prompt_for_it_ends(name: str) -> None:
    chat = turns("q", "yes", "again", "no")
    found = find_answers(TEMPLATES[name], chat, SPECIAL)
    prompt, _ = render_chat(TEMPLATES[name], chat[:-1], SPECIAL, add_generation_prompt=True)
    assert found.answers[-1][0] == len(prompt)
    assert answer_frame(TEMPLATES[name], tuple(SPECIAL.items())).after == END_OF_TURN[name]


def test_a_call_of_a_tool_is_an_answer() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Rom"}}]}
    chat = [*turns("weather in Rom?"), call, {"role": "tool", "content": "18 C"}, *turns("", "It is mild.")[1:]]
    found = find_answers(TEMPLATES["qwen3"], chat, SPECIAL, [{"name": "weather"}])
    first, second = [found.text[begin:end] for begin, end in found.answers]
    assert first.startswith('<call>{"name": "weather"')
    assert first.endswith("</call><|im_end|>")
    assert second == NO_THOUGHT + "It is mild.<|im_end|>"
    assert '"weather"' in found.text[: found.answers[0][0]]


@pytest.mark.parametrize("content", ["m.content | upper", "m.content[:3]", "''"], ids=["upper", "truncated", "absent"])
def test_a_template_whose_answers_cannot_be_determined_is_refused(content: str) -> None:
    template = CHATML.replace("m.content", content)
    with pytest.raises(ValueError, match=r"cannot be determined. Use a template that marks answers"):
        find_answers(template, turns("question", "an answer"), SPECIAL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Any:
    yield
    end_rendering()


def encoded(
    template: str, tokenizer: Path, chats: list[Any], loss: Literal["all", "last"] = "all"
) -> list[EncodedChat]:
    encoding = ChatEncoding(template, json.dumps(SPECIAL), loss, tokenizer)
    texts = [conversation_of("messages", [chat], None) for chat in chats]
    return encode_chats(encoding, Tokenizer.load(tokenizer), texts)


def runs_of(chat: EncodedChat) -> list[list[int]]:
    """The ids of each answer."""
    trained = np.flatnonzero(chat.mask & TRAINED)
    return [chat.ids[run].tolist() for run in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)]


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_decoded_trained_tokens_are_the_answers(name: str, tokenizer: Path) -> None:
    read = Tokenizer.load(tokenizer)
    stripped = [{**message, "content": message["content"].strip()} for message in ODD] if name == "mistral" else ODD
    for chat, result in zip([*CHATS, stripped], encoded(TEMPLATES[name], tokenizer, [*CHATS, stripped]), strict=True):
        answers = [message["content"] + END_OF_TURN[name] for message in chat if message["role"] == "assistant"]
        before = " " if name == "mistral" else ""
        assert [read.decode(run) for run in runs_of(result)] == [before + answer for answer in answers]
        assert result.ids[0] == result.ids[-1] == read.eos
        assert np.count_nonzero(result.ids[1:] == read.eos) == (len(answers) if name == "mistral" else 1)


def test_only_the_last_answer_counts_with_loss_last(tokenizer: Path) -> None:
    [result] = encoded(CHATML, tokenizer, [turns("a", "first", "b", "second")], "last")
    assert [Tokenizer.load(tokenizer).decode(run) for run in runs_of(result)] == ["second<|im_end|>"]


def test_the_mask_is_that_of_transformers_where_the_template_marks_answers(tokenizer: Path) -> None:
    """And the same template without marks gives the same mask."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer, chat_template=MARKED)
    for chat, marked, compared in zip(
        CHATS, encoded(MARKED, tokenizer, CHATS), encoded(CHATML, tokenizer, CHATS), strict=True
    ):
        expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        eos = Tokenizer.load(tokenizer).eos
        assert marked.ids.tolist() == [eos, *expected["input_ids"], eos]
        assert (marked.mask & TRAINED).tolist() == [0, *expected["assistant_masks"], 0]
        assert np.array_equal(marked.ids, compared.ids)
        assert np.array_equal(marked.mask, compared.mask)


def test_without_a_token_that_ends_turns_the_end_of_the_conversation_is_trained_on(tokenizer: Path) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    [result] = encoded(plain, tokenizer, [turns("a", "b", "c", "the")])
    read = Tokenizer.load(tokenizer)
    assert [read.decode(run) for run in runs_of(result)] == ["assistant: b", "assistant: the", "</s>"]


def test_answers_of_a_sentencepiece_tokenizer_with_added_tokens_are_decoded_and_encoded_as_in_training(
    tmp_path: Path,
) -> None:
    directory = write_sentencepiece(tmp_path)
    tokenizer = Tokenizer.load(directory)
    assert type(tokenizer).__name__ == "SentencePieceTokenizer"
    [chat] = encoded(CHATML, directory, [turns("hello", "Good morning")])
    assert chat.ids[-3] == 401, "the token that was added for the end of a turn"
    assert [tokenizer.decode(run) for run in runs_of(chat)] == ["Good morning<|im_end|>"]
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    special = tokenizer.encode_special(prompt)
    assert special == Tokenizer.load(directory).encode_special(prompt) == chat.ids[1 : 1 + len(special)].tolist()
    counted = (chat.mask & TRAINED).astype(bool)
    assert _answer_bytes(reader_of(directory), chat.ids, counted) == len("Good morning")


@pytest.mark.parametrize("begins_with_bos", [False, True])
def test_a_conversation_begins_with_the_ids_of_its_prompt(begins_with_bos: bool, tmp_path: Path) -> None:
    """A prompt begins with the start of a document, once."""
    directory = write_tokenizer(tmp_path)
    if begins_with_bos:
        (directory / DOCUMENT_START).write_text("{}")
    tokenizer = Tokenizer.load(directory)
    chat = turns("one", "yes", "two", "no")
    for name in ("chatml", "mistral"):
        text, *_ = render_chat(TEMPLATES[name], chat[:-1], SPECIAL, add_generation_prompt=True)
        prompt = tokenizer.encode_special(text)
        prompt = prompt if prompt[:1] == [tokenizer.start] else [tokenizer.start, *prompt]
        [result] = encoded(TEMPLATES[name], directory, [chat])
        assert result.ids[: len(prompt)].tolist() == prompt


def test_special_tokens_are_known_and_those_of_plain_text_are_not_special(tmp_path: Path) -> None:
    reader = reader_of(write_sentencepiece(tmp_path))
    texts = ["Good mornings are sung", "naïve 北京 🎉", "- one\n- two"]
    plain = {token for text in texts for token in reader.encode(text)}
    assert not [token for token in sorted(plain) if reader.decode([token]) and is_special_token(reader, token)]
    assert is_special_token(reader, reader.eos)
    assert is_special_token(reader, 401)


def test_an_added_token_that_the_vocabulary_lacks_is_reported(tmp_path: Path) -> None:
    directory = write_sentencepiece(tmp_path)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"added_tokens_decoder": {}}))
    with pytest.raises(DataError, match=r"tokenizer\.json adds a token with the id 401 to tokenizer\.model, and no"):
        encoded(CHATML, directory, [turns("a", "b")])


def test_answers_without_tokens_are_left_out_and_a_conversation_without_others_is_refused(tokenizer: Path) -> None:
    bare = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    spaces = [json.dumps({"messages": turns(*contents)}) for contents in (("", " "), ("a", " ", "b", "c"))]
    encoding = ChatEncoding(bare, json.dumps(SPECIAL), "all", tokenizer)
    none, one = encode_chats(encoding, Tokenizer.load(tokenizer), spaces)
    assert none.problem == "its answers have no tokens"
    assert [Tokenizer.load(tokenizer).decode(run) for run in runs_of(one)] == ["c</s>"]


def test_a_conversation_that_the_template_refuses_has_the_templates_reason(tokenizer: Path) -> None:
    good, bad, long = turns("a", "b"), turns("", "a", "b")[1:], turns("a", "b" * 1_000_001)
    results = encoded(TEMPLATES["mistral"], tokenizer, [good, bad, good, long])
    assert [bool(result.problem) for result in results] == [False, True, False, True]
    assert results[1].problem == "the chat template refuses it: roles must alternate"
    assert "more than 1,000,000 characters" in results[3].problem


@pytest.mark.full
def test_a_template_that_loops_is_stopped_and_blamed_on_its_conversation(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btm_scale.data.chat import process

    monkeypatch.setattr(process, "_SECONDS", 1.0)
    loops = (
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}" + CHATML
    )
    results = encoded(loops, tokenizer, [turns("a", "b"), turns("loop", "b"), turns("a", "c")])
    assert ["took more than 1 s" in result.problem for result in results] == [False, True, False]


def test_the_template_of_a_tokenizer_is_found_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    directory = write_tokenizer(tmp_path / "tokenizer", named)  # type: ignore[arg-type]
    (tmp_path / "own.jinja").write_text("o")
    assert ChatTemplate.of(directory).template == "d"  # type: ignore[union-attr]
    assert ChatTemplate.named("tool_use", directory, tmp_path).template == "t"
    assert ChatTemplate.named("own.jinja", directory, tmp_path).template == "o"
