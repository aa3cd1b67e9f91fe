"""Standard streams as services, schedulers and old locales leave them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os, sys
from btm_scale.cli.streams import escape_unknown_characters, open_missing_streams
open_missing_streams()
escape_unknown_characters()
"""
PRINTS = """
with open("tokens.bin", "wb") as file:
    assert file.fileno() > 2
    print("a line of the command")
    print("a warning", file=sys.stderr, flush=True)
    os.write(1, b"a line of a library")
    os.write(2, b"a line of a library")
    assert sys.stdin.read() == ""
    assert not sys.stdout.isatty()
"""


def run(script: str, streams: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    (folder / "script.py").write_text(BEGIN + script)
    words = ["sh", "-c", f'exec "$1" script.py {streams}', "sh", sys.executable]
    return subprocess.run(words, cwd=folder, env=os.environ | variables, capture_output=True, check=False)


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "<&- >&-", "< /dev/null 2>&-"])
def test_nothing_is_printed_into_a_file_if_streams_are_closed(streams: str, tmp_path: Path) -> None:
    done = run(PRINTS, streams, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tokens.bin").read_bytes() == b""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", rb"caf\xe9 \u2013"), ("ascii:surrogateescape", rb"caf\xe9 \u2013"), ("latin-1", b"caf\xe9 \\u2013")],
)
def test_a_table_is_printed_in_any_locale(encoding: str, shown: bytes, tmp_path: Path) -> None:
    done = run(r'print("caf\xe9 \u2013")', "", tmp_path, PYTHONIOENCODING=encoding)
    assert done.stdout.strip() == shown, done.stderr
