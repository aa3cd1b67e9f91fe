from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.masking_utils
from helpers.small_families import write_family
from helpers.tiny_forest import write_experts
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from btm_scale import kernels
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.generator import observe_prompts
from btm_scale.generate.together import Together
from btm_scale.kernels.hardware import Hardware
from btm_scale.model import reading, state_scores
from btm_scale.model.hf_decoder import Decoder

PROMPTS = [[0, 1, 2, 3, 4, 1, 2, 3, 3, 1, 4, 2], [0, 4], [0], [0, 2, 2, 2, 1]]
H100 = Hardware("nvidia", "sm_90", 227 << 10, 132)


@pytest.fixture
def from_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score from hidden states on this machine too, where the kernel's reference runs."""
    monkeypatch.setattr(state_scores, "has_kernel", lambda weight: True)


def together_of(experts: dict[str, Path]) -> Together:
    return Together([Decoder.load(path) for path in experts.values()])


class Operators(TorchDispatchMode):
    """Counts the calls of each operator, and the logits that are formed."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.arguments: dict[str, Any] = {}
        self.logits = 0
        self._vocabulary = vocabulary

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket._qualified_op_name
        self.calls[name] += 1
        self.arguments[name] = args
        if name in ("aten::mm", "aten::bmm") and result.shape[-1] == self._vocabulary:
            self.logits += result.numel()
        return result


def on_meta(vocabulary: int) -> Decoder:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes)
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


@pytest.mark.parametrize("experts", [1, 4])
def test_stacked_experts_score_a_prompt_with_the_launches_of_one_and_form_the_logits_of_its_last_token_only(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a cache transformers looks at the values of positions, which `meta` does not have.
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    together, length, vocabulary = Together([on_meta(1009) for _ in range(experts)]), 96, 1009
    prompts = [[1] * length, [2] * length]
    with Operators(vocabulary) as operators:
        scores = together.read(prompts).scores
    assert scores is not None
    assert scores.shape == (experts, 2, length - 1)
    assert operators.calls["btm_scale::token_logprobs"] == 1
    hidden, heads, targets, *_ = operators.arguments["btm_scale::token_logprobs"]
    assert hidden.dtype == heads[0].dtype == torch.bfloat16
    assert len(heads) == experts
    # One launch for the partials of all experts, and one that combines them.
    assert kernels.cost("token_logprobs", hidden, heads, targets, on=H100).launches == 2
    assert operators.logits == experts * len(prompts) * vocabulary
    assert "aten::logsumexp" not in operators.calls
    with Operators(vocabulary) as operators:
        assert together.score(prompts).shape == scores.shape
    assert operators.calls["btm_scale::token_logprobs"] == 1


def test_a_cpu_and_weights_of_32_bits_score_from_logits() -> None:
    weight = torch.zeros(5, 4, dtype=torch.bfloat16)
    assert not state_scores.has_kernel(weight)
    assert not state_scores.has_kernel(weight.float().to("meta"))
    assert state_scores.has_kernel(weight.to("meta"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "unlike"])
@pytest.mark.parametrize("columns", [None, 3])
def test_scores_from_hidden_states_are_those_from_logits(
    family: str, columns: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_experts(tmp_path, 3, family)
    expected = together_of(experts).read(PROMPTS)
    monkeypatch.setattr(state_scores, "has_kernel", lambda weight: True)
    if columns is not None:
        # Few states at a time: all but the longest prompt begin with pieces of padding.
        monkeypatch.setattr(reading, "MAX_STATES", len(experts) * len(PROMPTS) * 16 * columns)
    together = together_of(experts)
    assert all(part.decoder.state_scores is not None for part in together.parts)
    found = together.read(PROMPTS)
    assert expected.scores is not None
    assert found.scores is not None
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    assert (found.scores[:, 1, :-1] == 0).all()
    torch.testing.assert_close(together.score(PROMPTS), expected.scores, rtol=0, atol=1e-5)
    tokens = torch.tensor([1, 2, 3, 4])
    for other in (found, expected):
        other.feed(tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


def test_texts_that_are_not_continued_are_scored_in_groups_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_experts(tmp_path, 3, "unlike")
    expected = together_of(experts).read(PROMPTS).scores
    assert expected is not None
    for name in ("MAX_LOGITS", "MAX_STATES"):
        monkeypatch.setattr(reading, name, 1)
    torch.testing.assert_close(together_of(experts).score(PROMPTS), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(state_scores, "has_kernel", lambda weight: True)
    together = together_of(experts)
    monkeypatch.setattr(reading, "empty_cache", lambda model: pytest.fail("a KV cache was made"))
    torch.testing.assert_close(together.score(PROMPTS), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("from_states")
def test_a_prompt_resumes_from_a_prefix_with_scores_from_hidden_states(tmp_path: Path) -> None:
    together = together_of(write_experts(tmp_path, 2))
    prompt, kept = PROMPTS[0], 7
    whole = together.read([prompt])
    prefixes = together.read([prompt[:9]]).prefixes(0, 9)
    assert prefixes is not None
    resumed = together.resume(prefixes, prompt, kept)
    assert whole.scores is not None
    torch.testing.assert_close(resumed.scores, whole.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(resumed.logits, whole.logits, rtol=0, atol=1e-4)


def test_the_posterior_after_a_long_prompt_is_that_of_float64_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_experts(tmp_path, 3, "gpt2")
    prompts = [[0, *np.random.default_rng(1).integers(1, 5, 23).tolist()] for _ in range(8)]

    def weights(scores: torch.Tensor | None) -> np.ndarray:
        assert scores is not None
        running = RunningPosterior(np.zeros(3), len(prompts))
        observe_prompts(running, scores, prompts)
        return running.log_weights()

    from_logits = weights(together_of(experts).read(prompts).scores)
    monkeypatch.setattr(state_scores, "has_kernel", lambda weight: True)
    own = weights(together_of(experts).read(prompts).scores)
    ids = torch.tensor(prompts)
    exact = []
    for path in experts.values():
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path).double()(ids).logits[:, :-1]
        exact.append(logits.log_softmax(2).gather(2, ids[:, 1:, None]).squeeze(2))
    drift = [np.abs(found - weights(torch.stack(exact))).max() for found in (own, from_logits)]
    assert drift[0] <= 1e-4
    assert drift[0] <= 2 * drift[1] + 1e-5


@pytest.mark.usefixtures("from_states")
@pytest.mark.parametrize("family", ["granite", "phi", "mamba2", "gemma2", "opt", "qwen3_moe"])
def test_a_family_whose_logits_are_more_than_a_projection_is_scored_from_them(family: str, tmp_path: Path) -> None:
    model = write_family(tmp_path, family)
    with torch.no_grad():
        if family == "phi":
            model.lm_head.bias.normal_()
            model.save_pretrained(tmp_path)
        prompts = [[1, 7, 3, 9, 2], [4, 4, 8, 60, 1]]
        ids = torch.tensor(prompts)
        logits = model(ids).logits[:, :-1].double()
    decoder = Decoder.load(tmp_path)
    # A scale, a bias, a recurrent state; a soft cap, a narrow projection and routed experts are none of those.
    assert (decoder.state_scores is None) == (family in ("granite", "phi"))
    expected = logits.log_softmax(2).gather(2, ids[:, 1:, None]).squeeze(2).float()
    log_probs = decoder.read(prompts).log_probs
    assert log_probs is not None
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(decoder.score(prompts), expected, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("from_states")
def test_a_model_with_nan_in_its_weights_is_refused_where_it_is_scored(tmp_path: Path) -> None:
    together = together_of(write_experts(tmp_path, 2))
    with torch.no_grad():
        together.decoders[1].model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged or damaged expert"):
        together.read(PROMPTS)
