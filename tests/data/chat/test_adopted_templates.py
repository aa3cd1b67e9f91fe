"""A run's tokenizer has the chat templates of the one that it was copied from, in whatever files they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.chat_samples import write_sentencepiece, write_tokenizer

from btm_scale.config.data import DomainConfig
from btm_scale.data.adopt_tokenizer import adopt_tokenizer
from btm_scale.data.chat.template import ChatTemplate, template_of
from btm_scale.data.sources import resolve_domain
from btm_scale.data.tokenizer_files import SENTENCEPIECE_FILE
from btm_scale.errors import DataError


def write_templates(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("usual")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


@pytest.mark.parametrize("form", ["tokenizer.json", "sentencepiece and tokenizer.json", "sentencepiece"])
def test_templates_in_files_are_adopted(form: str, tmp_path: Path) -> None:
    source, own = tmp_path / "source", tmp_path / "own"
    own.mkdir()
    if form == "tokenizer.json":
        write_tokenizer(source, template=None)
    else:
        write_sentencepiece(source)
    if form == "sentencepiece":
        shutil.copy(source / SENTENCEPIECE_FILE, tmp_path)
        shutil.rmtree(source)
        source.mkdir()
        shutil.move(tmp_path / SENTENCEPIECE_FILE, source)
    write_templates(source)
    adopt_tokenizer(own, source)
    usual = ChatTemplate.of(own)
    assert usual is not None
    assert usual.template == "usual"
    assert ChatTemplate.named("tool_use", own, tmp_path).template == "tools"


def test_an_unknown_template_is_reported_with_its_domain(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    settings = DomainConfig.model_validate({"text": "chats.jsonl", "chat": "messages", "template": "chatml"})
    source = resolve_domain("support", settings, tmp_path)
    with pytest.raises(
        DataError, match=r"`template` of domain 'support': Unknown chat template 'chatml'.*tokenizer\.path"
    ):
        template_of(source, None)
    # The settings of a tokenizer beside the text are not the run's.
    write_tokenizer(tmp_path, {"chatml": "x"})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="support"):
        template_of(source, None)
