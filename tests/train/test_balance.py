"""With separate documents, data ranks get sequences of equal work, and the sequences of a step stay the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.model.packing import first_tokens
from btm_scale.run_dir import RunDir
from btm_scale.train.balance import RankText, attended_pairs, balanced
from btm_scale.train.jobs import training_job
from btm_scale.train.mixture import DomainMixture

RANKS, SEQUENCES = 8, 16


def imbalance(totals: np.ndarray) -> float:
    """The work of the most loaded rank over the mean."""
    return float(totals.max() / totals.mean())


def work_of_steps(steps: int) -> np.ndarray:
    """Squared lengths of lognormal documents packed into sequences of 8,192 tokens, summed: [steps, sequences]."""
    draw = np.random.RandomState(1)
    length, count = 8192, steps * RANKS * SEQUENCES
    ends = np.cumsum(np.ceil(draw.lognormal(np.log(400), 1.5, size=count * length // 400)))
    ends = np.union1d(ends[ends < count * length], np.arange(0, count * length + 1, length)).astype(np.int64)
    squares = np.bincount(ends[:-1] // length, np.diff(ends).astype(float) ** 2)
    return squares.reshape(steps, RANKS * SEQUENCES)


def test_no_data_rank_has_much_more_work_than_the_mean() -> None:
    for work in work_of_steps(30):
        shares = balanced(work.tolist(), RANKS)
        assert sorted(item for share in shares for item in share) == list(range(len(work)))
        assert {len(share) for share in shares} == {SEQUENCES}
        assert imbalance(np.array([work[share].sum() for share in shares])) < 1.05
        # Ranks that synchronize after each micro-batch wait for the slowest in each.
        turns = work[np.array(shares)]
        assert turns.max(axis=0).sum() / turns.mean(axis=0).sum() < 1.15
        assert imbalance(work.reshape(RANKS, -1).sum(axis=1)) > 1.05, "the order of the text is not balanced"


def test_equal_sequences_are_shared_in_their_order() -> None:
    assert balanced([1.0] * 6, 2) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("window", [None, 1, 7, 20])
def test_attended_pairs_are_those_of_the_mask(window: int | None) -> None:
    lengths = [1, 7, 20, 3]
    masks = [torch.ones(length, length).tril().triu(1 - (window or length)) for length in lengths]
    assert attended_pairs(np.array(lengths), window) == sum(int(mask.sum()) for mask in masks)


@pytest.fixture(scope="module")
def mixture(prepared: tuple[RunConfig, RunDir]) -> DomainMixture:
    config, run = prepared
    job = training_job(config, "dense")
    return DomainMixture(config, run, job, job.weights, Tokenizer.load(run.tokenizer))


def test_the_index_knows_the_lengths_of_the_documents_in_a_sample(
    mixture: DomainMixture, prepared: tuple[RunConfig, RunDir]
) -> None:
    eos = Tokenizer.load(prepared[1].tokenizer).eos
    count = 64
    inputs = mixture.read(0, count)[:, :-1]
    for row, lengths in zip(inputs, mixture.document_lengths(0, count), strict=True):
        begins = first_tokens(row[None], eos)[0].nonzero()[:, 0].tolist()
        assert lengths.tolist() == np.diff([*begins, len(row)]).tolist()


@pytest.mark.parametrize("balances", [True, False])
def test_a_step_has_the_same_sequences_at_every_data_degree(mixture: DomainMixture, balances: bool) -> None:
    first, count = 16, 16
    expected = sorted(mixture.read(first, count).tolist())
    for ranks in (1, 2, 4, 8):
        texts = [RankText(mixture, rank=rank, ranks=ranks, balances=balances) for rank in range(ranks)]
        parts = [text.read(first, count) for text in texts]
        assert {len(part) for part in parts} == {count // ranks}
        assert sorted(torch.cat(parts).tolist()) == expected
        assert torch.equal(texts[-1].read(first, count), parts[-1]), "a restarted rank reads the same"


def test_without_separate_documents_ranks_read_the_text_in_its_order(mixture: DomainMixture) -> None:
    parts = [RankText(mixture, rank=rank, ranks=4, balances=False).read(8, 8) for rank in range(4)]
    assert torch.equal(torch.cat(parts), mixture.read(8, 8))
