"""Hostile tokenizers, each as the files of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], None]

# Catastrophic, and only for texts that a trial is unlikely to contain.
RARE = "zebra(?:x+x+)+y"
RARE_TEXT = "zebra" + "x" * 40


def plain() -> dict[str, Any]:
    """A tokenizer.json of single characters."""
    pieces = ["<unk>", "</s>", *map(chr, range(32, 127)), "\n"]
    end = {"id": 1, "content": "</s>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))
    return {"version": "1.0", **parts, "added_tokens": [end], "decoder": {"type": "Fuse"}, "model": model}


def write(directory: Path, change: Change = lambda tokenizer: None) -> Path:
    """Write a tokenizer that is `plain` but for a change."""
    tokenizer = plain()
    change(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def _regex(pattern: str, content: str = "z") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _text(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _split(tokenizer: dict[str, Any]) -> None:
    pattern = {"Regex": "(x+x+)+y"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _random(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["aa"] = len(tokenizer["model"]["vocab"])
    tokenizer["model"] |= {"merges": [["a", "a"]], "dropout": 0.5}


def _added(tokenizer: dict[str, Any], token: int) -> None:
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": token, "content": "<x>"})


# By fault: the change, and a part of the message.
HOSTILE: dict[str, tuple[Change, str]] = {
    "splits with a catastrophic pattern": (_split, "retry-limit"),
    "normalizes with a catastrophic pattern": (lambda one: one.update(normalizer=_regex("(a|aa)+$b")), "retry-limit"),
    "never returns": (lambda one: one.update(normalizer=_regex("(?:ж*ж*)y")), "within"),
    "expands a letter to a megabyte": (
        lambda one: one.update(normalizer=_text("e", "e" * 1_000_000)),
        "'e' repeated",
    ),
    "expands a word": (lambda one: one.update(normalizer=_text("whale", "e" * 20_000)), "repeated as"),
    "expands without bound": (
        lambda one: one.update(normalizer={"type": "Sequence", "normalizers": [_text("a", "a" * 100)] * 8}),
        "'a' repeated",
    ),
    "panics when it encodes": (lambda one: one.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "non-zero"),
    "panics when it is loaded": (
        lambda one: one.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAgP8="}),
        "charsmap|to load it",  # a table of 2 GB that is not there
    ),
    "panics for a damaged table": (
        lambda one: one.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
        "out of bounds",
    ),
    "panics when it decodes": (
        lambda one: one.update(decoder={"type": "Strip", "content": "_", "start": 9_999_999_999, "stop": 99}),
        "cannot decode",
    ),
    "has a huge id": (lambda one: one["model"]["vocab"].update(Q=4_294_967_295), "4294967295"),
    "has a negative id": (lambda one: _added(one, -5), "-5"),
    "encodes at random": (_random, "in two ways"),
}
