from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Warm

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, ForestError
from btm_scale.evaluate.average_weights import WEIGHTS
from btm_scale.forest.membership import add_expert
from btm_scale.forest.methods import AVERAGES, KINDS, METHODS, RESERVED, kind, label, meaning
from btm_scale.forest.open import open_config, open_folder
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir

DOCS = Path(__file__).parents[2] / "docs"


def config_with(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    write_config(path, tiny_values(folder, **changes))
    return path


def domains(*names: str) -> dict[str, dict[str, str]]:
    return {name: {"text": f"{name}.jsonl"} for name in names}


def test_every_row_has_a_kind_a_label_and_a_meaning_and_matches_only_its_own_names() -> None:
    for row in METHODS:
        assert row.kind in KINDS
        assert row.label
        assert row.meaning.endswith(".")
        for value in ("1", "4"):
            assert [other.name for other in METHODS if other.matches(row.of(value)) is not None] == [row.name]


def test_every_merged_average_has_a_weight_function() -> None:
    assert WEIGHTS.keys() == {name for name, row in AVERAGES.items() if not row.is_expert}


def test_the_docs_name_every_method_and_average() -> None:
    formats, forest = ((DOCS / name).read_text() for name in ("formats.md", "forest.md"))
    for row in METHODS:
        name = row.name.replace("{", "<").replace("}", ">")
        assert f"`{name}`" in formats or name == "ensemble:prefix", name
    assert all(f"- `{name}`:" in forest for name in AVERAGES)


@pytest.mark.parametrize(
    ("method", "its_kind", "its_label"),
    [
        ("dense-2.5x", "baseline", "Dense, 2.5x compute"),
        ("ensemble:top1", "ensemble", "Top 1 expert"),
        ("ensemble:top4", "ensemble", "Top 4 experts"),
        ("ensemble:top2-per-token", "ensemble", "Top 2 at each token"),
        ("ensemble:routed:top3", "ensemble", "Routed, top 3"),
        ("expert:math", "expert", "math"),
        ("average:of-a-newer-version", "average", "average:of-a-newer-version"),
        ("my-own", "other", "my-own"),
    ],
)
def test_a_name_with_a_field_has_a_row_and_an_unknown_one_the_kind_of_its_prefix(
    method: str, its_kind: str, its_label: str
) -> None:
    assert (kind(method), label(method)) == (its_kind, its_label)
    assert bool(meaning(method)) == (its_kind in ("baseline", "ensemble"))


def test_an_unknown_average_is_rejected_with_the_closest_match_and_all_choices(tmp_path: Path) -> None:
    path = config_with(tmp_path, evaluate={"averages": ["unifrom", "argmax", "zzz"]})
    with pytest.raises(ConfigError) as raised:
        open_config(path)
    problems = str(raised.value).splitlines()
    choices = ", ".join(AVERAGES)
    assert problems == [
        f"evaluate.averages: Unknown average 'unifrom'. Did you mean 'uniform'? Choose one of {choices}.",
        f"evaluate.averages: Unknown average 'zzz'. Choose one of {choices}.",
    ]


@pytest.mark.parametrize("verb", [["run", "--dry-run"], ["plan", "--nodes", "1"], ["evaluate"], ["status"]])
def test_every_verb_that_reads_a_config_checks_its_averages(tmp_path: Path, warm: Warm, verb: list[str]) -> None:
    path = config_with(tmp_path, evaluate={"averages": ["unifrom"]})
    name, *options = verb
    done = warm.run(name, path if options else tmp_path, *options)
    assert (done.code, done.stdout) == (2, "")
    assert "Did you mean 'uniform'?" in done.stderr


@pytest.mark.parametrize("section", ["domains", "added_domains", "novel_domains"])
@pytest.mark.parametrize("name", ["moe", "forest", "mixture", "greedy", "ensemble"])
def test_a_new_domain_cannot_have_the_name_of_a_method(tmp_path: Path, section: str, name: str) -> None:
    path = config_with(tmp_path, **{"domains": domains("python"), section: domains(name)})
    with pytest.raises(ConfigError, match=f"^{section}: '{name}' is a reserved name"):
        open_config(path, out=tmp_path / "out")
    with pytest.raises(ConfigError, match=f"^{section}: '{name}' is a reserved name"):
        open_run(RunConfig.load(path), RunDir(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["seed", "dense", "dense-2x", "score", "average", "random"])
def test_a_domain_cannot_have_the_name_of_a_folder_of_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is a reserved name"):
        config_with(tmp_path, domains=domains(name))


def test_an_old_run_keeps_a_name_reserved_later_but_cannot_add_another(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    config_with(folder, domains=domains("moe", "python"))
    assert list(open_folder(folder)[0].domains) == ["moe", "python"]
    config, run = open_config(folder / "run.yaml", out=folder)
    open_run(config, run)
    path = config_with(tmp_path / "new", domains=domains("moe", "python"), added_domains=domains("forest"))
    with pytest.raises(ConfigError) as raised:
        open_config(path, out=folder)
    assert str(raised.value).startswith("added_domains: 'forest' is a reserved name")
    assert "moe" not in str(raised.value)


def test_an_expert_cannot_be_added_under_the_name_of_a_method(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path))
    assert {"moe", "mixture"} <= RESERVED
    with pytest.raises(ForestError, match="'mixture' is a reserved name"):
        add_expert(config, RunDir(tmp_path), tmp_path / "model", "mixture")
