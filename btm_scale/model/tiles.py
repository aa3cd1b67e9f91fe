"""The size of the tiles in which a recomputed layer runs its MLP. Imports no torch."""

from __future__ import annotations


def rows_per_tile(hidden: int, batch: int) -> int:
    """Return the positions of a tile, of each of `batch` sequences: about as many tokens as a hidden state has numbers.

    The inner activations of a tile then take as much memory as the MLP's weights, and its matrix products are large.
    """
    return max(1, hidden // batch)
