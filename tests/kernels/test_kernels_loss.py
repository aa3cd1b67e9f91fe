"""Cross entropy in place: the reference against float64, the operators, and the launches on GPUs in name only."""

from __future__ import annotations

import pytest
import torch
from helpers.loss_cases import assert_exact, assert_shards_are_exact, loss_case
from helpers.stub_gpu import StubGpus, stub_gpus
from triton.runtime.errors import OutOfResources

from btm_scale import kernels
from btm_scale.kernels import loss_operators, products
from btm_scale.kernels.cost import Cost
from btm_scale.kernels.hardware import hardware

OPERATORS = ["cross_entropy_", "logit_partials", "logit_gradient_"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "vocab"), [(111, 111), (300, 257)])
def test_the_reference_is_exact(dtype, rows, vocab):
    assert_exact(*loss_case(9, rows, vocab, dtype), vocab)
    assert_shards_are_exact(*loss_case(9, rows, vocab, dtype), vocab, 3)
    assert str(kernels.last_path("logit_gradient_")) == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_schema_and_fake_consistent(dtype):
    logits, targets = loss_case(5, 60, 57, dtype)
    statistics = torch.zeros(5), torch.ones(5)
    torch.library.opcheck(loss_operators.CROSS_ENTROPY, (logits.clone(), targets, 57))
    torch.library.opcheck(loss_operators.LOGIT_PARTIALS, (logits, targets, 0, 57))
    torch.library.opcheck(loss_operators.LOGIT_GRADIENT, (logits.clone(), targets, *statistics, 0, None))
    factors = torch.randn(5, 7).to(dtype), torch.randn(5, 3).to(dtype)
    torch.library.opcheck(products.ADD_PRODUCT, (torch.zeros(7, 3), *factors, False))


