"""The forest as one mixture of experts: `btm-scale upcycle`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.handmade_run import DOMAINS
from helpers.upcycling import WEIGHTS, Run, change, files_of, unscored
from helpers.warm import Warm
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import workers
from btm_scale.checkpoint.merge.runner import UnitRunner
from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.evaluate.hf_score import block_log_probs
from btm_scale.evaluate.mixture_facts import mixture_note, parameters_of
from btm_scale.forest import router_sums
from btm_scale.forest.expert import CARD, read_expert
from btm_scale.forest.routers import ROUTERS
from btm_scale.forest.scores import evaluation_text
from btm_scale.generate.loglikelihood import generator_of_method, score_continuations
from btm_scale.model.hf_decoder import Decoder
from btm_scale.run import upcycle as module
from btm_scale.run.mixture_recipe import Recipe
from btm_scale.run.upcycle import upcycle
from btm_scale.run_dir import MOE, RunDir, finished_models
from btm_scale.serve.catalog import catalog_of


@pytest.fixture
def run(handmade: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return unscored(handmade, tmp_path, monkeypatch)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experts whose hidden states were computed."""
    names: list[str] = []
    compute = router_sums._compute

    def noted(run: RunDir, name: str, *rest: Any) -> dict[str, np.ndarray]:
        names.append(name)
        return compute(run, name, *rest)

    monkeypatch.setattr(router_sums, "_compute", noted)
    return names


def mean_loss(config: RunConfig, run: RunDir) -> float:
    """The mean loss of the run's mixture over the domains, in nats per token of test text."""
    decoder = Decoder.load(run.model(MOE))
    texts = [evaluation_text(config, run, domain, "test") for domain in config.domains]
    return float(np.mean([-block_log_probs(decoder, text.tokens, text.block_starts).mean() for text in texts]))


def test_the_fitted_router_predicts_better_than_the_others(run: Run) -> None:
    losses = {}
    for router in ROUTERS:
        upcycle(*run, Recipe(router=router))
        losses[router] = mean_loss(*run)
    best, second, *_ = sorted(losses, key=lambda router: losses[router])
    assert {best, second} == {"fitted", "fitted-routed"}, losses
    assert [path.name for path in run[1].root.glob(".moe*")] == []


def test_the_model_is_recorded_like_any_other_of_the_run(run: Run) -> None:
    made = upcycle(*run, Recipe(experts=("python", "docs", "cpp"), without=("cpp",), top_k=1))
    directory = run[1].model(MOE)
    card = read_expert(directory)
    assert (directory, MOE in finished_models(run[1])) == (run[1].root / "moe", True)
    assert [(parent.name, parent.weight) for parent in card.parents] == [("docs", 0.5), ("python", 0.5)]
    assert card.layout == {"top_k": 1, "router": "fitted-routed"}
    assert card.data_fingerprint == {name: read_expert(run[1].model(name)).content_hash for name in ("docs", "python")}
    assert card.content_hash == content_hash(directory)
    assert json.loads((directory / "config.json").read_text())["expert_names"] == ["docs", "python"]
    weights = load_file(directory / WEIGHTS)
    assert made.shape.parameters == sum(tensor.numel() for tensor in weights.values())
    mlp = sum(tensor.numel() for name, tensor in weights.items() if ".experts.0." in name)
    assert made.shape.parameters - made.shape.active_parameters == mlp


