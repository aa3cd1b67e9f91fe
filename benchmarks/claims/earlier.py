"""Claims that the results of other benchmarks answer."""

from __future__ import annotations

from claims.claim import Bound, Claim
from claims.readings import (
    all_of,
    compute_equivalents,
    families_of_weights,
    moe_ratios,
    rank_correlations,
    ratios,
    worst_ratios,
)

_BTM, _BTX, _FLEXOLMO = "Branch-Train-Merge, arXiv 2208.03306", "BTX, arXiv 2403.07816", "FlexOlmo, arXiv 2507.07024"
_LESS, _MORE = Bound("<", 1), Bound(">", 1)
_EIGHT = (
    "`configs/study.yaml`, 8 domains of 8 MB, a model of 4.2 million parameters, 6 million training tokens for the "
    "forest and for dense"
)
_FOUR = "the demo, 4 domains of 3 MB, 1.1 million parameters, 3 million training tokens"
_BOTH = f"{_EIGHT}; and {_FOUR}"
_STUDY = """\
btm-scale run configs/study.yaml --set text_root=FOLDER --set random_seed=1 --out runs/study-1   # and 2, 3
python benchmarks/record.py study runs/study-1 runs/study-2 runs/study-3"""
_NOVEL = """\
btm-scale run configs/study.yaml --set text_root=FOLDER --set random_seed=1 --out runs/study-1 \\
    --set novel_domains.cpp.text=DEMO/cpp.jsonl --set novel_domains.docs.text=DEMO/docs.jsonl \\
    --set novel_domains.licences.text=DEMO/licences.jsonl                                        # and 2, 3
python benchmarks/record.py study runs/study-1 runs/study-2 runs/study-3"""
_DEMO = """\
btm-scale demo --set random_seed=1 --out runs/demo-1                                             # and 2, 3
python benchmarks/record.py demo runs/demo-1 runs/demo-2 runs/demo-3"""
_RUN_BOTH = f"{_STUDY}\n{_DEMO}"
_FAMILIES = f"the experts of {_FOUR}, mixed by other weights, which are fitted to dev text"
_FIT_FAMILIES = "python benchmarks/ensembles.py runs/demo-1 runs/demo-2 runs/demo-3 --name demo"

