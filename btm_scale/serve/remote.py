"""The remote backend: experts behind engines such as vLLM, each with its own OpenAI-compatible URL.

Every engine scores the prompt (`prompt_logprobs` of vLLM, `echo` of SGLang), or local weights do; one expert is drawn
from the posterior, and its engine generates the text. Prompts are sent as token ids, so that all experts score the same
tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np
import torch

from btm_scale.errors import UserError
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.prompt_scores import weights_after
from btm_scale.serve.engine_client import EngineDown, open_session
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.local_scores import LocalScores
from btm_scale.serve.pools import Pool
from btm_scale.serve.prompt_reader import Prior, priors_of
from btm_scale.serve.remote_engine import RemoteEngine
from btm_scale.serve.work import BackendError, Busy, Delta, Event, Failed, Job, Refused, Routed

logger = logging.getLogger(__name__)

_SCORE_SECONDS = 60.0
_MOST_COPIES = 128
_ATTEMPTS = 2  # of a request of which the client has seen nothing


class RemoteBackend:
    """Answers jobs with engines elsewhere."""

    def __init__(
        self,
        engines: Mapping[str, RemoteExpert],
        decode: Callable[[Sequence[int]], str],
        prior: Prior,
        *,
        context: int,
        local: LocalScores | None = None,
        max_waiting: int = 256,
        answer_seconds: float = _SCORE_SECONDS,
    ) -> None:
        """Prepare to answer with engines.

        Args:
            decode: from token ids to text, for a prior that depends on the prompt.
            prior: log p(D=j) in nats over the experts, in the order of `engines`.
            context: tokens that every engine can read and generate.
            local: scores prompts for the experts that it names.
            max_waiting: texts that may run at a time.
            answer_seconds: an engine from which nothing comes for this long is down.
        """
        self._places, self._decode, self._prior = dict(engines), decode, prior
        # An engine that scores a prompt also generates one token, which must fit into its context.
        self.context = context - 1
        self.max_copies = min(_MOST_COPIES, max_waiting)
        self._engine_context, self._most, self._local = context, max_waiting, local
        self.is_ready = False
        self._running, self._seconds = 0, answer_seconds
        self._engines: dict[str, RemoteEngine] = {}
        self._session: aiohttp.ClientSession | None = None
        # One thread computes with models, because each that does has its own OpenMP threads.
        self._models = Pool("models", 1, max_waiting=max_waiting * (len(engines) + 1))
        self._parsers = Pool("parser", 1, max_waiting=max_waiting * len(engines))

    async def start(self) -> None:
        """Open the connections; an engine that is down now may come later."""
        session = self._session = open_session(self._seconds)
        self._engines = {
            name: RemoteEngine(name, place, session, self._engine_context, self._parsers)
            for name, place in self._places.items()
        }
        self.is_ready = True

    async def stop(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

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
        try:
            for left in reversed(range(_ATTEMPTS)):
                sent: list[Event] = []
                try:
                    await self._attempt(job, lambda event: inbox.put_nowait((number, event)), sent)
                    return
                except EngineDown:  # another expert, or a second stream of this one, may answer
                    is_visible = job.stream and bool(sent)
                    if left == 0 or is_visible or all(self._engines[name].is_down for name in job.names):
                        raise
        except (Busy, Refused) as error:
            inbox.put_nowait((number, Failed(error)))
        except (EngineDown, UserError) as error:  # also local weights that were removed
            logger.warning("%s", error)
            inbox.put_nowait((number, Failed(BackendError(str(error)))))
        except Exception as error:
            logger.exception("a remote request failed")
            inbox.put_nowait((number, Failed(error)))

    async def _attempt(self, job: Job, deliver: Callable[[Event], None], sent: list[Event]) -> None:
        """Answer a job, and record its events in `sent`.

        A stream is delivered as it comes, from its first text on, since an error before it still has a status. Other
        answers are delivered when they are complete.
        """

        def send(event: Event) -> None:
            sent.append(event)
            if job.stream:
                deliver(event)

        routed = await self._routed(job)

        async def generate(copy: int, name: str) -> None:
            async for delta in self._deltas(copy, name, job):
                if not sent:
                    send(routed)
                send(delta)

        if job.copies:
            await _together([generate(copy, name) for copy, name in enumerate(_draw(routed.weights, job))])
        else:
            sent.append(routed)
        if not job.stream:
            for event in sent:
                deliver(event)

    async def _routed(self, job: Job) -> Routed:
        """Return the posterior of a prompt over the engines that answer, and the experts that are left out."""
        if len(job.names) == 1:
            (name,) = job.names
            scores = await self._engines[name].prompt_scores(job.prompt, job.top or 0) if job.score_prompt else None
            return Routed({name: 1.0}, prompt_scores=scores, trace=[[1.0]] * len(job.prompt) if job.trace else None)
        scored = await _together([self._scored(name, job.prompt) for name in job.names])
        alive = [number for number, score in enumerate(scored) if score is not None]
        if not alive:
            raise EngineDown("No expert answers. Retry later.")
        priors: Any = self._prior
        if callable(self._prior):  # embeds the text
            priors = await self._models.run(priors_of, self._prior, self._decode, [job.prompt])
        prior = np.atleast_2d(priors)[:, alive]
        log_probs = np.array([scored[number] for number in alive])
        posterior = RunningPosterior(prior, 1)
        posterior.observe(log_probs.sum(axis=1)[None])
        weights = np.exp(posterior.log_weights()[0]).tolist()
        left_out = tuple(name for number, name in enumerate(job.names) if number not in alive)
        trace = None
        if job.trace:
            before = RunningPosterior(prior, 1)
            trace = await self._models.run(weights_after, before, torch.from_numpy(log_probs), job.prompt)
        return Routed(
            {job.names[number]: weight for number, weight in zip(alive, weights, strict=True)}, left_out, trace=trace
        )

    async def _scored(self, name: str, prompt: Sequence[int]) -> np.ndarray | None:
        """Return the log-probabilities in nats of a prompt's tokens but the first, or None if the engine is down."""
        engine = self._engines[name]
        if engine.is_down:
            return None
        try:
            if len(prompt) == 1:  # the start of the document alone
                return np.zeros(0)
            if self._local is not None and name in self._local.names:
                return await self._models.run(self._local.score, name, prompt)
            return await engine.score(prompt)
        except (EngineDown, FloatingPointError) as error:  # local weights may have diverged
            logger.warning("%s", error)
            engine.leave_out()
            return None

    async def _deltas(self, copy: int, name: str, job: Job) -> AsyncIterator[Delta]:
        """Yield the stream of one text."""
        if job.max_tokens < 1:
            yield Delta(copy, name, "", finished="length")
            return
        async for delta in self._engines[name].generate(copy, job):
            yield delta


async def _together(works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return the results of coroutines; the first failure ends the others."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _draw(weights: Mapping[str, float], job: Job) -> list[str]:
    """Return the expert of each copy, drawn from the posterior."""
    random = np.random.default_rng(job.seed)
    names, probabilities = list(weights), np.array(list(weights.values()))
    return [names[number] for number in random.choice(len(names), job.copies, p=probabilities / probabilities.sum())]
