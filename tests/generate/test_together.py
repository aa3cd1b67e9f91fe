from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_forest import Letters, write_experts

from btm_scale.errors import UserError
from btm_scale.generate import together
from btm_scale.generate.generator import Generator
from btm_scale.generate.model_cache import Shelf, weight_bytes
from btm_scale.generate.sampling import Sampling
from btm_scale.generate.together import Together
from btm_scale.model import stacked_modules
from btm_scale.model.hf_decoder import Decoder

PRIOR = np.log([0.2, 0.5, 0.3])
GREEDY = Sampling(temperature=0)
PROMPTS = ["abcdabcdaa", "d", "", "bbbb"]


def greedy(experts: dict[str, Path], **settings: Any) -> list[list[int]]:
    generator = Generator(experts, Letters(), log_prior=PRIOR, method="mixture", sampling=GREEDY, **settings)
    return [generation.tokens for generation in generator.generate(PROMPTS, max_tokens=14)]


def forwards(experts: dict[str, Path]) -> list[tuple[int, ...]]:
    return [part.models for part in Together([Decoder.load(path) for path in experts.values()]).parts]


@pytest.mark.parametrize(
    ("family", "parts"), [("llama", [(0, 1, 2)]), ("gpt2", [(0, 1, 2)]), ("unlike", [(0, 2), (1,)])]
)
@pytest.mark.parametrize("posterior", ["prefix", "token", "fixed"])
def test_greedy_tokens_of_stacked_experts_equal_those_of_experts_that_run_alone(
    family: str, parts: list[tuple[int, ...]], posterior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_experts(tmp_path, 3, family)
    assert forwards(experts) == parts
    stacked = greedy(experts, posterior=posterior)
    monkeypatch.setattr(together, "_stacked", lambda decoders: None)
    assert forwards(experts) == [(number,) for part in parts for number in part]
    assert greedy(experts, posterior=posterior) == stacked


def test_experts_whose_stack_predicts_something_else_run_alone_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experts = write_experts(tmp_path, 3)
    expected = greedy(experts)
    assert not caplog.messages
    right = stacked_modules.StackedNorm.forward
    monkeypatch.setattr(stacked_modules.StackedNorm, "forward", lambda self, states: right(self, states) ** 3)
    assert greedy(experts) == expected
    assert "Models of type 'llama' differ from their stacked form" in caplog.text
    assert forwards(experts) == [(0,), (1,), (2,)]


def own_bytes(decoder: Decoder) -> int:
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.model.parameters()}
    return sum(held.values())


@pytest.mark.parametrize("error", [AttributeError("no in_features"), RuntimeError("shapes differ"), None])
def test_experts_whose_stack_fails_or_differs_run_alone_with_their_own_weights(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experts = write_experts(tmp_path, 3)
    decoders, others = ([Decoder.load(path) for path in experts.values()] for _ in range(2))
    prompts = [[0, 1, 2], [0, 3]]

    def wrong(self: Any, states: torch.Tensor) -> torch.Tensor:
        if error is not None:
            raise error
        return states.new_zeros(*states.shape[:-1], self.weight.shape[2])

    monkeypatch.setattr(stacked_modules.StackedLinear, "forward", wrong)
    caplog.set_level("DEBUG")
    reading = Together(decoders).read(prompts)
    assert "Models of type 'llama' differ from their stacked form" in caplog.text
    assert [own_bytes(decoder) for decoder in decoders] == [own_bytes(decoder) for decoder in others]
    for logits, other in zip(reading.logits, others, strict=True):
        torch.testing.assert_close(logits, other.read(prompts).logits)


def test_a_stack_that_runs_out_of_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, states: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(stacked_modules.StackedLinear, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        Together([Decoder.load(path) for path in write_experts(tmp_path, 2).values()])


def test_nothing_holds_a_stack_while_its_models_get_their_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = [Decoder.load(path) for path in write_experts(tmp_path, 5, "unlike").values()]
    pair = Together(decoders)
    stacks = [weakref.ref(part.decoder) for part in pair.parts]
    evicted = weakref.ref(decoders.pop())
    alive: list[Any] = []
    unstack = together.unstack_models

    def spy(models: Any) -> None:
        gc.collect()
        alive.extend(ref() for ref in (*stacks, evicted))
        unstack(models)

    monkeypatch.setattr(together, "unstack_models", spy)
    pair.unstack(decoders)
    assert alive == [None] * 6
    assert [own_bytes(decoder) for decoder in decoders] == [
        own_bytes(Decoder.load(path)) for path in list(write_experts(tmp_path / "again", 4, "unlike").values())
    ]


def test_a_stack_is_taken_apart_when_the_memory_limit_evicts_one_of_its_models(tmp_path: Path) -> None:
    experts = write_experts(tmp_path, 3)
    size = weight_bytes(experts["expert0"])
    shelf = Shelf(experts, max_bytes=2.5 * size)
    pair = shelf.take_together(["expert0", "expert1"], "A mixture")
    assert len(pair.parts) == 1
    assert shelf.take_together(["expert0", "expert1"], "A mixture") is pair
    kept = weakref.ref(pair.parts[0].decoder)
    prompts = [[0, 1, 2], [0, 3]]
    expected = Decoder.load(experts["expert1"]).read(prompts).logits
    del pair
    shelf.take("expert2")
    gc.collect()
    assert shelf.loaded == ["expert1", "expert2"]
    assert kept() is None
    decoder = shelf.take("expert1")
    torch.testing.assert_close(decoder.read(prompts).logits, expected)
    assert own_bytes(decoder) <= size
    with pytest.raises(UserError, match="A mixture needs all 3 experts in memory"):
        shelf.take_together(list(experts), "A mixture")


def test_the_reading_of_one_model_continues_alone(tmp_path: Path) -> None:
    decoders = [Decoder.load(path) for path in write_experts(tmp_path, 3, "unlike").values()]
    prompts = [[0, 1, 2, 3], [0, 4]]
    reading = Together(decoders).read(prompts)
    reading.feed(torch.tensor([1, 2]))
    for number, decoder in enumerate(decoders):
        alone, expected = reading.of_model(number), decoder.read([[*prompts[0], 1], [*prompts[1], 2]])
        torch.testing.assert_close(alone.logits[0], expected.logits)
        torch.testing.assert_close(reading.logits[number], expected.logits)
        alone.feed(torch.tensor([3, 3]))
        expected.feed(torch.tensor([3, 3]))
        torch.testing.assert_close(alone.logits[0], expected.logits)
