"""A run of three small experts in groups of two ranks, for tests of launchers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.tiny_run import tiny_values

EXPERTS = ("python", "licences", "docs")


def cluster_values(text: Path, *, steps: int, experts: tuple[str, ...] = EXPERTS, **changes: Any) -> dict[str, Any]:
    """Return a config with `steps` steps for the seed and for each expert, in groups of two data ranks."""
    batch = 128 * len(experts)
    return tiny_values(
        text,
        model={"family": "llama", "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64},
        domains={name: {"text": f"{name}.jsonl"} for name in experts},
        novel_domains={},
        budget={"tokens": 2 * steps * batch, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": batch},
        layout={"data": 2, "micro_batch": 1},
        baselines={"dense": False},
        evaluate={"tokens_per_domain": 500, "dev_blocks": 5},
        **changes,
    )
