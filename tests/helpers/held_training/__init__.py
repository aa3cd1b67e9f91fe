"""Training that waits after a step for its test, which then acts in the middle of it, however slow the test is.

Without it, a small model could take its last step before a test on busy cores sees the first.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class HeldTraining:
    """Models whose training waits after the given steps, each until it is released or asked to stop.

    A context manager, which releases all. A command started with `environment`, and its ranks, import sitecustomize.py
    of this folder, which waits.
    """

    def __init__(self, folder: Path, steps: Mapping[str, int]) -> None:
        own = Path(tempfile.mkdtemp(prefix="held-", dir=folder))
        self._released = {model: own / f"{model} is released" for model in steps}
        held = {model: [step, str(self._released[model])] for model, step in steps.items()}
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        self.environment = {"HELD_TRAINING": json.dumps(held), "PYTHONPATH": path}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for model in self._released:
            self.release(model)

    def release(self, model: str) -> None:
        """Let the model's training go on."""
        self._released[model].touch()
