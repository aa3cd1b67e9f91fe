"""Files beside the weights: config, tokenizer, and the model card of a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.locate import TOKENIZER_FILES, described_config, described_in, read_json
from btm_scale.checkpoint.formats.tensors import dtype_name
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.util.inside import copy_inside

_SIDECARS = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_HASH = re.compile("[0-9a-f]{64}")


def carry_sidecars(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy a model's tokenizer and configs; `dtype`, unless None, replaces the dtype in config.json."""
    folder = described_in(source)
    for name in _SIDECARS:
        if (folder / name).is_file():
            copy_inside(folder, name, target)
    if config := described_config(source):
        if dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(dtype)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def recorded_hash(directory: Path) -> str | None:
    """Return the content hash in an expert's record, or None."""
    content = read_json(directory / "expert.json").get("content_hash")
    return content if isinstance(content, str) and _HASH.fullmatch(content) else None


def model_card(plan: MergePlan, inputs: Sequence[tuple[Path, float]], content_hash: str) -> str:
    """Return the README.md of a merged model: parents, weights, hashes, method and parameters."""
    samples: Mapping[Path, str] = {source.path: source.sample for source in plan.sources}
    rows = []
    for path, weight in inputs:
        content = recorded_hash(path)
        digest = f"content `{content}`" if content else f"sample `{samples[path]}`" if path in samples else "not read"
        rows.append(f"| `{path.resolve().name}` | {weight:g} | {digest} |")
    settings = ", ".join(f"{name} = {value:g}" for name, value in plan.parameters.items()) or "none"
    base = [f"Base: `{plan.base.path.resolve().name}`, sample `{plan.base.sample}`.", ""] if plan.base else []
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, branch-train-merge]",
        "---",
        "# A merged model",
        "",
        f"Method: `{plan.method_name}`; parameters: {settings}; seed: {plan.seed}.",
        "",
        *base,
        "| parent | weight | SHA-256 |",
        "|---|---|---|",
        *rows,
        "",
        f"Content hash of these weights: `{content_hash}`.",
        "",
        "*content* is the hash of all weights, recorded when the parent was created; *sample* is the hash of the",
        "first elements of each tensor.",
    ]
    return "\n".join(lines) + "\n"
