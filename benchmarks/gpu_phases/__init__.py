"""The phases of `gpu_day.py`: what is measured, in the order of its use."""

from __future__ import annotations

from gpu_phases import experiments, scoring, tests, training, tuning
from gpu_phases.ledger import Row, Site

_ROWS = {
    1: [tests.rows, scoring.rows_of_ours],
    2: [scoring.rows_of_peers, scoring.rows_of_many_experts],
    3: [tuning.rows],
    4: [training.rows],
    5: [experiments.rows],
}
PHASES = tuple(_ROWS)


def rows_of(phase: int, site: Site) -> list[Row]:
    """Return the rows of a phase, most useful first."""
    return [row for rows in _ROWS[phase] for row in rows(site)]
