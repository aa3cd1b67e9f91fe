"""Chats in several turns: what was read is not read again, the answers are the same, and the memory is bounded."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.served_forest import PRIOR
from helpers.tiny_forest import Letters, write_experts

from btm_scale.generate.sampling import Sampling
from btm_scale.generate.together import JointReading
from btm_scale.model.hf_decoder import Decoder
from btm_scale.serve.engine import Engine
from btm_scale.serve.prefixes import PrefixCache
from btm_scale.serve.work import Delta, Job, Routed

GREEDY = Sampling(temperature=0)


class Conversation:
    """Jobs that are answered one after another."""

    def __init__(self, experts: dict[str, Path], prefixes: PrefixCache | None, **settings: Any) -> None:
        self.engine = Engine(experts, Letters(), PRIOR, prefixes=prefixes, **settings)
        self._events: queue.Queue[Any] = queue.Queue()
        self.engine.start(lambda events: [self._events.put(event) for _, event in events])

    def answer(self, job: Job) -> tuple[Routed, list[int]]:
        self.engine.submit([job])
        routed, tokens = self._events.get(timeout=60), []
        assert isinstance(routed, Routed)
        left = job.copies
        while left:
            event = self._events.get(timeout=60)
            assert isinstance(event, Delta), event
            tokens.append(event.token)
            left -= event.finished is not None
        return routed, tokens


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that were not read again."""
    seen: list[int] = []
    resume = Decoder.resume

    def spy(self: Decoder, prefixes: Any, prompt: Any, kept: int) -> Any:
        seen.append(kept)
        return resume(self, prefixes, prompt, kept)

    monkeypatch.setattr(Decoder, "resume", spy)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_resumed_prompt_has_the_logits_and_scores_of_one_that_is_read(tmp_path: Path, family: str) -> None:
    (directory,) = write_experts(tmp_path, 1, family).values()
    decoder = Decoder.load(directory)
    prompts = [[0, 1, 2, 3, 4, 1, 2], [0, 4, 4]]
    prefixes = decoder.read(prompts).prefixes(0, 7)
    assert prefixes is not None
    for prompt, kept in (([0, 1, 2, 3, 4, 1, 2], 6), ([0, 1, 2, 3, 4, 1, 2, 2, 1], 6), ([0, 1, 2, 3, 1, 1], 3)):
        again, complete = decoder.resume(prefixes, prompt, kept), decoder.read([prompt])
        torch.testing.assert_close(again.logits, complete.logits)
        torch.testing.assert_close(again.log_probs, complete.log_probs)
        for reading in (again, complete):
            reading.feed(torch.tensor([3]))
        torch.testing.assert_close(again.logits, complete.logits)
    torch.testing.assert_close(decoder.resume(prefixes, prompts[0], 6).logits, decoder.read(prompts[:1]).logits)


@pytest.mark.parametrize("method", ["expert", "mixture"])
def test_the_next_turn_reads_only_what_is_new_and_has_the_same_answer(
    experts: dict[str, Path], method: Any, resumed: list[int]
) -> None:
    names = tuple(experts)
    sampling = GREEDY if method == "mixture" else Sampling()
    with_cache = Conversation(experts, PrefixCache(1e9, least_tokens=4))
    without = Conversation(experts, None)
    prompt = [0, 1, 2, 3, 4]
    for turn in range(3):
        settings: dict[str, Any] = {"max_tokens": 2, "sampling": sampling, "seed": turn, "copies": 2}
        (routed, tokens), (expected, same) = (
            one.answer(Job(prompt, names, method, **settings)) for one in (with_cache, without)
        )
        assert tokens == same
        assert routed.weights == pytest.approx(expected.weights, abs=1e-6)
        prompt = [*prompt, *(token or 1 for token in tokens[:2]), 3, 1]
    assert resumed == [4, 8]  # by both experts, which are stacked


def test_a_posterior_over_a_growing_text_is_resumed_and_traced(experts: dict[str, Path], resumed: list[int]) -> None:
    with_cache, without = (Conversation(experts, cache) for cache in (PrefixCache(1e9, least_tokens=4), None))
    for prompt in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 4]):
        found, expected = (
            one.answer(Job(prompt, tuple(experts), copies=0, trace=True))[0].trace for one in (with_cache, without)
        )
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=0)
    assert len(resumed) == 2


def test_the_least_recently_used_prompts_are_dropped_beyond_the_limit(experts: dict[str, Path]) -> None:
    decoder = Decoder.load(experts["expert0"])
    texts = [[0, *([number] * 9)] for number in range(1, 5)]
    prefixes = []
    for text in texts:
        (prefix,) = decoder.read([text]).prefixes(0, 10) or []
        prefixes.append({"expert0": prefix})
    size = prefixes[0]["expert0"].nbytes
    assert size == 2 * 2 * 10 * 8 * 4  # keys and values, layers, tokens, head size, float32
    cache = PrefixCache(3 * size, least_tokens=4)
    for text, prefix in zip(texts[:3], prefixes, strict=False):
        cache.keep(text, prefix, 1e9)
    assert cache.find(["expert0"], texts[0]) is not None
    cache.keep(texts[3], prefixes[3], 1e9)
    assert [cache.find(["expert0"], text) is not None for text in texts] == [True, False, True, True]
    assert cache.find(["expert1"], texts[0]) is None
    assert cache.nbytes == 3 * size
    cache.shrink(1.5 * size)
    assert cache.nbytes == size


def test_a_prompt_larger_than_the_cache_takes_no_place_and_is_not_copied(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * 2 * 8 * 4 * len(experts)  # bytes per token: keys and values, layers, head size, float32, models
    cache = PrefixCache(10 * size, least_tokens=4)
    talk = Conversation(experts, cache)
    copied: list[int] = []
    prefixes = JointReading.prefixes

    def spy(self: JointReading, row: int, tokens: int) -> Any:
        copied.append(tokens)
        return prefixes(self, row, tokens)

    monkeypatch.setattr(JointReading, "prefixes", spy)
    small = [0, 1, 2, 3, 4]
    for prompt in (small, [0, 4, 3, 2, 1], [0, *[2] * 10]):
        talk.answer(Job(prompt, tuple(experts), max_tokens=1))
    assert copied == [5, 5]
    assert cache.find(["expert0"], small) is not None
    assert cache.nbytes == 10 * size


def test_weights_take_precedence_over_known_prompts_under_a_memory_limit(experts: dict[str, Path]) -> None:
    models = {**experts, "seed": experts["expert0"]}
    weights = sum(file.stat().st_size for file in experts["expert0"].glob("*.safetensors"))
    cache = PrefixCache(1e9, least_tokens=4)
    talk = Conversation(models, cache, max_bytes=2.9 * weights)
    talk.answer(Job([0, 1, 2, 3, 4], tuple(experts), max_tokens=1))
    assert 0 < cache.nbytes <= talk.engine.shelf.spare(())
    talk.answer(Job([0, 1, 2], ("seed",), max_tokens=1))
    assert set(talk.engine.shelf.loaded) == {"expert1", "seed"}
    assert cache.nbytes == 0
