"""The names and shapes of a model's tensors as its config.json implies them, independent of any reader or converter.

Names are those in files of the Hugging Face Hub, of older and newer versions of transformers. Adding a family is one
function and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Config = Mapping[str, Any]
Tensors = Iterator[tuple[str, Shape]]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")  # ends of their names
HEADS = ("lm_head.weight", "language_model.lm_head.weight")  # which can be tied to the embedding


_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "n_positions",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
    "ffn_dim",
    "word_embed_proj_dim",
)
_MOST_LAYERS = 10_000
_MOST_MODULES = 1_000_000  # layers times experts


@dataclass(frozen=True)
class Expected:
    """The tensors of a model's body, by names below `prefix`, and the full names that its LM head may have."""

    prefix: str  # of the body in the causal LM class
    layers: str  # of the layers, below `prefix`
    body: Mapping[str, Shape]
    heads: Mapping[str, Shape]  # one of them
    tied: bool


@dataclass(frozen=True)
class _Row:
    body: Callable[[Config], Tensors]
    prefix: str = "model."
    layers: str = "layers."
    heads: tuple[str, ...] = ("lm_head.weight",)
    tied: bool = False  # if config.json does not say


def expected_tensors(config: Config) -> Expected | None:
    """Return what a config.json calls for; None for an unknown family, and for a config without its sizes."""
    row = _ROWS.get(str(config.get("model_type")))
    if row is None or not _has_sizes(config):
        return None
    try:
        body = dict(row.body(config))
        rows, width = config["vocab_size"], config.get("hidden_size") or config["n_embd"]
        heads = dict.fromkeys(row.heads, (rows, config.get("word_embed_proj_dim") or width))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return Expected(row.prefix, row.layers, body, heads, ties_embeddings(config))


def ties_embeddings(config: Config) -> bool:
    """Whether a config.json ties the LM head to the embedding, by its setting or by the default of its family.

    A multimodal config has the setting at its top level or in `text_config`.
    """
    tied, row = config.get("tie_word_embeddings"), _ROWS.get(str(config.get("model_type")))
    if tied is not None:
        return bool(tied)
    nested = config.get("text_config")
    return row.tied if row is not None else isinstance(nested, dict) and ties_embeddings(nested)


def _has_sizes(config: Config) -> bool:
    """Whether the sizes that a config gives are numbers of a possible model; a hostile one may name anything."""
    given = {key: config[key] for key in _SIZES if config.get(key) is not None}
    if not all(type(size) is int and 0 <= size < 1 << 31 for size in given.values()):
        return False
    layers = max(given.get("num_hidden_layers", 0), given.get("n_layer", 0))
    experts = max(given.get("num_experts", 0), given.get("num_local_experts", 0), 1)
    return layers <= _MOST_LAYERS and layers * experts <= _MOST_MODULES


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, size: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def _gated(name: str, hidden: int, ffn: int, bias: bool = False) -> Tensors:
    yield from _linear(f"{name}.gate_proj", ffn, hidden, bias)
    yield from _linear(f"{name}.up_proj", ffn, hidden, bias)
    yield from _linear(f"{name}.down_proj", hidden, ffn, bias)


