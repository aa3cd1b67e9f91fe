"""The sections of a run's YAML on data: where the text is and how it is tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from btm_scale.config.changes import MayChange
from btm_scale.config.section import Bytes, Section

ChatShape = Literal["messages", "sharegpt", "prompt_completion"]
CHAT_FIELDS: dict[ChatShape, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
Format = Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "webdataset", "text"]


def _field_names(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError(f"must be the name of a field, or a list of names, and is {value!r:.100}")


# A name, or several. Not validated as a union, whose errors would have the types in their paths.
FieldNames = Annotated[str | tuple[str, ...], PlainValidator(_field_names)]


class TokenizerConfig(Section):
    """A tokenizer to train (sentencepiece BPE), or the directory of an existing one."""

    vocab_size: int = Field(
        default=4096, ge=320, lt=1 << 31, description="tokens, including 256 bytes and 3 control tokens"
    )
    sample_bytes: Bytes = Field(
        default=16_000_000, description="text to train on, such as 16MB, split evenly over the domains"
    )
    path: Path | None = Field(default=None, description="directory of an existing tokenizer; none is trained then")
    bos: bool = Field(
        default=False, description="begin each document with the BOS token, which many pretrained models expect"
    )


class SplitUnit(Section):
    """Documents with the same `field` (up to the text `until`, if given) stay in one split."""

    field: str = Field(description="field of a row, or the path of a nested one: `meta.source`")
    until: str | None = Field(default=None, description="compare only the part of the field before this text")


class FilterConfig(Section):
    """A condition that a row must meet to be a document. Several conditions are a list, and all must hold."""

    field: str = Field(description="field of a row, or the path of a nested one: `meta.quality`")
    min: float | None = Field(default=None, description="keep rows whose number is at least this")
    max: float | None = Field(default=None, description="keep rows whose number is at most this")
    one_of: tuple[str, ...] | None = Field(default=None, description="keep rows whose value is one of these texts")

    @model_validator(mode="after")
    def _has_a_condition(self) -> FilterConfig:
        if self.min is None and self.max is None and self.one_of is None:
            raise ValueError("has no condition. A filter needs min, max or one_of: add one, or remove the filter.")
        return self


class DomainConfig(Section):
    """Where a domain's text is and how it is read."""

    text: tuple[str, ...] = Field(
        default=(),
        description="files, globs or `save_to_disk` folders, relative to text_root; `hf://` names in the local cache; "
        "s3://, gs:// and https:// with fsspec",
    )
    token_files: tuple[str, ...] = Field(
        default=(),
        description="instead of text: prefixes of token files that exist already (PREFIX.bin and PREFIX.idx of "
        "Megatron-core, GPT-NeoX or NeMo), made with the tokenizer in tokenizer.path",
    )
    format: Format = Field(
        default="auto", description="how files are read; auto: each as its first bytes show, whatever its name"
    )
    field: FieldNames = Field(
        default="text",
        description="field of a row with the text, the path of a nested one, or a list to join; default with "
        "`chat`: messages (messages), conversations (sharegpt), prompt and completion (prompt_completion)",
    )
    chat: ChatShape | None = Field(
        default=None,
        description="read rows as conversations: a list of `role` and `content` (messages), a list of `from` and "
        "`value` (sharegpt), or a prompt and a completion; only answers are trained on and scored",
    )
    loss: Literal["all", "last"] = Field(
        default="all", description="with `chat`: train on all answers of a conversation, or only on the last"
    )
    template: str | None = Field(
        default=None,
        description="with `chat`: the name of one of the tokenizer's chat templates, or a .jinja file relative to "
        "text_root; default: the tokenizer's default template",
    )
    filter: tuple[FilterConfig, ...] = Field(default=(), description="conditions that a row must meet")
    passages: Bytes | None = Field(
        default=None, description="cut plain text into documents of about this size, such as 10KB; default: 4 MiB"
    )
    max_bytes: Bytes | None = Field(
        default=None, description="read about this much text, from the beginning of each file; default: all"
    )
    split_by: Literal["document", "file", "position"] | SplitUnit = Field(
        default="document",
        description="what is kept in one split: a document, a file, all rows with the same field, "
        "or (position) the end of the text as dev and test",
    )
    weight: float = Field(
        default=1.0, gt=0, description="sampling weight in the data of seed and dense, relative to the other domains"
    )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row whose text is joined, or that have its conversation."""
        if self.chat is not None and self.field == "text":
            return CHAT_FIELDS[self.chat]
        return (self.field,) if isinstance(self.field, str) else self.field

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        for name in ("text", "token_files"):
            if isinstance(value, dict) and isinstance(value.get(name), str):
                value = value | {name: (value[name],)}
        if isinstance(value, dict) and isinstance(value.get("filter"), dict):
            value = value | {"filter": (value["filter"],)}
        return value

    @model_validator(mode="after")
    def _has_one_source(self) -> DomainConfig:
        if bool(self.text) == bool(self.token_files):
            has = "both text and token_files" if self.text else "neither text nor token_files"
            raise ValueError(f"has {has}. A domain has one source: give `text`, or the prefixes of `token_files`.")
        if self.token_files:
            of_text = ("format", "field", "filter", "passages", "max_bytes", "chat")
            fields = type(self).model_fields
            wrong = [name for name in of_text if getattr(self, name) != fields[name].default]
            wrong += ["split_by"] if self.split_by not in ("document", "position") else []
            if wrong:
                raise ValueError(
                    f"has token_files and {' and '.join(wrong)}. That applies to text only: remove it, or give `text`."
                )
        self._require_readable_chats()
        return self

    def _require_readable_chats(self) -> None:
        if self.chat is None:
            given = {"loss": self.loss != "all", "template": self.template is not None}
            if wrong := [name for name, is_given in given.items() if is_given]:
                raise ValueError(
                    f"has {' and '.join(wrong)} and no `chat`. Only conversations have that: remove it, or set `chat` "
                    "to the format of the rows."
                )
            return
        if self.format == "text" or self.passages is not None or self.split_by == "position":
            raise ValueError(
                "has `chat` and a setting of plain text. Conversations are rows, and no split begins inside one: "
                "remove `format: text`, `passages` and `split_by: position`."
            )
        usual = CHAT_FIELDS[self.chat]
        if len(self.fields) != len(usual):
            raise ValueError(
                f"names {len(self.fields)} fields for `chat: {self.chat}`, which has {len(usual)}. Correct `field`, or "
                f"remove it to read {' and '.join(usual)}."
            )


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
    restart_positions: bool = Field(
        default=False, description="with `separate_documents`, learned positions begin anew with each document"
    )
    workers: MayChange[Annotated[int, Field(gt=0)] | None] = Field(
        default=None, description="processes that tokenize; default: one per core of the machine that prepares"
    )

    @model_validator(mode="after")
    def _restarts_separate_documents(self) -> DataConfig:
        if self.restart_positions and not self.separate_documents:
            raise ValueError(
                "has `restart_positions` without `separate_documents`. Tokens that attend to other documents need "
                "positions in the sequence: set separate_documents to true too, or remove restart_positions."
            )
        return self
