"""Generate text from a forest: by one expert sampled from the prompt's posterior, or from the mixture token by token.

At temperature 1, without top-k and top-p, the mixture under the paper's posterior is sampled exactly by sampling one
expert from p(D=j | prompt) for the complete text: p(text | prompt) = sum_j p(D=j | prompt) p(text | prompt, D=j).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btm_scale.config.evaluation import Tempering
from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import UserError
from btm_scale.forest.posterior.evidence import Mode, RunningPosterior
from btm_scale.generate.detokenizer import Transcript
from btm_scale.generate.device_posterior import DevicePosterior
from btm_scale.generate.model_cache import Shelf, shared_context
from btm_scale.generate.request import Batch, Finished, Generation, Piece, check_settings
from btm_scale.generate.sampling import Sampling, Step, decode, from_drawn_expert, from_mixture, refuse_nan
from btm_scale.generate.together import JointReading, Together
from btm_scale.model.hf_decoder import usable_device
from btm_scale.run_dir import RunDir

Router = Callable[[Sequence[str]], np.ndarray]


class Generator:
    """Generates text from experts on disk. `Generator.of_run` takes experts, prior and tokenizer from a run."""

    def __init__(
        self,
        models: Mapping[str, Path],
        tokenizer: Tokenizer,
        *,
        log_prior: np.ndarray | None = None,
        router: Router | None = None,
        method: str = "expert",
        posterior: str = "prefix",
        tempering: Tempering | None = None,
        sampling: Sampling | None = None,
        max_bytes: float | None = None,
        device: str | None = None,
    ) -> None:
        """Check the settings, and load all models if the method needs them at once.

        Args:
            models: Hugging Face directories by name.
            log_prior: [models] in nats. Default: uniform.
            router: returns a prior for each prompt instead, [prompts, models].
            method: one of METHODS.
            posterior: one of POSTERIORS.
            max_bytes: of weights in memory at a time. Default: no limit.

        Raises:
            UserError: the settings are incompatible.
            ForestError, CheckpointError: the models are incompatible or cannot be read.
        """
        self.sampling = sampling or Sampling()
        check_settings(method, posterior, self.sampling)
        self.names = list(models)
        self.method = method
        self.tokenizer = tokenizer
        self.context = shared_context(models, tokenizer)
        self.device = usable_device(device)
        self.shelf = Shelf(models, vocabulary=tokenizer.vocab_size, max_bytes=max_bytes, device=self.device)
        self.log_prior = np.zeros(len(models)) if log_prior is None else log_prior
        self._router = router
        self.mode: Mode = posterior  # type: ignore[assignment]
        self.tempering = tempering if posterior == "tempered" else None
        if method != "expert":
            self.shelf.take_together(self.names, f"Method '{method}'")

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        run: RunDir,
        *,
        models: Sequence[str] = (),
        prior: str = "cached",
        domain: str | None = None,
        posterior: str = "prefix",
        tempering: Tempering | None = None,
        route_top_k: int | None = None,
        **settings: Any,
    ) -> Generator:
        """Return a generator for a run's experts, or for `models` (experts, seed, dense, average/uniform, ...).

        Args:
            prior: `cached` or `static`, from the dev text of `domain` or pooled over all training domains; `uniform`;
                or `routed`: each prompt is routed to its `route_top_k` nearest clusters of the clustering that
                discovered the domains.
            tempering: of the posterior `tempered`. Default: the config's, or one that is fitted to the same dev text.
        """
        from btm_scale.forest.priors import generation_tempering, log_prior_of, models_of, router_of

        names = models_of(run, models)
        log_prior = log_prior_of(config, run, names, prior, domain)
        if posterior == "tempered" and tempering is None:
            tempering = generation_tempering(config, run, names, log_prior, domain)
        return cls(
            {name: run.model(name) for name in names},
            Tokenizer.load(run.tokenizer),
            log_prior=log_prior,
            router=router_of(config, names, prior, route_top_k),
            posterior=posterior,
            tempering=tempering,
            **settings,
        )

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[Generation]:
        """Return the continuation of each prompt; takes the arguments of `stream`."""
        generations = {piece.prompt: piece.whole for piece in self.stream(prompts, **settings) if piece.whole}
        return [generations[number] for number in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        random_seed: int = 0,
        batch: int = 32,
        encoded: Sequence[list[int]] | None = None,
    ) -> Iterator[Piece]:
        """Continue prompts in batches of `batch`, and yield every piece of text as soon as it is final.

        A prompt is the beginning of a document. `encoded` gives the prompts' token ids, if they are not those of plain
        text. A continuation ends with the document, before a `stop` string, after `max_tokens`, or when the experts'
        context is full. Raises `UserError` for a prompt longer than the context.
        """
        if max_tokens < 0 or batch < 1:
            raise UserError(f"max-tokens is {max_tokens} and batch is {batch}. Use at least 0 tokens and 1 prompt.")
        if encoded is None:
            encoded = [own.tolist() for own in self.tokenizer.encode_batch(prompts)]
            ids = [[self.tokenizer.start, *own] for own in encoded]
        else:
            start = self.tokenizer.start
            ids = [own if own[:1] == [start] else [start, *own] for own in encoded]
        rooms = [self._room(number, len(tokens)) for number, tokens in enumerate(ids)]
        random = torch.Generator(self.device).manual_seed(random_seed)
        for first in range(0, len(ids), batch):
            part = slice(first, first + batch)
            limits = np.minimum(rooms[part], max_tokens)
            yield from self._write(Batch(ids[part], limits), prompts, first, max_tokens, stop, random)

    def steps(self, batch: Batch, random: torch.Generator) -> Iterator[Step]:
        """Yield the tokens of a batch, step by step."""
        return self._by_one_expert(batch, random) if self.method == "expert" else self._by_all(batch, random)

    def _by_one_expert(self, batch: Batch, random: torch.Generator) -> Iterator[Step]:
        running = RunningPosterior(self._prior_of(batch.prompts), len(batch.prompts))
        together: JointReading | None = None
        if len(self.names) > 1 and self._reads_together():
            together = self.shelf.take_together(self.names, "Method 'expert'").read(batch.prompts)
            assert together.scores is not None
            observe_prompts(running, together.scores, batch.prompts)
        elif len(self.names) > 1:
            scores = [self.shelf.take(name).score(batch.prompts) for name in self.names]
            observe_prompts(running, torch.stack(scores), batch.prompts)
        batch.posterior = np.exp(running.log_weights())
        weights = torch.as_tensor(batch.posterior, device=self.device)
        batch.drawn = torch.multinomial(weights, 1, generator=random).squeeze(1).cpu().numpy()
        texts_of = {int(expert): np.flatnonzero(batch.drawn == expert) for expert in np.unique(batch.drawn)}
        read = {}
        if together is not None:
            # What the other experts computed for a text is not needed any more.
            read = {expert: together.of_model(expert).select(texts.tolist()) for expert, texts in texts_of.items()}
            together = None
        # In reverse: the experts that read the prompts last are still in memory.
        for expert, texts in reversed(texts_of.items()):
            reading = read.pop(expert, None)
            if reading is None:
                decoder = Together([self.shelf.take(self.names[expert])])
                reading = decoder.read([batch.prompts[int(text)] for text in texts], score=False)
            finished = batch.finished[texts]
            alone = RunningPosterior(np.zeros(1), len(texts))
            for step in decode(
                reading,
                DevicePosterior(alone, self.device),
                from_mixture(Sampling()),
                limits=batch.limits[texts],
                end=self.tokenizer.eos,
                finished=finished,
                generator=random,
            ):
                yield Step(texts[step.texts], step.tokens)
                finished |= batch.finished[texts]
            batch.finished[texts] = True

    def _reads_together(self) -> bool:
        """Whether all experts read prompts as one model: a CPU gains less than it takes to stack their weights."""
        return self.device != "cpu" and self.shelf.fit(self.names)

    def _by_all(self, batch: Batch, random: torch.Generator) -> Iterator[Step]:
        reading, running = self.begin(batch.prompts)
        batch.posterior = np.exp(running.log_weights())
        choose = from_drawn_expert if self.method == "per-token" else from_mixture(self.sampling)
        return decode(
            reading,
            DevicePosterior(running, self.device),
            choose,
            limits=batch.limits,
            end=self.tokenizer.eos,
            finished=batch.finished,
            generator=random,
        )

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[JointReading, RunningPosterior]:
        """Read prompts of at least one token with all models; return their reading and the running posterior."""
        reading = self.shelf.take_together(self.names, "A mixture").read(prompts, score=len(self.names) > 1)
        running = RunningPosterior(self._prior_of(prompts), len(prompts), mode=self.mode, tempering=self.tempering)
        if reading.scores is not None:
            observe_prompts(running, reading.scores, prompts)
        return reading, running

    def _prior_of(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        if self._router is None:
            return self.log_prior
        return self._router([self.tokenizer.decode(prompt[1:]) for prompt in prompts])

    def _write(
        self,
        batch: Batch,
        prompts: Sequence[str],
        first: int,
        max_tokens: int,
        stop: Sequence[str],
        random: torch.Generator,
    ) -> Iterator[Piece]:
        transcripts = [Transcript(self.tokenizer.decode, tokens, stop) for tokens in batch.prompts]
        done: set[int] = set()
        steps = self.steps(batch, random)
        while True:
            step = next(steps, None)
            for text, token in zip(step.texts.tolist(), step.tokens.tolist(), strict=True) if step else ():
                transcript, ended = transcripts[text], token == self.tokenizer.eos
                emitted = "" if ended else transcript.add(token)
                reason: Finished | None = None
                if ended:
                    reason = "end"
                elif transcript.stopped:
                    reason = "stop"
                elif len(transcript.tokens) == batch.limits[text]:
                    reason = "length" if batch.limits[text] == max_tokens else "context"
                if reason is None:
                    if emitted:
                        yield Piece(first + text, emitted)
                    continue
                batch.finished[text] = True
                done.add(text)
                emitted += transcript.finish()
                yield Piece(first + text, emitted, self._result(batch, text, prompts[first + text], transcript, reason))
            if step is None:
                break
        for text in sorted(set(range(len(transcripts))) - done):  # max_tokens is 0
            yield Piece(first + text, "", self._result(batch, text, prompts[first + text], transcripts[text], "length"))

    def _result(self, batch: Batch, text: int, prompt: str, transcript: Transcript, reason: Finished) -> Generation:
        weights = dict(zip(self.names, batch.posterior[text].tolist(), strict=True))
        expert = None if batch.drawn is None else self.names[batch.drawn[text]]
        return Generation(prompt, transcript.text, transcript.tokens, reason, weights, expert)

    def _room(self, number: int, tokens: int) -> int:
        if tokens > self.context:
            raise UserError(
                f"Prompt {number + 1} has {tokens} tokens, including the start of the document. These experts read at "
                f"most {self.context}: shorten it, or train experts with a longer budget.sequence_length."
            )
        return self.context - tokens + 1


def observe_prompts(running: RunningPosterior, scores: torch.Tensor, prompts: Sequence[Sequence[int]]) -> None:
    """Update a posterior with the experts' scores of prompts, float32 [experts, prompts, longest - 1], left-padded.

    Raises `FloatingPointError` if a score is NaN.
    """
    log_probs = scores.permute(1, 2, 0).double().cpu().numpy()
    refuse_nan(log_probs)
    longest = log_probs.shape[1] + 1
    begins = np.array([longest - len(prompt) for prompt in prompts])
    running.observe_text(log_probs, np.arange(longest - 1) >= begins[:, None])
