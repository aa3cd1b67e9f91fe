"""Strict YAML 1.2 in and out, as text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from btm_scale.errors import ConfigError
from btm_scale.util.yaml_rules import ConfigResolver, PortableRepresenter, QuotingResolver, StrictComposer


def parse_yaml(text: str, name: str, resolver: type[ConfigResolver] = ConfigResolver) -> Any:
    """Return the values in a text; `name` is what messages call it. Raises ConfigError if it is not strict YAML."""
    reader = YAML(typ="safe", pure=True)
    reader.Resolver, reader.Composer = resolver, StrictComposer
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{name}, line {mark.line + 1}: {problem:.300}.") from None
    # Beside its own errors, ruamel.yaml raises these for a character such as \UFFFFFFFF and for %YAML 1.9.
    except (YAMLError, ValueError, OverflowError, AssertionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None


def dump_text(values: Mapping[str, Any], *, flow: bool | None = False) -> str:
    """Return values as YAML that every reader of YAML 1.1 or 1.2 takes for the same values.

    With `flow` True it is one line of braces; with None only the innermost mappings and lists are in braces.
    """
    writer: Any = YAML(typ="safe", pure=True)
    writer.Resolver, writer.Representer = QuotingResolver, PortableRepresenter
    writer.default_flow_style = flow
    writer.sort_base_mapping_type_on_output = False
    if flow:
        writer.width = 1_000_000
    stream = io.StringIO()
    writer.dump(values, stream)
    return stream.getvalue()
