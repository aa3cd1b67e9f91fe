"""Conversations as prompts of `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.chat_samples import CHATML, turns, write_chats, write_tokenizer
from helpers.text_samples import MakeConfig

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import UserError
from btm_scale.generate.chats import chat_prompts
from btm_scale.run_dir import RunDir

DOMAIN = {"text": "c.jsonl", "chat": "messages"}


def test_a_prompt_ends_where_the_answer_begins_and_the_answer_with_its_turn(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The template is the one that a domain names, because the tokenizer has none."""
    run = RunDir(tmp_path / "run")
    write_tokenizer(run.tokenizer, None)
    (tmp_path / "own.jinja").write_text(CHATML)
    config = make_config(tmp_path, {"a": DOMAIN | {"template": "own.jinja"}})
    path = write_chats(tmp_path / "chat.jsonl", [turns("one"), turns("two", "yes", "three")])
    prompts = chat_prompts(config, run, path)
    assert prompts.texts[0] == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.stop == ("<|im_end|>",)
    tokenizer = Tokenizer.load(run.tokenizer)
    assert [tokenizer.decode(ids) for ids in prompts.ids] == prompts.texts
    assert len(prompts.ids[0]) < len(tokenizer.encode(prompts.texts[0])), "special tokens are special"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not valid JSON"),
        ('{"text": "a"}', r"line 2: it has neither `messages` nor `conversations`"),
        ('[{"role": "pirate"}]', r"line 2: message 1 has the role 'pirate'"),
        ('[{"role": "assistant", "content": "a"}]', r"line 2: it ends with an answer"),
    ],
)
def test_a_line_without_a_question_is_named(line: str, message: str, make_config: MakeConfig, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_tokenizer(run.tokenizer)
    path = write_chats(tmp_path / "chat.jsonl", [turns("one")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        chat_prompts(make_config(tmp_path, {"a": DOMAIN}), run, path)


def test_a_run_without_a_template_and_an_empty_file_are_reported(make_config: MakeConfig, tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), make_config(tmp_path, {"a": DOMAIN})
    write_tokenizer(run.tokenizer, None)
    path = write_chats(tmp_path / "chat.jsonl", [turns("one")])
    with pytest.raises(UserError, match="has no chat template, and no domain of the run names one"):
        chat_prompts(config, run, path)
    write_tokenizer(run.tokenizer)
    with pytest.raises(UserError, match="Cannot read conversations from"):
        chat_prompts(config, run, tmp_path / "absent.jsonl")
