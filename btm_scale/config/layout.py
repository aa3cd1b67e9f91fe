"""Layout: how the ranks of an expert group share a model, and whether a model can be shared so."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from btm_scale.config.changes import Changes, MayChange
from btm_scale.config.section import Section
from btm_scale.model.shape import ModelShape


def _local_steps(before: Layout, after: Layout) -> str:
    if before.sync_every == after.sync_every == 1:
        return ""
    return "data ranks that take local steps each train on their own text; their number decides the model"


def _fp16(before: Layout, after: Layout) -> str:
    if "fp16" not in (before.precision, after.precision):
        return ""
    return "fp16 scales the loss and skips the steps that overflow; the other precisions do neither"


def _outer_steps(before: Layout, after: Layout) -> str:
    return "local and outer steps train a different model than data parallelism"


class Layout(Section):
    """How a model is spread over an expert group: parallel degrees, ZeRO stage, precision, micro-batch."""

    tensor: MayChange[int] = Field(default=1, gt=0, description="ranks that share every weight matrix")
    data: Annotated[int, Changes(unless=_local_steps)] = Field(
        default=1, gt=0, description="ranks that share every batch"
    )
    zero: MayChange[Literal[0, 1, 2, 3]] = Field(
        default=1, description="what data ranks share: 1 optimizer, 2 gradients too, 3 weights too"
    )
    sequence_parallel: MayChange[bool] = Field(
        default=False, description="tensor ranks share the sequence between their matrices"
    )
    recompute: MayChange[Literal["none", "selective", "full"]] = Field(
        default="none",
        description="activations made again in the backward pass: attention's, or whole layers'",
    )
    offload: MayChange[Literal["none", "optimizer", "all"]] = Field(
        default="none", description="kept in the host's memory: the optimizer's state, or the weights too"
    )
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], Changes(unless=_fp16)] = Field(
        default="auto",
        description="of weights and activations; master weights are float32; `auto`: what the device does fast",
    )
    micro_batch: MayChange[int] = Field(default=8, gt=0, description="sequences a rank takes at once, at the most")
    sync_every: Annotated[int, Changes(unless=_outer_steps)] = Field(
        default=1,
        gt=0,
        description="steps that data ranks take alone between outer steps; 1 is data parallelism",
    )
    outer_lr: Annotated[float, Changes(unless=_outer_steps)] = Field(
        default=0.7, gt=0, description="of the outer steps"
    )
    outer_momentum: Annotated[float, Changes(unless=_outer_steps)] = Field(
        default=0.9, ge=0, lt=1, description="of the outer steps"
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> Layout:
        problems = []
        if self.sequence_parallel and self.tensor == 1:
            problems.append("sequence_parallel shares a sequence among tensor ranks; set tensor above 1, or leave it")
        if self.offload == "optimizer" and self.zero == 0:
            problems.append("offload: optimizer needs ZeRO; set zero to 1, 2 or 3")
        if self.offload == "all" and self.zero != 3:
            problems.append(f"offload: all moves weights, which zero {self.zero} does not share; set zero to 3")
        if self.sync_every > 1 and self.data == 1:
            problems.append(
                f"sync_every {self.sync_every} is for data ranks that step alone; set data above 1, or leave it"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def grid(self) -> dict[str, int]:
        """Parallel degrees by axis, the one whose neighbours have neighbouring ranks first."""
        return {"tensor": self.tensor, "data": self.data}

    @property
    def ranks(self) -> int:
        """Processes of the group."""
        return math.prod(self.grid.values())

    @property
    def colocated(self) -> int:
        """Consecutive ranks that must share a host."""
        return self.tensor

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of a rank on every axis of the grid."""
        places = {}
        for axis, degree in self.grid.items():
            rank, places[axis] = divmod(rank, degree)
        return places

    def peers(self, axis: str) -> list[tuple[int, ...]]:
        """The process groups along an axis: ranks that differ in their place on this axis only."""
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            others = tuple(place for name, place in self.coordinates(rank).items() if name != axis)
            lines.setdefault(others, []).append(rank)
        return [tuple(line) for line in lines.values()]

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of one weight or activation. The precision must be resolved: `auto` has no size."""
        return {"bf16": 2, "fp16": 2, "fp32": 4}[self.precision]

    def problems(self, shape: ModelShape, sequence_length: int) -> list[str]:
        """Why a model of this shape cannot be shared so, one sentence each; empty if it can.

        The vocabulary always fits: its rows are padded to a multiple of `tensor`.
        """
        found = []
        if self.tensor not in (degrees := shape.tensor_degrees()):
            sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "ffn": shape.ffn}
            odd = [f"{name} {size}" for name, size in sizes.items() if size % self.tensor]
            found.append(f"tensor {self.tensor} does not divide {' and '.join(odd)}; {_choices('tensor', degrees)}")
        if self.sequence_parallel and sequence_length % self.tensor:
            longer = -(-sequence_length // self.tensor) * self.tensor
            found.append(
                f"sequence_parallel needs sequences that tensor {self.tensor} divides, not {sequence_length} tokens; "
                f"a sequence_length of {longer} fits"
            )
        return found

    def batch_problems(self, sequences: int) -> list[str]:
        """Why the data ranks cannot share a batch of this many sequences evenly; empty if they can."""
        if sequences % self.data == 0:
            return []
        degrees = [degree for degree in range(1, sequences + 1) if sequences % degree == 0]
        count = f"{sequences} sequence" if sequences == 1 else f"{sequences} sequences"
        return [
            f"Cannot share a batch of {count} among data={self.data} ranks. "
            f"data must divide the batch: use {_either(degrees)}."
        ]

    def micro_batches(self, sequences: int) -> tuple[int, int]:
        """How a rank takes its share of a batch of `sequences`: (sequences of a micro-batch, number of micro-batches).

        A micro-batch is the largest, up to `micro_batch`, that divides the share.
        """
        share = sequences // self.data
        size = next(size for size in range(min(self.micro_batch, share), 0, -1) if share % size == 0)
        return size, share // size

    def __str__(self) -> str:
        extras = [
            "sequence parallel" if self.sequence_parallel else "",
            f"{self.recompute} recomputation" if self.recompute != "none" else "",
            {"none": "", "optimizer": "optimizer offloaded", "all": "weights and optimizer offloaded"}[self.offload],
        ]
        parts = [
            f"tensor {self.tensor} x data {self.data}",
            f"ZeRO {self.zero}",
            self.precision,
            *filter(None, extras),
        ]
        return ", ".join(parts)


def _choices(name: str, values: list[int]) -> str:
    if len(values) == 1:
        return f"{name} must be {values[0]}"
    return f"{name} may be {_either(values)}"


def _either(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
