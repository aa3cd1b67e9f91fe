from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from btm_scale.model.families import READABLE
from btm_scale.model.shape import ModelShape

SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "ffn": 24, "positions": 16}


def shape(**changes: Any) -> ModelShape:
    return ModelShape(**SIZES | {"vocabulary": 50} | changes)


def test_an_unknown_family_is_rejected_with_a_suggestion_and_all_choices() -> None:
    with pytest.raises(
        ValidationError, match=r"Unknown model family 'qwen'\. Did you mean 'qwen[23]'\? Choose one of llama, m"
    ):
        shape(family="qwen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"family": "qwen3", "window": 8},
            "qwen3 family has no window. Leave window out, or use the mistral family",
        ),
        ({"family": "gpt2", "head_size": 12}, "The gpt2 family has heads of size hidden / heads"),
        ({"family": "gpt2", "kv_heads": 2}, "The gpt2 family has no grouped-query attention"),
        ({"family": "gpt2", "tied": False}, "The gpt2 family ties its embeddings"),
        ({"family": "mixtral", "experts": 2, "top_k": 3}, "Each token is computed by 3 of 2 experts"),
        ({"family": "mixtral"}, "Each token is computed by 0 of 0 experts"),
        ({"family": "mixtral", "experts": 100_000, "top_k": 1, "layers": 11}, "more than 1000000 MLPs"),
        ({"experts": 2, "top_k": 1}, "The llama family has no experts in its layers"),
        ({"heads": 32, "kv_heads": 32}, "The head size is 1. Rotary positions need an even one"),
    ],
)
def test_settings_that_a_family_lacks_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shape(**changes)


def test_learned_positions_add_parameters_but_no_flops() -> None:
    short, long = (shape(family="gpt2", positions=positions) for positions in (16, 32))
    assert long.parameters == short.parameters + 16 * 32
    assert long.flops_per_token(16) == short.flops_per_token(16)


def test_only_the_active_experts_of_a_mixture_cost_flops() -> None:
    dense = shape(tied=False)
    mixture = dense.mixture(experts=5, top_k=2)
    mlp, router = 3 * 32 * 24, 5 * 32
    assert mixture.parameters == dense.parameters + 2 * (4 * mlp + router)
    assert mixture.active_parameters == dense.parameters + 2 * (mlp + router)
    more = mixture.flops_per_token(16) - dense.flops_per_token(16)
    assert more == 6 * (mixture.active_parameters - dense.parameters)


def test_the_shared_expert_of_a_mixture_computes_every_token() -> None:
    dense = shape(family="qwen2", tied=False)
    mixture = dense.mixture(experts=5, top_k=2, shared_expert=True)
    mlp, router, gate = 3 * 32 * 24, 5 * 32, 32
    assert (mixture.family, mixture.shared_ffn) == ("qwen2_moe", 24)
    assert mixture.parameters == dense.parameters + 2 * (5 * mlp + router + gate)
    assert mixture.active_parameters == dense.parameters + 2 * (2 * mlp + router + gate)
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has none"):
        shape(family="qwen3").mixture(experts=5, top_k=2, shared_expert=True)
    with pytest.raises(ValueError, match="a window of 4 have no mixture-of-experts class with a shared expert"):
        shape(family="mistral", window=4).mixture(experts=5, top_k=2, shared_expert=True)


def test_every_family_has_its_transformers_name() -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    for name, family in READABLE.items():
        assert name == family.name
        assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]].__name__ == family.architecture


def test_importing_the_shape_does_not_import_torch() -> None:
    code = "import sys, btm_scale.model.shape; print(*{'torch', 'numpy', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
