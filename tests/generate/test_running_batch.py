from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_forest import Letters, Oracle, write_experts

from btm_scale.errors import UserError
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.generator import Generator
from btm_scale.generate.prompt_scores import prompt_scores
from btm_scale.generate.running_batch import Row, RunningBatch
from btm_scale.generate.sampling import Sampling
from btm_scale.model.hf_decoder import Decoder

PRIOR = np.log([0.8, 0.2])
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    experts = write_experts(tmp_path_factory.mktemp("experts"), family=request.param)
    return Generator(experts, Letters(), log_prior=PRIOR, method="mixture", sampling=GREEDY)


def add(batch: RunningBatch, generator: Generator, prompt: str, **settings: Any) -> Row:
    """Let a text join the batch."""
    reading, posterior = generator.begin([[0, *Letters().encode(prompt)]])
    row = Row(**{"sampling": GREEDY, "owner": []} | settings)
    batch.join(reading, posterior, [row])
    return row


def step(batch: RunningBatch, longest: int) -> None:
    """Sample once; a text leaves at `longest` tokens or at the end of its document."""
    tokens, _ = batch.sample()
    for row, token in zip(batch.rows, tokens.tolist(), strict=True):
        row.owner.append(token)
    kept = [i for i, row in enumerate(batch.rows) if len(row.owner) < longest and row.owner[-1] != Letters.eos]
    batch.advance(tokens, kept)


def test_texts_that_join_and_leave_a_running_batch_equal_those_that_run_alone(generator: Generator) -> None:
    batch = RunningBatch(torch.Generator())
    prompts = ["abcdabcdaa", "d", "bb", "", "abcdabc"]
    rows = []
    for prompt in prompts:
        rows.append(add(batch, generator, prompt))
        step(batch, 9)
        step(batch, 9)
    while batch.rows:
        step(batch, 9)
    for prompt, row in zip(prompts, rows, strict=True):
        (alone,) = generator.generate([prompt], max_tokens=9)
        assert row.owner == alone.tokens + [0] * (alone.finished == "end")


@pytest.mark.parametrize("family", ["sliding window", "no KV cache"])
def test_rows_without_a_full_cache_join_and_leave(family: str, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=5, num_hidden_layers=2, sliding_window=4, initializer_range=0.4, max_position_embeddings=24, **sizes
    )
    model: Any = MistralForCausalLM(config)
    if family == "no KV cache":
        model = MambaForCausalLM(MambaConfig(vocab_size=5, num_hidden_layers=2, hidden_size=16, state_size=4))
    model.save_pretrained(tmp_path)
    decoder = Decoder.load(tmp_path)
    texts = [[0, 1, 2, 3, 4, 1, 2, 3], [0, 3], [0, 2, 2, 1]]

    def expected(text: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return decoder.model(torch.tensor([text])).logits[0, -1]

    reading = decoder.read(texts[:2])
    reading.feed(torch.tensor([1, 1]))
    reading.join(decoder.read(texts[2:]))
    texts = [[*texts[0], 1], [*texts[1], 1], texts[2]]
    for token in (2, 3, 4, 1):
        reading.feed(torch.tensor([token] * 3))
        texts = [[*text, token] for text in texts]
    kept = reading.select([2, 1])
    kept.feed(torch.tensor([4, 4]))
    for logits, text in zip(kept.logits, (texts[2], texts[1]), strict=True):
        assert torch.allclose(logits, expected([*text, 4]), atol=1e-5)
    assert torch.allclose(reading.logits[0], expected(texts[0]), atol=1e-5)


def test_a_recurrent_model_that_reads_padding_takes_prompts_of_one_length_only() -> None:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "lru_width": 16}
    torch.manual_seed(3)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=5, num_hidden_layers=3, **sizes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    decoder = Decoder(model)
    with pytest.raises(UserError, match=r"'recurrent_gemma' reads padding.* Give one prompt at a time"):
        decoder.read([[0, 1, 2, 3, 4], [0, 3]])
    assert decoder.read([[0, 1, 2], [0, 3, 1]]).logits.isfinite().all()


def test_a_row_with_its_own_generator_repeats_whatever_else_runs(generator: Generator) -> None:
    texts = []
    for others in (0, 3):
        batch = RunningBatch(torch.Generator().manual_seed(others))
        for _ in range(others):
            add(batch, generator, "ab", sampling=Sampling())
        row = add(batch, generator, "abc", sampling=Sampling(0.9, top_k=4), random=torch.Generator().manual_seed(5))
        while row in batch.rows:
            step(batch, 12)
        texts.append(row.owner)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("top", [0, 2])
def test_alternatives_and_prompt_scores_are_those_of_the_mixture(generator: Generator, top: int) -> None:
    oracle = Oracle({name: generator.shelf._directories[name] for name in generator.names})
    text = [0, 1, 2, 1, 4, 4, 3]
    posterior = RunningPosterior(PRIOR, 1)
    scores = prompt_scores(generator.shelf.take_together(generator.names, ""), text, posterior, top)
    assert len(scores) == len(text) - 1
    for position, score in enumerate(scores, 1):
        expected = oracle.mixture_after(text[:position], log_prior=PRIOR)
        assert score.log_prob == pytest.approx(expected[text[position]], abs=1e-4)
        assert [token for token, _ in score.most_likely] == np.argsort(-expected)[:top].tolist()
    batch = RunningBatch(torch.Generator())
    add(batch, generator, "abadd" + "c", top=3)
    tokens, (found,) = batch.sample()
    expected = oracle.mixture_after(text, log_prior=PRIOR)
    assert found is not None
    assert found.log_prob == pytest.approx(expected[int(tokens)], abs=1e-4)
    assert [token for token, _ in found.most_likely] == np.argsort(-expected)[:3].tolist()
