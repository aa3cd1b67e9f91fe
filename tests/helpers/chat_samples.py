"""Chat templates in the style of published ones, a small tokenizer with their special tokens, and conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from btm_scale.data.train_tokenizer import train_tokenizer
from helpers.small_tokenizers import bpe
from helpers.text_samples import prose_texts

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages -%}
{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages if m.role != 'system' %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages if m.role != 'system' -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# The last answer gets an empty thought, the answers before it lose theirs, and tools are called in JSON.
QWEN3 = """{% if tools %}{{ '<|im_start|>system\\ntools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}
{%- for call in m.tool_calls %}{{ '<call>' + call | tojson + '</call>' }}{% endfor %}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# The end of the conversation has a line of its own, with another token.
PHI3 = """{% for m in messages %}{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "qwen3": QWEN3, "phi3": PHI3}
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "phi3": "<|end|>",
}
# The same text as CHATML, with marked answers.
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
_ADDED = (
    *SPECIAL.values(),
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
)


def write_tokenizer(
    directory: Path,
    template: str | None = CHATML,
    eos: str = "</s>",
    *,
    bos: str = "<s>",
    added: Sequence[str] = _ADDED,
) -> Path:
    """Write a tokenizer of bytes, a few merges and special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ the", "i n", "e r", "a n", "o n", "Ġ a", "Ċ Ċ", "e s"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges)]
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(bpe(tokens, merges, added, decoder=decoder)))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    settings |= {"chat_template": template} if template is not None else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_sentencepiece(directory: Path, template: str = CHATML) -> Path:
    """Write a sentencepiece model, and a tokenizer.json of the same ids that adds the tokens of turns."""
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(directory, prose_texts(100), vocab_size=400)
    path, settings_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    tokenizer, settings = json.loads(path.read_text()), json.loads(settings_path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    names = ("<|im_start|>", "<|im_end|>")
    tokenizer["added_tokens"] += [{"id": 400 + i, "content": name, **flags} for i, name in enumerate(names)]
    path.write_text(json.dumps(tokenizer))
    added = {str(400 + i): {"content": name, **flags} for i, name in enumerate(names)}
    settings_path.write_text(json.dumps(settings | {"chat_template": template, "added_tokens_decoder": added}))
    return directory


def turns(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Return messages of a user and an assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def weather_call(arguments: Any) -> list[dict[str, Any]]:
    """Return messages with a call of a tool, its result and an answer."""
    call = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "18 C", "tool_call_id": "call12345", "name": "weather"}
    return [*turns("weather in Rom?"), asked, result, *turns("", "It is mild.")[1:]]


def conversations(count: int, skip: int = 0) -> list[list[dict[str, Any]]]:
    """Return conversations of one to three exchanges, with real sentences."""
    texts = [text[:25] for text in prose_texts(skip + count + 6)[skip:]]
    return [turns(*(texts[i + j] for j in range(2 * (1 + i % 3)))) for i in range(count)]


def write_chats(path: Path, chats: Iterable[Any], shape: str = "messages") -> Path:
    """Write one conversation per line, in one of the shapes."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows: list[dict[str, Any]] = []
    for chat in chats:
        if shape == "sharegpt":
            rows.append({"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]})
        elif shape == "prompt_completion":
            rows.append({"prompt": chat[:-1], "completion": chat[-1:]})
        else:
            rows.append({"messages": chat})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