def test_meta_logits_give_meta_losses():
    logits, targets = torch.empty(5, 60, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    assert kernels.cross_entropy_(logits, targets).device.type == "meta"
    assert [part.device.type for part in kernels.logit_partials(logits, targets)] == ["meta"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_in_float32(dtype):
    left, right = torch.randn(40, 7).to(dtype), torch.randn(40, 3).to(dtype)
    total = torch.full((7, 3), float("nan"))
    kernels.add_product_(total, left, right, overwrite=True)
    kernels.add_product_(total, left, right)
    exact = 2 * left.double().T @ right.double()
    assert (total - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.15)


def test_whether_a_gpu_adds_in_the_product_is_tried_for_each_dtype(monkeypatch, caplog):
    def only_bfloat16(total, left, right, dtype, *, out, beta=1):
        if left.dtype != torch.bfloat16:
            raise RuntimeError("not supported")
        out.mul_(beta).add_(left.float() @ right.float())

    products._adds_in_product.cache_clear()
    monkeypatch.setattr(torch, "addmm", only_bfloat16)
    with stub_gpus("sm_90"):
        device = torch.device("cuda", 0)
        for dtype, adds in ((torch.bfloat16, True), (torch.float16, False), (torch.bfloat16, True)):
            assert products._adds_in_product(device, dtype) == adds
    products._adds_in_product.cache_clear()
    assert [record.message for record in caplog.records] == [
        "this GPU's BLAS cannot accumulate torch.float16 products in float32: they are added separately"
    ]


def test_wrong_arguments_are_our_own_errors():
    logits, targets = loss_case(5, 60, 60, torch.float32)
    with pytest.raises(ValueError, match=r"must be \[tokens, rows\]"):
        kernels.cross_entropy_(logits, targets[:3])
    with pytest.raises(ValueError, match=r"targets are torch\.int32"):
        kernels.cross_entropy_(logits, targets.int())
    with pytest.raises(ValueError, match="the last must be 1"):
        kernels.cross_entropy_(logits.T.contiguous().T, targets)
    with pytest.raises(ValueError, match=r"logits are torch\.float64"):
        kernels.cross_entropy_(logits.double(), targets)
    with pytest.raises(ValueError, match="on different devices"):
        kernels.cross_entropy_(logits, targets.to("meta"))
    with pytest.raises(ValueError, match="vocab_size is 0"):
        kernels.logit_partials(logits, targets, vocab_size=0)


def call(
    gpus: StubGpus, operator: str, rows: int = 1000, stride: int = 1024, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """Call an operator with 6 tokens' logits whose rows begin at multiples of `stride`; return its tensors."""
    tokens = 6
    logits = gpus.empty(tokens, stride, dtype=dtype)[:, :rows]
    tensors = [logits, gpus.tensor(torch.zeros(tokens, dtype=torch.int64))]
    if operator == "logit_gradient_":
        tensors += [gpus.tensor(torch.zeros(tokens)), gpus.tensor(torch.ones(tokens))]
    getattr(kernels, operator)(*tensors)
    return tensors


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_call_is_one_launch_whose_declared_cost_is_what_the_driver_counts(operator):
    with stub_gpus("sm_90") as gpus:
        tensors = call(gpus, operator)
        assert str(kernels.last_path(operator)) == "triton 4096"
        (launch,) = gpus.launches
        assert kernels.cost(operator, *tensors) == Cost(1, launch.bytes_read(), launch.bytes_written())


@pytest.mark.parametrize(
    ("rows", "stride", "dtype", "path"),
    [
        (50_304, 50_304, torch.bfloat16, "triton 13x4096"),
        (992, 1024, torch.float16, "triton 1x4096"),
        (65_552, 65_552, torch.bfloat16, "triton 4096"),  # longer than the registers hold
        (50_304, 50_304, torch.float32, "triton 4096"),
        (1008, 1018, torch.bfloat16, "triton 4096"),  # rows that begin anywhere
    ],
)
def test_rows_that_fit_the_registers_are_declared_and_read_once(rows, stride, dtype, path):
    with stub_gpus("sm_90") as gpus:
        tensors = call(gpus, "cross_entropy_", rows, stride, dtype)
        assert str(kernels.last_path("cross_entropy_")) == path
        (launch,) = gpus.launches
        declared = kernels.cost("cross_entropy_", *tensors)
        assert declared == Cost(1, launch.bytes_read(), launch.bytes_written())
        reads = 1 if "x" in path else 2
        assert declared.bytes_read == reads * tensors[0].numel() * dtype.itemsize + 8 * len(tensors[0])
        on_meta = torch.empty_strided((6, rows), (stride, 1), dtype=dtype, device="meta")
        assert kernels.cost("cross_entropy_", on_meta, on=hardware(tensors[0].device)) == declared


@pytest.mark.parametrize(("vocab", "path"), [(8193, "triton 3x4096"), (8192, "triton 4096")])
def test_rows_whose_padding_begins_before_their_last_block_are_read_twice(vocab, path):
    with stub_gpus("sm_90") as gpus:
        logits, targets = gpus.empty(2, 12_288, dtype=torch.bfloat16), gpus.tensor(torch.zeros(2, dtype=torch.int64))
        kernels.cross_entropy_(logits, targets, vocab_size=vocab)
        assert str(kernels.last_path("cross_entropy_")) == path
        reads = 1 if "x" in path else 2
        assert (
            kernels.cost("cross_entropy_", logits, targets, vocab_size=vocab).bytes_read == reads * logits.nbytes + 16
        )


def test_a_gpu_that_refuses_rows_in_registers_reads_them_twice(caplog):
    def refuse(kernel: str) -> None:
        if kernel == "resident_cross_entropy_kernel":
            raise OutOfResources(2, 1, "registers")

    with stub_gpus("sm_90") as gpus:
        gpus.fail = refuse
        call(gpus, "cross_entropy_", 1024)
        assert str(kernels.last_path("cross_entropy_")) == "triton 4096"
    assert "cross_entropy_ does not run with blocks of 1x4096 on sm_90" in caplog.text
