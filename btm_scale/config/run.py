"""RunConfig: the complete config of a run. All problems in a YAML are reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from btm_scale.config.changes import Changes, MayChange
from btm_scale.config.data import DataConfig, DomainConfig, TokenizerConfig
from btm_scale.config.deepspeed import MAY_CHANGE
from btm_scale.config.evaluation import BaselinesConfig, EvaluateConfig
from btm_scale.config.experts import DomainName, ExpertConfig, require_name
from btm_scale.config.launch import LaunchConfig
from btm_scale.config.layout import Layout
from btm_scale.config.model import ModelConfig
from btm_scale.config.moe import MoeConfig, mixture_problems
from btm_scale.config.secrets import refuse_secrets
from btm_scale.config.section import Section, explain
from btm_scale.config.seed_share import seed_share_problems
from btm_scale.config.training import (
    BranchConfig,
    BudgetConfig,
    CheckpointConfig,
    DevLossConfig,
    HealthConfig,
    OptimizerConfig,
    ProfileConfig,
)
from btm_scale.config.upgrade import SCHEMA, upgraded, with_current_names
from btm_scale.config.yaml import apply_overrides, dump_yaml, load_yaml
from btm_scale.errors import ConfigError, unknown_name
from btm_scale.run_dir import LONGER_DENSE, RANDOM_SPLIT


def _with_pretrained(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the path of a pretrained model, whose config is read at once, and default to its tokenizer."""
    model, tokenizer = values.get("model"), values.get("tokenizer") or {}
    if not isinstance(model, dict) or not isinstance(tokenizer, dict):
        return values
    given = model.get("pretrained")
    if not isinstance(given, str):
        return values
    directory = str((folder / given).resolve())
    return values | {
        "model": {**model, "pretrained": directory},
        "tokenizer": {"path": directory} | tokenizer,
    }


