"""The `mpirun` that tests start ranks with."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

# Root may start ranks, as in a container: Open MPI wants that said twice.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpirun() -> str:
    """Return the path of mpirun, beside this Python or on the PATH; skip the test where there is none, or no mpi4py."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpirun and mpi4py, for example from `pip install mpich mpi4py`")
    return found