def _llama(
    config: Config,
    *,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    head_norms: str = "",
    biases: str = "config",
    head_size: int | None = None,
    fused: bool = False,
) -> Tensors:
    """Yield the tensors of Llama and its relatives.

    `biases` of the attention are those of the config (`attention_bias`), of query, key and value (`qkv`), or none.
    `head_norms` normalize each head (`head`) or all heads of a layer together (`all`).
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or head_size or hidden // heads
    qkv = biases == "qkv" or (biases == "config" and bool(config.get("attention_bias")))
    out = biases == "config" and qkv
    yield "embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}."
        attention = f"{layer}self_attn."
        if fused:
            yield from _linear(f"{attention}qkv_proj", (heads + 2 * kv_heads) * size, hidden)
        else:
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                yield from _linear(f"{attention}{part}_proj", count * size, hidden, qkv)
        yield from _linear(f"{attention}o_proj", hidden, heads * size, out)
        if head_norms:
            for part, count in (("q", heads), ("k", kv_heads)):
                yield f"{attention}{part}_norm.weight", (size if head_norms == "head" else count * size,)
        for norm in norms:
            yield f"{layer}{norm}.weight", (hidden,)
        yield from _mlp(config, i, f"{layer}mlp", fused)
    yield "norm.weight", (hidden,)


def _mlp(config: Config, layer: int, name: str, fused: bool) -> Tensors:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    family = config["model_type"]
    if family == "mixtral":
        block = name.removesuffix("mlp") + "block_sparse_moe"
        yield from _linear(f"{block}.gate", config["num_local_experts"], hidden)
        for i in range(config["num_local_experts"]):
            yield from _linear(f"{block}.experts.{i}.w1", ffn, hidden)
            yield from _linear(f"{block}.experts.{i}.w2", hidden, ffn)
            yield from _linear(f"{block}.experts.{i}.w3", ffn, hidden)
    elif family in ("qwen2_moe", "qwen3_moe") and _is_sparse(config, layer):
        experts = config.get("num_experts") or config["num_local_experts"]
        yield from _linear(f"{name}.gate", experts, hidden)
        for i in range(experts):
            yield from _gated(f"{name}.experts.{i}", hidden, config["moe_intermediate_size"])
        if family == "qwen2_moe":
            yield from _gated(f"{name}.shared_expert", hidden, config["shared_expert_intermediate_size"])
            yield from _linear(f"{name}.shared_expert_gate", 1, hidden)
    elif fused:
        yield from _linear(f"{name}.gate_up_proj", 2 * ffn, hidden)
        yield from _linear(f"{name}.down_proj", hidden, ffn)
    else:
        yield from _gated(name, hidden, ffn, bool(config.get("mlp_bias")) and family == "llama")


def _is_sparse(config: Config, layer: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _gpt2(config: Config) -> Tensors:
    hidden = config["n_embd"]
    ffn = config.get("n_inner") or 4 * hidden
    yield "wte.weight", (config["vocab_size"], hidden)
    yield "wpe.weight", (config["n_positions"], hidden)
    for i in range(config["n_layer"]):
        layer = f"h.{i}."
        yield from _norm(f"{layer}ln_1", hidden)
        yield from _norm(f"{layer}ln_2", hidden)
        # Its matrices are stored as [in, out].
        for name, columns, rows in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, ffn),
            ("mlp.c_proj", ffn, hidden),
        ):
            yield f"{layer}{name}.weight", (columns, rows)
            yield f"{layer}{name}.bias", (rows,)
    yield from _norm("ln_f", hidden)


def _opt(config: Config) -> Tensors:
    hidden, width = config["hidden_size"], config.get("word_embed_proj_dim") or config["hidden_size"]
    bias, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    yield "decoder.embed_tokens.weight", (config["vocab_size"], width)
    yield "decoder.embed_positions.weight", (config["max_position_embeddings"] + 2, hidden)
    for name, rows, columns in (("project_in", hidden, width), ("project_out", width, hidden)):
        if width != hidden:
            yield f"decoder.{name}.weight", (rows, columns)
    for i in range(config["num_hidden_layers"]):
        layer = f"decoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}self_attn.{part}", hidden, hidden, bias)
        yield from _linear(f"{layer}fc1", config["ffn_dim"], hidden, bias)
        yield from _linear(f"{layer}fc2", hidden, config["ffn_dim"], bias)
        for norm in ("self_attn_layer_norm", "final_layer_norm") if affine else ():
            yield from _norm(f"{layer}{norm}", hidden)
    if affine and config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        yield from _norm("decoder.final_layer_norm", hidden)


def _gpt_neox(config: Config) -> Tensors:
    hidden, ffn, bias = config["hidden_size"], config["intermediate_size"], config.get("attention_bias", True)
    yield "embed_in.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}."
        yield from _norm(f"{layer}input_layernorm", hidden)
        yield from _norm(f"{layer}post_attention_layernorm", hidden)
        yield from _linear(f"{layer}attention.query_key_value", 3 * hidden, hidden, bias)
        yield from _linear(f"{layer}attention.dense", hidden, hidden, bias)
        yield from _linear(f"{layer}mlp.dense_h_to_4h", ffn, hidden, True)
        yield from _linear(f"{layer}mlp.dense_4h_to_h", hidden, ffn, True)
    yield from _norm("final_layer_norm", hidden)


_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_OLMO_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_ROWS: Mapping[str, _Row] = {
    "llama": _Row(_llama),
    "mistral": _Row(lambda config: _llama(config, biases="none")),
    "mixtral": _Row(lambda config: _llama(config, biases="none")),
    "qwen2": _Row(lambda config: _llama(config, biases="qkv")),
    "qwen2_moe": _Row(lambda config: _llama(config, biases="qkv" if config.get("qkv_bias", True) else "none")),
    "qwen3": _Row(lambda config: _llama(config, head_norms="head", head_size=128)),
    "qwen3_moe": _Row(lambda config: _llama(config, head_norms="head")),
    "gemma": _Row(lambda config: _llama(config, head_size=256), tied=True),
    "gemma2": _Row(lambda config: _llama(config, norms=_GEMMA_NORMS, head_size=256), tied=True),
    "gemma3_text": _Row(lambda config: _llama(config, norms=_GEMMA_NORMS, head_norms="head", head_size=256), tied=True),
    "phi3": _Row(lambda config: _llama(config, biases="none", fused=True)),
    "olmo2": _Row(lambda config: _llama(config, norms=_OLMO_NORMS, head_norms="all")),
    "olmo3": _Row(lambda config: _llama(config, norms=_OLMO_NORMS, head_norms="all")),
    "gpt2": _Row(_gpt2, prefix="transformer.", layers="h.", tied=True),
    "opt": _Row(_opt, layers="decoder.layers.", tied=True),
    "gpt_neox": _Row(_gpt_neox, prefix="gpt_neox.", heads=("embed_out.weight", "lm_head.weight")),
}
FAMILIES_WITH_TENSORS = tuple(_ROWS)
