"""The sections of a run's YAML on data: where the text is and how it is tokenized."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from btm_scale.config.changes import MayChange
from btm_scale.config.section import Bytes, Section


class TokenizerConfig(Section):
    """A tokenizer to train (sentencepiece BPE), or the directory of an existing one."""

    vocab_size: int = Field(
        default=4096, ge=320, lt=1 << 31, description="tokens, including 256 bytes and 3 control tokens"
    )
    sample_bytes: Bytes = Field(
        default=16_000_000, description="text to train on, such as 16MB, split evenly over the domains"
    )
    path: Path | None = Field(default=None, description="directory of an existing tokenizer; none is trained then")


class SplitUnit(Section):
    """Documents with the same `field` (up to the text `until`, if given) stay in one split."""

    field: str = Field(description="field of a .jsonl or .parquet row")
    until: str | None = Field(default=None, description="compare only the part of the field before this text")


class DomainConfig(Section):
    """Where a domain's text is and how it is read."""

    text: tuple[str, ...] = Field(min_length=1, description="paths or globs, relative to text_root")
    field: str = Field(default="text", description="the field of a .jsonl or .parquet row with the text")
    split_by: Literal["document", "file"] | SplitUnit = Field(
        default="document", description="what is kept in one split: a document, a file, or all rows with the same field"
    )
    weight: float = Field(
        default=1.0, gt=0, description="sampling weight in the data of seed and dense, relative to the other domains"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return value | {"text": (value["text"],)}
        return value


class DataConfig(Section):
    """How text is split and tokenized."""

    dev: float = Field(default=0.05, gt=0, lt=0.5, description="fraction of documents held out for model selection")
    test: float = Field(
        default=0.05, gt=0, lt=0.5, description="fraction of documents held out for the reported results"
    )
    on_bad_line: Literal["error", "skip"] = Field(
        default="error", description="rows that cannot be read: stop, or count and skip them"
    )
    separate_documents: bool = Field(
        default=False, description="in training, a token attends only to tokens of its own document"
    )
    workers: MayChange[int] = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        gt=0,
        description="processes that tokenize; default: one per core",
    )
