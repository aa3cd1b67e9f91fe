"""The engine without HTTP: exact samples, memory limits, failures."""

from __future__ import annotations

import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.served_forest import PRIOR
from helpers.tiny_forest import Letters, Oracle

from btm_scale.generate.sampling import Sampling
from btm_scale.serve import engine as engine_module
from btm_scale.serve.engine import Engine
from btm_scale.serve.work import Busy, Delta, Event, Failed, Job, Routed

PROMPT = [0, 1, 2]


class Run:
    """Jobs run to their end: their events by job."""

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        self.events: dict[Job, list[Event]] = {job: [] for job in jobs}
        self._left = sum(job.copies for job in jobs)
        self._done = threading.Event()
        engine.submit(jobs)
        engine.start(self._take)
        assert self._done.wait(120)
        engine.stop()

    def _take(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            self.events[job].append(event)
            if isinstance(event, Failed) or (isinstance(event, Delta) and event.finished):
                self._left -= job.copies if isinstance(event, Failed) else 1
        if self._left <= 0:
            self._done.set()

    def texts(self, job: Job) -> list[tuple[int, ...]]:
        tokens: dict[int, list[int]] = {copy: [] for copy in range(job.copies)}
        for event in self.events[job]:
            if isinstance(event, Delta) and event.token is not None:
                tokens[event.copy].append(event.token)
        return [tuple(text) for text in tokens.values()]


def engine_of(experts: dict[str, Path], log_prior: np.ndarray = PRIOR, **settings: Any) -> Engine:
    return Engine(experts, Letters(), lambda texts: log_prior, **{"max_waiting": 10**6, **settings})


def p_value(drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of a chi-squared test; texts that are expected fewer than 10 times are counted together."""
    from scipy.stats import chisquare

    total = sum(drawn.values())
    common = [text for text, probability in expected.items() if probability * total >= 10]
    observed = [drawn[text] for text in common]
    counts = [expected[text] * total for text in common]
    return float(chisquare([*observed, total - sum(observed)], [*counts, total - sum(counts)]).pvalue)


@pytest.fixture(scope="module")
def samples(experts: dict[str, Path]) -> Counter[tuple[int, ...]]:
    """20,000 continuations of two tokens; jobs of several sizes, so that experts' batches change all the time."""
    jobs = [Job(PROMPT, tuple(experts), copies=250 + 25 * (n % 3), max_tokens=2) for n in range(74)]
    engine = engine_of(experts, max_rows=2_000)
    run = Run(engine, jobs)
    return Counter(text for job in jobs for text in run.texts(job))


def test_drawing_one_expert_samples_the_mixture_exactly(
    experts: dict[str, Path], samples: Counter[tuple[int, ...]]
) -> None:
    expected = Oracle(experts).continuations(PROMPT, 2, log_prior=PRIOR)
    assert sum(samples.values()) > 20_000
    assert p_value(samples, expected) > 0.01


def test_a_wrong_prior_is_detected(experts: dict[str, Path], samples: Counter[tuple[int, ...]]) -> None:
    wrong = Oracle(experts).continuations(PROMPT, 2, log_prior=PRIOR[::-1])
    assert p_value(samples, wrong) < 1e-6


def test_experts_take_turns_in_memory_under_a_limit(experts: dict[str, Path]) -> None:
    size = sum(file.stat().st_size for file in experts["expert0"].glob("*.safetensors"))

    def answer(**settings: Any) -> tuple[Engine, list[list[tuple[int, ...]]]]:
        prompts = ([0, 1, 2], [0, 4, 4, 1], [0])
        jobs = [Job(prompt, tuple(experts), copies=4, max_tokens=9, seed=n) for n, prompt in enumerate(prompts)]
        engine = engine_of(experts, **settings)
        run = Run(engine, jobs)
        assert all(isinstance(run.events[job][0], Routed) for job in jobs)
        return engine, [run.texts(job) for job in jobs]

    narrow, texts = answer(max_bytes=1.5 * size)
    wide, same = answer()
    assert texts == same
    assert (len(narrow.shelf.loaded), len(wide.shelf.loaded)) == (1, 2)


def test_prompts_that_wait_do_not_stop_running_texts(experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_PROMPT_TOKENS", len(PROMPT))
    names = tuple(experts)
    engine = engine_of(experts)
    order: list[str] = []

    def recorded(phase: str, act: Any) -> Any:
        return lambda work: (order.append(phase), act(work))

    monkeypatch.setattr(engine, "_begin", recorded("begin", engine._begin))
    monkeypatch.setattr(engine, "_step", recorded("step", engine._step))
    text = Job(PROMPT, names, "mixture", max_tokens=6, sampling=Sampling(temperature=0))
    posteriors = [Job(PROMPT, names, copies=0) for _ in range(10)]
    echoes = [Job(PROMPT, names, "mixture", max_tokens=0, score_prompt=True, top=0) for _ in range(10)]
    run = Run(engine, [text, *posteriors, *echoes])
    steps = len(run.texts(text)[0])
    assert steps > 3
    assert order == ["begin", "step"] * steps + ["begin"] * (21 - steps)


def test_a_full_queue_refuses_and_a_cancelled_job_ends(experts: dict[str, Path]) -> None:
    engine = engine_of(experts, max_waiting=3, max_rows=2)
    left = Job(PROMPT, tuple(experts), copies=2)
    left.cancelled = True
    engine.submit([left])
    engine.submit([kept := Job(PROMPT, tuple(experts), copies=2)])
    with pytest.raises(Busy):
        engine.submit([Job(PROMPT, tuple(experts), copies=2)])
    assert engine.load() == {"running": 0, "waiting": 2}
    run = threading.Event()
    seen: list[Job] = []

    def take(events: list[tuple[Job, Event]]) -> None:
        seen.extend(job for job, _ in events)
        if any(isinstance(event, Delta) and event.finished for _, event in events):
            run.set()

    engine.start(take)
    engine.stop()
    assert run.is_set()
    assert set(seen) == {kept}


def test_clients_that_leave_do_not_fill_the_queue(experts: dict[str, Path]) -> None:
    engine = engine_of(experts, max_rows=1, max_waiting=2)
    engine.submit([Job(PROMPT, tuple(experts))])
    for _ in range(20):
        left = Job(PROMPT, tuple(experts))
        engine.submit([left])
        left.cancelled = True
    assert len(engine._queue) <= 2
    engine.submit([Job(PROMPT, tuple(experts))])
    with pytest.raises(Busy):
        engine.submit([Job(PROMPT, tuple(experts))])


def test_a_diverged_expert_fails_its_own_texts_only(experts: dict[str, Path]) -> None:
    engine = engine_of(experts)
    engine.preload(list(experts))
    head = engine.shelf.take("expert1").model.get_output_embeddings()
    head.weight.fill_(math.nan)
    good, bad = Job(PROMPT, ("expert0",), max_tokens=4), Job(PROMPT, ("expert1",), max_tokens=4)
    run = Run(engine, [good, bad])
    assert isinstance(run.events[bad][-1], Failed)
    assert "NaN" in str(run.events[bad][-1].error)
    assert len(run.texts(good)[0]) >= 1


def test_a_removed_expert_fails_its_request_and_the_next_one_is_answered(
    experts: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    models = {name: shutil.copytree(path, tmp_path / name) for name, path in experts.items()}
    engine = engine_of(models)
    shutil.rmtree(models["expert1"])
    gone, kept = Job(PROMPT, ("expert1",)), Job(PROMPT, ("expert0",), sampling=Sampling(temperature=0))
    run = Run(engine, [gone, kept])
    (failure,) = run.events[gone]
    assert isinstance(failure, Failed)
    assert "was removed" in str(failure.error)
    assert run.texts(kept)[0]
