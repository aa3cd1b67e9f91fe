"""A matrix product that is added to float32 sums: the gradient of a weight over several chunks of tokens."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from btm_scale.kernels import operators
from btm_scale.kernels.cost import Cost

logger = logging.getLogger(__name__)


@torch.no_grad()
def add_product_(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """Add left^T right to `total`, or with `overwrite` set it.

    Args:
        total: [rows, columns], float32 or the dtype of the factors. Changed in place.
        left: [tokens, rows].
        right: [tokens, columns], of the same dtype.
        overwrite: ignore what `total` holds, which may be uninitialized.
    """
    ADD_PRODUCT(total, left, right, overwrite)


def product_cost(total: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> Cost:
    """Return the cost of `add_product_` on a device that adds in the product."""
    factors = left.numel() * left.element_size() + right.numel() * right.element_size()
    sums = total.numel() * total.element_size()
    return Cost(1, factors + (0 if overwrite else sums), sums)


def _add_product(total: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> None:
    beta = 0 if overwrite else 1
    if total.dtype == right.dtype:
        total.addmm_(left.t(), right, beta=beta)
    elif _adds_in_product(total.device, right.dtype):
        torch.addmm(total, left.t(), right, torch.float32, beta=beta, out=total)
    elif overwrite:
        total.copy_(torch.mm(left.t(), right))
    else:
        total.add_(torch.mm(left.t(), right))


@functools.cache
def _adds_in_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a GPU can add a product of this dtype to a float32 tensor in place; some BLAS libraries cannot."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, torch.float32, out=total)
        adds = bool((total == 17).all())
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        adds = False
    if not adds:
        logger.warning("this GPU's BLAS cannot accumulate %s products in float32: they are added separately", dtype)
    return adds


def _fake(*_: object) -> None:
    return None


ADD_PRODUCT = operators.define(
    "add_product_", "(Tensor(a!) total, Tensor left, Tensor right, bool overwrite) -> ()", _add_product, _fake
)
