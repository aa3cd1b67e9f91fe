"""Files beside the weights: config, tokenizer, and the model card of a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.expected import HEADS, ties_embeddings
from btm_scale.checkpoint.formats.based import is_adapter
from btm_scale.checkpoint.formats.locate import described_config, described_in, read_json
from btm_scale.checkpoint.formats.quantized import quantization_sections, without_quantization
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.checkpoint.merge.carried import kind_of, own_files, template_of
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.checkpoint.merge.registry import RANGES
from btm_scale.checkpoint.merge.stacking import stacked_config
from btm_scale.util.inside import copy_inside

_TEMPLATE = "chat_template.jinja"
_HASH = re.compile("[0-9a-f]{64}")


def carry_sidecars(
    sources: Sequence[Path], target: Path, specs: Mapping[str, TensorSpec], *, template: str | None = None
) -> None:
    """Copy the files of models that are not weights, each from the first model that has it, into a directory.

    All tokenizer files come from one folder, and all Python files from that of the first config.json; if no model has
    one, it is written from the arguments that Megatron recorded. The dtypes in config.json become those of `specs`, its
    quantization is removed, and its embedding is tied only if `specs` has no LM head. `template`, unless None, is the
    chat template of the output.
    """
    taken: dict[str, Path] = {}  # the folder of each kind
    configs = {path: config for path in sources if (config := described_config(path))}
    with_file = (path for path in configs if (described_in(path) / "config.json").is_file())
    described = next(with_file, next(iter(configs), None))  # a file says more than the arguments that Megatron records
    folders = [folder for source in sources for folder in _folders_of(source) if folder.is_dir()]
    for folder in folders:
        is_model = weight_sets(folder) is not None
        for name in own_files(folder, is_model=is_model):
            kind = kind_of(name)
            code_from = described_in(described) if described is not None else None
            owner = code_from if kind == "code" else taken.setdefault(name if kind == "other" else kind, folder)
            if owner == folder and not (target / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                copy_inside(folder, name, target)
    if template is not None:
        set_template(target, template)
    elif "tokenizer" in taken and template_of(target) is None and (own := [*filter(None, map(template_of, folders))]):
        set_template(target, own[0])
    if described is not None:
        config = written_config(configs[described], specs)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _folders_of(source: Path) -> list[Path]:
    """Return the folders whose files belong to a model, the closest first.

    A tokenizer that was saved with an adapter may have more tokens than the base's.
    """
    return [*([source] if is_adapter(source) else []), described_in(source)]


def written_config(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return a config.json as it describes unquantized weights with these specs."""
    if quantization_sections(config) and not any(spec.itemsize == 1 for spec in specs.values()):
        config = without_quantization(config)
    dtypes = {spec.dtype_name for spec in specs.values() if spec.is_floating_point}
    if len(dtypes) == 1:
        config = _with_dtype(config, dtypes.pop())
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = next(spec.dtype_name for spec in specs.values() if spec.is_floating_point)
    if not specs.keys().isdisjoint(HEADS) and ties_embeddings(config):
        config = config | {"tie_word_embeddings": False}
        if isinstance(nested := config.get("text_config"), dict) and ties_embeddings(nested):
            config["text_config"] = nested | {"tie_word_embeddings": False}
    return config


def _with_dtype(section: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a config with another dtype wherever one is named, also for the parts of a model."""
    changed: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("dtype", "torch_dtype") and (value is None or isinstance(value, str)):
            value = name
        elif isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder")):
            value = _with_dtype(value, name)
        changed[key] = value
    return changed


def set_template(target: Path, template: str) -> None:
    """Make `template` the only chat template of a directory, in each of the files that has one."""
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = read_json(target / name)
        if "chat_template" in content:
            (target / name).write_text(json.dumps(content | {"chat_template": template}, indent=2) + "\n")
    (target / _TEMPLATE).write_text(template, encoding="utf-8")


def stack_layers(target: Path, layers: Sequence[tuple[Path, int]]) -> None:
    """Describe stacked layers in the config.json of `target`.

    `layers` has, for each layer, the model that it is from and its number there.
    """
    configs = {path: described_config(path) for path in dict(layers)}
    config, _ = stacked_config(read_json(target / "config.json"), [(configs[path], number) for path, number in layers])
    if config:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
        rows.append(_row(plan.base.path, "base" if plan.mixture is None else "router", plan.base.sample))
    settings = ", ".join(f"{name} = {value:g}" for name, value in shown_parameters(plan).items()) or "none"
    if plan.tensors and plan.mixture is None:
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
