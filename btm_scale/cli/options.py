"""Arguments and options that several verbs share, and how choices are shown, checked and completed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btm_scale.errors import unknown_name
from btm_scale.launch.ranks import is_rank as is_own_rank
from btm_scale.run.launcher_table import LAUNCHERS, Starting

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig
    from btm_scale.run_dir import RunDir


def one_of(
    option: str,
    what: str,
    names: Iterable[str],
    help: str,
    *,
    section: str | None = None,
    any_case: bool = False,
    **more: Any,
) -> Any:
    """Return an option that takes one of the names: help lists them, the parser checks them, a shell completes them.

    `names` may be a table that grows. `what` says in the message for a wrong one what the names are of. `any_case` is
    for names in lower case that may be given in upper case.
    """

    def check(value: str | None) -> str | None:
        known = value.lower() if value is not None and any_case else value
        if known is not None and known not in list(names):
            raise typer.BadParameter(unknown_name(what, str(value), names))
        return known

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    if "metavar" not in more:
        more["metavar"] = "|".join(names)
    return typer.Option(option, callback=check, autocompletion=complete, help=help, rich_help_panel=section, **more)


def option(name: str, metavar: str, help: str, *, section: str | None = None, **more: Any) -> Any:
    """Return an option with one value."""
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=section, **more)


def flag(name: str, help: str, **more: Any) -> Any:
    """Return an option without a value."""
    return typer.Option(name, help=help, **more)


def argument(metavar: str, help: str, **more: Any) -> Any:
    """Return an argument, which is known by its place."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, **more)


def several(
    option: str, metavar: str, help: str, *, section: str | None = None, complete: Callable[..., Any] | None = None
) -> Any:
    """Return an option that may be repeated."""
    return typer.Option(
        option,
        metavar=metavar,
        default_factory=list,
        show_default=False,
        help=help,
        rich_help_panel=section,
        autocompletion=complete,
    )


def device(section: str | None = None) -> Any:
    """Return the option `--device`."""
    help = "Device of the models, such as cpu or cuda:1.  [default: a GPU if there is one]"
    return typer.Option("--device", metavar="DEVICE", rich_help_panel=section, help=help)


def max_memory(section: str | None = None) -> Any:
    """Return the option `--max-memory`, of commands that load experts."""
    help = "Keep at most this many bytes of weights in memory, such as 8GB.  [default: all]"
    return typer.Option("--max-memory", metavar="SIZE", rich_help_panel=section, help=help)


def launcher(names: Iterable[str], more: str = "") -> Any:
    """Return the option `--launcher` with these launchers of the table."""
    places = ", ".join(f"{name} ({LAUNCHERS[name].help})" for name in names)
    return one_of("--launcher", "launcher", names, f"Where groups run: {places}.{more and ' '}{more}")


def models_of_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """The finished models of the run whose folder was given, for completion; their names are all that is looked at."""
    from btm_scale.run_dir import RunDir, finished_models

    # An option that lacks its value yet leaves the arguments before it unparsed.
    run = RunDir(Path(ctx.params.get("run") or next(iter(ctx.args), ".")))
    return [name for name in finished_models(run) if name.startswith(incomplete)]


ConfigFile = Annotated[Path, argument("CONFIG", "The run's YAML.")]
RunFolder = Annotated[Path, argument("RUN", "The run's folder.")]
Out = Annotated[
    Path | None,
    option(
        "--out",
        "DIR",
        "The run's folder.  [default: runs/NAME, NAME being the `name` in the YAML or the file's name]",
    ),
]
Settings = Annotated[
    list[str],
    several("--set", "KEY=VALUE", "Change one value of the YAML, such as budget.tokens=1e6. May be repeated."),
]
RandomSeed = Annotated[int, option("--random-seed", "N", "Random seed.", min=0, max=(1 << 32) - 1)]
Device = Annotated[str | None, device()]
Launcher = Annotated[str, launcher(Starting())]


def is_rank(launcher: str) -> bool:
    """Whether this process is a rank of a group that a launcher started."""
    become_rank = LAUNCHERS[launcher].become_rank
    if become_rank is None:
        return is_own_rank(os.environ)
    become_rank(os.environ)
    return True


@contextmanager
def opened_in(run: Path, turn: Callable[[RunDir], AbstractContextManager[None]]) -> Iterator[tuple[RunConfig, RunDir]]:
    """Yield a run's config and paths while it holds the lock of `turn`; other commands may change them until then."""
    _, run_dir = opened(run)
    with turn(run_dir):
        yield opened(run)


def opened(run: Path, config: Path | None = None) -> tuple[RunConfig, RunDir]:
    """The run in this folder, with its own config or that of a file. Raises ConfigError if there is none."""
    from btm_scale.forest.open import open_folder

    return open_folder(run, config)