def test_leaving_an_expert_out_and_adding_it_again_gives_the_same_bytes_and_reads_no_text(
    run: Run, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = run[1].model(MOE)
    upcycle(*run, Recipe(router="fitted"))
    complete = files_of(folder)
    assert sorted(read) == ["cpp", "docs", "licences", "python"]
    upcycle(*run, Recipe(without=("cpp",), router="fitted"))
    without = files_of(folder)
    assert without[WEIGHTS] != complete[WEIGHTS]
    upcycle(*run, Recipe(router="fitted"))
    assert files_of(folder) == complete
    shutil.rmtree(run[1].model("cpp"))
    upcycle(*run, Recipe(router="fitted"))
    assert files_of(folder) == without, "a mixture without an expert is that of a forest without it"
    assert len(read) == 4
    assert caplog.text.count("reading the hidden states") == 4


MAKE_MIXTURE = """
import sys
from pathlib import Path
from btm_scale.config.run import RunConfig
from btm_scale.run.mixture_recipe import Recipe
from btm_scale.run.upcycle import make_mixture
from btm_scale.run_dir import MOE, RunDir
run = RunDir(Path(sys.argv[1]))
made = make_mixture(RunConfig.load(run.config), run, Recipe(without=("cpp",), router="fitted"), run.model(MOE))
assert not made.is_complete
print([name for name in ("torch", "megatron", "transformers") if name in sys.modules])
"""


def test_a_router_of_kept_sums_is_made_without_what_reads_text(run: Run) -> None:
    upcycle(*run, Recipe(router="fitted"))
    command = [sys.executable, "-c", MAKE_MIXTURE, str(run[1].root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"


def test_an_expert_with_other_weights_is_read_again_and_no_other_is(run: Run, read: list[str]) -> None:
    upcycle(*run, Recipe(router="fitted"))
    read.clear()
    directory = run[1].model("cpp")
    weights = load_file(directory / WEIGHTS)
    weights["model.norm.weight"] += 1
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    read_expert(directory).model_copy(update={"content_hash": content_hash(directory)}).save(directory / CARD)
    assert not upcycle(*run, Recipe(router="fitted")).is_complete
    assert read == ["cpp"]


def test_repeating_it_changes_nothing_and_another_recipe_replaces_the_model(run: Run) -> None:
    first = upcycle(*run, Recipe(router="random"))
    before = run[1].model(MOE).stat().st_ino
    assert upcycle(*run, Recipe(router="random")).is_complete
    assert run[1].model(MOE).stat().st_ino == before
    second = upcycle(*run, Recipe(router="random", random_seed=1))
    assert not first.is_complete
    assert not second.is_complete
    assert first.card.content_hash != second.card.content_hash
    assert [path.name for path in run[1].root.glob(".moe*")] == []


def test_what_fails_while_a_model_is_made_leaves_the_former_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    upcycle(*run, Recipe(router="random"))
    before = files_of(run[1].model(MOE))

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "publish_directory", fail)
        with pytest.raises(KeyboardInterrupt):
            upcycle(*run, Recipe(router="fitted"))
    assert files_of(run[1].model(MOE)) == before
    assert [path.name for path in run[1].root.glob(".moe*")] == []
    made = upcycle(*run, Recipe(router="fitted"))
    assert read_expert(run[1].model(MOE)).content_hash == made.card.content_hash
    assert [path.name for path in run[1].root.glob(".moe*")] == []


def test_an_interrupted_upcycle_resumes_with_the_remaining_tensors_and_has_the_same_bytes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run[1].model(MOE)
    upcycle(*run, Recipe(router="fitted"))
    expected = files_of(directory)
    shutil.rmtree(directory)
    monkeypatch.setattr(workers, "_NOTE_EVERY", 1)
    monkeypatch.setattr(workers, "MOST", 1)
    merge_unit, merged = UnitRunner.__call__, list[str]()

    def stopping(self: UnitRunner, unit: Any) -> Any:
        if len(merged) == 10:
            raise KeyboardInterrupt
        merged.append(unit.name)
        return merge_unit(self, unit)

    monkeypatch.setattr(UnitRunner, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle(*run, Recipe(router="fitted"))
    assert not directory.exists()
    merged += [""]
    upcycle(*run, Recipe(router="fitted"))
    assert not set(merged[:9]) & set(merged[11:]), "the tenth may not have been noted"
    assert files_of(directory) == expected


def test_the_mixture_scores_continuations_and_is_served_like_any_model(run: Run) -> None:
    upcycle(*run, Recipe(router="random"))
    tokens = evaluation_text(*run, "docs", "test").tokens[:20]
    generator = generator_of_method(*run, MOE)
    [(score, _)] = score_continuations(generator, [(tokens[:10].tolist(), tokens[10:].tolist())])
    log_probs = block_log_probs(Decoder.load(run[1].model(MOE)), tokens, np.zeros(1, np.int64))
    assert score == pytest.approx(log_probs[9:].sum(), abs=1e-3)
    assert MOE in catalog_of(DOMAINS, finished_models(run[1]), "expert", created=0).others


def test_the_seed_can_be_a_shared_expert_that_is_recorded_and_replaced(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run[1].model(MOE)
    upcycle(*run, Recipe(router="fitted"))
    alone = mean_loss(*run)
    main(["upcycle", str(run[1].root), "--router", "fitted", "--shared-expert", "seed", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["family"], answer["shared_expert"]) == ("qwen2_moe", "seed")
    weights = load_file(directory / WEIGHTS)
    seed = load_file(run[1].model("seed") / WEIGHTS)
    name = "model.layers.0.mlp.{}down_proj.weight"
    assert weights[name.format("shared_expert.")].equal(seed[name.format("")])
    assert answer["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert mean_loss(*run) < alone + 1.0
    card = read_expert(directory)
    assert card.layout["shared_expert"] == "seed"
    assert card.data_fingerprint["seed"] == read_expert(run[1].model("seed")).content_hash
    assert "router fitted; shared expert seed." in mixture_note(run[1], card)
    assert upcycle(*run, Recipe(router="fitted", shared_expert="seed")).is_complete
    change(run[1].model("seed"), seed | {"model.norm.weight": seed["model.norm.weight"] + 1})
    assert " seed changed or left the forest since." in mixture_note(run[1], card)
    assert not upcycle(*run, Recipe(router="fitted-routed", shared_expert="seed")).is_complete


def in_other_shape(run: RunDir) -> None:
    config = run.model("cpp") / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"rope_parameters": settings["rope_parameters"] | {"rope_theta": 5e5}}))


def with_other_tokenizer(run: RunDir) -> None:
    (run.model("cpp") / "tokenizer.json").write_text("{}")
    (run.model("docs") / "tokenizer.json").write_text("[]")


def without_domain(run: RunDir) -> None:
    read_expert(run.model("cpp")).model_copy(update={"domains": {}}).save(run.model("cpp") / CARD)


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        (Recipe(experts=("pithon", "cpp")), None, "Unknown expert 'pithon'. Did you mean 'python'"),
        (Recipe(without=("java",)), None, "Unknown expert 'java'"),
        (Recipe(experts=("cpp",)), None, "^cpp is left of cpp, docs, licences, python. A mixture needs at least two"),
        (Recipe(router="fited"), None, "Unknown router 'fited'. Did you mean 'fitted'"),
        (Recipe(top_k=5), None, "^--top-k is 5, and there are 4 experts"),
        (Recipe(shared_expert="sed"), None, "^--shared-expert: Unknown model 'sed'. Did you mean 'seed'"),
        (
            Recipe(without=("cpp",), shared_expert="cpp"),
            in_other_shape,
            "'docs' and 'cpp' have different shapes: .*Use another shared expert, or none",
        ),
        (Recipe(), in_other_shape, "'cpp' and 'docs' have different shapes: rope_theta 500000.0 and 10000.0"),
        (Recipe(), with_other_tokenizer, "tokenizer.json differs between"),
        (Recipe(), without_domain, r"'cpp' was not trained on a domain of .*--without cpp"),
    ],
)
def test_what_makes_no_mixture_is_refused_before_anything_is_written(
    run: Run, recipe: Recipe, change: Callable[[RunDir], None] | None, message: str
) -> None:
    if change is not None:
        change(run[1])
    before = files_of(run[1].root)
    with pytest.raises(ForestError, match=message):
        upcycle(*run, recipe)
    assert files_of(run[1].root) == before


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(router="random"), Recipe(without=("docs",), shared_expert="docs")])
def test_an_expert_whose_weights_are_not_numbers_is_named(recipe: Recipe, tensor: str, run: Run) -> None:
    weights = load_file(run[1].model("docs") / WEIGHTS)
    weights[tensor].view(-1)[0] = float("nan")
    change(run[1].model("docs"), weights)
    if recipe.shared_expert and ".mlp." not in tensor:  # of which only the MLPs are taken
        assert not upcycle(*run, recipe).is_complete
        return
    remedy = "another --shared-expert" if recipe.shared_expert else "--without docs"
    message = f"The weights of docs have NaN or infinities.* leave them out: {remedy}$"
    with pytest.raises(ForestError, match=message):
        upcycle(*run, recipe)
    assert not run[1].model(MOE).exists()
    assert [path.name for path in run[1].root.glob(".*moe*")] == []


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_whose_mlps_get_zeros_have_no_fitted_router(router: str, run: Run) -> None:
    for name in DOMAINS:
        weights = load_file(run[1].model(name) / WEIGHTS)
        weights["model.layers.0.post_attention_layernorm.weight"].zero_()
        change(run[1].model(name), weights)
    if not router.startswith("fitted"):
        assert not upcycle(*run, Recipe(router=router)).is_complete
        return
    with pytest.raises(ForestError, match=r"inputs of an MLP are zero.*--router random"):
        upcycle(*run, Recipe(router=router))
    assert not run[1].model(MOE).exists()
    assert [path.name for path in run[1].root.glob(".*moe*")] == []


