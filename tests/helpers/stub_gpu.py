"""GPUs that exist in name only: CPU tensors that report a CUDA device, and a Triton driver that compiles but launches
nothing: what a kernel would write is zero.

Everything between a public function and the driver is the real code: the choice of the block shape, the specialization
of each kernel, its compilation for the named GPU, and the look-up of device and stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from btm_scale.kernels import hardware, layer_operators, loss_operators, operators, paths
from btm_scale.kernels.drawing import draw_kernel
from btm_scale.kernels.gelu import bias_gelu_backward_kernel
from btm_scale.kernels.loss import cross_entropy_kernel, logit_gradient_kernel, logit_partials_kernel
from btm_scale.kernels.loss_resident import resident_cross_entropy_kernel
from btm_scale.kernels.mixing import mix_kernel, normalizer_kernel
from btm_scale.kernels.norm import add_norm_backward_kernel, add_norm_kernel, column_sums_kernel
from btm_scale.kernels.rotary import join_rotated_kernel, split_rotated_kernel
from btm_scale.kernels.scoring import combine_kernel, score_kernel

LOSS_KERNELS = (resident_cross_entropy_kernel, cross_entropy_kernel, logit_partials_kernel, logit_gradient_kernel)
_IN_PLACE = {"resident_cross_entropy_kernel": 1, "cross_entropy_kernel": 2, "logit_gradient_kernel": 1}  # passes
NORM_KERNELS = (add_norm_kernel, add_norm_backward_kernel, column_sums_kernel)
LAYER_KERNELS = (*NORM_KERNELS, split_rotated_kernel, join_rotated_kernel, bias_gelu_backward_kernel)
OTHERS = (score_kernel, combine_kernel, normalizer_kernel, mix_kernel, draw_kernel)
KERNELS = (*OTHERS, *LOSS_KERNELS, *LAYER_KERNELS)

SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
}
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx90a": 110, "gfx942": 304}
WRITTEN = {
    "score_kernel": {"partials_ptr"},
    "combine_kernel": {"out_ptr"},
    "normalizer_kernel": {"normalizers_ptr", "tokens_ptr"},
    "mix_kernel": {"mixture_ptr"},
    "draw_kernel": {"candidates_ptr", "tokens_ptr", "out_token_ptr", "out_log_prob_ptr"},
    "cross_entropy_kernel": {"logits_ptr", "loss_ptr"},
    "resident_cross_entropy_kernel": {"logits_ptr", "loss_ptr"},
    "logit_partials_kernel": {"maximum_ptr", "sum_exp_ptr", "target_logit_ptr"},
    "logit_gradient_kernel": {"logits_ptr"},
    "add_norm_kernel": {"total_ptr", "normed_ptr", "mean_ptr", "scale_ptr"},
    "add_norm_backward_kernel": {"result_ptr", "sums_ptr"},
    "column_sums_kernel": {"out_ptr"},
    "split_rotated_kernel": {"query_ptr", "key_ptr"},
    "join_rotated_kernel": {"mixed_ptr", "sums_ptr"},
    "bias_gelu_backward_kernel": {"result_ptr", "sums_ptr"},
}
_COUNTED = ("draw_kernel", "tokens_ptr")  # which counts the finished blocks of a row, too


class GpuTensor(torch.Tensor):
    """A CPU tensor that reports a GPU as its device, as does everything computed from it."""

    gpu: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.gpu

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpus = {tensor.gpu for tensor in _tensors((args, kwargs)) if isinstance(tensor, GpuTensor)}
        assert len(gpus) <= 1, f"{function} of tensors on {gpus}"
        return _as_gpu(super().__torch_function__(function, types, args, _on_cpu(kwargs)), *gpus)


class _Factories(TorchFunctionMode):
    """`torch.empty(..., device="cuda:1")` returns a GpuTensor, and our operators run as on a GPU's tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, torch._ops.OpOverload) and function.namespace == operators.NAMESPACE:
            # PyTorch's dispatcher would see CPU tensors in a function that this mode does not watch.
            with self:
                implementations = loss_operators.IMPLEMENTATIONS | layer_operators.IMPLEMENTATIONS
                run = implementations.get(function._opname) or getattr(operators, function._opname)
                return run(*args, **(kwargs or {}))
        device = torch.device((kwargs or {}).get("device") or "cpu")
        result = function(*args, **_on_cpu(kwargs))
        return _as_gpu(result, device) if device.type == "cuda" else result


def _on_cpu(kwargs: Any) -> dict[str, Any]:
    return {**(kwargs or {}), "device": "cpu"} if (kwargs or {}).get("device") is not None else dict(kwargs or {})


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _as_gpu(result: Any, gpu: torch.device | None = None) -> Any:
    def convert(value: Any) -> Any:
        if gpu is None or not isinstance(value, torch.Tensor):
            return value
        converted = value if isinstance(value, GpuTensor) else value.as_subclass(GpuTensor)
        converted.gpu = gpu
        return converted

    return tree_map(convert, result)


