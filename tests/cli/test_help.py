from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_help import help_texts
from typer.main import get_command

from btm_scale.checkpoint.merge.planning import make_plan
from btm_scale.checkpoint.merge.registry import METHODS, RANGES
from btm_scale.cli import forest, generate
from btm_scale.cli.app import app, main, parse
from btm_scale.cli.verb import Call
from btm_scale.errors import CheckpointError
from btm_scale.forest import routers
from btm_scale.forest.priors import PRIORS
from btm_scale.generate import request

HEAVY = ("torch", "numpy", "transformers", "plotly", "jinja2", "ruamel", "yaml", "pydantic", "rich", "deepspeed")


def verbs() -> dict[tuple[str, ...], Any]:
    """Every verb's command by its words."""
    commands: dict[tuple[str, ...], Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        actions = getattr(command, "commands", None)
        commands |= {(name, action): own for action, own in actions.items()} if actions else {(name,): command}
    return commands


def test_no_help_imports_what_it_does_not_need() -> None:
    calls = [[*words, "--help"] for words in [(), ("forest",), *verbs()]]
    code = (
        f"import sys\nfrom btm_scale.cli.app import main\nfor words in {calls}:\n    main(words)\n"
        f"sys.exit(str([name for name in {HEAVY} if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, ""), done.stderr
    assert done.stdout.count("Usage: btm-scale") == len(calls)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_is_plain_text_that_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in [(), *verbs()]:
        text = help_of(*words)
        assert text.isascii(), words
        width = max(columns, 50)  # what typer takes for the least
        long = [line for line in text.splitlines() if len(line) > min(width, 80) and " " in line.strip()]
        assert not long, words


def test_every_verb_and_every_option_is_documented() -> None:
    assert len(verbs()) == 24
    for words, command in verbs().items():
        assert command.help.partition("\n")[0].endswith("."), words
        for parameter in command.params:
            assert parameter.help or parameter.hidden, (words, parameter.name)
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet", "--verbose"} <= options, words


def test_a_hidden_option_works_and_is_not_listed() -> None:
    (averages,) = (one for one in verbs()["score",].params if one.name == "averages")
    assert averages.hidden
    assert "--averages" not in help_of("score")


def test_merge_help_lists_every_method_with_its_parameters_and_base() -> None:
    text = " ".join(help_of("merge").partition("Methods:")[2].split())
    entries = [text.find(f"{name} {method.meaning}") for name, method in METHODS.items()]
    assert -1 not in entries
    assert entries == sorted(entries)
    for (name, method), begin, end in zip(METHODS.items(), entries, [*entries[1:], len(text)], strict=True):
        entry = text[begin:end]
        assert ("Needs --base." in entry) == method.needs_base, name
        for parameter, default in method.parameters.items():
            assert f"{parameter} ({RANGES.get(parameter, 'any number')}; default {default:g})" in entry


@pytest.mark.parametrize(
    ("method", "parameters", "fits"),
    [
        ("dare", {"density": 1.0}, True),
        ("dare", {"density": 0.0}, False),
        ("dare", {"density": 1.1}, False),
        ("della", {"density": 0.5, "window": 0.0}, True),
        ("della", {"density": 0.5, "window": 1.0}, False),
        ("della", {"density": 0.5, "window": -0.1}, False),
    ],
)
def test_the_ranges_that_help_gives_are_those_that_a_merge_checks(
    method: str, parameters: dict[str, float], fits: bool
) -> None:
    with pytest.raises(CheckpointError) as refused:  # the models are missing, too
        make_plan(
            [(Path("absent"), 1.0)],
            method=method,
            parameters=parameters,
            base=Path("absent"),
            dtype=None,
            max_shard_bytes=1e9,
            seed=0,
        )
    assert ("of the elements" in str(refused.value)) != fits


def test_the_choices_of_upcycle_and_generate_are_those_that_they_know() -> None:
    assert forest.ROUTERS == routers.ROUTERS
    assert list(generate.METHODS) == list(request.METHODS)
    assert generate.POSTERIORS == request.POSTERIORS
    assert generate.PRIORS == PRIORS


def help_of(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([*words, "--help"])
    return text.getvalue()


def test_seed_is_accepted_for_random_seed_by_every_verb_that_has_it_and_listed_by_none() -> None:
    for words in (("merge", "OUT", "A"), ("generate", "RUN", "--prompt", "x"), ("ablate", "RUN"), ("mixture", "RUN")):
        for seed in (("--seed", "7"), ("--seed=7",), ("--random-seed", "7")):
            call = parse([*words, *seed])
            assert isinstance(call, Call)
            assert call.arguments["random_seed"] == 7
    assert not any(" --seed" in text for text in help_texts().values())
