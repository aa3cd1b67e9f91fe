"""Real text that comes with every Python."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig

MakeConfig = Callable[..., RunConfig]

CODE = {"text": "code.jsonl", "split_by": {"field": "file", "until": "#"}}
PROSE = {"text": "prose.jsonl"}


def python_texts(count: int, longest: int = 3_000) -> list[str]:
    """Return distinct parts of the standard library's modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(library.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        texts += dict.fromkeys(text[start : start + longest] for start in range(0, len(text), longest))
        if len(texts) >= count:
            break
    return texts[:count]


def prose_texts(count: int) -> list[str]:
    """Return paragraphs of Python's reference."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in sorted(topics) for part in topics[name].split("\n\n") if len(part) > 150]
    return list(dict.fromkeys(paragraphs))[:count]


def write_jsonl(path: Path, texts: Iterable[str], **fields: Callable[[int], Any]) -> Path:
    """Write one object per line, with `text` and the `fields`, which are functions of the line number."""
    rows = [{"text": text} | {name: make(i) for name, make in fields.items()} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
