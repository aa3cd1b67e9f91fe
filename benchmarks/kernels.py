"""Speed, memory, error and repeatability of the kernels, beside other implementations.

    python benchmarks/kernels.py            # on a GPU: writes results/kernels.json
    python benchmarks/kernels.py --cpu      # the PyTorch reference: writes results/kernels_cpu.json
    python benchmarks/kernels.py --small    # runs the script under the interpreter: prints only

Peers run once for each expert: eager PyTorch, torch.compile, and Cut Cross-Entropy and Liger-Kernel where
they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SCORE_SHAPES = [(768, 50_304), (2048, 32_000), (2048, 128_256), (4096, 128_256)]
EXPERTS = [1, 8, 64]
TOKENS = 8192
BATCH = 64
CHECKED_TOKENS = 64
RUNS_THAT_MUST_AGREE = 10


def main() -> None:
    """Measure what the options ask for, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cpu", action="store_true", help="the PyTorch reference on the CPU")
    mode.add_argument("--small", action="store_true", help="small sizes under Triton's interpreter")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if options.small:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

    import torch
    from environment import describe

    from btm_scale.kernels.hardware import interpreter_problem

    if options.small and (problem := interpreter_problem()):
        sys.exit(problem)
    if options.cpu:
        from kernels_cpu import measure_reference

        result, default = measure_reference(), RESULTS / "kernels_cpu.json"
    elif options.small:
        result, default = _measure("cpu", [(64, 1111)], [1, 2], tokens=33, batch=3), None
    elif torch.cuda.is_available():
        result, default = _measure("cuda", SCORE_SHAPES, EXPERTS, TOKENS, BATCH), RESULTS / "kernels.json"
    else:
        sys.exit("There is no GPU here, and the kernels are measured on one. Use --cpu or --small instead.")
    result = {"benchmark": "kernels", "interpreter": options.small, "environment": describe(), **result}
    for row in result["rows"]:
        print(" ".join(f"{name}={_short(value)}" for name, value in row.items()))
    out = options.out or default
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(out)


def _measure(device: str, shapes: list[tuple[int, int]], experts: list[int], tokens: int, batch: int) -> dict[str, Any]:
    from kernels_timing import copy_rate, matrix_rate

    rates = {"matrix_flops": matrix_rate(device), "copy_bytes": copy_rate(device)}
    rows = [_score_row(device, count, tokens, hidden, vocab, rates) for hidden, vocab in shapes for count in experts]
    vocabularies = sorted({vocab for _, vocab in shapes})
    rows += [_mix_row(device, count, batch, vocab, rates) for vocab in vocabularies for count in experts]
    return {"rates_per_second": rates, "rows": rows}


def _score_row(
    device: str, experts: int, tokens: int, hidden: int, vocab: int, rates: dict[str, float]
) -> dict[str, Any]:
    """One line of the table for `token_logprobs`, in bfloat16."""
    import torch
    import torch.nn.functional as F
    from kernels_timing import extra_bytes, repeats_to_the_bit, seconds

    from btm_scale.kernels import token_logprobs

    torch.manual_seed(0)
    states = torch.randn(experts, tokens, hidden, device=device).bfloat16()
    heads = [(torch.randn(vocab, hidden, device=device) * 3 / hidden**0.5).bfloat16() for _ in range(experts)]
    targets = torch.randint(vocab, (tokens,), device=device)

    def ours() -> torch.Tensor:
        return token_logprobs(states, heads, targets)

    few = min(CHECKED_TOKENS, tokens)
    exact = [
        -F.cross_entropy(states[e, :few].double() @ head.double().T, targets[:few], reduction="none")
        for e, head in enumerate(heads[:2])
    ]
    log_probs = ours()
    time = seconds(ours, device)
    row: dict[str, Any] = {
        "kernel": "token_logprobs",
        "experts": experts,
        "tokens": tokens,
        "hidden": hidden,
        "vocab": vocab,
        "seconds": time,
        "of_matrix_rate": 2 * experts * tokens * hidden * vocab / time / rates["matrix_flops"],
        "extra_bytes": extra_bytes(ours, device),
        "error": float((log_probs[:2, :few] - torch.stack(exact)).abs().max()),
        "repeats": repeats_to_the_bit(ours, RUNS_THAT_MUST_AGREE),
    }
    for name, peer in _score_peers(device).items():

        def run(peer: Callable[..., Any] = peer) -> None:
            for e, head in enumerate(heads):
                peer(states[e], head, targets)

        row |= _peer_figures(name, run, device)
    return row


