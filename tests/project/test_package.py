"""What is built and what is imported: kernels/, launch/ and configs/ stand at the top and are part of the package."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("configs", "kernels", "launch")


def files_of(folder: str) -> list[str]:
    """The files of a folder, relative to the repository, without what is linked into it."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(str(path.relative_to(ROOT)) for path in files)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build a wheel or an sdist from a copy of what is published, with the installed setuptools."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("btm_scale", *LINKED):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def run(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind)
        code = f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return next(out.iterdir())

    return run


def expected_files() -> list[str]:
    linked = [f"btm_scale/{name}" for folder in LINKED for name in files_of(folder)]
    return sorted(linked + [name for name in files_of("btm_scale") if name.endswith((".py", ".css", ".js", ".jinja"))])


@pytest.mark.slow
def test_a_wheel_holds_every_file_once(build: Callable[[str], Path]) -> None:
    with zipfile.ZipFile(build("wheel")) as wheel:
        found = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(found) == expected_files()


@pytest.mark.slow
def test_an_sdist_holds_every_file_once(build: Callable[[str], Path]) -> None:
    with tarfile.open(build("sdist")) as sdist:
        members = [member for member in sdist.getmembers() if not member.isdir()]
    names = [member.name.partition("/")[2] for member in members]
    assert all(member.isfile() for member in members), "a link would point out of the archive"
    assert sorted(name for name in names if name.startswith("btm_scale/")) == expected_files()


@pytest.mark.parametrize("name", LINKED)
def test_what_is_imported_are_the_files_at_the_top(name: str) -> None:
    module = importlib.import_module(f"btm_scale.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


@pytest.mark.slow
def test_static_tools_find_what_is_linked() -> None:
    """As an editor checks one open file: mypy follows its imports, and ruff sorts them as the project's."""
    files = ["launch/plan.py", "launch/step_time.py", "kernels/mixing.py"]
    mypy = [sys.executable, "-m", "mypy", "--follow-imports=silent", *files]
    for command in (mypy, [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", *LINKED]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
