"""Joint training of a mixture of experts: every layout has the same losses, and a checkpoint keeps the bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.small_models import TINY_SHAPE, learnable_text
from helpers.worlds import run_script
from safetensors.torch import load_file, save_file

from btm_scale.model.hf_config import config_json
from btm_scale.model.moe import Router, take_routing, with_recorded_scale
from btm_scale.model.shape import ModelShape

SHAPE = {"family": "mixtral", **TINY_SHAPE, "tied": False, "experts": 4, "top_k": 2}
STEPS = 20
ONE = {"tensor": 1, "data": 1, "zero": 0}
MATRIX = [
    {"tensor": tensor, "data": data, "zero": zero}
    for tensor, data, zero in itertools.product((1, 2), (1, 2), (0, 1, 2, 3))
]
MATRIX += [{"tensor": tensor, "data": 3 - tensor, "zero": 2, "context": 2} for tensor in (1, 2)]
QUICK = [
    {"tensor": 2, "data": 1, "zero": 1},
    {"tensor": 1, "data": 2, "zero": 3, "recompute": "full"},
    {"tensor": 1, "data": 1, "zero": 1, "context": 2},
]

Trained = dict[str, dict[str, torch.Tensor]]


def spec(folder: Path, layouts: dict[str, dict[str, Any]], balance: float, **more: Any) -> dict[str, Any]:
    mixture = {"router_lr_scale": 3.0, "z_loss": 1e-2, "balance": balance}
    return {
        "folder": str(folder),
        "shape": SHAPE,
        "steps": STEPS,
        "sequences": 8,
        "mixture": mixture,
        "layouts": {
            name: {"precision": "fp32", "sequence_parallel": values["tensor"] > 1, **values}
            for name, values in layouts.items()
        },
        **more,
    }


def trained(specs: list[dict[str, Any]], folder: Path) -> Trained:
    """The losses and weights of each layout."""
    for one in specs:
        Path(one["folder"]).mkdir(exist_ok=True)
    run_script(Path(__file__).with_name("train_layouts.py"), specs, folder)
    return {
        f"{Path(one['folder']).name}/{name}": load_file(Path(one["folder"]) / f"{name}.safetensors")
        for one in specs
        for name in one["layouts"]
    }


def name_of(layout: dict[str, Any]) -> str:
    return "-".join(map(str, layout.values()))


def in_worlds(
    folder: Path, layouts: list[dict[str, Any]], balance: float, micro_batch: int, **more: Any
) -> list[dict[str, Any]]:
    """One spec for each number of ranks."""
    by_ranks: dict[int, dict[str, dict[str, Any]]] = {}
    for layout in layouts:
        ranks = layout["tensor"] * layout["data"] * layout.get("context", 1)
        by_ranks.setdefault(ranks, {})[name_of(layout)] = layout | {"micro_batch": micro_batch}
    return [spec(folder, some, balance, **more) for some in by_ranks.values()]


def assert_same_losses(results: Trained, expected: str, tolerance: float = 1e-5) -> None:
    reference = results[expected]["losses"]
    assert len(reference) == STEPS
    assert reference[-1] < reference[0] - 0.3, "the reference must learn something"
    for name, tensors in results.items():
        assert tensors["losses"].tolist() == pytest.approx(reference.tolist(), abs=tolerance), name


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One rank, other layouts, and one of these that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("quick")
    # Weights that are pulled towards balance, by counts over ranks and micro-batches.
    specs = in_worlds(folder / "layouts", [ONE, *QUICK], 0.01, micro_batch=2)
    state = {"half": QUICK[0] | {"micro_batch": 2}}
    specs.append(spec(folder / "state", state, 0.01, save=STEPS // 2))
    rest = spec(folder / "state", {"resumed": state["half"]}, 0.01, save=STEPS // 2, begin={"resumed": "half"})
    return trained([*specs, rest], folder)


def test_a_mixture_has_the_losses_of_one_rank_in_every_layout_and_resumes_with_the_same_bits(quick: Trained) -> None:
    layouts = {name: tensors for name, tensors in quick.items() if name.startswith("layouts/")}
    assert_same_losses(layouts, f"layouts/{name_of(ONE)}")
    complete, resumed = layouts[f"layouts/{name_of(QUICK[0])}"], dict(quick["state/resumed"])
    assert torch.equal(torch.cat([quick["state/half"]["losses"], resumed.pop("losses")]), complete["losses"])
    del resumed["bytes"]
    assert all(torch.equal(tensor, complete[name]) for name, tensor in resumed.items())


def test_transformers_has_the_loss_of_a_trained_mixture(quick: Trained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = ModelShape.model_validate(SHAPE)
    weights = {name: tensor for name, tensor in quick["state/half"].items() if name not in ("losses", "bytes")}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_json(shape, dtype="float32", end_of_text=None)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = learnable_text(STEPS // 2 + 1, 8, shape.positions, shape.vocabulary)
    with torch.no_grad():
        logits = model(text[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    assert quick["state/resumed"]["losses"][0] == pytest.approx(loss.item(), abs=2e-5)


@pytest.mark.parametrize(("balance", "micro_batch"), [full(0.0, 8), full(0.01, 1)])
def test_every_layout_of_the_matrix_has_the_losses_of_one_rank(
    balance: float, micro_batch: int, tmp_path: Path
) -> None:
    results = trained(in_worlds(tmp_path / "layouts", MATRIX, balance, micro_batch), tmp_path)
    assert_same_losses(results, f"layouts/{name_of(ONE)}")


@pytest.mark.full
def test_layouts_in_bf16_have_the_losses_of_one_rank_to_its_rounding(tmp_path: Path) -> None:
    layouts = [{**one, "precision": "bf16"} for one in (ONE, *QUICK, {"tensor": 1, "data": 2, "zero": 0})]
    results = trained(in_worlds(tmp_path / "layouts", layouts, 0.01, 2), tmp_path)
    assert_same_losses(results, f"layouts/{name_of(layouts[0])}", tolerance=2e-2)


@pytest.mark.full
def test_experts_that_no_token_of_a_rank_uses_change_no_loss_and_stop_no_rank(tmp_path: Path) -> None:
    # 16 tokens in a micro-batch, one of 16 experts each: many experts are unused, other ones on each rank.
    layouts = [
        ONE,
        *({"tensor": 1, "data": 2, "zero": zero} for zero in (0, 2, 3)),
        {"tensor": 2, "data": 1, "zero": 3},
    ]
    sparse = SHAPE | {"experts": 16, "top_k": 1}
    results = trained(in_worlds(tmp_path / "layouts", layouts, 0.0, 1, shape=sparse), tmp_path)
    assert_same_losses(results, f"layouts/{name_of(ONE)}")


def router(experts: int = 3, hidden: int = 8, **losses: float) -> Router:
    torch.manual_seed(0)
    config: Any = SimpleNamespace(
        num_moe_experts=experts,
        hidden_size=hidden,
        moe_router_topk=2,
        sequence_parallel=False,
        tensor_model_parallel_size=1,
        init_method=torch.nn.init.normal_,
    )
    layer = Router(config)
    layer.z_loss, layer.balance = losses.get("z_loss", 0.0), losses.get("balance", 0.0)
    return layer


def gradient(layer: Router, hidden: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of the router's weights when the language model's loss does not depend on them."""
    weights, _ = layer(hidden)
    (with_recorded_scale((weights * 0).sum(), layer.gradient_scale) * scale).backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


