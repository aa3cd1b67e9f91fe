"""The kernels as PyTorch operators: schemas, fake implementations, and what callers may pass."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_oracle import exact_mixture, exact_token_logprobs, mixing_case, scoring_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from btm_scale import kernels
from btm_scale.kernels import operators

INF = float("inf")
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def samples(dtype: torch.dtype) -> list[tuple[object, tuple[object, ...]]]:
    states, heads, targets = scoring_case(2, 17, 32, 111, dtype)
    logits, log_weights = mixing_case(3, 4, 100, dtype)
    running = torch.zeros(4, 3, dtype=torch.float64)
    return [
        (operators.TOKEN_LOGPROBS, (states, heads, targets, 100, -100, None)),
        (operators.TOKEN_LOGPROBS, (states[:, :0], heads, targets[:0], None, -100, 5.0)),
        (operators.TOKEN_LOGPROB_PARTIALS, (states[0], heads[0], targets, 7, None, -100, 5.0)),
        (operators.TOKEN_LOGPROB_PARTIALS, (states[0][:0], heads[0], targets[:0], 0, None, -100, None)),
        (operators.MIX_LOGITS, (logits, log_weights)),
        (operators.MIX_LOGITS, (logits.transpose(0, 2).contiguous().transpose(0, 2), log_weights)),
        (operators.MIX_SAMPLE, (logits, log_weights, 0.0, None, None)),
        (operators.MIX_SAMPLE, (logits, log_weights, 0.0, None, running)),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", range(8))
def test_pytorch_finds_schema_fake_and_compiled_behaviour_consistent(dtype, number):
    operator, arguments = samples(dtype)[number]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_and_meta_results_have_the_real_shapes_dtypes_and_strides(dtype):
    def layout(result: object) -> list[tuple[object, ...]]:
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return [(tuple(tensor.shape), tensor.dtype, tensor.stride()) for tensor in tensors]

    def call(convert) -> list[list[tuple[object, ...]]]:
        states, heads, targets = scoring_case(2, 17, 32, 111, dtype)
        states, heads, targets = convert(states), [convert(head) for head in heads], convert(targets)
        logits, log_weights = map(convert, mixing_case(3, 4, 100, dtype))
        running = convert(torch.zeros(4, 3, dtype=torch.float64))
        results = [
            kernels.token_logprobs(states, heads, targets, vocab_size=111),
            kernels.token_logprob_partials(states[0], heads[0], targets, vocab_start=5),
            kernels.mix_logits(logits, log_weights),
            kernels.mix_sample(logits, log_weights, temperature=0.5, log_likelihood=running),
        ]
        devices = {t.device for r in results for t in ([r] if isinstance(r, torch.Tensor) else r)}
        assert devices == {states.device}
        return [layout(result) for result in results]

    real = call(lambda tensor: tensor)
    assert call(lambda tensor: tensor.to("meta")) == real
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor) == real


@pytest.mark.parametrize("number", range(8))
def test_fake_results_are_on_the_gpu_of_their_inputs(number):
    operator, arguments = samples(torch.bfloat16)[number]
    with FakeTensorMode():
        on_gpu = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda:1"), arguments)
        result = operator(*on_gpu)
    for tensor in [result] if isinstance(result, torch.Tensor) else result:
        assert tensor.device == torch.device("cuda:1")


def test_results_do_not_require_gradients_of_their_inputs():
    states, heads, targets = scoring_case(1, 5, 32, 111)
    heads[0].requires_grad_()
    assert not kernels.token_logprobs(states, heads, targets).requires_grad
    logits, log_weights = mixing_case(2, 3, 100)
    assert not kernels.mix_logits(logits.requires_grad_(), log_weights).requires_grad


def test_the_path_of_a_call_on_the_cpu_is_the_reference():
    logits, log_weights = mixing_case(2, 3, 100)
    kernels.mix_logits(logits, log_weights)
    assert str(kernels.last_path("mix_logits")) == "reference"
    assert kernels.last_path() == kernels.last_path("mix_logits")
    assert kernels.last_path("never") is None


def test_no_experts_no_vocabulary_and_other_impossible_arguments_are_our_own_errors():
    states, heads, targets = scoring_case(2, 17, 32, 111)
    with pytest.raises(ValueError, match="no experts"):
        kernels.token_logprobs(states[:0], [], targets)
    with pytest.raises(ValueError, match=r"targets are torch.int32"):
        kernels.token_logprobs(states, heads, targets.int())
    with pytest.raises(ValueError, match="vocab_size is 0"):
        kernels.token_logprobs(states, heads, targets, vocab_size=0)
    with pytest.raises(ValueError, match="soft_cap is 0"):
        kernels.token_logprobs(states, heads, targets, soft_cap=0.0)
    with pytest.raises(ValueError, match="vocab_start is -1"):
        kernels.token_logprob_partials(states[0], heads[0], targets, vocab_start=-1)
    logits, log_weights = mixing_case(2, 3, 111)
    with pytest.raises(ValueError, match="at least one expert"):
        kernels.mix_logits(logits[:0], log_weights[:, :0])
    with pytest.raises(ValueError, match="one token of vocabulary"):
        kernels.mix_sample(logits[:, :, :0], log_weights)
    with pytest.raises(ValueError, match=r"log_weights are torch\.int64"):
        kernels.mix_logits(logits, log_weights.long())
    with pytest.raises(ValueError, match=r"log_likelihood is torch\.int64"):
        kernels.mix_sample(logits, log_weights, log_likelihood=torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no partials"):
        kernels.combine_partials([])
    with pytest.raises(ValueError, match="on different devices"):
        kernels.combine_partials([tuple(torch.zeros(5, device=name) for _ in range(3)) for name in ("cpu", "meta")])
    with pytest.raises(ValueError, match="no partials"):
        kernels.combine_partials(tuple(torch.zeros(0, 5) for _ in range(3)))


def test_no_tokens_and_no_rows_give_empty_results():
    states, heads, targets = scoring_case(2, 17, 32, 111)
    assert kernels.token_logprobs(states[:, :0], heads, targets[:0]).shape == (2, 0)
    partials = kernels.token_logprob_partials(states[0, :0], heads[0], targets[:0])
    assert [part.shape for part in partials] == [(0,)] * 3
    assert kernels.combine_partials([partials]).shape == (0,)
    logits, log_weights = mixing_case(2, 3, 111)
    assert kernels.mix_logits(logits[:, :0], log_weights[:0]).shape == (0, 111)
    tokens, log_probs = kernels.mix_sample(logits[:, :0], log_weights[:0], log_likelihood=torch.zeros(0, 2))
    assert tokens.shape == log_probs.shape == (0,)


def test_a_shard_without_rows_is_padding():
    states, heads, targets = scoring_case(1, 5, 32, 111)
    empty = kernels.token_logprob_partials(states[0], heads[0][:0], targets, vocab_start=111)
    assert (empty[0] == -INF).all()
    assert (empty[1] == 0).all()
    full = kernels.token_logprob_partials(states[0], heads[0], targets)
    assert torch.equal(kernels.combine_partials([full, empty]), kernels.combine_partials([full]))


def test_strided_inputs_give_the_same_as_contiguous_ones():
    states, heads, targets = scoring_case(2, 17, 32, 111)
    wide = torch.zeros(17, 2, 64)
    wide[:, :, ::2] = states.transpose(0, 1)
    strided = [head.T.contiguous().T for head in heads]
    doubled = torch.stack([targets, targets], 1)[:, 0]
    log_probs = kernels.token_logprobs(wide[:, :, ::2].transpose(0, 1), strided, doubled)
    assert (log_probs - exact_token_logprobs(states, heads, targets)).abs().max() <= 1e-5
    logits, log_weights = mixing_case(3, 4, 100)
    running = torch.zeros(3, 4, dtype=torch.float64).T
    mixture = kernels.mix_logits(logits.transpose(0, 2).contiguous().transpose(0, 2), log_weights.T.contiguous().T)
    exact = exact_mixture(logits, log_weights)
    assert (mixture - exact)[exact > -INF].abs().max() <= 1e-5
    tokens, _ = kernels.mix_sample(logits, log_weights, temperature=0, log_likelihood=running)
    gain = logits.double().log_softmax(2).gather(2, tokens.expand(3, 4).unsqueeze(2)).squeeze(2).T
    assert torch.allclose(running, gain, rtol=0, atol=1e-5)


def test_one_expert_and_a_row_of_impossible_tokens():
    logits, log_weights = torch.randn(1, 2, 50), torch.zeros(2, 1)
    assert (kernels.mix_logits(logits, log_weights) - logits[0].log_softmax(1)).abs().max() <= 1e-5
    logits[0, 0] = -INF
    assert (kernels.mix_logits(logits, log_weights)[0] == -INF).all()
    tokens, log_probs = kernels.mix_sample(logits, log_weights)
    assert tokens[0] == -1
    assert log_probs[0] == -INF
    assert tokens[1] >= 0
