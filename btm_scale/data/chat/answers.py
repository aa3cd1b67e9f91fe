"""Which characters of a rendered chat are the assistant's answers: exactly these, or an error.

A template marks them itself with `{% generation %}`, or the chat is rendered twice: as it is, and with a placeholder
for every answer. What is between the placeholders is then the template's, and must be in the chat's text as well.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from btm_scale.data.chat.render import Messages, rendered
from btm_scale.data.chat.rows import ASSISTANT

_FIRST_LINE = re.compile(r"\s*\S.*")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_END_OF_THOUGHT = "</think>"
_UNDECIDED = (
    "the chat template changes answers, so which tokens to train on cannot be determined. Use a template that marks "
    "answers with {% generation %}"
)


@dataclass(frozen=True)
class Rendering:
    """The text of a chat, and the first and last + 1 character of each answer, in order.

    An answer begins where the prompt for it ends, so it includes a space or an empty thought that the template writes
    before its text, and it ends with the template's end of turn.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def find_answers(
    template: str, messages: Messages, special: Mapping[str, str], tools: Sequence[Any] | None = None
) -> Rendering:
    """Render a chat and find its answers.

    Raises ValueError if they cannot be determined, and whatever the template raises.
    """
    if _GENERATION.search(template):
        text, blocks = rendered(template, messages, special, tools=tools, return_assistant_tokens_mask=True)
        found = _marked(messages, text, blocks)
    else:

        def render(some: Messages) -> str:
            return rendered(template, some, special, tools=tools)[0]

        found = _compared(messages, render, answer_frame(template, tuple(special.items())))
    answers = [found.text[begin:end] for begin, end in found.answers]
    if not all(any(name in answer for answer in answers) for name in _called(messages)):
        raise ValueError("it leaves out calls of tools. Use a template that writes them")
    return found


@dataclass(frozen=True)
class AnswerFrame:
    """What a template writes around an answer: what follows the prompt for it, and the end of the turn.

    Some templates end only the last answer with `after`, and those before it as they end a question: `inner`.
    """

    before: str
    after: str
    inner: str = ""


@functools.lru_cache(maxsize=4)
def answer_frame(template: str, special: tuple[tuple[str, str], ...]) -> AnswerFrame:
    """Return what a template writes around answers. Raises ValueError if it writes none, and what it raises."""
    placeholder = _placeholders("", 1)[0]
    question = [{"role": "user", "content": "question"}]
    prompt, _ = rendered(template, question, dict(special), add_generation_prompt=True)
    complete, _ = rendered(template, [*question, {"role": ASSISTANT, "content": placeholder}], dict(special))
    head, found, tail = complete.partition(placeholder)
    if not found:
        raise ValueError(_UNDECIDED)
    between = head[len(prompt) :] if head.startswith(prompt) else ""
    asked, _ = rendered(template, question, dict(special))
    return AnswerFrame(between, _end_of_turn(tail), _end_of_turn(asked.rpartition("question")[2]))


def _end_of_turn(tail: str) -> str:
    # What follows in another line ends the conversation, and not every turn.
    end = _FIRST_LINE.match(tail)
    return end.group().rstrip() if end else ""


def _marked(messages: Messages, text: str, blocks: Sequence[tuple[int, int]]) -> Rendering:
    """Return the answers that a template marks; blocks with nothing between them are one answer."""
    answers: list[tuple[int, int]] = []
    for begin, end in blocks:
        if answers and answers[-1][1] == begin:
            begin = answers.pop()[0]
        if begin < end:
            answers.append((begin, end))
    if not answers:
        raise ValueError("the chat template marks no answer in this conversation")
    plain = [message["content"].strip() for message in messages if _is_plain(message)]
    if plain and not any(content in text[begin:end] for content in plain for begin, end in answers):
        raise ValueError("it marks answers without their text. Use another template")
    return Rendering(text, tuple(answers))


