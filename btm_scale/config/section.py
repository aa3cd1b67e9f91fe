"""Section: what every part of the YAML is built on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from btm_scale.errors import UserError


class Section(BaseModel):
    """A part of the YAML: strict, and never changed once it is made."""

    # No setting of a run has infinity or "not a number" for a value; YAML can write both.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Every problem of a ValidationError, one a line, each with its path in the YAML."""
    lines = []
    for problem in error.errors():
        location = [part for part in problem["loc"] if not (isinstance(part, str) and part in _UNION_TAGS)]
        path = ".".join([prefix, *map(str, location)] if prefix else map(str, location))
        lines.append("\n".join(f"  {path}: {line}" if path else f"  {line}" for line in _sentence(problem, model)))
    return "\n".join(dict.fromkeys(lines))


# pydantic names the branch of a union in the location; the YAML has no such key.
_UNION_TAGS = {
    "SplitUnit",
    "literal['document','file']",
    "literal['seed','nearest','posterior']",
    "dict[str,float]",
    "[key]",
}


def _sentence(problem: Any, model: type[BaseModel]) -> Iterator[str]:
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        known = sorted(_fields_at(model, parents))
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        yield f"no such key; {remedy}"
    elif problem["type"] == "missing":
        yield "must be given"
    elif problem["type"] == "value_error":
        yield from str(problem["ctx"]["error"]).split("\n")
    else:
        message = problem["msg"].replace("Input should be", "must be")
        yield f"{problem['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(model: type[BaseModel], location: list[str | int]) -> set[str]:
    """The keys that the model allows at a location."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        models = _models_in(field.annotation)
        if not models:
            return set()
        model = models[0]
    return set(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_from_text(text: str) -> float:
    """A number of bytes such as '8GB', '500MiB' or '1e9'. Raises UserError for what is none."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = match and match[2].upper()
    if not match or unit not in _UNITS:
        raise UserError(f"'{text}' is no size; write it as 8GB, 500MiB or a number of bytes")
    try:
        return float(match[1]) * _UNITS[unit]
    except ValueError:
        raise UserError(f"'{text}' is no size; write it as 8GB, 500MiB or a number of bytes") from None