def test_the_results_say_how_large_the_model_is_and_whether_the_forest_has_changed_since(run: Run) -> None:
    def note() -> str:
        return mixture_note(run[1], read_expert(run[1].model(MOE)))

    upcycle(*run, Recipe(router="random", without=("docs",)))
    size = parameters_of(run[1], MOE)
    assert size.active < size.total
    assert note() == (
        f"moe: {size.total:,} parameters, of which {size.active:,} compute a token; top 2 of cpp, licences, python; "
        "router random. Without docs."
    )
    shutil.rmtree(run[1].model("cpp"))
    assert note().endswith(f" cpp changed or left the forest since. Make it again: btm-scale upcycle {run[1].root}")


def test_a_run_with_an_expert_called_moe_keeps_it(run: Run) -> None:
    run[1].model("cpp").rename(run[1].experts / MOE)
    assert run[1].model(MOE) == run[1].experts / MOE
    with pytest.raises(ForestError, match=r"expert or a domain called 'moe'.*--method moe"):
        upcycle(*run, Recipe())


def test_the_command_answers_with_the_models_size(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    main(["upcycle", str(run[1].root), "--experts", "python,cpp", "--router", "random", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["experts"] == ["cpp", "python"]
    assert answer["active_parameters"] == answer["parameters"], "two of two experts compute each token"
    with pytest.raises(SystemExit) as ended:
        main(["upcycle", str(run[1].root), "--experts", "python"])
    assert ended.value.code == 2


@pytest.mark.full
@pytest.mark.slow
def test_the_mixture_is_scored_evaluated_and_generates_like_any_model(
    finished_run: Run, warm: Warm, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run[1].root, folder, symlinks=True)
    config, run = finished_run[0], RunDir(folder)
    assert "fitted" in warm.check("upcycle", folder).stdout
    results = json.loads(warm.check("evaluate", folder, "--json").stdout)
    assert set(results["methods"]["moe"]["perplexity"]) == set(config.all_domains)
    assert results["compute"]["moe"] == results["compute"]["ensemble"]
    assert results["parameters"]["moe"]["active"] <= results["parameters"]["moe"]["total"]
    loss = np.mean([np.log(results["methods"]["moe"]["perplexity"][domain]) for domain in config.domains])
    assert loss == pytest.approx(mean_loss(config, run), abs=2e-2), "transformers computes it as Megatron-core does"
    text = warm.check("generate", folder, "--model", "moe", "--prompt", "def ", "--max-tokens", 5, "--json").stdout
    assert len(json.loads(text)["generations"][0]["tokens"]) == 5
