"""Incremental detokenization: emits only complete characters, and never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder returns for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"


class Transcript:
    """The text of one continuation."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`decode` maps ids to text; the end of `prompt` is the context for the continuation's first characters."""
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = [text for text in stop if text]
        # Only a window of ids is decoded each time; the text before it is fixed.
        self._window = list(prompt[-4:])
        self._before = len(self._window)
        self._held = ""

    def add(self, token: int) -> str:
        """Append a token and return the text that is now final."""
        self.tokens.append(token)
        self._window.append(token)
        return self._settle(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """End the text and return the rest of it."""
        return self._settle(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        old = self._decode(self._window[: self._before])
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and not final:
            return ""
        self._window = self._window[self._before :] if len(self._window) > self._before else self._window
        self._before = len(self._window)
        return text[len(old) :]

    def _settle(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        stops = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if stops:
            self.stopped = True
            emitted, self._held = text[: min(stops)], ""
        else:
            overlap = 0 if final else _overlap(text, self._stop)
            emitted, self._held = text[: len(text) - overlap], text[len(text) - overlap :]
        self.text += emitted
        return emitted


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
    lengths = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)
