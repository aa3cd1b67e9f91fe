"""The btm-scale command: the verbs of this folder's files in one parser, and from arguments to an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from btm_scale import __version__
from btm_scale.cli import checkpoint, evaluate, forest, generate, mixture, run, serve
from btm_scale.cli.commands import Verbs
from btm_scale.cli.exit_codes import exit_codes
from btm_scale.cli.safe_path import import_nothing_from_here
from btm_scale.cli.verb import Call
from btm_scale.util.cores import wait_passively

_METAVAR = "VERB ..."
app = typer.Typer(name="btm-scale", cls=Verbs, no_args_is_help=True, rich_markup_mode=None, subcommand_metavar=_METAVAR)
for _area in (run, forest, evaluate, mixture, generate, serve, checkpoint):
    app.add_typer(_area.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 on success, 2 on a user's mistake, 1 on any other failure."""
    wait_passively(os.environ)
    if arguments is None:
        import_nothing_from_here()
    with exit_codes():
        call = parse(sys.argv[1:] if arguments is None else arguments)
        code = call.run() if isinstance(call, Call) else call
    if code:
        sys.exit(code)


def parse(arguments: Sequence[str]) -> Call | int:
    """Parse arguments; returns the call, or the exit code of what answers at once, such as --help."""
    outcome: Any = _parser().main(args=list(arguments), prog_name="btm-scale", standalone_mode=False)
    return outcome if isinstance(outcome, Call) else int(outcome or 0)


@functools.cache
def _parser() -> Any:
    return get_command(app)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"btm-scale {__version__}")
        raise typer.Exit()


@app.callback()
def _btm_scale(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Branch-Train-Merge: train, ensemble and merge domain-expert language models."""


if __name__ == "__main__":
    main()
