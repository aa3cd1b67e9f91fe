"""Verbs that need no run: checkpoints in, checkpoints out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from btm_scale.cli.commands import Verb
from btm_scale.cli.merge_arguments import ingredients, setting, weighted_path
from btm_scale.cli.options import argument, flag, one_of, option, several
from btm_scale.cli.verb import Answer, Document, already_complete, say, verb
from btm_scale.errors import UserError

app = typer.Typer()
_SECTION = "Checkpoints"
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_SHORT_DTYPES = ("bf16", "fp16", "fp32", "fp64", "float8_e4m3fn", "float8_e5m2")
_FORMATS = ("huggingface", "megatron", "deepspeed", "universal")
_OF_METHOD = "Merge method"
_COMPLETES = "Model that completes an adapter, or a DeepSpeed checkpoint that was saved without its frozen weights."
_VOCABULARY = "Models that differ"


class _MergeMethods:
    """The names of the merge methods, from the files that register them."""

    def __iter__(self) -> Iterator[str]:
        from btm_scale.checkpoint.merge import elementwise, fusion, sparse, spherical, whole_tensor  # noqa: F401 (they register their methods)
        from btm_scale.checkpoint.merge.registry import METHODS

        return iter(METHODS)


class _Dtypes:
    """The names of float types; help lists the most common spelling of each."""

    def __iter__(self) -> Iterator[str]:
        return iter((*_DTYPES, *_SHORT_DTYPES))


class Merge(Verb):
    """The verb `merge`, whose help ends with every method: its meaning, its parameters, and whether it needs a base."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write what there is to know of each method, from the registry."""
        from btm_scale.checkpoint.merge.registry import METHODS, RANGES

        rows = []
        for name in _MergeMethods():
            method = METHODS[name]
            ranges = [
                f"{parameter} ({RANGES.get(parameter, 'any number')}; default {default:g})"
                for parameter, default in method.parameters.items()
            ]
            facts = (
                method.meaning,
                "Needs --base." if method.needs_base else "",
                "May have --base." if method.may_have_base else "",
                f"Merges exactly {method.exactly} {'model' if method.exactly == 1 else 'models'}."
                if method.exactly
                else "",
                "" if method.weighted else "Computes the weights itself.",
                f"Parameters: {', '.join(ranges)}." if ranges else "",
            )
            rows.append((name, " ".join(filter(None, facts))))
        with formatter.section("Methods"):
            formatter.write_dl(rows)


def _dtype_option(help: str) -> Any:
    return one_of("--dtype", "dtype", _Dtypes(), help, metavar="|".join(_DTYPES))


