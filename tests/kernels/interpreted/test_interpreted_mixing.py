"""The Triton mixing kernels on CPU tensors, against float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from helpers.cuts import cut
from helpers.kernel_oracle import exact_mixture, mixing_case, sparse_tensor

from btm_scale.kernels import mix_logits, mix_sample, triton_launch
from btm_scale.kernels.tuning_table import MIX_RULES, MixConfig


class Shape(NamedTuple):
    experts: int
    batch: int
    vocab: int


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    Shape(1, 1, 111),
    Shape(3, 17, 111),
    Shape(2, 37, 111),
    Shape(8, 2, 32_000),
    Shape(3, 2, 50_257),
    Shape(8, 1, 128_256),
]
NARROW = MixConfig(block=64, split=160, warps=4)
INF = float("inf")


def assert_close(log_probs: torch.Tensor, exact: torch.Tensor) -> None:
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs == -INF, exact == -INF)
    finite = exact > -INF
    assert (log_probs[finite] - exact[finite]).abs().max() <= 1e-5
    assert log_probs.max() <= 0


@pytest.mark.parametrize(
    "case", cut(itertools.product(FLOATS, SHAPES), lambda case: case[0] == torch.bfloat16 or case[1].vocab < 1000)
)
def test_mixtures_are_exact_for_every_dtype_and_odd_shape(case):
    dtype, (experts, batch, vocab) = case
    logits, log_weights = mixing_case(experts, batch, vocab, dtype)
    assert_close(mix_logits(logits, log_weights), exact_mixture(logits, log_weights))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_on_one_experts_logits_changes_nothing(offset):
    logits, log_weights = mixing_case(3, 4, 1000)
    logits[1] += offset
    assert_close(mix_logits(logits, log_weights), exact_mixture(logits, log_weights))


def test_large_log_weights_keep_their_differences():
    logits, log_weights = mixing_case(3, 4, 1000)
    log_weights = log_weights.double() - 3e6
    assert_close(mix_logits(logits, log_weights), exact_mixture(logits, log_weights))


def test_zero_weights_and_impossible_tokens_are_exact():
    logits, log_weights = mixing_case(3, 4, 1000)
    log_weights[0, 1] = -INF
    log_weights[1, :2] = -INF
    log_weights[2] = -INF
    logits[1, 3] = -INF
    logits[:, :, 7] = -INF
    logits[:, 3, 64:192] = -INF
    mixture = mix_logits(logits, log_weights)
    assert (mixture[2] == -INF).all()
    exact = exact_mixture(logits, log_weights)
    # A row without weight has no distribution, and expert 1 has no possible token in row 3.
    assert_close(mixture[[0, 1, 3]], exact[[0, 1, 3]])
    assert torch.equal(mixture[1], mix_logits(logits[2:], log_weights[:, 2:])[1])


def test_nan_is_ignored_in_an_expert_without_weight_and_fills_the_row_otherwise():
    logits, log_weights = mixing_case(3, 4, 1000)
    log_weights[0, 1] = -INF
    clean = mix_logits(logits, log_weights)
    logits[1, 0, 5] = float("nan")
    logits[1, 2, 5] = float("nan")
    logits[0, 3, 9] = INF
    mixture = mix_logits(logits, log_weights)
    assert torch.equal(mixture[:2], clean[:2])
    assert mixture[2:].isnan().all()
    tokens, log_probs = mix_sample(logits, log_weights)
    assert (tokens[2:] == -1).all()
    assert log_probs[2:].isnan().all()
    assert (tokens[:2] >= 0).all()


def test_a_rows_mixture_is_bit_identical_with_and_without_other_rows():
    logits, log_weights = mixing_case(3, 6, 1000)
    together = triton_launch.mix_logits(logits, log_weights, config=NARROW)
    alone = [triton_launch.mix_logits(logits[:, row:][:, :1], log_weights[row:][:1], config=NARROW) for row in range(6)]
    assert torch.equal(together, torch.cat(alone))
    assert_close(together, exact_mixture(logits, log_weights))


def test_temperature_zero_takes_the_most_likely_token():
    logits, log_weights = mixing_case(3, 17, 1000)
    mixture = mix_logits(logits, log_weights)
    tokens, log_probs = mix_sample(logits, log_weights, temperature=0)
    assert torch.equal(tokens, mixture.argmax(1))
    assert torch.equal(log_probs, mixture.max(1).values)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_sampled_with_the_mixtures_probabilities(temperature):
    vocab, draws = 6, 200
    logits, log_weights = mixing_case(2, 1, vocab)
    exact = exact_mixture(logits, log_weights)[0]
    expected = draws * (exact / temperature).softmax(0)
    tokens, log_probs = triton_launch.mix_sample(
        logits.expand(2, draws, vocab).contiguous(),
        log_weights.expand(draws, 2).contiguous(),
        temperature,
        torch.Generator().manual_seed(3),
        None,
        config=NARROW._replace(block=16),
    )
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    degrees = int(common.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    assert (log_probs - exact[tokens]).abs().max() <= 1e-5


def test_samples_depend_on_the_generator_and_not_on_the_block_shape():
    logits, log_weights = mixing_case(2, 6, 1000)

    def draw(seed: int, config: MixConfig = MIX_RULES["interpreter"]) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return triton_launch.mix_sample(logits, log_weights, 1.0, generator, None, config=config)[0].tolist()

    assert draw(1) == draw(1) == draw(1, NARROW)
    assert draw(1) != draw(2)


def test_the_launch_that_picks_a_token_adds_its_log_likelihood():
    logits, log_weights = mixing_case(3, 4, 1000)
    log_weights[1, 2] = -INF
    log_weights[3] = -INF
    running = torch.full((4, 3), 0.5, dtype=torch.float64)
    tokens, log_probs = mix_sample(logits, log_weights, log_likelihood=running)
    assert tokens[3] == -1
    assert log_probs[3] == -INF
    gain = logits.double().log_softmax(2).gather(2, tokens.clamp(min=0).expand(3, 4)[:, :, None])[:, :, 0].T
    gain[log_weights == -INF] = 0
    assert torch.allclose(running, gain + 0.5, rtol=0, atol=1e-5)


def test_the_running_likelihoods_may_be_the_weights_themselves():
    """Then they are the posterior, up to normalization, and a decoding step needs no other kernel for it."""
    prior = torch.tensor([[0.0, -1.0, -2.0], [-1.0, -INF, 0.0], [-3e6, -3e6 - 1, -3e6]], dtype=torch.float64)
    posterior, running, separate = prior.clone(), torch.zeros_like(prior), torch.Generator().manual_seed(4)
    together = torch.Generator().manual_seed(4)
    for step in range(5):
        logits, _ = mixing_case(3, 3, 300 + step)
        expected = mix_sample(logits, prior + running, generator=separate, log_likelihood=running)
        sampled = mix_sample(logits, posterior, generator=together, log_likelihood=posterior)
        assert torch.equal(sampled[0], expected[0])
        assert torch.allclose(posterior, prior + running, rtol=0, atol=1e-8)
    assert (running[0] < -1).all()


def test_strided_inputs_and_a_strided_running_likelihood_give_the_same_as_contiguous_ones():
    logits, log_weights = mixing_case(3, 4, 1000)
    strided = logits.transpose(0, 2).contiguous().transpose(0, 2)
    running = [torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64).T]
    results = [
        mix_sample(logits, log_weights, temperature=0, log_likelihood=running[0]),
        mix_sample(strided, log_weights.T.contiguous().T, temperature=0, log_likelihood=running[1]),
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(*running)
    assert (running[1] < 0).all()


def test_offsets_beyond_2_to_the_31_address_the_right_memory():
    near, log_weights = mixing_case(2, 3, 111)
    far = sparse_tensor((2, 3, 111), (2**32 + 64, 2**30 + 2**29, 1), torch.bfloat16)
    far.copy_(near)
    near = near.bfloat16()
    assert torch.equal(mix_logits(far, log_weights), mix_logits(near, log_weights))
    running = [torch.zeros(3, 2, dtype=torch.float64) for _ in range(2)]
    for logits, log_likelihood in zip((far, near), running, strict=True):
        mix_sample(logits, log_weights, temperature=0, log_likelihood=log_likelihood)
    assert torch.equal(*running)
