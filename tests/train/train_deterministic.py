"""Train the seed LM of a prepared run as its launcher's rank does, and write the settings that affect its bits.

`train_deterministic.py SPEC.json`: the spec has `run` (its folder, with run.yaml) and `result`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec

from btm_scale.config.run import RunConfig
from btm_scale.model import gpt
from btm_scale.run.worker import train_as_rank
from btm_scale.run_dir import SEED, RunDir


def train(spec: dict[str, Any]) -> None:
    embeddings = []
    build = gpt.ExpertModel.__init__

    def recorded(self: gpt.ExpertModel, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)
        embeddings.append(self.embedding.word_embeddings.deterministic_mode)

    gpt.ExpertModel.__init__ = recorded  # type: ignore[method-assign]
    run = RunDir(Path(spec["run"]))
    train_as_rank(RunConfig.load(run.config), run, SEED)
    settings = {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "cudnn": torch.backends.cudnn.deterministic,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "embeddings": all(embeddings) and bool(embeddings),
    }
    Path(spec["result"]).write_text(json.dumps(settings))


if __name__ == "__main__":
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    fork_world(1, train, read_spec())
