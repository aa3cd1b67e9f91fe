"""The record of what a domain's token files were made from, so that they are not used for other text or tokenizers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import ConfigDict, Field

from btm_scale.config.data import DataConfig, DomainConfig
from btm_scale.data.chat.template import template_of
from btm_scale.data.files import SourceFile
from btm_scale.data.sources import DomainSource
from btm_scale.data.token_index import index_problem
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir
from btm_scale.util.records import Part, Record, is_empty

if TYPE_CHECKING:
    from btm_scale.data.splits import Identity


class Source(Part):
    """A text file at the time when it was read."""

    name: str
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, file: SourceFile) -> Source:
        """Describe the file as it is now."""
        status = file.stat()
        return cls(name=file.name, bytes=status.st_size, modified_ns=status.st_mtime_ns)


class SplitCounts(Part):
    """The size of one split: `bytes` of UTF-8 text, and `tokens` including one eos per document."""

    model_config = ConfigDict(frozen=False)  # incremented while encoding

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    trained: int = Field(default=0, exclude_if=is_empty)
    """The number of answer tokens; 0 unless documents are conversations."""
    read: int = Field(default=0, exclude_if=is_empty)
    """The tokens of one pass over packed training conversations, at the sequence length of `prepare`; 0 for others."""

    @property
    def per_pass(self) -> int:
        """The tokens that one pass of training over the split reads."""
        return self.read or self.tokens


class Fingerprint(Record):
    """Everything that determines a domain's token files, and their sizes. Digests are hex."""

    ERROR = DataError
    ABSENT = "{folder} has no token files. Prepare the run first."
    REMEDY = "Delete {folder} and prepare the run again."

    domain: str
    sources: list[Source]
    settings: dict[str, Any]
    tokenizer: str
    dtype: str
    text: str
    splits: dict[str, SplitCounts]
    skipped_lines: int
    duplicates: int
    placement: str = Field(default="", exclude_if=is_empty)
    """How documents were placed in splits if not by the usual hash ranges: by `position`, or by `moved` ranges."""
    skipped: dict[str, str] = Field(default_factory=dict, exclude_if=is_empty)
    """What was skipped of each file that lost something."""

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(counts.tokens for counts in self.splits.values())

    @classmethod
    def of_domain(cls, run: RunDir, domain: str) -> Self:
        """Load the fingerprint of a domain's finished token files. Raises DataError if there are none."""
        return cls.load(run.fingerprint(domain))

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """Convert a file of the first version, in which the schema number had another key."""
        if isinstance(content, dict) and "schema_version" in content:
            return {"schema": content.pop("schema_version"), **content}
        return content

    @property
    def has_chats(self) -> bool:
        """Whether the domain's documents are conversations, with a mask."""
        return "chat" in self.settings

    def require_tokenizer(self, digest: str, run: RunDir) -> None:
        """Raise DataError unless the token files were made with the tokenizer that has this digest."""
        if self.tokenizer != digest:
            raise DataError(
                f"The token files of domain '{self.domain}' were made with another tokenizer (digest "
                f"{self.tokenizer[:12]}) than the one in {run.tokenizer} (digest {digest[:12]}). Restore the "
                f"former tokenizer, or delete {run.domain(self.domain)} and prepare the run again."
            )

    def require_whole(self, run: RunDir) -> None:
        """Raise DataError unless the token file of every split has the recorded size, and an index that fits it."""
        for split, counts in self.splits.items():
            path = run.tokens(self.domain, split).with_suffix(".bin")
            size = path.stat().st_size if path.is_file() else 0
            needed = counts.tokens * np.dtype(self.dtype).itemsize
            if size != needed:
                raise DataError(
                    f"{path} has {size} bytes, but its {counts.tokens} tokens need {needed}: it was damaged after it "
                    f"was written. Copy it again, or delete {run.domain(self.domain)} and prepare the run again."
                )
            mask = run.mask(self.domain, split)
            if self.has_chats and (not mask.is_file() or mask.stat().st_size != counts.tokens):
                raise DataError(
                    f"{mask} does not have a byte for each of the {counts.tokens} tokens: it was damaged after it was "
                    f"written. Copy it again, or delete {run.domain(self.domain)} and prepare the run again."
                )
            if problem := index_problem(run.tokens(self.domain, split)):
                raise DataError(
                    f"{path.with_suffix('.idx')} {problem}: it was damaged after it was written. Copy it again, or "
                    f"delete {run.domain(self.domain)} and prepare the run again."
                )


class TextDigest:
    """A digest of a stream of documents: their texts, split keys and order."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, identity: Identity) -> None:
        """Add the next document."""
        self._total.update(identity.digest + repr(identity.split_key).encode())

    def hexdigest(self) -> str:
        """Return the digest of all documents added so far."""
        return self._total.hexdigest()


def settings_of(source: DomainSource, data: DataConfig) -> dict[str, Any]:
    """Return the settings that determine which documents are in which split."""
    template = {"chat_template": template_of(source, source.tokenizer).digest} if source.settings.chat else {}
    return template | reading_of(source.settings) | data.model_dump(mode="json", include={"dev", "test", "on_bad_line"})


def reading_of(settings: DomainConfig) -> dict[str, Any]:
    """Return the settings that determine the documents of a domain.

    Those that the first version did not have are left out at their defaults, so that its fingerprints stay valid.
    """
    later = {"format", "filter", "passages", "max_bytes", "chat", "loss", "template"}
    return settings.model_dump(mode="json", include={"field", "split_by"}) | settings.model_dump(
        mode="json", include=later, exclude_defaults=True
    )
