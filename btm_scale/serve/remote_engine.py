"""One expert behind an OpenAI-compatible engine: it scores prompts, generates texts, and is left alone when down."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import numpy as np

from btm_scale.generate.running_batch import Alternatives
from btm_scale.serve.engine_answers import parse_object, read_events
from btm_scale.serve.engine_client import FAILURES, EngineClient, EngineDown, described
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.pools import Pool
from btm_scale.serve.work import Delta, Job, Refused, Score

logger = logging.getLogger(__name__)

_DOWN_SECONDS, _MOST_DOWN_SECONDS = 5.0, 60.0  # doubled with each failure in a row
_MOST_BREAKS = 1  # a stream may break because of its connection alone; a second one in a row is the engine
_IMPOSSIBLE = -9999.0  # what vLLM writes for a log-probability of -inf
_MOST_PER_TOKEN = 1 << 10  # characters; an engine that sends more does not count tokens
_INLINE_BYTES = 1 << 15  # an answer of this size is parsed faster than a thread takes over
_REASONS = {"stop": "stop", "length": "length"}
# Engines change the distribution by default: llama.cpp by its own settings, vLLM and SGLang by generation_config.json.
_NOTHING_CUT_OFF: dict[str, float] = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_ABORTED = ("abort", "error", "cancelled")  # why a text ended that is not complete


class _NoScores(Exception):  # noqa: N818 (it names a state)
    """An answer has no log-probabilities of the prompt."""


class RemoteEngine:
    """The expert `name` at `place`."""

    def __init__(
        self, name: str, place: RemoteExpert, session: aiohttp.ClientSession, context: int, parsers: Pool
    ) -> None:
        self._name, self._context, self._parsers = name, context, parsers
        self._client = EngineClient(name, place, session)
        self._echoes: bool | None = None  # scores prompts with `echo`, or with `prompt_logprobs`; None: not known yet
        self._takes_samplers: bool | None = None  # that cut nothing off, or refuses them; None: not known yet
        self._failures = self._breaks = 0  # in a row
        self._down_until = 0.0

    @property
    def is_down(self) -> bool:
        """Whether it failed a short time ago."""
        return time.monotonic() < self._down_until

    def leave_out(self) -> None:
        """Record a failure: the engine is not asked for 5 seconds, and longer if it fails again then."""
        if self.is_down:  # requests at the same time fail for one reason
            return
        self._failures += 1
        self._down_until = time.monotonic() + min(_DOWN_SECONDS * 2 ** (self._failures - 1), _MOST_DOWN_SECONDS)

    async def score(self, prompt: Sequence[int]) -> np.ndarray:
        """Return the log-probability in nats of each token of a prompt but the first, float64 [tokens - 1].

        Raises EngineDown if the engine fails or returns no scores, Busy, and Refused for a prompt that is too long.
        """
        try:
            scores = await self._scores_of(prompt)
        except _NoScores:
            raise EngineDown(
                f"The engine of '{self._name}' returned no prompt_logprobs and echoes none, which the posterior needs. "
                "Use vLLM or SGLang, or set `score` to the expert's directory."
            ) from None
        return np.array([score.log_prob for score in scores])

    async def _scores_of(self, prompt: Sequence[int], top: int = 0) -> list[Alternatives]:
        """Return the scores of a prompt, and remember how the engine gives them. Raises _NoScores if it cannot."""
        if self._echoes is not None:
            return await self._asked(prompt, self._echoes, top)
        refusal: Refused | None = None
        for echoes in (False, True):
            try:
                scores = await self._asked(prompt, echoes, top)
            except Refused as error:  # as engines do that do not know the parameter, or for a prompt that is too long
                if refusal is not None:
                    raise
                refusal = error
            except _NoScores:
                if echoes:
                    raise
            else:
                self._echoes = echoes
                return scores
        raise _NoScores

    async def prompt_scores(self, prompt: Sequence[int], top: int) -> list[Alternatives]:
        """Return the log-probability of each token of a prompt but the first, and `top` alternatives.

        Raises EngineDown if the engine fails, Busy, and Refused, also if the engine returns no scores of prompts.
        """
        try:
            return await self._scores_of(prompt, top)
        except _NoScores:
            raise Refused(
                f"The engine of '{self._name}' returns no log-probabilities of prompts. Leave echo or logprobs out."
            ) from None

    async def _asked(self, prompt: Sequence[int], echoes: bool, top: int) -> list[Alternatives]:
        wish = {"echo": True, "logprobs": max(1, top)} if echoes else {"prompt_logprobs": top}
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **wish}
        read = _echoed if echoes else _prompt_logprobs
        try:
            content = await self._client.ask(body)
            if len(content) <= _INLINE_BYTES:
                scores = read(parse_object(content), prompt, top)
            else:  # of a long prompt; meanwhile, the event loop serves the streams of others
                scores = await self._parsers.run(lambda: read(parse_object(content), prompt, top))
        except ValueError as error:
            raise self._client.down(error) from None
        if len(scores) != len(prompt) - 1:
            raise EngineDown(f"The engine of '{self._name}' scored different tokens. Serve the run's expert directory.")
        values = (value for score in scores for value in (score.log_prob, *(other for _, other in score.most_likely)))
        if not all(value <= 0 for value in values):
            raise EngineDown(
                f"The engine of '{self._name}' returned log-probabilities that are positive or not numbers. Serve the "
                "run's expert directory."
            )
        self._failures = 0
        return scores

    async def generate(self, copy: int, job: Job) -> AsyncIterator[Delta]:
        """Yield a text as the engine streams it. Raises EngineDown, Busy and Refused."""
        reason, count, pieces, written = None, None, 0, 0
        body = self._body(copy, job)
        try:
            response = await self._opened(body)
        except EngineDown:
            self.leave_out()
            raise
        try:
            async for events in read_events(response, self._client.answer_seconds):
                texts = ""
                scores: tuple[Score, ...] = ()
                for event in events:
                    text, more, ended, tokens = self._read(event, job.top)
                    texts, scores, pieces = texts + text, scores + more, pieces + bool(text)
                    reason, count = ended or reason, count if tokens is None else tokens
                if reason in _ABORTED:
                    raise ValueError("it aborted the text")
                written += len(texts)
                if written > _MOST_PER_TOKEN * body["max_tokens"]:
                    raise ValueError(f"it sends more than the {body['max_tokens']} tokens that were asked for")
                if texts or scores:
                    yield Delta(copy, self._name, texts, scores=scores)
        except (*FAILURES, ValueError) as error:
            self._broke(always=isinstance(error, TimeoutError))
            raise EngineDown(f"The engine of '{self._name}' failed: {described(error)}.") from None
        finally:
            response.close()
        if reason is None:
            self._broke()
            raise EngineDown(f"The engine of '{self._name}' ended in the middle of a text.")
        self._failures = self._breaks = 0
        # Engines that do not count tokens send one per event, mostly.
        count = pieces if count is None else count
        yield Delta(copy, self._name, "", finished=_REASONS.get(reason, "stop"), count=count)  # type: ignore[arg-type]

    async def _opened(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """Return the response to a request for a text, sampled as the request says and not by the engine's defaults."""
        if self._takes_samplers is False:
            return await self._client.open(body)
        try:
            response = await self._client.open(_NOTHING_CUT_OFF | body)
            self._takes_samplers = True
        except Refused as error:
            if self._takes_samplers:
                raise
            response = await self._client.open(body)  # TGI, whose defaults cut nothing off, refuses a top_p of 1
            self._takes_samplers = False
            logger.warning("%s Texts are sampled with its defaults for top_p, top_k and min_p.", error)
        return response

    def _broke(self, always: bool = False) -> None:
        """Record a stream that broke off."""
        self._breaks += 1
        if always or self._breaks > _MOST_BREAKS:
            self.leave_out()

    def _read(self, event: dict[str, Any], top: int | None) -> tuple[str, tuple[Score, ...], str | None, int | None]:
        """Return the text of an event and its scores, why the text ended, and how many tokens it has, as far as known.

        Raises ValueError for an event that is not as OpenAI's API has it.
        """
        texts, reason = "", None
        scores: tuple[Score, ...] = ()
        try:
            for choice in event.get("choices") or ():
                text = choice.get("text") or ""
                if not isinstance(text, str):
                    raise TypeError
                # Engines send null or "" until the text ends.
                reason = str(choice.get("finish_reason") or "") or reason
                texts += text
                scores += () if top is None else self._scores(choice, top)
            count = (event.get("usage") or {}).get("completion_tokens")
        except (LookupError, TypeError, AttributeError):
            raise ValueError("an event of its stream is not as OpenAI's API has it") from None
        return texts, scores, reason, count if type(count) is int and count >= 0 else None

    def _body(self, copy: int, job: Job) -> dict[str, Any]:
        sampling = job.sampling
        # Engines search the text for `stop`, and leave special tokens such as an end of turn out of it by default.
        stop = {"stop": list(job.stop), "skip_special_tokens": False} if job.stop else {}
        return {
            "prompt": job.prompt,
            "max_tokens": min(job.max_tokens, max(1, self._context - len(job.prompt))),
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if sampling.top_p is None else {"top_p": sampling.top_p}),
            **({} if sampling.top_k is None else {"top_k": sampling.top_k}),
            **stop,
            **({} if job.seed is None else {"seed": _seed(job.seed, copy)}),
            **({} if job.top is None else {"logprobs": job.top}),
        }

    def _scores(self, choice: dict[str, Any], top: int) -> tuple[Score, ...]:
        found = choice.get("logprobs")
        if not found:
            if choice.get("text"):
                raise Refused(f"The engine of '{self._name}' returns no log-probabilities. Leave logprobs out.")
            return ()
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        scores = []
        for text, value, others in zip(found["tokens"], found["token_logprobs"], tops, strict=True):
            log_prob, alternatives = _log_prob(value), _largest(others or {}, top)
            # NaN and infinity, which JSON lacks, would fail in the answer to the client.
            if not all(one < math.inf for one in (log_prob, *(number for _, number in alternatives))):
                raise ValueError("it sends log-probabilities that are not numbers")
            scores.append(Score(str(text), log_prob, alternatives))
        return tuple(scores)


