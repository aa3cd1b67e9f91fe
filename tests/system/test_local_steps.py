"""Data ranks that take local steps between outer steps (DiLoCo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.launcher import TESTS
from helpers.small_models import TINY_SHAPE
from helpers.worlds import run_script
from safetensors.torch import load_file

from btm_scale.train import diloco

STEPS, EVERY = 20, 10


class OneRank:
    """A group of one rank, whose mean is the value itself."""

    @staticmethod
    def get_world_size(group: object) -> int:
        return 1

    @staticmethod
    def all_reduce(value: torch.Tensor, group: object) -> None:
        pass


def test_the_outer_step_is_nesterov_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diloco, "comm", OneRank)
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
    sgd = torch.optim.SGD([weights], lr=0.7, momentum=0.9, nesterov=True)
    parameter = torch.nn.Parameter(weights.detach().clone())
    step = diloco.OuterStep(None, lr=0.7, momentum=0.9)  # type: ignore[arg-type]
    step.begin(parameter, parameter.detach())
    current = parameter.detach()
    for _ in range(4):
        moved = torch.randn(5, 3, generator=generator)
        weights.grad = moved
        sgd.step()
        current, _ = step(parameter, current - moved, {})
        torch.testing.assert_close(current, weights.detach())


@pytest.mark.slow
def test_local_steps_train_as_well_with_a_fraction_of_the_traffic(tmp_path: Path) -> None:
    group = {"data": 2, "zero": 1, "precision": "fp32", "micro_batch": 2}
    layouts = {
        "plain": group,
        "every-step": group | {"sync_every": 1, "outer_lr": 0.1},
        "local": group | {"sync_every": EVERY},
        "local-tensor": group | {"tensor": 2, "data": 2, "sync_every": EVERY},
    }
    spec = {"shape": {"family": "llama", **TINY_SHAPE}, "steps": STEPS, "sequences": 8, "folder": str(tmp_path)}
    four = {"local-tensor": layouts["local-tensor"]}
    two = {name: layout for name, layout in layouts.items() if name not in four}
    specs = [spec | {"layouts": layouts} for layouts in (two, four)]
    run_script(TESTS / "train" / "train_layouts.py", specs, tmp_path)
    results = {name: load_file(tmp_path / f"{name}.safetensors") for name in layouts}

    for name, value in results["plain"].items():
        assert torch.equal(results["every-step"][name], value), "sync_every 1 is plain data parallelism"
    local, plain = results["local"], results["plain"]
    assert local["losses"][-1] < plain["losses"][0] - 0.3
    assert abs(float(local["losses"][-1] - plain["losses"][-1])) < 0.15
    assert int(local["bytes"]) < int(plain["bytes"]) / 2
    torch.testing.assert_close(results["local-tensor"]["losses"], local["losses"], atol=1e-4, rtol=0)
