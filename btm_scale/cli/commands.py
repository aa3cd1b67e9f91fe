"""How typer's commands look here: plain help in sections, at most 80 columns wide, on a terminal as in a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from typer import TyperException
from typer.core import TyperCommand, TyperGroup

OUTPUT = "Output"  # the section of the options that every verb has
_OPTIONS = "Options"
_ALIASES = {"--seed": "--random-seed"}


class Verb(TyperCommand):
    """A verb. Its options are listed in the sections that they name."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name the arguments as they are named below."""
        return ["[OPTIONS]", *(str(argument.metavar) for argument in self.get_params(ctx) if _is_argument(argument))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and then the options, section by section; those of every verb come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_argument = _is_argument(parameter)
            row = (str(parameter.metavar), _help_of(parameter)) if is_argument else parameter.get_help_record(ctx)
            if row is not None:
                sections.setdefault(_section(parameter), []).append(row)
        for title in sorted(sections, key=lambda title: title == OUTPUT):
            with formatter.section(title):
                formatter.write_dl(sections[title])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept former and common names of options, which help does not list."""
        known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        return super().parse_args(ctx, [_current(word, known) for word in args])


class VerbWithWords(Verb):
    """A verb with a list option that takes the words after it: `--text a.txt b.txt` is `--text a.txt --text b.txt`."""

    option = "--text"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its words."""
        words: list[str] = []
        rest = list(args)
        while rest:
            words.append(rest.pop(0))
            if words[-1] == self.option:
                values = list(takewhile(lambda word: not word.startswith("-"), rest))
                del rest[: len(values)]
                words[-1:] = [part for value in values for part in (self.option, value)] or [self.option]
        return super().parse_args(ctx, words)


class Verbs(TyperGroup):
    """The command itself, or a verb that has actions. What it lists has one line each."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options; a flag without a default is False, because typer would import pydantic to check a None."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb; for a folder in its place, the error names the verb that may have been meant."""
        try:
            return super().resolve_command(ctx, args)
        except TyperException as error:
            if args and Path(args[0]).is_dir():
                looks = next(name for name in ("list", "status") if name in self.commands)
                meant = f"{ctx.command_path} {looks} {args[0]}"
                error.message = f"{args[0]} is a directory and not a command. Did you mean '{meant}'?"
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options and then the verbs, section by section."""
        rows = [row for parameter in self.get_params(ctx) if (row := parameter.get_help_record(ctx)) is not None]
        sections: dict[str, list[tuple[str, str]]] = {}
        commands = [(name, command) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        width = formatter.width - 6 - max(len(name) for name, _ in commands)
        for name, command in commands:
            title = getattr(command, "rich_help_panel", None) or "Actions"
            sections.setdefault(title, []).append((name, command.get_short_help_str(width)))
        for title, listed in (*sections.items(), (_OPTIONS, rows)):
            with formatter.section(title):
                formatter.write_dl(_aligned(listed, sections.values()))


def _current(word: str, known: set[str]) -> str:
    """Return an option, with its value if it has one, under its current name."""
    name, sign, value = word.partition("=")
    today = _ALIASES.get(name)
    return today + sign + value if today in known and name not in known else word


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _help_of(parameter: Any) -> str:
    return parameter.help or ""


def _section(parameter: Any) -> str:
    if _is_argument(parameter):
        return "Arguments"
    if "--help" in parameter.opts:
        return OUTPUT
    return getattr(parameter, "rich_help_panel", None) or _OPTIONS


def _aligned(rows: list[tuple[str, str]], others: Iterable[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The rows with names as wide as the widest of all sections."""
    width = max(len(name) for listed in others for name, _ in listed)
    return [(name.ljust(width), text) for name, text in rows]
