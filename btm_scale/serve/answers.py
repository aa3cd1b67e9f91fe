"""From a backend's events to the objects of OpenAI's API, complete or as a stream of chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.generate.running_batch import Alternatives
from btm_scale.serve.work import Delta, Job, Routed, Score

_REPLACEMENT = "\ufffd"
_LOWEST = -9999.0  # for minus infinity, which JSON has not; as vLLM writes it


class TokenTexts:
    """The text of single tokens: a tokenizer may decode one differently at the beginning of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = lru_cache(1 << 16)(lambda ids: tokenizer.decode(list(ids)))

    def of(self, token: int, before: int) -> str:
        """Return the text that a token adds after the token `before`."""
        text: str = self._decode((before, token))
        return text[len(self._decode((before,))) :]


@dataclass
class Choice:
    """A continuation, as far as it is known."""

    index: int
    job: Job
    last: int  # token
    text: str = ""
    tokens: int = 0
    expert: str | None = None
    generated_by: str | None = None  # the expert, or the mixture; None before the first token
    finished: str | None = None
    scores: list[Score] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # in characters, of each token in `scores`
    end: int = 0  # of the last token in `scores`
    begun: bool = False  # a chunk was sent


class Answer(ABC):
    """The answer to one request."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(
        self, model: str, jobs: Sequence[Job], tokenizer: Tokenizer, *, echoed: Sequence[str] = (), stream: bool = False
    ) -> None:
        """Args: `echoed`: the texts of all prompts, to repeat before the continuations; `stream`: return chunks."""
        self.model, self.id, self.created = model, f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._texts, self._decode = TokenTexts(tokenizer), tokenizer.decode
        self._sent, self._echoed, self._streams = sum(job.sent for job in jobs), echoed, stream
        self._routed: list[Routed | None] = [None] * len(jobs)
        self._first = [sum(job.copies for job in jobs[:number]) for number in range(len(jobs))]
        self.choices = [
            Choice(self._first[number] + copy, job, job.prompt[-1])
            for number, job in enumerate(jobs)
            for copy in range(job.copies)
        ]
        self._number = [number for number, job in enumerate(jobs) for _ in range(job.copies)]

    def route(self, number: int, event: Routed) -> None:
        """Record the posterior of a job, and its echoed prompt, which the first chunk of each choice has."""
        self._routed[number] = event
        if not self._echoed:
            return
        first = self._first[number]
        for choice in self.choices[first : first + self.choices[first].job.copies]:
            choice.text = self._echoed[number]
            self._score_prompt(choice, choice.text, event)

    def add(self, number: int, event: Delta) -> dict[str, Any] | None:
        """Record a token; return its chunk, or None if it has nothing to show yet, or nothing is streamed."""
        choice = self._choice_of(number, event)
        before = len(choice.offsets) if choice.begun else 0
        shown = len(choice.text) if choice.begun else 0
        choice.expert, choice.generated_by = event.expert, event.expert or "mixture"
        choice.tokens += 1 if event.token is not None else event.count
        if event.token is not None:
            if event.alternatives is not None:
                self._score(choice, event.token, event.alternatives)
            choice.last = event.token
        for score in event.scores:
            self._append(choice, score)
        choice.text += event.text
        choice.finished = event.finished
        is_empty = len(choice.text) == shown and event.finished is None and len(choice.offsets) == before
        if is_empty or not self._streams:
            return None
        return self.chunk(choice, choice.text[shown:], before)

    def cost(self, number: int, event: Routed | Delta) -> int:
        """Return about how many log-probabilities are formatted when an event is recorded."""
        if isinstance(event, Routed):
            job = self.choices[self._first[number]].job
            return len(event.prompt_scores or ()) * _values(job) * job.copies
        choice = self._choice_of(number, event)
        return 0 if choice.begun or not self._streams else len(choice.scores) * _values(choice.job)

    @property
    def total_cost(self) -> int:
        """About how many log-probabilities the complete answer has."""
        return sum(len(choice.scores) * _values(choice.job) for choice in self.choices)

    def complete(self) -> dict[str, Any]:
        """Return the complete answer."""
        choices = [{**self._choice(choice), "btm": self.btm(choice)} for choice in self.choices]
        return {**self._head(self.object), "choices": choices, "usage": self.usage(), "btm": choices[0]["btm"]}

    def chunk(self, choice: Choice, text: str, before: int) -> dict[str, Any]:
        """Return a chunk with text, and the log-probabilities from token `before` on."""
        head = self._head(self.chunk_object)
        if not choice.begun or choice.finished:
            head["btm"] = self.btm(choice)
        piece = self._piece(choice, text, before)
        choice.begun = True
        return {**head, "choices": [piece]}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that includes usage."""
        return {**self._head(self.chunk_object), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the number of tokens."""
        written = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self._sent, "completion_tokens": written, "total_tokens": self._sent + written}

    def btm(self, choice: Choice) -> dict[str, Any]:
        """Return how a text came about: the method, the expert that generated it, and the posterior of its prompt."""
        routed = self._routed[self._number[choice.index]]
        answer: dict[str, Any] = {
            "method": choice.job.method,
            "expert": choice.expert,
            "posterior": routed.weights if routed else {},
        }
        return answer | ({"left_out": list(routed.left_out)} if routed and routed.left_out else {})

    def _choice_of(self, number: int, event: Delta) -> Choice:
        return self.choices[self._first[number] + event.copy]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _score_prompt(self, choice: Choice, given: str, event: Routed) -> None:
        if event.prompt_scores is None:
            return
        choice.last = choice.job.prompt[0]
        if choice.job.starts_document:  # nothing predicts a token that the client sent first
            self._append(choice, Score(given[: len(given) - len(self._decode(choice.job.prompt[1:]))]))
        for token, score in zip(choice.job.prompt[1:], event.prompt_scores, strict=True):
            self._score(choice, token, score)
            choice.last = token

    def _score(self, choice: Choice, token: int, score: Alternatives) -> None:
        others = tuple(
            (other if isinstance(other, str) else self._texts.of(other, choice.last), value)
            for other, value in score.most_likely
        )
        self._append(choice, Score(self._texts.of(token, choice.last), score.log_prob, others))

    @staticmethod
    def _append(choice: Choice, score: Score) -> None:
        choice.scores.append(score)
        choice.offsets.append(choice.end)
        choice.end += len(score.text)

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]:
        """Return a complete choice."""

    @abstractmethod
    def _piece(self, choice: Choice, text: str, before: int) -> dict[str, Any]:
        """Return a choice of a chunk."""


class CompletionAnswer(Answer):
    """The answer of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return self._piece(choice, choice.text, 0)

    def _piece(self, choice: Choice, text: str, before: int) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None if choice.job.top is None else self._logprobs(choice, before),
            "finish_reason": choice.finished,
        }

    def _logprobs(self, choice: Choice, before: int) -> dict[str, Any]:
        found = choice.scores[before:]
        return {
            "tokens": [score.text for score in found],
            "token_logprobs": [_finite(score.log_prob) for score in found],
            "top_logprobs": [_by_text(score) for score in found] if choice.job.top else None,
            "text_offset": choice.offsets[before:],
        }


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice, 0),
            "finish_reason": choice.finished,
        }

    def _piece(self, choice: Choice, text: str, before: int) -> dict[str, Any]:
        delta = {"content": text} if choice.begun else {"role": "assistant", "content": text}
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(choice, before),
            "finish_reason": choice.finished,
        }

    def _logprobs(self, choice: Choice, before: int) -> dict[str, Any] | None:
        if choice.job.top is None:
            return None
        content = [
            {
                **_token(score.text, score.log_prob),
                "top_logprobs": [_token(text, value) for text, value in score.others],
            }
            for score in choice.scores[before:]
        ]
        return {"content": content, "refusal": None}


def posterior_answer(job: Job, found: Routed) -> dict[str, Any]:
    """Return the answer of /v1/posterior."""
    answer: dict[str, Any] = {
        "object": "posterior",
        "tokens": job.sent,
        "posterior": found.weights,
        "left_out": list(found.left_out),
    }
    if found.trace is not None:
        answer["trace"] = [dict(zip(found.weights, weights, strict=True)) for weights in found.trace]
    return answer


def _values(job: Job) -> int:
    """Return how many log-probabilities a token has."""
    return 1 + (job.top or 0)


def _finite(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, _LOWEST)


def _by_text(score: Score) -> dict[str, float] | None:
    if score.log_prob is None:
        return None
    row: dict[str, float] = {}
    for text, value in (*score.others, (score.text, score.log_prob)):
        row.setdefault(text, max(value, _LOWEST))  # the first of several tokens with one text is the most likely
    return row


def _token(text: str, log_prob: float | None) -> dict[str, Any]:
    # A token may be a part of a character.
    return {"token": text, "logprob": _finite(log_prob), "bytes": None if _REPLACEMENT in text else list(text.encode())}
