"""Python packages: their versions beside what the package's metadata requires, and whether they can be imported."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass

from btm_scale.run.doctor.ask import Reply
from btm_scale.run.doctor.finding import Finding, State, guarded

_PART = "libraries"


@dataclass(frozen=True)
class Library:
    """A package: its name on PyPI, the module to import, what it is needed for, and the extra that installs it."""

    name: str
    module: str
    needed_for: str
    extra: str = ""
    is_imported: bool = True  # else its version is enough: importing takes seconds

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'btm-scale[{self.extra}]'" if self.extra else f"pip install '{self.name}'"


LIBRARIES = (
    Library("torch", "torch", "training, scoring, merging and converting"),
    Library("deepspeed", "deepspeed", "training"),
    Library("megatron-core", "megatron.core", "training"),
    Library("triton", "triton", "kernels for scoring and generating on a GPU", "kernels"),
    Library("mpi4py", "mpi4py", "--launcher mpi and mpirun btm-scale merge", "mpi"),
    Library("numpy", "numpy", "every command"),
    Library("pydantic", "pydantic", "every command"),
    Library("ruamel.yaml", "ruamel.yaml", "every command that reads a config"),
    Library("rich", "rich", "tables"),
    Library("safetensors", "safetensors", "scores and clusters"),
    Library("sentencepiece", "sentencepiece", "training and using sentencepiece tokenizers"),
    Library("tokenizers", "tokenizers", "training Hugging Face tokenizers"),
    Library("transformers", "transformers", "Hugging Face models and tokenizers"),
    Library("pyarrow", "pyarrow", "text in .parquet files"),
    Library("zstandard", "zstandard", "text in .zst files"),
    Library("ninja", "ninja", "DeepSpeed operators that are compiled when first used", is_imported=False),
    Library("scikit-learn", "sklearn", "discover", "discover", is_imported=False),
    Library("lm_eval", "lm_eval", "btm-scale-lm-eval", "lm-eval", is_imported=False),
)


def names_to_ask() -> list[str]:
    """The checks for the child process, in its order; none for what is not installed."""
    present = {library.module for library in LIBRARIES if library.is_imported and _is_installed(library)}
    present |= {"gpus"} if "torch" in present else set()
    present |= {"precision"} if "deepspeed" in present else set()
    # mpi4py last: it is the one most often broken, which costs another child.
    first, last = ["torch", "gpus", "deepspeed", "precision", "megatron.core"], ["mpi4py"]
    return sorted(present, key=lambda name: (name in last, first.index(name) if name in first else len(first), name))


def library_findings(replies: Mapping[str, Reply]) -> list[Finding]:
    """One finding a package."""
    required = _required()
    found: list[Finding] = []
    for library in LIBRARIES:
        found += guarded(_PART, library.name, functools.partial(_finding, library, required, replies))
    return found


def _finding(library: Library, required: Mapping[str, str], replies: Mapping[str, Reply]) -> Finding:
    def made(state: State, found: str, remedy: str = "") -> Finding:
        return Finding(_PART, library.name, state, found, library.needed_for, remedy)

    if not _is_installed(library):
        return made("missing", "", library.remedy)
    try:
        version = importlib.metadata.version(library.name)
    except importlib.metadata.PackageNotFoundError:
        version = ""  # a module without an installed package, such as one on PYTHONPATH
    reply = replies.get(library.module, Reply())
    if not reply.is_asked:
        return made(reply.state, ": ".join(filter(None, [version, reply.error])))
    if reply.error:
        remedy = f"repair or reinstall {_origin(library) or library.name}"
        if library.name == "mpi4py":
            remedy = "load the site's MPI module, or pip install mpich"
        return made("broken", ": ".join(filter(None, [version, reply.error])), remedy)
    least = required.get(library.name.lower().replace("_", "-"), "")
    if least and version and _numbers(version) < _numbers(least):
        return made("old", f"{version}, but {least} or later is required", f"pip install '{library.name}>={least}'")
    details = [str(version or "version unknown")]
    if library.name == "torch" and "build" in reply.answer:
        details.append(f"{reply.answer['build']} build")
    if library.name == "mpi4py" and "library" in reply.answer:
        details.append(reply.answer["library"])
    if least:
        details.append(f"at least {least} is required")
    return made("ok", ", ".join(details))


def _required() -> dict[str, str]:
    """The least version of each package, by its normalized name, from this package's own metadata."""
    try:
        lines = importlib.metadata.requires("btm-scale") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line)
        if match and 'extra == "dev"' not in line:
            found.setdefault(match[1].lower().replace("_", "-"), match[2])
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` is (2, 13): trailing zeros do not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _is_installed(library: Library) -> bool:
    try:
        return importlib.util.find_spec(library.module.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a module that is in pieces; importing it tells more
        return True


def _origin(library: Library) -> str | None:
    """Where it is imported from, which may not be where it was installed."""
    spec = importlib.util.find_spec(library.module.partition(".")[0])
    return spec.origin if spec is not None else None
