"""Models that mean the same are merged, and a real difference is named with its key and both values."""

from __future__ import annotations

import base64
import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import Save, random_weights
from helpers.small_tokenizers import as_text, bpe
from safetensors.torch import load_file

from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.settings import differing_settings
from btm_scale.errors import CheckpointError

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}
SAME = {
    "rope_theta of transformers 4": (
        LLAMA | {"rope_theta": 5e5, "rope_scaling": None},
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
    ),
    "a kind of rope under its former key": (
        LLAMA | {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "a default that is left out": (LLAMA, LLAMA | {"num_key_value_heads": 4, "head_dim": 8, "rope_theta": 10000.0}),
    "dtype, dropout, ids and cache": (
        LLAMA | {"torch_dtype": "float16", "eos_token_id": 2, "use_cache": True},
        LLAMA | {"dtype": "bfloat16", "eos_token_id": [2, 3], "attention_dropout": 0.1, "transformers_version": "5"},
    ),
    "rotary settings of GPT-NeoX": (
        {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20000},
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 20000.0, "partial_rotary_factor": 0.5}},
    ),
    "an epsilon in float32": (LLAMA | {"rms_norm_eps": 1e-5}, LLAMA | {"rms_norm_eps": 9.999999747378752e-06}),
    "a window that is switched off": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21},
        {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 28},
    ),
    "two names of an activation": (
        {"model_type": "gpt2", "activation_function": "gelu_new"},
        {"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh"},
    ),
    "a nested config": (
        {"model_type": "llava", "text_config": LLAMA | {"rope_theta": 1e4}},
        {"model_type": "llava", "text_config": LLAMA | {"rope_parameters": {"rope_theta": 10000.0}}},
    ),
}
DIFFERENT = {
    "final_logit_softcapping": ({"model_type": "gemma2"}, {"model_type": "gemma2", "final_logit_softcapping": 5.0}),
    "text_config.rope_parameters.rope_theta": (
        {"model_type": "llava", "text_config": LLAMA | {"rope_theta": 1e4}},
        {"model_type": "llava", "text_config": LLAMA | {"rope_parameters": {"rope_theta": 1e6}}},
    ),
    "sliding_window": ({"model_type": "mistral"}, {"model_type": "mistral", "sliding_window": None}),
    "use_parallel_residual": ({"model_type": "gpt_neox"}, {"model_type": "gpt_neox", "use_parallel_residual": False}),
    "logit_scale": ({"model_type": "of_nobody", "logit_scale": 0.5}, {"model_type": "of_nobody", "logit_scale": 0.25}),
    "tie_word_embeddings": (LLAMA, LLAMA | {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize(("ours", "theirs"), SAME.values(), ids=SAME)
def test_configs_that_mean_the_same_do_not_differ(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert differing_settings(ours, theirs) == differing_settings(theirs, ours) == {}


@pytest.mark.parametrize(("key", "pair"), DIFFERENT.items(), ids=DIFFERENT)
def test_a_setting_that_changes_what_weights_mean_differs(key: str, pair: tuple[dict[str, Any], ...]) -> None:
    assert list(differing_settings(*pair)) == [key]


def test_an_enormous_number_of_layers_is_compared_without_a_list_of_them() -> None:
    assert list(differing_settings(LLAMA, LLAMA | {"num_hidden_layers": 1 << 30})) == ["num_hidden_layers"]


def test_a_difference_is_named_with_both_values_and_can_be_allowed(save: Save, tmp_path: Path) -> None:
    models = [
        (save(f"m{i}", random_weights(i), config=LLAMA | {"num_hidden_layers": 1, "rope_theta": 10.0 ** (4 + i)}), 1.0)
        for i in (0, 1)
    ]
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_theta 10000\.0 and 100000\.0.*--allow KEY"):
        merge(tmp_path / "out", models)
    with pytest.raises(CheckpointError, match="rope_theta"):
        merge(tmp_path / "out", models, allow=["rope_thet"])
    merge(tmp_path / "out", models, allow=["rope_theta"])


@pytest.mark.parametrize("prefix", ["transformer.", "model.", "model.language_model."])
def test_a_base_with_the_names_of_the_hub_is_merged(prefix: str, save: Save, tmp_path: Path) -> None:
    def named(seed: int, prefix: str) -> dict[str, torch.Tensor]:
        tensors = {"wte.weight": (5, 4), "h.0.mlp.weight": (4, 4), "norm.weight": (4,)}
        draw = torch.Generator().manual_seed(seed)
        body = {prefix + name: torch.randn(shape, generator=draw) for name, shape in tensors.items()}
        return body | {"lm_head.weight": torch.randn(5, 4, generator=draw)}

    full = save("full", named(0, prefix))
    bare, same = save("bare", named(1, "")), save("same", named(1, prefix))
    for order, name in (([full, bare], "a"), ([bare, full], "b"), ([full, same], "c")):
        merge(tmp_path / name, [(path, 1.0) for path in order])
    assert load_file(tmp_path / "a/model.safetensors").keys() == named(0, prefix).keys()
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    # The same numbers under the full names give the same bytes.
    assert len(set(files)) == 1


def test_causal_masks_of_one_file_are_ignored_and_biases_are_not(save: Save, tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox"}
    weights = {"gpt_neox.layers.0.attention.dense.weight": torch.ones(4, 4)}
    mask = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8).tril().bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }
    plain, masked = save("plain", weights, config=config), save("masked", weights | mask, config=config)
    merge(tmp_path / "out", [(masked, 1), (plain, 1)])
    assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()
    biased = save("biased", weights | {"gpt_neox.layers.0.attention.bias": torch.zeros(4)}, config=config)
    with pytest.raises(CheckpointError, match=r"has no tensor 'gpt_neox\.layers\.0\.attention\.bias'"):
        merge(tmp_path / "other", [(plain, 1), (biased, 1)])


def _sentencepiece(pieces: Mapping[str, float]) -> bytes:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    return b"".join(
        field(1, field(1, piece.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score))
        for piece, score in pieces.items()
    )


def _tekken(tokens: list[bytes]) -> str:
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    settings = {"pattern": "x", "default_vocab_size": len(tokens) + 1, "default_num_special_tokens": 1}
    return json.dumps({"config": settings, "vocab": vocabulary, "special_tokens": [{"rank": 0, "token_str": "<s>"}]})


def _tiktoken(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


PLAIN = bpe(["a", "b", "ab"], ["a b"], ["<s>"])
PAIRS = bpe(["a", "b", "ab"], added=["<s>"])
PAIRS["model"] |= {"merges": [["a", "b"]], "dropout": None, "unk_token": None, "byte_fallback": False}
PAIRS |= {"truncation": {"max_length": 5}, "decoder": {"type": "ByteLevel"}, "post_processor": {"type": "ByteLevel"}}
FILES: dict[str, tuple[str | bytes, str | bytes | None, str | bytes, str]] = {
    # One content, another with the same meaning, a different one, and what the message names.
    "tokenizer.json": (as_text(PLAIN), json.dumps(PAIRS, indent=2), as_text(bpe(["a", "c", "ab"])), "vocabulary"),
    "tekken.json": (_tekken([b"a", b"b"]), _tekken([b"a", b"b"]) + "\n", _tekken([b"b", b"a"]), "vocabulary"),
    "own.tiktoken": (_tiktoken([b"a", b"b"]), _tiktoken([b"a", b"b"]) + b"\n"[:0], _tiktoken([b"b"]), "vocabulary"),
    "tokenizer.model": (_sentencepiece({"a": 1, "b": 2}), None, _sentencepiece({"a": 1, "b": 3}), "scores"),
    "sentencepiece.bpe.model": ("one", None, "another", "content"),
    "merges.txt": ("#version: 0.2\na b\n", "a b", "b a\n", "merges"),
    "vocab.bpe": ("a b", None, "a c", "merges"),
    "vocab.txt": ("a\nb\n", "a\r\nb", "b\na", "vocabulary"),
    "vocab.json": ('{"a": 0, "b": 1}', '{"b":1,"a":0}', '{"a": 1, "b": 0}', "vocabulary"),
}


@pytest.mark.parametrize(("file", "contents"), FILES.items(), ids=FILES)
def test_tokenizers_are_compared_by_what_they_do(
    file: str, contents: tuple[str | bytes, str | bytes | None, str | bytes, str], save: Save, tmp_path: Path
) -> None:
    one, same, other, part = contents
    models = {name: save(name, random_weights(i)) for i, name in enumerate(("one", "same", "other"))}
    for name, content in (("one", one), ("same", one if same is None else same), ("other", other)):
        (models[name] / file).write_bytes(content.encode() if isinstance(content, str) else content)
    merge(tmp_path / "out", [(models["one"], 1), (models["same"], 1)])
    with pytest.raises(CheckpointError, match=rf"{file} differs between .*: {part} .*--allow tokenizer\."):
        merge(tmp_path / "two", [(models["one"], 1), (models["other"], 1)])
    merge(tmp_path / "two", [(models["one"], 1), (models["other"], 1)], allow=["tokenizer"])


@pytest.mark.parametrize("file", ["tekken.json", "own.tiktoken", "vocab.bpe"])
def test_tokenizers_that_cannot_be_parsed_are_compared_as_they_are(file: str, save: Save, tmp_path: Path) -> None:
    contents = {"one": "one", "same": "one", "other": "another"}
    models = {
        name: save(name, random_weights(i), files={file: text}) for i, (name, text) in enumerate(contents.items())
    }
    merge(tmp_path / "out", [(models["one"], 1), (models["same"], 1)])
    with pytest.raises(CheckpointError, match=f"{file} differs between"):
        merge(tmp_path / "not", [(models["one"], 1), (models["other"], 1)])


def test_tokenizers_in_files_of_different_forms_are_compared_by_their_tokens(save: Save, tmp_path: Path) -> None:
    fast = save("fast", random_weights(0), files={"tokenizer.json": as_text(bpe(["a", "b"], added=["<s>"]))})
    same = save("same", random_weights(1), files={"own.tiktoken": _tiktoken([b"a", b"b"]).decode()})
    other = save("other", random_weights(2), files={"own.tiktoken": _tiktoken([b"b", b"a"]).decode()})
    merge(tmp_path / "out", [(fast, 1), (same, 1)])
    with pytest.raises(CheckpointError, match=r"vocabulary \(2 tokens differ; 0 is 'a' and 'b'\)"):
        merge(tmp_path / "two", [(fast, 1), (other, 1)])


def test_another_chat_template_is_a_warning(save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [{"chat_template.jinja": "A"}, {"tokenizer_config.json": '{"chat_template": "A\\n"}'}]
    models = [save(f"m{i}", random_weights(i), files=each) for i, each in enumerate(files)]
    with caplog.at_level(logging.WARNING):
        merge(tmp_path / "a", [(model, 1) for model in models])
        assert "chat_template" not in caplog.text
        other = save("other", random_weights(2), files={"chat_template.jinja": "B"})
        merge(tmp_path / "b", [(models[0], 1), (other, 1)])
    assert "'A'" in caplog.text
    assert "'B'" in caplog.text
