"""Every package that the code imports is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("btm_scale", "kernels", "launch", "configs")


def imported() -> dict[str, str]:
    """Return the packages that are imported, each with a file that does so."""
    packages: dict[str, str] = {}
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "import" in text else ():
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            packages |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return packages


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {canonical(re.split(r"[^\w.-]", line)[0]) for group in groups for line in group}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_is_imported_is_declared() -> None:
    distributions, names = packages_distributions(), declared()
    undeclared = {
        package: file
        for package, file in imported().items()
        if package != "btm_scale"
        and package not in sys.stdlib_module_names
        and not names & {canonical(name) for name in distributions.get(package, [package])}
    }
    assert undeclared == {}
