"""Speed on a CPU: scoring `llama-4m` through the reference, beside a plain forward pass and cross entropy."""

from __future__ import annotations

import resource
from typing import Any

import torch
import torch.nn.functional as F
from kernels_timing import seconds
from transformers import LlamaConfig, LlamaModel

from btm_scale.kernels import token_logprobs

HIDDEN, VOCAB, SEQUENCE, SEQUENCES = 256, 4096, 256, 16


def measure_reference() -> dict[str, Any]:
    """Seconds of head and loss alone and of a full forward pass, both ways, and peak memory by problem size.

    A ratio above 1 means that the reference is faster.
    """
    torch.manual_seed(0)
    memory = [_memory_row(*size) for size in ((1, 4096, VOCAB), (8, 4096, VOCAB), (8, 16_384, 4 * VOCAB))]
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    body = LlamaModel(LlamaConfig(vocab_size=VOCAB, **shape)).bfloat16().eval()
    head = (torch.randn(VOCAB, HIDDEN) * 0.05).bfloat16()
    inputs = torch.randint(VOCAB, (SEQUENCES, SEQUENCE))
    targets = inputs.roll(-1, 1).flatten()

    def states() -> torch.Tensor:
        return body(inputs, use_cache=False).last_hidden_state.view(-1, HIDDEN)

    def bare(hidden: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")

    def reference(hidden: torch.Tensor) -> torch.Tensor:
        return token_logprobs(hidden.unsqueeze(0), [head], targets)[0]

    rows = []
    with torch.inference_mode():
        hidden = states()
        exact = -F.cross_entropy(hidden.double() @ head.double().T, targets, reduction="none")
        ways = {"reference": reference, "bare": bare}
        for name, way in ways.items():
            error = float((way(hidden) - exact).abs().max())
            rows.append({"way": name, "error": error})
        for row in rows:
            way = ways[str(row["way"])]
            row["head_and_loss_seconds"] = seconds(lambda way=way: way(hidden), "cpu")
            row["forward_seconds"] = seconds(lambda way=way: way(states()), "cpu")
    ours, theirs = rows
    return {
        "tokens": SEQUENCES * SEQUENCE,
        "threads": torch.get_num_threads(),
        "speed_ratio": {
            part: theirs[f"{part}_seconds"] / ours[f"{part}_seconds"] for part in ("head_and_loss", "forward")
        },
        "rows": rows + memory,
    }


def _memory_row(experts: int, tokens: int, vocab: int) -> dict[str, Any]:
    """How far scoring raises the process's peak memory above its inputs, and what the logits would take."""
    states = torch.zeros(experts, tokens, HIDDEN, dtype=torch.bfloat16)
    heads = [torch.zeros(vocab, HIDDEN, dtype=torch.bfloat16) for _ in range(experts)]
    targets = torch.zeros(tokens, dtype=torch.int64)
    before = _peak_bytes()
    token_logprobs(states, heads, targets)
    return {
        "experts": experts,
        "tokens": tokens,
        "vocab": vocab,
        "peak_growth_bytes": _peak_bytes() - before,
        "logits_bytes": 4 * experts * tokens * vocab,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
