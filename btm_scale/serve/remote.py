"""The remote backend: experts behind engines such as vLLM, each with its own OpenAI-compatible URL.

Every engine scores the prompt (vLLM's `prompt_logprobs`), or local weights do; one expert is drawn from the posterior,
and its engine generates the text. Prompts are sent as token ids, so that all experts score the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import httpx2
import numpy as np

from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.serve.engine_answers import prompt_log_probs, read_answer, stream_of
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.local_scores import LocalScores
from btm_scale.serve.work import BackendError, Busy, Delta, Event, Failed, Job, Routed

logger = logging.getLogger(__name__)

_SCORE_SECONDS = 60.0
_CONNECT_SECONDS = 5.0
_DOWN_SECONDS = 5.0  # an engine that failed is left out this long, then tried again
_IMPOSSIBLE = -9999.0  # what vLLM writes for a log-probability of -inf
_MOST_PER_TOKEN = 1 << 10  # characters; an engine that sends more does not count tokens


class EngineDown(Exception):  # noqa: N818 (it names a state)
    """An engine cannot be reached, or failed."""


class RemoteBackend:
    """Answers jobs with engines elsewhere."""

    has_log_probs = False
    max_copies = 128

    def __init__(
        self,
        engines: Mapping[str, RemoteExpert],
        decode: Callable[[Sequence[int]], str],
        prior: Callable[[Sequence[str]], np.ndarray],
        *,
        context: int,
        local: LocalScores | None = None,
        max_waiting: int = 256,
    ) -> None:
        """Args: `prior`: log p(D=j) in nats over the experts, as in `engines`; `local`: scores prompts for some."""
        self._engines, self._decode, self._prior = dict(engines), decode, prior
        self.context, self._most, self._local = context, max_waiting, local
        self.is_ready = False
        self._running = 0
        self._down_until: dict[str, float] = {}
        self._client: httpx2.AsyncClient | None = None

    async def start(self) -> None:
        """Open the connections; an engine that is down now may come later."""
        timeout = httpx2.Timeout(_SCORE_SECONDS, connect=_CONNECT_SECONDS)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits)
        self.is_ready = True

    async def stop(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    def can_mix(self, names: Sequence[str]) -> str | None:
        """See Backend."""
        return "Experts behind remote engines cannot be mixed token by token."

    def load(self) -> dict[str, int]:
        """See Backend."""
        return {"running": self._running, "waiting": 0}

    async def stream(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
        """See Backend."""
        copies = sum(max(1, job.copies) for job in jobs)
        if self._running + copies > self._most:
            raise Busy
        self._running += copies
        inbox: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._answer(number, job, inbox)) for number, job in enumerate(jobs)]
        everything = asyncio.gather(*tasks)
        everything.add_done_callback(lambda _: inbox.put_nowait(None))
        try:
            while (item := await inbox.get()) is not None:
                yield item
        finally:
            self._running -= copies
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, number: int, job: Job, inbox: asyncio.Queue[tuple[int, Event] | None]) -> None:
        def send(event: Event) -> None:
            inbox.put_nowait((number, event))

        try:
            weights, left_out = await self._posterior(job)
            send(Routed(weights, left_out))
            experts = _draw(weights, job)
            async with asyncio.TaskGroup() as texts:
                for copy, name in enumerate(experts):
                    texts.create_task(self._generate(copy, name, job, send))
        except* EngineDown as errors:
            send(Failed(BackendError(str(errors.exceptions[0]))))
        except* Exception as errors:
            logger.exception("a remote request failed")
            send(Failed(errors.exceptions[0]))

    async def _posterior(self, job: Job) -> tuple[dict[str, float], tuple[str, ...]]:
        """Return the posterior of a prompt over the engines that answer, and the experts that are left out."""
        if len(job.names) == 1:
            return {job.names[0]: 1.0}, ()
        scored = await asyncio.gather(*(self._scored(name, job.prompt) for name in job.names))
        alive = [number for number, score in enumerate(scored) if score is not None]
        if not alive:
            raise EngineDown("No expert answers. Retry later.")
        prior = np.atleast_2d(self._prior([self._decode(job.prompt[1:])]))[:, alive]
        posterior = RunningPosterior(prior, 1)
        posterior.observe(np.array([[scored[number] for number in alive]], dtype=np.float64))
        weights = np.exp(posterior.log_weights()[0]).tolist()
        left_out = tuple(name for number, name in enumerate(job.names) if number not in alive)
        return {job.names[number]: weight for number, weight in zip(alive, weights, strict=True)}, left_out

    async def _scored(self, name: str, prompt: Sequence[int]) -> float | None:
        """Return the log-probability of a prompt in nats, or None if the engine is down."""
        if time.monotonic() < self._down_until.get(name, 0):
            return None
        try:
            return await self._score(name, prompt)
        except EngineDown as error:
            logger.warning("%s", error)
            self._down_until[name] = time.monotonic() + _DOWN_SECONDS
            return None

    async def _score(self, name: str, prompt: Sequence[int]) -> float:
        if len(prompt) == 1:  # the start of the document alone
            return 0.0
        if self._local is not None and name in self._local.names:
            return await asyncio.to_thread(self._local.score, name, prompt)
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await self._post(name, body)
        try:
            values = prompt_log_probs(answer, prompt)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise EngineDown(
                f"The engine of '{name}' returned no prompt_logprobs, which the posterior needs. Use vLLM, or set "
                "`score` to the expert's directory."
            ) from None
        if not all(value <= 0 for value in values):
            raise EngineDown(
                f"The engine of '{name}' returned log-probabilities that are positive or not numbers. Serve the run's "
                "expert directory."
            )
        return -np.inf if min(values) <= _IMPOSSIBLE else sum(values)

    async def _post(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._client is not None
        engine = self._engines[name]
        for attempt in range(2):
            try:
                async with self._client.stream(
                    "POST",
                    f"{engine.url.rstrip('/')}/completions",
                    json={"model": engine.model or name, **body},
                    headers=engine.headers,
                ) as response:
                    response.raise_for_status()
                    return await read_answer(response)
            except httpx2.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise EngineDown(_refused(name, error.response.status_code)) from None
            except (httpx2.HTTPError, ValueError) as error:
                reason = str(error) or type(error).__name__
                if attempt:
                    raise EngineDown(f"The engine of '{name}' does not answer: {reason}.") from None
        raise EngineDown(f"The engine of '{name}' fails.")

    async def _generate(self, copy: int, name: str, job: Job, send: Callable[[Event], None]) -> None:
        """Pass the stream of one text on."""
        if job.max_tokens < 1:
            send(Delta(copy, name, "", finished="length"))
            return
        assert self._client is not None
        engine = self._engines[name]
        sampling = job.sampling
        body: dict[str, Any] = {
            "model": engine.model or name,
            "prompt": job.prompt,
            "max_tokens": min(job.max_tokens, max(1, self.context - len(job.prompt))),
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if sampling.top_p is None else {"top_p": sampling.top_p}),
            **({} if sampling.top_k is None else {"top_k": sampling.top_k}),
            **({"stop": list(job.stop)} if job.stop else {}),
            **({} if job.seed is None else {"seed": (job.seed + copy) % (1 << 63)}),
        }
        url = f"{engine.url.rstrip('/')}/completions"
        reason, count, written = None, 0, 0
        try:
            async with self._client.stream("POST", url, json=body, headers=engine.headers) as response:
                if response.status_code != 200:
                    raise EngineDown(_refused(name, response.status_code))
                async for text, ended, tokens in stream_of(response):
                    reason, count = ended or reason, count if tokens is None else tokens
                    written += len(text)
                    if written > _MOST_PER_TOKEN * body["max_tokens"]:
                        raise ValueError(f"it sends more than the {body['max_tokens']} tokens that were asked for")
                    if text:
                        send(Delta(copy, name, text))
        except (httpx2.HTTPError, ValueError) as error:
            self._down_until[name] = time.monotonic() + _DOWN_SECONDS
            raise EngineDown(f"The engine of '{name}' failed: {str(error) or type(error).__name__}.") from None
        if reason is None:
            self._down_until[name] = time.monotonic() + _DOWN_SECONDS
            raise EngineDown(f"The engine of '{name}' ended in the middle of a text.")
        send(Delta(copy, name, "", finished=reason, count=count))  # type: ignore[arg-type]


def _draw(weights: Mapping[str, float], job: Job) -> list[str]:
    """Return the expert of each copy, drawn from the posterior."""
    random = np.random.default_rng(job.seed)
    names, probabilities = list(weights), np.array(list(weights.values()))
    return [names[number] for number in random.choice(len(names), job.copies, p=probabilities / probabilities.sum())]


def _refused(name: str, status: int) -> str:
    return f"The engine of '{name}' answered with status {status}."
