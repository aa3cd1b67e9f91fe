"""Text that is emitted while tokens arrive."""

from __future__ import annotations

from btm_scale.generate.detokenizer import Transcript


def _utf8(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_is_emitted_when_complete() -> None:
    transcript = Transcript(_utf8, b"caf")
    pieces = [transcript.add(byte) for byte in "é = ☕!".encode()]
    assert "".join(pieces) == "é = ☕!"
    assert pieces[:2] == ["", "é"]
    assert "\ufffd" not in "".join(pieces)
    cut_off = Transcript(_utf8, b"caf")
    assert cut_off.add("é".encode()[0]) + cut_off.finish() == "\ufffd"


def test_no_part_of_a_stop_string_is_emitted() -> None:
    transcript = Transcript(_utf8, b"Q", stop=["\n\n", "Q:"])
    emitted = [transcript.add(byte) for byte in b"one\ntwo\n\nthree"]
    assert "".join(emitted) == transcript.text == "one\ntwo"
    assert transcript.stopped
    open_end = Transcript(_utf8, b"Q", stop=["Q:"])
    assert "".join([open_end.add(byte) for byte in b"one Q"]) == "one "
    assert open_end.finish() == "Q"
