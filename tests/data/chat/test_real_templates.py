"""Published chat templates: the tokens that are trained on are the assistant's text and the end of its turn."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from helpers.chat_samples import CHATML, turns, weather_call, write_tokenizer
from helpers.cuts import full
from helpers.published_templates import BAR, FAMILIES, Family, marked_names, marked_template, template

from btm_scale.data.chat import encode
from btm_scale.data.chat.answers import Rendering, find_answers
from btm_scale.data.chat.encode import TRAINED, ChatEncoding, EncodedChat, encode_chats, end_rendering
from btm_scale.data.chat.process import ChatProcess
from btm_scale.data.chat.rows import conversation_of
from btm_scale.data.tokenizer import Tokenizer

CHATS = [
    turns("hello", "Good morning."),
    turns("the end", "the", "and then?", "the end", "a", "a"),
    turns("assistant", "assistant\nuser", "model", "Answer7Qn0e", "[INST]", "[/INST] yes"),
    turns("naïve 北京?", "🎉 café", "more", "…", "e\u0301", "e\u0301 \u200b."),
    turns(" q ", "a", "b\n", "```\n{{ messages }}\n{% endfor %}\n```"),
]
SYSTEM = turns("system?", "Yes:\n\n- one\n- two", "more", "No.", system="Answer in lists.")
ODD = turns("spaces", "  before and after \n", "and", "\n\nlines", "again", "\t.\n")
# These render no text unless contents are lists of parts.
VISION = ("idefics3", "llava_next", "smolvlm")


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Any:
    yield
    end_rendering()


class RenderedHere:
    """Renders in this process: these templates are trusted, and a new process for each of them takes seconds."""

    def __init__(self, text: str, special: str) -> None:
        self.text, self.special = text, json.loads(special)

    def find_answers(self, chats: list[Any]) -> list[Rendering]:
        return [find_answers(self.text, chat["messages"], self.special, chat.get("tools")) for chat in chats]


@pytest.fixture
def rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_process", RenderedHere)


def tokenizer_of(family: Family, directory: Path) -> Path:
    added = dict.fromkeys((family.bos, family.eos, family.end, *family.special))
    return write_tokenizer(directory, eos=family.eos, bos=family.bos, added=list(added))


def encoded(
    text: str, tokenizer: Path, bos_and_eos: tuple[str, str], chats: list[Any], loss: Literal["all", "last"] = "all"
) -> list[EncodedChat]:
    special = dict(zip(("bos_token", "eos_token"), bos_and_eos, strict=True))
    encoding = ChatEncoding(text, json.dumps(special), loss, tokenizer)
    conversations = [conversation_of("messages", [chat], None) for chat in chats]
    return encode_chats(encoding, Tokenizer.load(tokenizer), conversations)


def decoded_runs(tokenizer: Path, ids: Any, trained: Any) -> list[str]:
    """The text of each run of tokens that are trained on."""
    where = np.flatnonzero(trained)
    runs = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
    return [Tokenizer.load(tokenizer).decode(np.asarray(ids)[run].tolist()) for run in runs]


def decoded_answers(tokenizer: Path, chat: EncodedChat) -> list[str]:
    assert not chat.problem
    return decoded_runs(tokenizer, chat.ids, chat.mask & TRAINED)


def expected_answers(family: Family, chat: list[dict[str, Any]]) -> list[str]:
    contents = [message["content"] for message in chat if message["role"] == "assistant"]
    texts = [family.before + (text.strip() if family.strips else text) + family.end for text in contents]
    if family.before_last is not None:
        texts[-1] = family.before_last + (contents[-1].lstrip("\n") + family.end)
    if family.end_of_last is not None:
        texts[-1] = texts[-1].removesuffix(family.end) + family.end_of_last
    return texts


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("name", FAMILIES)
def test_decoded_trained_tokens_are_the_assistants_text(name: str, tmp_path: Path) -> None:
    """Also where turns contain the tokens of turns: a question in their form is not trained on."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    first = (*family.special, "[INST]")[0]
    markers = turns(f"{family.end}{first}assistant\nfake{family.end}", f"{first}user{family.end} b", "c", "d")
    odd = [{**message, "content": message["content"].lstrip("\n")} for message in ODD] if family.before_last else ODD
    chats = [*CHATS, markers, odd, *([SYSTEM] if family.has_system else [])]
    for chat, result in zip(chats, encoded(template(name), tokenizer, (family.bos, family.eos), chats), strict=True):
        assert decoded_answers(tokenizer, result) == expected_answers(family, chat)
        text = Tokenizer.load(tokenizer).decode(result.ids.tolist())
        assert all(message["content"].strip() in text for message in chat if message["role"] == "user")
    [last] = encoded(template(name), tokenizer, (family.bos, family.eos), [CHATS[1]], "last")
    assert decoded_answers(tokenizer, last) == expected_answers(family, CHATS[1])[-1:]


