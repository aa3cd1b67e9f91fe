"""The demo: its text, made of what is installed here, and its config."""

from __future__ import annotations

from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.configs import FOLDER
from btm_scale.data.demo_text import write_installed_text
from btm_scale.run_dir import RunDir
from btm_scale.util.files import new_directory

_BYTES_PER_DOMAIN = 3_000_000


def demo_config(out: Path | None, overrides: list[str]) -> tuple[RunConfig, RunDir]:
    """Write the demo's text, unless it is there, and read its config; the run's folder is `out` or runs/demo."""
    run = RunDir((out or Path("runs") / "demo").resolve())
    text = run.root / "text"
    if not text.is_dir():
        with new_directory(text) as directory:
            write_installed_text(directory, bytes_per_domain=_BYTES_PER_DOMAIN)
    return RunConfig.load(FOLDER / "demo.yaml", (f"text_root={text}", *overrides)), run
