"""The chat template of a tokenizer, or a file with one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from btm_scale.data.chat.process import ChatProcess
from btm_scale.data.tokenizer_files import CHAT_TEMPLATE, NAMED_TEMPLATES
from btm_scale.errors import DataError, unknown_name
from btm_scale.util.bounded_json import read_bounded
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object

if TYPE_CHECKING:
    from btm_scale.data.sources import DomainSource

_MOST_BYTES = 1 << 20
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_FILE = ".jinja"


class ChatTemplate:
    """A Jinja template, and the special tokens that it may name."""

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        self.template, self.special = template, dict(special)
        self.process = ChatProcess(template, special)

    @classmethod
    def of(cls, tokenizer: Path) -> Self | None:
        """Return the template in a tokenizer's directory, or None. Raises DataError if it cannot be read."""
        templates = _templates(tokenizer)
        return cls(templates["default"], _special(tokenizer)) if "default" in templates else None

    @classmethod
    def named(cls, name: str, tokenizer: Path | None, root: Path) -> Self:
        """Return a template of the tokenizer by its name, or the one in a .jinja file, relative to `root`.

        A tokenizer that the run still has to train, None, has no templates. Raises DataError if there is none.
        """
        if name.endswith(_FILE):
            return cls(_read(root / name), {} if tokenizer is None else _special(tokenizer))
        templates = {} if tokenizer is None else _templates(tokenizer)
        if tokenizer is None or name not in templates:
            where = "of an existing tokenizer (tokenizer.path)" if tokenizer is None else f"of the one in {tokenizer}"
            raise DataError(
                f"{unknown_name('chat template', name, templates)} It is a template {where}, or a file whose name ends "
                f"in {_FILE}."
            )
        return cls(templates[name], _special(tokenizer))

    @property
    def digest(self) -> str:
        """A SHA-256 of all that a chat's text depends on beside its messages, in hex."""
        return hashlib.sha256(json.dumps([self.template, sorted(self.special.items())]).encode()).hexdigest()

    def start(self) -> None:
        """Start the process that renders, so that the first chat does not wait for it."""
        self.process.start()


def template_of(source: DomainSource, tokenizer: Path | None) -> ChatTemplate:
    """Return the chat template of a domain. Raises DataError if there is none."""
    name = source.settings.template
    if name is not None:
        try:
            return ChatTemplate.named(name, tokenizer, source.text_root)
        except DataError as error:
            raise DataError(f"The `template` of domain '{source.name}': {error}") from None
    template = ChatTemplate.of(tokenizer) if tokenizer is not None else None
    if template is None:
        has = f"the tokenizer in {tokenizer} has" if tokenizer is not None else "a tokenizer that the run trains has"
        raise DataError(
            f"Domain '{source.name}' has conversations, and {has} no chat template, with which they become text. Set "
            "the domain's `template` to a .jinja file, or tokenizer.path to a tokenizer that has one."
        )
    return template


def _templates(tokenizer: Path) -> dict[str, str]:
    """Return the templates of a tokenizer by name; the usual one is `default`."""
    template = _settings(tokenizer).get("chat_template")
    named: dict[str, Any] = {"default": template}
    if isinstance(template, list):  # several by name
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
    if (path := file_inside(tokenizer, CHAT_TEMPLATE)).is_file():
        named["default"] = _read(path)
    others = tokenizer / NAMED_TEMPLATES
    for path in sorted(others.glob(f"*{_FILE}")) if others.is_dir() else []:
        named[path.stem] = _read(file_inside(tokenizer, f"{others.name}/{path.name}"))
    return {name: text for name, text in named.items() if isinstance(text, str)}


def _special(tokenizer: Path) -> dict[str, str]:
    special = {}
    settings = _settings(tokenizer)
    for name in _SPECIAL:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    return special


def _settings(tokenizer: Path) -> dict[str, Any]:
    path = file_inside(tokenizer, "tokenizer_config.json")
    return read_object(path, DataError) if path.is_file() else {}


def _read(path: Path) -> str:
    try:
        return read_bounded(path, _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a chat template: {error}. Copy the tokenizer again, or remove the file."
        ) from None
