"""The progress of encoding, as lines and as bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from btm_scale.data.progress import SAMPLE, TRAINING, logged_progress, reported
from btm_scale.report.encoding_bar import encoding_bars


def test_encoding_is_logged_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    with caplog.at_level("INFO", "btm_scale"):
        show = logged_progress(lambda: now)
        for second in range(25):
            now = float(second)
            show("web", second * 2_000_000, second * 1_000, 30_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "encoding web: 10,000 documents, 20.0 of about 30.0 MB of text, 2.0 MB/s",
        "encoding web: 20,000 documents, 40.0 of about 40.0 MB of text, 2.0 MB/s",
    ]


def test_other_steps_are_logged_by_their_names(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter(range(0, 1_000, 11))
    with caplog.at_level("INFO", "btm_scale"):
        show = logged_progress(lambda: float(next(seconds)))
        texts = ["x" * (1 << 19)] * 4
        assert list(reported(texts, len, SAMPLE, 1 << 21, show)) == texts
        show(TRAINING, 0, 0, 0)
    assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == [
        "reading a sample: 2 documents, 1.0",
        "reading a sample: 4 documents, 2.1",
    ]


def test_a_terminal_shows_a_bar_per_domain_and_a_pipe_none() -> None:
    for is_terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, width=120, color_system=None)
        with encoding_bars(quiet=False, console=console) as show:
            show(TRAINING, 0, 0, 0)
            show("web", 2_000_000, 1_234, 4_000_000)
            show("[red]x", 1_000, 1, 10)
        shown = out.getvalue()
        assert ("1,234 documents" in shown) == is_terminal
        assert ("[red]x" in shown) == is_terminal
        assert ("training a tokenizer" in shown) == is_terminal
