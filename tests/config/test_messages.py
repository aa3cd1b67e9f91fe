"""How mistakes in a config are reported, and how a run without a name is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.errors import ConfigError
from btm_scale.forest.open import open_config

DOMAINS = {"math": {"text": "math.jsonl"}, "code": {"text": ["src/**/*.py"]}}


def load(tmp_path: Path, values: dict[str, Any]) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(dump_text(values))
    return RunConfig.load(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains": {}}, "domains: is empty; give at least one"),
        ({"domains": {"math": {"text": []}}}, "domains.math: has neither text nor token_files"),
        ({"domains": {"math": {"text": [8]}}}, "domains.math.text.0: must be text in quotes and is 8"),
        ({"random_seed": "x"}, "random_seed: must be an integer and is 'x'"),
        ({"random_seed": 1.5}, "random_seed: must be an integer and is 1.5"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: must be a number and is 'fast'"),
        ({"budget": 5}, "budget: must be a section of keys and is 5"),
        ({"budget": None}, "budget: must be a section of keys and is empty"),
        ({"launch": {"deepspeed": {"ports": [1]}}}, "launch.deepspeed.ports.1: missing; the list needs this item"),
        ({"launch": {"deepspeed": {"ports": [1, 2, 3]}}}, "launch.deepspeed.ports: has 3 items; give at most 2"),
        ({"baselines": {"dense": "yes"}}, "baselines.dense: must be true or false, without quotes, and is 'yes'"),
        ({"layout": {"sequence_parallel": 1}}, "layout.sequence_parallel: must be true or false, without quotes, and"),
        ({"model": {"tied": "off"}}, "model.tied: must be true or false, without quotes, and is 'off'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_the_words_of_the_yaml(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {"domains": DOMAINS} | values)
    assert f"  {message}" in str(raised.value)


def test_an_optional_boolean_may_be_empty(tmp_path: Path) -> None:
    sizes = {"family": "llama", "layers": 1, "hidden": 64, "heads": 1, "ffn": 64, "tied": None}
    assert load(tmp_path, {"domains": DOMAINS, "model": sizes}).model.tied is None


def test_a_problem_that_the_seeds_layout_inherits_is_reported_once(tmp_path: Path) -> None:
    values = {"domains": DOMAINS, "model": {"preset": "llama-1m"}, "layout": {"tensor": 3}, "experts": {"math": {}}}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, values)
    assert str(raised.value).count("Cannot shard") == 1
    assert (
        "layout: Cannot shard the model over tensor=3. tensor must divide the attention heads (4), KV heads (4) and "
        "MLP width (352): use 1, 2 or 4."
    ) in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        (
            {"context": 3},
            1536,
            "layout: Cannot share sequences among context=3 ranks. context must divide the attention heads (4): use 1, "
            "2 or 4.",
        ),
        (
            {"tensor": 2, "context": 4},
            1024,
            "context must divide the attention heads (2 on each of 2 tensor ranks): use 1 or 2.",
        ),
        (
            {"context": 4},
            1026,
            "Cannot shard sequences of 1026 tokens over context=4. context must divide sequence_length: use 1028.",
        ),
        (
            {"tensor": 2, "context": 2, "sequence_parallel": True},
            1026,
            "Cannot shard sequences of 1026 tokens over context=2 x tensor=2. With sequence_parallel, context x tensor "
            "must divide sequence_length: use 1028.",
        ),
        (
            {"context": 2, "data": 2, "sync_every": 5},
            1024,
            "layout: Cannot take local steps (sync_every=5) with context=2. Local steps need each sequence on one data "
            "rank: set context to 1, or remove sync_every.",
        ),
        ({"context": 0}, 1024, "layout.context: 0"),
    ],
)
def test_context_ranks_that_cannot_share_a_sequence_are_refused_with_those_that_can(
    layout: dict[str, Any], length: int, message: str, tmp_path: Path
) -> None:
    budget = {"sequence_length": length, "batch_tokens": 16 * length}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {"domains": DOMAINS, "model": {"preset": "llama-1m"}, "layout": layout, "budget": budget})
    assert message in str(raised.value)


@pytest.mark.parametrize(("file", "name"), [("my.yaml", "my"), ("dense.yaml", "run"), ("a b.yaml", "run")])
def test_a_run_without_a_name_is_named_after_its_file_if_that_is_a_valid_name(
    tmp_path: Path, file: str, name: str
) -> None:
    path = tmp_path / file
    path.write_text(dump_text({"domains": DOMAINS}))
    assert RunConfig.load(path).name == name
    assert open_config(path)[1].root.name == name
    assert RunConfig.load(path, ("name=own",)).name == "own"
