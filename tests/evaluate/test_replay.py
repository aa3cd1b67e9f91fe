"""`btm-scale mixture --replay`: laws are recovered, and the smallest share of other text that keeps it is found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.in_process import answer, refusal
from helpers.tiny_run import save_card, tiny_values, write_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from btm_scale.evaluate.mixture_record import MixtureRecord
from btm_scale.evaluate.replay_law import LAWS, best_replay_fit, fit_replay_laws
from btm_scale.forest.expert import Parent
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import SEED, RunDir

NOISE = 1e-3  # nats
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45)
BY_NAME = {law.name: law for law in LAWS}
seeds = st.integers(0, 2**32 - 1)


def forgetting(share: float, tokens: float = 1.0) -> float:
    """Return a loss on general text, in nats above the seed LM's."""
    return 0.3 * tokens**0.5 - 0.5 * share**0.4


def learning(share: float, tokens: float = 1.0) -> float:
    """Return a loss on the expert's own text, in nats above the seed LM's."""
    return -0.9 * (1.0 - share) ** 0.5 - 0.1 * math.log(tokens)


@settings(max_examples=20)
@given(random_seed=seeds, power=st.floats(0.1, 1.8), scale=st.floats(0.05, 1.0))
@example(random_seed=575, power=0.1, scale=0.25)  # the loss at 0 is far from all others
def test_the_power_law_is_recovered_from_noisy_losses(random_seed: int, power: float, scale: float) -> None:
    random = np.random.default_rng(random_seed)
    shares = np.linspace(0.0, 0.6, 13)
    truth = 0.4 - scale * shares**power
    noisy = truth + NOISE * random.standard_normal(len(shares))
    fits = fit_replay_laws(shares, np.full(len(shares), 1e6), noisy)
    assert "d-cpt" not in fits, "one number of tokens says nothing of others"
    unseen = np.linspace(0.02, 0.58, 9)
    for fit in (fits["power"], best_replay_fit(fits)):
        np.testing.assert_allclose(fit.loss(unseen, 1e6), 0.4 - scale * unseen**power, atol=6 * NOISE)