def _seed(seed: int, copy: int) -> int:
    """Return the seed of a copy, of 63 bits; the copies of neighbouring seeds have none in common."""
    return int(np.random.SeedSequence(seed, spawn_key=(copy,)).generate_state(1, np.uint64)[0]) >> 1


def _prompt_logprobs(answer: dict[str, Any], prompt: Sequence[int], top: int) -> list[Alternatives]:
    """Return the scores in vLLM's rows {id: {logprob, rank, ...}}, of which the first is null."""
    try:
        rows = answer["choices"][0].get("prompt_logprobs") or answer["prompt_logprobs"]
        if len(rows) != len(prompt):
            return []
        return [_alternatives(row, str(token), top) for token, row in zip(prompt[1:], rows[1:], strict=True)]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise _NoScores from None


def _echoed(answer: dict[str, Any], prompt: Sequence[int], top: int) -> list[Alternatives]:
    """Return the scores in OpenAI's `logprobs` of an echoed prompt, after which the text may follow."""
    try:
        found = answer["choices"][0]["logprobs"]
        values = found["token_logprobs"][1 : len(prompt)]
        if top == 0:
            return [Alternatives(_log_prob(value)) for value in values]
        others = found["top_logprobs"][1 : len(prompt)]
        return [Alternatives(_log_prob(value), _largest(row, top)) for value, row in zip(values, others, strict=True)]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise _NoScores from None


def _alternatives(row: dict[str, Any], token: str, top: int) -> Alternatives:
    """Return a token's score, and the `top` most likely tokens of a row, which has the token itself too."""
    score = _log_prob(row[token]["logprob"])
    if top == 0:
        return Alternatives(score)
    values = ((int(key), _log_prob(value["logprob"])) for key, value in row.items())
    return Alternatives(score, tuple(sorted(values, key=lambda one: -one[1])[:top]))


def _largest(found: dict[str, Any], top: int) -> tuple[tuple[str, float], ...]:
    """Return the `top` most likely texts: engines add the token that was chosen."""
    values = [(str(text), _log_prob(value)) for text, value in found.items()]
    return tuple(sorted(values, key=lambda one: -one[1])[:top])


def _log_prob(value: Any) -> float:
    return float("-inf") if float(value) <= _IMPOSSIBLE else float(value)
