"""From a typed function to a verb: its parameters are the options, its docstring the help, its return value the answer.

Three options are the same for every verb and are added here: `--json`, `--quiet` and `--verbose`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from btm_scale.cli.commands import OUTPUT, Verb
from btm_scale.errors import UserError
from btm_scale.launch.ranks import forget_foreign_rank
from btm_scale.run.launcher_table import LAUNCHERS, LOCAL
from btm_scale.util.logs import set_level, set_up_logging
from btm_scale.util.terminal import printable

logger = logging.getLogger(__name__)

Document = Mapping[str, Any]
Function = TypeVar("Function", bound=Callable[..., "Document | Answer | None"])

# A verb that acts in another way under --json takes it as a parameter: `as_json: Json = False`.
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON document on stdout, and nothing else.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", rich_help_panel=OUTPUT, help="Log warnings and errors only.")]
_Verbose = Annotated[bool, typer.Option("--verbose", rich_help_panel=OUTPUT, help="Log details for debugging.")]
_COMMON = {"as_json": Json, "quiet": _Quiet, "verbose": _Verbose}


@dataclass(frozen=True)
class Answer:
    """What a verb answers: the document of `--json`, and how it is shown to a person (default: as YAML).

    `is_brief`: `show` leaves facts out, which --verbose prints. `exit_code` is for an answer that is a complaint.
    """

    document: Document
    show: Callable[[], None] | None = None
    is_brief: bool = False
    exit_code: int = 0


@dataclass(frozen=True)
class Call:
    """A verb and its arguments: parsed, and not run yet."""

    function: Callable[..., Document | Answer | None]
    arguments: Mapping[str, Any]
    as_json: bool
    quiet: bool
    verbose: bool

    def run(self) -> int:
        """Run the verb, print its answer, and return the exit code. Raises what the verb raises."""
        if self.quiet and self.verbose:
            raise UserError("--quiet and --verbose exclude each other. Give one of them.")
        if self.quiet or self.verbose:
            set_level("warning" if self.quiet else "debug")
        if LAUNCHERS[self.arguments.get("launcher", LOCAL)].become_rank is None:
            forget_foreign_rank(os.environ)
        set_up_logging()
        # Libraries print on stdout too, DeepSpeed as soon as it is imported.
        only_the_answer = contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()
        with only_the_answer:
            answer = self.function(**self.arguments)
        if answer is not None:
            answer = answer if isinstance(answer, Answer) else Answer(answer)
            self._print(answer)
        print(end="", flush=True)
        return answer.exit_code if answer is not None else 0

    def _print(self, answer: Answer) -> None:
        if self.as_json:
            print(json.dumps(answer.document, indent=2))
        elif answer.show is not None and not (answer.is_brief and self.verbose):
            answer.show()
        else:
            from btm_scale.config.yaml import dump_text

            say(dump_text(dict(answer.document)), end="")


def verb(
    app: typer.Typer, name: str, *, section: str | None = None, cls: type[Verb] = Verb
) -> Callable[[Function], Function]:
    """Add a function to the command line as the verb `name`, listed under `section`."""

    def add(function: Function) -> Function:
        app.command(name, cls=cls, rich_help_panel=section)(_parsed(function))
        return function

    return add


def already_complete(document: Document, output: str) -> Document:
    """Return the answer of a command that was repeated after it had finished, and log that nothing was written."""
    logger.info("%s is already complete: the same command made it. Nothing was written.", output)
    return {**document, "already_complete": True}


def say(text: str, *, end: str = "\n") -> None:
    """Print text of an answer on stdout: unchanged into a pipe, with control characters escaped on a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def silent() -> None:
    """How an answer is shown that is for `--json` only."""


def _parsed(function: Callable[..., Any]) -> Callable[..., Call]:
    """What typer calls: a function with the parameters of the verb and the common ones."""
    signature = inspect.signature(function, eval_str=True)
    own = dict(signature.parameters)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _COMMON.items()
        if name not in own
    ]

    @functools.wraps(function)
    def call(**given: Any) -> Call:
        common = {name: given[name] for name in _COMMON}
        return Call(function, {name: given[name] for name in own}, **common)

    call.__signature__ = signature.replace(parameters=[*own.values(), *added])  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call
