"""Whether a model has all the weights that its config.json calls for, checked from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.expected import EMBEDDINGS, HEADS, Expected, Shape, expected_tensors
from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.errors import CheckpointError, few_names, first_few

# In files of older transformers versions; computed when the model is loaded.
_BUFFERS = re.compile(r".*(?:attn|attention)\.(?:(?:masked_)?bias|rotary_emb\.inv_freq)|.*rotary_emb\.inv_freq")
_GPT2_MASK = re.compile(r"(?:.*\.)?h\.\d+\.attn\.(?:masked_)?bias")
_LAYER = re.compile(r"(.*?\b(?:layers?|h|blocks?)\.)(\d+)\.\w+\.")
_LANGUAGE = ("language_model", "text_model")
_CHUNK_ELEMENTS = 1 << 20


def problems_of(model: ModelReader) -> list[str]:
    """Return what the weights of a model lack, or have too much, by its config.json; empty if they are complete.

    For an unknown family, or a config without its sizes, only the numbers of the layers are checked.
    """
    config = described_config(model.path)
    shapes = {name: spec.shape for name, spec in model.specs().items()}
    if empty := [name for name, shape in shapes.items() if shape == (0,) and name.endswith((".weight", ".bias"))]:
        return [_without_values(model.path, empty)]
    nested = config.get("text_config")
    described, is_nested = config, False
    if isinstance(nested, dict) and nested.get("model_type") is not None:
        described, is_nested = nested, True
    expected = expected_tensors(described)
    if has_stacked_experts(model):
        expected = None
    if expected is None:
        return _gaps(model.path, shapes, described)
    prefix = _prefix(expected, shapes, is_nested)
    wanted = {f"{prefix}{name}": shape for name, shape in expected.body.items()}
    if not is_nested and not expected.tied and _is_causal(config):
        head = next((name for name in expected.heads if name in shapes), next(iter(expected.heads)))
        wanted[head] = expected.heads[head]
    layers = f"{prefix}{expected.layers}"
    extra = [name for name in shapes if name.startswith(layers) and name not in wanted and not _is_buffer(name)]
    return _differences(model.path, shapes, wanted, extra)


def require_complete(model: ModelReader) -> None:
    """Raise `CheckpointError` if `problems_of` a model is not empty."""
    if problems := problems_of(model):
        raise CheckpointError("\n".join(problems))


def has_stacked_experts(model: ModelReader) -> bool:
    """Whether the experts of a mixture are in one tensor, as transformers has them in memory; the Hub has others."""
    return any(name.endswith(".experts.gate_up_proj") for name in model.names)


def has_own_head(model: ModelReader) -> bool:
    """Whether a model has an LM head with other values than its embedding, although its config.json ties the two.

    transformers loads both then, and does not tie them.
    """
    heads = [name for name in (*HEADS, "embed_out.weight") if name in model.names]
    embeddings = [name for name in model.names if name.endswith(EMBEDDINGS)]
    if len(heads) != 1 or len(embeddings) != 1:
        return False
    head, embedding = heads[0], embeddings[0]
    spec = model.spec(head)
    if spec.shape != model.spec(embedding).shape or not spec.is_floating_point:
        return False
    for start in range(0, spec.elements, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, spec.elements)
        if spec == model.spec(embedding) and model.read_bytes(head, start, stop) == model.read_bytes(
            embedding, start, stop
        ):
            continue
        if not model.read_range(head, start, stop).float().equal(model.read_range(embedding, start, stop).float()):
            return True
    return False


def _without_values(path: Path, empty: Sequence[str]) -> str:
    """Return the problem of parameters that ZeRO 3 had partitioned when they were saved."""
    sets = weight_sets(path)
    remedy = (
        f"The folder also has {first_few(list(sets.not_read), 'files')}: move {sets.read} away to use them."
        if sets is not None and sets.not_read
        else "Their values are in the DeepSpeed checkpoint of the same step: give its folder (global_step*), or save "
        "the model with stage3_gather_16bit_weights_on_model_save."
    )
    return (
        f"{path} has no values for {few_names(empty, 'tensors')}. ZeRO 3 leaves empty tensors in place of parameters "
        f"that are partitioned across ranks. {remedy}"
    )


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the class that a config names has an LM head; a class that is not named has one."""
    names = config.get("architectures") or ["ForCausalLM"]
    return isinstance(names, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _prefix(expected: Expected, names: Iterable[str], is_nested: bool) -> str:
    """Return the prefix of the body: the causal LM class's, none in files of the base class, or a language tower's."""
    first = next(iter(expected.body))
    prefixes = sorted(name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}"))
    towers = [prefix for prefix in prefixes if any(f"{word}." in prefix for word in _LANGUAGE)]
    if is_nested:
        return next(iter(towers or prefixes), expected.prefix)
    return "" if expected.prefix not in prefixes and "" in prefixes else expected.prefix


def _is_buffer(name: str) -> bool:
    return bool(_GPT2_MASK.fullmatch(name) or (_BUFFERS.fullmatch(name) and not name.endswith("_proj.bias")))


def _differences(
    path: Path, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], extra: Sequence[str]
) -> list[str]:
    lacking = wanted.keys() - shapes.keys()
    facts = [
        f"{verb} {few_names(names, 'tensors')}"
        for verb, names in (("lacks the tensor", lacking), ("has an unexpected tensor", extra))
        if names
    ]
    problems = []
    if facts:
        problems.append(
            f"{path} {', and '.join(facts)}. It must have the tensors of the model in its config.json. Copy the "
            "weights again, or use the config.json that belongs to them."
        )
    wrong = [
        f"'{name}' {list(shapes[name])}" for name in sorted(wanted) if name in shapes and shapes[name] != wanted[name]
    ]
    if wrong:
        first = next(name for name in sorted(wanted) if name in shapes and shapes[name] != wanted[name])
        problems.append(
            f"{path}: {first_few(wrong, 'tensors')} does not fit config.json, by which '{first}' is "
            f"{list(wanted[first])}. Use the config.json that belongs to these weights."
        )
    return problems


def _gaps(path: Path, names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return a problem for layers that are missing between others or, in a model with one stack, at the end."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            stacks.setdefault(match[1], set()).add(int(match[2]))
    problems = []
    count = config.get("num_hidden_layers", config.get("n_layer"))
    for stack, layers in sorted(stacks.items()):
        if len(layers) > 1 and len({layer % 2 for layer in layers}) == 1:
            continue  # torch.nn.Sequential: activations between its layers have no weights
        end = max(layers) + 1
        if len(stacks) == 1 and type(count) is int:
            end = max(end, count)
        if missing := [str(layer) for layer in range(min(end, 10_001)) if layer not in layers]:
            problems.append(
                f"{path} lacks layers of '{stack}': {first_few(missing, 'layers')}, of {end}. A model has all its "
                "layers. Copy the weights again, or save the model completely."
            )
    return problems