class RunConfig(Section):
    """A run. Read one with `RunConfig.load`."""

    name: MayChange[str] = Field(
        default="run", description="title of the run and prefix of its jobs; default: the name of the YAML file"
    )
    random_seed: int = Field(default=1, ge=0, lt=2**31, description="seed of weights, splits and sampling")
    model: ModelConfig = ModelConfig(preset="llama-4m")
    tokenizer: TokenizerConfig = TokenizerConfig()
    text_root: MayChange[Path] = Field(
        default=Path(), description="folder of relative paths of text; default: that of the YAML"
    )
    domains: dict[DomainName, DomainConfig] = Field(min_length=1, description="text by domain, one expert each")
    novel_domains: dict[DomainName, DomainConfig] = Field(
        default_factory=dict, description="domains that are evaluated and never trained on"
    )
    added_domains: dict[DomainName, DomainConfig] = Field(
        default_factory=dict,
        description="domains whose experts join the forest later; seed and dense do not train on them",
    )
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    layout: Layout = Layout()
    seed_layout: dict[str, Any] = Field(
        default_factory=dict,
        description="settings that differ from layout for seed and dense, which train on all domains",
    )
    experts: dict[str, ExpertConfig] = Field(default_factory=dict, description="settings of single experts, by domain")
    moe: Annotated[MoeConfig | None, Changes(effect="the mixture of experts is made again")] = None
    baselines: MayChange[BaselinesConfig] = BaselinesConfig()
    checkpoint: MayChange[CheckpointConfig] = CheckpointConfig()
    dev_loss: DevLossConfig = DevLossConfig()
    health: MayChange[HealthConfig] = HealthConfig()
    profile: MayChange[ProfileConfig] = ProfileConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: Annotated[dict[str, Any], Changes(keys=MAY_CHANGE)] = Field(
        default_factory=dict, description="settings that are merged into the DeepSpeed config"
    )
    launch: MayChange[LaunchConfig] = LaunchConfig()

    _no_secrets = model_validator(mode="before")(refuse_secrets)  # first, so that no other message repeats one

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        places = {
            "domains": self.domains,
            "novel_domains": self.novel_domains,
            "added_domains": self.added_domains,
        }
        problems = [
            f"'{name}' appears in both {one} and {other}. A domain is trained on, added later or novel: list it once."
            for (one, first), (other, second) in combinations(places.items(), 2)
            for name in first
            if name in second
        ]
        problems += [
            f"experts.{name}: {unknown_name('domain', name, self.expert_domains)}"
            for name in self.experts
            if name not in self.expert_domains
        ]
        last = self.budget.last.weights if self.budget.last is not None else {}
        problems += [
            f"budget.last.weights.{name}: {unknown_name('domain', name, self.expert_domains)}"
            for name in last
            if name not in self.expert_domains
        ]
        problems += [
            f"{name}: token_files need the tokenizer that made them. Set tokenizer.path to its directory."
            for name, domain in self.all_domains.items()
            if domain.token_files and self.tokenizer.path is None
        ]
        problems += self._parents_come_first()
        shape = self.model.shape(vocabulary=1, positions=self.budget.sequence_length)
        length = self.budget.sequence_length
        problems += [f"layout: {problem}" for problem in self.layout.problems(shape, length)]
        problems += [
            f"experts.{name}: has both model and branch. An expert with its own model does not branch: remove one."
            for name, expert in self.experts.items()
            if expert.model is not None and expert.branch != BranchConfig()
        ]
        problems += [
            f"experts.{name}: has both model and train: mlp. An expert with its own model starts at random, and all of "
            "it must be trained: remove one."
            for name, expert in self.experts.items()
            if expert.model is not None and expert.train != "all"
        ]
        problems += [
            f"experts.{name}: {problem}"
            for name, expert in self.experts.items()
            if (problem := self.budget.batch_problem(expert.batch_tokens))
        ]
        own = {"seed_layout": (self.model, self.seed_layout)} | {
            f"experts.{name}.layout": (self.expert_model(name), expert.layout) for name, expert in self.experts.items()
        }
        layouts = {"layout": self.layout}
        for place, (model, changes) in own.items():
            try:
                shape = model.shape(vocabulary=1, positions=length)
                layouts[place] = Layout.model_validate(self.layout.model_dump() | changes)
                # What an override inherits from `layout` is reported once.
                problems += [
                    f"{place}: {problem}"
                    for problem in layouts[place].problems(shape, length)
                    if f"layout: {problem}" not in problems
                ]
            except ValidationError as error:
                problems.append(explain(error, Layout, prefix=place))
        problems += [
            f"{place}: {problem}"
            for place, sequences in self._batches()
            if place in layouts
            for problem in layouts[place].batch_problems(sequences)
        ]
        problems += seed_share_problems(self)
        problems += mixture_problems(self)
        positions = self.model.shape(vocabulary=1, positions=length).positions
        if length > positions:
            problems.append(
                f"budget.sequence_length {length} is longer than the {positions} positions of {self.model.pretrained}. "
                f"Use {positions} or less, or set model.rope."
            )
        if self.data.dev + self.data.test >= 1:
            problems.append(
                "data.dev and data.test add up to 1 or more. Training needs the rest of the text: lower one of them."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _batches(self) -> Iterable[tuple[str, int]]:
        """Return each distinct (key of a layout in the YAML, sequences of a batch trained in it)."""
        batches = [("seed_layout", self.budget.sequences)]
        for name in self.expert_domains:
            own = self.experts.get(name)
            is_own = own is not None and (own.layout or own.batch_tokens is not None)
            batches.append((f"experts.{name}.layout" if is_own else "layout", self.expert_sequences(name)))
        batches += [("layout", self.expert_sequences(name)) for name in self.random_split_models]
        return dict.fromkeys(batches)

    def _parents_come_first(self) -> list[str]:
        order = list(self.expert_domains)
        return [
            f"experts.{name}.branch.parents: '{parent}' "
            + ("comes after it" if parent != name else "is the expert itself")
            + ". An expert branches from models listed before it: choose other parents, or move the domain."
            for name, expert in self.experts.items()
            if isinstance(expert.branch.parents, dict) and name in order
            for parent in expert.branch.parents
            if parent in order[order.index(name) :]
        ]

    @property
    def expert_domains(self) -> dict[str, DomainConfig]:
        """The domains that have an expert; added domains come last."""
        return {**self.domains, **self.added_domains}

    @property
    def all_domains(self) -> dict[str, DomainConfig]:
        """The domains that are evaluated: those with an expert, then novel ones, in the order of the YAML."""
        return {**self.expert_domains, **self.novel_domains}

    def branch(self, name: str) -> BranchConfig | None:
        """Return how an expert branches; None if it has its own size and does not branch."""
        if name not in self.experts:
            return BranchConfig()
        return None if self.experts[name].model is not None else self.experts[name].branch

    def expert_model(self, name: str) -> ModelConfig:
        """Return the model section of an expert or any other model of the run."""
        return (self.experts[name].model if name in self.experts else None) or self.model

    def expert_sequences(self, name: str) -> int:
        """Return the sequences per batch of an expert or a random split's model: its own, or an equal part of those
        of dense."""
        own = self.experts[name].batch_tokens if name in self.experts else None
        if own is not None:
            return max(1, own // self.budget.sequence_length)
        return max(1, self.budget.sequences // len(self.domains))

    @property
    def longer_dense_models(self) -> dict[str, float]:
        """Dense baselines with more compute than the forest, by name, with the factor."""
        return {f"{LONGER_DENSE}{factor:g}x": factor for factor in self.baselines.dense_compute}

    @property
    def random_split_models(self) -> list[str]:
        """The models of the random split, one per expert, each trained on a random part of all domains."""
        return [f"{RANDOM_SPLIT}{i}" for i in range(len(self.domains))] if self.baselines.random_split else []

    @property
    def shared_layout(self) -> Layout:
        """The layout of seed and dense, which train on all domains."""
        return Layout.model_validate(self.layout.model_dump() | self.seed_layout)

    def expert_layout(self, name: str) -> Layout:
        """Return the layout of an expert's group."""
        own = self.experts[name].layout if name in self.experts else {}
        return Layout.model_validate(self.layout.model_dump() | own)

    @property
    def precisions(self) -> set[str]:
        """The precisions of all groups of the run; includes `auto` until it is resolved."""
        experts = {self.expert_layout(name).precision for name in self.experts}
        return {self.layout.precision, self.shared_layout.precision} | experts

    def with_precision(self, precision: str) -> RunConfig:
        """Return this config with `precision` in place of each `auto`."""
        return self._with_precisions(precision, precision, dict.fromkeys(self.experts, precision))

    def with_precisions_of(self, other: RunConfig) -> RunConfig:
        """Return this config with each `auto` replaced by the precision in `other`, a config of the same run."""
        experts = {name: other.expert_layout(name).precision for name in self.experts}
        return self._with_precisions(other.layout.precision, other.shared_layout.precision, experts)

    def _with_precisions(self, layout: str, seed_layout: str, experts: Mapping[str, str]) -> RunConfig:
        def resolved(settings: dict[str, Any], precision: str) -> dict[str, Any]:
            return settings | {"precision": precision} if settings.get("precision") == "auto" else settings

        own = {
            name: expert.model_copy(update={"layout": resolved(expert.layout, experts[name])})
            for name, expert in self.experts.items()
        }
        update: dict[str, Any] = {"seed_layout": resolved(self.seed_layout, seed_layout), "experts": own}
        if self.layout.precision == "auto":
            update["layout"] = self.layout.model_copy(update={"precision": layout})
        return self.model_copy(update=update)

    @classmethod
    def load(cls, path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
        """Read a YAML, apply `key.path=value` overrides, and resolve paths.

        Paths in the YAML are relative to its folder; paths in an override are relative to the working folder. A run
        without a `name` is named after the file.
        A run.yaml of an earlier version is upgraded. Raises ConfigError that lists every problem.
        """
        values = upgraded(load_yaml(path), path)
        values = apply_overrides(
            values,
            overrides,
            paths=("text_root", "tokenizer.path", "model.pretrained", "launch.deepspeed.hostfile"),
        )
        values, renamed = with_current_names(values)
        problems = [f"  {problem}" for problem in renamed]
        values = _with_pretrained(values, path.resolve().parent)
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            problems.append(explain(error, cls))
        if problems:
            raise ConfigError("\n".join([f"{path}:", *problems]))
        config = config._with_absolute_paths(path.resolve().parent)
        return config if "name" in values else config._named_after(path)

    @property
    def is_named(self) -> bool:
        """Whether the YAML sets the name, rather than being named after its file."""
        return "name" in self.model_fields_set

    def _named_after(self, path: Path) -> RunConfig:
        try:
            name = require_name(path.stem, "a run")
        except ValueError:
            return self
        named = self.model_copy(update={"name": name})
        named.model_fields_set.discard("name")
        return named

    def _with_absolute_paths(self, folder: Path) -> RunConfig:
        tokenizer = self.tokenizer
        if tokenizer.path is not None:
            tokenizer = tokenizer.model_copy(update={"path": (folder / tokenizer.path).resolve()})
        root = (folder / self.text_root).resolve()
        hosts = self.launch.deepspeed
        hosts = hosts.model_copy(update={"hostfile": (folder / hosts.hostfile).resolve()})
        launch = self.launch.model_copy(update={"deepspeed": hosts})
        return self.model_copy(update={"text_root": root, "tokenizer": tokenizer, "launch": launch})

    def save(self, path: Path) -> None:
        """Write the resolved config, which loads to an equal config."""
        dump_yaml({"schema": SCHEMA} | self.model_dump(mode="json"), path)
