"""Every path in a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "dev", "test")
SEED = "seed"
DENSE = "dense"
AVERAGE = "average/"
RANDOM_SPLIT = "random/"
MOE = "moe"  # the forest as one mixture of experts
LONGER_DENSE = "dense-"
# Names that a run uses for models and logs other than its experts'.
OWN_NAMES = frozenset({SEED, DENSE, AVERAGE.rstrip("/"), RANDOM_SPLIT.rstrip("/"), "score"})


@dataclass(frozen=True)
class RunDir:
    """The paths of one run. It writes nothing, and reads no file."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "run.yaml"

    @property
    def prepare_lock(self) -> Path:
        """The lock of the process that prepares the run."""
        return self.root / ".prepare.lock"

    def domain_lock(self, name: str) -> Path:
        """The lock of the process that encodes one domain."""
        return self.root / f".prepare-{name}.lock"

    @property
    def config_lock(self) -> Path:
        """The lock of the process that rewrites the config."""
        return self.root / ".locks" / "config"

    @property
    def use_lock(self) -> Path:
        """The lock that commands share which read experts for long."""
        return self.root / ".locks" / "use"

    @property
    def forest_lock(self) -> Path:
        """The lock of the processes that evaluate the forest, or change it."""
        return self.root / ".locks" / "forest"

    @property
    def upcycle_lock(self) -> Path:
        """The lock of the process that makes the mixture of experts."""
        return self.root / ".locks" / "upcycle"

    @property
    def ablation_lock(self) -> Path:
        """The lock of the process that records a measured subset."""
        return self.root / ".locks" / "ablation"

    @property
    def mixture_lock(self) -> Path:
        """The lock of the process that records a measured mixture."""
        return self.root / ".locks" / "mixture"

    @property
    def run_lock(self) -> Path:
        """The lock of the process that runs all stages."""
        return self.root / ".locks" / "run"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's Hugging Face directory."""
        return self.root / "tokenizer"

    @property
    def data(self) -> Path:
        """The folder of all token files."""
        return self.root / "data"

    def domain(self, name: str) -> Path:
        """The folder of one domain's token files."""
        return self.data / name

    def tokens(self, domain: str, split: str) -> Path:
        """The prefix of a Megatron-core indexed dataset: `.bin` and `.idx` are appended."""
        return self.domain(domain) / split

    def mask(self, domain: str, split: str) -> Path:
        """One byte per token of a domain of conversations: whether it is part of an answer, and where a cut may be."""
        return self.domain(domain) / f"{split}.mask"

    def fingerprint(self, domain: str) -> Path:
        """The record of what a domain's token files were made from; written last."""
        return self.domain(domain) / "fingerprint.json"

    @property
    def index_cache(self) -> Path:
        """Sample indices cached by Megatron-core's datasets."""
        return self.data / ".index"

    def train(self, model: str) -> Path:
        """The working folder of a model's training."""
        return self.root / "train" / model

    def checkpoints(self, model: str) -> Path:
        """Training checkpoints, one folder per step."""
        return self.train(model) / "checkpoints"

    def branch(self, model: str) -> Path:
        """The record of a model's parents and training text."""
        return self.train(model) / "branch.json"

    def threads(self, model: str) -> Path:
        """The record of how many CPU threads a rank of a model has."""
        return self.train(model) / "threads.json"

    def metrics(self, model: str) -> Path:
        """The metrics of a model's training, one JSON object per step."""
        return self.train(model) / "metrics.jsonl"

    def profile(self, model: str) -> Path:
        """Profiler traces of a few steps, one per rank."""
        return self.train(model) / "profile"

    def stage_log(self, stage: str) -> Path:
        """The path beside which the failure of a stage that trains no model is recorded."""
        return self.root / "stages" / stage

    def log(self, model: str) -> Path:
        """The output of the model's group."""
        return self.train(model) / "log"

    @property
    def monitors(self) -> Path:
        """The folders of monitors that have no other."""
        return self.root / "monitors"

    @property
    def experts(self) -> Path:
        """The forest: one Hugging Face directory per expert."""
        return self.root / "experts"

    @property
    def removed(self) -> Path:
        """The record of the experts that were removed."""
        return self.root / "removed.json"

    def model(self, name: str) -> Path:
        """The Hugging Face directory of a finished model: seed, dense, moe, an average or an expert."""
        if name in (SEED, DENSE) or name.startswith(LONGER_DENSE):
            return self.root / name
        if name == MOE and not (self.experts / MOE).is_dir():  # earlier versions allowed an expert of this name
            return self.root / MOE
        if name.startswith(AVERAGE):
            return self.root / "averages" / name.removeprefix(AVERAGE)
        if name.startswith(RANDOM_SPLIT):
            return self.root / "random-split" / name.removeprefix(RANDOM_SPLIT)
        return self.experts / name

    @property
    def mixture_start(self) -> Path:
        """The mixture of experts before it is trained, if the run trains it."""
        return self.train(MOE) / "upcycled"

    def router(self, model: str) -> Path:
        """The sums that routers are fitted to, of an expert; of `moe`, its router if that is fitted to the mixture."""
        return self.root / "router" / f"{model}.safetensors"

    def model_scores(self, model: str) -> Path:
        """The folder of one model's scores."""
        return self.root / "scores" / model

    def scores(self, model: str, domain: str, split: str) -> Path:
        """A model's log-probabilities of a domain's tokens."""
        return self.model_scores(model) / f"{domain}.{split}.safetensors"

    @property
    def soups(self) -> Path:
        """The members of every domain's greedy soup."""
        return self.root / "evaluation" / "soups.json"

    @property
    def mixture(self) -> Path:
        """The measured mixtures of experts, and the weights that were chosen from them."""
        return self.root / "evaluation" / "mixture.json"

    @property
    def results(self) -> Path:
        """Every method's perplexity."""
        return self.root / "evaluation" / "results.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report.html"


def finished_models(run: RunDir) -> list[str]:
    """Return the names of a run's finished models from their folders alone: baselines, moe, experts, averages, splits.

    It reads no file, so that shell completion is fast.
    """
    dense = sorted(path.parent.name for path in run.root.glob(f"{LONGER_DENSE}*/expert.json"))
    names = [name for name in (SEED, DENSE, *dense, MOE) if (run.model(name) / "expert.json").is_file()]
    for prefix in ("", AVERAGE, RANDOM_SPLIT):
        names += sorted(f"{prefix}{path.parent.name}" for path in run.model(f"{prefix}*").parent.glob("*/expert.json"))
    return names
