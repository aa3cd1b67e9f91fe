"""GPT-2, the family of the BTM paper: layer norm, learned positions, GELU, and biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from btm_scale.model.families.family import Config, Entry, Family

if TYPE_CHECKING:
    from btm_scale.model.shape import ModelShape


def from_config(config: Config) -> dict[str, Any]:
    """Return the fields of a shape."""
    return {
        "layers": config["n_layer"],
        "hidden": config["n_embd"],
        "heads": config["n_head"],
        "kv_heads": config["n_head"],
        "ffn": config.get("n_inner") or 4 * config["n_embd"],
        "positions": config["n_positions"],
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", True),
        "norm_epsilon": config["layer_norm_epsilon"],
    }


def to_config(shape: ModelShape) -> dict[str, Any]:
    """Return the sizes in config.json, and zero dropout."""
    return {
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "n_positions": shape.positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def unsupported(config: Config) -> dict[str, bool]:
    """Return the settings that are not implemented, and whether the config uses them."""
    activation = config.get("activation_function", "gelu_new")
    return {
        f"activation {activation}": activation not in ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
        "unscaled attention": not config.get("scale_attn_weights", True),
    }


def tensors(shape: ModelShape) -> Iterator[Entry]:
    """Yield every tensor, in layer order."""
    # Hugging Face's GPT-2 stores matrices as [in, out].
    yield Entry("embedding.word_embeddings.weight", ("transformer.wte.weight",), "vocabulary", 0)
    yield Entry("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        for norm, name in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            for part in ("weight", "bias"):
                yield Entry(f"{ours}{norm}.{part}", (f"{theirs}{name}.{part}",))
        fused = ours + "self_attention.linear_qkv."
        yield Entry(fused + "weight", (theirs + "attn.c_attn.weight",), "query_key_value_fused", 0)
        yield Entry(fused + "bias", (theirs + "attn.c_attn.bias",), "query_key_value_fused", 0)
        out = ours + "self_attention.linear_proj."
        yield Entry(out + "weight", (theirs + "attn.c_proj.weight",), "transposed", 1)
        yield Entry(out + "bias", (theirs + "attn.c_proj.bias",))
        yield Entry(ours + "mlp.linear_fc1.weight", (theirs + "mlp.c_fc.weight",), "transposed", 0)
        yield Entry(ours + "mlp.linear_fc1.bias", (theirs + "mlp.c_fc.bias",), cut=0)
        yield Entry(ours + "mlp.linear_fc2.weight", (theirs + "mlp.c_proj.weight",), "transposed", 1)
        yield Entry(ours + "mlp.linear_fc2.bias", (theirs + "mlp.c_proj.bias",))
    for part in ("weight", "bias"):
        yield Entry(f"decoder.final_layernorm.{part}", (f"transformer.ln_f.{part}",))


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    from_config=from_config,
    to_config=to_config,
    tensors=tensors,
    unsupported=unsupported,
    rotary=False,
    rms_norm=False,
    gated=False,
    linear_bias=True,
    query_key_value_bias=True,
    grouped=False,
    always_tied=True,
    tied_by_default=True,
)