@settings(max_examples=5)
@given(random_seed=seeds, eta=st.floats(0.2, 1.5), beta=st.floats(0.2, 1.0), gamma=st.floats(0.2, 1.0))
@example(random_seed=0, eta=0.2, beta=0.4, gamma=0.25)  # local minima
@example(random_seed=919, eta=0.52, beta=0.81, gamma=0.37)
def test_the_d_cpt_law_is_recovered_over_tokens_and_shares(
    random_seed: int, eta: float, beta: float, gamma: float
) -> None:
    random = np.random.default_rng(random_seed)
    shares, tokens = np.tile([0.02, 0.05, 0.1, 0.2, 0.3, 0.5], 4), np.repeat([1e5, 3e5, 1e6, 3e6], 6)

    def loss(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        law: np.ndarray = -0.1 + 0.15 * x**eta / (t / 3e6) ** beta + 0.1 / (x + 0.02) ** gamma
        return law

    fit = fit_replay_laws(shares, tokens, loss(shares, tokens) + NOISE * random.standard_normal(24))["d-cpt"]
    x, t = random.uniform(0.03, 0.45, 40), random.uniform(1.5e5, 2.5e6, 40)
    assert np.sqrt(np.mean((fit.loss(x, t) - loss(x, t)) ** 2)) < 6 * NOISE


def test_a_law_is_left_out_if_it_has_as_many_parameters_as_there_are_measurements() -> None:
    three, tokens = np.array([0.0, 0.1, 0.3]), np.array([5.0, 5.0, 5.0])
    assert list(fit_replay_laws(three, tokens, -np.sqrt(three))) == ["linear", "root"]
    assert list(fit_replay_laws(three, np.array([1.0, 2.0, 3.0]), -np.sqrt(three))) == []
    assert [BY_NAME[name].size(varied_tokens=True) for name in BY_NAME] == [3, 3, 4, 6]


def test_the_first_and_last_shares_do_not_count_in_the_errors_unless_others_have_them_too() -> None:
    shares, losses = np.array([0.0, 0.1, 0.2, 0.3]), np.array([9.0, 0.3, 0.2, -9.0])
    fit = fit_replay_laws(shares, np.ones(4), losses)["linear"]
    assert [fit.left_out[i] == fit.loss(shares, 1.0)[i] for i in range(4)] == [True, False, False, True]
    inner = losses[1:3] - np.array(fit.left_out[1:3])
    assert fit.error == pytest.approx(np.sqrt(np.mean(inner**2)))
    twice = np.concatenate([shares, [0.0]])
    again = fit_replay_laws(twice, np.ones(5), np.concatenate([losses, [8.0]]))["linear"]
    assert again.left_out[0] != again.loss(twice, 1.0)[0]


def test_more_of_a_text_never_raises_its_predicted_loss() -> None:
    shares = np.array([0.0, 0.1, 0.2, 0.4])
    for fit in fit_replay_laws(shares, np.ones(4), np.array([0.0, 0.3, 0.2, 0.5])).values():
        assert (np.diff(fit.loss(np.linspace(0, 1, 50), 1.0)) <= 1e-9).all()


def save_run(
    folder: Path,
    share: float,
    *,
    tokens: int = 4000,
    fingerprint: str = "dev",
    noise: float = 0.0,
    known: float = 0.5,
    counted: dict[str, np.ndarray] | None = None,
) -> RunDir:
    """Write what the laws read of a run: cards, and the scores of its seed LM and of its expert `licences`.

    Args: `share` of other domains' text in the expert's; `known`, the fraction of the seed LM's text that is of the
    expert's domain, which is replayed too; `counted`, by model.
    """
    run = RunDir(folder)
    write_config(run.config, tiny_values(folder))
    save_card(run.model(SEED), SEED, domains={"python": 1.0 - known, "licences": known}, content_hash="seed-hash")
    rest = {"python": share} if share else {}
    save_card(
        run.model("licences"),
        "licences",
        domains={"licences": 1.0 - share, **rest},
        parents=(Parent(SEED, 1.0),),
        tokens=tokens,
        content_hash="licences-hash",
    )
    losses = {"python": forgetting(share, tokens / 4000), "licences": learning(share, tokens / 4000)}
    for text, loss in losses.items():
        for model, nats in ((SEED, 3.0), ("licences", 3.0 + loss + noise)):
            log_probs = np.full(20, -nats, np.float32)
            mask = (counted or {}).get(model)
            if counted:
                log_probs[10:] = -9.0  # questions
            starts = np.zeros(1, np.int64)
            scores = Scores(log_probs, starts, f"{model}-hash", fingerprint + text, counted=mask)
            scores.save(run.scores(model, text, "dev"))
    return run


def replays(folder: Path, shares: Sequence[float] = SHARES) -> list[Path]:
    return [save_run(folder / f"r{share}", share).root for share in shares]


def words(runs: Sequence[Path], keep: str = "python=1.02") -> list[object]:
    others = [word for run in runs[1:] for word in ("--replay", run)]
    return ["mixture", runs[0], *others, "--target", "licences=1", "--keep", keep]


def test_the_critical_share_is_where_the_law_meets_the_limit(tmp_path: Path) -> None:
    runs = replays(tmp_path)
    found = answer(*words(runs))
    expected = ((0.3 - math.log(1.02)) / 0.5) ** (1 / 0.4)
    assert found["share"] == pytest.approx(expected, abs=0.003)
    assert found["replay"] == pytest.approx(2 * found["share"]), "half of the replayed text is the expert's own domain"
    assert found["ratio"] == pytest.approx(1.0 - found["share"])
    low, high = found["range"]
    assert low <= found["share"] <= high
    assert found["perplexity"]["python"] == pytest.approx(1.02, abs=0.002)
    assert found["perplexity"]["licences"] == pytest.approx(math.exp(learning(expected)), abs=0.003)
    assert found["fit"]["python"]["law"] == "power"
    assert [one["share"] for one in found["measured"]] == list(SHARES)
    assert [one["replay"] for one in found["measured"]] == [2 * share for share in SHARES]
    assert not found["is_smallest"]
    assert not found["extrapolated"]
    record = MixtureRecord.load(RunDir(runs[0]).mixture)
    assert record.replay is not None
    assert record.replay.share == found["share"]
    assert answer(*words([runs[0], *runs[:0:-1]])) == found, "the order of the runs changes nothing"


def test_the_smallest_share_of_the_runs_is_enough_for_a_generous_limit(tmp_path: Path) -> None:
    found = answer(*words(replays(tmp_path, (0.1, 0.2, 0.3)), keep="python=3"))
    assert found["share"] == 0.1
    assert found["is_smallest"]


def test_runs_of_different_lengths_predict_other_numbers_of_tokens(tmp_path: Path) -> None:
    runs = [
        save_run(tmp_path / f"{share}-{tokens}", share, tokens=tokens).root
        for share in SHARES
        for tokens in (1000, 2000, 4000)
    ]
    many = answer(*words(runs))
    assert many["tokens"] == 4000
    few = answer(*words(runs), "--tokens", 1500)
    assert few["share"] < many["share"], "a shorter training forgets less"
    assert not few["extrapolated"]
    assert answer(*words(runs), "--tokens", 8000)["extrapolated"]


@pytest.mark.parametrize(
    ("shares", "more", "message"),
    [
        ((0.0, 0.1), (), "with 2 shares of other domains' text (0, 0.1). A law of replay needs at least 3"),
        ((0.0, 0.1, 0.2), ("--keep", "licences=0.01"), "No share of other domains' text from 0 to 0.2"),
        ((0.0, 0.1, 0.2), ("--tokens", 9), "all runs trained 'licences' on 4000 tokens"),
        ((0.0, 0.1, 0.2), ("--target", "python=1"), "--replay needs one --target"),
        ((0.0, 0.1, 0.2), ("--runs", 9), "measures nothing. Leave out --text, --runs and --dry-run"),
        ((0.0, 0.1, 0.2), ("--keep", "law=1"), "Unknown domain 'law'"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_with_what_would_be_right(
    shares: tuple[float, ...], more: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    runs = replays(tmp_path, shares)
    assert message in refusal(*words(runs, keep="python=1.5"), *more)
    assert not RunDir(runs[0]).mixture.exists()


def test_runs_with_other_text_or_without_the_expert_are_refused(tmp_path: Path) -> None:
    runs = replays(tmp_path, (0.0, 0.1))
    longer = save_run(tmp_path / "longer", 0.2, tokens=8000).root
    assert "3 runs with different numbers of tokens are too few" in refusal(*words([*runs, longer]))
    diverged = save_run(tmp_path / "diverged", 0.2, noise=math.nan).root
    assert "has no finite loss on 'licences'" in refusal(*words([*runs, diverged]))
    other = save_run(tmp_path / "other", 0.2, fingerprint="more").root
    assert "differs from that of" in refusal(*words([*runs, other]))
    (RunDir(other).model("licences") / "expert.json").unlink()
    assert "'licences' is not a finished expert of" in refusal(*words([*runs, other]))
    assert "--tokens is for the laws of replay" in refusal("mixture", runs[0], "--tokens", 5)


def test_a_limit_of_the_experts_own_domain_is_met_at_the_share_and_not_above_it(tmp_path: Path) -> None:
    runs = replays(tmp_path)
    alone = answer(*words(runs, keep="python=1.1"))
    own = alone["perplexity"]["licences"]
    assert own < math.exp(learning(SHARES[-1])), "the largest share does not meet the limit below"
    both = answer(*words(runs, keep=f"python=1.1,licences={own + 0.005}"))
    assert both["share"] == alone["share"]
    low, high = both["range"]
    assert low <= both["share"] <= high
    said = refusal(*words(runs, keep=f"python=1.1,licences={own - 0.005}"))
    assert "Each can be met, but not together. Raise one of the limits." in said


def test_limits_that_no_share_meets_are_refused_with_the_best_ratio_of_each(tmp_path: Path) -> None:
    runs = replays(tmp_path, (0.0, 0.1, 0.2, 0.3))
    said = refusal(*words(runs, keep="python=1.01,licences=0.3"))
    python, licences = math.exp(forgetting(0.3)), math.exp(learning(0.0))
    assert f"are python {python:.3f} with 0.300, licences {licences:.3f} with 0.000. Raise the limit of" in said


def test_an_expert_that_was_trained_again_and_not_scored_is_refused(tmp_path: Path) -> None:
    runs = replays(tmp_path, (0.0, 0.1, 0.2))
    for model, domains in (("licences", {"licences": 0.6, "python": 0.4}), (SEED, {"licences": 0.5, "python": 0.5})):
        card = RunDir(runs[2]).model(model) / "expert.json"
        before = card.read_bytes()
        parents = (Parent(SEED, 1.0),) if model == "licences" else ()
        save_card(card.parent, model, domains=domains, parents=parents, tokens=4000, content_hash="other")
        said = refusal(*words(runs))
        assert f"'{model}' of {runs[2]} was scored on 'licences' before it was trained again" in said
        card.write_bytes(before)
    answer(*words(runs, keep="python=1.5"))


@pytest.mark.parametrize("without", [SEED, "licences"])
def test_of_conversations_the_answers_count_in_both_scores_even_if_one_lacks_the_mask(
    without: str, tmp_path: Path
) -> None:
    counted = {model: np.arange(20) < 10 for model in (SEED, "licences") if model != without}
    runs = [save_run(tmp_path / f"{share}", share, counted=counted).root for share in (0.0, 0.1, 0.2)]
    measured = answer(*words(runs, keep="python=1.5"))["measured"]
    assert [one["perplexity"]["python"] for one in measured] == pytest.approx(
        [math.exp(forgetting(share)) for share in (0.0, 0.1, 0.2)], rel=1e-5
    )


def test_the_branch_replay_is_that_of_the_run_that_is_named_first(tmp_path: Path) -> None:
    same = [save_run(tmp_path / f"s{share}", share, known=0.0).root for share in (0.1, 0.2)]
    half = save_run(tmp_path / "half", 0.0, known=0.5).root
    first = answer(*words([*same, half], keep="python=1.1"))
    assert first["replay"] == first["share"]
    second = answer(*words([half, *same], keep="python=1.1"))
    assert second["share"] == first["share"]
    assert second["replay"] == pytest.approx(2 * second["share"])
    mostly = save_run(tmp_path / "mostly", 0.0, known=0.95).root
    assert "must be of other domains, and in " in refusal(*words([mostly, *same], keep="python=1.1"))
    only = save_run(tmp_path / "only", 0.0, known=1.0).root
    assert "so replay adds no other text" in refusal(*words([*same, only]))


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    runs = replays(tmp_path, (0.0, 0.1, 0.2))
    link = tmp_path / "link"
    link.symlink_to(runs[0])
    for again in (runs[0], runs[2], link):
        assert "is named twice. A law needs different runs" in refusal(*words([*runs, again]))