def test_the_routers_losses_are_scaled_as_the_language_models_loss_is() -> None:
    hidden = torch.randn(16, 8)
    layer = router(z_loss=0.5, balance=0.25)
    layer.load = torch.tensor([0.7, 0.2, 0.1])
    actual = gradient(layer, hidden, scale=32.0)
    weight = layer.weight.detach().requires_grad_()
    logits = hidden @ weight.t()
    balance = 3 * (layer.load * logits.softmax(dim=1).mean(dim=0)).sum()
    ((0.5 * logits.logsumexp(dim=1).square().mean() + 0.25 * balance) * 32.0).backward()
    torch.testing.assert_close(actual, weight.grad)


def test_a_router_that_is_evaluated_has_no_losses() -> None:
    layer = router(z_loss=0.5).eval()
    assert torch.count_nonzero(gradient(layer, torch.randn(16, 8), scale=1.0)) == 0


def test_the_routing_counts_every_use_since_it_was_last_taken() -> None:
    layer = router()
    for _ in range(2):
        layer(torch.randn(16, 8))
    _, used = layer(torch.zeros(4, 8))
    routing = take_routing(layer, None, torch.device("cpu"))
    assert routing is not None
    assert used.sum() == 8
    assert sum(routing.load[0]) == pytest.approx(1.0)
    assert 0 < routing.entropy[0] < 1.0986123
    layer(torch.zeros(4, 8))
    again = take_routing(layer, None, torch.device("cpu"))
    assert again is not None
    assert again.entropy[0] == pytest.approx(1.0986123), "all experts are as probable"
    assert sorted(again.load[0]) == [0.0, 0.5, 0.5]
    assert take_routing(torch.nn.Linear(2, 2), None, torch.device("cpu")) is None


def test_the_routing_of_sequences_is_counted_by_their_domain() -> None:
    layer, cpu = router(), torch.device("cpu")
    torch.nn.init.zeros_(layer.weight)
    layer.weight.data[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    hidden = torch.zeros(5, 3, 8)  # positions, sequences, hidden
    hidden[:, 1, 0], hidden[:, 2, 0] = 50.0, -50.0
    for micro_batch in (hidden[:, :2], hidden[:, 2:]):
        layer(micro_batch)
    routing = take_routing(layer, None, cpu, ["math", "law", "code"], ["code", "law", "math", "poems"])
    assert routing is not None
    assert list(routing.by_domain) == ["code", "law", "math"]
    assert routing.by_domain["law"].load == [[0.0, 0.5, 0.5]]
    assert routing.by_domain["code"].load == [[0.5, 0.5, 0.0]]
    assert routing.by_domain["math"].entropy[0] == pytest.approx(1.0986123)
    assert routing.by_domain["law"].entropy[0] == pytest.approx(0.0, abs=1e-6)
    layer.eval()(hidden)
    layer(hidden)
    assert layer.counts is not None
    assert layer.counts.shape == (1, 5), "what is evaluated takes no memory per sequence"
