"""The local backend: one thread holds the models and continues all texts together, step by step.

Requests join between two steps, at most one batch of prompts at a time, so that reading prompts does not stop the
running texts. Texts under the same models share a batch, so that a forest of E experts takes at most
E forward passes per step, however many clients wait; the mixture of experts that are alike takes one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import UserError
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.detokenizer import Transcript
from btm_scale.generate.model_cache import Shelf, shared_context
from btm_scale.generate.running_batch import Alternatives, Row, RunningBatch
from btm_scale.generate.together import JointReading
from btm_scale.model.hf_decoder import usable_device
from btm_scale.serve.prefixes import PrefixCache
from btm_scale.serve.prompt_reader import Prior, PromptReader
from btm_scale.serve.texts import Part, Text
from btm_scale.serve.work import BackendError, Busy, Delta, Event, Failed, Job

logger = logging.getLogger(__name__)

# Tokens of prompts, with padding, that are read together.
_PROMPT_TOKENS = 8192


class Engine:
    """Continues texts in its own thread: `submit` jobs, and receive their events through `deliver`."""

    def __init__(
        self,
        models: Mapping[str, Path],
        tokenizer: Tokenizer,
        prior: Prior,
        *,
        max_bytes: float | None = None,
        device: str | None = None,
        max_rows: int = 32,
        max_waiting: int = 256,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Check that the models can be read, and load none.

        Args:
            models: Hugging Face directories by name.
            prior: log p(D=j) in nats of each prompt, [prompts, experts] or [experts], for jobs with several models.
            max_bytes: of weights and `prefixes` in memory at a time. Default: no limit.
            max_rows: texts that are continued at a time.
            max_waiting: texts that may wait.
            prefixes: keeps prompts that were read. Default: none is kept.

        Raises:
            UserError: a model does not fit into `max_bytes`, or the device cannot be used.
            ForestError, CheckpointError: a model cannot be read, or has a different vocabulary.
        """
        self.context = shared_context(models, tokenizer)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._device = usable_device(device)
        self.shelf = Shelf(models, vocabulary=tokenizer.vocab_size, max_bytes=max_bytes, device=self._device)
        self._tokenizer = tokenizer
        self._reader = PromptReader(self.shelf, tokenizer, prior, prefixes or PrefixCache(0))
        self._queue: deque[Part] = deque()
        self._groups: dict[tuple[str, ...], RunningBatch] = {}
        self._random = torch.Generator(self._device)
        self._random.seed()
        self._changed = threading.Condition()
        self._stopping = False
        self._outbox: list[tuple[Job, Event]] = []
        self._is_urgent = False  # whether the outbox has something that a client waits for
        self._deliver: Callable[[list[tuple[Job, Event]]], None] = lambda events: None
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[list[tuple[Job, Event]]], None], preload: Sequence[str] = ()) -> Future[None]:
        """Start the thread, which calls `deliver` with the events of each step.

        The future is done when the models `preload` are loaded, and has the CheckpointError or ForestError if one
        cannot be loaded. The thread does not keep the process from ending.
        """
        self._deliver = deliver
        loaded: Future[None] = Future()
        loaded.set_running_or_notify_cancel()  # a caller that is cancelled cancels only its own wait
        self._thread = threading.Thread(target=self._main, args=(preload, loaded), name="engine", daemon=True)
        self._thread.start()
        return loaded

    def preload(self, names: Sequence[str]) -> None:
        """Load models, as many as fit into memory."""
        for name in reversed(names):
            if self.shelf.fit({*self.shelf.loaded, name}):
                self.shelf.take(name)

    def stop(self) -> None:
        """Complete what runs and waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add jobs of at most `max_rows` copies each. Raises Busy if others wait and these exceed `max_waiting`."""
        assert all(job.copies <= self.max_rows for job in jobs)
        parts = [Part(job, job.names, tuple(range(job.copies)), self._randoms(job)) for job in jobs]
        with self._changed:
            self._drop_cancelled()  # or clients that leave would fill the queue while its head waits for room
            waiting = self._waiting()
            if waiting and waiting + sum(max(1, job.copies) for job in jobs) > self.max_waiting:
                raise Busy
            self._queue.extend(parts)
            self._changed.notify()

    def load(self) -> dict[str, int]:
        """Return how many texts are running and waiting."""
        with self._changed:
            return {"running": self._running(), "waiting": self._waiting()}

    def _waiting(self) -> int:
        return sum(max(1, len(part.copies)) for part in self._queue if not part.job.cancelled)

    def _drop_cancelled(self) -> None:
        if any(part.job.cancelled for part in self._queue):
            self._queue = deque(part for part in self._queue if not part.job.cancelled)

    def _running(self) -> int:
        return sum(len(group.rows) for group in list(self._groups.values()))

    def _randoms(self, job: Job) -> tuple[torch.Generator | None, ...]:
        if job.seed is None:
            return (None,) * job.copies
        seeds = np.random.SeedSequence(job.seed).generate_state(max(1, job.copies), np.uint32).tolist()
        return tuple(torch.Generator(self._device).manual_seed(seed) for seed in seeds[: job.copies])

    def _main(self, preload: Sequence[str], loaded: Future[None]) -> None:
        # Models are loaded in this thread too: each thread that computes has its own OpenMP threads, and with more than
        # cores, libgomp lets none of them spin. To load them with one thread would cost as much: after
        # `torch.set_num_threads`, MKL uses all threads for the smallest products.
        try:
            self.preload(preload)
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        self._run()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._groups or self._stopping):
                    self._changed.wait()
                if self._stopping and not self._queue and not self._groups:
                    return
            # One batch of prompts per step: requests that take no row, such as posteriors, may never stop to arrive.
            self._prefill()
            self._decode()

    def _prefill(self) -> None:
        """Read the next waiting prompts, at most `_PROMPT_TOKENS` tokens unless one prompt is longer."""
        for batch in self._reader.together(self._next_parts()):
            self._guarded([part.job for part in batch], partial(self._begin, batch))
            self._flush()

    def _decode(self) -> None:
        """Add a token to every running text."""
        for names in list(self._groups):
            jobs = [row.owner.job for row in self._groups[names].rows]
            if not self._guarded(jobs, partial(self._step, names)):
                self._groups.pop(names, None)
            self._flush()

    def _guarded(self, jobs: Sequence[Job], do: Callable[[], None]) -> bool:
        """Whether a step succeeded; otherwise its jobs fail, and the others continue."""
        try:
            do()
            return True
        except UserError as error:  # such as an expert that was removed
            failure: Exception = BackendError(str(error))
        except FloatingPointError as error:
            failure = BackendError(str(error))
        except Exception as error:
            logger.exception("a step of the engine failed")
            failure = error
        for job in dict.fromkeys(jobs):
            self._send(job, Failed(failure), urgent=True)
            job.cancelled = True
        return False

    def _send(self, job: Job, event: Event, *, urgent: bool) -> None:
        self._outbox.append((job, event))
        self._is_urgent |= urgent

    def _flush(self) -> None:
        """Deliver the events, unless they can wait: every delivery interrupts this thread."""
        if self._is_urgent:
            events, self._outbox, self._is_urgent = self._outbox, [], False
            self._deliver(events)

    def _next_parts(self) -> list[Part]:
        """Return waiting parts of one kind for which there is room, in their order."""
        with self._changed:
            self._drop_cancelled()
            if not self._queue or not self._may_begin(self._queue[0].names):
                return []
            parts: list[Part] = []
            room = self.max_rows - self._running()
            longest = 0
            while self._queue:
                part = self._queue[0]
                longest = max(longest, len(part.job.prompt))
                fits = len(part.copies) <= room and longest * (len(parts) + 1) <= max(_PROMPT_TOKENS, longest)
                if not fits or (parts and part.kind != parts[0].kind):
                    break
                parts.append(self._queue.popleft())
                room -= len(part.copies)
            return parts

    def _may_begin(self, names: Sequence[str]) -> bool:
        """Whether these models may be loaded now: the running ones must stay."""
        return not self._groups or self.shelf.fit({*names, *self._running_models()})

    def _running_models(self) -> set[str]:
        return {name for names in self._groups for name in names}

    def _begin(self, parts: Sequence[Part]) -> None:
        names, job = parts[0].names, parts[0].job
        self._reader.make_room(names)
        for name in self._running_models():
            self.shelf.take(name)  # so that none of them is the least recently used
        if len(names) == 1 or job.method == "mixture":
            self._begin_together(names, parts)
        else:
            self._begin_drawn(names, parts)

    def _begin_together(self, names: tuple[str, ...], parts: Sequence[Part]) -> None:
        """Start texts under one model, or under the mixture of several."""
        prompts = [part.job.prompt for part in parts]
        # The posterior needs scores, and so does a client that asks for no alternatives to the prompt's tokens.
        score = len(names) > 1 or any(part.job.score_prompt and not part.job.top for part in parts)
        reading, scores = self._reader.read(names, prompts, score=score, keep=True)
        assert reading is not None
        posterior = self._reader.posterior(names, prompts, scores)
        self._send_routed(names, parts, posterior, scores)
        texts = [(row, part, copy) for row, part in enumerate(parts) for copy in part.copies]
        self._join(names, reading, posterior, texts)

    def _begin_drawn(self, names: tuple[str, ...], parts: Sequence[Part]) -> None:
        """Score the prompts with every model, draw one for each text, and start the texts."""
        prompts = [part.job.prompt for part in parts]
        together = self.shelf.fit({*names, *self._running_models()})
        reading, scores = self._reader.read(names, prompts, score=True, keep=together)
        posterior = self._reader.posterior(names, prompts, scores)
        self._send_routed(names, parts, posterior, scores)
        weights = torch.as_tensor(np.exp(posterior.log_weights()), device=self._device)
        drawn: dict[int, list[tuple[int, Part, int]]] = {}
        for row, part in enumerate(parts):
            for copy in part.copies:
                random = part.randoms[copy] or self._random
                expert = int(torch.multinomial(weights[row], 1, generator=random))
                drawn.setdefault(expert, []).append((row, part, copy))
        # In reverse: the experts that read the prompts last are still in memory.
        for expert in sorted(drawn, reverse=True):
            if reading is not None:
                alone = RunningPosterior(np.zeros(1), len(prompts))
                self._join((names[expert],), reading.of_model(expert), alone, drawn[expert])
        if reading is None:
            waiting = [
                Part(part.job, (names[expert],), (copy,), part.randoms, routed=True)
                for expert in sorted(drawn, reverse=True)
                for _, part, copy in drawn[expert]
            ]
            with self._changed:
                self._queue.extendleft(reversed(waiting))

    def _send_routed(
        self, names: tuple[str, ...], parts: Sequence[Part], posterior: RunningPosterior, scores: Tensor | None
    ) -> None:
        weights = np.exp(posterior.log_weights())
        for row, part in enumerate(parts):
            if not part.routed:
                own = None if scores is None else scores[:, row]
                self._send(part.job, self._reader.routed(names, part.job, weights[row], own), urgent=True)

    def _join(
        self,
        names: tuple[str, ...],
        reading: JointReading,
        posterior: RunningPosterior,
        texts: Sequence[tuple[int, Part, int]],
    ) -> None:
        """Add continuations, each of a (row of the reading, part, copy), to the batch of these models."""
        rows, kept = [], []
        for row, part, copy in texts:
            job = part.job
            expert = names[0] if len(names) == 1 else None
            limit = min(job.max_tokens, self.context - len(job.prompt) + 1)
            if limit < 1:
                self._send(job, Delta(copy, expert, "", finished="length"), urgent=True)
                continue
            text = Text(job, copy, expert, limit, Transcript(self._tokenizer.decode, job.prompt, job.stop))
            rows.append(Row(job.sampling, part.randoms[copy], job.top, text))
            kept.append(row)
        if not rows:
            return
        if kept != list(range(len(posterior.log_weights()))):
            reading = reading.select(kept)
            posterior.keep(kept)
        if names not in self._groups:
            self._groups[names] = RunningBatch(self._random)
        self._groups[names].join(reading, posterior, rows)

    def _step(self, names: tuple[str, ...]) -> None:
        group = self._groups[names]
        kept = [number for number, row in enumerate(group.rows) if not row.owner.job.cancelled]
        if kept:
            tokens, alternatives = group.sample()
            sampled = tokens.tolist()
            kept = [
                number for number in kept if self._add(group.rows[number].owner, sampled[number], alternatives[number])
            ]
            self._flush()
            group.advance(tokens, kept)
        if not kept:
            del self._groups[names]

    def _add(self, text: Text, token: int, alternatives: Alternatives | None) -> bool:
        """Add a token to a text; return whether the text continues."""
        transcript = text.transcript
        if token == self._tokenizer.eos:
            end = Delta(text.copy, text.expert, transcript.finish(), token, alternatives, "stop")
            self._send(text.job, end, urgent=True)
            return False
        emitted = transcript.add(token)
        stopped, full = transcript.stopped, len(transcript.tokens) >= text.limit
        if stopped or full:
            emitted += transcript.finish()
            stopped = transcript.stopped
        finished = "stop" if stopped else "length" if full else None
        delta = Delta(text.copy, text.expert, emitted, token, alternatives, finished)  # type: ignore[arg-type]
        urgent = finished is not None or text.job.stream or len(transcript.tokens) == 1
        self._send(text.job, delta, urgent=urgent)
        return finished is None
