from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from btm_scale.model.families import FAMILIES
from btm_scale.model.shape import ModelShape

SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "ffn": 24, "positions": 16}


def shape(**changes: Any) -> ModelShape:
    return ModelShape(**SIZES | {"vocabulary": 50} | changes)


def test_an_unknown_family_is_refused_with_the_nearest_one_and_all_choices() -> None:
    with pytest.raises(
        ValidationError, match=r"no model family is called 'qwen'; did you mean 'qwen[23]'\? Choose llama, m"
    ):
        shape(family="qwen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "qwen3", "window": 8}, "the qwen3 family has no window; leave it out, or use the mistral family"),
        ({"family": "gpt2", "head_size": 12}, "the gpt2 family has heads of size hidden / heads"),
        ({"family": "gpt2", "kv_heads": 2}, "the gpt2 family has no grouped heads"),
        ({"family": "gpt2", "tied": False}, "the gpt2 family ties its embeddings"),
        ({"heads": 32, "kv_heads": 32}, "rotary positions need an even head size, not 1"),
    ],
)
def test_what_a_family_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shape(**changes)


def test_learned_positions_take_no_part_in_the_multiplications_of_a_token() -> None:
    short, long = (shape(family="gpt2", positions=positions) for positions in (16, 32))
    assert long.parameters == short.parameters + 16 * 32
    assert long.flops_per_token(16) == short.flops_per_token(16)


def test_every_family_is_registered_under_the_name_that_transformers_has_for_it() -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    for name, family in FAMILIES.items():
        assert name == family.name
        assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]].__name__ == family.architecture


def test_a_shape_is_known_without_torch() -> None:
    code = "import sys, btm_scale.model.shape; print(*{'torch', 'numpy', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
