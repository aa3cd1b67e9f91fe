"""The text on which methods are evaluated."""

from __future__ import annotations

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.run_dir import RunDir


def load(
    prepared: tuple[RunConfig, RunDir], split: str = "test", tokens: int = 2_000, length: int = 64
) -> EvaluationText:
    return EvaluationText.load(prepared[1], "prose", split, tokens=tokens, sequence_length=length)


def test_blocks_cover_every_target_once(prepared: tuple[RunConfig, RunDir]) -> None:
    text = load(prepared)
    assert text.tokens.shape == (2_001,)
    assert text.tokens.dtype == text.block_starts.dtype == np.int64
    assert np.array_equal(text.targets, text.tokens[1:])
    assert text.block_starts.tolist() == list(range(0, 2_000, 64))
    ends = [*text.block_starts[1:], len(text.targets)]
    targets = [text.tokens[start + 1 : end + 1] for start, end in zip(text.block_starts, ends, strict=True)]
    assert np.array_equal(np.concatenate(targets), text.targets)


def test_bytes_are_those_of_the_targets_text(prepared: tuple[RunConfig, RunDir]) -> None:
    tokenizer = Tokenizer.load(prepared[1].tokenizer)
    text = load(prepared, tokens=10**9)
    counts = Fingerprint.of_domain(prepared[1], "prose").splits["test"]
    assert len(text.tokens) == counts.tokens
    first = len(tokenizer.decode(text.tokens[:1].tolist()).encode())
    assert text.bytes == counts.bytes - first


def test_a_sample_covers_the_split_and_is_a_prefix_of_a_longer_one(
    prepared: tuple[RunConfig, RunDir],
) -> None:
    short, long = load(prepared, "train", 1_000), load(prepared, "train", 8_000)
    assert np.array_equal(short.tokens, long.tokens[:1_001])
    documents = IndexedDataset(str(prepared[1].tokens("prose", "train")))
    in_order = np.concatenate([documents[i] for i in range(len(documents))])
    assert not np.array_equal(short.tokens, in_order[:1_001])


def test_different_texts_and_blocks_have_different_fingerprints(prepared: tuple[RunConfig, RunDir]) -> None:
    texts = [load(prepared), load(prepared, tokens=1_999), load(prepared, length=32), load(prepared, "dev")]
    assert len({text.fingerprint for text in texts}) == 4
    assert load(prepared).fingerprint == texts[0].fingerprint
