"""Names of vision-language models: transformers 4.52 moved every part but the LM head below `model.`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.wrapped import RenamedModel

Rules = Sequence[tuple[re.Pattern[str], str]]
# LLaVA and similar models have their language model in `language_model`; Qwen-VL's has no prefix.
_LLAVA = (
    (re.compile(r"language_model\.model\."), "model.language_model."),
    (re.compile(r"language_model\.lm_head\."), "lm_head."),
    (re.compile(r"(?!model\.|lm_head\.|language_model\.)"), "model."),
)
_QWEN = (
    (re.compile(r"visual\."), "model.visual."),
    (re.compile(r"model\.(?!language_model\.|visual\.)"), "model.language_model."),
)


def newer_names(names: Iterable[str]) -> dict[str, str] | None:
    """Return {newer name: name}, or None for a model whose names did not change."""
    names = tuple(names)
    rules = _rules(names)
    return {_newer(name, rules): name for name in names} if rules else None


def _newer(name: str, rules: Rules) -> str:
    for pattern, prefix in rules:
        if match := pattern.match(name):
            return prefix + name[match.end() :]
    return name


def newer_forms(name: str) -> tuple[str, ...]:
    """Return the newer names that a single name may have, by any of the changes."""
    return tuple(_newer(name, rules) for rules in (_LLAVA, _QWEN))


def with_newer_names(model: ModelReader) -> ModelReader:
    """Return the model under its newer names; closing it closes `model`."""
    names = newer_names(model.names)
    return model if names is None else RenamedModel(model, names)


def _rules(names: Sequence[str]) -> Rules:
    if any(name.startswith("language_model.model.") for name in names):
        return _LLAVA
    if any(name.startswith("visual.") for name in names) and any(name.startswith("model.layers.") for name in names):
        return _QWEN
    return ()
