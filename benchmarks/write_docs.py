"""Write docs/config.md, and from benchmarks/results docs/claims.md and the figures of README.md, docs/results.md,
docs/serving.md, docs/moe.md and docs/mixtures.md.

    python benchmarks/write_docs.py

A page has a pair of marks for each figure: `<!-- figures: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from claims.page import claims_page, plots
from doc_config import config_page
from doc_ensembles import TABLES as ENSEMBLE_TABLES
from doc_figure import perplexity_figure
from doc_mixtures import TABLES as MIXTURE_TABLES
from doc_moe import TABLES as MOE_TABLES
from doc_packed import TABLES as PACKED_TABLES
from doc_tables import RESULTS
from doc_tables import TABLES as OTHER_TABLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("results.md", "serving.md", "moe.md", "mixtures.md")))
TABLES = OTHER_TABLES | MOE_TABLES | PACKED_TABLES | ENSEMBLE_TABLES | MIXTURE_TABLES
CONFIG = ROOT / "docs" / "config.md"
CLAIMS = ROOT / "docs" / "claims.md"
IMAGES = ROOT / "docs" / "images"
FIGURE = IMAGES / "perplexity.svg"
_MARKS = re.compile(r"<!-- figures: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def main() -> None:
    """Write every file that differs from what the results give."""
    for path, content in rendered().items():
        if not path.is_file() or path.read_text() != content:
            path.write_text(content)
            print(path.relative_to(ROOT))


def rendered() -> dict[Path, str]:
    """Return the content of each generated file."""
    pages = {page: _MARKS.sub(lambda mark: _filled(mark[1]), page.read_text()) for page in PAGES}
    drawn = {FIGURE: perplexity_figure(), **{IMAGES / name: svg for name, svg in plots().items()}}
    return {**pages, **drawn, CONFIG: config_page(), CLAIMS: claims_page()}


def _filled(name: str) -> str:
    if name not in TABLES:
        raise SystemExit(f"There is no table '{name}'. A mark must name one of {', '.join(TABLES)}.")
    try:
        body = TABLES[name]()
    except FileNotFoundError as error:
        body = f"Not measured: there is no {Path(error.filename).relative_to(RESULTS.parents[1])}."
    return f"<!-- figures: {name} -->\n{body}\n<!-- end -->"


if __name__ == "__main__":
    main()
