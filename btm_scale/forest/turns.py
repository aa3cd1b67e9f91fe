"""Which commands on one run may work at the same time, and which wait for each other.

| command | holds | waits for |
|---|---|---|
| `branch`, and each rewrite of run.yaml | `config`, exclusive | other rewrites |
| `forest add`, `score` | `forest`, shared | `evaluate`, `forest remove` |
| `evaluate` | `forest`, exclusive | `forest add`, `score`, `evaluate`, `forest remove` |
| `forest remove` | all, exclusive | all of the above; it is refused during `run`, `ablate`, `mixture` and training |
| `upcycle` | `upcycle`, exclusive, and `use`, shared; to publish and score what these hold | `forest remove` |
| the stage `moe` of `run` | while it makes the mixture `upcycle`, exclusive; to publish it what `evaluate` holds | |
| `run`, `ablate`, `mixture` | `use`, shared; `run` also what its stages hold | `forest remove` |

`upcycle` and the stage `moe` do not wait for each other: the later one is refused.

A command that needs several takes them in the order config, use, forest, so that none can deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.run_dir import RunDir
from btm_scale.util.locks import ModelLock, alone, alone_at_once, held, holder_of, shared


def changing_config(run: RunDir) -> AbstractContextManager[None]:
    """Return a context in which no other process rewrites run.yaml. Read it inside, not before."""
    return alone(run.config_lock)


def using(run: RunDir) -> AbstractContextManager[None]:
    """Return the context of a command that reads experts for long, in which none is removed."""
    return shared(run.use_lock)


def scoring(run: RunDir) -> AbstractContextManager[None]:
    """Return a context in which the forest is not evaluated and no expert is removed. Any number may score."""
    return shared(run.forest_lock)


def evaluating(run: RunDir) -> AbstractContextManager[None]:
    """Return a context in which the forest and its scores do not change, and no other process evaluates them."""
    return alone(run.forest_lock)


@contextmanager
def making_mixture(run: RunDir) -> Iterator[None]:
    """Hold what making the run's mixture of experts needs. Raises ForestError if another process makes it."""
    with held(run.upcycle_lock) as is_ours:
        if not is_ours:
            raise ForestError(
                f"The mixture of experts of {run.root} is being made by {holder_of(run.upcycle_lock)}. Wait for it, or "
                "stop it."
            )
        yield


@contextmanager
def removing(run: RunDir, name: str) -> Iterator[None]:
    """Hold what a removal needs, including the config.

    Raises ForestError while a group trains or a command uses the forest for long, since it may still read the expert.
    """
    with changing_config(run), alone_at_once(run.use_lock) as is_idle:
        if not is_idle:
            raise ForestError(_in_use(run, name, holder_of(run.use_lock)))
        for lock in sorted(run.train("").rglob("lock")):
            if ModelLock.is_held(lock.parent):
                trained = str(lock.parent.relative_to(run.train("")))
                if trained == name:
                    raise ForestError(f"'{name}' is being trained in {run.root}. Stop its training before removing it.")
                raise ForestError(_in_use(run, name, f"the group that trains '{trained}'"))
        with evaluating(run):
            yield


def current_config(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the config in the run's folder, or `config` if there is none."""
    return RunConfig.load(run.config) if run.config.is_file() else config


def _in_use(run: RunDir, name: str, user: str) -> str:
    return (
        f"Cannot remove '{name}' from {run.root}: {user} is using its experts. Experts are removed only from a run "
        "that nothing trains or reads. Wait until it ends, or stop it."
    )
