"""The device, stream, number, bytes and block shape of every launch, seen by a driver that launches nothing."""

from __future__ import annotations

import logging
import subprocess

import pytest
import torch
from helpers.cuts import cut
from helpers.kernel_oracle import exact_mixture, exact_token_logprobs, mixing_case, scoring_case
from helpers.stub_gpu import StubGpus, stub_gpus
from triton.runtime.errors import OutOfResources, PTXASError

from btm_scale import kernels
from btm_scale.kernels import pieces, triton_launch
from btm_scale.kernels.cost import Cost
from btm_scale.kernels.tuning_table import MIX_RULES

OPERATORS = ["token_logprobs", "token_logprob_partials", "mix_logits", "mix_sample"]


def call(gpus: StubGpus, operator: str, device: int = 0) -> tuple[list[object], object]:
    """Call an operator with small tensors on a device; return the tensors and the result."""
    states, heads, targets = scoring_case(2, 70, 64, 300, torch.bfloat16)
    logits, log_weights = mixing_case(3, 5, 1000, torch.bfloat16)
    running = torch.zeros(5, 3, dtype=torch.float64)
    tensors = {
        "token_logprobs": [states, heads, targets],
        "token_logprob_partials": [states[0], heads[0], targets],
        "mix_logits": [logits, log_weights],
        "mix_sample": [logits, log_weights, running],
    }[operator]
    tensors = [
        [gpus.tensor(t, device) for t in tensor] if isinstance(tensor, list) else gpus.tensor(tensor, device)
        for tensor in tensors
    ]
    if operator == "mix_sample":
        return tensors, kernels.mix_sample(*tensors[:2], log_likelihood=tensors[2])
    return tensors, getattr(kernels, operator)(*tensors)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_launch_is_on_the_device_and_stream_of_its_tensors(arch, device, operator):
    with stub_gpus(arch) as gpus:
        gpus.streams = [7, 8]
        call(gpus, operator, device)
        assert {(launch.device, launch.stream) for launch in gpus.launches} == {(device, gpus.streams[device])}
        assert gpus.current == 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_on_different_devices_are_refused_before_a_launch(operator):
    with stub_gpus("sm_90") as gpus:
        tensors, _ = call(gpus, operator)
        gpus.launches.clear()
        second = tensors[1][1] if isinstance(tensors[1], list) else tensors[1]
        moved = gpus.tensor(second.as_subclass(torch.Tensor), 1)
        tensors[1] = [tensors[1][0], moved] if isinstance(tensors[1], list) else moved
        with pytest.raises(ValueError, match=r"on different devices: .*cuda:0.*cuda:1"):
            getattr(kernels, operator)(*tensors[: 3 if operator.startswith("token") else 2])
        assert gpus.launches == []


def test_a_running_likelihood_or_a_generator_of_another_device_is_refused():
    with stub_gpus("sm_90") as gpus:
        tensors, _ = call(gpus, "mix_logits")
        with pytest.raises(ValueError, match="log_likelihood on cpu"):
            kernels.mix_sample(*tensors, log_likelihood=torch.zeros(5, 3))
        with pytest.raises(ValueError, match="generator is on cpu"):
            kernels.mix_sample(*tensors, generator=torch.Generator())


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [
        ("sm_80", "128x128x32"),
        ("sm_89", "128x128x32"),
        ("sm_90", "128x128x64"),
        ("sm_100", "256x128x32"),
        ("gfx90a", "128x128x64"),
        ("gfx942", "128x128x64"),
    ],
)
def test_blocks_are_chosen_by_architecture(arch, blocks):
    with stub_gpus(arch) as gpus:
        call(gpus, "token_logprobs")
        assert str(kernels.last_path("token_logprobs")) == f"triton {blocks}"
        assert kernels.last_path().operator == "token_logprobs"


