from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_forest import POSITIONS, Letters, Oracle, write_experts
from transformers import AutoModelForCausalLM

from btm_scale.config.evaluation import Tempering
from btm_scale.errors import CheckpointError, ForestError, UserError
from btm_scale.generate.generator import Generator
from btm_scale.generate.request import Batch
from btm_scale.generate.sampling import Sampling, cut
from btm_scale.model import hf_decoder, hf_load, reading

PRIOR = np.log([0.8, 0.2])
TEMPERING = Tempering(power=0.4, forgetting=0.9, share=0.05)
MODES: list[dict[str, Any]] = [
    {"posterior": "prefix"},
    {"posterior": "token"},
    {"posterior": "tempered", "tempering": TEMPERING},
]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def oracle(experts: dict[str, Path]) -> Oracle:
    return Oracle(experts)


def continuations(generator: Generator, prompt: str, count: int, length: int) -> Counter[tuple[int, ...]]:
    """Return how often each continuation is sampled."""
    ids = [0, *generator.tokenizer.encode(prompt)]
    texts = np.full((count, length), -1)
    batch = Batch([ids] * count, np.full(count, length))
    places = np.zeros(count, dtype=np.int64)
    for step in generator.steps(batch, torch.Generator().manual_seed(7)):
        texts[step.texts, places[step.texts]] = step.tokens
        places[step.texts] += 1
    kinds, counts = np.unique(texts, axis=0, return_counts=True)
    return Counter({tuple(kind[kind >= 0].tolist()): int(n) for kind, n in zip(kinds, counts, strict=True)})


