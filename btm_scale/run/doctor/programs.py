"""Check the programs that are called: C and C++ compilers, ninja, mpirun, SLURM, ssh and pdsh."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from btm_scale.run.doctor.finding import Finding, guarded, program, run_program

_PART = "programs"
_KERNELS = "Triton kernels on a GPU"
_OPERATORS = "DeepSpeed operators that are compiled when first used"


def program_findings() -> list[Finding]:
    """Return one finding per program."""
    checks = {
        "C compiler": c_compiler,
        "C++ compiler": cxx_compiler,
        "Python.h": python_headers,
        "ninja program": ninja,
        "mpirun": mpirun,
        "SLURM": slurm,
        "ssh": ssh,
        "pdsh": pdsh,
    }
    return [finding for name, check in checks.items() for finding in guarded(_PART, name, check)]


def c_compiler() -> Finding:
    """Check the C compiler that Triton would use."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    return _version("C compiler", names, "--version", _KERNELS, "apt-get install gcc, or set CC")


def cxx_compiler() -> Finding:
    """Check the C++ compiler that torch extensions, and so DeepSpeed operators, would use."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return _version("C++ compiler", names, "--version", _OPERATORS, "apt-get install g++, or set CXX")


def python_headers() -> Finding:
    """Check Python's headers: Triton compiles a Python module for each kernel."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    needed = f"{_KERNELS}; {_OPERATORS}"
    if header.is_file():
        return Finding(_PART, "Python.h", "ok", str(header), needed)
    remedy = f"install the headers of this Python, such as python{sysconfig.get_python_version()}-dev"
    return Finding(_PART, "Python.h", "missing", "", needed, remedy)


def ninja() -> Finding:
    """Check the program ninja, which is part of the PyPI package."""
    return _version("ninja program", ("ninja",), "--version", _OPERATORS, "pip install ninja")


def mpirun() -> Finding:
    """Check mpirun and its MPI implementation."""
    finding = _version(
        "mpirun",
        ("mpirun",),
        "--version",
        "--launcher mpi and mpirun btm-scale merge",
        "pip install mpich, load the site's MPI module, or set launch.mpi.command",
    )
    if finding.state != "ok":
        return finding
    path = program("mpirun") or ""
    output = run_program(path, "--version").output
    version = next((line.split()[-1] for line in output.splitlines() if line.strip().startswith("Version:")), "")
    text = f"MPICH {version} at {path}" if mpi_family(output) == "MPICH" and version else finding.found
    return Finding(_PART, "mpirun", "ok", text, finding.needed_for)


def mpi_family(text: str) -> str | None:
    """Return `Open MPI` or `MPICH` from the version text of an mpirun or library; None if it is neither.

    An mpirun can start ranks of any MPI of its family. Ranks of the other family each run as a world of one.
    """
    lower = text.lower()
    if any(word in lower for word in ("open mpi", "openmpi", "openrte", "prte")):
        return "Open MPI"
    return "MPICH" if any(word in lower for word in ("mpich", "hydra", "intel(r) mpi", "mvapich")) else None


def slurm() -> Finding:
    """Check SLURM's commands, and whether a controller answers them."""
    needed = "--launcher slurm"
    missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if program(name) is None]
    if missing:
        remedy = "run btm-scale where the commands exist, such as a login node; --dry-run writes the scripts anywhere"
        return Finding(_PART, "SLURM", "missing", f"no {', '.join(missing)}", needed, remedy)
    path = program("sbatch") or ""
    version, query = (
        run_program(path, "--version"),
        run_program(program("sinfo") or "sinfo", "-h", "-o", "%R"),
    )
    for ran in (version, query):
        if ran.code != 0:
            remedy = "check that SLURM_CONF or /etc/slurm/slurm.conf names a cluster whose controller runs"
            return Finding(_PART, "SLURM", "broken", f"{path}: {ran.lines[-1]}", needed, remedy)
    partitions = sorted(set(query.output.split()))
    text = f"{version.lines[0]}; partitions {', '.join(partitions) or 'none'}"
    return Finding(_PART, "SLURM", "ok", text, needed)


def ssh() -> Finding:
    """Check the ssh client."""
    return _version("ssh", ("ssh",), "-V", "--launcher deepspeed", "apt-get install openssh-client")


def pdsh() -> Finding:
    """Check pdsh, by which DeepSpeed reaches hosts unless the config sets another command."""
    remedy = "apt-get install pdsh, or set launch.deepspeed.connect: [ssh, -tt, '{host}']"
    return _version("pdsh", ("pdsh",), "-V", "--launcher deepspeed without launch.deepspeed.connect", remedy)


def gpus_of_driver() -> list[str]:
    """Return the GPUs that nvidia-smi lists, each with its driver version, whether or not torch sees them."""
    path = program("nvidia-smi")
    if path is None:
        return []
    ran = run_program(path, "--query-gpu=name,driver_version", "--format=csv,noheader")
    return [line.strip() for line in ran.output.splitlines() if line.strip()] if ran.code == 0 else []


def driver_findings() -> list[Finding]:
    """Return the kernel drivers of GPUs."""
    findings = []
    for label, name in (("NVIDIA driver", "nvidia"), ("AMD driver", "amdgpu")):
        version = Path("/sys/module") / name / "version"
        if version.parent.is_dir():
            text = version.read_text().strip() if version.is_file() else "of the kernel"
            findings.append(Finding("devices", label, "ok", text))
    return findings


def _version(name: str, programs: tuple[str | None, ...], flag: str, needed_for: str, remedy: str) -> Finding:
    path = program(*(given.split()[0] for given in programs if given and given.strip()))
    if path is None:
        return Finding(_PART, name, "missing", "", needed_for, remedy)
    ran = run_program(path, flag)
    if ran.code != 0:
        return Finding(_PART, name, "broken", f"{path}: {ran.lines[0]}", needed_for, remedy)
    return Finding(_PART, name, "ok", f"{ran.lines[0]} at {path}", needed_for)
