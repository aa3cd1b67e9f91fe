"""Mixture-of-experts families: every MLP of Llama's layers becomes a router and several MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from btm_scale.model.families import llama
from btm_scale.model.families.family import Config, Entry
from btm_scale.model.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

if TYPE_CHECKING:
    from btm_scale.model.shape import ModelShape

# The defaults of transformers.
_MIXTRAL_EPSILON = 1e-5
_MIXTRAL_THETA = 1e6


def _mixtral_from_config(config: Config) -> dict[str, Any]:
    defaults = {"rms_norm_eps": _MIXTRAL_EPSILON, "rope_theta": _MIXTRAL_THETA, **config}
    return llama.from_config(defaults) | {
        "window": config.get("sliding_window"),
        "experts": config["num_local_experts"],
        "top_k": config["num_experts_per_tok"],
    }


def _mixtral_to_config(shape: ModelShape) -> dict[str, Any]:
    return llama.to_config(shape) | {
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "sliding_window": shape.window,
    }


def _qwen3_moe_from_config(config: Config) -> dict[str, Any]:
    return QWEN3.from_config({**config, "intermediate_size": config["moe_intermediate_size"]}) | {
        "experts": config.get("num_experts") or config["num_local_experts"],
        "top_k": config["num_experts_per_tok"],
    }


def _qwen3_moe_to_config(shape: ModelShape) -> dict[str, Any]:
    return QWEN3.to_config(shape) | _qwen_experts(shape)


def _qwen2_moe_from_config(config: Config) -> dict[str, Any]:
    return QWEN2.from_config({**config, "intermediate_size": config["moe_intermediate_size"]}) | {
        "experts": config.get("num_experts") or config["num_local_experts"],
        "top_k": config["num_experts_per_tok"],
        "shared_ffn": config["shared_expert_intermediate_size"],
    }


def _qwen2_moe_to_config(shape: ModelShape) -> dict[str, Any]:
    return QWEN2.to_config(shape) | _qwen_experts(shape) | {"shared_expert_intermediate_size": shape.shared_ffn}


def _qwen_experts(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.ffn,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe_unsupported(config: Config) -> dict[str, bool]:
    return _qwen3_moe_unsupported(config) | {"no biases (qkv_bias)": not config.get("qkv_bias", True)}


def _qwen3_moe_unsupported(config: Config) -> dict[str, bool]:
    dense = config.get("decoder_sparse_step", 1) != 1 or bool(config.get("mlp_only_layers"))
    return llama.unsupported(config) | {
        "layers without experts": dense,
        "router weights that do not sum to 1 (norm_topk_prob)": not config.get("norm_topk_prob", False),
    }


def _experts(shape: ModelShape, ours: str, block: str, names: tuple[str, str, str]) -> Iterator[Entry]:
    """Yield the tensors of a layer's router and experts; `names` are those of the gate, up and down matrices."""
    yield Entry(ours + "mlp.router.weight", (block + "gate.weight",))
    for j in range(shape.experts):
        mine = f"{ours}mlp.experts.local_experts.{j}."
        gate, up, down = (f"{block}experts.{j}.{name}.weight" for name in names)
        yield Entry(mine + "linear_fc1.weight", (gate, up), "gate_up", 0)
        yield Entry(mine + "linear_fc2.weight", (down,), cut=1)


def _mixtral_mlp(shape: ModelShape, ours: str, theirs: str) -> Iterator[Entry]:
    yield from _experts(shape, ours, theirs + "block_sparse_moe.", ("w1", "w3", "w2"))


def _qwen3_moe_mlp(shape: ModelShape, ours: str, theirs: str) -> Iterator[Entry]:
    yield from _experts(shape, ours, theirs + "mlp.", ("gate_proj", "up_proj", "down_proj"))


def _qwen2_moe_mlp(shape: ModelShape, ours: str, theirs: str) -> Iterator[Entry]:
    yield from _experts(shape, ours, theirs + "mlp.", ("gate_proj", "up_proj", "down_proj"))
    mine, block = ours + "mlp.shared_experts.", theirs + "mlp.shared_expert"
    gate_and_up = (f"{block}.gate_proj.weight", f"{block}.up_proj.weight")
    yield Entry(mine + "linear_fc1.weight", gate_and_up, "gate_up", 0)
    yield Entry(mine + "linear_fc2.weight", (f"{block}.down_proj.weight",), cut=1)
    yield Entry(mine + "gate_weight", (f"{block}_gate.weight",))


MIXTRAL = replace(  # arXiv 2401.04088
    LLAMA,
    name="mixtral",
    architecture="MixtralForCausalLM",
    from_config=_mixtral_from_config,
    to_config=_mixtral_to_config,
    tensors=lambda shape: llama.tensors(shape, _mixtral_mlp),
    windowed=True,
    mixture=True,
)
QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    from_config=_qwen3_moe_from_config,
    to_config=_qwen3_moe_to_config,
    tensors=lambda shape: llama.tensors(shape, _qwen3_moe_mlp),
    unsupported=_qwen3_moe_unsupported,
    mixture=True,
)
QWEN2_MOE = replace(  # arXiv 2407.10671
    QWEN2,
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    from_config=_qwen2_moe_from_config,
    to_config=_qwen2_moe_to_config,
    tensors=lambda shape: llama.tensors(shape, _qwen2_moe_mlp),
    unsupported=_qwen2_moe_unsupported,
    mixture=True,
    shared_expert=True,
)
# The family of the mixture whose experts are a family's MLPs, with the same attention and norms.
MIXTURE_OF = {LLAMA.name: MIXTRAL, MISTRAL.name: MIXTRAL, QWEN3.name: QWEN3_MOE}
# The same with a shared expert. Its biases are zero for a family without.
SHARED_MIXTURE_OF = {LLAMA.name: QWEN2_MOE, MISTRAL.name: QWEN2_MOE, QWEN2.name: QWEN2_MOE}
