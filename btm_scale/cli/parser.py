"""The arguments of the btm-scale command, verb by verb. The other files of this folder do what a verb asks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from btm_scale import __version__
from btm_scale.launch.gpus import GPUS
from btm_scale.run.launcher_table import LAUNCHERS, LOCAL

Verb = Callable[[argparse.Namespace], dict[str, Any] | None]


def build_parser(functions: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """The parser; it puts the function of the verb that was given, by name from `functions`, into `verb`."""
    parser = argparse.ArgumentParser(
        prog="btm-scale",
        description="Branch-Train-Merge: train, ensemble and merge domain-expert language models.",
    )
    parser.add_argument("--version", action="version", version=f"btm-scale {__version__}")
    parser.set_defaults(exit_code=0)
    verbs = _Verbs(parser, functions)
    _pipeline_verbs(verbs)
    _forest_verbs(verbs)
    _checkpoint_verbs(verbs)
    return parser


class _Verbs:
    """Adds verbs to the parser; a name of two words is an action of the first, such as `forest list`."""

    def __init__(self, parser: argparse.ArgumentParser, functions: Mapping[str, Verb]) -> None:
        self._functions = functions
        self._verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
        self._actions: dict[str, Any] = {}

    def family(self, name: str, text: str) -> None:
        """Add a verb that has actions."""
        made = self._verbs.add_parser(name, help=text, description=text)
        self._actions[name] = made.add_subparsers(title="actions", metavar="ACTION", required=True)

    def add(self, name: str, text: str) -> argparse.ArgumentParser:
        """Add a verb, or an action of a verb that `family` added."""
        function = self._functions[name]
        family, _, action = name.rpartition(" ")
        place = self._actions[family] if family else self._verbs
        made: argparse.ArgumentParser = place.add_parser(action, help=text, description=function.__doc__)
        made.add_argument("--json", action="store_true", help="print one JSON document on stdout, and nothing else")
        made.set_defaults(verb=function)
        return made


def _random_seed(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if not 0 <= number < 1 << 32:  # what numpy takes
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 0 to {(1 << 32) - 1}")
    return number


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return number


def _takes_config(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("config", type=Path, help="the run's YAML")
    return _takes_overrides(made)


def _takes_overrides(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    text = "change one value of the YAML, such as budget.tokens=1e6; may be repeated"
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    return made


def _takes_launcher(made: argparse.ArgumentParser, text: str = "", *, of_ranks: bool = False) -> None:
    """`of_ranks`: only the launchers whose ranks find their place in the environment of this process."""
    choices = [name for name, launcher in LAUNCHERS.items() if not of_ranks or name == LOCAL or launcher.become_rank]
    places = ", ".join(f"{name} ({LAUNCHERS[name].help})" for name in choices)
    told = f"where groups run: {places}" + (f"; {text}" if text else "")
    made.add_argument("--launcher", choices=choices, default=LOCAL, help=told)


def _takes_run(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("run", type=Path, help="the run's folder")
    return made


def _pipeline_verbs(verbs: _Verbs) -> None:
    made = _takes_overrides(verbs.add("demo", "the whole pipeline on text that every installation has"))
    made.set_defaults(launcher=LOCAL)
    made = _takes_config(verbs.add("run", "every stage of a config that isn't done, from text to page"))
    _takes_launcher(made)
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and say what would be done; slurm: write the scripts",
    )
    _takes_config(verbs.add("prepare", "tokenizer and token files"))
    made = _takes_config(verbs.add("train", "models, each by one group: train, export, score"))
    made.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="seed|dense|EXPERT",
        help="which model; may be repeated; default: all that can be trained next",
    )
    _takes_launcher(made, "with slurm or mpi this process is a rank that srun or mpirun has started")
    made = _takes_config(verbs.add("plan", "memory, time and place of every group, with no cluster"))
    made.add_argument("--nodes", type=_positive, required=True, help="nodes of the cluster")
    made.add_argument("--gpus-per-node", type=_positive, default=8, help="default: 8")
    made.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)}; default: h100")
    made = _takes_run(verbs.add("status", "how far every model of a run is"))
    made.add_argument("--watch", action="store_true", help="show it until nothing runs any more")
    verbs.add("doctor", "what this machine has, what is missing, and what works here")


def _discover(verbs: _Verbs) -> None:
    made = verbs.add("discover", "domains for text that has none: balanced clusters, and their YAML")
    made.add_argument(
        "collection",
        nargs="+",
        type=Path,
        metavar="CONFIG|PATH",
        help="a run's YAML, whose domains are pooled, or files and globs",
    )
    made.add_argument("--clusters", type=int, required=True, metavar="K", help="how many domains to find")
    made.add_argument("--out", type=Path, required=True, help="the directory to make")
    made.add_argument("--field", default="text", help="of .jsonl and .parquet rows (default: text)")
    made.add_argument("--sample", type=int, default=20_000, help="documents that the clusters are found in")
    made.add_argument("--dimensions", type=int, default=100, help="of the points that documents become")
    made.add_argument("--random-seed", type=_random_seed, default=0)


def _forest_verbs(verbs: _Verbs) -> None:
    _discover(verbs)
    verbs.family("forest", "the expert set")
    _takes_run(verbs.add("forest list", "every expert, with parents, domains and tokens"))
    made = _takes_run(verbs.add("forest add", "any compatible Hugging Face directory as an expert"))
    made.add_argument("directory", type=Path, help="the model; it needs the run's tokenizer")
    made.add_argument("--name", help="the expert's name (default: the directory's)")
    made = _takes_run(verbs.add("forest remove", "take an expert out; nothing else is touched"))
    made.add_argument("name", help="the expert")
    _takes_run(verbs.add("forest lineage", "who came from whom, with weights"))
    made = _takes_run(verbs.add("branch", "parents of a new expert, and its place in the run"))
    made.add_argument("--name", required=True, help="the expert's name, and its domain's")
    made.add_argument(
        "--from",
        dest="parents",
        default="seed",
        metavar="seed|nearest|posterior|A=0.3,B=0.7",
        help="its parents: the seed LM, the expert that predicts the domain's dev text best, all experts by the "
        "posterior of that text, or named models with weights (default: seed)",
    )
    made.add_argument("--text", type=Path, nargs="+", default=[], help="text of a domain that is new to the run")
    made.add_argument(
        "--replay", type=float, default=0.0, help="fraction of text from the parents' domains (default: 0)"
    )
    made.add_argument(
        "--optimizer",
        choices=["carried", "fresh"],
        default="carried",
        help="start from the parents' moments, or from zero (default: carried)",
    )
    made.add_argument(
        "--schedule",
        choices=["carried", "restarted"],
        default="restarted",
        help="continue the seed's learning-rate schedule, or warm up and decay again (default: restarted)",
    )
    made = _takes_run(verbs.add("score", "per-token log-probabilities of every model that lacks them"))
    made.add_argument("--model", action="append", default=[], help="only this model; may be repeated")
    _takes_launcher(made, "with slurm this process is a rank that srun has started", of_ranks=True)
    # For the ranks that `evaluate` starts.
    made.add_argument("--averages", action="store_true", help=argparse.SUPPRESS)
    made = _takes_run(verbs.add("evaluate", "every method's perplexity, from the scores"))
    _takes_launcher(made, "slurm: by srun within this job")
    _takes_run(verbs.add("report", "tables, plots, one HTML page"))
    _ablate(verbs)
    _generate(verbs)


def _ablate(verbs: _Verbs) -> None:
    made = _takes_run(verbs.add("ablate", "which mixture: perplexity of the average of every subset of experts"))
    made.add_argument("--expert", action="append", default=[], help="only these; may be repeated")
    made.add_argument("--domain", action="append", default=[], help="judge on its text (default: all domains)")
    made.add_argument("--text", action="append", default=[], type=Path, metavar="FILE", help="judge on a file")
    made.add_argument("--split", choices=["dev", "test"], help="of the domains (default: evaluate.split)")
    made.add_argument("--subsets", type=int, default=127, help="the most to measure; a random sample if there are more")
    made.add_argument("--random-seed", type=_random_seed, default=0)
    made.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def _generate(verbs: _Verbs) -> None:
    made = _takes_run(verbs.add("generate", "text from the forest: one drawn expert, or the experts' mixture"))
    made.add_argument("--prompt", action="append", default=[], help="what to continue; may be repeated")
    made.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    made.add_argument(
        "--method",
        default="expert",
        metavar="expert|per-token|mixture",
        help="one expert drawn by the posterior of the prompt (exact), one drawn for each token, or "
        "tokens of the mixture",
    )
    made.add_argument(
        "--posterior",
        default="prefix",
        metavar="prefix|token|tempered|fixed",
        help="what weighs the experts; 'expert' is exact for prefix only",
    )
    made.add_argument("--prior", default="cached", metavar="cached|uniform|routed", help="where the weights start")
    made.add_argument("--route-top-k", type=int, metavar="K", help="routed: only the nearest K clusters' experts")
    made.add_argument("--domain", help="whose cached prior (default: all training domains' pooled)")
    made.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="only these: experts, seed, dense, average/uniform; may be repeated",
    )
    made.add_argument("--max-tokens", type=int, default=128, help="of each continuation")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    made.add_argument("--temperature", type=float, default=1.0, help="of the mixture; 0 is greedy")
    made.add_argument("--top-k", type=int, metavar="K", help="of the mixture: sample from the K most likely tokens")
    made.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="of the mixture: sample from the most likely tokens that have this probability together",
    )
    made.add_argument("--random-seed", type=_random_seed, default=0)
    made.add_argument("--batch", type=int, default=32, help="prompts that are continued side by side")
    made.add_argument("--max-memory", metavar="8GB", help="of experts' weights in memory at once (default: all)")
    made.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def _checkpoint_verbs(verbs: _Verbs) -> None:
    made = verbs.add("merge", "one model from many")
    made.add_argument("output", type=Path, help="the directory to make")
    made.add_argument(
        "inputs", nargs="+", metavar="DIR[=WEIGHT]", help="Hugging Face directories; weight 1 if not given"
    )
    made.add_argument("--method", default="linear", help="how to merge")
    made.add_argument("--dtype", help="type of the output (default: the inputs')")
    made.add_argument(
        "--jobs",
        type=_positive,
        help="processes (default: the cores; under mpirun its ranks are used instead)",
    )
    made.add_argument("--max-shard-size", default="5GB", metavar="5GB", help="of a file of the output")
    made.add_argument("--base", type=Path, help="the model that task vectors are taken from")
    made.add_argument("--parameter", action="append", default=[], metavar="NAME=NUMBER", help="of the method")
    made.add_argument("--seed", type=int, default=0, help="of methods that draw at random")
    made = verbs.add("convert", "change a checkpoint's format or tensor layout")
    made.add_argument("source", type=Path, help="a Hugging Face, DeepSpeed or torch_dist checkpoint")
    made.add_argument("target", type=Path, help="the directory to make")
    made.add_argument("--to", required=True, choices=["huggingface", "megatron", "deepspeed"], help="format")
    made.add_argument("--tensor", type=_positive, default=1, help="tensor parallel degree of the target")
    made.add_argument("--dtype", help="type of the weights (default: as they are)")
    made.add_argument("--verify", action="store_true", help="read everything back and compare")
    made = verbs.add("inspect", "format, family, parameters and types of a checkpoint")
    made.add_argument("path", type=Path, help="the checkpoint")
