"""Layout: how a model is spread over the ranks of an expert group, and which models a layout fits."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from btm_scale.config.changes import Changes, MayChange
from btm_scale.config.section import Section
from btm_scale.model.shape import ModelShape

_FLOAT8_MULTIPLE = 16  # of both dimensions of a weight on a rank, by cuBLAS and CUTLASS


def _local_steps(before: Layout, after: Layout) -> str:
    if before.sync_every == after.sync_every == 1:
        return ""
    return "with local steps each data rank trains on its own text, so their number changes the model"


def _fp16(before: Layout, after: Layout) -> str:
    if "fp16" not in (before.precision, after.precision):
        return ""
    return "fp16 scales the loss and skips steps that overflow; the other precisions do not"


def _outer_steps(before: Layout, after: Layout) -> str:
    return "local and outer steps train a different model than data parallelism"


class Layout(Section):
    """How a model is spread over an expert group: parallel degrees, ZeRO stage, precision, micro-batch."""

    tensor: MayChange[int] = Field(
        default=1, gt=0, description="tensor-parallel degree: ranks that share each weight matrix"
    )
    context: MayChange[int] = Field(
        default=1, gt=0, description="context-parallel degree: ranks that share each sequence; it divides the heads"
    )
    data: Annotated[int, Changes(unless=_local_steps)] = Field(
        default=1, gt=0, description="data-parallel degree: ranks that share each batch"
    )
    zero: MayChange[Literal[0, 1, 2, 3]] = Field(
        default=1, description="ZeRO stage: data ranks share the optimizer states (1), gradients (2) and weights (3)"
    )
    sequence_parallel: MayChange[bool] = Field(
        default=False, description="tensor ranks also shard the sequence, outside attention and MLP"
    )
    recompute: MayChange[Literal["none", "selective", "full", "tiled"]] = Field(
        default="none",
        description="activations recomputed in the backward pass: of attention (selective), of layers (full), or of "
        "layers whose MLPs run in tiles of the sequence (tiled; ZeRO 0 to 2)",
    )
    offload: MayChange[Literal["none", "optimizer", "all"]] = Field(
        default="none", description="kept in CPU memory: the optimizer states, or also the weights (all)"
    )
    offload_activations: MayChange[bool] = Field(
        default=False,
        description="keep the inputs of layers in CPU memory until their backward pass; with recompute full or tiled",
    )
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], Changes(unless=_fp16)] = Field(
        default="auto",
        description="precision of weights and activations; master weights are float32; auto: the fastest on the device",
    )
    float8: MayChange[bool] = Field(
        default=False,
        description="train the matrix products of layers in float8, on GPUs that support it; with precision bf16",
    )
    micro_batch: MayChange[int] = Field(
        default=8, gt=0, description="largest number of sequences per rank and micro-batch"
    )
    sync_every: Annotated[int, Changes(unless=_outer_steps)] = Field(
        default=1,
        gt=0,
        description="local steps of each data rank between outer steps; 1 is data parallelism",
    )
    outer_lr: Annotated[float, Changes(unless=_outer_steps)] = Field(
        default=0.7, gt=0, description="learning rate of the outer steps"
    )
    outer_momentum: Annotated[float, Changes(unless=_outer_steps)] = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Nesterov momentum of the outer steps; 0, with outer_lr 1, is better after few local steps",
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> Layout:
        problems = []
        if self.sequence_parallel and self.tensor == 1:
            problems.append(
                "sequence_parallel has no effect with tensor=1. It shards a sequence over tensor ranks: raise tensor, "
                "or remove it."
            )
        if self.offload == "optimizer" and self.zero == 0:
            problems.append("Cannot offload the optimizer with zero=0. Offloading needs ZeRO: set zero to 1, 2 or 3.")
        if self.offload == "all" and self.zero != 3:
            problems.append(
                f"Cannot offload the weights with zero={self.zero}. Only ZeRO 3 shards them: set zero to 3."
            )
        if self.recompute == "tiled" and self.zero == 3:
            problems.append(
                "Cannot recompute MLPs in tiles with zero=3. ZeRO 3 releases weights that a tile's backward pass "
                "needs: set recompute to full, or zero to 0, 1 or 2."
            )
        if self.offload_activations and self.recompute not in ("full", "tiled"):
            problems.append(
                f"Cannot offload activations with recompute={self.recompute}. Only recomputed layers keep nothing but "
                "their input: set recompute to full or tiled, or remove offload_activations."
            )
        if self.float8 and self.precision != "bf16":
            problems.append(
                f"float8 does not go with precision={self.precision}. It computes products of bfloat16 numbers: set "
                "precision to bf16, or float8 to false."
            )
        if self.sync_every > 1 and self.data == 1:
            problems.append(
                f"sync_every={self.sync_every} has no effect with data=1. Local steps need several data ranks: "
                "raise data, or remove sync_every."
            )
        if self.sync_every > 1 and self.context > 1:
            problems.append(
                f"Cannot take local steps (sync_every={self.sync_every}) with context={self.context}. Local steps need "
                "each sequence on one data rank: set context to 1, or remove sync_every."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def grid(self) -> dict[str, int]:
        """Parallel degrees by axis; the first axis varies fastest with the rank."""
        return {"tensor": self.tensor, "context": self.context, "data": self.data}

    @property
    def degrees(self) -> str:
        """The parallel degrees in words; that of context is left out if it is 1."""
        shown = {axis: degree for axis, degree in self.grid.items() if axis != "context" or degree > 1}
        return " x ".join(f"{axis} {degree}" for axis, degree in shown.items())

    @property
    def ranks(self) -> int:
        """The number of ranks in the group."""
        return math.prod(self.grid.values())

    @property
    def replicas(self) -> int:
        """The number of ranks with the same weights: they share every batch, by sequences and by parts of sequences.

        ZeRO shards over them, and gradients are averaged over them.
        """
        return self.context * self.data

    @property
    def colocated(self) -> int:
        """The number of consecutive ranks that must share a host."""
        return self.tensor

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank on each axis of the grid."""
        coordinates = {}
        for axis, degree in self.grid.items():
            rank, coordinates[axis] = divmod(rank, degree)
        return coordinates

    def peers(self, axis: str) -> list[tuple[int, ...]]:
        """Return the process groups along an axis: ranks that differ in this coordinate only."""
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            others = tuple(value for name, value in self.coordinates(rank).items() if name != axis)
            lines.setdefault(others, []).append(rank)
        return [tuple(line) for line in lines.values()]

    @property
    def bytes_per_weight(self) -> int:
        """Bytes per weight or activation. Raises KeyError for `auto`, which must be resolved first."""
        return {"bf16": 2, "fp16": 2, "fp32": 4}[self.precision]

    def problems(self, shape: ModelShape, sequence_length: int) -> list[str]:
        """Return why this layout does not fit a model of this shape, one message each; empty if it fits.

        The vocabulary always fits: it is padded to a multiple of `tensor`.
        """
        problems = []
        degrees = shape.tensor_degrees()
        if self.tensor not in degrees:
            problems.append(
                f"Cannot shard the model over tensor={self.tensor}. tensor must divide the attention heads "
                f"({shape.heads}), KV heads ({shape.kv_heads}) and MLP width ({shape.ffn}): use {_either(degrees)}."
            )
        elif (heads := shape.heads // self.tensor) % self.context:
            on_each = f" on each of {self.tensor} tensor ranks" if self.tensor > 1 else ""
            problems.append(
                f"Cannot share sequences among context={self.context} ranks. context must divide the attention heads "
                f"({heads}{on_each}): use {_either(_divisors(heads))}."
            )
        if self.float8 and self.tensor in degrees:
            problems += self._float8_problems(shape)
        parts = self.context * (self.tensor if self.sequence_parallel else 1)
        if sequence_length % parts:
            longer = -(-sequence_length // parts) * parts
            if not self.sequence_parallel:
                over, rule = f"context={self.context}", "context must divide sequence_length"
            elif self.context == 1:
                over, rule = f"tensor={self.tensor}", "With sequence_parallel, tensor must divide sequence_length"
            else:
                over = f"context={self.context} x tensor={self.tensor}"
                rule = "With sequence_parallel, context x tensor must divide sequence_length"
            problems.append(f"Cannot shard sequences of {sequence_length} tokens over {over}. {rule}: use {longer}.")
        return problems

    def _float8_problems(self, shape: ModelShape) -> list[str]:
        """Return why the layers of a model cannot train in float8."""
        if shape.experts:
            return ["Cannot train a mixture of experts in float8. Set float8 to false."]
        widths = {
            "hidden": shape.hidden,
            "queries, keys and values": shape.query_key_value_width // self.tensor,
            "queries": shape.query_width // self.tensor,
            "MLP": shape.ffn // self.tensor,
        }
        odd = [f"{name} {width}" for name, width in widths.items() if width % _FLOAT8_MULTIPLE]
        if not odd:
            return []
        ranks = f" on each of {self.tensor} tensor ranks" if self.tensor > 1 else ""
        return [
            f"Cannot train in float8: {', '.join(odd)}{ranks}. GPUs take widths that are multiples of "
            f"{_FLOAT8_MULTIPLE}: set float8 to false{', or lower tensor' if self.tensor > 1 else ''}."
        ]

    def batch_problems(self, sequences: int) -> list[str]:
        """Return why the data ranks cannot share a batch of this many sequences evenly; empty if they can."""
        if sequences % self.data == 0:
            return []
        degrees = _divisors(sequences)
        count = f"{sequences} sequence" if sequences == 1 else f"{sequences} sequences"
        return [
            f"Cannot share a batch of {count} among data={self.data} ranks. "
            f"data must divide the batch: use {_either(degrees)}."
        ]

    def micro_batches(self, sequences: int) -> tuple[int, int]:
        """Return (sequences per micro-batch, micro-batches per step) of a rank, for a batch of `sequences`.

        A micro-batch is the largest, up to `micro_batch`, that divides the sequences of the rank.
        """
        share = sequences // self.data
        size = next(size for size in range(min(self.micro_batch, share), 0, -1) if share % size == 0)
        return size, share // size

    def __str__(self) -> str:
        extras = [
            "sequence parallel" if self.sequence_parallel else "",
            f"{self.recompute} recomputation" if self.recompute != "none" else "",
            {"none": "", "optimizer": "optimizer offloaded", "all": "weights and optimizer offloaded"}[self.offload],
            "activations offloaded" if self.offload_activations else "",
        ]
        parts = [
            self.degrees,
            f"ZeRO {self.zero}",
            f"{self.precision} with float8 products" if self.float8 else self.precision,
            *filter(None, extras),
        ]
        return ", ".join(parts)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _either(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
