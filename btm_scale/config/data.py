"""The sections of a run's YAML that say where text lies and how it becomes tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from btm_scale.config.changes import MayChange
from btm_scale.config.section import Bytes, Section


class TokenizerConfig(Section):
    """A tokenizer to train (sentencepiece BPE), or the directory of an existing one."""

    vocab_size: int = Field(default=4096, ge=320, description="tokens; bytes and controls take 259 of them")
    sample_bytes: Bytes = Field(
        default=16_000_000, description="text to train on, such as 16MB; shared evenly by the domains"
    )
    path: Path | None = None


class SplitUnit(Section):
    """Documents whose `field` agrees (up to the text `until`, where given) stay in one split."""

    field: str
    until: str | None = None


class DomainConfig(Section):
    """Where a domain's text lies and how it is read."""

    text: tuple[str, ...] = Field(min_length=1, description="paths or globs, relative to text_root")
    field: str = Field(default="text", description="the field of a .jsonl or .parquet row that holds the text")
    split_by: Literal["document", "file"] | SplitUnit = "document"
    weight: float = Field(default=1.0, gt=0, description="share in the data of seed and dense, relative to others")

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return value | {"text": (value["text"],)}
        return value


class DataConfig(Section):
    """How text becomes token files."""

    dev: float = Field(default=0.05, gt=0, lt=0.5, description="share of the documents kept for choosing")
    test: float = Field(default=0.05, gt=0, lt=0.5, description="share of the documents kept for the result")
    on_bad_line: Literal["error", "skip"] = "error"
    separate_documents: bool = Field(
        default=False, description="in training, a token sees only those of its own document"
    )
    workers: MayChange[int] = Field(default_factory=lambda: len(os.sched_getaffinity(0)), gt=0)
