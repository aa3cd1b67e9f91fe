"""The `mpirun` with which tests start ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

# Open MPI needs both to let root start ranks, as in a container.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpirun() -> str:
    """Return the path of mpirun, beside this Python or on the PATH; skip the test if it or mpi4py is missing."""
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpirun and mpi4py, for example from `pip install mpich mpi4py`")
    return program
