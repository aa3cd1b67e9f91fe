"""Assignment to splits by hash, and sets of keys."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from btm_scale.data.dedup import Deduplicator, KeySet
from btm_scale.data.documents import Document
from btm_scale.data.splits import Identity, identify

SHARES = {"dev": 0.05, "test": 0.1}


def split_of(text: str, group: str | None = None) -> str:
    return identify(Document(text, group, ""), **SHARES).split


def test_a_documents_split_does_not_depend_on_other_documents() -> None:
    # Literal values: a change of the hash would move the test text of every run.
    places = [split_of(f"document {i}") for i in (0, 1, 6, 9)]
    assert places == ["train", "test", "test", "test"]
    assert {split_of(f"document {i}", "one group") for i in range(100)} == {split_of("", "one group")}


def test_splits_have_the_configured_sizes() -> None:
    counts = Counter(split_of(str(i)) for i in range(20_000))
    assert abs(counts["dev"] - 1_000) < 150
    assert abs(counts["test"] - 2_000) < 200


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 50), max_size=3_000))
def test_a_key_set_is_a_set(keys: list[int]) -> None:
    ours, reference = KeySet(), set()
    for key in keys:
        key = key or 1  # 0 and 1 are one key
        assert (key in ours) == (key in reference)
        assert ours.add(key) == (key not in reference)
        reference.add(key)
    assert len(ours) == len(reference)


def test_a_key_set_grows() -> None:
    keys = KeySet(range(1, 200_000, 7))
    assert len(keys) == len(range(1, 200_000, 7))
    assert 8 in keys
    assert 9 not in keys


def identity(split: str, key: int) -> Identity:
    return Identity(split, None, bytes(8) + key.to_bytes(8, "little"), 1)


def test_a_text_is_kept_once_and_in_one_split() -> None:
    elsewhere = {"train": KeySet([1]), "dev": KeySet(), "test": KeySet([2])}
    filtered = Deduplicator(elsewhere, {"dev": KeySet([5]), "test": KeySet([4])})
    assert filtered.keep(identity("train", 1))  # in another domain's train too: seen twice by dense, no leak
    assert not filtered.keep(identity("test", 1))
    assert not filtered.keep(identity("train", 2))
    assert not filtered.keep(identity("train", 4))
    assert not filtered.keep(identity("train", 5))
    assert filtered.keep(identity("test", 4))
    assert not filtered.keep(identity("test", 4))
    assert filtered.keep(identity("train", 3))
    assert filtered.dropped == 5