def p_value(drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Return the p-value of a chi-squared test of the samples against `expected` (Wilson-Hilferty approximation)."""
    assert set(drawn) <= set(expected)
    total = sum(drawn.values())
    common = [text for text, probability in expected.items() if probability * total >= 10]
    cells = [(drawn[text], expected[text] * total) for text in common]
    rest = (total - sum(cell[0] for cell in cells), total - sum(cell[1] for cell in cells))
    if rest[1] >= 10:
        cells.append(rest)
    squared = sum((observed - count) ** 2 / count for observed, count in cells)
    freedom = len(cells) - 1
    normal = ((squared / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(normal / math.sqrt(2))


def test_sampling_one_expert_samples_the_mixture_exactly_and_swapped_priors_do_not(
    experts: dict[str, Path], oracle: Oracle
) -> None:
    expected = oracle.continuations([0, 1, 2], 2, log_prior=PRIOR)
    right = continuations(Generator(experts, Letters(), log_prior=PRIOR), "ab", 200_000, 2)
    assert sum(right.values()) == 200_000
    assert p_value(right, expected) > 1e-3
    swapped = continuations(Generator(experts, Letters(), log_prior=PRIOR[::-1]), "ab", 20_000, 2)
    assert p_value(swapped, expected) < 1e-6


@pytest.mark.parametrize("method", ["per-token", "mixture"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["posterior"])
def test_token_by_token_methods_sample_the_mixture_of_their_posterior(
    method: str, mode: dict[str, Any], experts: dict[str, Path], oracle: Oracle
) -> None:
    settings = {"mode": mode["posterior"], "tempering": mode.get("tempering")}
    expected = oracle.continuations([0, 1, 2], 3, log_prior=PRIOR, **settings)
    drawn = continuations(Generator(experts, Letters(), log_prior=PRIOR, method=method, **mode), "ab", 40_000, 3)
    assert p_value(drawn, expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "unlike"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["posterior"])
def test_greedy_mixture_of_a_ragged_batch_equals_brute_force(
    family: str, mode: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few logits at a time: the longest prompt is read in pieces, the first of which are padding for the others.
    monkeypatch.setattr(reading, "MAX_LOGITS", 3 * 4 * len("abcde"))
    experts = write_experts(tmp_path, 3, family)
    oracle, prior = Oracle(experts), np.log([0.2, 0.5, 0.3])
    generator = Generator(
        experts, Letters(), log_prior=prior, method="mixture", sampling=Sampling(temperature=0), **mode
    )
    prompts = ["abcdabcdaa", "d", "", "bbbb"]
    settings = {"log_prior": prior, "mode": mode["posterior"], "tempering": mode.get("tempering")}
    for prompt, generation in zip(prompts, generator.generate(prompts, max_tokens=8), strict=True):
        text = [0, *Letters().encode(prompt)]
        expected: list[int] = []
        while len(expected) < 8 and expected[-1:] != [0]:
            expected.append(int(np.argmax(oracle.mixture_after(text + expected, **settings))))
        assert generation.tokens + [0] * (generation.finished == "end") == expected
        assert generation.text == Letters().decode(generation.tokens)


def test_an_expert_writes_the_same_text_whether_all_read_the_prompts_as_one_model_or_one_after_the_other(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["abcdabcd", "d", "bbb", ""] * 2
    settings: dict[str, Any] = {"max_tokens": 6, "random_seed": 4}
    alone = Generator(experts, Letters(), log_prior=PRIOR).generate(prompts, **settings)
    assert len({generation.expert for generation in alone}) == len(experts)
    monkeypatch.setattr(Generator, "_reads_together", lambda self: True)
    reads: list[int] = []
    read = hf_decoder.Decoder.read

    def spy(self: Any, texts: Any, **choices: Any) -> Any:
        reads.append(self.models)
        return read(self, texts, **choices)

    generator = Generator(experts, Letters(), log_prior=PRIOR)
    generator.shelf.take_together(generator.names, "")
    monkeypatch.setattr(hf_decoder.Decoder, "read", spy)
    together = generator.generate(prompts, **settings)
    assert reads == [len(experts)]
    assert [(one.tokens, one.expert) for one in together] == [(one.tokens, one.expert) for one in alone]


def test_a_batch_gives_the_same_text_as_its_prompts_one_by_one(experts: dict[str, Path]) -> None:
    prompts = ["abcdabcd", "d", "bbb"]
    for method, sampling in [("mixture", Sampling(temperature=0)), ("mixture", Sampling(0.7, top_k=1))]:
        generator = Generator(experts, Letters(), log_prior=PRIOR, method=method, sampling=sampling)
        together = generator.generate(prompts, max_tokens=10)
        for prompt, generation in zip(prompts, together, strict=True):
            (alone,) = generator.generate([prompt], max_tokens=10)
            assert alone.posterior == pytest.approx(generation.posterior, rel=1e-4)
            assert replace(alone, posterior=generation.posterior) == generation


def test_stream_and_generate_give_the_same_text_for_the_same_seed(
    experts: dict[str, Path],
) -> None:
    generator = Generator(experts, Letters(), log_prior=PRIOR)
    texts = ["", "", ""]
    for piece in generator.stream(["abc", "d", "dd"], max_tokens=12, random_seed=5):
        texts[piece.prompt] += piece.text
    results = generator.generate(["abc", "d", "dd"], max_tokens=12, random_seed=5)
    assert [result.text for result in results] == texts
    assert all(result.expert in experts and sum(result.posterior.values()) == pytest.approx(1) for result in results)
    others = generator.generate(["abc", "d", "dd"], max_tokens=12, random_seed=6)
    assert [result.text for result in others] != texts


def test_a_continuation_ends_at_a_stop_string_the_token_limit_or_the_end_of_the_context(
    experts: dict[str, Path],
) -> None:
    generator = Generator(experts, Letters(), method="mixture", sampling=Sampling(temperature=0))
    (free,) = generator.generate(["ab"], max_tokens=5)
    (stopped,) = generator.generate(["ab"], max_tokens=5, stop=[free.text[1:3]])
    assert (stopped.finished, stopped.text) == ("stop", free.text[: free.text.index(free.text[1:3])])
    (empty,) = generator.generate(["ab"], max_tokens=0)
    assert (empty.finished, empty.text) == ("length", "")
    # Without an end-of-document token every text fills the context.
    endless = Letters()
    endless.eos = 4
    generator = Generator(experts, endless, method="mixture", sampling=Sampling(temperature=0, top_k=1))
    long = generator.generate(["a" * (POSITIONS - 3), "a" * (POSITIONS - 1)], max_tokens=100)
    assert [len(generation.tokens) for generation in long if generation.finished == "context"] == [
        3 if index == 0 else 1 for index, generation in enumerate(long) if generation.finished == "context"
    ]
    assert {generation.finished for generation in long} <= {"context", "end"}


def test_a_prompt_begins_with_bos_if_the_documents_of_the_run_do(experts: dict[str, Path]) -> None:
    with_bos, other_end = Letters(), Letters()
    with_bos.bos, with_bos.begins_with_bos = 3, True
    other_end.eos = 3
    posteriors = [
        Generator(experts, tokenizer, method="mixture").generate(["ab"], max_tokens=1)[0].posterior
        for tokenizer in (with_bos, other_end, Letters())
    ]
    assert posteriors[0] == posteriors[1] != posteriors[2]


def test_experts_are_loaded_one_at_a_time_under_a_memory_limit(experts: dict[str, Path]) -> None:
    size = sum(file.stat().st_size for file in experts["expert0"].glob("*.safetensors"))
    free = Generator(experts, Letters(), log_prior=PRIOR)
    narrow = Generator(experts, Letters(), log_prior=PRIOR, max_bytes=1.5 * size)
    assert narrow.generate(["ab"] * 5, max_tokens=6) == free.generate(["ab"] * 5, max_tokens=6)
    assert len(narrow.shelf.loaded) == 1
    assert len(free.shelf.loaded) == 2
    with pytest.raises(UserError, match="needs all 2 experts in memory"):
        Generator(experts, Letters(), method="mixture", max_bytes=1.5 * size)
    with pytest.raises(UserError, match="Increase --max-memory"):
        Generator(experts, Letters(), max_bytes=size / 2)


def test_log_probabilities_of_a_bfloat16_model_are_not_rounded(experts: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(experts["expert0"], dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    decoder = hf_decoder.Decoder.load(tmp_path / "bf16")
    reading = decoder.read([[0, 1, 2, 3]])
    assert decoder.model.dtype == torch.bfloat16
    assert reading.logits.dtype == torch.float32
    assert not torch.equal(reading.logits, reading.logits.bfloat16().float())
    base = decoder.model.base_model(torch.tensor([[0, 1, 2, 3]])).last_hidden_state[0, -1]
    head = decoder.model.get_output_embeddings().weight
    assert reading.logits[0].tolist() == pytest.approx((base.double() @ head.double().T).tolist(), abs=1e-5)


def test_top_k_and_top_p_keep_the_most_likely_tokens() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = [row.isfinite().nonzero().flatten().tolist() for row in cut(scores, 2, None)]
    assert kept[0] == [1, 3]
    assert [row.isfinite().sum().item() for row in cut(scores, None, 0.65)] == [2, 1]
    assert [row.isfinite().sum().item() for row in cut(scores, None, 0.75)] == [3, 1]
    assert torch.equal(cut(scores, 9, 1.0), scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "beam"}, "Unknown generation method 'beam'. Choose one of expert"),
        ({"posterior": "token"}, "use 'per-token'"),
        ({"method": "mixture", "posterior": "suffix"}, "Unknown posterior 'suffix'"),
        ({"sampling": Sampling(temperature=0.5)}, "temperature 1, without top-k"),
    ],
)
def test_incompatible_settings_are_rejected(settings: dict[str, Any], message: str, experts: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        Generator(experts, Letters(), **settings)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 1.5}])
def test_invalid_sampling_settings_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"temperature|top-k|top-p"):
        Sampling(**values)


def test_truncated_weights_raise(experts: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(next(iter(experts.values())), tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*\. Copy or train it again"):
        hf_decoder.Decoder.load(copy)


@pytest.mark.parametrize("prompt", ["", "ab"])
@pytest.mark.parametrize("method", ["expert", "per-token", "mixture"])
def test_a_diverged_expert_is_refused_by_every_method(experts: dict[str, Path], method: str, prompt: str) -> None:
    generator = Generator(experts, Letters(), method=method)
    with torch.inference_mode():
        generator.shelf.take("expert1").model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="Check for a diverged expert"):
        generator.generate([prompt] * 8, max_tokens=3)


def test_a_prompt_longer_than_the_context_is_rejected(experts: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"Prompt 2 has {POSITIONS + 1} tokens, .* at most {POSITIONS}"):
        Generator(experts, Letters()).generate(["a", "a" * POSITIONS])


@pytest.mark.parametrize("moment", ["before its config is read", "before its weights are read", "while it loads"])
def test_an_expert_that_is_removed_while_it_loads_is_named(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_experts(tmp_path)

    def remove() -> None:
        experts["expert1"].rename(tmp_path / ".expert1.01234567.removed")

    def generate() -> None:
        generator = Generator(experts, Letters(), method="expert")
        if moment == "before its weights are read":
            remove()
        generator.generate(["a"])

    if moment == "before its config is read":
        remove()
    elif moment == "while it loads":
        read_config = hf_load.load_config

        def removed_then(directory: Path) -> Any:
            config = read_config(directory)
            if directory == experts["expert1"]:
                remove()
            return config

        monkeypatch.setattr(hf_load, "load_config", removed_then)
    with pytest.raises(ForestError, match=r"'expert1' was removed while it was loaded: .* is gone\. Only models that"):
        generate()
