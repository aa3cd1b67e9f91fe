"""Untrusted input of a server: chat templates, remote engines, pages of other sites, and a key file others may read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.raw_engine import raw_engine, served_by
from helpers.served_forest import planner_of, running

from btm_scale.data.chat import process
from btm_scale.errors import ConfigError, DataError, UserError
from btm_scale.serve import engine_answers
from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.chat import ChatTemplate
from btm_scale.serve.engines_file import load_engines
from btm_scale.serve.hosts import is_loopback
from btm_scale.serve.keys import Keys
from btm_scale.serve.schemas import Message

HOSTILE = """
{%- set wish = messages[0].content -%}
{%- if wish == 'loop' -%}{%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif wish == 'memory' -%}{{- 'a' * 10**10 -}}
{%- elif wish == 'width' -%}{{- '%09999999999d' % 1 -}}
{%- elif wish == 'escape' -%}{{- cycler.__init__.__globals__.os.system('touch SONG') -}}
{%- elif wish == 'attributes' -%}{{- ''.__class__.__mro__[1].__subclasses__() -}}
{%- elif wish == 'include' -%}{%- include '/etc/passwd' -%}
{%- else -%}{{- wish -}}{%- endif -%}
"""


def test_a_chat_template_can_neither_hang_the_server_nor_fill_its_memory_nor_leave_its_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SECONDS", 3.0)
    monkeypatch.chdir(tmp_path)
    template = ChatTemplate(HOSTILE, {})

    def render(wish: str) -> str:
        return template.render([Message(role="user", content=wish)])

    assert render("hello") == "hello"
    for wish in ("memory", "width", "escape", "attributes", "include"):
        with pytest.raises(ApiError, match="refuses these messages") as raised:
            render(wish)
        assert raised.value.status == 400
    assert render("hello") == "hello"
    with pytest.raises(ApiError, match=r"took more than 3 s or 1 GiB"):
        render("loop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"\xff\xfe{{ messages }}", b"a" * (2 << 20)], ids=["not UTF-8", "too large"])
def test_a_chat_template_that_cannot_be_read_is_reported_with_its_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(DataError, match=r"chat_template.jinja cannot be read as a chat template"):
        ChatTemplate.of(tmp_path)


def test_a_page_of_another_site_cannot_use_a_server_without_keys(experts: dict[str, Path]) -> None:
    with running(*planner_of(experts), only_local=True) as server:
        port = server.url.rpartition(":")[2]

        def status(**headers: str) -> int:
            body = {"model": "forest", "prompt": "a", "max_tokens": 1}
            return httpx2.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code

        assert status() == 200
        assert status(Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
        for foreign in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert status(Host=foreign) == 403
        for origin in ("https://evil.example", "null", f"http://evil.example:{port}"):
            assert status(Origin=origin) == 403
    with running(*planner_of(experts), keys=Keys(["key"])) as server:
        answer = httpx2.get(
            f"{server.url}/v1/models", headers={"Host": "forest.example", "Authorization": "Bearer key"}
        )
        assert answer.status_code == 200


def test_names_that_only_begin_like_this_machine_are_not_local() -> None:
    assert not any(map(is_loopback, ("localhost.evil.example", "127.evil.example", "::1.example", "", "10.0.0.1")))


def test_a_key_file_that_others_may_read_is_reported_and_no_message_repeats_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("canary-key\n")
    keys.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Keys.load(keys)
        assert "chmod 600" in caplog.text
        caplog.clear()
        keys.chmod(0o600)
        Keys.load(keys)
    assert caplog.text == ""
    keys.write_bytes(b"canary-key\xff\n")
    with pytest.raises(UserError, match="is not UTF-8") as raised:
        Keys.load(keys)
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "expert0: {url: http://host/v1, api_key: canary-secret}",
        "expert0: {url: 'ftp://me:canary-secret@host'}",
        "expert0: {url: http://host/v1, headers: {Authorization: canary-secret}}",
        "expert0: [canary-secret]",
    ],
)
def test_a_mistake_in_the_file_of_engines_is_reported_without_its_secrets(text: str, tmp_path: Path) -> None:
    (tmp_path / "engines.yaml").write_text(text)
    with pytest.raises(ConfigError, match="expert0") as raised:
        load_engines(tmp_path / "engines.yaml", ["expert0"])
    assert "canary" not in str(raised.value)


SCORES = b'{"choices": [{"prompt_logprobs": [null, {"1": {"logprob": %s}}]}]}'
EVENT = b'data: {"choices": [{"text": %s, "finish_reason": %s}]}\n\n'
ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "nesting": (b"[" * 100_000, b"data: " + b"[" * 100_000 + b"\n\n"),
    "another type": (b'"text"', b'data: ["text"]\n\n'),
    "no numbers": (SCORES % b'"nan"', EVENT % (b'{"a": 1}', b'"stop"')),
    "positive": (SCORES % b"1.0", EVENT % (b"7", b"null")),
    "an endless line": (b"1" * (2 << 20), b"data: " + b" " * (2 << 20)),
    "half a surrogate": (b'{"choices": "\\ud800"}', EVENT % (b'"\\ud800"', b"null")),
    "more than was asked for": (b"{}", EVENT % (b'"%s"' % (b"a" * 5_000), b"null")),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_engine_that_answers_with_anything_is_down_and_nothing_else_happens(
    what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_answers, "_MOST_ANSWER", 1 << 20)
    with raw_engine(*ANSWERS[what]) as url, served_by(url, url) as server:
        asked: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
        for model in ("forest", "expert0"):
            answer = server.post("/v1/completions", {"model": model, **asked})
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "service_unavailable"
    assert "Traceback" not in caplog.text
    assert "failed to answer" not in caplog.text
