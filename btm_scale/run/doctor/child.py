"""The child process of `doctor`: it imports libraries that may fail, hang or crash, and writes each answer at once.

    python -m btm_scale.run.doctor.child ANSWERS NAME...

Each line of the file ANSWERS is a JSON object: {"begin": NAME}, then {"name": NAME, "answer": {...}} or
{"name": NAME, "error": "..."}. The process ends after an error: a half-imported library could affect the next check.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from btm_scale.run.doctor.finding import described

Answer = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Check each name; returns the exit code."""
    with Path(arguments[0]).open("a") as file:

        def write(line: Answer) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for name in arguments[1:]:
            write({"begin": name})
            try:
                write({"name": name, "answer": CHECKS.get(name, lambda name=name: _imported(name))()})
            except BaseException as error:  # a library may call sys.exit
                write({"name": name, "error": described(error)})
                return 1
    return 0


def _imported(module: str) -> Answer:
    importlib.import_module(module)
    return {}


def _torch() -> Answer:
    import torch

    build = "CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    has_nccl = build != "CPU" and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else ""
    return {"build": build, "nccl": nccl}


def _gpus() -> Answer:
    """Return the GPUs that torch finds, after a computation on each, which fails on a busy or unsupported GPU."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return {"gpus": [], "reason": str(caught[0].message).splitlines()[0][:300] if caught else ""}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu = {"name": properties.name, "memory": properties.total_memory, "error": ""}
        gpu["capability"] = f"{properties.major}.{properties.minor}"
        try:
            torch.ones(8, device=f"cuda:{index}").mul_(2).sum().item()
        except Exception as error:
            gpu["error"] = described(error)
        gpus.append(gpu)
    return {"gpus": gpus, "reason": ""}


def _deepspeed() -> Answer:
    import torch

    from btm_scale.util.imports import import_uncompiled

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_uncompiled("deepspeed")
    return {}


def _precision() -> Answer:
    from btm_scale.distributed.precision import DevicePrecisions, device_name, fast_precision, possible_precisions

    return asdict(DevicePrecisions(device_name(), possible_precisions(), fast_precision()))


def _megatron() -> Answer:
    from btm_scale.util.imports import import_uncompiled

    import_uncompiled("megatron.core")
    return {}


def _triton() -> Answer:
    """Return the path of Triton's assembler. No kernel is compiled, because that takes seconds."""
    import triton

    if os.environ.get("TRITON_PTXAS_PATH"):
        assembler = Path(os.environ["TRITON_PTXAS_PATH"])
    else:
        assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return {"assembler": str(assembler), "has_assembler": os.access(assembler, os.X_OK)}


def _mpi() -> Answer:
    import mpi4py

    mpi4py.rc.initialize = False  # MPI_Init could wait for other ranks
    from mpi4py import MPI

    first = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    return {"library": " ".join(first.split())}


CHECKS: dict[str, Callable[[], Answer]] = {
    "torch": _torch,
    "gpus": _gpus,
    "deepspeed": _deepspeed,
    "precision": _precision,
    "megatron.core": _megatron,
    "triton": _triton,
    "mpi4py": _mpi,
}

if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # interpreter shutdown is slow and may crash
