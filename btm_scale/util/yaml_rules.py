"""The YAML of configs, as classes of ruamel.yaml: how scalars are typed, what is refused, what is quoted on output."""

from __future__ import annotations

import copy
import re
from typing import Any

from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import CollectionNode, MappingNode, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver, implicit_resolvers
from ruamel.yaml.tag import Tag

# Far above any config. A file that is nested deeper, or whose aliases expand to more, could take minutes or gigabytes.
_MAX_VALUES = 200_000
_MAX_DEPTH = 50

_CORE = "tag:yaml.org,2002:"
_TEXT = Tag(suffix=f"{_CORE}str")
_PLAIN_TAGS = {"!", f"{_CORE}str", f"{_CORE}seq", f"{_CORE}map"}
# What an unquoted scalar is: YAML 1.2's core schema, with `_` in numbers. A date is text.
_NO_INTEGER = (
    r"(?P<null>|~|null|Null|NULL)|(?P<bool>true|True|TRUE|false|False|FALSE)|(?P<merge><<)"
    r"|(?P<float>[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)
_SCALARS = re.compile(rf"(?P<int>[-+]?(?:0x[0-9a-fA-F]{{1,30}}|0o[0-7]{{1,30}}|[0-9][0-9_]{{,30}}))|{_NO_INTEGER}")
# A run.yaml of an earlier version was written as YAML 1.1, which left the texts 0o17, 08 and +.5 unquoted; it wrote no
# number in these forms.
_WRITTEN = re.compile(rf"(?P<int>[-+]?(?:0|[1-9][0-9_]{{,30}}))|(?P<str>[-+]?0o?[0-9_]+|[-+]\.[0-9]+)|{_NO_INTEGER}")
_YES_OR_NO = re.compile("yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")


class ConfigResolver(VersionedResolver):
    """The types of unquoted scalars, whichever version a %YAML line names."""

    scalars = _SCALARS

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:  # noqa: D102
        if kind is ScalarNode:
            match = self.scalars.fullmatch(value) if implicit[0] else None
            return Tag(suffix=_CORE + str(match.lastgroup)) if match else _TEXT
        return super().resolve(kind, value, implicit)

    @property
    def processing_version(self) -> Any:  # noqa: D102
        return (1, 2)


class WrittenResolver(ConfigResolver):
    """The same for a run.yaml, which an earlier version may have written as YAML 1.1."""

    scalars = _WRITTEN


class StrictComposer(Composer):
    """Keeps every key as the text that was written, and raises MarkedYAMLError for YAML that no config needs."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self._values = 0  # read so far, each alias counted as the values that it repeats
        self._sizes: dict[str, int] = {}  # values below each anchor

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: D102
        event, before = self.parser.peek_event(), self._values
        is_alias = isinstance(event, AliasEvent)
        if is_alias:
            self._require_finite(event)
        elif event.ctag is not None and str(event.ctag) not in _PLAIN_TAGS:
            raise _error(event, f"unknown tag '{event.ctag!s:.80}'. A config has plain values only: remove the tag")
        if self.depth >= _MAX_DEPTH:
            raise _error(event, f"nested deeper than {_MAX_DEPTH} levels. No setting is that deep: check the brackets")
        node = super().compose_node(parent, index)
        self._values += self._sizes.get(event.anchor, 1) if is_alias else 1
        if event.anchor is not None and not is_alias:
            self._sizes[event.anchor] = self._values - before
        if self._values > _MAX_VALUES:
            raise _error(event, f"more than {_MAX_VALUES:,} values, aliases expanded. Use globs for lists of files")
        is_key = isinstance(parent, MappingNode) and index is None
        if isinstance(node, ScalarNode) and not (is_alias or is_key or node.style or event.ctag):
            _require_no_yes(node)
        return node

    def _require_finite(self, event: AliasEvent) -> None:
        node = self.anchors.get(event.anchor)
        # The end of a mapping or a list is known once all of it has been read.
        if isinstance(node, CollectionNode) and node.end_mark is None:
            raise _error(event, f"recursive alias '*{event.anchor:.80}'. A config must be finite: write the values out")

    def compose_mapping_node(self, anchor: Any) -> Any:  # noqa: D102
        node = super().compose_mapping_node(anchor)
        keys = set()
        for position, (key, value) in enumerate(node.value):
            if not isinstance(key, ScalarNode):
                raise _error(key, "a key is a mapping or a list. A key must be text: quote it")
            if key.tag == f"{_CORE}merge":
                continue
            if key.value in keys:
                raise _error(key, f"duplicate key '{key.value:.80}'. Keep one")
            keys.add(key.value)
            # A copy, since an alias as a key shares its node with a value.
            key = copy.copy(key)
            key.ctag = _TEXT
            node.value[position] = (key, value)
        return node


def _require_no_yes(node: ScalarNode) -> None:
    text = node.value
    if _YES_OR_NO.fullmatch(text):
        boolean = "true" if text.lower() in ("yes", "on") else "false"
        raise _error(node, f"'{text}' is not a boolean in YAML 1.2. Write {boolean}, or '{text}' in quotes for text")


def _error(place: Any, problem: str) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class QuotingResolver(VersionedResolver):
    """Types text as anything that YAML 1.1 or 1.2 would take it for, so that such text is written in quotes."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:  # noqa: D102
        if kind is ScalarNode and implicit[0]:
            for _, tag, pattern, first in implicit_resolvers:
                if value[:1] in first and pattern.match(value):
                    return Tag(suffix=tag)
            return _TEXT
        return super().resolve(kind, value, implicit)


class PortableRepresenter(SafeRepresenter):
    """Writes text and floats that readers of YAML 1.1 and 1.2 take for the same values."""

    def represent_str(self, data: Any) -> ScalarNode:  # noqa: D102
        # Unescaped, a next-line character is read back as a space.
        return self.represent_scalar(f"{_CORE}str", data, style='"' if "\x85" in data else None)

    def represent_float(self, data: Any) -> ScalarNode:  # noqa: D102
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")  # YAML 1.1 takes 1e-08 for text
        return node


PortableRepresenter.add_representer(str, PortableRepresenter.represent_str)
PortableRepresenter.add_representer(float, PortableRepresenter.represent_float)
