"""Training speed and memory beside plain PyTorch, the loss beside its peers, and where the time of a step goes."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_phases.ledger import SCRIPT, Row, Site, UnavailableError

_TRAIN = str(SCRIPT.parent / "train_gpu.py")
_STEPS = 8
_SIZES = {  # preset: sequence length, sequences per step, micro-batch
    "gpt2-125m": (1024, 64, 32),
    "llama-1.3b": (2048, 32, 4),
}
_TOY_SIZES = {"llama-1m": (64, 4, 2)}
_LOSSES = {  # tokens of a micro-batch, hidden size, vocabulary
    "paper-125m": (32_768, 768, 50_304),
    "llama-1.3b": (8192, 2048, 32_000),
    "llama-3.1-8b": (8192, 4096, 128_256),
}
_TOY_LOSSES = {"toy": (96, 32, 300)}
_CHUNKS = (None, 512, 2048, 4096)  # tokens; None: the loss's own choice
_PEERS = ("eager", "compile", "torch_linear_cross_entropy", "cut_cross_entropy", "liger")


def rows(site: Site) -> list[Row]:
    """Return the peers of every size in turn, the variants of the loss, and a profile."""
    sizes, losses = (_TOY_SIZES, _TOY_LOSSES) if site.simulated else (_SIZES, _LOSSES)
    listed = [
        Row(f"train {preset} {peer}", 240, partial(_train, preset, peer))
        for preset in sizes
        for peer in ("ours", "ours, float8", "plain", "plain, compiled")
    ]
    for name, shape in losses.items():
        for chunk in _CHUNKS:
            listed.append(Row(f"loss {name} ours chunk {chunk or 'default'}", 120, partial(_our_loss, shape, chunk)))
        listed += [Row(f"loss {name} {peer}", 120, partial(_peer_loss, shape, peer)) for peer in _PEERS]
    return listed + [Row(f"profile {preset}", 180, partial(_profile, preset)) for preset in sizes]


def case_of(preset: str, site: Site) -> Any:
    """Return the training that is measured."""
    from training_peers import Case

    length, sequences, micro_batch = (_TOY_SIZES if site.simulated else _SIZES)[preset]
    vocabulary = 50_304 if preset.startswith("gpt2") else 32_000
    return Case(
        preset=preset,
        ranks=1,
        threads=2,
        precision="bf16",
        length=length,
        vocabulary=vocabulary,
        sequences=sequences,
        micro_batch=micro_batch,
    )


def become_a_rank() -> None:
    """Make this process the only rank of a group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})


def _train(preset: str, peer: str, site: Site) -> dict[str, Any]:
    """Return speed, utilization, peak memory and, for ours, the memory that `plan` expects."""
    from training_peers import in_ranks

    case = case_of(preset, site)
    words = [f"--preset={preset}", f"--length={case.length}", f"--sequences={case.sequences}"]
    words += [
        f"--vocabulary={case.vocabulary}",
        f"--micro-batch={case.micro_batch}",
        f"--steps={2 if site.simulated else _STEPS}",
    ]
    figures = in_ranks(_TRAIN, case, peer, words)
    if peer == "ours":
        figures["planned_memory_bytes"] = _planned_memory(case)
    return figures


def _planned_memory(case: Any) -> float:
    from btm_scale.config.layout import Layout
    from btm_scale.launch.memory import rank_memory

    layout = Layout(data=1, precision=case.precision, micro_batch=case.micro_batch)
    accumulation = case.sequences // case.micro_batch
    return rank_memory(
        case.shape, layout, micro_batch=case.micro_batch, length=case.length, accumulation=accumulation
    ).total


def _loss_inputs(shape: tuple[int, int, int], site: Site) -> tuple[Any, Any, Any]:
    import torch

    tokens, hidden, vocab = shape
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=site.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden, device=site.device, dtype=torch.bfloat16).mul_(hidden**-0.5)
    return states, weight.requires_grad_(), torch.randint(vocab, (tokens,), device=site.device)


def _loss_figures(run: Any, states: Any, weight: Any, site: Site) -> dict[str, Any]:
    """Return seconds and extra memory of the forward and backward pass, and the loss."""
    from kernels_timing import extra_bytes, seconds

    def step() -> Any:
        states.grad = weight.grad = None
        loss = run()
        loss.backward()
        return loss

    return {
        "seconds": seconds(step, site.device, repeats=5),
        "extra_bytes": extra_bytes(step, site.device),
        "loss": float(step()),
    }


def _our_loss(shape: tuple[int, int, int], chunk: int | None, site: Site) -> dict[str, Any]:
    from btm_scale.model import loss

    states, weight, targets = _loss_inputs(shape, site)
    chosen = loss.tokens_per_chunk if chunk is None else lambda *_, **__: chunk
    with mock.patch.object(loss, "tokens_per_chunk", chosen):
        return _loss_figures(lambda: loss.head_loss(states, weight, targets, vocabulary=shape[2]), states, weight, site)


def _peer_loss(shape: tuple[int, int, int], peer: str, site: Site) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    states, weight, targets = _loss_inputs(shape, site)

    def eager() -> Any:
        return F.cross_entropy(F.linear(states, weight).float(), targets)

    try:
        if peer == "torch_linear_cross_entropy" and not hasattr(F, peer.removeprefix("torch_")):
            raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
        if peer in ("cut_cross_entropy", "liger") and site.simulated:
            raise ImportError(f"{peer} needs a GPU")
        if peer == "cut_cross_entropy":
            from cut_cross_entropy import linear_cross_entropy
        if peer == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(str(error)) from None
    runs = {
        "eager": eager,
        # Importing the compiler takes seconds. On a CPU, its usual backend would spend half a minute on C++.
        "compile": torch.compile(eager, backend="aot_eager" if site.simulated else "inductor")
        if peer == "compile"
        else eager,
        "torch_linear_cross_entropy": lambda: F.linear_cross_entropy(states, weight, targets),
        "cut_cross_entropy": lambda: linear_cross_entropy(states, weight, targets),
        "liger": lambda: liger_fused_linear_cross_entropy(states, weight, targets),
    }
    return _loss_figures(runs[peer], states, weight, site)


def _profile(preset: str, site: Site) -> dict[str, Any]:
    """Write DIR/profiles/PRESET.txt with the slowest operators of a step; return the fractions of the first ten."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from training_peers import ours

    become_a_rank()
    case = case_of(preset, site)
    step = ours(case)
    sequences = torch.randint(case.vocabulary, (case.sequences, case.length + 1), device=site.device)
    for _ in range(2):
        step(sequences)
    activities = [ProfilerActivity.CPU] + ([] if site.simulated else [ProfilerActivity.CUDA])
    with profile(activities=activities) as measured:
        step(sequences)
        if not site.simulated:
            torch.cuda.synchronize()
    column = "self_cpu_time_total" if site.simulated else "self_device_time_total"
    averages = measured.key_averages()
    path: Path = site.folder("profiles") / f"{preset}.txt"
    path.write_text(averages.table(sort_by=column, row_limit=40, max_name_column_width=80))
    times = sorted(((getattr(event, column), event.key) for event in averages), reverse=True)
    total = sum(time for time, _ in times)
    return {"operators": {name: time / total for time, name in times[:10]}, "first": times[0][1][:60]}
