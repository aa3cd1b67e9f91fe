"""metrics.jsonl, with one JSON object per step, and a line in the log every few seconds."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from btm_scale.launch.gpus import gpu_of_device
from btm_scale.util.bounded_json import parse_json
from btm_scale.util.cores import CoreWaits
from btm_scale.util.device_query import name_of
from btm_scale.util.files import make_directory, open_to_append, sync_file, write_file

if TYPE_CHECKING:  # reading metrics needs no engine
    import torch

    from btm_scale.distributed.group import ExpertGroup
    from btm_scale.model.moe import Routing
    from btm_scale.model.shape import ModelShape
    from btm_scale.train.jobs import TrainingJob
    from btm_scale.train.step_result import StepResult

logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
CROWDED = 0.3  # of the time that threads wait for a core, which is reported
_TEXTS = ("device", "kernels")
_ROUTING = "routing"
_ROUTING_EVERY = 10  # steps
_MAX_STEP = 1 << 31
DEV_LOSS = "dev_loss"  # of the step in which it was measured; with /DOMAIN, of one domain


class Metrics:
    """The metrics of one training job; only the group's first rank writes them.

    Steps after `first_step`, left behind by a killed run, are dropped, because they are taken again.
    """

    def __init__(
        self,
        group: ExpertGroup,
        path: Path,
        job: TrainingJob,
        shape: ModelShape,
        length: int,
        first_step: int,
    ) -> None:
        self._writes = group.is_first
        self._path = path
        self._job = job
        self._step_tokens = job.sequences * length
        self._token_flops = shape.flops_per_token(length, job.trains)
        peak = peak_flops(group.device, job.layout.precision)
        self._peak = None if peak is None else peak * group.size
        from btm_scale.kernels import kernel_path

        self._runs_on = {"device": name_of(group.device), "kernels": kernel_path(group.device)}
        self._first_step = first_step
        self._file: TextIO | None = None
        self._last = time.perf_counter()
        self._logged = 0.0
        self._cores = CoreWaits()
        self._waiting: float | None = None
        self._asked = self._last
        self._is_crowded = False

    def __enter__(self) -> Self:
        if self._writes:
            make_directory(self._path.parent)
            kept = [row for row in read_metrics(self._path) if row["step"] <= self._first_step]
            write_file(self._path, "".join(f"{json.dumps(row)}\n" for row in kept))
            self._file = io.TextIOWrapper(open_to_append(self._path), "utf-8", line_buffering=True)
        self._last = time.perf_counter()
        return self

    def rewind(self, step: int) -> None:
        """Drop the steps after `step`, because they are taken again."""
        if self._file is not None:
            self._file.close()
        self._first_step = step
        self.__enter__()

    def record(
        self, step: int, result: StepResult, rate: float, more: Mapping[str, float] | None = None, *, aside: float = 0.0
    ) -> dict[str, float]:
        """Record a step, timed from the end of the previous one without `aside` seconds, and return its metrics.

        `more` is added to them, such as the loss on dev text.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last - aside, now
        self._watch_cores(now)
        line = {
            "step": step,
            "loss": result.loss,
            "learning_rate": rate,
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": self._step_tokens / seconds,
            "seconds": seconds,
            "flops_per_second": self._step_tokens * self._token_flops / seconds,
        }
        line |= self._mean_routing(result.routing)
        line |= more or {}
        if result.overflowed:
            line["overflowed"] = True
        if self._peak is not None:
            line["flops_utilisation"] = line["flops_per_second"] / self._peak
        if self._file is None:
            return line
        waits = {} if self._waiting is None else {"core_wait": self._waiting}
        routing = self._routing(step, result.routing)
        self._file.write(json.dumps(line | waits | self._runs_on | routing) + "\n")
        if more and DEV_LOSS in more:
            # Dev losses choose the checkpoint to export, so they must survive a power cut as checkpoints do.
            sync_file(self._file, self._path)
            logger.info("step %d/%d dev loss %.4f", step, self._job.steps, more[DEV_LOSS])
        if now - self._logged > _LOG_SECONDS or step == self._job.steps:
            self._logged = now
            logger.info(
                "step %d/%d loss %.4f gradient norm %.3f rate %.2e %.0f tokens/s",
                step,
                self._job.steps,
                result.loss,
                result.gradient_norm,
                rate,
                line["tokens_per_second"],
            )
        return line

    def _mean_routing(self, routing: Routing | None) -> dict[str, float]:
        """Return means over layers: each expert's fraction of the uses, and the routers' entropy in nats."""
        if routing is None:
            return {}
        layers = len(routing.load)
        # A mixture trains on the domains of its experts.
        means = [sum(column) / layers for column in zip(*routing.load, strict=True)]
        loads = {f"expert_load/{name}": load for name, load in zip(self._job.weights, means, strict=True)}
        return loads | {"router_entropy": sum(routing.entropy) / layers}

    def _routing(self, step: int, routing: Routing | None) -> dict[str, Any]:
        """Return the uses by domain, expert and layer, and the entropies by domain and layer, of some steps."""
        if routing is None or not (step % _ROUTING_EVERY == 0 or step in (1, self._job.steps)):
            return {}
        load, entropy = {}, {}
        for domain, one in routing.by_domain.items():
            columns = zip(self._job.weights, zip(*one.load, strict=True), strict=True)
            load[domain] = {name: _rounded(column) for name, column in columns}
            entropy[domain] = _rounded(one.entropy)
        return {_ROUTING: {"load": load, "entropy": entropy}}

    def _watch_cores(self, now: float) -> None:
        """Measure every few seconds how much the threads waited for a core; log it once if that is much."""
        if now - self._asked < _LOG_SECONDS:
            return
        self._asked, waited = now, self._cores.fraction()
        self._waiting = None if waited is None else round(waited, 3)
        if waited is not None and waited > CROWDED and not self._is_crowded:
            self._is_crowded = True
            logger.warning(
                "The threads of this rank wait for a core %.0f%% of the time: other processes, or more threads than "
                "cores, use the same cores. Training is as much slower; its result is the same.",
                100 * waited,
            )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the vendor's peak FLOP/s of a device in this precision; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    import torch

    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak(precision)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the metrics of every step; none before training begins. Incomplete and damaged lines are skipped.

    A file that cannot be read is logged, and has none: no training needs them.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    except OSError as error:
        logger.warning("%s cannot be read (%s): its metrics are left out", path, error.strerror)
        return []
    rows = (metrics_row(line) for line in lines if line.endswith(b"\n"))
    return [row for row in rows if row is not None]


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """Return the metrics in one line, or None if it is not the JSON object of a step."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    kinds: dict[str, type] = dict.fromkeys(_TEXTS, str) | {_ROUTING: dict}
    numbers = [value for name, value in row.items() if not isinstance(value, kinds.get(name, ()))]
    if not all(map(_is_number, numbers)):
        return None
    return row if type(row.get("step")) is int and 0 < row["step"] < _MAX_STEP else None


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 62)
