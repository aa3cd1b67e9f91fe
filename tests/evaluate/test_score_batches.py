"""Which blocks are scored together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from btm_scale.evaluate import score
from btm_scale.model.gpt import ExpertModel


@pytest.mark.parametrize(
    ("experts", "has_chats", "rows"),
    [
        pytest.param(0, True, [3], id="conversations are padded"),
        pytest.param(4, True, [1, 2], id="a mixture of experts would route the padding"),
        pytest.param(0, False, [1, 2], id="plain text is not padded"),
    ],
)
def test_blocks_are_padded_only_where_nothing_counts_the_padding(
    experts: int, has_chats: bool, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def log_probs(group: Any, network: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(inputs))
        return -targets.float()

    monkeypatch.setattr(score, "_log_probs", log_probs)
    network = Mock(spec=ExpertModel)
    network.shape = SimpleNamespace(experts=experts)
    group: Any = SimpleNamespace(
        layout=SimpleNamespace(replicas=1), replica_rank=0, replica_group=Mock(), device=torch.device("cpu")
    )
    counted = np.ones(10, bool) if has_chats else None
    text: Any = SimpleNamespace(tokens=np.arange(11), block_starts=np.array([0, 3, 7]), counted=counted)
    assert score.text_log_probs(group, network, text).tolist() == (-np.arange(1.0, 11)).tolist()
    assert seen == rows
