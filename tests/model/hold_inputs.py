"""Train a step with the inputs of layers on the host: `hold_inputs.py SPEC.json`.

The spec has `cases` (name: `shape`, `recompute`, `trains`) and `result`. For each case the script writes the loss and
gradients of some micro-batches beside those without offloading, with copies "at once" and as "late" as they may be, as
lists of whether they are equal; the number of `buffers`; and the most bytes of `meta` tensors that are alive without
and with offloading (`peaks`).
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec
from torch.utils._python_dispatch import TorchDispatchMode

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model import offload
from btm_scale.model.gpt import ExpertModel, build_model
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import freeze_rest

MICRO_BATCHES, SEQUENCES = 3, 2
POSITIONS = 512  # of `meta` tensors: a layer's input then takes more than what does not grow with the length


class LateCopies:
    """Makes a copy only when its result is waited for, as a side stream that is slower than the device."""

    def __init__(self) -> None:
        self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.made = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.fill_(float("nan"))
        self.begun.append((target, source))
        return len(self.begun)

    def wait(self, copied: int) -> None:
        for target, source in self.begun[self.made : copied]:
            target.copy_(source)
        self.made = max(self.made, copied)


class NoCopies:
    """Copies of tensors without values."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert {target.device.type, source.device.type} == {"cpu", "meta"}

    def wait(self, copied: None) -> None:
        """Nothing to wait for."""


class Living(TorchDispatchMode):
    """Counts the bytes of `meta` tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity in self.known:
            return
        self.known.add(identity)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.remove, identity, size)

    def remove(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.bytes -= size


def new_model(case: dict[str, Any], *, offloads: bool) -> ExpertModel:
    torch.manual_seed(0)
    shape = ModelShape.model_validate(case["shape"])
    settings = {"recompute": case["recompute"], "offload_activations": offloads}
    model = build_model(shape, tensor=1, dtype=torch.float32, on_cpu=True, **settings)
    freeze_rest(model, case.get("trains", "all"))
    return model


def results(model: ExpertModel) -> list[torch.Tensor]:
    """Return losses, and gradients summed over micro-batches."""
    torch.manual_seed(1)
    losses = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(model.shape.vocabulary, (SEQUENCES, model.shape.positions))
        model(tokens, tokens)  # a graph without a backward pass
        loss = model(tokens, tokens)
        loss.backward()
        losses.append(loss.detach())
    return losses + [value.grad for value in model.parameters() if value.grad is not None]


def buffers(model: ExpertModel) -> int:
    """Return the number of buffers that a model has allocated."""
    return sum(map(len, model.decoder.layers[0]._host_inputs._free.values()))


def same(case: dict[str, Any]) -> dict[str, Any]:
    expected = results(new_model(case, offloads=False))
    answer: dict[str, Any] = {}
    for name, copies in (("at once", offload.Immediate), ("late", LateCopies)):
        offload.copies_of = lambda _, copies=copies: copies()
        model = new_model(case, offloads=True)
        pairs = list(zip(expected, results(model), strict=True))
        answer[name] = [torch.equal(one, other) for one, other in pairs]
        answer["buffers"] = buffers(model)
    return answer


def peaks(case: dict[str, Any]) -> list[int]:
    found = []
    offload.copies_of = lambda _: NoCopies()
    case = case | {"shape": case["shape"] | {"positions": POSITIONS}}
    for offloads in (False, True):
        model = new_model(case, offloads=offloads).to(torch.bfloat16).to("meta")
        tokens = torch.zeros(SEQUENCES, model.shape.positions, dtype=torch.int64, device="meta")
        model(tokens, tokens)  # the cosines and sines of rotary positions are cached
        with Living() as living:
            model(tokens, tokens).backward()
        found.append(living.peak)
    return found


def run(spec: dict[str, Any]) -> None:
    ExpertGroup.join(Layout(precision="fp32"))
    written = {name: same(case) | {"peaks": peaks(case)} for name, case in spec["cases"].items()}
    Path(spec["result"]).write_text(json.dumps(written))


if __name__ == "__main__":
    given = read_spec()
    fork_world(1, run, given)
