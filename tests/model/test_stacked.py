from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.kv_buffers import GrowingLayer, empty_cache
from btm_scale.model.stacked import are_alike, can_stack_model, stack_models, unstack_models

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "tied llama": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "mistral with a window": ("Mistral", SIZES | {"sliding_window": 8}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 8}),
    "olmo2": ("Olmo2", SIZES),
    "gpt_neox": ("GPTNeoX", SIZES),
    "gpt2": ("GPT2", GPT2),
}


def models_of(family: str, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return models with random weights, none of which are zero, whose heads are in float32."""
    name, sizes = FAMILIES[family]
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    found = []
    for seed in range(count):
        config = getattr(transformers, f"{name}Config")(**sizes)
        torch.manual_seed(seed)
        model = classes[type(config)](config).to(dtype)
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
        found.append(Decoder(model).model)
    return found


def bytes_held(models: list[Any]) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


@torch.no_grad()
def logits_of(model: Any, rows: int) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12).remainder(11).repeat(rows, 1)
    positions = torch.arange(12).expand(len(ids), 12)
    return model(input_ids=ids, position_ids=positions).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_predicts_what_its_models_do_and_takes_no_memory_beside_them(family: str) -> None:
    models = models_of(family)
    expected, held = torch.cat([logits_of(model, 1) for model in models]), bytes_held(models)
    assert can_stack_model(models[0])
    assert all(are_alike(models[0], model) for model in models)
    stack = stack_models(models)
    torch.testing.assert_close(logits_of(stack, 3), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([logits_of(model, 1) for model in models]), expected, atol=0, rtol=0)
    assert bytes_held([stack, *models]) == held


def test_unstacked_models_have_their_own_weights_again() -> None:
    models = models_of("tied llama")
    expected, held = logits_of(models[2], 1), bytes_held(models[2:])
    stack_models(models)
    assert bytes_held(models[2:]) > held
    unstack_models(models[2:])
    assert bytes_held(models[2:]) == held
    torch.testing.assert_close(logits_of(models[2], 1), expected, atol=0, rtol=0)


class _Peak(TorchDispatchMode):
    """Records the most bytes that models hold together with a copy of a parameter."""

    def __init__(self, models: list[Any]) -> None:
        super().__init__()
        self._models, self.bytes = models, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.clone.default:
            self.bytes = max(self.bytes, bytes_held(self._models) + result.untyped_storage().nbytes())
        return result


def test_the_stack_of_a_parameter_is_freed_before_the_next_is_copied() -> None:
    models = models_of("llama")
    held, largest = bytes_held(models), max(p.untyped_storage().nbytes() for p in models[0].parameters())
    stack_models(models)
    with _Peak(models) as peak:
        unstack_models(models)
    assert held < peak.bytes <= held + len(models) * largest


def test_models_that_compute_differently_are_not_alike() -> None:
    (first, other), (tied,) = models_of("llama", 2), models_of("tied llama", 1)
    assert are_alike(first, other)
    other.config.rms_norm_eps = 1e-3
    assert not are_alike(first, other)
    assert not are_alike(first, tied)
    assert not are_alike(first, models_of("llama", 1, torch.bfloat16)[0])
    assert not are_alike(first, models_of("qwen2", 1)[0])


def test_a_mixture_of_experts_and_scaled_embeddings_have_no_stacked_form() -> None:
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2))
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES | {"pad_token_id": 0}, head_dim=8))
    assert not can_stack_model(mixtral)
    assert not can_stack_model(gemma)


@torch.no_grad()
def test_a_growing_cache_writes_tokens_in_place_and_equals_one_forward_pass() -> None:
    (model,) = models_of("llama", 1)
    cache = empty_cache(model)
    ids = torch.arange(90).remainder(11)[None]
    steps = [model(input_ids=ids[:, :5], past_key_values=cache).logits[:, -1]]
    (first, _) = cache.layers
    assert isinstance(first, GrowingLayer)
    addresses = set()
    for position in range(5, 90):
        steps.append(model(input_ids=ids[:, position : position + 1], past_key_values=cache).logits[:, -1])
        addresses.add(first.keys.data_ptr())
    assert len(addresses) == 2  # 5 + 64 positions, then more
    torch.testing.assert_close(torch.stack(steps, 1), model(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=1e-5)
