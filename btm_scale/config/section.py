"""Section: the base class of each part of the YAML; error messages, and sizes in bytes."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from btm_scale.errors import UserError


class Section(BaseModel):
    """A part of the YAML: strict and frozen."""

    # YAML can write infinity and NaN; no setting may have them.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_quoted_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes "yes", "off", 1 and others for booleans.
        annotation = cls.model_fields[str(info.field_name)].annotation
        choices = get_args(annotation) or (annotation,)
        is_unset = value is None and type(None) in choices
        if bool in choices and not (isinstance(value, bool) or is_unset):
            raise ValueError(f"must be true or false, without quotes, and is {_shown(value)}")
        return value


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return the problems of a ValidationError, one per line, each with its path in the YAML."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems[:_MAX_PROBLEMS]:
        location = [part for part in problem["loc"] if not (isinstance(part, str) and part in _UNION_TAGS)]
        path = ".".join([prefix, *map(str, location)] if prefix else map(str, location))
        lines.append("\n".join(f"  {path}: {line}" if path else f"  {line}" for line in _sentence(problem, model)))
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"  and {len(problems) - _MAX_PROBLEMS:,} more problems")
    return "\n".join(dict.fromkeys(lines))


_MAX_PROBLEMS = 100
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100

# pydantic names the branch of a union in the location; the YAML has no such key.
_UNION_TAGS = {
    "SplitUnit",
    "literal['document','file','position']",
    "literal['seed','nearest','posterior']",
    "dict[str,float]",
    "literal['all']",
    "tuple[str, ...]",
    "[key]",
}


def _sentence(problem: Any, model: type[BaseModel]) -> Iterator[str]:
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        known = sorted(_fields_at(model, parents))
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else f"the keys here are {', '.join(known)}"
        yield f"unknown key; {remedy}"
    elif problem["type"] == "missing":
        is_item = problem["loc"] and isinstance(problem["loc"][-1], int)
        yield "missing; the list needs this item" if is_item else "missing; this key is required"
    elif problem["type"] == "value_error":
        yield from str(problem["ctx"]["error"]).split("\n")
    elif problem["type"] in ("too_short", "too_long"):
        yield _wrong_length(problem["ctx"])
    elif (kind := _KINDS.get(problem["type"])) is not None:
        yield f"must be {kind} and is {_shown(problem['input'])}"
    else:
        message = problem["msg"].replace("Input should be", "must be")
        yield f"{_SHORT.repr(problem['input'])}: {message[0].lower()}{message[1:]}"


# What pydantic's types of errors ask for, in the words of the YAML.
_KINDS = (
    dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "an integer")
    | dict.fromkeys(("float_type", "float_parsing"), "a number")
    | dict.fromkeys(("string_type", "string_sub_type"), "text in quotes")
    | dict.fromkeys(("list_type", "tuple_type"), "a list")
    | dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "a section of keys")
    | {"path_type": "a path", "none_required": "empty"}
)


def _shown(value: Any) -> str:
    return "empty" if value is None else _SHORT.repr(value)


def _wrong_length(limits: Mapping[str, Any]) -> str:
    if "max_length" in limits:
        return f"has {limits['actual_length']} items; give at most {limits['max_length']}"
    if limits["actual_length"]:
        return f"has too few items; give at least {limits['min_length']}"
    return "is empty; give at least " + ("one" if limits["min_length"] == 1 else str(limits["min_length"]))


def _fields_at(model: type[BaseModel], location: list[str | int]) -> set[str]:
    """Return the keys that the model has at a location."""
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
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


_SIZE = re.compile(r"[0-9]*\.?[0-9]+\s*[a-zA-Z]+")  # ByteSize ignores what follows a size


def bytes_from_text(text: str) -> int:
    """Return the bytes in a size such as '8GB', '500MiB', '1.5GiB', '1e9' or '1000000000'.

    Raises UserError for anything else, and for less than one byte.
    """
    try:
        return _positive_bytes(text)
    except ValueError as error:
        raise UserError(str(error)) from None


def _positive_bytes(value: str | float) -> int:
    text = str(value).strip()
    try:
        if _SIZE.fullmatch(text):
            size: float = _BYTE_SIZE.validate_python(text)
        else:
            size = float(text)
    except ValueError:
        size = math.nan
    if isinstance(value, bool) or not (1 <= size < math.inf and size == int(size)):
        raise ValueError(
            f"Invalid size '{text:.80}'. A size is a whole number of bytes, or a number with a unit: "
            "write 1000000000, 1e9, 8GB or 500MiB."
        )
    return int(size)


_BYTE_SIZE = TypeAdapter(ByteSize)
# A number of bytes, or text such as 8GB.
Bytes = Annotated[int, BeforeValidator(_positive_bytes)]
