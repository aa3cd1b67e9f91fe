"""Strict YAML in and out, and overrides of single keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from btm_scale.errors import ConfigError
from btm_scale.util.files import make_directory, write_file


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, and an alias inside of what it stands for."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self._flattened: set[yaml.Node] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            node = self.anchors.get(alias.anchor)
            # The end of a mapping or a list is known once all of it has been read.
            if isinstance(node, yaml.CollectionNode) and node.end_mark is None:
                raise ConfigError(
                    f"{self.name}, line {alias.start_mark.line + 1}: '*{alias.anchor}' stands inside of what it "
                    "stands for; a config must end, so write the values out"
                )
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # `<<` puts another mapping's keys beside a mapping's own, which replace them: only the own must differ.
        if node in self._flattened:
            return
        self._flattened.add(node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            place = f"{self.name}, line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key is a mapping or a list; a key must be a word or a number")
            key = self.construct_object(key_node)
            if key in seen:
                raise ConfigError(f"{place}: key '{key}' stands twice; keep one")
            seen.add(key)
        super().flatten_mapping(node)


def _parse(text: str, name: str) -> Any:
    try:
        loader = _StrictLoader(text, name)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None


def _numbers(value: Any) -> Any:
    # YAML 1.1 takes 1e-3 (no dot) for text; nobody who writes it means text.
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() and "-" not in value else number
    return value


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for what is missing, unreadable or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping; it needs at least `domains:`")
    return _numbers(values)


def apply_overrides(values: dict[str, Any], overrides: tuple[str, ...], paths: tuple[str, ...]) -> dict[str, Any]:
    """Set `a.b=value` in a copy of `values`; the keys in `paths` are made absolute from the working folder."""
    result = _numbers(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {override}: expected key=value, such as --set budget.tokens=1000000")
        value = _numbers(_parse(text, f"--set {key}"))
        if key in paths and value is not None:
            value = str(Path(str(value)).resolve())
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            child = place.get(parent)
            if child is None:
                child = place[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override}: '{parent}' is a value, not a section")
            place = child
        place[last] = value
    return result


def dump_yaml(values: dict[str, Any], path: Path) -> None:
    """Write a mapping, complete or not at all."""
    make_directory(path.parent)
    write_file(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
