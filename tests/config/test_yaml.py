"""The YAML of configs: what is read as what, what is refused, and what survives being written and read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text, load_yaml
from btm_scale.errors import ConfigError

DOMAINS = "domains: {math: {text: m}, code: {text: c}}\n"

# Text that YAML 1.1 or 1.2 takes for something else when it is not quoted, and text with unusual characters.
NASTY = [
    *("on", "yes", "NO", "off", "y", "n", "true", "null", "~", "", "=", "<<", "0o17", "08", "010", "-07", "+12"),
    *("0x1f", "0b11", "1_000", "1e3", "1.5e3", ".5", "+.5", "0.", ".inf", ".NaN", "1:30", "190:20:30.15", "-_"),
    *("2026-11-26", "2001-12-14t21:59:43.10-05:00", "-", "?", "a: b", "#x", "x #y", " x", "x ", "\n", "a\nb\n"),
    *("a\r\nb", "\t", "é😀", "\x85", "\u2028", "\ufeff", "\x07", "!x", "&x", "*x", "%x", "@x", "`x", "'", '"'),
    *("{a}", "[", "a,b", "---", "...", "\\", "word " * 60, "x" * 300, "9" * 5000),
]


def load_text(tmp_path: Path, text: str, name: str = "my.yaml") -> dict[str, Any]:
    path = tmp_path / name
    path.write_text(text)
    return load_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("6e6", 6e6),
        ("+.5", 0.5),
        ("0o17", 15),
        ("010", 10),
        ("0x1f", 31),
        ("6_000_000", 6_000_000),
        ("true", True),
        ("~", None),
        ("1:30", "1:30"),
        ("2026-11-26", "2026-11-26"),
        ("y", "y"),
        ("-_", "-_"),
        ("'yes'", "yes"),
        ("!!str 5", "5"),
    ],
)
def test_an_unquoted_value_is_read_as_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    assert load_text(tmp_path, f"a: {text}\n") == {"a": value}
    assert type(load_text(tmp_path, f"a: {text}\n")["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "boolean"), [("yes", "true"), ("On", "true"), ("NO", "false"), ("off", "false"), ("[1, off]", "false")]
)
def test_yes_and_no_are_refused_with_the_boolean_to_write(tmp_path: Path, text: str, boolean: str) -> None:
    with pytest.raises(ConfigError, match=rf"my\.yaml, line 2: '\w+' is not a boolean in YAML 1\.2\. Write {boolean}"):
        load_text(tmp_path, f"a: 1\nb: {text}\n")
    (tmp_path / "run.yaml").write_text(DOMAINS)
    with pytest.raises(ConfigError, match=f"Write {boolean}, or"):
        RunConfig.load(tmp_path / "run.yaml", (f"baselines.dense={text}",))


def test_a_key_is_the_text_that_was_written(tmp_path: Path) -> None:
    keys = ["on", "1e3", "0o17", "010", "2026-11-26", "true", "null"]
    text = "domains:\n" + "".join(f"  {key}: {{text: x}}\n" for key in keys)
    (tmp_path / "my.yaml").write_text(text)
    assert list(RunConfig.load(tmp_path / "my.yaml").domains) == keys


def test_a_whole_number_with_an_exponent_is_an_integer_in_a_config_and_in_an_override(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"{DOMAINS}budget: {{tokens: 6e6}}\noptimizer: {{lr: 3e-4}}\n")
    config = RunConfig.load(tmp_path / "my.yaml", ("tokenizer.sample_bytes=1e6",))
    assert (config.budget.tokens, config.optimizer.lr, config.tokenizer.sample_bytes) == (6_000_000, 3e-4, 1_000_000)
    assert type(config.budget.tokens) is int
    assert RunConfig.load(tmp_path / "my.yaml", ("budget.tokens=1e6",)).budget.tokens == 1_000_000


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:30]))
@pytest.mark.parametrize("flow", [False, None, True])
def test_any_text_is_read_back_as_it_was_written(tmp_path: Path, text: str, flow: bool | None) -> None:
    values = {"value": text, text: 1, "list": [text], "inner": {text: text}}
    written = dump_text(values, flow=flow)
    assert load_text(tmp_path, written) == values
    assert load_text(tmp_path, written, "run.yaml") == values


def test_any_number_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    numbers = [1e-8, 1e16, 1.5, 1e300, -0.0, 5e-324, 0, -7, 10**20, True, None]
    read = load_text(tmp_path, dump_text({"numbers": numbers}))["numbers"]
    assert read == numbers
    assert list(map(type, read)) == list(map(type, numbers))


def test_a_run_yaml_of_an_earlier_version_keeps_text_that_yaml_1_1_left_unquoted(tmp_path: Path) -> None:
    # As PyYAML wrote it.
    text = (
        "a: 0o17\nb: 08\nc: +.5\nd: 'yes'\ne: '010'\nf: '1:30'\ng: '2026-11-26'\n"
        "h: [1.0e-08, 1.0e+16, 10, true, null]\n"
        "1e3: {08: 1, 'on': 2, '010': 3, 0o17: 4}\n"
    )
    assert load_text(tmp_path, text, "run.yaml") == {
        **{"a": "0o17", "b": "08", "c": "+.5", "d": "yes", "e": "010", "f": "1:30", "g": "2026-11-26"},
        "h": [1e-8, 1e16, 10, True, None],
        "1e3": {"08": 1, "on": 2, "010": 3, "0o17": 4},
    }


def test_a_mapping_may_merge_another_and_replace_some_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "domains:\n  math: &all {text: m, field: body}\n  code: &code {<<: *all, text: c}\n"
        "  law: {<<: *code, weight: 2}\n  art: {<<: [*code, *all], weight: 3}\n"
    )
    domains = RunConfig.load(path).domains
    assert [domain.text for domain in domains.values()] == [("m",), ("c",), ("c",), ("c",)]
    assert [domain.field for domain in domains.values()] == ["body"] * 4
    assert [domain.weight for domain in domains.values()] == [1, 1, 2, 3]


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("domains:\n  math: &all {text: m}\n  code: *all\n")
    domains = RunConfig.load(path, ("domains.math.weight=2",)).domains
    assert [domain.weight for domain in domains.values()] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", r"line 2: duplicate key 'name'\. Keep one\."),
        ("a: &all {text: m}\nb: {<<: *all, weight: 2, weight: 3}\n", "line 2: duplicate key 'weight'"),
        ("domains: &all\n  math: *all\n", r"line 2: recursive alias '\*all'"),
        ("domains: {[a, b]: {text: x}}\n", "line 1: a key is a mapping or a list"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "line 2: unknown tag '.*os.system'"),
        ("a: !!int seven\n", "line 1: unknown tag '.*int'"),
        ("a: *b\n", "line 1: found undefined alias 'b'"),
        ("<<: 5\n", "line 1: .*expected a mapping or list of mappings for merging"),
        ("a: 1\n---\nb: 2\n", "line 2: .*found another document"),
        ("domains: [", "line 1: .*expected the node content"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("domains: {math: {text: a\0b}}\n", "is not valid YAML: .*#x0000"),
        ('name: "\\UFFFFFFFF"\n', "is not valid YAML"),
        ("%YAML 1.9\n---\na: 1\n", "is not valid YAML"),
        ("- a", "is not a mapping of keys to values"),
        ("", "is not a mapping of keys to values"),
    ],
)
def test_yaml_that_is_not_a_config_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"my\.yaml,? {message}"):
        load_text(tmp_path, text)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No config at"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"is a directory\. Give the path of a YAML file\."):
        load_yaml(tmp_path)
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a directory\. Give its run\.yaml, with --out .*, or your own YAML\."):
        load_yaml(tmp_path)
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "my.yaml")


def _nested_aliases(levels: int, repeated: int) -> str:
    lines = ["a0: &a0 {text: x}"]
    lines += [
        f"a{level}: &a{level} {{{', '.join(f'k{key}: *a{level - 1}' for key in range(repeated))}}}"
        for level in range(1, levels)
    ]
    return "\n".join(lines) + "\n"


_NESTED_MERGES = "a0: &a0 {}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}, k{n}: 1}}\n" for n in range(1, 900))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_nested_aliases(20, 10), "more than 200,000 values, aliases expanded"),
        (
            "a0: &a0 {}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}, k{n}: 1}}\n" for n in range(1, 900)),
            "more than 200,000",
        ),
        ("a: " + "[" * 100_000, "nested deeper than 50 levels"),
        ("- " * 100_000, "nested deeper than 50 levels"),
        ("{a: " * 100_000, "nested deeper than 50 levels"),
        ("a: " + "x" * 100_000_000, "is larger than 8 MB"),
    ],
    ids=["aliases", "merges", "brackets", "dashes", "braces", "a long scalar"],
)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=message) as raised:
        load_yaml(tmp_path / "my.yaml")
    assert len(str(raised.value)) < 1000
    assert time.process_time() - started < 5


def test_a_device_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="is larger than 8 MB"):
        load_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(
    "text",
    ["domains: " + "x" * 100_000, DOMAINS + "".join(f"k{n}: 1\n" for n in range(5000)), "random_seed: " + "9" * 5000],
    ids=["a long value", "thousands of unknown keys", "a long number"],
)
def test_a_message_about_a_large_mistake_stays_short(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        RunConfig.load(tmp_path / "my.yaml")
    assert len(str(raised.value)) < 50_000


def test_a_run_yaml_with_64_domains_loads_in_well_under_a_second(tmp_path: Path) -> None:
    domains = {f"domain-{n}": {"text": [f"corpus/{n}/part-{part}.jsonl" for part in range(4)]} for n in range(64)}
    experts = {name: {"layout": {"tensor": 2}, "tokens": 10**9} for name in domains}
    values = {"domains": domains, "experts": experts, "budget": {"tokens": 10**10, "batch_tokens": 2**20}}
    (tmp_path / "my.yaml").write_text(dump_text(values))
    config = RunConfig.load(tmp_path / "my.yaml")
    config.save(tmp_path / "run.yaml")
    started = time.process_time()
    assert RunConfig.load(tmp_path / "run.yaml") == config
    assert time.process_time() - started < 1


def test_no_code_runs_from_a_python_tag(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(ConfigError, match="unknown tag"):
        load_text(tmp_path, f"a: !!python/object/apply:os.mkdir [{os.fspath(marker)}]\n")
    assert not marker.exists()
