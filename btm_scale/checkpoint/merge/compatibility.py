"""Check that models can be merged: the same tensors, equivalent configs, one tokenizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.locate import TOKENIZER_FILES, described_config, described_in
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, dtype_name
from btm_scale.errors import few_names, first_few
from btm_scale.model.families import FAMILIES, GPT2

# In checkpoints of older transformers versions.
_CAUSAL_MASK = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")
# Settings that must agree for the mean of two models' weights to be a model.
_CONFIG_KEYS = (
    "model_type",
    "architectures",
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)

LAYER_KEYS = ("num_hidden_layers", "n_layer")


def common_specs(
    readers: Sequence[ModelReader], dtype: torch.dtype | None, tensors: Sequence[str] | None = None
) -> tuple[dict[str, TensorSpec], list[str]]:
    """Return the output's specs and every kind of difference between the models, restricted to `tensors` if given."""
    first = readers[0]
    specs, *others = (_compared_specs(reader, tensors) for reader in readers)
    absent = [name for name in tensors or () if not any(name in each for each in (specs, *others))]
    problems = [f"{first.path} has no tensor {few_names(absent, 'tensors')}."] if absent else []
    for other, theirs in zip(readers[1:], others, strict=True):
        problems += _differences(first, specs, other, theirs, dtype)
    if dtype is not None:
        specs = {
            name: TensorSpec(dtype, spec.shape) if spec.dtype.is_floating_point else spec
            for name, spec in specs.items()
        }
    return specs, problems


def _differences(
    first: ModelReader,
    ours: Mapping[str, TensorSpec],
    other: ModelReader,
    theirs: Mapping[str, TensorSpec],
    dtype: torch.dtype | None,
) -> list[str]:
    """Return one problem per kind of difference between two models, each with a few of the tensors that have it."""
    lacking = [
        f"{one.path} has no tensor {few_names(names, 'tensors')}, but {another.path} has."
        for one, another, names in (
            (other, first, ours.keys() - theirs.keys()),
            (first, other, theirs.keys() - ours.keys()),
        )
        if names
    ]
    shapes, kinds, dtypes, values = [], [], [], []
    for name in sorted(ours.keys() & theirs.keys()):
        mine, its = ours[name], theirs[name]
        if mine.shape != its.shape:
            shapes.append(f"'{name}' {list(mine.shape)} and {list(its.shape)}")
        elif mine.dtype != its.dtype and not _both_float(mine, its):
            kinds.append(f"'{name}' {mine} and {its}")
        elif mine.dtype != its.dtype and dtype is None:
            dtypes.append(f"'{name}' {mine} and {its}")
        elif not mine.dtype.is_floating_point and not torch.equal(first.read(name), other.read(name)):
            values.append(f"'{name}' {mine}")
    found = (
        ("shapes", shapes, "Merge models of one architecture."),
        ("kinds of numbers", kinds, "Save both models with the same."),
        ("dtypes", dtypes, "Give the output's dtype (--dtype; `dtype` in Python)."),
        ("values of integers", values, "They are copied, not averaged. Merge models in which they are equal."),
    )
    return lacking + [
        f"{first.path} and {other.path} have different {what}: {first_few(examples, 'tensors')}. {remedy}"
        for what, examples, remedy in found
        if examples
    ]


def promoted_dtype(directories: Iterable[Path]) -> str | None:
    """Return the name of the dtype to which the models' floating-point dtypes promote, or None if all are equal."""
    dtypes: set[torch.dtype] = set()
    for directory in directories:
        with open_model(directory) as model:
            dtypes |= {spec.dtype for spec in model.specs().values() if spec.dtype.is_floating_point}
    return dtype_name(functools.reduce(torch.promote_types, dtypes)) if len(dtypes) > 1 else None


def _compared_specs(reader: ModelReader, tensors: Sequence[str] | None) -> dict[str, TensorSpec]:
    if tensors is not None:
        wanted = set(tensors)
        return {name: spec for name, spec in reader.specs().items() if name in wanted}
    return {name: spec for name, spec in reader.specs().items() if not is_derived(name, reader.path)}


def _both_float(one: TensorSpec, other: TensorSpec) -> bool:
    return one.dtype.is_floating_point and other.dtype.is_floating_point


def is_derived(name: str, directory: Path) -> bool:
    """Whether a tensor is derived from others, or from the config, when the model is loaded."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    causal_mask = _CAUSAL_MASK.fullmatch(name)
    if name != "lm_head.weight" and not causal_mask:
        return False
    config = described_config(directory)
    family = FAMILIES.get(config.get("model_type", ""))
    if causal_mask:
        return family is GPT2
    return bool(config.get("tie_word_embeddings", family is not None and family.tied_by_default))


def config_problems(paths: Sequence[Path], ignoring: Collection[str] = ()) -> list[str]:
    """Return a problem for every config that differs in a setting that changes what the weights compute."""
    configs = {path: config for path in paths if (config := described_config(path))}
    if not configs:
        return []
    (first, ours), *others = configs.items()
    problems = []
    for path, theirs in others:
        differing = [key for key in _CONFIG_KEYS if key not in ignoring and ours.get(key) != theirs.get(key)]
        if differing:
            settings = ", ".join(f"{key} {_shown(ours, key)} and {_shown(theirs, key)}" for key in differing)
            problems.append(f"The config.json of {first} and {path} differ: {settings}. Merge models of one shape.")
    return problems


def _shown(config: Mapping[str, Any], key: str) -> object:
    return "(not set)" if config.get(key) is None else config[key]


def tokenizer_problems(paths: Sequence[Path]) -> list[str]:
    """Return a problem for every tokenizer file that differs."""
    problems = []
    folders = [described_in(path) for path in paths]
    for file in TOKENIZER_FILES:
        holders = [path for path in folders if (path / file).is_file()]
        for other in holders[1:]:
            if (holders[0] / file).read_bytes() != (other / file).read_bytes():
                problems.append(
                    f"{file} differs between {holders[0]} and {other}. Embeddings can be merged only for the same "
                    "tokens: merge models with one tokenizer."
                )
    return problems
