"""Settings of the GPU's libraries, which the environment may override."""

from __future__ import annotations

import os

import pytest
import torch

from btm_scale.config.layout import Layout
from btm_scale.distributed.gpu_settings import set_gpu_defaults

ALLOCATOR, CONNECTIONS = "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", CONNECTIONS):
        monkeypatch.setenv(name, "")  # restored afterwards
        del os.environ[name]


def test_segments_grow_and_tensor_ranks_have_one_connection() -> None:
    set_gpu_defaults(Layout())
    assert os.environ[ALLOCATOR] == "expandable_segments:True"
    assert CONNECTIONS not in os.environ
    set_gpu_defaults(Layout(tensor=2))
    assert os.environ[CONNECTIONS] == "1"


@pytest.mark.parametrize("name", [ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_environments_settings_are_kept(name: str) -> None:
    os.environ |= {name: "backend:native", CONNECTIONS: "8"}
    set_gpu_defaults(Layout(tensor=2))
    assert {key: os.environ.get(key) for key in (name, CONNECTIONS)} == {name: "backend:native", CONNECTIONS: "8"}
    assert sum(key.endswith("ALLOC_CONF") for key in os.environ) == 1


def test_without_cuda_the_allocator_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    set_gpu_defaults(Layout())
    assert ALLOCATOR not in os.environ
