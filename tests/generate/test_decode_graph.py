from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_forest import Letters, write_experts
from torch.utils._python_dispatch import TorchDispatchMode

from btm_scale.generate.generator import Generator
from btm_scale.generate.sampling import Sampling
from btm_scale.generate.together import Together
from btm_scale.model import decode_graph
from btm_scale.model.decode_graph import DecodeStep, DecodeSteps
from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.reading import Reading

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item")


@pytest.fixture(params=["llama", "gpt2"])
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    return write_experts(tmp_path, 3, request.param)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every decoder uses steps of fixed shapes, as on a GPU; collects their buckets."""
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(decode_graph, "_LEAST_POSITIONS", 4)
    build = DecodeStep.__init__

    def spy(self: DecodeStep, decoder: Any, cache: Any, batch: int, capacity: int) -> None:
        made.append((batch, capacity))
        build(self, decoder, cache, batch, capacity)

    monkeypatch.setattr(DecodeStep, "__init__", spy)
    monkeypatch.setattr(Decoder, "_can_use_steps", lambda self: True)
    return made


def stack_of(experts: dict[str, Path]) -> Decoder:
    (part,) = Together([Decoder.load(path) for path in experts.values()]).parts
    return part.decoder


def test_texts_of_fixed_shapes_equal_those_of_growing_caches(
    experts: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    settings: dict[str, Any] = {"log_prior": np.log([0.2, 0.5, 0.3]), "method": "mixture"}
    prompts = ["abcdabcdaa", "d", "", "bbbb", "c"]
    for sampling in (Sampling(temperature=0), Sampling()):
        plain = Generator(experts, Letters(), sampling=sampling, **settings)
        expected = [generation.tokens for generation in plain.generate(prompts, max_tokens=12)]
        made = request.getfixturevalue("small_buckets")
        fixed = Generator(experts, Letters(), sampling=sampling, **settings)
        assert [generation.tokens for generation in fixed.generate(prompts, max_tokens=12)] == expected
        assert (8, 16) in made
        assert (8, 32) in made


def test_rows_of_fixed_shapes_join_leave_and_resume(
    experts: dict[str, Path], small_buckets: list[tuple[int, int]]
) -> None:
    decoder = stack_of(experts)
    assert decoder.steps is not None
    singles = [Decoder.load(path) for path in experts.values()]
    texts = [[0, 1, 2, 3, 4, 1, 2, 3], [0, 3], [0, 2, 2, 1]]
    reading = decoder.read(texts[:2])
    other = decoder.read(texts[2:])
    for token in (1, 2):
        for one in (reading, other):
            one.feed(torch.tensor([token] * (2 if one is reading else 1)))
    texts = [[*text, 1, 2] for text in texts]
    reading.join(other)
    reading.feed(torch.tensor([3, 3, 3]))
    texts = [[*text, 3] for text in texts]

    def expected(chosen: list[list[int]]) -> torch.Tensor:
        return torch.cat([single.read(chosen).logits for single in singles])

    torch.testing.assert_close(reading.logits, expected(texts), atol=1e-4, rtol=1e-4)
    prefixes = reading.prefixes(1, len(texts[1]))
    assert prefixes is not None
    resumed = Reading.resumed(decoder, prefixes, [*texts[1], 4], len(texts[1]))
    torch.testing.assert_close(resumed.logits, expected([[*texts[1], 4]]), atol=1e-4, rtol=1e-4)
    kept = reading.select([2, 1])
    kept.feed(torch.tensor([4, 4]))
    reading.feed(torch.tensor([1, 1, 1]))
    torch.testing.assert_close(kept.logits, expected([[*texts[2], 4], [*texts[1], 4]]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reading.logits, expected([[*text, 1] for text in texts]), atol=1e-4, rtol=1e-4)
    assert small_buckets


class _NoHostReads(TorchDispatchMode):
    """Fails where the host would wait for the device, as in a CUDA graph's capture."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket._qualified_op_name.partition("::")[2]
        assert name not in READS, f"{name} reads a value"
        return operator(*args, **(kwargs or {}))


def test_a_step_reads_no_value_on_the_host_and_keeps_its_addresses(
    experts: dict[str, Path], small_buckets: list[tuple[int, int]]
) -> None:
    decoder = stack_of(experts)
    reading = decoder.read([[0, 1, 2, 3, 4], [0, 3]])
    reading.feed(torch.tensor([1, 1]))
    step = reading._step
    assert step is not None
    held = [step.tokens, step.bias, step.positions, step.column, step.logits]
    held += [states for layer in step.cache.layers for states in (layer.keys, layer.values)]
    before = [tensor.data_ptr() for tensor in held]
    with _NoHostReads():
        step.run()
    now = [step.tokens, step.bias, step.positions, step.column, step.logits]
    now += [states for layer in step.cache.layers for states in (layer.keys, layer.values)]
    assert [tensor.data_ptr() for tensor in now] == before


def test_a_family_whose_fixed_step_predicts_something_else_continues_without(
    experts: dict[str, Path], small_buckets: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, expected = stack_of(experts), stack_of(experts)
    expected.steps = None
    feed = DecodeStep.feed
    monkeypatch.setattr(DecodeStep, "feed", lambda self, tokens: feed(self, tokens).flip(1))
    wrong, right = (one.read([[0, 1, 2], [0, 3]]) for one in (decoder, expected))
    for token in (1, 2, 3):
        for reading in (wrong, right):
            reading.feed(torch.tensor([token, token]))
        torch.testing.assert_close(wrong.logits, right.logits)
    assert len(small_buckets) == 1
    assert decoder.steps is not None
    assert not decoder.steps._steps


def test_steps_of_weights_that_have_moved_are_not_used_again(
    experts: dict[str, Path], small_buckets: list[tuple[int, int]]
) -> None:
    decoders, expected = ([Decoder.load(path) for path in experts.values()] for _ in range(2))
    text = [0, 1, 2]
    alone, other = (one[0].read([text]) for one in (decoders, expected))

    def feed(token: int) -> DecodeStep:
        for reading in (alone, other):
            reading.feed(torch.tensor([token]))
        torch.testing.assert_close(alone.logits, other.logits)
        assert alone._step is not None
        return alone._step

    first, steps = feed(1), decoders[0].steps
    together = Together(decoders)
    stacked = feed(3)
    together.unstack(decoders[:1])
    unstacked = feed(2)
    assert len({id(step) for step in (first, stacked, unstacked)}) == 3
    assert decoders[0].steps is not steps
    assert feed(4) is unstacked
    assert feed(1) is not first


def test_a_step_has_one_owner_and_is_free_when_its_reading_is_gone(
    experts: dict[str, Path], small_buckets: list[tuple[int, int]]
) -> None:
    decoder = stack_of(experts)
    first, second = (decoder.read([[0, 1, 2], [0, 3]]) for _ in range(2))
    for reading, token in itertools.product((first, second), (1, 2)):
        reading.feed(torch.tensor([token, token]))
    assert first._step is not None
    assert second._step is None
    torch.testing.assert_close(first.logits, second.logits)
    del first, reading
    second.feed(torch.tensor([3, 3]))
    assert second._step is not None
    assert isinstance(decoder.steps, DecodeSteps)
