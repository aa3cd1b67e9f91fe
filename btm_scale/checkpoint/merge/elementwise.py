"""Elementwise merge methods: they stream, and their memory does not grow with the tensor."""

from __future__ import annotations

from btm_scale.checkpoint.merge.arrays import add_weighted, as_numbers, copied
from btm_scale.checkpoint.merge.consensus import divisor, elected, total_of
from btm_scale.checkpoint.merge.registry import PerModel, Piece, for_each, method
from btm_scale.util.imports import torch


@method(elementwise=True)
def linear(piece: Piece, *, normalize: float = 1.0) -> torch.Tensor:
    """Weighted mean `sum_i w_i x_i / sum_i w_i`, divided last; the sum itself if `normalize` is 0."""
    total = piece.zeros
    for tensor, weight in zip(piece.tensors, piece.weights, strict=True):
        if weight == 1:  # an exact product, without a fused multiply-add, which NumPy would have to emulate
            total += tensor
        else:
            add_weighted(total, weight, tensor)
    if normalize and sum(piece.weights) != 1:
        total /= sum(piece.weights)
    return total


@method(elementwise=True, exactly=1, weighted=False)
def passthrough(piece: Piece, *, scale: PerModel = 1.0) -> torch.Tensor:
    """The only model's tensor times `scale`: for recipes that stack layers of several models."""
    (tensor,) = piece.copies()
    tensor *= for_each(scale, 1)[0]
    return tensor


@method(elementwise=True, needs_base=True)
def task_arithmetic(piece: Piece, *, scale: float = 1.0, normalize: float = 0.0) -> torch.Tensor:
    """`b + scale * sum_i w_i (x_i - b)` (arXiv 2212.04089), divided by the weights' sum if `normalize` is 1."""
    total = piece.zeros
    scale = scale / divisor(piece.weights) if normalize else scale
    for tensor, weight in zip(piece.tensors, piece.weights, strict=True):
        add_weighted(total, scale * weight, tensor)
    add_weighted(total, 1 - scale * sum(piece.weights), piece.origin)
    return total


@method(elementwise=True, needs_base=True)
def dare(
    piece: Piece, *, density: PerModel = 0.5, scale: float = 1.0, normalize: float = 0.0, rescale: float = 1.0
) -> torch.Tensor:
    """Task arithmetic on differences kept with probability `density` and rescaled by 1/density (arXiv 2311.03099).

    `rescale` 0 leaves kept differences as they are; `normalize` 1 divides by the weights' sum.
    """
    total = copied(piece.origin)
    scale = scale / divisor(piece.weights) if normalize else scale
    densities = for_each(density, len(piece.weights))
    for i, (tensor, weight) in enumerate(zip(piece.tensors, piece.weights, strict=True)):
        kept = (tensor - piece.origin) * (piece.random(i) < densities[i])
        add_weighted(total, scale * weight / densities[i] if rescale else scale * weight, kept)
    return total


@method(elementwise=True, needs_base=True)
def dare_ties(
    piece: Piece, *, density: PerModel = 0.5, scale: float = 1.0, normalize: float = 0.0, rescale: float = 1.0
) -> torch.Tensor:
    """Drop differences at random as `dare` does, then elect signs as `ties` does (arXiv 2311.03099, 2306.01708).

    `normalize` 1 divides by the weights of the models that agree.
    """
    deltas = piece.deltas()
    for i, (delta, kept) in enumerate(zip(deltas, for_each(density, len(deltas)), strict=True)):
        delta *= piece.random(i) < kept
        if rescale:
            delta /= kept
    return piece.origin + scale * elected(deltas, piece.weights, normalize)


@method(elementwise=True, needs_base=True, weighted=False, exactly=1)
def nearswap(piece: Piece, *, t: float = 0.001) -> torch.Tensor:
    """Move the base by at most `t` per element toward the model: all of a smaller difference, `t` of a larger one.

    From the model card of QuartetAnemoi-70B.
    """
    (delta,) = piece.deltas()
    # torch computes t / x as t * (1 / x), NumPy does not.
    return piece.origin + delta * (t * (1 / abs(delta).clip(1e-6))).clip(0, 1)


@method(elementwise=True, needs_base=True, weighted=False)
def ram(piece: Piece, *, epsilon: float = 1e-5) -> torch.Tensor:
    """Add the mean of the differences above `epsilon`, of the models that have one (arXiv 2601.13572)."""
    deltas = piece.deltas()
    moved = [abs(delta) > epsilon for delta in deltas]
    count = total_of(map(as_numbers, moved)).clip(1)
    return piece.origin + sum(delta * mask / count for delta, mask in zip(deltas, moved, strict=True))


@method(elementwise=True)
def moe(piece: Piece, *, top_k: float = 2) -> torch.Tensor:
    """One mixture of experts: the models' MLPs are its experts, `top_k` per token; the rest is `linear`.

    The piece is a part of the rest; `moe.py` says where the other tensors come from.
    """
    del top_k
    return linear(piece)
