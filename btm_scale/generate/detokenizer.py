"""Tokens to text as they come: whole characters only, and nothing that may turn out to begin a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are no character, or not yet one.
_BROKEN = "\ufffd"


class Transcript:
    """The text of one continuation."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`decode` turns ids into text; the end of `prompt` is where the continuation's first characters join on."""
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = [text for text in stop if text]
        # A window of ids is decoded, not the whole text each time: what came before it is fixed.
        self._window = list(prompt[-4:])
        self._before = len(self._window)
        self._held = ""

    def add(self, token: int) -> str:
        """Append a token; returns the text that is now certain."""
        self.tokens.append(token)
        self._window.append(token)
        return self._settle(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """No token follows; returns the rest of the text."""
        return self._settle(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        old = self._decode(self._window[: self._before])
        whole = self._decode(self._window)
        if whole.endswith(_BROKEN) and not final:
            return ""
        self._window = self._window[self._before :] if len(self._window) > self._before else self._window
        self._before = len(self._window)
        return whole[len(old) :]

    def _settle(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            certain, self._held = text[: min(found)], ""
        else:
            kept = 0 if final else _overlap(text, self._stop)
            certain, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += certain
        return certain


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    lengths = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)
