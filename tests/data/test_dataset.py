"""One order of samples, whichever rank reads it, from any start."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from btm_scale.config.run import RunConfig
from btm_scale.data.dataset import TrainingSamples
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir

LENGTH = 64


@pytest.fixture
def run(prepared: tuple[RunConfig, RunDir], tmp_path: Path) -> RunDir:
    """A copy of the prepared run without an index."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(prepared[1].root, copy.root, ignore=shutil.ignore_patterns(".index"))
    return copy


def samples_of(run: RunDir, samples: int = 300, seed: int = 1, **changes: object) -> TrainingSamples:
    arguments = {"weights": {"code": 1.0, "prose": 1.0}, "sequence_length": LENGTH} | changes
    tokenizer = Tokenizer.load(run.tokenizer)
    return TrainingSamples(run, tokenizer=tokenizer, samples=samples, seed=seed, **arguments)  # type: ignore[arg-type]


def test_any_range_of_samples_can_be_read_from_any_start(run: RunDir) -> None:
    expected_order = samples_of(run).read(0, 300)
    assert expected_order.shape == (300, LENGTH + 1)
    assert expected_order.dtype == torch.int64
    again = samples_of(run)
    for first, count in ((250, 50), (0, 1), (37, 64), (299, 1)):
        assert torch.equal(again.read(first, count), expected_order[first : first + count])
    with pytest.raises(IndexError):
        again.read(299, 2)


def test_the_order_depends_on_the_seed_and_not_on_the_cached_index(run: RunDir) -> None:
    expected_order = samples_of(run).read(0, 300)
    shutil.rmtree(run.index_cache)
    assert torch.equal(samples_of(run).read(0, 300), expected_order)
    assert not torch.equal(samples_of(run, seed=2).read(0, 300), expected_order)


def test_one_epoch_holds_every_token_once(run: RunDir) -> None:
    counts_of_train = Fingerprint.of_domain(run, "prose").splits["train"]
    samples = (counts_of_train.tokens - 1) // LENGTH
    read = samples_of(run, samples, weights={"prose": 1.0}).read(0, samples)
    documents = IndexedDataset(str(run.tokens("prose", "train")))
    expected = np.bincount(np.concatenate([documents[i] for i in range(len(documents))]), minlength=512)
    counts = np.bincount(read[:, 1:].flatten().numpy(), minlength=512)
    # The first token is no label, and the last, partial sequence is left out.
    assert 0 <= (expected - counts).sum() <= LENGTH
    assert (counts <= expected).all()


def test_more_samples_than_text_repeat_it(run: RunDir) -> None:
    counts_of_train = Fingerprint.of_domain(run, "prose").splits["train"]
    samples = 3 * counts_of_train.tokens // LENGTH
    read = samples_of(run, samples, weights={"prose": 1.0}).read(0, samples)
    assert len(read) == samples
    counts = np.bincount(read[:, 1:].flatten().numpy(), minlength=512)
    once = np.bincount(samples_of(run, samples // 3, weights={"prose": 1.0}).read(0, samples // 3).flatten().numpy())
    common = once.argmax()
    assert abs(counts[common] / once[common] - 3) < 0.2


def test_weights_are_fractions_of_the_samples_throughout(run: RunDir) -> None:
    blend = samples_of(run, 400, weights={"code": 6, "prose": 2, "absent": 0})
    assert np.bincount(blend._domain_of[:100]).tolist() == [75, 25]
    assert np.bincount(blend._domain_of).tolist() == [300, 100]
    assert blend.read(0, 400).shape == (400, LENGTH + 1)


def test_parts_are_disjoint_and_cover_every_document(run: RunDir) -> None:
    documents = IndexedDataset(str(run.tokens("prose", "train")))
    seen = []
    for which in range(3):
        part = samples_of(run, 50, seed=which, weights={"prose": 1.0}, part=(which, 3))
        assert part.read(0, 50).shape == (50, LENGTH + 1)
        seen.append(set(part._domains[0].indices.tolist()))
    assert set.union(*seen) == set(range(len(documents)))
    assert sum(map(len, seen)) == len(documents)
    with pytest.raises(DataError, match=r"Part 1 of 5000 of domain 'prose' has \d+ documents, too few"):
        samples_of(run, 50, weights={"prose": 1.0}, part=(0, 5_000))


def test_other_text_under_the_same_name_gets_another_index(run: RunDir) -> None:
    before = samples_of(run, weights={"code": 1.0}).read(0, 300)
    # Replace code's token files by the other domain's.
    shutil.rmtree(run.domain("code"))
    shutil.copytree(run.domain("prose"), run.domain("code"))
    after = samples_of(run, weights={"code": 1.0}).read(0, 300)
    assert not torch.equal(before, after)
    assert torch.equal(after, samples_of(run, weights={"prose": 1.0}).read(0, 300))


def test_a_domain_without_token_files_or_weight_is_an_error(run: RunDir) -> None:
    with pytest.raises(DataError, match=r"data/law has no token files. Prepare the run first"):
        samples_of(run, weights={"law": 1.0})
    with pytest.raises(DataError, match="No domain has a weight above 0"):
        samples_of(run, weights={"code": 0})


def _read_in_group(root: Path, store: Path, rank: int, ranks: int) -> torch.Tensor:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        return samples_of(RunDir(root)).read(100, 20)
    finally:
        torch.distributed.destroy_process_group()


def test_two_groups_can_build_and_read_an_index_at_once(run: RunDir, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_read_in_group, run.root, tmp_path / "store", rank, 2) for rank in range(2)]
        expected = samples_of(run).read(100, 20)
        results = [future.result() for future in waiting]
    assert all(torch.equal(result, expected) for result in results)
    assert [path.name.startswith(".") for path in run.index_cache.iterdir()] == [False]
