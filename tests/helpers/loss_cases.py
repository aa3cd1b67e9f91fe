"""Logits and targets of the loss's kernels, and their exact loss and gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from btm_scale.kernels import cross_entropy_, logit_gradient_, logit_partials
from btm_scale.kernels.hardware import is_interpreted
from btm_scale.kernels.partials import Partials, finish, merge

# Of the gradient, whose elements are between -1 and 1: half a unit in the last place, and float32's sums. Triton's
# interpreter cuts off the bits that a bfloat16 has no room for, where a GPU rounds.
_BFLOAT16_ERROR = 2**-8 if is_interpreted() else 2**-9
GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: _BFLOAT16_ERROR, torch.float16: 2**-12}


def loss_case(tokens: int, rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits [tokens, rows], of which those from `vocab` on are padding, and targets [tokens]."""
    generator = torch.Generator().manual_seed(tokens * 31 + rows)
    logits = (torch.randn(tokens, rows, generator=generator) * 3).to(dtype)
    logits[:, vocab:] = 100.0  # would be seen
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocab - 1
    return logits, targets


def exact_loss(logits: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Return the loss [tokens] and its gradient [tokens, rows], float64."""
    log_probs = logits[:, :vocab].double().log_softmax(1)
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    gradient = torch.zeros(logits.shape, dtype=torch.float64)
    gradient[:, :vocab] = log_probs.exp()
    gradient[torch.arange(len(targets)), targets] -= 1.0
    return losses, gradient


def assert_exact(logits: Tensor, targets: Tensor, vocab: int) -> None:
    """Check the loss, and what becomes of the logits."""
    losses, gradient = exact_loss(logits, targets, vocab)
    ours = cross_entropy_(logits, targets, vocab_size=vocab)
    assert ours.dtype == torch.float32
    assert (ours - losses).abs().max() <= 1e-5
    assert (logits - gradient).abs().max() <= GRADIENT_ERROR[logits.dtype]
    assert (logits[:, vocab:] == 0).all()


def assert_shards_are_exact(logits: Tensor, targets: Tensor, vocab: int, shards: int) -> None:
    """Check the same of `shards` equal parts of the vocabulary, as on tensor parallel ranks."""
    losses, gradient = exact_loss(logits, targets, vocab)
    parts = list(logits.chunk(shards, dim=1))
    width = parts[0].shape[1]
    parts = [part.contiguous() for part in parts]
    total: Partials | None = None
    for shard, part in enumerate(parts):
        partials = logit_partials(part, targets, vocab_start=shard * width, vocab_size=vocab)
        total = partials if total is None else merge(total, partials)
    assert total is not None
    assert (-finish(*total) - losses).abs().max() <= 1e-5
    for shard, part in enumerate(parts):
        logit_gradient_(part, targets, *total[:2], vocab_start=shard * width, vocab_size=vocab)
        expected = gradient[:, shard * width : shard * width + part.shape[1]]
        assert (part - expected).abs().max() <= GRADIENT_ERROR[logits.dtype]