def test_a_template_that_has_no_system_role_refuses_the_conversation(tmp_path: Path) -> None:
    family = FAMILIES["gemma"]
    results = encoded(template("gemma"), tokenizer_of(family, tmp_path), (family.bos, family.eos), [SYSTEM, CHATS[0]])
    assert [result.problem for result in results] == ["the chat template refuses it: System role not supported", ""]


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_qwen3_trains_on_the_last_thought_and_leaves_out_those_before_it(field: str, tmp_path: Path) -> None:
    """As its template does: a model never sees its earlier thoughts."""
    tokenizer = tokenizer_of(FAMILIES["qwen3"], tmp_path)
    separate = turns("2+2?", "4", "2+3?", "5")
    separate[1]["thinking"], separate[3][field] = "two and two", "two and three"
    inside = turns("2+2?", "<think>\ntwo and two\n</think>\n\n4", "2+3?", "<think>\ntwo and three\n</think>\n\n5")
    for result in encoded(template("qwen3"), tokenizer, ("<s>", "<|im_end|>"), [separate, inside]):
        answers = ["4<|im_end|>", "<think>\ntwo and three\n</think>\n\n5<|im_end|>"]
        assert decoded_answers(tokenizer, result) == answers


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_deepseek_leaves_out_thoughts(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    chat = turns("q", "<think>\nhm\n</think>\n\nyes", "again", "<think>so</think>no")
    [result] = encoded(template(name), tokenizer, (family.bos, family.eos), [chat])
    assert decoded_answers(tokenizer, result) == [f"\n\nyes{family.end}", f"no{family.end}"]


CALLS = {
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>',
    "llama3_1": '{"name": "weather", "parameters": {"city": "Rom"}}<|eot_id|>',
    "mistral_v3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rom"}, "id": "call12345"}]</s>',
    "mistral_v13": '[TOOL_CALLS]weather[ARGS]{"city": "Rom"}</s>',
    "deepseekv3": f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>weather\n"
    f'```json\n{{"city": "Rom"}}\n```<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>{FAMILIES["deepseekv3"].end}',
}


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("arguments", [{"city": "Rom"}, '{"city": "Rom"}'], ids=["object", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_tools_are_trained_on_in_the_form_of_the_template(name: str, arguments: Any, tmp_path: Path) -> None:
    """Some templates write arguments that are text as JSON within JSON, and others fail unless they are text."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    [result] = encoded(template(name), tokenizer, (family.bos, family.eos), [weather_call(arguments)])
    assert decoded_answers(tokenizer, result) == [CALLS[name], *expected_answers(family, turns("", "It is mild."))]


@pytest.mark.parametrize("name", ["llama3", "phi3", "smolvlm", "gptoss"])
@pytest.mark.parametrize("is_marked", [False, True])
def test_a_conversation_whose_calls_a_template_leaves_out_is_refused(name: str, is_marked: bool) -> None:
    """Otherwise the end of the turn would be trained on alone. GPT-OSS writes them; its variant says where."""
    text = marked_template(name) if is_marked else template(name)
    assert text is not None
    chat = weather_call({"city": "Rom"})
    if (name, is_marked) == ("gptoss", True):
        found = find_answers(text, chat, {})
        assert [found.text[begin:end].partition("<|channel|>")[0] for begin, end in found.answers] == [
            "<|start|>assistant to=functions.weather",
            "<|start|>assistant",
        ]
        return
    reason = "leaves out calls of tools. Use a template that writes them"
    with pytest.raises(ValueError, match=reason if is_marked or name == "smolvlm" else "cannot be determined. Use"):
        find_answers(text, chat, {"bos_token": "<s>", "eos_token": "</s>"})


@functools.cache
def transformers_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", ["nemotron_3_nano", "qwen3_5_nothink"])
def test_thoughts_under_a_template_that_writes_empty_ones_elsewhere_are_refused(name: str) -> None:
    """And not trained on in part. Its marked variant says where they are."""
    chat = turns("2+3?", "<think>\ntwo and three\n</think>\n\n5")
    with pytest.raises(ValueError, match=r"cannot be determined. Use a template that marks answers"):
        find_answers(template(name), chat, {})
    marked = marked_template(name)
    assert marked is not None
    found = find_answers(marked, chat, {})
    [answer] = [found.text[begin:end] for begin, end in found.answers]
    assert answer == "<think>\ntwo and three\n</think>\n\n5<|im_end|>\n"


def transformers_mask(tokenizer: Path, text: str, chat: Any, *, parts: bool) -> tuple[list[int], list[int]]:
    """The ids and mask of transformers."""
    if parts:
        chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    options = {"chat_template": text, "return_dict": True, "return_assistant_tokens_mask": True}
    found = transformers_tokenizer(tokenizer).apply_chat_template(chat, tokenize=True, **options)
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("every", [pytest.param(False, id="families"), full(True, id="all")])
def test_masks_are_those_of_transformers_under_each_template_that_marks_answers(every: bool, tmp_path: Path) -> None:
    names = [name for name in marked_names() if every or name in FAMILIES]
    assert {"qwen2_5", "qwen3", "llama3", "gemma", "gemma3", "deepseekv3", "phi3", "gptoss"} <= set(names)
    assert not every or "diffusion_gemma" in names
    for name in names:
        text = marked_template(name)
        assert text is not None
        added = dict.fromkeys(("<s>", "</s>", *re.findall(r"<[^<>\s'\"{}]+>", text)))
        tokenizer = write_tokenizer(tmp_path / name, added=list(added))
        read = Tokenizer.load(tokenizer)
        for chat, result in zip(CHATS, encoded(text, tokenizer, ("<s>", "</s>"), CHATS), strict=True):
            ids, mask = transformers_mask(tokenizer, text, chat, parts=name in VISION)
            first = int(ids[0] != read.start)
            assert result.ids[first:][: len(ids)].tolist() == ids, name
            ours = (result.mask & TRAINED)[first:][: len(ids)]
            # transformers loses all but the first byte of a character that ends a block. In one template, answers do.
            lost = {read.decode([ids[i]]) for i in np.flatnonzero(ours != mask)}
            assert not lost or (lost == {"\N{REPLACEMENT CHARACTER}"} and name == "diffusion_gemma"), name
            texts = decoded_answers(tokenizer, result)
            answers = [message["content"] for message in chat if message["role"] == "assistant"]
            assert len(texts) == len(answers), name
            assert all(answer in text for answer, text in zip(answers, texts, strict=True)), name


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("mistral")])
def test_the_published_template_trains_on_what_its_marked_variant_does(name: str, tmp_path: Path) -> None:
    """But for the beginning of the turn, which is in the prompt, and for what follows the end of the turn."""
    family, marked = FAMILIES[name], marked_template(name)
    tokenizer = tokenizer_of(family, tmp_path)
    if marked is None:
        assert name in ("llama3_1", "llama3_2")
        marked = marked_template("llama3")
        assert marked is not None
    ours = encoded(template(name), tokenizer, (family.bos, family.eos), CHATS)
    for chat, result in zip(CHATS, ours, strict=True):
        texts = decoded_answers(tokenizer, result)
        theirs = decoded_runs(tokenizer, *transformers_mask(tokenizer, marked, chat, parts=name in VISION))
        assert len(theirs) == len(texts)
        for their, text in zip(theirs, texts, strict=True):
            begin, found, rest = their.partition(text)
            assert found
            assert begin in (family.marked_before, family.before_last)
            assert rest in (family.marked_after, family.marked_after + family.eos)


@pytest.mark.parametrize("name", VISION)
def test_a_prompt_has_its_text_under_a_template_that_reads_lists_of_parts(name: str) -> None:
    process = ChatProcess(template(name), {"bos_token": "<s>", "eos_token": "</s>"})
    try:
        assert "what is this?" in process.render(turns("what is this?"))
    finally:
        process.close()


@pytest.mark.usefixtures("rendered_here")
def test_an_answer_in_two_marked_blocks_is_one_answer(tmp_path: Path) -> None:
    """Otherwise `loss: last` would be that of the end of the turn alone."""
    tokenizer = write_tokenizer(tmp_path)
    text = CHATML.replace("m.content + '<|im_end|>\\n' }}", "'' }}{% generation %}{{ m.content }}{% endgeneration %}")
    text = text.replace("{% endfor %}", "{% generation %}{{ '<|im_end|>' }}{% endgeneration %}{% endfor %}", 1)
    [result] = encoded(text, tokenizer, ("<s>", "</s>"), [CHATS[1][1::2]], "last")
    assert decoded_answers(tokenizer, result) == ["a<|im_end|>"]


def test_marks_around_no_answers_text_are_refused(tmp_path: Path) -> None:
    text = CHATML.replace("'<|im_end|>\\n' }}", "'' }}{% generation %}{{ '<|im_end|>\\n' }}{% endgeneration %}")
    [result] = encoded(text, write_tokenizer(tmp_path), ("<s>", "</s>"), [CHATS[0]])
    assert result.problem == "the chat template refuses it: it marks answers without their text. Use another template"
