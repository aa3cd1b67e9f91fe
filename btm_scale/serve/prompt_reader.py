"""Prefill: every model reads and scores the prompts, and the scores give the posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.generator import observe_prompts
from btm_scale.generate.model_cache import Shelf
from btm_scale.generate.prompt_scores import prompt_scores, scores_without_alternatives, weights_after
from btm_scale.generate.running_batch import Alternatives
from btm_scale.generate.together import JointReading
from btm_scale.serve.prefixes import PrefixCache
from btm_scale.serve.texts import Part
from btm_scale.serve.work import Job, Routed

# log p(D=j) in nats, [experts], or a function from texts to [texts, experts].
Prior = np.ndarray | Callable[[Sequence[str]], np.ndarray]


def priors_of(prior: Prior, decode: Callable[[Sequence[int]], str], prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the prior of prompts that begin with the start of the document, [experts] or [prompts, experts]."""
    return prior([decode(prompt[1:]) for prompt in prompts]) if callable(prior) else prior


class PromptReader:
    """Reads prompts with the models of a shelf."""

    def __init__(self, shelf: Shelf, tokenizer: Tokenizer, prior: Prior, prefixes: PrefixCache) -> None:
        """`prior`: over the models of jobs that name several."""
        self._shelf, self._tokenizer, self._prior, self._prefixes = shelf, tokenizer, prior, prefixes

    def make_room(self, names: Sequence[str]) -> None:
        """Drop cached prompts, so that these models can be loaded within the memory limit."""
        self._prefixes.shrink(self._shelf.spare(names))

    def together(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """Yield the parts that are read together; a part whose prompt has a cached prefix is read alone."""
        uncached = []
        for part in parts:
            if self._prefixes.find(part.names, part.job.prompt) is None:
                uncached.append(part)
            else:
                yield [part]
        if uncached:
            yield uncached

    def read(
        self, names: Sequence[str], prompts: Sequence[Sequence[int]], *, score: bool, keep: bool
    ) -> tuple[JointReading | None, Tensor | None]:
        """Return the models' reading, if `keep`, and their scores, float32 [models, prompts, longest - 1] in nats.

        There are scores if `score`, or if the prompt's cached prefix has them.
        """
        if not keep:
            return None, torch.stack([self._shelf.take(name).score(prompts) for name in names])
        cached = self._prefixes.find(names, prompts[0]) if len(prompts) == 1 else None
        together = self._shelf.take_together(names, "A mixture")
        if cached is None:
            reading = together.read(prompts, score=score)
        else:
            reading = together.resume([cached.models[name] for name in names], prompts[0], cached.tokens)
        self._remember(names, prompts, reading)
        return reading, reading.scores

    def posterior(
        self, names: Sequence[str], prompts: Sequence[Sequence[int]], scores: Tensor | None
    ) -> RunningPosterior:
        """Return the running posterior after prompts with these scores."""
        posterior = self._before(names, prompts)
        if len(names) > 1:
            assert scores is not None
            observe_prompts(posterior, scores, prompts)
        return posterior

    def routed(self, names: Sequence[str], job: Job, weights: np.ndarray, scores: Tensor | None) -> Routed:
        """Return a job's first event. `scores`: of its prompt alone, [models, longest - 1]."""
        found: list[Alternatives] | None = None
        trace: list[list[float]] | None = None
        if job.score_prompt and not job.top and scores is not None:
            found = scores_without_alternatives(scores, job.prompt, self._before(names, [job.prompt]))
        elif job.score_prompt:
            together = self._shelf.take_together(names, "The log-probability of a prompt")
            found = prompt_scores(together, job.prompt, self._before(names, [job.prompt]), job.top or 0)
        if job.trace and len(names) == 1:
            trace = [[1.0]] * len(job.prompt)
        elif job.trace and scores is not None:
            trace = weights_after(self._before(names, [job.prompt]), scores, job.prompt)
        return Routed(dict(zip(names, weights.tolist(), strict=True)), (), found, trace)

    def _before(self, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> RunningPosterior:
        if len(names) == 1:
            return RunningPosterior(np.zeros(1), len(prompts))
        return RunningPosterior(priors_of(self._prior, self._tokenizer.decode, prompts), len(prompts))

    def _remember(self, names: Sequence[str], prompts: Sequence[Sequence[int]], reading: JointReading) -> None:
        room = self._shelf.spare(())
        for row, prompt in enumerate(prompts):
            if self._prefixes.accepts(len(prompt), reading.prefix_bytes, room):
                prefixes = reading.prefixes(row, len(prompt))
                if prefixes is not None:
                    self._prefixes.keep(prompt, dict(zip(names, prefixes, strict=True)), room)
