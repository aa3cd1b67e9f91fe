"""Keys of earlier versions: their current names, and run folders whose run.yaml has them.

A run.yaml has the number of its `schema`; version 0.1.0 wrote none, which is schema 1. A run folder is upgraded when it
is read. A user's YAML is not: its old keys are reported with their new names.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from btm_scale.errors import ConfigError

SCHEMA = 2

# Keys of version 0.1.0; `*` is any expert.
_RENAMED = {
    "group": "layout",
    "seed_group": "seed_layout",
    "experts.*.group": "layout",
    "model.groups": "kv_heads",
    "experts.*.model.groups": "kv_heads",
}
# Version 0.1.0 always wrote all of these into run.yaml.
_ALWAYS_WRITTEN = {
    *("name", "random_seed", "model", "tokenizer", "text_root", "domains", "novel_domains", "added_domains", "data"),
    *("budget", "optimizer", "group", "seed_group", "experts", "baselines", "checkpoint", "health", "profile"),
    *("evaluate", "deepspeed", "launch"),
}


def upgraded(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of a YAML; those of an earlier run.yaml are converted to the current schema.

    Raises ConfigError if a later version wrote them.
    """
    values = dict(values)
    schema = values.pop("schema", None)
    if schema not in (None, 1, SCHEMA):
        raise ConfigError(
            f"{path} has schema {schema}. This version of btm-scale reads schemas 1 and {SCHEMA}. Update btm-scale."
        )
    if schema != SCHEMA and path.name == "run.yaml" and values.keys() >= _ALWAYS_WRITTEN:
        values = with_current_names(values)[0]
        # An edited file may be incomplete or wrong; validation reports that.
        with contextlib.suppress(LookupError, TypeError, AttributeError, ArithmeticError):
            values = _with_rounded_batches(values)
    return values


def with_current_names(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values with old keys renamed, and a message for each renamed key.

    If both names are given, the value under the new one is kept.
    """
    return _renamed(values, ())


def _renamed(values: dict[str, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    result, messages = {}, []
    for key, value in values.items():
        here = (*path, str(key))
        pattern = (here[0], "*", *here[2:]) if here[0] == "experts" else here
        new = _RENAMED.get(".".join(pattern), key)
        if new != key:
            messages.append(f"{'.'.join(here)}: this key has been renamed; use {'.'.join([*path, new])}")
        if isinstance(value, dict):
            value, below = _renamed(value, here)
            messages += below
        if new == key or new not in values:
            result[new] = value
    return result, messages


def _with_rounded_batches(values: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 rounded an expert's batch to a multiple of its data ranks; set that batch where it differs."""
    budget, layout, experts = values["budget"], values["layout"], dict(values["experts"])
    share = budget["batch_tokens"] // budget["sequence_length"] // len(values["domains"])
    batch, everyone = max(1, share), layout.get("data", 1)
    for name in (*values["domains"], *values["added_domains"]):
        own = experts.get(name) or {}
        data = (own.get("layout") or {}).get("data", everyone)
        if batch % data and own.get("batch_tokens") is None:
            rounded = max(data, share // data * data)
            # `data` too, since the one of `layout` may change below.
            own_layout = {**(own.get("layout") or {}), "data": data}
            experts[name] = {**own, "layout": own_layout, "batch_tokens": rounded * budget["sequence_length"]}
    if batch % everyone:
        # Only the random split's models still use it, and no key sets their batch.
        layout = {**layout, "data": math.gcd(batch, everyone)}
    return {**values, "experts": experts, "layout": layout}
