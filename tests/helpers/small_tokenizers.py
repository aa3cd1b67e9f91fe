"""Small tokenizer.json files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def bpe(tokens: Sequence[str], merges: Sequence[str] = (), added: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """Return a byte-level BPE tokenizer.json: `tokens` have the first ids, `added` the next."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(tokens) + i, "content": name, **flags, "special": True} for i, name in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": list(merges)},
    } | changes


def as_text(tokenizer: dict[str, Any]) -> str:
    """Return the content of tokenizer.json."""
    return json.dumps(tokenizer)
