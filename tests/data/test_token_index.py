"""Token files that are read without Megatron-core, which wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from btm_scale.data.token_index import TokenSequences, index_problem

DTYPES = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16)


def write(prefix: Path, dtype: type[np.generic], lengths: tuple[int, ...] = (3, 1, 0, 7)) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for length in lengths:
        builder.add_document(np.arange(100 + length, 100, -1).astype(dtype), [length])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_are_those_of_megatron_core(dtype: type[np.generic], tmp_path: Path) -> None:
    write(tmp_path / "tokens", dtype)
    theirs, sequences = IndexedDataset(str(tmp_path / "tokens")), TokenSequences(tmp_path / "tokens")
    assert index_problem(tmp_path / "tokens") is None
    assert len(sequences) == len(theirs) == 4
    assert sequences.lengths.tolist() == theirs.sequence_lengths.tolist()
    for number in range(4):
        assert sequences[number].dtype == theirs[number].dtype == dtype
        assert sequences[number].tolist() == theirs[number].tolist()


def test_a_sequence_beyond_the_end_of_the_file_is_not_cut_short(tmp_path: Path) -> None:
    write(tmp_path / "tokens", np.uint16)
    tokens = tmp_path / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match="smaller than requested"):
        TokenSequences(tmp_path / "tokens")[3]
