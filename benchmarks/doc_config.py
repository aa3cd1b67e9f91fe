"""docs/config.md: every key of a run's YAML, read from the config classes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from btm_scale.config.run import RunConfig
from btm_scale.model.shape import PRESETS

_HEAD = """# Config

Every key of a run's YAML, written by `python benchmarks/write_docs.py`. Only `domains` is required. An unknown key is
refused with the nearest known one, and `--set SECTION.KEY=VALUE` changes one value on the command line. A run records
its resolved config in `run.yaml`.
"""
_NOTHING = "\u2013"
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", type(None): "null"}


def config_page() -> str:
    """Return the page: a table of the top level, and one for each section."""
    parts = [_HEAD, _table(RunConfig, "")]
    for path, section in _sections(RunConfig, ""):
        title = path.replace("[]", "NAME")
        parts += [f"## {title}\n", f"{_summary(section)}\n", _table(section, title)]
        if path == "model":
            parts.append(_presets())
    return "\n".join(parts)


def _summary(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").partition("\n\n")[0]


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the path and class of each section below a model; a section of a mapping has `[]` for its name."""
    for name, field in model.model_fields.items():
        for section, in_mapping in _models(field.annotation):
            path = f"{prefix}{name}{'.[]' if in_mapping else ''}"
            if name in ("novel_domains", "added_domains") or (prefix.startswith("experts") and name == "model"):
                continue  # described under domains and model
            yield path, section
            yield from _sections(section, f"{path}.")


def _models(annotation: Any, in_mapping: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, in_mapping
    for argument in get_args(annotation):
        yield from _models(argument, in_mapping or get_origin(annotation) is dict)


def _table(model: type[BaseModel], path: str) -> str:
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_meaning(field)} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(one) for one in arguments if one is not type(None)))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        inner = [model for model, _ in _models(annotation)]
        return "a section per name" if inner else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES.get(annotation, "text")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if field.default_factory is not None or value is None or isinstance(value, BaseModel) or value == Path():
        return _NOTHING
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else f'{value:g}' if isinstance(value, float) else value}`"


def _meaning(field: FieldInfo) -> str:
    if field.description:
        return field.description.replace("|", "\\|")
    sections = [section for section, _ in _models(field.annotation)]
    return _summary(sections[0]).replace("\n", " ") if sections else ""


def _presets() -> str:
    keys = ("family", "layers", "hidden", "heads", "kv_heads", "ffn")
    rows = [
        f"| `{name}` | {' | '.join(str(sizes.get(key, _NOTHING)) for key in keys)} |" for name, sizes in PRESETS.items()
    ]
    return "\n".join([f"| preset | {' | '.join(keys)} |", f"|---{'|---' * len(keys)}|", *rows, ""])
