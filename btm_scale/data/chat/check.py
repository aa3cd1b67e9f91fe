"""Check a domain's chat template on its first conversation, before anything is written."""

from __future__ import annotations

from btm_scale.data.chat.process import TooExpensive
from btm_scale.data.chat.rows import turns_of
from btm_scale.data.chat.template import template_of
from btm_scale.data.documents import Document
from btm_scale.data.sources import DomainSource
from btm_scale.errors import DataError


def require_renderable(source: DomainSource, document: Document) -> None:
    """Raise DataError if the domain has no chat template, or one under which a conversation has no answers."""
    process = template_of(source, source.tokenizer).process
    try:
        [result] = process.find_answers([turns_of(document.text)])
    except TooExpensive as error:
        result = str(error)
    finally:
        process.close()
    if isinstance(result, str):
        raise DataError(
            f"Domain '{source.name}': the chat template cannot render {document.origin}: {result}. Every conversation "
            "is rendered by one template: set the domain's `template` to another, or correct the row."
        )
