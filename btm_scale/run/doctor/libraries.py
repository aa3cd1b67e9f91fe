"""Check Python packages: their versions against this package's requirements, and whether they can be imported."""

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
    """A package: its PyPI name, the module to import, what it is needed for, and the extra that installs it."""

    name: str
    module: str
    needed_for: str
    extra: str = ""
    is_imported: bool = True  # otherwise only its version is checked: importing takes seconds

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
    """Return the checks for the child process, in order, without packages that are not installed."""
    present = {library.module for library in LIBRARIES if library.is_imported and _is_installed(library)}
    present |= {"gpus"} if "torch" in present else set()
    present |= {"precision"} if "deepspeed" in present else set()
    # mpi4py is last: it is broken most often, which costs another child.
    first, last = ["torch", "gpus", "deepspeed", "precision", "megatron.core"], ["mpi4py"]
    return sorted(present, key=lambda name: (name in last, first.index(name) if name in first else len(first), name))


def library_findings(replies: Mapping[str, Reply]) -> list[Finding]:
    """Return one finding per package."""
    required = _required()
    findings: list[Finding] = []
    for library in LIBRARIES:
        findings += guarded(_PART, library.name, functools.partial(_finding, library, required, replies))
    return findings


def _finding(library: Library, required: Mapping[str, str], replies: Mapping[str, Reply]) -> Finding:
    def finding(state: State, text: str, remedy: str = "") -> Finding:
        return Finding(_PART, library.name, state, text, library.needed_for, remedy)

    if not _is_installed(library):
        return finding("missing", "", library.remedy)
    try:
        version = importlib.metadata.version(library.name)
    except importlib.metadata.PackageNotFoundError:
        version = ""  # a module without package metadata, such as one on PYTHONPATH
    reply = replies.get(library.module, Reply())
    if not reply.is_asked:
        return finding(reply.state, ": ".join(filter(None, [version, reply.error])))
    if reply.error:
        remedy = f"repair or reinstall {_origin(library) or library.name}"
        if library.name == "mpi4py":
            remedy = "load the site's MPI module, or pip install mpich"
        return finding("broken", ": ".join(filter(None, [version, reply.error])), remedy)
    lowest = required.get(library.name.lower().replace("_", "-"), "")
    if lowest and version and _numbers(version) < _numbers(lowest):
        return finding(
            "old", f"{version}, but {lowest} or later is required", f"pip install '{library.name}>={lowest}'"
        )
    details = [str(version or "version unknown")]
    if library.name == "torch" and "build" in reply.answer:
        details.append(f"{reply.answer['build']} build")
    if library.name == "mpi4py" and "library" in reply.answer:
        details.append(reply.answer["library"])
    if lowest:
        details.append(f"at least {lowest} is required")
    return finding("ok", ", ".join(details))


def _required() -> dict[str, str]:
    """Return the minimum version of each package by normalized name, from this package's metadata."""
    try:
        lines = importlib.metadata.requires("btm-scale") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    versions: dict[str, str] = {}
    for line in lines:
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line)
        if match and 'extra == "dev"' not in line:
            versions.setdefault(match[1].lower().replace("_", "-"), match[2])
    return versions


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version as numbers without trailing zeros: (2, 13) for `2.13.0+cpu`."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _is_installed(library: Library) -> bool:
    try:
        return importlib.util.find_spec(library.module.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a damaged module; importing it gives the reason
        return True


def _origin(library: Library) -> str | None:
    """Return the path from which it is imported, which may differ from where it was installed."""
    spec = importlib.util.find_spec(library.module.partition(".")[0])
    return spec.origin if spec is not None else None
