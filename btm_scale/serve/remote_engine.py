"""One expert behind an OpenAI-compatible engine: it scores prompts, generates texts, and is left alone when down."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2

from btm_scale.generate.running_batch import Alternatives
from btm_scale.serve.engine_answers import read_answer, read_events
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.work import Delta, Job, Score

_DOWN_SECONDS, _MOST_DOWN_SECONDS = 5.0, 60.0  # doubled with each failure in a row
_IMPOSSIBLE = -9999.0  # what vLLM writes for a log-probability of -inf
_MOST_PER_TOKEN = 1 << 10  # characters; an engine that sends more does not count tokens
_REASONS = {"stop": "stop", "length": "length"}


class EngineDown(Exception):  # noqa: N818 (it names a state)
    """An engine cannot be reached, or failed; the message may be shown to the client."""


class _Refused(EngineDown):
    """An engine refused a request."""


class RemoteEngine:
    """The expert `name` at `place`."""

    def __init__(self, name: str, place: RemoteExpert, client: httpx2.AsyncClient, context: int) -> None:
        self._name, self._place, self._client, self._context = name, place, client, context
        self._url = f"{place.url.rstrip('/')}/completions"
        self._echoes = False  # whether it scores prompts with `echo` instead of `prompt_logprobs`
        self._failures = 0
        self._down_until = 0.0

    @property
    def is_down(self) -> bool:
        """Whether it failed a short time ago."""
        return time.monotonic() < self._down_until

    def leave_out(self) -> None:
        """Record a failure: the engine is not asked for 5 seconds, and longer if it fails again."""
        self._failures += 1
        self._down_until = time.monotonic() + min(_DOWN_SECONDS * 2 ** (self._failures - 1), _MOST_DOWN_SECONDS)

    async def score(self, prompt: Sequence[int]) -> float:
        """Return the log-probability in nats of a prompt after its first token. Raises EngineDown."""
        if not self._echoes:
            try:
                return sum(score.log_prob for score in await self.prompt_scores(prompt, 0))
            except _Refused as error:  # as engines do that do not know the parameter
                values = await self._echoed(prompt)
                if values is None:
                    raise EngineDown(str(error)) from None
                self._echoes = True
        else:
            values = await self._echoed(prompt)
            if values is None:
                raise EngineDown(self._no_scores())
        return sum(values)

    async def prompt_scores(self, prompt: Sequence[int], top: int) -> list[Alternatives]:
        """Return the log-probability of each token of a prompt but the first, and `top` alternatives.

        Raises EngineDown if the engine fails or has no `prompt_logprobs`.
        """
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        answer = await self._post(body)
        try:
            found = answer["choices"][0].get("prompt_logprobs") or answer["prompt_logprobs"]
            scores = [_alternatives(found[place], token, top) for place, token in enumerate(prompt) if place]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise _Refused(self._no_scores()) from None
        self._require_scores(len(found) == len(prompt), [score.log_prob for score in scores])
        return scores

    async def _echoed(self, prompt: Sequence[int]) -> list[float] | None:
        """Return the log-probabilities of a prompt's tokens but the first; None if the engine echoes none."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        try:
            answer = await self._post(body)
            found = answer["choices"][0]["logprobs"]["token_logprobs"]
            values = [_log_prob(value) for value in found[1 : len(prompt)]]
        except (_Refused, LookupError, TypeError, ValueError, AttributeError):
            return None
        self._require_scores(len(values) == len(prompt) - 1, values)
        return values

    async def generate(self, copy: int, job: Job) -> AsyncIterator[Delta]:
        """Yield a text as the engine streams it. Raises EngineDown."""
        reason, count, written = None, 0, 0
        body = self._body(copy, job)
        try:
            async with self._client.stream("POST", self._url, json=body, headers=self._place.headers) as response:
                if response.status_code != 200:
                    if response.status_code >= 500:
                        self.leave_out()
                    raise _Refused(f"The engine of '{self._name}' answered with status {response.status_code}.")
                async for event in read_events(response):
                    texts, ended, tokens = self._read(event, job.top)
                    reason, count = ended or reason, count if tokens is None else tokens
                    for text, scores in texts:
                        written += len(text)
                        if written > _MOST_PER_TOKEN * body["max_tokens"]:
                            raise ValueError(f"it sends more than the {body['max_tokens']} tokens that were asked for")
                        yield Delta(copy, self._name, text, scores=scores)
        except (httpx2.HTTPError, ValueError) as error:
            self.leave_out()
            raise EngineDown(f"The engine of '{self._name}' failed: {_reason(error)}.") from None
        if reason is None:
            self.leave_out()
            raise EngineDown(f"The engine of '{self._name}' ended in the middle of a text.")
        self._failures = 0
        yield Delta(copy, self._name, "", finished=_REASONS.get(reason, "stop"), count=count)  # type: ignore[arg-type]

    def _read(
        self, event: dict[str, Any], top: int | None
    ) -> tuple[list[tuple[str, tuple[Score, ...]]], str | None, int | None]:
        """Return the texts of an event, why the text ended, and how many tokens it has, as far as known.

        Raises ValueError for an event that is not as OpenAI's API has it.
        """
        texts, reason = [], None
        try:
            for choice in event.get("choices") or ():
                text, ended = choice.get("text") or "", choice.get("finish_reason")
                if not isinstance(text, str):
                    raise TypeError
                reason = reason if ended is None else str(ended)
                scores = () if top is None else self._scores(choice, top)
                if text or scores:
                    texts.append((text, scores))
            count = (event.get("usage") or {}).get("completion_tokens")
        except (LookupError, TypeError, AttributeError):
            raise ValueError("an event of its stream is not as OpenAI's API has it") from None
        return texts, reason, count if type(count) is int and count >= 0 else None

    def _body(self, copy: int, job: Job) -> dict[str, Any]:
        sampling = job.sampling
        return {
            "model": self._place.model or self._name,
            "prompt": job.prompt,
            "max_tokens": min(job.max_tokens, max(1, self._context - len(job.prompt))),
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if sampling.top_p is None else {"top_p": sampling.top_p}),
            **({} if sampling.top_k is None else {"top_k": sampling.top_k}),
            **({"stop": list(job.stop)} if job.stop else {}),
            **({} if job.seed is None else {"seed": (job.seed + copy) % (1 << 63)}),
            **({} if job.top is None else {"logprobs": job.top}),
        }

    def _scores(self, choice: dict[str, Any], top: int) -> tuple[Score, ...]:
        found = choice.get("logprobs")
        if not found:
            if choice.get("text"):
                raise EngineDown(f"The engine of '{self._name}' returns no log-probabilities. Leave logprobs out.")
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

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request, which is sent twice if the connection or the engine fails."""
        reason = ""
        for _ in range(2):
            try:
                request = {"model": self._place.model or self._name, **body}
                async with self._client.stream(
                    "POST", self._url, json=request, headers=self._place.headers
                ) as response:
                    response.raise_for_status()
                    answer = await read_answer(response)
                self._failures = 0
                return answer
            except httpx2.HTTPStatusError as error:
                reason = f"status {error.response.status_code}"
                if error.response.status_code < 500:
                    raise _Refused(f"The engine of '{self._name}' answered with {reason}.") from None
            except httpx2.TimeoutException as error:  # the client waits already
                raise EngineDown(f"The engine of '{self._name}' does not answer: {_reason(error)}.") from None
            except (httpx2.HTTPError, ValueError) as error:
                reason = _reason(error)
        raise EngineDown(f"The engine of '{self._name}' does not answer: {reason}.")

    def _no_scores(self) -> str:
        return (
            f"The engine of '{self._name}' returned no prompt_logprobs and echoes none, which the posterior needs. Use "
            "vLLM or SGLang, or set `score` to the expert's directory."
        )

    def _require_scores(self, is_complete: bool, values: Sequence[float]) -> None:
        if not is_complete:
            raise EngineDown(f"The engine of '{self._name}' scored different tokens. Serve the run's expert directory.")
        if not all(value <= 0 for value in values):
            raise EngineDown(
                f"The engine of '{self._name}' returned log-probabilities that are positive or not numbers. Serve the "
                "run's expert directory."
            )


def _alternatives(found: dict[str, Any], token: int, top: int) -> Alternatives:
    """Return a token's score from vLLM's {id: {logprob, rank, ...}}, which has the token itself too."""
    most_likely = sorted(
        ((int(key), _log_prob(value["logprob"])) for key, value in found.items()), key=lambda one: -one[1]
    )
    return Alternatives(_log_prob(found[str(token)]["logprob"]), tuple(most_likely[:top]))


def _largest(found: dict[str, Any], top: int) -> tuple[tuple[str, float], ...]:
    """Return the `top` most likely texts: engines add the token that was chosen."""
    values = [(str(text), _log_prob(value)) for text, value in found.items()]
    return tuple(sorted(values, key=lambda one: -one[1])[:top])


def _log_prob(value: Any) -> float:
    return float("-inf") if float(value) <= _IMPOSSIBLE else float(value)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
