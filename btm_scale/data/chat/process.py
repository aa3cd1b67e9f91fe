"""Renders chats in a child process: the template is not trusted, and may loop or fill memory.

transformers' sandbox keeps a template away from files and modules, and sets no limits of time and memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_scale.data.chat.answers import Rendering, answer_frame, find_answers
from btm_scale.data.chat.render import rendered
from btm_scale.model.hf_load import render_chat
from btm_scale.util.secrets import is_secret_name

LONGEST = 1_000_000  # characters of a rendered chat
_SECONDS = 10.0  # wall time per chat
_MORE_SECONDS = 0.05  # for each further chat of a batch
_START_SECONDS = 120.0  # to import what rendering needs
_MEMORY = 1 << 30  # bytes, beyond what the libraries take

Chat = Mapping[str, Any]  # `messages`, and `tools` if it has any


class TooExpensive(Exception):  # noqa: N818 (callers complete its sentence)
    """A template exceeded a limit."""


class ChatProcess:
    """Renders the chats of one template, one batch at a time. A process that exceeds a limit is killed and replaced."""

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        self._setting = [template, dict(special)]
        self._turn = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the process, without waiting until it is ready."""
        command = [sys.executable, "-P", "-m", "btm_scale.data.chat.process"]
        kept = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
        self._child = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=kept
        )
        self._is_ready = False
        weakref.finalize(self, _end, self._child)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """Return the text of a chat up to the answer. Raises ValueError with the template's reason, TooExpensive."""
        [answer] = self._rendered("prompt", [{"messages": list(messages), "tools": tools}])
        if "problem" in answer:
            raise ValueError(answer["problem"])
        text: str = answer["text"]
        return text

    def find_answers(self, chats: Sequence[Chat]) -> list[Rendering | str]:
        """Return each chat's text with its answers, or why it has none: a refusal of the template, or a limit.

        Raises TooExpensive if several chats exceed a limit: the template does, whatever the chat.
        """
        try:
            results = self._rendered("answers", chats)
        except TooExpensive as error:
            if len(chats) == 1:
                return [str(error)]
            results = []
            for chat in chats:  # which of them was it?
                try:
                    results += self._rendered("answers", [chat])
                except TooExpensive as again:
                    if any("limit" in result for result in results):
                        raise
                    results.append({"problem": str(again), "limit": True})
        return [
            result["problem"] if "problem" in result else Rendering(result["text"], _pairs(result["answers"]))
            for result in results
        ]

    def end_of_turn(self) -> str:
        """Return what the template writes after an answer; "" if that is only white space. Raises TooExpensive."""
        [answer] = self._rendered("end", [{}])
        return str(answer.get("text", ""))

    def close(self) -> None:
        """End the process; the next chat starts another."""
        if self._child is not None:
            _end(self._child)
            self._child = None

    def _rendered(self, wanted: str, chats: Sequence[Chat]) -> list[dict[str, Any]]:
        with self._turn:
            if self._child is None or self._child.poll() is not None:
                self.start()
            if not self._is_ready:
                self._ask(self._setting, _START_SECONDS)
                self._is_ready = True
            seconds = _SECONDS + _MORE_SECONDS * (len(chats) - 1)
            results: list[dict[str, Any]] = self._ask([wanted, list(chats)], seconds)
        return results

    def _ask(self, question: Any, seconds: float) -> Any:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        answer, deadline = bytearray(), time.monotonic() + seconds
        try:
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
            self._child.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._child.stdout, selectors.EVENT_READ)
                while not answer.endswith(b"\n") and selector.select(max(0.0, deadline - time.monotonic())):
                    part = os.read(self._child.stdout.fileno(), 1 << 16)
                    if not part:
                        break
                    answer += part
        except BrokenPipeError:
            pass
        if answer.endswith(b"\n"):
            return json.loads(answer)
        _end(self._child)
        raise TooExpensive(f"it took more than {seconds:g} s or {_MEMORY >> 30} GiB")


def _pairs(ranges: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((begin, end) for begin, end in ranges)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _answer_all() -> None:
    """In the child: read the template and then batches of chats, one per line, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    render_chat("", [], {})  # imports what it needs, which is not the template's time and memory
    _limit_itself()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints
    template, special = json.loads(sys.stdin.buffer.readline())
    answers.write(b"{}\n")
    for line in sys.stdin.buffer:
        wanted, chats = json.loads(line)
        signal.alarm(int(3 * (_SECONDS + _MORE_SECONDS * len(chats))))  # if the parent has been killed
        answers.write(json.dumps([_result(wanted, template, chat, special) for chat in chats]).encode() + b"\n")
        signal.alarm(0)


def _result(wanted: str, template: str, chat: dict[str, Any], special: dict[str, str]) -> dict[str, Any]:
    try:
        if wanted == "prompt":
            options = {"tools": chat.get("tools"), "add_generation_prompt": True}
            text, _ = rendered(template, chat["messages"], special, **options)
            return {"text": text[: LONGEST + 1]}
        if wanted == "end":
            return {"text": answer_frame(template, tuple(special.items())).after}
        found = find_answers(template, chat["messages"], special, chat.get("tools"))
    except MemoryError:
        return {"problem": "it needs too much memory"}
    except Exception as error:  # a template may raise anything, of Jinja and of Python
        return {"problem": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
    if len(found.text) > LONGEST:
        return {"problem": f"the chat has more than {LONGEST:,} characters"}
    return {"text": found.text, "answers": found.answers}


def _limit_itself() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for limit, value in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + _MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    _answer_all()
