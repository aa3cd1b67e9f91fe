"""The PyTorch reference, through the public functions, against float64."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_oracle import exact_mixture, exact_token_logprobs, mixing_case, scoring_case
from torch.utils._python_dispatch import TorchDispatchMode

from btm_scale.kernels import combine_partials, reference, token_logprob_partials
from btm_scale.kernels.reference import mix_logits, mix_sample

INF = float("inf")


@pytest.fixture
def kernels(monkeypatch):
    """The public functions with the reference backend, whatever the environment."""
    from btm_scale import kernels

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("experts", "tokens", "hidden", "vocab"),
    [(1, 1, 32, 111), (3, 17, 72, 32_000), (8, 257, 40, 111), (1, 257, 64, 50_257), (3, 600, 33, 5000)],
)
def test_scores_are_exact_for_every_dtype_and_odd_shape(kernels, dtype, experts, tokens, hidden, vocab):
    states, heads, targets = scoring_case(experts, tokens, hidden, vocab, dtype)
    log_probs = kernels.token_logprobs(states, heads, targets)
    assert log_probs.dtype == torch.float32
    assert log_probs.max() <= 0
    assert (log_probs - exact_token_logprobs(states, heads, targets)).abs().max() <= 1e-5


def test_float32_products_ignore_a_lower_matmul_precision(kernels):
    states, heads, targets = scoring_case(1, 64, 256, 4096, torch.float32)
    exact = exact_token_logprobs(states, heads, targets)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        log_probs = kernels.token_logprobs(states, heads, targets)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (log_probs - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_with_tokens_times_vocabulary_size(kernels, dtype):
    class LargestTensor(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
            return result

    states, heads, targets = scoring_case(4, 2048, 16, 16_384, dtype)
    largest_input = max(states.numel(), heads[0].numel())
    with LargestTensor() as largest:
        kernels.token_logprobs(states, heads, targets)
    block = reference.TOKEN_BLOCK * reference.VOCAB_BLOCK
    assert largest.elements <= max(block, largest_input) < 2048 * 16_384


def test_log_odds_drift_less_than_0_01_nats_over_2048_tokens(kernels, record_property):
    states, heads, targets = scoring_case(2, 2048, 256, 4096, torch.bfloat16)
    exact = exact_token_logprobs(states, heads, targets)

    def drift(log_probs: torch.Tensor) -> float:
        error = (log_probs - exact).double()
        return float((error[0] - error[1]).cumsum(0).abs().max())

    ours = drift(kernels.token_logprobs(states, heads, targets))
    rounded = [
        -F.cross_entropy(F.linear(h, head).float(), targets, reduction="none")
        for h, head in zip(states, heads, strict=True)
    ]
    naive = drift(torch.stack(rounded))
    record_property("drift_nats", ours)
    record_property("drift_nats_of_bfloat16_logits", naive)
    print(f"drift {ours:.1e} nats, with bfloat16 logits {naive:.2f}")
    assert ours <= 0.01
    assert naive > 10 * ours


@pytest.mark.parametrize("cuts", [(0, 300), (0, 100, 200, 300), (0, 1, 299, 300)])
def test_vocabulary_shards_combine_to_the_full_vocabularys_scores(kernels, cuts):
    states, heads, targets = scoring_case(1, 37, 32, 300)
    targets %= 250
    targets[0] = -100
    shards = [
        token_logprob_partials(states[0], heads[0][a:b], targets, vocab_start=a, vocab_size=250)
        for a, b in itertools.pairwise(cuts)
    ]
    log_probs = combine_partials(shards)
    exact = exact_token_logprobs(states, [heads[0][:250]], targets)[0]
    assert log_probs[0] == 0
    assert (log_probs - exact).abs().max() <= 1e-5


def test_a_shard_of_padding_gives_log_probability_minus_infinity(kernels):
    states, heads, targets = scoring_case(1, 5, 32, 300)
    maximum, sum_exp, target = token_logprob_partials(states[0], heads[0], targets, vocab_start=300, vocab_size=300)
    assert (maximum == -INF).all()
    assert (sum_exp == 0).all()
    assert (target == -INF).all()
    assert (combine_partials([(maximum, sum_exp, target)]) == -INF).all()


def test_a_certain_token_has_log_probability_exactly_zero(kernels):
    states, heads, targets = torch.ones(1, 64, 8), [torch.randn(50, 8)], torch.zeros(64, dtype=torch.int64)
    heads[0][0] = 1000.0
    assert (kernels.token_logprobs(states, heads, targets) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_nan_raises_with_its_index(kernels, bad):
    states, heads, targets = scoring_case(2, 17, 32, 111)
    states[1, 4, 3] = bad
    with pytest.raises(FloatingPointError, match=r"\[1, 4\].*diverged"):
        kernels.token_logprobs(states, heads, targets)
    with pytest.raises(FloatingPointError):
        combine_partials([token_logprob_partials(states[1], heads[1], targets)])


def test_invalid_arguments_raise(kernels):
    states, heads, targets = scoring_case(2, 17, 32, 111)
    with pytest.raises(ValueError, match="one head per expert"):
        kernels.token_logprobs(states, heads[:1], targets)
    with pytest.raises(ValueError, match="must agree"):
        kernels.token_logprobs(states, heads, targets[:3])
    with pytest.raises(ValueError, match="one at a time"):
        kernels.token_logprobs(states, [heads[0], heads[1][:100]], targets)
    with pytest.raises(ValueError, match="Target 111 is not in the vocabulary"):
        kernels.token_logprobs(states, heads, targets.clone().fill_(111))
    with pytest.raises(ValueError, match=r"Use bfloat16, float16 or float32"):
        kernels.token_logprobs(states.double(), heads, targets)
    logits, log_weights = mixing_case(2, 3, 111)
    with pytest.raises(ValueError, match=r"\[batch, experts\]"):
        kernels.mix_logits(logits, log_weights.T)
    with pytest.raises(ValueError, match="temperature is -1"):
        kernels.mix_sample(logits, log_weights, temperature=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "batch", "vocab"), [(1, 1, 111), (3, 17, 5000), (8, 2, 50_257)])
def test_mixtures_are_exact_for_every_dtype_and_odd_shape(dtype, experts, batch, vocab):
    logits, log_weights = mixing_case(experts, batch, vocab, dtype)
    logits[0] += 1e4 if dtype == torch.float32 else 0
    if experts > 1:
        log_weights[0, 1] = -INF
    mixture, exact = mix_logits(logits, log_weights), exact_mixture(logits, log_weights)
    assert torch.equal(mixture == -INF, exact == -INF)
    assert (mixture - exact)[exact > -INF].abs().max() <= 1e-5
    assert mixture.max() <= 0


def test_rows_without_weight_are_minus_infinity_and_experts_without_weight_are_not_read():
    logits, log_weights = mixing_case(3, 4, 1000)
    log_weights[0, 1] = -INF
    log_weights[2] = -INF
    clean = mix_logits(logits, log_weights)
    logits[1, 0, 5] = logits[1, 1, 5] = float("nan")
    mixture = mix_logits(logits, log_weights)
    assert torch.equal(mixture[0], clean[0])
    assert mixture[1].isnan().all()
    assert (mixture[2] == -INF).all()
    tokens, log_probs = mix_sample(logits, log_weights)
    assert tokens[1:3].tolist() == [-1, -1]
    assert log_probs[1].isnan()
    assert log_probs[2] == -INF


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_sampled_with_the_mixtures_probabilities(temperature):
    vocab, draws = 40, 20_000
    logits, log_weights = mixing_case(2, 1, vocab)
    exact = exact_mixture(logits, log_weights)[0]
    expected = draws * (exact / temperature).softmax(0)
    running = torch.zeros(draws, 2, dtype=torch.float64)
    tokens, log_probs = mix_sample(
        logits.expand(2, draws, vocab),
        log_weights.expand(draws, 2),
        temperature=temperature,
        generator=torch.Generator().manual_seed(3),
        log_likelihood=running,
    )
    counts = torch.bincount(tokens, minlength=vocab).double()
    common = expected >= 5
    degrees = int(common.sum())
    assert ((counts - expected) ** 2 / expected)[common].sum() < degrees + 4 * (2 * degrees) ** 0.5
    assert (log_probs - exact[tokens]).abs().max() <= 1e-5
    gain = logits[:, 0].double().log_softmax(1)[:, tokens].T
    assert torch.allclose(running, gain, rtol=0, atol=1e-5)


def test_temperature_zero_takes_the_most_likely_token():
    logits, log_weights = mixing_case(3, 17, 5000)
    tokens, log_probs = mix_sample(logits, log_weights, temperature=0)
    best = mix_logits(logits, log_weights).max(1)
    assert torch.equal(tokens, best.indices)
    assert torch.equal(log_probs, best.values)


def test_the_package_runs_on_a_cpu_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from btm_scale import kernels\n"
        "kernels.mix_logits(torch.zeros(1, 1, 5), torch.zeros(1, 1))\n"
        "assert not any(name.startswith('btm_scale.') and 'kernels' not in name for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
