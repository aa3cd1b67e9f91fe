"""The kernels on a GPU at real shapes: accuracy against float64, repeatability, and memory that was never written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from helpers.kernel_oracle import exact_mixture, exact_token_logprobs, scoring_case
from helpers.layer_cases import (
    KINDS,
    assert_gelu_is_exact,
    assert_norm_is_exact,
    assert_rotation_is_exact,
    gelu_case,
    norm_case,
    rotary_case,
)
from helpers.loss_cases import GRADIENT_ERROR, exact_loss, loss_case
from torch import Tensor

from btm_scale import kernels

INF = float("inf")
REPEATS = 10
CHECKED_TOKENS = 64  # the float64 product of all tokens would take longer than everything else


class Scoring(NamedTuple):
    experts: int
    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    soft_cap: float | None = None


class Mixing(NamedTuple):
    experts: int
    batch: int
    vocab: int


SCORING = [
    Scoring(1, 8192, 768, 50_304),
    Scoring(8, 8192, 768, 50_257),
    Scoring(8, 8192, 2048, 32_000),
    Scoring(2, 8192, 4096, 128_256),
    Scoring(64, 8192, 768, 32_000),
    Scoring(1, 1, 2048, 32_000),
    Scoring(8, 64, 4096, 128_256),
    Scoring(2, 1024, 2304, 256_000, soft_cap=30.0),
    Scoring(2, 1000, 1000, 50_257, torch.float16),
    Scoring(2, 1000, 77, 50_257),  # rows that do not start at a multiple of 16 bytes
    Scoring(2, 1024, 768, 32_000, torch.float32),
]
MIXING = [Mixing(1, 1, 50_257), Mixing(8, 32, 32_000), Mixing(8, 64, 128_256), Mixing(64, 64, 128_256)]


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Fill the memory that the next allocations get with NaN, so that an element left unwritten shows."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    blocks = [torch.full((1 << 28,), float("nan"), device=device) for _ in range(min(4, free // (1 << 30) - 1))]
    small = [torch.full((1 << 16,), float("nan"), device=device) for _ in range(64)]
    del blocks, small  # the caching allocator hands the same memory out again
    yield


def mixing_case(case: Mixing, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.randn(*case, generator=generator, device=device).mul_(3).bfloat16()
    logits[:, :, 5::100] = -INF
    return logits, torch.randn(case.batch, case.experts, generator=generator, device=device)


def assert_repeats(run: Callable[[], Tensor]) -> None:
    first = run()
    for _ in range(REPEATS - 1):
        assert torch.equal(run(), first)


@pytest.mark.parametrize("case", SCORING, ids=lambda case: "x".join(map(str, case[:4])) + f"-{case.dtype}"[7:])
def test_scores_agree_with_float64_and_repeat_to_the_bit(case, device):
    states, heads, targets = scoring_case(*case[:5], device)

    def run() -> Tensor:
        return kernels.token_logprobs(states, heads, targets, soft_cap=case.soft_cap)

    with poisoned(device):
        log_probs = run()
    assert log_probs.device == device
    assert log_probs.max() <= 0
    some = torch.linspace(0, case.tokens - 1, min(CHECKED_TOKENS, case.tokens), device=device).long()
    exact = exact_token_logprobs(states[:8, some], heads[:8], targets[some], case.soft_cap)
    assert (log_probs[:8, some] - exact).abs().max() <= 1e-4
    assert_repeats(run)


def test_vocabulary_shards_combine_to_the_full_vocabularys_scores(device):
    case = Scoring(1, 2048, 2048, 32_000)
    states, heads, targets = scoring_case(*case[:5], device)
    targets[0] = -100
    with poisoned(device):
        shards = [
            kernels.token_logprob_partials(states[0], heads[0][start : start + 4000], targets, vocab_start=start)
            for start in range(0, case.vocab, 4000)
        ]
    log_probs = kernels.combine_partials(shards)
    assert log_probs[0] == 0
    assert (log_probs - kernels.token_logprobs(states, heads, targets)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", MIXING, ids=lambda case: "x".join(map(str, case)))
def test_mixtures_agree_with_float64_and_repeat_to_the_bit(case, device):
    logits, log_weights = mixing_case(case, device)
    if case.experts > 1:
        log_weights[:, 1] = -INF
        logits[1] = float("nan")  # an expert of zero weight is not read
    with poisoned(device):
        mixture = kernels.mix_logits(logits, log_weights)
    assert mixture.device == device
    exact = exact_mixture(logits[:, :2], log_weights[:2])
    assert torch.equal(mixture[:2] == -INF, exact == -INF)
    assert (mixture[:2] - exact)[exact > -INF].abs().max() <= 1e-5
    assert_repeats(lambda: kernels.mix_logits(logits, log_weights))


@pytest.mark.parametrize("case", MIXING, ids=lambda case: "x".join(map(str, case)))
def test_sampled_tokens_have_the_mixtures_log_probability_and_repeat_to_the_bit(case, device):
    logits, log_weights = mixing_case(case, device)
    mixture = kernels.mix_logits(logits, log_weights)

    def run(temperature: float = 1.0) -> Tensor:
        running = torch.zeros(case.batch, case.experts, dtype=torch.float64, device=device)
        generator = torch.Generator(device).manual_seed(5)
        tokens, log_probs = kernels.mix_sample(
            logits, log_weights, temperature=temperature, generator=generator, log_likelihood=running
        )
        return torch.cat([tokens.double(), log_probs.double(), running.flatten()])

    with poisoned(device):
        result = run()
    tokens, log_probs = result[: case.batch].long(), result[case.batch : 2 * case.batch]
    assert (log_probs - mixture.gather(1, tokens.unsqueeze(1)).squeeze(1)).abs().max() <= 1e-5
    gain = logits.double().log_softmax(2).gather(2, tokens.expand(case.experts, -1).unsqueeze(2)).squeeze(2).T
    assert (result[2 * case.batch :].view(case.batch, case.experts) - gain).abs().max() <= 1e-4
    assert_repeats(run)
    assert torch.equal(run(0.0)[: case.batch].long(), mixture.argmax(1))


def test_tokens_are_sampled_with_the_mixtures_probabilities(device):
    vocab, draws = 40, 20_000
    logits, log_weights = mixing_case(Mixing(2, 1, vocab), device)
    exact = exact_mixture(logits, log_weights)[0]
    tokens, _ = kernels.mix_sample(
        logits.expand(2, draws, vocab).contiguous(),
        log_weights.expand(draws, 2).contiguous(),
        generator=torch.Generator(device).manual_seed(3),
    )
    expected = draws * exact.exp()
    common = expected >= 5
    statistic = ((torch.bincount(tokens, minlength=vocab) - expected) ** 2 / expected)[common].sum()
    degrees = int(common.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_launches_are_ordered_with_the_current_stream_of_their_device(device):
    """A copy that takes long is queued before the launch, on a stream that is not the default one."""
    case = Scoring(1, 4096, 1024, 32_000)
    states, heads, targets = scoring_case(*case[:5], device)
    expected = kernels.token_logprobs(states, heads, targets)
    late = torch.zeros_like(states)
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(states)
        result = kernels.token_logprobs(late, heads, targets)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_a_decoding_step_and_scores_of_known_heads_are_captured_in_a_graph(device):
    logits, log_weights = mixing_case(Mixing(8, 32, 32_000), device)
    states, heads, targets = scoring_case(2, 70, 256, 5000, torch.bfloat16, device)
    posterior, start = log_weights.double(), log_weights.double()

    def step() -> tuple[Tensor, Tensor]:
        tokens, _ = kernels.mix_sample(logits, posterior, temperature=0, log_likelihood=posterior)
        # The operator returns NaN instead of raising, so that it needs no synchronization.
        return tokens, torch.ops.btm_scale.token_logprobs(states, heads, targets, None, -100, None)

    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = [result.clone() for result in step()]
            expected_posterior = posterior.clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        posterior.copy_(start)
        graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    assert torch.equal(posterior, expected_posterior)


def test_offsets_beyond_2_to_the_31_address_the_right_memory(device):
    experts, batch, vocab = 20, 1024, 128_256  # 2.6 billion logits
    if torch.cuda.mem_get_info(device)[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    logits = torch.zeros(experts, batch, vocab, dtype=torch.bfloat16, device=device)
    logits[-1, -1, -1] = 20.0
    log_weights = torch.full((batch, experts), -INF, device=device)
    log_weights[:, -1] = 0.0
    tokens, log_probs = kernels.mix_sample(logits, log_weights, temperature=0)
    assert tokens[-1] == vocab - 1
    exact = logits[-1, -1].double().log_softmax(0)[-1]
    assert abs(log_probs[-1] - exact) <= 1e-5


def test_nan_and_a_target_outside_of_the_vocabulary_are_errors(device):
    states, heads, targets = scoring_case(2, 100, 256, 5000, torch.bfloat16, device)
    with pytest.raises(ValueError, match="Target 5000 is not in the vocabulary"):
        kernels.token_logprobs(states, heads, torch.full_like(targets, 5000))
    states[1, 4, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"\[1, 4\]"):
        kernels.token_logprobs(states, heads, targets)


@pytest.mark.parametrize(
    ("tokens", "rows", "vocab"), [(64, 32_000, 32_000), (8192, 50_304, 50_257), (64, 128_256, 128_256)]
)
def test_the_loss_and_its_gradient_are_exact_and_repeat_to_the_bit(device, tokens, rows, vocab):
    values, wanted = loss_case(tokens, rows, vocab, torch.bfloat16)
    targets = wanted.to(device)
    first, again = values.to(device), values.to(device)
    losses = kernels.cross_entropy_(first, targets, vocab_size=vocab)
    assert torch.equal(losses, kernels.cross_entropy_(again, targets, vocab_size=vocab))
    assert torch.equal(first, again)
    exact, gradient = exact_loss(values[:CHECKED_TOKENS], wanted[:CHECKED_TOKENS], vocab)
    assert (losses[:CHECKED_TOKENS].cpu() - exact).abs().max() <= 1e-5
    assert (first[:CHECKED_TOKENS].cpu() - gradient).abs().max() <= GRADIENT_ERROR[torch.bfloat16]


def test_a_bfloat16_product_is_added_to_float32_sums(device):
    left, right = (torch.randn(4096, size, device=device, dtype=torch.bfloat16) for size in (300, 200))
    total = torch.full((300, 200), float("nan"), device=device)
    kernels.add_product_(total, left, right, overwrite=True)
    kernels.add_product_(total, left, right)
    exact = 2 * left.double().T @ right.double()
    assert (total - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2048, 4, 2048), (1000, 3, 768), (64, 1, 8192)])
def test_norms_and_their_gradients_are_exact_and_repeat_to_the_bit(device, shape, kind, dtype):
    case = norm_case(shape, dtype, kind, device)
    with poisoned(device):
        assert_norm_is_exact(case)
    assert kernels.last_path("add_norm_backward").backend == "triton"
    total, _, mean, scale = kernels.add_norm(case.added, case.weight, shift=case.shift)
    assert_repeats(lambda: kernels.add_norm_backward(case.upstream, total, case.weight, mean, scale)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("groups", "per", "size"), [(16, 1, 128), (8, 4, 128), (12, 1, 64)])
def test_rotations_and_their_gradients_are_exact(device, groups, per, size, dtype):
    with poisoned(device):
        assert_rotation_is_exact(rotary_case(512, 4, groups, per, size, dtype, device))
    assert kernels.last_path("join_rotated").backend == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1024, 4, 3072), (1000, 3, 5000)])
def test_gradients_of_gelu_are_exact_and_repeat_to_the_bit(device, shape, dtype):
    case = gelu_case(shape, dtype, device)
    with poisoned(device):
        assert_gelu_is_exact(*case)
    assert kernels.last_path("bias_gelu_backward").backend == "triton"
    assert_repeats(lambda: kernels.bias_gelu_backward(*case)[1])


def test_norms_and_rotations_beyond_2_to_the_31_elements_address_the_right_memory(device):
    if torch.cuda.mem_get_info(device)[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free memory")
    rows = 2**31 // 2048 + 8
    added = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=device)
    added[-1] = torch.randn(2048, device=device)
    weight = torch.ones(2048, dtype=torch.bfloat16, device=device)
    total, normed, mean, scale = kernels.add_norm(added, weight)
    assert torch.equal(normed[-1], kernels.add_norm(added[-1:], weight)[1][0])
    result, _ = kernels.add_norm_backward(added, total, weight, mean, scale)
    assert torch.equal(result[-1], kernels.add_norm_backward(added[-1:], total[-1:], weight, mean, scale[-1:])[0][0])
    del total, normed, result
    mixed = added.view(-1, 1, 4, 4, 128)
    angles = torch.ones(len(mixed), 64, dtype=torch.bfloat16, device=device)
    query, key = kernels.split_rotated(mixed, angles, angles)
    last = kernels.split_rotated(mixed[-1:], angles[-1:], angles[-1:])
    assert torch.equal(query[-1:], last[0])
    assert torch.equal(key[-1:], last[1])