def _compared(messages: Messages, render: Any, frame: AnswerFrame) -> Rendering:
    text = render(messages)
    plain = [number for number, message in enumerate(messages) if _is_plain(message)]
    placeholders = _placeholders(text, len(plain))
    places = dict(zip(plain, placeholders, strict=True))
    marked = render(
        [{**message, "content": places[i]} if i in places else message for i, message in enumerate(messages)]
    )
    answers: list[tuple[int, int]] = []
    parts = _parts(marked, placeholders)
    head = next(parts)
    if not text.startswith(head):
        raise ValueError(_UNDECIDED)
    position = len(head)
    for number in plain:
        following = next(parts)
        body = _body(messages[number]["content"], text, position, following)
        end = position + len(body)
        answers.append(_with_ends(position, end, head, following, frame))
        head, position = following, end + len(following)
    if position != len(text):
        raise ValueError(_UNDECIDED)
    others = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT and i not in places]
    answers += [_complete_turn(messages, i, render, text, frame) for i in others]
    answers.sort()
    if any(end > begin for (_, end), (begin, _) in pairwise(answers)):
        raise ValueError(_UNDECIDED)
    return Rendering(text, tuple(answers))


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Return whether a message is an answer of text alone; thoughts and calls are rendered as the template likes."""
    has_more = any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    content = message.get("content")
    is_text = isinstance(content, str) and _END_OF_THOUGHT not in content
    return message["role"] == ASSISTANT and is_text and not has_more


def _called(messages: Messages) -> Iterator[str]:
    """Yield the names of the tools that are called."""
    for message in messages:
        calls = message.get("tool_calls") if message["role"] == ASSISTANT else None
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
                yield name


def _placeholders(text: str, count: int) -> list[str]:
    stem = "Answer7Q"
    while stem in text:
        stem += "Z9"
    return [f"{stem}n{number}e" for number in range(count)]


def _parts(marked: str, placeholders: Sequence[str]) -> Iterator[str]:
    """Yield what is before, between and after placeholders. Raises ValueError unless each is there once, in order."""
    rest = marked
    for placeholder in placeholders:
        part, found, rest = rest.partition(placeholder)
        if not found or placeholder in rest:
            raise ValueError(_UNDECIDED)
        yield part
    yield rest


def _body(content: str, text: str, position: int, following: str) -> str:
    """Return the content as the template wrote it at `position`, perhaps stripped."""
    for body in (content, content.rstrip(), content.lstrip(), content.strip()):
        if text.startswith(body + following, position):
            return body
    raise ValueError(_UNDECIDED)


def _complete_turn(messages: Messages, number: int, render: Any, text: str, frame: AnswerFrame) -> tuple[int, int]:
    """Return the range of a turn with a thought or a call of a tool: what a placeholder replaces."""
    [placeholder] = _placeholders(text, 1)
    try:
        marked = render([*messages[:number], {"role": ASSISTANT, "content": placeholder}, *messages[number + 1 :]])
    except MemoryError:
        raise
    except Exception:  # it may want a call before the result of a tool
        raise ValueError(_UNDECIDED) from None
    head, tail = _parts(marked, [placeholder])
    head = head.removesuffix(frame.before)  # a placeholder gets an empty thought, and an answer with a thought does not
    begin, end = len(head), len(text) - len(tail)
    if begin >= end or not (text.startswith(head) and text.endswith(tail)):
        raise ValueError(_UNDECIDED)
    return _with_ends(begin, end, head, tail, frame)


def _with_ends(begin: int, end: int, head: str, tail: str, frame: AnswerFrame) -> tuple[int, int]:
    """Return the range of an answer with what the model generates around it: `head` is before it, `tail` after it."""
    if frame.before and head.endswith(frame.before):
        begin -= len(frame.before)
    written = next((text for text in (frame.after, frame.inner) if tail.startswith(text)), "")
    return begin, end + len(written)