def test_a_card_with_less_shared_memory_than_its_architecture_gets_smaller_blocks_without_a_refusal(caplog):
    with stub_gpus("sm_90", shared_bytes=80 << 10) as gpus:
        call(gpus, "token_logprobs")
        assert str(kernels.last_path()) == "triton 64x128x64"
    with stub_gpus("sm_90", shared_bytes=48 << 10) as gpus:
        call(gpus, "token_logprobs")
        assert str(kernels.last_path()) == "triton 32x64x32"
    assert not caplog.records


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_refused_shape_gives_way_to_a_smaller_one_which_is_logged_once(operator, caplog):
    with stub_gpus("sm_90") as gpus:
        names = {"token_logprobs": "score_kernel", "token_logprob_partials": "score_kernel", "mix_logits": "mix_kernel"}
        refused: list[str] = []

        def fail_once(kernel: str) -> None:
            if kernel == names.get(operator, "draw_kernel") and not refused:
                refused.append(kernel)
                raise OutOfResources(300_000, 200_000, "shared memory")

        gpus.fail = fail_once
        for _ in range(3):
            call(gpus, operator)
        assert refused
        smaller = "64x128x64" if operator.startswith("token") else "512"
        assert str(kernels.last_path(operator)) == f"triton {smaller}"
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "OutOfResources" in caplog.text
        assert f"It runs with blocks of {smaller}" in caplog.text


@pytest.mark.parametrize("error", [OutOfResources(3, 2, "registers"), PTXASError("ptxas died")], ids=["size", "ptxas"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_runs_if_every_shape_is_refused(operator, error, caplog):
    with stub_gpus("sm_90") as gpus:
        gpus.fail = lambda kernel: (_ for _ in ()).throw(error)
        tensors, result = call(gpus, operator)
        call(gpus, operator)
        assert str(kernels.last_path(operator)) == "reference"
        assert gpus.launches == []
        assert "as PyTorch operations" in caplog.records[-1].message
        assert len(caplog.records) == len({record.message for record in caplog.records})
        plain = [[t.as_subclass(torch.Tensor) for t in x] if isinstance(x, list) else x for x in tensors]
        if operator == "token_logprobs":
            assert (result - exact_token_logprobs(*plain)).abs().max() <= 1e-4
        if operator == "mix_logits":
            exact = exact_mixture(*plain)
            assert (result - exact)[exact > -float("inf")].abs().max() <= 1e-4


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]),
        FileNotFoundError("gcc"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    ],
    ids=["no-compiler", "no-headers", "no-gcc", "old-driver"],
)
def test_a_host_on_which_triton_cannot_launch_uses_the_reference_and_logs_it_once(error, caplog):
    with stub_gpus("sm_90") as gpus:
        gpus.fail = lambda kernel: (_ for _ in ()).throw(error)
        for operator in OPERATORS:
            call(gpus, operator)
            assert kernels.last_path(operator).backend == "reference"
        assert len(caplog.records) == 1
        assert "Triton cannot launch kernels on this machine" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("a mistake of ours"),
    ],
    ids=["illegal-access", "out-of-memory", "mistake"],
)
def test_errors_that_are_not_about_the_shape_are_raised(error):
    with stub_gpus("sm_90") as gpus:
        gpus.fail = lambda kernel: (_ for _ in ()).throw(error)
        with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
            call(gpus, "mix_logits")


def test_scores_take_two_launches_and_copy_the_heads_addresses_once():
    with stub_gpus("sm_90") as gpus:
        states, head = gpus.empty(3, 70, 64, dtype=torch.bfloat16), gpus.empty(300, 64, dtype=torch.bfloat16)
        targets = gpus.tensor(torch.zeros(70, dtype=torch.int64))
        for _ in range(3):
            kernels.token_logprobs(states, [head] * 3, targets)
        assert [launch.kernel for launch in gpus.launches] == ["score_kernel", "combine_kernel"] * 3
        tables = {launch.arguments["heads_ptr"].data_ptr() for launch in gpus.launches[::2]}
        assert len(tables) == 1
        assert gpus.launches[0].arguments["heads_ptr"].tolist() == [[head.data_ptr(), 64]] * 3


