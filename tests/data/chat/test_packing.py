"""Conversations in sequences: whole if they fit, cut between turns if not."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from btm_scale.data.chat.encode import TRAINED, TURN
from btm_scale.data.chat.packing import (
    IDS,
    START,
    UNTRAINED,
    as_flagged,
    flagged,
    packed,
    pieces_of,
    sequence_of,
    trained_pieces,
)
from btm_scale.data.chat.sequences import blended, most_samples


def mask_of(*turns: tuple[int, int]) -> np.ndarray:
    """The mask of exchanges, each a number of tokens of the question and of the answer."""
    mask: list[int] = []
    for question, answer in turns:
        begin = len(mask)
        mask += [0] * question + [TRAINED] * answer
        mask[begin] |= TURN if begin else 0
    return np.array(mask, np.uint8)


def cuts(mask: np.ndarray, length: int) -> list[tuple[int, int]]:
    return pieces_of(0, len(mask), mask, length)


def test_a_long_conversation_is_cut_after_answers() -> None:
    mask = mask_of((3, 2), (2, 2), (4, 4), (1, 1))
    assert cuts(mask, 30) == [(0, 19)]
    assert cuts(mask, 10) == [(0, 9), (9, 19)]
    assert cuts(mask, 9) == [(0, 9), (9, 17), (17, 19)]
    assert cuts(mask_of((3, 2), (2, 2), (2, 2)), 10) == [(0, 5), (5, 13)], "the last answer has the most before it"


def test_a_turn_that_is_longer_than_a_sequence_keeps_its_answer_together() -> None:
    mask = mask_of((2, 2), (12, 3))
    assert cuts(mask, 8) == [(0, 4), (4, 11), (11, 19)]
    pieces, cut = trained_pieces(np.array([0]), np.array([19]), mask, 8)
    assert pieces.tolist() == [[0, 4], [11, 19]], "a part without an answer is not trained on"
    assert cut == 1


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8), st.integers(4, 40))
def test_pieces_cover_a_conversation_without_a_gap_and_fit(turns: list[tuple[int, int]], length: int) -> None:
    mask = mask_of(*turns)
    pieces = cuts(mask, length)
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == len(mask)
    assert all(0 < end - begin <= length for begin, end in pieces)
    if all(question + answer <= length for question, answer in turns):
        assert all(mask[begin] & TURN for begin, _ in pieces[1:])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_holds_every_piece_once_and_leaves_no_two_sequences_that_fit_into_one(sizes: list[int]) -> None:
    rows = packed(sizes, 20)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[piece] for piece in row) for row in rows)
    assert all(total <= 20 for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 20


def test_a_sequence_trains_on_answers_alone_and_not_on_its_filler() -> None:
    first = flagged(np.array([5, 6, 7]), np.array([0, 0, TRAINED], np.uint8))
    second = flagged(np.array([8, 9]), np.array([TRAINED, TRAINED], np.uint8))
    sequence = sequence_of([first, second], 7, 2)
    assert (sequence & IDS).tolist() == [5, 6, 7, 8, 9, 2, 2, 2]
    assert ((sequence & UNTRAINED) == 0).tolist() == [False, False, True, False, True, False, False, False]
    assert np.flatnonzero(sequence & START).tolist() == [0, 3, 5]


def test_documents_beside_conversations_are_trained_on_completely() -> None:
    sequence = as_flagged(np.array([4, 2, 5, 6, 2]), 2)
    assert (sequence & IDS).tolist() == [4, 2, 5, 6, 2]
    assert not np.any(sequence & UNTRAINED)
    assert np.flatnonzero(sequence & START).tolist() == [0, 2]


def test_domains_are_blended_evenly_and_a_longer_order_begins_with_a_shorter() -> None:
    domains, numbers = blended([0.75, 0.25], 400)
    assert np.bincount(domains).tolist() == [300, 100]
    assert all(np.array_equal(numbers[domains == one], np.arange(np.sum(domains == one))) for one in (0, 1))
    assert max(np.abs(np.cumsum(domains == 1) - 0.25 * np.arange(1, 401))) <= 1
    longer = blended([0.75, 0.25], 900)
    assert np.array_equal(longer[0][:400], domains)
    assert np.array_equal(longer[1][:400], numbers)


def test_a_longer_order_of_many_domains_begins_with_every_shorter() -> None:
    weights = [0.55] + [0.05] * 9
    longest = blended(weights, 200)
    for samples in range(1, 60):
        order = blended(weights, samples)
        assert all(np.array_equal(part, whole[:samples]) for part, whole in zip(order, longest, strict=True))
        assert all(
            np.count_nonzero(order[0] == domain) <= most_samples(weight, samples, 10)
            for domain, weight in enumerate(weights)
        )
