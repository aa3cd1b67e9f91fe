"""adapter_config.json of a LoRA adapter: how much each module's product of matrices is scaled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.expected import EMBEDDINGS
from btm_scale.checkpoint.formats.based import ADAPTER_CONFIG, adapter_config
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import shown

# Settings that change nothing in the weights that an adapter adds: they chose modules, or steered training.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "alpha_pattern",
    "init_lora_weights",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Other starts, such as PiSSA's, subtract the adapter's first product from the base's weights.
_HARMLESS_STARTS: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal")
_MAX_RANK = 1 << 16
_MAX_PATTERN = 500
# A pattern is matched against every module's name. Repeated groups, and more than two repetitions, can take for ever.
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPETITION = re.compile(r"(?<!\\)[*+?{]")
_MAX_REPETITIONS = 2


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a LoRA adapter that determine what it adds."""

    file: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[re.Pattern[str], float]
    alphas: Mapping[re.Pattern[str], float]
    saved_modules: tuple[str, ...]
    transposed: bool
    keeps_ties: bool

    def scale(self, module: str, rank: int) -> float:
        """Return what a module's product is multiplied by. Raises `CheckpointError` if its rank is not `rank`."""
        expected = _of(module, self.ranks, self.rank)
        if rank != expected:
            raise CheckpointError(
                f"{self.file} gives '{module:.100}' the rank {expected:g}, but its matrices have rank {rank}. Use the "
                f"{ADAPTER_CONFIG} that belongs to these weights."
            )
        return _of(module, self.alphas, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def saves(self, name: str) -> bool:
        """Whether a tensor belongs to a module that was trained and saved in full."""
        return any(part in self.saved_modules for part in name.split(".")) or any(
            name.startswith(f"{module}.") or f".{module}." in name for module in self.saved_modules
        )

    def unties(self, name: str) -> bool:
        """Whether a tensor is an embedding that was trained in full, without the head that it was tied to."""
        return name.endswith(EMBEDDINGS) and self.saves(name) and not self.keeps_ties


def read_lora_settings(folder: Path) -> LoraSettings:
    """Return the settings of the LoRA adapter in a folder. Raises `CheckpointError` for any other kind of adapter."""
    file = folder / ADAPTER_CONFIG
    config = adapter_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unsupported(file, f"is of type {shown(kind)}")
    start = config.get("init_lora_weights", True)
    if not any(start is allowed or (isinstance(start, str) and start == allowed) for allowed in _HARMLESS_STARTS):
        raise CheckpointError(
            f"{file}: 'init_lora_weights' is {shown(start)}, which changed the base model when training began. Convert "
            "the adapter to plain LoRA: PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if others := sorted(name for name, value in config.items() if value and name not in _HARMLESS):
        raise _unsupported(file, f"uses '{others[0]:.100}' ({shown(config[others[0]])})")
    return LoraSettings(
        file=file,
        rank=int(_number(file, "r", config.get("r", 8), whole=True)),
        alpha=_number(file, "lora_alpha", config.get("lora_alpha", 8)),
        rank_stabilised=bool(config.get("use_rslora")),
        ranks=_patterns(file, "rank_pattern", config.get("rank_pattern"), whole=True),
        alphas=_patterns(file, "alpha_pattern", config.get("alpha_pattern")),
        saved_modules=_names(file, config.get("modules_to_save")),
        transposed=bool(config.get("fan_in_fan_out")),
        keeps_ties=bool(config.get("ensure_weight_tying")),
    )


def _unsupported(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(
        f"{file} {fact}. Only plain LoRA adapters can be read: merge this one with PEFT's merge_and_unload(), and save "
        "the complete model."
    )


def _of(module: str, patterns: Mapping[re.Pattern[str], float], default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT does."""
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)


def _number(file: Path, name: str, value: Any, *, whole: bool = False) -> float:
    valid = type(value) is int or (type(value) is float and not whole)
    if not valid or not math.isfinite(value) or (whole and not 0 < value <= _MAX_RANK) or abs(value) > 1e9:
        rule = f"a number from 1 to {_MAX_RANK}" if whole else "a finite number"
        raise CheckpointError(f"{file}: '{name:.100}' must be {rule} and is {shown(value)}. Copy it again.")
    return float(value)


def _patterns(file: Path, name: str, values: Any, *, whole: bool = False) -> dict[re.Pattern[str], float]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: '{name}' must map names to numbers and is {shown(values)}. Copy it again.")
    patterns = {}
    for text, value in values.items():
        if (
            len(text) > _MAX_PATTERN
            or _REPEATED_GROUP.search(text)
            or len(_REPETITION.findall(text)) > _MAX_REPETITIONS
        ):
            raise CheckpointError(
                f"{file}: '{name}' has the pattern {shown(text, 100)}. At most {_MAX_REPETITIONS} repetitions, "
                "and none of a group, are supported: list the modules by name."
            )
        try:
            pattern = re.compile(rf"(.*\.)?({text})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{file}: '{name}' has the pattern {shown(text, 100)}, which is not a regular expression ({error}). "
                "Copy it again."
            ) from None
        patterns[pattern] = _number(file, f"{name}.{text}", value, whole=whole)
    return patterns


def _names(file: Path, values: Any) -> tuple[str, ...]:
    values = [] if values is None else values
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise CheckpointError(f"{file}: 'modules_to_save' must list names and is {shown(values)}. Copy it again.")
    return tuple(values)
