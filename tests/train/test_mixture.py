from __future__ import annotations

import torch

from btm_scale.config.run import RunConfig
from btm_scale.config.training import BudgetConfig, LastPartConfig
from btm_scale.data.dataset import TrainingSamples
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job
from btm_scale.train.mixture import DomainMixture

Prepared = tuple[RunConfig, RunDir]


def with_last_part(config: RunConfig, share: float, **weights: float) -> RunConfig:
    budget = config.budget.model_copy(update={"last": LastPartConfig(share=share, weights=weights)})
    return config.model_copy(update={"budget": BudgetConfig.model_validate(budget.model_dump())})


def test_the_last_part_of_the_schedule_uses_other_weights(prepared: Prepared) -> None:
    config, run = prepared
    config = with_last_part(config, 0.25, code=1e6)
    job = training_job(config, "dense")
    tokenizer = Tokenizer.load(run.tokenizer)
    mixture = DomainMixture(config, run, job, job.weights, tokenizer)
    plain = TrainingSamples(
        run,
        job.weights,
        tokenizer,
        sequence_length=config.budget.sequence_length,
        samples=job.samples,
        seed=config.random_seed,
    )
    early, late = [], []
    for step in range(1, job.steps + 1):
        first = job.first_sample + (step - 1) * job.sequences
        rows = mixture.read(first, job.sequences)
        if job.progress_at(step) <= 0.75:
            assert torch.equal(rows, plain.read(first, job.sequences))
            early.append(rows)
        else:
            late.append(rows)

    def share_of_code(batches: list[torch.Tensor]) -> float:
        rows = torch.cat(batches).tolist()
        return sum("self" in tokenizer.decode(row) or "def " in tokenizer.decode(row) for row in rows) / len(rows)

    assert len(late) * 2 in range(job.steps - 2, job.steps + 3)
    assert share_of_code(late) > 1.5 * share_of_code(early)


def test_a_model_without_the_reweighted_domain_reads_the_same_samples(prepared: Prepared) -> None:
    config, run = prepared
    config = with_last_part(config, 0.5, code=3.0)
    job = training_job(config, "prose")
    tokenizer = Tokenizer.load(run.tokenizer)
    mixture = DomainMixture(config, run, job, job.weights, tokenizer)
    plain = DomainMixture(
        config.model_copy(update={"budget": config.budget.model_copy(update={"last": None})}),
        run,
        job,
        job.weights,
        tokenizer,
    )
    assert torch.equal(mixture.read(job.samples - 2, 2), plain.read(job.samples - 2, 2))
