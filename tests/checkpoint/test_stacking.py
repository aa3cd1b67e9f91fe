"""What the config.json of stacked layers says of single layers."""

from __future__ import annotations

from typing import Any

import pytest

from btm_scale.checkpoint.merge.stacking import stacked_config

GEMMA2 = {"model_type": "gemma2", "num_hidden_layers": 4}  # each second layer has a sliding window, unless it says so


def stacked(config: dict[str, Any], *numbers: int) -> dict[str, Any]:
    result, problems = stacked_config(config, [(config, number) for number in numbers])
    assert problems == []
    return result


def test_kinds_that_a_family_derives_from_the_number_of_a_layer_are_written_out() -> None:
    assert "layer_types" not in stacked(GEMMA2, 0, 1, 2, 1)
    sliding, full = "sliding_attention", "full_attention"
    assert stacked(GEMMA2, 0, 2, 1, 3, 3)["layer_types"] == [sliding, sliding, full, full, full]


def test_lists_with_an_item_per_layer_are_stacked() -> None:
    config = {"model_type": "own", "n_layers": 3, "no_rope_layers": [1, 0, 1], "eos_token_id": [7, 8, 9]}
    assert stacked(config, 1, 1) == config | {"n_layers": 2, "no_rope_layers": [0, 0]}


def test_lists_of_numbers_of_layers_are_numbered_anew() -> None:
    assert stacked({"model_type": "own", "n_layer": 4, "mlp_only_layers": [1, 3]}, 3, 0, 1)["mlp_only_layers"] == [0, 2]


def test_layers_of_a_nested_config_are_counted_there() -> None:
    config = {"model_type": "own", "text_config": {"num_hidden_layers": 2, "kinds": ["a", "b"]}}
    assert stacked(config, 1)["text_config"] == {"num_hidden_layers": 1, "kinds": ["b"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "num_layers": 2, "is_encoder_decoder": True}, "not encoder-decoders"),
        ({"model_type": "own", "depth": 2}, "does not have the number of layers"),
        ({"model_type": "own", "num_hidden_layers": 2, "num_kv_shared_layers": 1}, "num_kv_shared_layers is 1"),
    ],
)
def test_what_a_config_cannot_say_of_stacked_layers_is_a_problem(config: dict[str, Any], message: str) -> None:
    (problem,) = stacked_config(config, [(config, 1), (config, 0)])[1]
    assert message in problem


def test_a_list_that_only_one_model_has_is_a_problem() -> None:
    one, other = ({"model_type": "own", "n_layer": 2} | more for more in ({"kinds": ["a", "b"]}, {}))
    (problem,) = stacked_config(one, [(one, 0), (other, 1)])[1]
    assert "`kinds` lists only some layers" in problem
