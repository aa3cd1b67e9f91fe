"""Strict YAML 1.2 in and out, and overrides of single keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btm_scale.errors import ConfigError
from btm_scale.util.files import make_directory, write_file
from btm_scale.util.yaml_rules import ConfigResolver, WrittenResolver
from btm_scale.util.yaml_text import dump_text, parse_yaml

__all__ = ["apply_overrides", "dump_text", "dump_yaml", "load_yaml"]

_MAX_BYTES = 8_000_000


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; its keys are the text that was written.

    Raises ConfigError for a file that is missing, unreadable, too large, not strict YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES / 1e6:.0f} MB. Give the path of a config.")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"No config at {path}. Give the path of a YAML file.") from None
    except IsADirectoryError:
        is_run = (path / "run.yaml").is_file()
        remedy = f"Give its run.yaml, with --out {path}, or your own YAML" if is_run else "Give the path of a YAML file"
        raise ConfigError(f"{path} is a directory. {remedy}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    values = parse_yaml(text, str(path), WrittenResolver if path.name == "run.yaml" else ConfigResolver)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a mapping of keys to values. A config needs at least `domains:`.")
    return values


def apply_overrides(values: dict[str, Any], overrides: tuple[str, ...], paths: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy of `values` with each override `a.b=value` applied; `values` stays as it is.

    The keys in `paths` are made absolute from the working folder. Raises ConfigError for an override that is not
    key=value, or whose key leads through a value that is not a section.
    """
    result = dict(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"'--set {override}' has no key and value. Write key=value, such as --set budget.tokens=1000000."
            )
        value = parse_yaml(text, f"--set {key}")
        if key in paths and value is not None:
            value = str(Path(str(value)).resolve())
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            child = section.get(parent)
            if child is not None and not isinstance(child, dict):
                raise ConfigError(
                    f"'--set {override}' goes through '{parent}', which is a value. Only a section has keys: "
                    f"set {parent} itself."
                )
            # A copy: with an alias, other keys share the mapping.
            section[parent] = dict(child or {})
            section = section[parent]
        section[last] = value
    return result


def dump_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Write a mapping to a file, complete or not at all."""
    make_directory(path.parent)
    write_file(path, dump_text(values))