CLAIMS = (
    Claim(
        "Ensemble and dense",
        "The ensemble of domain experts has a lower perplexity on their domains than a dense model that was trained "
        "with the same compute.",
        f"{_BTM}, section 3",
        _BOTH,
        _RUN_BOTH,
        ("study", "demo"),
        ratios("ensemble", "dense", _LESS),
    ),
    Claim(
        "Dense-equivalent compute",
        "A forest is as good as a dense model of 2.5 times its compute.",
        f"{_BTM}, section 5, of 64 domains",
        f"{_EIGHT}; dense baselines of 1, 1.5 and 2.5 times the compute, between which log perplexity is a line in log "
        "compute",
        _STUDY,
        ("study",),
        compute_equivalents({"ensemble": Bound(">", 2.5), "ensemble:tempered": None}),
        "The paper's gain grows with the number of domains, of which there are 8 here. A dense model that has read so "
        "little text also improves more with each further token than the paper's.",
    ),
    Claim(
        "Novel domains",
        "The ensemble also has a lower perplexity than dense on domains that no model was trained on.",
        f"{_BTM}, section 3",
        f"{_EIGHT}; C++ headers, documentation and licenses are novel domains",
        _NOVEL,
        ("study",),
        ratios("ensemble", "dense", _LESS, results=("study",), novel=True),
        "The prefix posterior multiplies the likelihoods of all earlier tokens as if the experts' errors on them were "
        "independent. On novel text it is therefore over-confident and gives one expert nearly all of the weight, and "
        "no single one of 8 experts is good there. A tempered posterior of the same experts beats dense (next claim).",
    ),
    Claim(
        "Tempered posterior",
        "Tempering the posterior lowers the ensemble's perplexity, on trained and on novel domains.",
        "this project; the paper's posterior is the prefix posterior",
        f"{_BOTH}. The three parameters of the tempered posterior are fitted to each domain's dev text",
        f"{_NOVEL}\n{_DEMO}",
        ("study", "demo"),
        all_of(
            ratios("ensemble:tempered", "ensemble", _LESS),
            ratios("ensemble:tempered", "ensemble", _LESS, results=("study",), novel=True),
            ratios("ensemble:tempered", "dense", None, results=("study",), novel=True),
        ),
    ),
    Claim(
        "Static prior",
        "The tempered posterior is better from the best fixed mixture of dev text than from the paper's cached prior.",
        "this project",
        _FAMILIES,
        _FIT_FAMILIES,
        ("ensembles",),
        families_of_weights("tempered, static prior", "tempered", _LESS),
        "With one random seed the two are equal to three digits on trained domains, whose dev text fits the tempered "
        "posterior to either prior.",
    ),
    Claim(
        "Posterior and fixed weights",
        "Weights that follow the text (the prefix posterior) are better than fixed weights of each domain.",
        f"{_BTM}, section 2, which proposes the posterior and does not compare it with fixed weights",
        _FAMILIES,
        _FIT_FAMILIES,
        ("ensembles",),
        all_of(
            families_of_weights("prefix", "static prior alone", _LESS),
            families_of_weights("tempered, static prior", "static prior alone", None),
        ),
        "Each domain's text is of one kind here, so that the domain, which the fixed weights know from dev text, says "
        "more than the prefix, and an over-confident posterior keeps less of what the other experts know. Tempered, it "
        "is better than fixed weights.",
    ),
    Claim(
        "Cached prior",
        "The cached prior is at least as good as a uniform one.",
        "DEMix layers, arXiv 2108.05036, section 5; used by Branch-Train-Merge",
        _BOTH,
        _RUN_BOTH,
        ("study", "demo"),
        ratios("ensemble", "ensemble:uniform-prior", _LESS),
    ),
    Claim(
        "Posterior average",
        "One model, the average of the experts' parameters weighted by the domain posterior, has a lower perplexity "
        "than dense.",
        f"{_BTM}, section 3",
        _BOTH,
        _RUN_BOTH,
        ("study", "demo"),
        ratios("average:posterior", "dense", _LESS),
    ),
    Claim(
        "Uniform average",
        "The uniform average of the experts' parameters is worse than dense.",
        f"{_BTM}, section 3",
        _BOTH,
        _RUN_BOTH,
        ("study", "demo"),
        ratios("average:uniform", "dense", _MORE),
    ),
    Claim(
        "Random split",
        "Experts of random parts of the text do not help: their ensemble is worse than dense, so the gain is from "
        "domains and not from ensembling.",
        f"{_BTM}, section 4",
        f"{_EIGHT}; as many experts as domains, each trained on a random part of all text",
        _STUDY,
        ("study",),
        ratios("random-split", "dense", _MORE, results=("study",)),
    ),
    Claim(
        "Top-k experts",
        "The few experts with the largest prior lose almost nothing: at most 1% of perplexity on any domain.",
        f"{_BTM}, section 5, of 8 of 64 experts",
        f"{_BOTH}. The 2 experts of 8, and of 4, with the largest cached prior",
        _RUN_BOTH,
        ("study", "demo"),
        worst_ratios("ensemble:top2", "ensemble", Bound("<", 1.01)),
        "In the demo, the cached prior gives one expert all of a domain's weight but rounding, so that others tie for "
        "the second place, and blocks that the expert left out predicts best lose it. 2 of 4 is also a harder choice "
        "than 8 of 64.",
    ),
    Claim(
        "Mixture of experts and dense",
        "A mixture of experts that is made of the forest and trained jointly has a lower perplexity than a dense model "
        "with the same tokens.",
        f"{_BTX}, section 4",
        f"{_FOUR}; joint training with 10%, 20% and 40% more tokens, and dense baselines with as many",
        "python benchmarks/moe.py --units 'demo-*/joint-*' 'demo-*/dense'",
        ("moe",),
        moe_ratios(
            ("joint-0.1", "moe", "dense", "dense-1.1x", _LESS),
            ("joint-0.2", "moe", "dense", "dense-1.2x", _LESS),
            ("joint-0.4", "moe", "dense", "dense-1.4x", _LESS),
        ),
        "Everything but the MLPs is averaged when the mixture is made, and joint training first has to win back what "
        "that loses. With 40% more tokens it has; BTX trains jointly on a larger part of its tokens.",
    ),
    Claim(
        "Mixture of experts and ensemble",
        "After joint training, the mixture of experts has a lower perplexity than the ensemble that it was made of.",
        f"{_BTX}, section 4",
        f"{_FOUR}; joint training with 10%, 20% and 40% more tokens",
        "python benchmarks/moe.py --units 'demo-*/joint-*' 'demo-*/router-fitted-routed'",
        ("moe",),
        moe_ratios(
            ("joint-0.1", "moe", "forest", "ensemble", _LESS),
            ("joint-0.2", "moe", "forest", "ensemble", _LESS),
            ("joint-0.4", "moe", "forest", "ensemble", _LESS),
            ("router-fitted-routed", "moe", "forest", "ensemble", None),
        ),
        "Everything but the MLPs is averaged when the mixture is made. These experts have moved far from one another, "
        "so that averaging loses much of their gain, which 20% more tokens do not win back and 40% do. The ensemble is "
        "not trained on these tokens. It computes every token with all experts, the mixture with two.",
    ),
    Claim(
        "Mixture of MLP-only experts",
        "A mixture of experts whose MLPs alone were trained has a lower perplexity than the model that they branched "
        "from, without any joint training.",
        f"{_FLEXOLMO}, section 5",
        f"{_FOUR}; the experts train their MLPs alone, routers are fitted in closed form",
        "python benchmarks/moe.py --units 'demo-*/mlps'",
        ("moe",),
        moe_ratios(("mlps", "moe", "mlps", "seed", _LESS), ("mlps", "moe", "mlps", "ensemble", None)),
    ),
    Claim(
        "Router of embeddings",
        "Before any training, a router whose rows are the domains' mean embeddings is better than a random one.",
        f"{_FLEXOLMO}, section 3",
        f"{_FOUR}; mixtures of complete experts that are not trained",
        "python benchmarks/moe.py --units 'demo-*/router-*'",
        ("moe",),
        moe_ratios(
            ("router-embedding", "moe", "router-random", "moe", _LESS),
            ("router-fitted", "moe", "router-random", "moe", None),
        ),
    ),
    Claim(
        "Data ablation",
        "The perplexity of a weighted average of domain experts ranks mixtures of text as models that are really "
        "trained on them do.",
        "Data ablations by parameter averages, arXiv 2410.15661; MergeMix, arXiv 2601.17858",
        "the demo's forest; eight mixtures, drawn before any was trained, each trained from the seed LM like an expert",
        "python benchmarks/mixtures.py --runs runs --units '*/predicted' '*/trained-*' '*/replay-*'",
        ("mixtures",),
        rank_correlations(Bound(">", 0.8)),
        "An expert that replays nothing forgets the other domains, and its averages too, where a model that is trained "
        "on a small fraction of a domain does not; with replay 0.3, mixtures with a share below 0.075 have no weights. "
        "The perplexity of trained models that `mixture` predicts from the averages allows for the former.",
    ),
)
