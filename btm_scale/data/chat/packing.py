"""Conversations packed into sequences of one length, none of them cut that fits.

A conversation that is longer than a sequence is cut after an answer. A turn that is longer is cut at its beginning, so
that the answer and what is just before it stay together.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from btm_scale.data.chat.encode import TRAINED, TURN

Array = np.ndarray[Any, Any]

# Flags in the bits above every token id of int64 sequences.
_ID_BITS = 40
UNTRAINED = 1 << _ID_BITS  # not a target of the loss
START = 1 << (_ID_BITS + 1)  # the first token of a document
IDS = UNTRAINED - 1


def pieces_of(begin: int, end: int, mask: Array, length: int) -> list[tuple[int, int]]:
    """Return the parts of at most `length` tokens into which the conversation in tokens `begin` to `end` is cut.

    They follow one another without a gap, and are filled from the end, so that the last answer has the most before it.
    `mask` [tokens] is that of the complete file.
    """
    if end - begin <= length:
        return [(begin, end)]
    turns = begin + 1 + np.flatnonzero(mask[begin + 1 : end] & TURN)
    pieces: list[tuple[int, int]] = []
    start = stop = end
    for turn, _ in reversed(list(pairwise([begin, *turns.tolist(), end]))):
        if stop - turn > length and stop > start:
            pieces.append((start, stop))
            stop = start
        while stop - turn > length:
            pieces.append((stop - length, stop))
            stop -= length
        start = turn
    return [*pieces, (start, stop)][::-1]


def trained_pieces(starts: Array, lengths: Array, mask: Array, length: int) -> tuple[Array, int]:
    """Return the parts with an answer of all conversations, int64 [parts, 2], and how many turns had to be cut.

    `starts` and `lengths` [conversations] are in tokens of the file.
    """
    pieces: list[tuple[int, int]] = []
    cut = 0
    for begin, size in zip(starts.tolist(), lengths.tolist(), strict=True):
        parts = pieces_of(begin, begin + size, mask, length)
        cut += sum(not mask[begin_of_part] & TURN for begin_of_part, _ in parts[1:])
        # The first token of a part is not predicted.
        pieces += [(first, end) for first, end in parts if np.any(mask[first + 1 : end] & TRAINED)]
    return np.array(pieces, np.int64).reshape(-1, 2), cut


def packed(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Return which pieces are in each sequence: each piece, longest first, is put where it leaves the least room."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted, those of `by_room`
    for piece in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[piece]
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(piece)
        if left := room - size:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows


def flagged(tokens: Array, mask: Array) -> Array:
    """Return a piece as int64 [tokens] with its flags; its first token has no context, so it is not trained on."""
    flags = np.where(mask & TRAINED, 0, UNTRAINED)
    flags[0] = UNTRAINED | START
    result: Array = tokens.astype(np.int64) | flags
    return result


def sequence_of(pieces: Sequence[Array], length: int, filler: int) -> Array:
    """Return flagged pieces as one sequence, int64 [length + 1], filled up with a token that is not trained on."""
    sequence = np.full(length + 1, filler | UNTRAINED, np.int64)
    position = 0
    for piece in pieces:
        sequence[position : position + len(piece)] = piece
        position += len(piece)
    sequence[position] |= START
    return sequence


def as_flagged(sequence: Array, end_of_text: int) -> Array:
    """Return a sequence of documents, int64 [tokens], flagged like one of conversations: every token is trained on."""
    result: Array = sequence.copy()
    result[0] |= START
    result[1:][sequence[:-1] == end_of_text] |= START
    return result
