"""Check GPUs with their memory and compute capability, NCCL, and the precisions that models can train in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from btm_scale.run.doctor.ask import Reply
from btm_scale.run.doctor.finding import Finding, size
from btm_scale.util.device_query import TorchDevices
from btm_scale.util.devices import driver_nodes, hiding_variable, why_none

_PART = "devices"
_NEEDED = "training, scoring and generating on a GPU"


def device_findings(
    replies: Mapping[str, Reply], driver_gpus: Sequence[str], environment: Mapping[str, str]
) -> list[Finding]:
    """Return the findings on the devices that torch can use.

    Args:
        replies: the answers of the child process.
        driver_gpus: the GPUs that the driver lists, which torch may not see.
        environment: the variables that choose GPUs, and SLURM's.
    """
    return [*_gpus(replies, driver_gpus, environment), *_nccl(replies), *_precision(replies)]


def triton_finding(replies: Mapping[str, Reply]) -> list[Finding]:
    """Return whether Triton has its assembler; no finding without a working Triton."""
    answer = replies.get("triton", Reply(error="not asked")).answer
    build = replies.get("torch", Reply()).answer.get("build", "")
    if not answer or str(build).startswith("ROCm"):  # has its own assembler
        return []
    place, needed = answer["assembler"], "Triton kernels on an NVIDIA GPU"
    if answer["has_assembler"]:
        return [Finding("programs", "ptxas", "ok", place, needed)]
    remedy = "reinstall triton, or set TRITON_PTXAS_PATH to the CUDA toolkit's ptxas"
    return [Finding("programs", "ptxas", "missing", f"no program at {place}", needed, remedy)]


def _gpus(replies: Mapping[str, Reply], driver_gpus: Sequence[str], environment: Mapping[str, str]) -> list[Finding]:
    reply = replies.get("gpus", Reply(error="torch is not installed", is_asked=False))
    findings = []
    for index, gpu in enumerate(reply.answer.get("gpus", ())):
        text = f"{gpu['name']}, {size(gpu['memory'])}, compute capability {gpu['capability']}"
        if gpu["error"]:
            remedy = "see nvidia-smi or rocm-smi: is it busy, failing, or too new or old for this build of torch?"
            findings.append(Finding(_PART, f"GPU {index}", "broken", f"{text}: {gpu['error']}", _NEEDED, remedy))
        else:
            findings.append(Finding(_PART, f"GPU {index}", "ok", text))
    if findings:
        return findings
    if reply.error:
        return [Finding(_PART, "GPU", reply.state, reply.error, _NEEDED)]
    build = replies["torch"].answer.get("build", "") if "torch" in replies else ""
    nodes = driver_nodes()
    listed = "; ".join(driver_gpus or nodes)
    hidden = hiding_variable(environment)
    if hidden:
        text = f"hidden by {hidden}='{environment[hidden]}'" + (f": {listed}" if listed else "")
        return [Finding(_PART, "GPU", "missing", text, _NEEDED, f"unset {hidden}" if listed else "")]
    if listed:
        detected = TorchDevices(build, problem=reply.answer["reason"])
        reason, remedy = why_none(detected, environment, nodes or list(driver_gpus))
        return [Finding(_PART, "GPU", "broken", f"{listed}: {reason}", _NEEDED, remedy)]
    return [Finding(_PART, "GPU", "missing", reply.answer.get("reason", ""), _NEEDED)]


def _nccl(replies: Mapping[str, Reply]) -> list[Finding]:
    """Check NCCL, which CUDA and ROCm builds of torch include; ranks on CPUs use gloo."""
    answer, needed = replies.get("torch", Reply()).answer, "groups of more than one GPU"
    if answer.get("build", "CPU") == "CPU":
        return []
    if not answer["nccl"]:
        return [Finding(_PART, "NCCL", "missing", "", needed, "install a build of torch that has NCCL")]
    return [Finding(_PART, "NCCL", "ok", answer["nccl"], needed)]


def _precision(replies: Mapping[str, Reply]) -> list[Finding]:
    reply = replies.get("precision", Reply(error="DeepSpeed or torch is not installed", is_asked=False))
    if reply.error:
        return [Finding(_PART, "precision", reply.state, reply.error, "training")]
    answer = reply.answer
    text = f"{', '.join(answer['possible'])} on {answer['device']}; layout.precision: auto is {answer['fast']}"
    return [Finding(_PART, "precision", "ok", text)]
