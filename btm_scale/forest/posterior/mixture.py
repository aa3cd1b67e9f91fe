"""The domain posterior and the mixture of experts under it (arXiv 2208.03306, section 2.3).

Everything is float64 arithmetic on log-probabilities [experts, tokens]: the mixture of E experts needs only their E
log-probabilities of each token.
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

# Elements processed at once (4 MB of float64), for streams of any length and any number of experts.
_AT_ONCE = 2**19
# Maximum weights [experts x blocks] updated at once: tempering takes one step per token.
_MAX_WEIGHTS = 2**14


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
    """Return the log-probability in nats of every token under the mixture, float64 [tokens].

    p(x_t) = sum_j w_j(t) p_j(x_t), with weights that start from the prior at each block and are

    - `prefix`: proportional to prior_j x product of p_j over all earlier tokens of the block (the paper's formula);
    - `token`: proportional to prior_j x p_j of the one token before (what the paper's released code computes);
    - `tempered`: as `tempering` says;
    - `fixed`: the prior itself.

    `log_probs` [experts, tokens] nats; `block_starts` [blocks] the first token of each block, ascending from 0
    ([0] lets the posterior run through the complete text); `log_prior` [experts] nats (default: uniform;
    normalised here); `top_k`: use only this many experts, those with the largest prior (ties go to the first);
    `top_k_per_token`: use only this many experts at each token, those with the largest weight before it.

    Memory does not grow with experts x tokens. Raises ValueError for a log-probability above 0 or NaN, or a prior
    without weight.
    """
    temperings = [checked_tempering(mode, tempering)]
    return _mixtures(log_probs, block_starts, temperings, log_prior, mode, top_k, top_k_per_token)[0]


def tempered_mixtures(
    log_probs: Array, block_starts: Array, temperings: Sequence[Tempering], *, log_prior: Array
) -> Array:
    """Return `mixture_log_probs` in mode `tempered` for each tempering, float64 [temperings, tokens].

    They are computed together, which is many times faster on short text than one after another.
    """
    mixtures = np.empty((len(temperings), np.shape(log_probs)[1]))
    # Without a share of the prior, there is less to compute.
    for mixes in (False, True):
        chosen = [i for i, tempering in enumerate(temperings) if (tempering.share > 0) == mixes]
        if chosen:
            mixtures[chosen] = _mixtures(
                log_probs, block_starts, [temperings[i] for i in chosen], log_prior, "tempered", None, None
            )
    return mixtures


def mean_tempered_weights(
    log_probs: Array, block_starts: Array, tempering: Tempering, *, log_prior: Array, counted: Array | None = None
) -> Array:
    """Return each expert's weight in the tempered mixture, averaged over tokens: [experts], sums to 1.

    Args: as of `mixture_log_probs`, and `counted`, the tokens that are averaged over, bool [tokens] (default: all). A
    text's prior is nearly one-hot; these are the weights that are in fact used.
    """
    log_probs = np.asarray(log_probs)
    prior = normalised_prior(log_prior, len(log_probs))
    active = np.flatnonzero(np.isfinite(prior))
    total = np.zeros(len(log_probs))
    for begin, count, length in _equal_blocks(block_starts, log_probs.shape[1], len(active)):
        text = log_probs[:, begin : begin + count * length].reshape(len(log_probs), count, length)
        own = None if counted is None else counted[begin : begin + count * length].reshape(count, length)
        for first, piece, weights in _pieces_with_weights(text, active, prior[active], "tempered", [tempering]):
            used = np.exp(weights)
            if own is not None:
                used *= own[:, first : first + piece.shape[2]]
            total[active] += used.sum(axis=(1, 2))
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
    """Return one mixture per tempering, [temperings, tokens]; temperings are vectorised as extra blocks.

    Either all temperings have a share of the prior, or none has.
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
        for first, piece, weights in _pieces_with_weights(text, active, prior, mode, temperings):
            if top_k_per_token is not None and top_k_per_token < len(active):
                keep_largest(weights, top_k_per_token)
                weights -= logsumexp(weights)
            weights += piece
            where[:, first : first + piece.shape[2]] = logsumexp(weights)
        result[:, columns] = where.reshape(len(temperings), -1)

    groups = list(_equal_blocks(block_starts, log_probs.shape[1], len(active) * len(temperings)))
    in_threads(lambda group: fill(*group), groups)  # each writes its own part, in any order
    return np.minimum(result, 0.0)


def _pieces_with_weights(
    text: Array, active: Array, prior: Array, mode: Mode, temperings: Sequence[Tempering]
) -> Iterator[tuple[int, Array, Array]]:
    """Yield a text [experts, blocks, tokens] in pieces: the index of the first token, the piece, and its log weights.

    Both are [active experts, temperings x blocks, tokens of the piece]; `prior` is over the active experts.
    """
    _, count, length = text.shape
    evidence = Evidence(prior, count, mode, temperings)
    step = max(1, _AT_ONCE // (len(active) * count * len(temperings)))
    for first in range(0, length, step):
        piece = checked(text[active, :, first : first + step])
        if mode == "tempered":
            # Contiguous by token, the order in which it is processed.
            by_token = np.ascontiguousarray(np.moveaxis(piece, 2, 0))
            piece = np.moveaxis(np.tile(by_token, (1, 1, len(temperings))), 0, 2)
        yield first, piece, evidence.weights_before(piece)


def block_posterior(block: Array, log_prior: Array) -> Array:
    """Return log p(D=j | block) in nats [experts], from log-probabilities [experts, tokens] and a prior [experts]."""
    joint = log_prior + block.sum(axis=1)
    return joint - logsumexp(joint)


def blocks_of(starts: Array, tokens: int) -> list[tuple[int, int]]:
    """Return (begin, end) of every block. Raises ValueError if the starts do not ascend from 0."""
    bounds = [*map(int, starts), tokens]
    if bounds[0] != 0 or any(end <= begin for begin, end in pairwise(bounds)):
        raise ValueError(f"block starts must ascend from 0 below {tokens}, not {list(starts[:3])}...")
    return list(pairwise(bounds))


def _equal_blocks(starts: Array, tokens: int, experts: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, count, length) of adjacent blocks of equal length, as many as are processed at once."""
    begin, count, length = 0, 0, 0
    for first, end in blocks_of(starts, tokens):
        if count and (end - first != length or experts * (count + 1) > _MAX_WEIGHTS):
            yield begin, count, length
            begin, count = first, 0
        count, length = count + 1, end - first
    yield begin, count, length
