"""Claims that the families of configs/claims answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from claims import comparisons, number_of_domains, seed_share
from claims.claim import Claim, Evidence, Figure

_BTM = "Branch-Train-Merge, arXiv 2208.03306"


def _of(
    family: str,
    size: str,
    title: str,
    text: str,
    source: str,
    read: Callable[[Evidence], Sequence[Figure]],
    reason: str = "",
    draw: Callable[[Evidence], str] | None = None,
) -> Claim:
    """Return a claim that one family answers."""
    command = f"make claims NAME={family} CORPORA=FOLDER"
    return Claim(title, text, source, size, command, (f"claims/{family}",), read, reason, draw)


_SHARES = (
    "4 domains of 8 MB (mathematics, law, medicine, Python), llama-1m, 2 million training tokens, of which the seed LM "
    "gets a fraction of 0, 0.25, 0.5, 0.75 or all"
)

_DOMAINS = (
    "8 domains of 8 MB as 2, 4, 8, 16 and 32 clusters of `btm-scale discover`, one expert each; a model of 1.1 million "
    "parameters, 3 million training tokens for each forest and for its dense baseline; all are evaluated on the test "
    "text of the 8 domains, with one tokenizer. An expert takes as many steps as dense: its batch is dense's 32 "
    "sequences divided by the number of clusters"
)
_FEW_TOKENS = (
    "The gain grows up to 8 clusters, as many as the text has domains. With 16 and 32, an expert has 94 and 47 "
    "thousand tokens to itself, and steps of two and one sequences at the learning rate that is best for 32. The "
    "paper's experts have billions of tokens, however many they are."
)
_CONTINUED = (
    "a model of 1.1 million parameters, trained on 1.8 million tokens of law and mathematics, then on 0.5 million of "
    "medicine and, separately, of Python"
)

CLAIMS = (
    _of(
        "tuning",
        "8 domains of 8 MB as one, a model of 1.1 million parameters, 3 million training tokens; perplexity on dev "
        "text",
        "Tuned baseline",
        "The dense baseline of the runs below with 32 sequences in a batch is tuned at that batch: twice or half its "
        "learning rate, or a larger beta2, is worse.",
        "this project",
        comparisons.tuning,
    ),
    _of(
        "seed-share",
        _SHARES,
        "Seed share",
        "A seed phase with half of the compute is better than none, than a shorter or longer one, and than all.",
        f"{_BTM}, section 5: of 0 to 100%, 40 to 60% is best for the ensemble",
        seed_share.optimum,
        "Training is so short here, 244 steps, that mathematics, law and Python gain more from training on their own "
        "text alone than from what all domains have in common, and medicine less. The paper's experts have billions of "
        "tokens.",
        draw=seed_share.drawn,
    ),
    _of(
        "seed-share",
        _SHARES,
        "Averages and the seed share",
        "An average of the experts' parameters is best with a longer seed phase than the ensemble is.",
        f"{_BTM}, section 5: 60 to 70% is best for averages",
        seed_share.average_wants_more,
        "The uniform average needs experts that are close to one another: it improves until the seed LM gets all "
        "tokens and nothing is averaged. The posterior average follows the ensemble, because its prior is nearly one "
        "expert.",
    ),
    _of(
        "seed-share",
        _SHARES,
        "Averages without a seed LM",
        "Experts that share no trained seed LM cannot be averaged: the average has a perplexity of at least ten times "
        "that of dense.",
        f"{_BTM}, section 5: perplexity in the thousands. Here experts without a seed phase begin with the same random "
        "weights",
        seed_share.no_seed_no_average,
    ),
    _of(
        "domains",
        _DOMAINS,
        "Number of domains",
        "The ensemble's gain over dense grows with the number of domains.",
        f"{_BTM}, section 6: 8 to 64 domains",
        number_of_domains.growing_gain,
        _FEW_TOKENS,
        draw=number_of_domains.drawn,
    ),
    _of(
        "domains",
        f"{_DOMAINS}; dense baselines of 1, 1.5, 2.5 and 4 times the compute, trained once",
        "Compute and the number of domains",
        "The dense-equivalent compute of the ensemble grows with the number of domains.",
        f"{_BTM}, section 6: 2.5 times with 64 domains",
        number_of_domains.growing_equivalent,
        _FEW_TOKENS,
    ),
    _of(
        "domains",
        _DOMAINS,
        "Clusters and given domains",
        "Experts of clusters that are found in the text are at least as good as experts of given domains.",
        "c-BTM, arXiv 2303.14177",
        number_of_domains.clusters_and_given,
        "Each cluster gets as many tokens, so that clusters also change the mixture of text. Dense gains from this as "
        "much as the ensemble: over dense of the same text, their gains differ little.",
    ),
    _of(
        "domains",
        _DOMAINS,
        "Top-k of many clusters",
        "The 4 of 32 experts with the largest prior lose almost nothing: at most 1% of mean perplexity.",
        f"c-BTM, arXiv 2303.14177; {_BTM}, section 6",
        number_of_domains.few_of_many,
        "The text of a given domain is spread over several of the 32 clusters, and the prior of a domain cannot say "
        "which of them a document is from; c-BTM chooses experts by the distance of each context to the clusters.",
    ),
    _of(
        "sizes",
        "4 domains of 8 MB; models of about 1, 4 and 30 million parameters; 1.5 million training tokens for the forest "
        "and for dense",
        "Sizes of models",
        "The ensemble has a lower perplexity than dense at every size of the models.",
        f"{_BTM}, section 4: 125 million to 1.3 billion parameters",
        comparisons.sizes,
    ),
    _of(
        "rounds",
        "a forest of 4 domains, 1.1 million parameters and 2 million tokens, to which experts of 4 more domains are "
        "added one after another, each with as many steps as the first ones; the parents of an average have been "
        "trained longer than the seed LM",
        "Later branching rounds",
        "Experts that join a forest one after another are better if they branch from the posterior average of the "
        "experts that exist than if they branch from the seed LM.",
        f"{_BTM}, section 6",
        comparisons.later_rounds,
    ),
    _of(
        "difficulty",
        "8 domains of 8 MB, 1.1 million parameters, 4 million training tokens; experts take 0.75, 1 or 1.25 times an "
        "equal part of the steps, by how well gzip compresses their text",
        "Steps by difficulty",
        "Longer training of the experts of harder domains lowers the mean perplexity at equal compute.",
        "HDEE, arXiv 2502.19385",
        comparisons.steps_by_difficulty,
    ),
    _of(
        "difficulty",
        "8 domains of 8 MB, 4 million training tokens, no seed phase; experts have 4 layers of hidden size 96, 128 or "
        "152, by how well gzip compresses their text, or all 128",
        "Sizes by difficulty",
        "Larger experts for harder domains lower the mean perplexity at equal compute.",
        "HDEE, arXiv 2502.19385",
        comparisons.sizes_by_difficulty,
    ),
    _of(
        "local-steps",
        "a dense model of 1.1 million parameters on 2 domains, 3 million tokens, two data ranks with local AdamW steps "
        "and outer Nesterov steps",
        "Local steps",
        "Data ranks that synchronize only every 4 or 16 steps lose at most 5% of perplexity at equal tokens.",
        "DiLoCo, arXiv 2311.08105",
        comparisons.local_steps,
        "The momentum of the outer steps carries the weights too far in so short a training from nothing, most with "
        "few local steps. Plain averages instead (`outer_lr: 1`, `outer_momentum: 0`) lose much less. The paper takes "
        "500 local steps between outer steps, most often from a trained model.",
    ),
    _of(
        "continued",
        _CONTINUED,
        "Re-warming",
        "A new warmup and decay of the learning rate adapts a model better to new text than the end of its schedule.",
        "arXiv 2308.04014; arXiv 2403.08763",
        comparisons.rewarming,
    ),
    _of(
        "continued",
        f"{_CONTINUED}, a quarter of it replayed",
        "Replay",
        "Replayed text prevents most of the forgetting, at a cost of at most 5% of perplexity on the new text.",
        "arXiv 2403.08763",
        comparisons.replay,
        "With half a million tokens the model still improves fast on the new domains, so a quarter of these tokens "
        "less costs more than it does at the end of a long training.",
    ),
    _of(
        "late",
        "a dense model of 1.1 million parameters on 4 domains, 2 million tokens, 30% of them of mathematics",
        "Late up-weighting",
        "A domain's text is worth more at the end of the schedule: with the same number of its tokens, up-weighting it "
        "late gives a lower perplexity than up-weighting it throughout.",
        "Domain upsampling at the end of training, arXiv 2406.03476",
        comparisons.late_upweighting,
        "These models are far from converged: their loss still falls fast when the domain is up-weighted, and the "
        "learning rate is low by then, so that its text teaches less than earlier text does.",
    ),
    _of(
        "tokenizers",
        "dense models with the layers of llama-1m and vocabularies of 1,024 to 8,192 tokens, trained on 2 million "
        "tokens of 2 domains, on all of the same test text. With a larger vocabulary, a model reads more text in these "
        "tokens and takes more operations",
        "Perplexity and bits per byte",
        "Perplexity and bits per byte rank models with different tokenizers in opposite orders: with a larger "
        "vocabulary perplexity rises, while the same text costs fewer bits.",
        "The Pile, arXiv 2101.00027, section 3",
        comparisons.bits_per_byte,
    ),
)
