"""Files beside the weights: config, tokenizer, and the model card of a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.locate import TOKENIZER_FILES, described_config, described_in, read_json
from btm_scale.checkpoint.formats.tensors import dtype_name
from btm_scale.checkpoint.merge.compatibility import LAYER_KEYS
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.checkpoint.merge.registry import RANGES
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


def stack_layers(target: Path, layers: Sequence[tuple[Path, int]]) -> None:
    """Set the number of layers, and the type of each, in the config.json of stacked layers.

    `layers` has, for each layer, the model that it is from and its number there.
    """
    file = target / "config.json"
    if not (config := read_json(file)):
        return
    for key in LAYER_KEYS:
        if key in config:
            config[key] = len(layers)
    if isinstance(config.get("layer_types"), list):
        types = {path: described_config(path).get("layer_types") or [] for path in dict(layers)}
        config["layer_types"] = [types[path][number] for path, number in layers if number < len(types[path])]
    file.write_text(json.dumps(config, indent=2) + "\n")


def shown_parameters(plan: MergePlan) -> dict[str, float]:
    """Return the parameters that a record lists: all numbers, and the switches that are not at their defaults."""
    defaults = plan.method.parameters
    return {
        name: value
        for name, value in plan.parameters.items()
        if RANGES.get(name) != "0 or 1" or value != defaults.get(name)
    }


def recorded_hash(directory: Path) -> str | None:
    """Return the content hash in an expert's record, or None."""
    content = read_json(directory / "expert.json").get("content_hash")
    return content if isinstance(content, str) and _HASH.fullmatch(content) else None


def model_card(plan: MergePlan, inputs: Sequence[tuple[Path, float]], content_hash: str) -> str:
    """Return the README.md of a merged model: parents and base by name, their hashes and weights, and the method."""
    samples: Mapping[Path, str] = {source.path: source.sample for source in plan.sources}
    rows = [_row(path, "recipe" if plan.tensors else f"{weight:g}", samples.get(path)) for path, weight in inputs]
    if plan.base is not None:
        rows.append(_row(plan.base.path, "base", plan.base.sample))
    settings = ", ".join(f"{name} = {value:g}" for name, value in shown_parameters(plan).items()) or "none"
    if plan.tensors:
        settings = "see merge_recipe.yaml"
    note = ["`*`: of the first elements of each tensor only, because the model has no expert.json with its hash.", ""]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, branch-train-merge]",
        "---",
        "# A merged model",
        "",
        f"Method: `{plan.method_name}`; parameters: {settings}; random seed: {plan.seed}.",
        "",
        "| model | SHA-256 of its weights | weight | trained on |",
        "|---|---|---|---|",
        *rows,
        "",
        *(note if any("`*" in row for row in rows) else []),
        f"SHA-256 of the merged weights: `{content_hash}`.",
    ]
    return "\n".join(lines) + "\n"


def _row(path: Path, weight: str, sample: str | None) -> str:
    """Return a model's row. `sample` is the hash of the first elements of each tensor, None if none was read."""
    card = read_json(path / "expert.json")
    content = recorded_hash(path)
    digest = f"`{content}`" if content else f"`{sample}`*" if sample else "not read"
    domains = card.get("domains")
    trained_on = ", ".join(domains) if isinstance(domains, dict) else ""
    return f"| `{card.get('name') or _name_of(path)}` | {digest} | {weight} | {trained_on} |"


def _name_of(path: Path) -> str:
    """Return a model's name: of a snapshot in the Hugging Face cache the repository, otherwise the directory."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