def test_the_addresses_of_heads_stay_where_a_captured_graph_reads_them():
    cpu = torch.device("cpu")
    table = triton_launch._addresses(cpu, ((4096, 64),))
    for number in range(300):
        triton_launch._addresses(cpu, ((8192 + number, 64),))
    assert triton_launch._addresses(cpu, ((4096, 64),)) is table


@pytest.mark.parametrize("shape", [(1, 1, 32_000), (8, 32, 32_000), (64, 64, 128_256)])
def test_mixing_and_sampling_take_two_launches_for_any_number_of_rows_and_experts(shape):
    experts, batch, _ = shape
    with stub_gpus("sm_90") as gpus:
        logits, log_weights = gpus.empty(*shape, dtype=torch.bfloat16), gpus.empty(batch, experts)
        posterior = gpus.empty(batch, experts, dtype=torch.float64)
        kernels.mix_logits(logits, log_weights)
        assert [launch.kernel for launch in gpus.launches] == ["normalizer_kernel", "mix_kernel"]
        gpus.launches.clear()
        kernels.mix_sample(logits, posterior, log_likelihood=posterior)
        assert [launch.kernel for launch in gpus.launches] == ["normalizer_kernel", "draw_kernel"]


def test_a_refused_second_launch_leaves_the_running_likelihoods_to_the_reference():
    with stub_gpus("sm_90") as gpus:

        def fail_later(kernel: str) -> None:
            if kernel == "draw_kernel":
                raise OutOfResources(3, 2, "registers")

        gpus.fail = fail_later
        tensors, (tokens, _) = call(gpus, "mix_sample")
        assert {launch.kernel for launch in gpus.launches} == {"normalizer_kernel"}
        assert str(kernels.last_path()) == "reference"
        logits, _, running = (tensor.as_subclass(torch.Tensor) for tensor in tensors)
        gain = logits.double().log_softmax(2).gather(2, tokens.as_subclass(torch.Tensor).expand(3, 5).unsqueeze(2))
        assert torch.allclose(running, gain.squeeze(2).T, rtol=0, atol=1e-4)  # once


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("piece_bytes", [None, 1])
def test_the_declared_cost_is_what_the_driver_counts(operator, piece_bytes, monkeypatch):
    if piece_bytes is not None:
        monkeypatch.setattr(pieces, "PARTIAL_BYTES", piece_bytes)
    with stub_gpus("sm_90") as gpus:
        tensors, _ = call(gpus, operator)
        counted = Cost(
            len(gpus.launches),
            sum(launch.bytes_read() for launch in gpus.launches),
            sum(launch.bytes_written() for launch in gpus.launches),
        )
        assert kernels.cost(operator, *tensors) == counted
        if piece_bytes is not None and operator == "token_logprobs":
            assert counted.launches > 2


@pytest.mark.parametrize(
    "shape", cut([(8, 64, 128_256), (64, 64, 128_256), (8, 32, 32_000)], lambda shape: shape[0] == 8)
)
def test_the_cost_of_real_shapes_follows_from_their_shapes_alone(shape):
    experts, batch, vocab = shape
    meta = torch.empty(shape, dtype=torch.bfloat16, device="meta"), torch.empty(batch, experts, device="meta")
    with stub_gpus("sm_90") as gpus:
        kernels.mix_logits(gpus.empty(*shape, dtype=torch.bfloat16), gpus.empty(batch, experts))
        h100 = kernels.hardware.hardware(torch.device("cuda", 0))
        declared = kernels.cost("mix_logits", *meta, on=h100)
        assert declared.launches == len(gpus.launches)
        assert declared.bytes_read == sum(launch.bytes_read() for launch in gpus.launches)
    logits = experts * batch * vocab * 2
    assert 2 * logits < declared.bytes_read < 2.01 * logits
    partials = 8 * experts * batch * -(-vocab // MIX_RULES["sm_90"].split)  # a maximum and a sum each
    assert declared.bytes_written == batch * vocab * 4 + partials


def test_the_cost_of_an_unknown_operator_is_an_error():
    with pytest.raises(ValueError, match="no operator mix"):
        kernels.cost("mix")