@verb(app, "merge", section=_SECTION, cls=Merge)
def merge(
    output: Annotated[Path, argument("OUTPUT", "Directory to create.")],
    inputs: Annotated[
        list[str],
        argument(
            "DIR[=WEIGHT]...",
            "Models to merge: Hugging Face, DeepSpeed or Megatron-core checkpoints, or names of models in the Hugging "
            "Face cache. The default weight is 1.",
            default_factory=list,
        ),
    ],
    *,
    recipe: Annotated[
        Path | None,
        option(
            "--recipe",
            "FILE",
            "Merge by a mergekit YAML, or by the merge_recipe.yaml of another merge, which names models and method.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        one_of(
            "--method",
            "merge method",
            _MergeMethods(),
            "One of the methods that are listed below.  [default: linear]",
            metavar="METHOD",
            section=_OF_METHOD,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        option(
            "--base",
            "DIR",
            "Model that all inputs were fine-tuned from, for methods that need it, adapters, and DeepSpeed checkpoints "
            "that were saved without their frozen weights.",
            section=_OF_METHOD,
        ),
    ] = None,
    parameters: Annotated[
        list[str],
        several(
            "--parameter",
            "NAME=NUMBER",
            "Parameter of the method, such as density=0.5. May be repeated.",
            section=_OF_METHOD,
        ),
    ],
    router: Annotated[
        str | None,
        option(
            "--router",
            "random|FILE",
            "Router of the method moe: random weights, or a safetensors file with the output's gates.  "
            "[default: random]",
            section=_OF_METHOD,
        ),
    ] = None,
    random_seed: Annotated[
        int | None,
        option(
            "--random-seed",
            "N",
            "Random seed of dare, della and a random router.  [default: the recipe's, or 0]",
            section=_OF_METHOD,
        ),
    ] = None,
    dtype: Annotated[str | None, _dtype_option("Type of the output's weights.  [default: the inputs']")] = None,
    max_shard_size: Annotated[
        str | None,
        option("--max-shard-size", "SIZE", "Largest size of a file of the output.  [default: the recipe's, or 5GB]"),
    ] = None,
    chat_template: Annotated[
        str | None,
        option(
            "--chat-template",
            "base|PATH",
            "Chat template of the output: that of --base, or one in a model directory or file.  [default: the first "
            "input's that has one]",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "--tokenizer",
            "union|base|PATH",
            "Vocabulary of the output, for models with different ones: their rows are matched by token.",
            section=_VOCABULARY,
        ),
    ] = None,
    new_rows: Annotated[
        str,
        one_of(
            "--new-rows",
            "kind of new rows",
            ("mean", "zero"),
            "Rows for tokens that a model lacks: the base's, or the mean of the models that have it; or zeros.",
            section=_VOCABULARY,
        ),
    ] = "mean",
    allow: Annotated[
        list[str],
        several(
            "--allow",
            "KEY",
            "Setting that may differ, as an error named it, such as rope_theta. May be repeated.",
            section=_VOCABULARY,
        ),
    ],
    jobs: Annotated[
        int | None,
        option(
            "--jobs",
            "N",
            "Number of processes. Under mpirun its ranks are used instead.  [default: the number of cores]",
            min=1,
        ),
    ] = None,
) -> Document | None:
    """Merge models of the same architecture into one.

    Tensors are streamed, so that memory does not grow with the models. No GPU is needed. Example:

    btm-scale merge OUT A=0.7 B=0.3

    The output's merge_recipe.yaml repeats the merge: btm-scale merge OUT2 --recipe OUT/merge_recipe.yaml
    """
    from btm_scale.checkpoint.merge.merge import merge as merge_models
    from btm_scale.checkpoint.merge.merge import merge_by_recipe
    from btm_scale.config.section import bytes_from_text
    from btm_scale.util.mpi import mpi_rank

    rank = mpi_rank()
    mpi = rank is not None and rank.is_one_of_several
    max_shard_bytes = bytes_from_text(max_shard_size) if max_shard_size else None
    if recipe is not None:
        given = {
            "DIR": inputs,
            "--method": method,
            "--base": base,
            "--parameter": parameters,
            "--chat-template": chat_template,
            "--tokenizer": tokenizer,
            "--new-rows": new_rows != "mean",
            "--allow": allow,
            "--router": router,
        }
        if extra := [name for name, value in given.items() if value]:
            raise UserError(
                f"--recipe and {extra[0]} were given. A recipe has the models, the method and its parameters: change "
                f"{recipe}, or leave {extra[0]} out."
            )
        report = merge_by_recipe(
            output,
            recipe,
            dtype=dtype,
            random_seed=random_seed,
            max_shard_bytes=max_shard_bytes,
            jobs=jobs,
            mpi=mpi,
        )
    elif not inputs:
        raise UserError("No models were given. Give those to merge, as DIR or DIR=WEIGHT, or --recipe FILE.")
    else:
        models = [weighted_path(text) for text in inputs]
        report = merge_models(
            output,
            models,
            method=method or "linear",
            parameters=dict(setting(text) for text in parameters),
            base=base,
            dtype=dtype,
            jobs=jobs,
            max_shard_bytes=max_shard_bytes or 5e9,
            random_seed=random_seed or 0,
            chat_template=chat_template,
            tokenizer=tokenizer,
            new_rows=new_rows,
            allow=allow,
            mpi=mpi,
            ingredients=None if router is None else ingredients(router, [path for path, _ in models]),
        )
    if rank is not None and rank.rank > 0:
        return None  # under mpirun the first rank answers
    answer = {
        "output": str(report.output),
        "method": report.method,
        "tensors": report.tensors,
        "parameters": report.parameters,
        "content_hash": report.content_hash,
        "nan": report.nonfinite.nan,
        "infinities": report.nonfinite.infinite,
        "weights": dict(report.weights),
        "seconds": round(report.seconds, 2),
    }
    return already_complete(answer, str(output)) if report.already_complete else answer


@verb(app, "convert", section=_SECTION)
def convert(
    source: Annotated[Path, argument("SOURCE", "A Hugging Face, DeepSpeed or Megatron torch_dist checkpoint.")],
    target: Annotated[Path, argument("TARGET", "Directory to create.")],
    *,
    to: Annotated[str, one_of("--to", "format", _FORMATS, "Format of the target.")],
    tensor: Annotated[int, option("--tensor", "N", "Tensor parallel degree of the target.", min=1)] = 1,
    dtype: Annotated[str | None, _dtype_option("Type of the target's weights.  [default: the source's]")] = None,
    verify: Annotated[bool, flag("--verify", "Read everything back and compare.")] = False,
    base: Annotated[Path | None, option("--base", "DIR", _COMPLETES)] = None,
) -> Document:
    """Convert a checkpoint to another format or tensor layout."""
    from btm_scale.checkpoint.convert import convert as convert_checkpoint

    done = convert_checkpoint(source, target, to=to, tensor=tensor, dtype=dtype, verify=verify, base=base)
    answer = {
        "output": str(done.target),
        "format": to,
        "verified": verify,
        "nan": done.nonfinite.nan,
        "infinities": done.nonfinite.infinite,
        "weights": done.weights,
    }
    return already_complete(answer, str(target)) if done.already_complete else answer


@verb(app, "inspect", section=_SECTION)
def inspect(
    path: Annotated[Path, argument("PATH", "The checkpoint.")],
    *,
    base: Annotated[Path | None, option("--base", "DIR", _COMPLETES)] = None,
) -> Answer:
    """Show a checkpoint's format, family, parameters and types.

    The answer lists what the checkpoint can be converted to. Only headers are read. --verbose lists each file.
    """
    from dataclasses import asdict

    from btm_scale.checkpoint.inspect import inspect as inspect_checkpoint

    facts = asdict(inspect_checkpoint(path, base=base))
    lists = {name: list(facts[name]) for name in ("converts_to", "tensor_degrees")}
    answer = facts | {"path": str(path)} | lists

    def show() -> None:
        from btm_scale.report.checkpoint_text import checkpoint_lines

        for line in checkpoint_lines(answer):
            say(line)

    return Answer(answer, show, is_brief=True)
