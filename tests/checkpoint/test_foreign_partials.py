"""What lies where a merge or conversion writes, and was not written there by it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import journal
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import UserError
from btm_scale.util.files import partial_path


@pytest.fixture
def pairs(models: list[Path]) -> list[tuple[Path, float]]:
    return [(model, 1.0) for model in models[:2]]


def stopped_before_publishing(output: Path, pairs: list[tuple[Path, float]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge with all its units done and noted; returns its partial directory."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("btm_scale.checkpoint.merge.output._publish", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(output, pairs)
    partial = partial_path(output)
    assert journal.finished(partial)
    return partial


def flip_a_byte(shard: Path, place: int) -> None:
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("place", [-1, 20], ids=["a weight", "the header"])
def test_bit_rot_in_a_partial_output_is_not_published(
    place: int, pairs: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merge(tmp_path / "clean", pairs).content_hash
    partial = stopped_before_publishing(tmp_path / "out", pairs, monkeypatch)
    flip_a_byte(next(partial.glob(".model*.partial")), place)
    assert merge(tmp_path / "out", pairs).content_hash == expected
    assert content_hash(tmp_path / "out") == expected


def test_a_truncated_shard_of_a_partial_output_is_written_again(
    pairs: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stopped_before_publishing(tmp_path / "out", pairs, monkeypatch)
    os.truncate(next(partial.glob(".model*.partial")), 100)
    assert merge(tmp_path / "out", pairs).content_hash == content_hash(tmp_path / "out")


def test_a_partial_output_that_others_can_write_to_is_not_resumed(
    pairs: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stopped_before_publishing(tmp_path / "out", pairs, monkeypatch)
    (partial / "planted.py").touch()
    partial.chmod(0o777)
    merge(tmp_path / "out", pairs)
    assert not (tmp_path / "out" / "planted.py").exists()


def test_a_partial_output_is_private_and_the_published_one_is_not(
    pairs: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stopped_before_publishing(tmp_path / "out", pairs, monkeypatch)
    assert stat.S_IMODE(partial.stat().st_mode) == 0o700
    merge(tmp_path / "out", pairs)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_in_place_of_a_partial_output_is_not_followed(pairs: list[tuple[Path, float]], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("precious")
    partial_path(tmp_path / "out").symlink_to(elsewhere)
    merge(tmp_path / "out", pairs)
    assert [file.name for file in elsewhere.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_a_link_named_like_the_lock_does_not_empty_what_it_leads_to(
    verb: str, pairs: list[tuple[Path, float]], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    (tmp_path / ".out.partial.lock").symlink_to(notes)
    start = {
        "merge": lambda: merge(tmp_path / "out", pairs),
        "convert": lambda: convert(pairs[0][0], tmp_path / "out", to="huggingface"),
    }[verb]
    with pytest.raises(UserError, match="is a link"):
        start()
    assert notes.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_another_users_partial_output_does_not_block_a_merge_and_is_not_published(
    pairs: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    partial = stopped_before_publishing(shared / "out", pairs, monkeypatch)
    flip_a_byte(next(partial.glob(".model*.partial")), -1)
    shutil.chown(partial, 12345)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        os.setuid(54321)
        done = 1
        try:
            report = merge(shared / "out", pairs)
            done = 0 if report.content_hash == content_hash(shared / "out") else 2
        finally:
            os._exit(done)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (shared / "out").stat().st_uid == 54321