def _score_peers(device: str) -> dict[str, Callable[..., Any]]:
    """Functions of (hidden, head, targets) that return one loss per token."""
    import torch
    import torch.nn.functional as F

    def eager(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(states, head).float(), targets, reduction="none")

    peers: dict[str, Callable[..., Any]] = {"eager": eager}
    if device == "cpu":
        return peers
    peers["compile"] = torch.compile(eager)
    try:
        from cut_cross_entropy import linear_cross_entropy

        peers["cut_cross_entropy"] = lambda states, head, targets: linear_cross_entropy(
            states, head, targets, reduction="none"
        )
    except ImportError:
        print("cut-cross-entropy is not installed and is left out")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        peers["liger"] = lambda states, head, targets: liger_fused_linear_cross_entropy(
            states, head, targets, reduction="none"
        )
    except ImportError:
        print("liger-kernel is not installed and is left out")
    return peers


def _mix_row(device: str, experts: int, batch: int, vocab: int, rates: dict[str, float]) -> dict[str, Any]:
    """One line of the table for `mix_logits` and `mix_sample`, from bfloat16 logits."""
    import torch
    from kernels_timing import extra_bytes, repeats_to_the_bit, seconds

    from btm_scale.kernels import mix_logits, mix_sample

    torch.manual_seed(0)
    logits = (torch.randn(experts, batch, vocab, device=device) * 3).bfloat16()
    log_weights = torch.randn(batch, experts, device=device)

    def ours() -> torch.Tensor:
        return mix_logits(logits, log_weights)

    def eager() -> torch.Tensor:
        weights = log_weights.log_softmax(1).T.unsqueeze(2)
        return (logits.float().log_softmax(2) + weights).logsumexp(0)

    one = logits[:, :1].double().log_softmax(2) + log_weights[:1].double().log_softmax(1).T.unsqueeze(2)
    time = seconds(ours, device)
    row: dict[str, Any] = {
        "kernel": "mix_logits",
        "experts": experts,
        "batch": batch,
        "vocab": vocab,
        "seconds": time,
        # Read every logit once, write every probability once: what the kernel cannot do without.
        "of_copy_rate": batch * vocab * (2 * experts + 4) / time / rates["copy_bytes"],
        "extra_bytes": extra_bytes(ours, device),
        "error": float((ours()[:1] - one.logsumexp(0)).abs().max()),
        "repeats": repeats_to_the_bit(ours, RUNS_THAT_MUST_AGREE),
        "mix_sample_seconds": seconds(lambda: mix_sample(logits, log_weights), device),
    }
    row |= _peer_figures("eager", eager, device)
    if device == "cuda":
        row |= _peer_figures("compile", torch.compile(eager), device)
    return row


def _peer_figures(name: str, run: Callable[[], Any], device: str) -> dict[str, Any]:
    """A peer's seconds and extra bytes, or its error: a peer that fails must not stop the benchmark."""
    from kernels_timing import extra_bytes, seconds

    try:
        return {f"{name}_seconds": seconds(run, device), f"{name}_extra_bytes": extra_bytes(run, device)}
    except (RuntimeError, TypeError, ValueError) as error:
        return {f"{name}_failed": f"{type(error).__name__}: {error}"[:200]}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
