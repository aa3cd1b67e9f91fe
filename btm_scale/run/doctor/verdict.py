"""Decide which parts of btm-scale work on a machine, from the findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from btm_scale.run.doctor.finding import Finding
from btm_scale.run.doctor.programs import mpi_family

_CORE = ("system", "Python", "torch", "numpy", "pydantic", "ruamel.yaml")
_TRAIN = (
    *_CORE,
    "deepspeed",
    "megatron-core",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "precision",
)

TRAIN_ON_CPU, TRAIN_ON_GPU, MERGE = "train on CPU", "train on GPU", "merge and convert"


@dataclass(frozen=True)
class Verdict:
    """Whether a feature works on this machine, and the reason or limit."""

    name: str
    works: bool
    note: str = ""


def verdicts(findings: Sequence[Finding]) -> list[Verdict]:
    """Return the verdicts in the order of the report."""
    by_name = {finding.name: finding for finding in findings}
    gpus = [finding for finding in findings if finding.part == "devices" and finding.name.startswith("GPU")]
    gpu = next((one for one in gpus if one.is_usable), gpus[0] if gpus else None)
    with_gpu = by_name | ({"GPU": gpu} if gpu else {})
    on_gpu = _verdict(TRAIN_ON_GPU, (*_TRAIN, "GPU"), with_gpu)
    usable = sum(one.is_usable for one in gpus)
    if on_gpu.works:
        notes = [f"{usable} of {len(gpus)}" if len(gpus) > 1 else ""]
        notes.append("" if by_name["NCCL"].is_usable else "one GPU per group: NCCL is missing")
        on_gpu = Verdict(TRAIN_ON_GPU, True, "; ".join(filter(None, notes)))
    triton = ("torch", "triton", "GPU", "C compiler", "Python.h")
    kernels = _verdict("Triton kernels", triton if "ptxas" not in by_name else (*triton, "ptxas"), with_gpu)
    if not kernels.works and by_name["torch"].is_usable:
        kernels = Verdict(kernels.name, False, f"{kernels.note}; PyTorch computes the same")
    return [
        _verdict(TRAIN_ON_CPU, _TRAIN, by_name),
        on_gpu,
        _verdict(MERGE, _CORE, by_name),
        kernels,
        _verdict("--launcher slurm", ("SLURM",), by_name),
        _hostfile(by_name),
        _mpi(by_name),
    ]


def core_works(results: Sequence[Verdict]) -> bool:
    """Return whether this machine can train or merge."""
    return any(verdict.works for verdict in results if verdict.name in (TRAIN_ON_CPU, TRAIN_ON_GPU, MERGE))


def _verdict(name: str, needs: Sequence[str], by_name: dict[str, Finding]) -> Verdict:
    lacking = [by_name[need] for need in needs if need in by_name and not by_name[need].is_usable]
    # "torch is broken" explains what was not checked because of it.
    reasons = [one for one in lacking if one.state != "unchecked"] or lacking
    return Verdict(name, not lacking, ", ".join(_reason(one) for one in reasons))


def _reason(finding: Finding) -> str:
    if finding.name.startswith("GPU"):
        return "no GPU" if finding.state == "missing" else "the GPU cannot be used"
    return f"{finding.name} is {'too old' if finding.state == 'old' else finding.state}"


def _hostfile(by_name: dict[str, Finding]) -> Verdict:
    verdict = _verdict("--launcher deepspeed", ("deepspeed", "ssh"), by_name)
    if verdict.works and not by_name["pdsh"].is_usable:
        return Verdict(verdict.name, True, f"with launch.deepspeed.connect only: pdsh is {by_name['pdsh'].state}")
    return verdict


def _mpi(by_name: dict[str, Finding]) -> Verdict:
    verdict = _verdict("--launcher mpi", ("mpi4py", "mpirun"), by_name)
    library, launcher = (mpi_family(by_name[name].found) for name in ("mpi4py", "mpirun"))
    if verdict.works and library and launcher and library != launcher:
        return Verdict(verdict.name, False, f"mpi4py uses {library}, but mpirun is {launcher}'s: ranks would run alone")
    return verdict
