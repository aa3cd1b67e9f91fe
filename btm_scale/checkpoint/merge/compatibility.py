"""Check that models can be merged: the same tensors under the same names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from btm_scale.checkpoint.completeness import has_own_head
from btm_scale.checkpoint.expected import HEADS, ties_embeddings
from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, dtype_name, dtype_of
from btm_scale.errors import few_names, first_few
from btm_scale.model.families import FAMILIES, GPT2
from btm_scale.util.imports import torch

# Buffers of attention in checkpoints of older transformers versions: a triangle, and the number that masks.
_MASK = re.compile(r"(?:.*\.)?(?:attn|attention|self_attn|self)\.(?:bias|causal_mask|mask)")
_MASKED_BIAS = re.compile(r"(?:.*\.)?(?:attn|attention)\.masked_bias")
_GPT2_MASK = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")


def common_specs(
    readers: Sequence[ModelReader], code: str | None, tensors: Sequence[str] | None = None
) -> tuple[dict[str, TensorSpec], list[str]]:
    """Return the output's specs and every kind of difference between the models, restricted to `tensors` if given.

    `code` is safetensors' code of the output's dtype; None keeps the dtype of the models.
    """
    first = readers[0]
    specs, *others = (_compared_specs(reader, tensors) for reader in readers)
    absent = [name for name in tensors or () if not any(name in each for each in (specs, *others))]
    problems = [f"{first.path} has no tensor {few_names(absent, 'tensors')}."] if absent else []
    for other, theirs in zip(readers[1:], others, strict=True):
        problems += _differences(first, specs, other, theirs, code)
    if code is not None:
        specs = {name: TensorSpec(code, spec.shape) if spec.is_floating_point else spec for name, spec in specs.items()}
    return specs, problems


def _differences(
    first: ModelReader,
    ours: Mapping[str, TensorSpec],
    other: ModelReader,
    theirs: Mapping[str, TensorSpec],
    code: str | None,
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
        elif mine.code != its.code and not _both_float(mine, its):
            kinds.append(f"'{name}' {mine} and {its}")
        elif mine.code != its.code and code is None:
            dtypes.append(f"'{name}' {mine} and {its}")
        elif not mine.is_floating_point and not _same_bytes(name, first, other):
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
    codes: set[str] = set()
    for directory in directories:
        with open_model(directory) as model:
            codes |= {spec.code for spec in model.specs().values() if spec.is_floating_point}
    return dtype_name(functools.reduce(torch.promote_types, map(dtype_of, codes))) if len(codes) > 1 else None


def _compared_specs(reader: ModelReader, tensors: Sequence[str] | None) -> dict[str, TensorSpec]:
    if tensors is not None:
        wanted = set(tensors)
        return {name: spec for name, spec in reader.specs().items() if name in wanted}
    return {name: spec for name, spec in reader.specs().items() if not is_derived(name, reader)}


def _both_float(one: TensorSpec, other: TensorSpec) -> bool:
    return one.is_floating_point and other.is_floating_point


def _same_bytes(name: str, first: ModelReader, other: ModelReader) -> bool:
    elements = first.spec(name).elements
    return first.read_bytes(name, 0, elements) == other.read_bytes(name, 0, elements)


def is_derived(name: str, model: ModelReader) -> bool:
    """Whether a tensor of a model is derived from others, or from the config, when the model is loaded."""
    if name.endswith("rotary_emb.inv_freq") or _is_causal_mask(name, model):
        return True
    old_mask = _GPT2_MASK.fullmatch(name)
    if name not in HEADS and not old_mask:
        return False
    config = described_config(model.path)
    family = FAMILIES.get(config.get("model_type", ""))
    if old_mask:
        return family is GPT2
    return ties_embeddings(config) and not model.keeps_head and not has_own_head(model)


def _is_causal_mask(name: str, model: ModelReader) -> bool:
    """Whether a tensor is a mask, by its shape: a bias may have the same name."""
    if _MASKED_BIAS.fullmatch(name):
        return model.spec(name).elements == 1
    return bool(_MASK.fullmatch(name)) and len(shape := model.spec(name).shape) == 4 and shape[:2] == (1, 1)
