"""Train models of several runs, one after another: `train_models.py SPEC.json`.

The spec is a list of calls: `config` (a YAML), `settings` (as --set), `run` (the run's folder), `models`, and if the
losses on dev text are not to be measured, `dev_losses`, those of the first measurements of each model.
"""

from __future__ import annotations

from pathlib import Path

from helpers.worlds import fork_world, read_spec

from btm_scale.config.run import RunConfig
from btm_scale.run.state import open_run
from btm_scale.run.worker import train_as_rank
from btm_scale.run_dir import RunDir
from btm_scale.train import dev_loss


def rank(folder: str, model: str, dev_losses: list[float]) -> None:
    if dev_losses:
        values = iter(dev_losses)
        dev_loss.mean_loss = lambda engine, sequences: next(values)  # type: ignore[assignment]
    run = RunDir(Path(folder))
    train_as_rank(RunConfig.load(run.config), run, model)


if __name__ == "__main__":
    for call in read_spec():
        config = open_run(RunConfig.load(Path(call["config"]), tuple(call["settings"])), RunDir(Path(call["run"])))
        for model in call["models"]:
            ranks = config.shared_layout.ranks if model in ("seed", "dense") else config.expert_layout(model).ranks
            fork_world(ranks, rank, call["run"], model, call.get("dev_losses", []))
