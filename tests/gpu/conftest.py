"""The device of these tests: `pytest tests/gpu` runs on a GPU, and is skipped without one.

`make test` does not collect this folder. Nothing here needs more than PyTorch 2.11 and Triton 3.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip every test of this folder, with the reason, where PyTorch sees no GPU."""
    if torch.cuda.is_available():
        return
    reason = f"PyTorch {torch.__version__} sees no GPU"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["current", "other"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The current GPU and, if there are several, another one."""
    if request.param == "current":
        return torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    return torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())


@pytest.fixture(autouse=True)
def triton_runs() -> Iterator[None]:
    """Fail a test in which an operator fell back on the reference or on smaller blocks."""
    from btm_scale.kernels import paths

    paths.forget_refusals()
    yield
    assert not paths.refusals(), "the GPU refused a shape of the tuning table"
    last = paths.last_path()
    assert last is None or last.backend == "triton"
