"""Which parts of btm-scale work on a machine, from what was found there."""

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
    """Whether something works here: if not, why; if so, with which limit, if any."""

    name: str
    works: bool
    note: str = ""


def verdicts(findings: Sequence[Finding]) -> list[Verdict]:
    """What works, in the order of the report."""
    found = {finding.name: finding for finding in findings}
    gpus = [finding for finding in findings if finding.part == "devices" and finding.name.startswith("GPU")]
    gpu = next((one for one in gpus if one.is_usable), gpus[0] if gpus else None)
    with_gpu = found | ({"GPU": gpu} if gpu else {})
    on_gpu = _verdict(TRAIN_ON_GPU, (*_TRAIN, "GPU"), with_gpu)
    usable = sum(one.is_usable for one in gpus)
    if on_gpu.works:
        notes = [f"{usable} of {len(gpus)}" if len(gpus) > 1 else ""]
        notes.append("" if found["NCCL"].is_usable else "one GPU per group: NCCL is missing")
        on_gpu = Verdict(TRAIN_ON_GPU, True, "; ".join(filter(None, notes)))
    triton = ("torch", "triton", "GPU", "C compiler", "Python.h")
    kernels = _verdict("Triton kernels", triton if "ptxas" not in found else (*triton, "ptxas"), with_gpu)
    if not kernels.works and found["torch"].is_usable:
        kernels = Verdict(kernels.name, False, f"{kernels.note}; PyTorch computes the same")
    return [
        _verdict(TRAIN_ON_CPU, _TRAIN, found),
        on_gpu,
        _verdict(MERGE, _CORE, found),
        kernels,
        _verdict("--launcher slurm", ("SLURM",), found),
        _hostfile(found),
        _mpi(found),
    ]


def core_works(made: Sequence[Verdict]) -> bool:
    """Whether this machine can train or merge."""
    return any(verdict.works for verdict in made if verdict.name in (TRAIN_ON_CPU, TRAIN_ON_GPU, MERGE))


def _verdict(name: str, needs: Sequence[str], found: dict[str, Finding]) -> Verdict:
    lacking = [found[need] for need in needs if need in found and not found[need].is_usable]
    # "torch is broken" explains what was not checked because of it.
    reasons = [one for one in lacking if one.state != "unchecked"] or lacking
    return Verdict(name, not lacking, ", ".join(_reason(one) for one in reasons))


def _reason(finding: Finding) -> str:
    if finding.name.startswith("GPU"):
        return "no GPU" if finding.state == "missing" else "the GPU cannot be used"
    return f"{finding.name} is {'too old' if finding.state == 'old' else finding.state}"


def _hostfile(found: dict[str, Finding]) -> Verdict:
    made = _verdict("--launcher deepspeed", ("deepspeed", "ssh"), found)
    if made.works and not found["pdsh"].is_usable:
        return Verdict(made.name, True, f"with launch.deepspeed.connect only: pdsh is {found['pdsh'].state}")
    return made


def _mpi(found: dict[str, Finding]) -> Verdict:
    made = _verdict("--launcher mpi", ("mpi4py", "mpirun"), found)
    library, launcher = (mpi_family(found[name].found) for name in ("mpi4py", "mpirun"))
    if made.works and library and launcher and library != launcher:
        return Verdict(made.name, False, f"mpi4py uses {library}, mpirun is {launcher}'s: every rank would be alone")
    return made
