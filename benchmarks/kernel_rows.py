"""Rows of the kernels' tables: time, memory, error and repeatability, beside other implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kernels_timing import extra_bytes, repeats_to_the_bit, seconds
from torch import Tensor

from btm_scale.kernels import last_path, mix_logits, mix_sample, token_logprobs

CHECKED_TOKENS = 64
RUNS_THAT_MUST_AGREE = 10
_CHUNK_TOKENS = 1024

Peer = Callable[..., Any]


def score_row(
    device: str, experts: int, tokens: int, hidden: int, vocab: int, rates: dict[str, float], *, peers: bool = True
) -> dict[str, Any]:
    """Measure `token_logprobs` in bfloat16, and its peers if asked."""
    torch.manual_seed(0)
    states = torch.randn(experts, tokens, hidden, device=device, dtype=torch.bfloat16)
    heads = [
        torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16).mul_(3 / hidden**0.5) for _ in range(experts)
    ]
    targets = torch.randint(vocab, (tokens,), device=device)

    def ours() -> Tensor:
        return token_logprobs(states, heads, targets)

    few = min(CHECKED_TOKENS, tokens)
    exact = [
        -F.cross_entropy(states[e, :few].double() @ head.double().T, targets[:few], reduction="none")
        for e, head in enumerate(heads[:2])
    ]
    row: dict[str, Any] = {"experts": experts, "tokens": tokens, "hidden": hidden, "vocab": vocab}
    row |= _figures("token_logprobs", ours, device)
    row["of_matrix_rate"] = 2 * experts * tokens * hidden * vocab / row["seconds"] / rates["matrix_flops"]
    row["error"] = float((ours()[:2, :few] - torch.stack(exact)).abs().max())
    for name, peer in _score_peers(device).items() if peers else ():

        def run(peer: Peer = peer) -> None:
            for e, head in enumerate(heads):
                peer(states[e], head, targets)

        row |= _peer_figures(name, run, device)
    return row


def mix_row(
    device: str, experts: int, batch: int, vocab: int, rates: dict[str, float], *, peers: bool = True
) -> dict[str, Any]:
    """Measure `mix_logits` and `mix_sample` of bfloat16 logits, and their peers if asked."""
    torch.manual_seed(0)
    logits = torch.randn(experts, batch, vocab, device=device, dtype=torch.bfloat16).mul_(3)
    log_weights = torch.randn(batch, experts, device=device)

    def ours() -> Tensor:
        return mix_logits(logits, log_weights)

    def eager() -> Tensor:
        weights = log_weights.log_softmax(1).T.unsqueeze(2)
        return (logits.float().log_softmax(2) + weights).logsumexp(0)

    one = logits[:, :1].double().log_softmax(2) + log_weights[:1].double().log_softmax(1).T.unsqueeze(2)
    row: dict[str, Any] = {"experts": experts, "batch": batch, "vocab": vocab}
    row |= _figures("mix_logits", ours, device)
    # Every logit is read and every probability written at least once.
    row["of_copy_rate"] = batch * vocab * (2 * experts + 4) / row["seconds"] / rates["copy_bytes"]
    row["error"] = float((ours()[:1] - one.logsumexp(0)).abs().max())
    row["mix_sample_seconds"] = seconds(lambda: mix_sample(logits, log_weights), device)
    if peers:
        row |= _peer_figures("eager", eager, device)
    if peers and device == "cuda":
        row |= _peer_figures("compile", torch.compile(eager), device)
    return row


def _figures(kernel: str, run: Callable[[], Tensor], device: str) -> dict[str, Any]:
    """Return how a kernel ran, its seconds and extra bytes, and whether its results repeat to the bit."""
    run()
    return {
        "kernel": kernel,
        "path": str(last_path(kernel)),
        "seconds": seconds(run, device),
        "extra_bytes": extra_bytes(run, device),
        "repeats": repeats_to_the_bit(run, RUNS_THAT_MUST_AGREE),
    }


def _score_peers(device: str) -> dict[str, Peer]:
    """Return functions of (hidden, head, targets) that compute one loss per token; absent packages are left out."""
    peers: dict[str, Peer] = {"eager": _eager, "chunked": _chunked}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        peers["torch_linear_cross_entropy"] = _torch_linear_cross_entropy
    if device == "cpu":
        return peers
    peers["compile"] = torch.compile(_eager)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        peers["cut_cross_entropy"] = lambda states, head, targets: linear_cross_entropy(
            states, head, targets, reduction="none"
        )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        peers["liger"] = lambda states, head, targets: liger_fused_linear_cross_entropy(
            states, head, targets, reduction="none"
        )
    return peers


def _eager(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, head).float(), targets, reduction="none")


def _chunked(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Compute float32 logits of 1,024 tokens at a time by the matrix library, then their log-sum-exp."""
    losses = []
    for some_states, some_targets in zip(states.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True):
        if states.is_cuda:
            logits = torch.mm(some_states, head.T, out_dtype=torch.float32)
        else:
            logits = F.linear(some_states, head).float()
        losses.append(logits.logsumexp(1) - logits.gather(1, some_targets[:, None])[:, 0])
    return torch.cat(losses)


def _torch_linear_cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = F.linear_cross_entropy(states, head, targets, reduction="none")
    return loss


def _peer_figures(name: str, run: Callable[[], Any], device: str) -> dict[str, Any]:
    """Return a peer's seconds and extra bytes, or its error: a peer that fails must not stop the benchmark."""
    try:
        return {f"{name}_seconds": seconds(run, device), f"{name}_extra_bytes": extra_bytes(run, device)}
    except Exception as error:  # a compiler of a peer may raise anything
        if device == "cuda":
            torch.cuda.empty_cache()
        return {f"{name}_failed": f"{type(error).__name__}: {error}"[:200]}