@dataclasses.dataclass
class Launch:
    """What the driver saw of one launch."""

    kernel: str
    device: int
    stream: int
    arguments: dict[str, Any]

    def bytes_read(self) -> int:
        """Bytes of every pointer that the kernel reads, each element once."""
        total = 0
        for name, tensor in self._pointers().items():
            if name == "log_likelihood_ptr" and not self.arguments["UPDATE"]:
                continue
            # The last program of a row reads what the others wrote.
            if name in WRITTEN[self.kernel] - {"candidates_ptr"} and (self.kernel, name) != _COUNTED:
                continue
            if self.kernel == "draw_kernel" and name == "logits_ptr":  # and one logit of each expert and row
                total += self.arguments["UPDATE"] * self._numbers("experts", "batch") * tensor.element_size()
            if self.kernel == "split_rotated_kernel" and name == "mixed_ptr":  # values are not read
                per = self.arguments["PER"]
                total += tensor.numel() * (per + 1) // (per + 2) * tensor.element_size()
                continue
            total += tensor.numel() * tensor.element_size()
        if self.kernel in _IN_PLACE:
            logits = self.arguments["logits_ptr"]
            total += _IN_PLACE[self.kernel] * logits.numel() * logits.element_size()
        if self.kernel == "score_kernel":  # the heads, of which the arguments hold only addresses
            bits = self.arguments["HEAD_DTYPE"].primitive_bitwidth
            total += self._numbers("experts", "columns", "inner") * bits // 8
        return total

    def bytes_written(self) -> int:
        """Bytes of every pointer that the kernel writes."""
        written = set(WRITTEN[self.kernel])
        if self.kernel == "normalizer_kernel":  # of the tokens only the number of finished blocks of each row
            cleared = 4 * self.arguments["batch"] if self.arguments["DRAW"] else 0
            return cleared + sum(self._pointers()[name].nbytes for name in written - {"tokens_ptr"})
        if self.arguments.get("UPDATE"):
            written.add("log_likelihood_ptr")
        return sum(t.numel() * t.element_size() for name, t in self._pointers().items() if name in written)

    def _pointers(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}

    def _numbers(self, *names: str) -> int:
        product = 1
        for name in names:
            product *= self.arguments[name]
        return product


class StubGpus:
    """A machine with GPUs of one architecture; `launches` are those since the last `clear`."""

    def __init__(self, arch: str, count: int = 2, shared_bytes: int | None = None) -> None:
        self.arch = arch
        self.shared_bytes = shared_bytes or SHARED_BYTES[arch]
        self.count = count
        self.current = 0
        self.streams = [100 + device for device in range(count)]
        self.launches: list[Launch] = []
        self.fail: Callable[[str], None] = lambda kernel: None  # may raise where a kernel is loaded

    @property
    def target(self) -> GPUTarget:
        if self.arch.startswith("gfx"):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", int(self.arch[3:]), 32)

    def tensor(self, tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        """Return the tensor as one of a GPU."""
        return _as_gpu(tensor, torch.device("cuda", device))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, device: int = 0) -> torch.Tensor:
        """Return a tensor whose memory is reserved and never touched, so that it may be as large as a real one."""
        return self.tensor(torch.empty(*shape, dtype=dtype), device)

    def compiled(self) -> list[tuple[str, Any]]:
        """Return the name of every kernel that was compiled, and what Triton's compiler returned for it."""
        caches = [(kernel.fn.__name__, cache) for kernel in KERNELS for cache in kernel.device_caches.values()]
        return [(name, binary) for name, cache in caches for binary in cache[0].values()]

    def exchange(self, device: int) -> int:
        """Make a device the current one; return the one before."""
        before = self.current
        self.current = device if device >= 0 else self.current
        return before


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, gpus: StubGpus) -> None:
        self.gpus = gpus
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=self._properties, unload_module=lambda module: None
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            kernel = source.fn.fn.__name__
            self.gpus.launches.append(Launch(kernel, self.gpus.current, stream, arguments))
            for written in WRITTEN[kernel]:
                if arguments[written] is not None:
                    arguments[written].zero_()

        return launch

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.gpus.fail(name)
        return (1, 1, 64, 0, 1024)

    def _properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpus.shared_bytes, "multiprocessor_count": 100, "warpSize": 32}

    def get_current_device(self) -> int:
        return self.gpus.current

    def get_current_stream(self, device: int) -> int:
        return self.gpus.streams[device]

    def get_current_target(self) -> GPUTarget:
        return self.gpus.target

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def stub_gpus(arch: str = "sm_90", **settings: Any) -> Iterator[StubGpus]:
    """Replace the machine's GPUs, CUDA's notion of the current one, and Triton's driver."""
    gpus = StubGpus(arch, **settings)
    vendor = "amd" if arch.startswith("gfx") else "nvidia"
    properties = {"shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": gpus.shared_bytes}
    properties["multi_processor_count"] = MULTIPROCESSORS.get(arch, 100)
    if vendor == "amd":
        properties |= {"shared_memory_per_block": gpus.shared_bytes, "gcnArchName": f"{arch}:sramecc+:xnack-"}
        properties |= {"major": 9, "minor": 4}
    else:
        properties |= {"major": int(arch[3:-1]), "minor": int(arch[-1])}
    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr(torch.version, "hip", "6.4" if vendor == "amd" else None)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        patch.setattr(torch.cuda, "_exchange_device", gpus.exchange)
        patch.setattr(torch.cuda, "_maybe_exchange_device", gpus.exchange)
        patch.setattr(driver, "_active", _Driver(gpus))
        for kernel in KERNELS:  # what was compiled for another stub
            patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.device_caches.default_factory))
        hardware.hardware.cache_clear()
        paths.forget_refusals()
        try:
            yield gpus
        finally:
            hardware.hardware.cache_clear()
            paths.forget_refusals()
