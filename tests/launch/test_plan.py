"""Plans of clusters that need not be there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import btm_scale
from helpers.worlds import run_script

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.errors import LaunchError
from btm_scale.launch.gpus import GPUS
from btm_scale.launch.memory import rank_memory
from btm_scale.launch.plan import Cluster
from btm_scale.model.shape import ModelShape
from btm_scale.run.plan import make_plan

PAPER_64 = {
    "model": {"preset": "gpt2-350m"},
    "tokenizer": {"vocab_size": 50257},
    "baselines": {"dense": False},
    "budget": {"tokens": 64 * 2**31, "seed_share": 0.5, "sequence_length": 1024, "batch_tokens": 2**21},
}
EIGHT_8B = {
    "model": {"family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "tied": False},
    "tokenizer": {"vocab_size": 128256},
    "baselines": {"dense": False},
    "budget": {"tokens": 2**35, "seed_share": 0.01, "sequence_length": 8192, "batch_tokens": 2**22},
}


ONE_SEQUENCE = EIGHT_8B["budget"] | {"batch_tokens": 8192, "tokens": 2**24}


def config_of(folder: Path, values: dict[str, Any], experts: int) -> RunConfig:
    domains = {f"d{i}": {"text": f"d{i}.jsonl"} for i in range(experts)}
    (folder / "run.yaml").write_text(dump_text({**values, "domains": domains}))
    return RunConfig.load(folder / "run.yaml")


def rows(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for stage in plan["stages"] for row in stage["groups"]]


def test_the_papers_64_experts_of_350m_on_128_gpus(tmp_path: Path) -> None:
    plan = make_plan(config_of(tmp_path, PAPER_64, 64), Cluster(GPUS["v100"], 16, 8))
    assert plan["parameters"] == pytest.approx(355e6, rel=0.01)
    experts = plan["stages"][1]
    # These GPUs have no units for bfloat16; `precision: auto`, which needs no proposal, is fp16 on them.
    assert "precision" not in plan["proposed"]["layout"]
    assert all(", fp16" in row["layout"] for row in rows(plan))
    # As in the paper, every expert has two GPUs, and all train at once.
    assert [(row["ranks"], len(row["models"])) for row in experts["groups"]] == [(2, 64)]
    assert experts["waves"] == 1
    assert experts["seconds"] == pytest.approx(experts["lower_bound_seconds"])
    assert all(row["memory_bytes"]["total"] < 32e9 for row in rows(plan))
    # A ring's all-reduce of 16-bit gradients over 64 groups, each of 512 steps of the branches.
    steps = experts["groups"][0]["steps"]
    between = plan["between_groups"]
    assert between["data_parallel_bytes"] == pytest.approx(2 * 63 * plan["parameters"] * 2 * steps)
    assert between["branch_train_merge_bytes"] == 0


def test_eight_experts_of_8b_on_64_h100(tmp_path: Path) -> None:
    plan = make_plan(config_of(tmp_path, EIGHT_8B, 8), Cluster(GPUS["h100"], 8, 8))
    assert plan["parameters"] == pytest.approx(8.03e9, rel=0.01)
    [experts] = plan["stages"][1]["groups"]
    assert (experts["ranks"], len(experts["models"])) == (8, 8)
    # One whole node an expert, so that no expert's gradients leave its node.
    assert all(len(place["nodes"]) == 1 for place in experts["places"])
    assert 16 * 8.03e9 / 8 < experts["memory_bytes"]["total"] < 72e9
    # 8,192 tokens of 8B parameters at 55% of an H100's bf16 figure: 10 to 13 thousand tokens/s a GPU.
    assert 8_000 < experts["tokens_per_second"] / 8 < 13_000


def test_a_given_layout_is_kept_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(GPUS["h100"], 8, 8)
    given = config_of(tmp_path, EIGHT_8B | {"layout": {"tensor": 8, "recompute": "full", "micro_batch": 2}}, 8)
    plan = make_plan(given, cluster)
    assert plan["proposed"] == {}
    assert {row["layout"] for row in rows(plan)} == {"tensor 8 x data 1, ZeRO 1, bf16, full recomputation"}
    alone = config_of(tmp_path, EIGHT_8B | {"layout": {"micro_batch": 1}}, 8)
    with pytest.raises(
        LaunchError, match=r"a rank needs 189\.\d GB, and 90% of the 80 GB of a h100 are usable\. Raise"
    ):
        make_plan(alone, cluster)


def test_the_longest_sequence_is_the_last_that_fits(tmp_path: Path) -> None:
    cluster = Cluster(GPUS["h100"], 8, 8)
    layout = {"tensor": 8, "recompute": "full", "micro_batch": 1}
    [longest] = {row["longest_sequence"] for row in rows(make_plan(given_length(tmp_path, layout, 8192), cluster))}
    assert longest > 8192
    assert longest % 1024 == 0
    fitting = make_plan(given_length(tmp_path, layout, longest), cluster)
    assert {row["longest_sequence"] for row in rows(fitting)} == {longest}
    with pytest.raises(LaunchError, match=f"or lower micro_batch, or sequence_length to {longest:,}"):
        make_plan(given_length(tmp_path, layout, longest + 1024), cluster)


def given_length(folder: Path, layout: dict[str, Any], length: int) -> RunConfig:
    """Return a config of eight experts whose batches have as many sequences at every length."""
    budget = EIGHT_8B["budget"] | {"sequence_length": length, "batch_tokens": 64 * length}
    return config_of(folder, EIGHT_8B | {"layout": layout, "budget": budget}, 8)


SEVENTY_B = EIGHT_8B | {
    "model": {"family": "llama", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "tied": False}
}


def test_a_model_that_fits_nowhere_is_refused_with_the_nodes_that_it_needs(tmp_path: Path) -> None:
    config = config_of(tmp_path, SEVENTY_B, 1)
    with pytest.raises(LaunchError, match=r"A group needs at least (\d+) nodes of 8: pass --nodes") as refused:
        make_plan(config, Cluster(GPUS["h100"], 1, 8))
    needed = int(re.findall(r"--nodes (\d+)", str(refused.value))[0])
    plan = make_plan(config, Cluster(GPUS["h100"], needed, 8))
    assert {row["ranks"] for row in rows(plan)} == {8 * needed}
    with pytest.raises(LaunchError, match=f"at least {needed} nodes"):
        make_plan(config, Cluster(GPUS["h100"], needed // 2, 8))
    # Even a single sequence of a batch of one does not fit, and ranks cannot share it by its only head.
    one_head = SEVENTY_B | {"model": SEVENTY_B["model"] | {"heads": 1, "kv_heads": 1}}
    tiny = config_of(tmp_path, one_head | {"budget": ONE_SEQUENCE}, 1)
    with pytest.raises(LaunchError, match="More nodes do not help"):
        make_plan(tiny, Cluster(GPUS["h100"], 1, 8))


def test_context_ranks_are_proposed_where_a_batch_has_too_few_sequences(tmp_path: Path) -> None:
    cluster = Cluster(GPUS["h100"], 4, 8)
    first = make_plan(config_of(tmp_path, SEVENTY_B | {"budget": ONE_SEQUENCE}, 1), cluster)
    layout = Layout.model_validate(first["proposed"]["layout"])
    assert (layout.tensor, layout.context, layout.data) == (8, 4, 1)
    assert all("tensor 8 x context 4 x data 1" in row["layout"] for row in rows(first))
    again = make_plan(config_of(tmp_path, SEVENTY_B | {"budget": ONE_SEQUENCE} | first["proposed"], 1), cluster)
    assert again["stages"] == first["stages"]


def test_context_ranks_hold_their_part_of_the_activations_and_send_heads_to_each_other(tmp_path: Path) -> None:
    def planned(**degrees: int) -> dict[str, Any]:
        values = EIGHT_8B | {"layout": {"micro_batch": 1, "zero": 3, "recompute": "full", **degrees}}
        return rows(make_plan(config_of(tmp_path, values, 1), Cluster(GPUS["h100"], 8, 8)))[-1]

    alone, four, sixteen = planned(data=8), planned(data=2, context=4), planned(data=2, context=16)
    assert four["memory_bytes"]["activations"] < 0.26 * alone["memory_bytes"]["activations"]
    assert {name: four["memory_bytes"][name] for name in ("weights", "optimizer")} == {
        name: alone["memory_bytes"][name] for name in ("weights", "optimizer")
    }
    assert (alone["context_bytes_a_step"], alone["step_seconds"]["context"]) == (0.0, 0.0)
    # Queries, keys, values and the output, forward twice and backward; 3 of 4 parts go to other ranks.
    tokens = 2**22 / 8
    assert four["context_bytes_a_step"] == 3 * 32 * tokens * (2 * 4096 + 2 * 1024) * 2 * 3 / 4
    assert not four["context_spans_nodes"]
    # 16 ranks get a copy of one of 8 KV heads each, and 8 of 15 parts go to the other node.
    assert sixteen["context_bytes_a_step"] == 3 * 32 * tokens / 4 * (2 * 4096 + 2 * 2048) * 2 * 15 / 16
    assert sixteen["context_spans_nodes"]
    outside = sixteen["context_bytes_a_step"] * 8 / 15
    network = GPUS["h100"].network * GPUS["h100"].transfer_share
    assert sixteen["step_seconds"]["context"] == pytest.approx(outside / network)


def test_offloaded_inputs_of_layers_are_in_the_hosts_memory_and_longer_sequences_fit(tmp_path: Path) -> None:
    def planned(**settings: Any) -> dict[str, Any]:
        layout = {"micro_batch": 1, "data": 8, "zero": 2, "recompute": "full"} | settings
        return rows(make_plan(config_of(tmp_path, EIGHT_8B | {"layout": layout}, 1), Cluster(GPUS["h100"], 1, 8)))[-1]

    kept, offloaded = planned(), planned(offload_activations=True)
    of_a_layer = 2 * 4096 * 8192
    for part, difference in (("activations", 30 * of_a_layer), ("host", -31 * of_a_layer)):
        assert kept["memory_bytes"][part] - offloaded["memory_bytes"][part] == difference
    assert offloaded["longest_sequence"] > 1.5 * kept["longest_sequence"]
    # Out in the forward pass and back in the backward pass, while layers run.
    sequences = 2**22 / 8192 / 8
    assert offloaded["step_seconds"]["host"] == pytest.approx(sequences * 2 * 31 * of_a_layer / 25e9)
    assert offloaded["step_seconds"]["total"] == kept["step_seconds"]["total"]


def test_products_in_float8_take_memory_for_their_factors_and_a_gpu_that_has_them(tmp_path: Path) -> None:
    def planned(gpu: str, **settings: Any) -> float:
        layout = {"tensor": 8, "micro_batch": 2, "precision": "bf16", "recompute": "full"} | settings
        [_, group] = rows(make_plan(config_of(tmp_path, EIGHT_8B | {"layout": layout}, 1), Cluster(GPUS[gpu], 1, 8)))
        return float(group["memory_bytes"]["activations"])

    # The gradient of the up projection's inputs: [2 x 14336 / 8, 4096] and two sequences of the wider factor.
    own = 2 * 14_336 / 8
    assert planned("h100", float8=True) - planned("h100") == own * 4096 + 2 * 8192 * max(own, 4096)
    tiled = planned("h100", float8=True, recompute="tiled") - planned("h100", recompute="tiled")
    assert 0 < tiled < planned("h100", float8=True) - planned("h100")
    with pytest.raises(LaunchError, match="Cannot train in float8 on a100"):
        planned("a100", float8=True)


def test_a_layout_that_does_not_fit_is_told_to_offload_what_it_keeps(tmp_path: Path) -> None:
    layout = {"micro_batch": 4, "data": 8, "zero": 2, "recompute": "full"}
    values = EIGHT_8B | {"layout": layout, "budget": EIGHT_8B["budget"] | {"sequence_length": 32768}}
    with pytest.raises(LaunchError, match="recompute: full with offload_activations: true, or lower micro_batch"):
        make_plan(config_of(tmp_path, values, 1), Cluster(GPUS["h100"], 1, 8))


def test_a_plan_counts_the_heads_gradients_and_the_time_of_a_checkpoint(tmp_path: Path) -> None:
    values = EIGHT_8B | {"layout": {"tensor": 8, "recompute": "full", "micro_batch": 1}}
    [expert] = make_plan(config_of(tmp_path, values, 1), Cluster(GPUS["h100"], 2, 8))["stages"][1]["groups"]
    # The loss holds the gradient of this rank's 16,032 rows, and all logits, whose rows are padded to 16,064.
    assert expert["memory_bytes"]["head"] == 2 * 16_032 * 4096 + 2 * 16_064 * 8192
    # 12 bytes per parameter, an eighth of them by each rank at 0.5 GB/s.
    assert expert["checkpoint_seconds"] == pytest.approx(12 * 8.03e9 / 8 / 0.5e9, rel=0.01)


def test_the_loss_of_a_frozen_head_holds_a_chunk_of_logits_alone() -> None:
    shape = ModelShape.model_validate(EIGHT_8B["model"] | {"vocabulary": 128256, "positions": 8192})
    layout = Layout(precision="bf16")
    trains_all = rank_memory(shape, layout, micro_batch=1, length=8192, accumulation=1)
    trains_mlps = rank_memory(shape, layout, micro_batch=1, length=8192, accumulation=1, trains="mlp")
    # Four chunks of 2,048 tokens, so that the head's gradient is summed in float32 and then rounded.
    assert trains_all.head == 6 * 128256 * 4096
    assert trains_mlps.head == 2 * 128256 * 2048


def test_a_proposed_layout_is_valid_yaml_of_a_config(tmp_path: Path) -> None:
    cluster = Cluster(GPUS["a100"], 4, 8)
    first = make_plan(config_of(tmp_path, PAPER_64, 16), cluster)
    again = make_plan(config_of(tmp_path, PAPER_64 | first["proposed"], 16), cluster)
    assert again["stages"] == first["stages"]


def test_the_proposal_for_the_seed_lists_its_differences_from_the_experts(tmp_path: Path) -> None:
    ten_billion = EIGHT_8B | {"model": EIGHT_8B["model"] | {"layers": 40}}
    first = make_plan(config_of(tmp_path, ten_billion, 8), Cluster(GPUS["h200"], 4, 8))
    # What is a default is said too: left out, `layout` would give the seed the experts' ZeRO 2.
    assert (first["proposed"]["layout"]["zero"], first["proposed"]["seed_layout"]["zero"]) == (2, 1)
    assert [row["layout"] for row in first["stages"][0]["groups"]] == ["tensor 1 x data 32, ZeRO 1, bf16"]
    again = make_plan(config_of(tmp_path, ten_billion | first["proposed"], 8), Cluster(GPUS["h200"], 4, 8))
    assert again["stages"] == first["stages"]


def test_a_proposed_data_degree_divides_every_experts_batch(tmp_path: Path) -> None:
    # The model needs several GPUs, and one expert has a batch of a single sequence.
    values = EIGHT_8B | {"experts": {"d1": {"batch_tokens": 8192}}}
    plan = make_plan(config_of(tmp_path, values, 8), Cluster(GPUS["h100"], 8, 8))
    assert plan["proposed"]["layout"].get("data", 1) == 1
    assert plan["proposed"]["layout"]["tensor"] > 1
    config_of(tmp_path, values | plan["proposed"], 8)


def test_an_expert_with_its_own_size_is_planned_with_it(tmp_path: Path) -> None:
    values = PAPER_64 | {"layout": {"data": 2}, "experts": {"d1": {"model": {"preset": "gpt2-1.3b"}}}}
    plan = make_plan(config_of(tmp_path, values, 4), Cluster(GPUS["h100"], 1, 8))
    row_of = {name: row for row in rows(plan) for name in row["models"]}
    assert row_of["d0"]["memory_bytes"]["weights"] == 2 * plan["parameters"]
    assert row_of["d1"]["memory_bytes"]["weights"] == pytest.approx(2 * 1.31e9, rel=0.01)
    assert row_of["d1"]["seconds"] > 3 * row_of["d0"]["seconds"]


def test_zero_2_scatters_the_gradients_of_every_micro_batch(tmp_path: Path) -> None:
    seconds = {}
    for zero in (1, 2):
        values = PAPER_64 | {"layout": {"data": 2, "zero": zero}}
        [row] = make_plan(config_of(tmp_path, values, 4), Cluster(GPUS["h100"], 1, 8))["stages"][1]["groups"]
        seconds[zero] = row["step_seconds"]["data"]
    assert seconds[2] == pytest.approx(seconds[1] * (row["accumulation"] + 1) / 2)


@pytest.mark.parametrize("other", [{"precision": "fp16"}, {"offload": "optimizer"}])
def test_gradients_are_only_in_their_sums_in_bf16_without_offloading(other: dict[str, str], tmp_path: Path) -> None:
    memory = []
    for layout in ({"zero": 1, "precision": "bf16"}, {"zero": 1, "precision": "bf16"} | other):
        plan = make_plan(config_of(tmp_path, PAPER_64 | {"layout": layout}, 4), Cluster(GPUS["h100"], 1, 8))
        [row] = plan["stages"][1]["groups"]
        assert row["accumulation"] > 1
        memory.append(row["memory_bytes"]["gradients"])
    assert memory[1] - memory[0] == pytest.approx(2 * plan["parameters"], rel=0.2)


@pytest.mark.parametrize("per_node", [4, 6])
def test_a_proposed_group_is_part_of_a_node_or_complete_nodes(per_node: int, tmp_path: Path) -> None:
    budget = PAPER_64["budget"] | {"batch_tokens": 8 * 24 * 2**13}
    plan = make_plan(config_of(tmp_path, PAPER_64 | {"budget": budget}, 8), Cluster(GPUS["a100"], 4, per_node))
    sizes = [row["ranks"] for row in rows(plan)]
    assert max(sizes) > per_node, "the seed takes more than a node"
    assert all(size < per_node or size % per_node == 0 for size in sizes)


def test_ten_thousand_gpus_are_planned(tmp_path: Path) -> None:
    budget = PAPER_64["budget"] | {"batch_tokens": 2**23}
    plan = make_plan(config_of(tmp_path, PAPER_64 | {"budget": budget}, 1250), Cluster(GPUS["h100"], 1250, 8))
    experts = plan["stages"][1]
    assert sum(len(row["models"]) for row in experts["groups"]) == 1250
    assert experts["seconds"] <= 1.1 * experts["lower_bound_seconds"]


def test_the_command_line_prints_a_plan_and_imports_no_torch(tmp_path: Path) -> None:
    config_of(tmp_path, PAPER_64, 64)
    asked = ("plan", tmp_path / "run.yaml", "--nodes", 16, "--gpu", "V100")
    printed = btm_scale(*asked).stdout
    assert "355 million parameters on 128 v100 (16 nodes of 8)" in printed
    assert "d0 ... d63 (64)" in printed
    assert json.loads(btm_scale(*asked, "--json").stdout)["stages"]
    assert "Unknown GPU 'tpu'" in btm_scale(*asked[:-1], "tpu", check=False).stderr


SHAPE = {
    "family": "llama",
    "layers": 4,
    "hidden": 256,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 688,
    "positions": 32,
    "vocabulary": 2048,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    f"data 2, ZeRO {zero}, {precision}, {count} micro-batches": {
        "data": 2,
        "zero": zero,
        "precision": precision,
        "accumulate": count,
    }
    for zero in (0, 1, 2, 3)
    for precision in ("bf16", "fp32")
    for count in (1, 2)
}
LAYOUTS |= {
    f"MLPs, ZeRO {zero}": {"data": 2, "zero": zero, "precision": "bf16", "trains": "mlp"} for zero in (0, 1, 2, 3)
}
LAYOUTS |= {f"tensor 2, ZeRO {zero}": {"tensor": 2, "zero": zero, "precision": "bf16"} for zero in (1, 0)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes that DeepSpeed really holds in every layout."""
    folder = tmp_path_factory.mktemp("memory")
    spec = {"layouts": LAYOUTS, "shape": SHAPE, "result": str(folder / "result.json")}
    run_script(Path(__file__).with_name("measure_memory.py"), spec, folder)
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_memory_of_a_rank_is_what_deepspeed_allocates(name: str, measured: dict[str, int]) -> None:
    values = dict(LAYOUTS[name])
    count, trains = values.pop("accumulate", 1), values.pop("trains", "all")
    shape = ModelShape.model_validate(SHAPE)
    planned = rank_memory(
        shape, Layout.model_validate(values), micro_batch=1, length=32, accumulation=count, trains=trains
    )
    # Beside ZeRO 3's bucket of a fixed size, so small a model would not be seen.
    assert planned.states - planned.buffers == pytest.approx(measured[name] - planned.buffers, rel=0.10)
