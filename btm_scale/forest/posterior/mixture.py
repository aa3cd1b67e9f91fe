"""The domain posterior and the mixture that it makes of the experts (arXiv 2208.03306, section 2.3).

Everything is arithmetic on log-probabilities [experts, tokens], float64 inside: a mixture of text under
E experts needs only the E numbers that each gave to each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.evidence import Evidence, Mode, checked_tempering
from btm_scale.forest.posterior.log_weights import checked, keep_largest, logsumexp, normalised_prior
from btm_scale.util.pools import in_threads

Array = np.ndarray

# Numbers that are worked on at once (4 MB of float64): a stream of any length, under any number of experts, fits.
_AT_ONCE = 2**19
# Weights [experts, blocks] that move side by side: tempering takes a step for each token.
_ABREAST = 2**14


def mixture_log_probs(
    log_probs: Array,
    block_starts: Array,
    *,
    log_prior: Array | None = None,
    mode: Mode = "prefix",
    top_k: int | None = None,
    tempering: Tempering | None = None,
    top_k_per_token: int | None = None,
) -> Array:
    """Log-probability in nats of every token under the mixture, float64 [tokens].

    p(x_t) = sum_j w_j(t) p_j(x_t), with weights that start from the prior at each block and are

    - `prefix`: proportional to prior_j x product of p_j over all earlier tokens of the block (the paper's formula);
    - `token`: proportional to prior_j x p_j of the one token before (what the paper's released code computes);
    - `tempered`: as `tempering` says;
    - `fixed`: the prior itself.

    `log_probs` [experts, tokens] nats; `block_starts` [blocks] the first token of each block, ascending from 0
    ([0] lets the posterior carry on through all of the text); `log_prior` [experts] nats (default: uniform;
    normalised here); `top_k`: only so many experts of the largest prior take part (ties go to the first);
    `top_k_per_token`: only so many of the largest weight before each token.

    Memory does not grow with experts x tokens. Raises ValueError for a log-probability above 0 or NaN, or a prior that
    weighs nobody.
    """
    temperings = [checked_tempering(mode, tempering)]
    return _mixtures(log_probs, block_starts, temperings, log_prior, mode, top_k, top_k_per_token)[0]


def tempered_mixtures(
    log_probs: Array, block_starts: Array, temperings: Sequence[Tempering], *, log_prior: Array
) -> Array:
    """`mixture_log_probs` in mode `tempered` with each of several temperings, float64 [temperings, tokens].

    They go through the text side by side, which on a short text is many times as fast as one after another.
    """
    mixtures = np.empty((len(temperings), np.shape(log_probs)[1]))
    # Without a share of the prior there is less to work out.
    for mixes in (False, True):
        alike = [i for i, tempering in enumerate(temperings) if (tempering.share > 0) == mixes]
        if alike:
            mixtures[alike] = _mixtures(
                log_probs, block_starts, [temperings[i] for i in alike], log_prior, "tempered", None, None
            )
    return mixtures


def mean_tempered_weights(log_probs: Array, block_starts: Array, tempering: Tempering, *, log_prior: Array) -> Array:
    """Each expert's weight in the tempered mixture, as a mean over all tokens: [experts], which sum to 1.

    Arguments are `mixture_log_probs`'s. The prior of a text is nearly one expert's alone; this is who in fact speaks.
    """
    log_probs = np.asarray(log_probs)
    prior = normalised_prior(log_prior, len(log_probs))
    active = np.flatnonzero(np.isfinite(prior))
    total = np.zeros(len(log_probs))
    for begin, count, length in _equal_blocks(block_starts, log_probs.shape[1], len(active)):
        text = log_probs[:, begin : begin + count * length].reshape(len(log_probs), count, length)
        for _, _, weights in _weighed(text, active, prior[active], "tempered", [tempering]):
            total[active] += np.exp(weights).sum(axis=(1, 2))
    return total / total.sum()


def _mixtures(
    log_probs: Array,
    block_starts: Array,
    temperings: Sequence[Tempering],
    log_prior: Array | None,
    mode: Mode,
    top_k: int | None,
    top_k_per_token: int | None,
) -> Array:
    """One mixture a tempering, [temperings, tokens]: each is more blocks beside the others' in the same arithmetic.

    All temperings have a share of the prior, or none has.
    """
    log_probs = np.asarray(log_probs)
    prior = normalised_prior(log_prior, len(log_probs), top_k)
    active = np.flatnonzero(np.isfinite(prior))
    prior = prior[active]
    result = np.empty((len(temperings), log_probs.shape[1]))

    def fill(begin: int, count: int, length: int) -> None:
        columns = slice(begin, begin + count * length)
        text = log_probs[:, columns].reshape(len(log_probs), count, length)
        where = result[:, columns].reshape(len(temperings) * count, length)
        for first, piece, weights in _weighed(text, active, prior, mode, temperings):
            if top_k_per_token is not None and top_k_per_token < len(active):
                keep_largest(weights, top_k_per_token)
                weights -= logsumexp(weights)
            weights += piece
            where[:, first : first + piece.shape[2]] = logsumexp(weights)
        result[:, columns] = where.reshape(len(temperings), -1)

    groups = list(_equal_blocks(block_starts, log_probs.shape[1], len(active) * len(temperings)))
    in_threads(lambda group: fill(*group), groups)  # each writes its own part: any order gives the same
    return np.minimum(result, 0.0)


def _weighed(
    text: Array, active: Array, prior: Array, mode: Mode, temperings: Sequence[Tempering]
) -> Iterator[tuple[int, Array, Array]]:
    """A text [experts, blocks, tokens] in pieces: the first token's place, the piece, and its tokens' log weights.

    Both are [active experts, temperings x blocks, some tokens]; `prior` is of the active ones.
    """
    _, count, length = text.shape
    evidence = Evidence(prior, count, mode, temperings)
    step = max(1, _AT_ONCE // (len(active) * count * len(temperings)))
    for first in range(0, length, step):
        piece = checked(text[active, :, first : first + step])
        if mode == "tempered":
            # Laid out by token, which is how it is gone through.
            by_token = np.ascontiguousarray(np.moveaxis(piece, 2, 0))
            piece = np.moveaxis(np.tile(by_token, (1, 1, len(temperings))), 0, 2)
        yield first, piece, evidence.weights_before(piece)


def block_posterior(block: Array, log_prior: Array) -> Array:
    """log p(D=j | the whole block), nats [experts], from log-probabilities [experts, tokens] and a prior [experts]."""
    joint = log_prior + block.sum(axis=1)
    return joint - logsumexp(joint)


def blocks_of(starts: Array, tokens: int) -> list[tuple[int, int]]:
    """(begin, end) of every block. Raises ValueError for starts that don't ascend from 0."""
    bounds = [*map(int, starts), tokens]
    if bounds[0] != 0 or any(end <= begin for begin, end in pairwise(bounds)):
        raise ValueError(f"block starts must ascend from 0 below {tokens}, not {list(starts[:3])}...")
    return list(pairwise(bounds))


def _equal_blocks(starts: Array, tokens: int, experts: int) -> Iterator[tuple[int, int, int]]:
    """(begin, count, length) of neighbouring blocks of one length, as many as are worked on at once."""
    begin, count, length = 0, 0, 0
    for first, end in blocks_of(starts, tokens):
        if count and (end - first != length or experts * (count + 1) > _ABREAST):
            yield begin, count, length
            begin, count = first, 0
        count, length = count + 1, end - first
    yield begin, count, length
