from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from btm_scale.report.page import render_page, write_page

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """The page's elements: refuses any that is not closed in order, and keeps each table row's numbers."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.numbers: list[tuple[str, list[float]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr" and "data-method" in dict(attrs):
            self.numbers.append((dict(attrs)["data-method"] or "", []))
        if tag == "data":
            self.numbers[-1][1].append(float(dict(attrs)["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def _curves(*models: str, steps: int = 30) -> dict[str, list[dict[str, float]]]:
    return {m: [{"step": i, "loss": 4 - i / steps, "seconds": 1.0} for i in range(1, steps + 1)] for m in models}


def test_every_number_of_the_table_is_that_of_the_results(config, make_results):
    results = make_results()
    page = Page(render_page(config, results, _curves("seed", "dense", "math", "code")))
    rows = page.numbers[: len(results.methods)]
    assert [method for method, _ in rows] == [*("seed", "dense", "ensemble"), "expert:math", "expert:code"]
    for method, numbers in rows:
        math_, code, poems = (results.methods[method].perplexity[d] for d in ("math", "code", "poems"))
        assert numbers == pytest.approx([(math_ + code) / 2, (math_ + code) / 30, math_, code, poems, poems], rel=1e-12)
    bits = page.numbers[len(results.methods) :]
    assert bits[0][1][2] == results.methods["seed"].bits_per_byte["math"]


def test_the_page_fetches_nothing_and_runs_nothing(config, make_results):
    source = render_page(config, make_results(), _curves("seed", "dense", "math", "code"))
    page = Page(source)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert "url(" not in source
    assert "@import" not in source
    assert {value for _, _, value in page.attributes if value and "//" in value} == {"http://www.w3.org/2000/svg"}


def test_drawings_have_titles_and_no_id_occurs(config, make_results):
    page = Page(render_page(config, make_results(), _curves("seed", "math")))
    # Every drawing is there twice, for wide and narrow windows; ids would clash.
    assert not [a for a in page.attributes if a[1] == "id"]
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert labels
    assert all(labels)


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", '"><b onload=x>', "a & b", "\x00nul\x1b", "\ud800", "日本語" * 30, "'"],
)
def test_names_from_the_user_are_text(config, make_results, name):
    results = make_results(training=(name, "code")).model_copy(update={"name": name})
    results.methods[name] = results.methods["dense"]
    page = Page(render_page(config, results, _curves("seed", name)))
    assert "script" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    shown = re.sub(r"[\x00\x1b\ud800]", " ", name)
    assert shown in "".join(page.words)


@pytest.mark.parametrize(
    "case",
    [
        {"training": ("only",), "novel": ()},
        {"dense": False},
        {"training": ("only",), "novel": (), "dense": False},
        {"shares": {}, "dense": False},
        {"training": [f"a-long-name-for-domain-{i}" * 2 for i in range(16)]},
        {"training": (), "shares": {"seed": 1.0}},
        {
            "shares": {
                "dense": 1.0,
                "ensemble": 0.9,
                "average:uniform": 5000.0,
                "random-split": 1.1,
                "other:x": 1.0,
            }
        },
    ],
)
def test_unusual_runs_have_a_page_too(config, make_results, case):
    results = make_results(**case)
    page = Page(render_page(config, results, _curves("seed", *case.get("training", ()))))
    assert {method for method, _ in page.numbers} == set(results.methods)


def test_values_that_are_no_finite_numbers_are_shown_as_such(config, make_results):
    results = make_results()
    results.methods["ensemble"].perplexity["math"] = math.nan
    results.methods["seed"].perplexity["code"] = math.inf
    curves = _curves("seed", "dense")
    curves["seed"][4]["loss"] = math.nan
    page = Page(render_page(config, results, curves))
    assert "NaN" in page.words
    assert any("1 step with a loss that is not a number" in words for words in page.words)
    for tag, name, value in page.attributes:
        if tag in ("circle", "rect", "path", "polyline", "line", "text") and name not in (
            "class",
            "aria-label",
        ):
            assert "nan" not in (value or "")


def test_no_number_is_missing_from_the_heat_map(config, make_results):
    page = Page(render_page(config, make_results(), {}))
    assert {"math on code: 34.00", "code on code: 18.40", "Dense baseline on poems: 30.00"} <= set(page.words)


def test_results_without_curves_compute_or_priors_leave_those_sections_out(config, make_results):
    results = make_results()
    results.compute.clear()
    results.priors.clear()
    page = Page(render_page(config, results, {}))
    assert not {"Training", "Compute", "Who speaks for a domain"} & set(page.words)
    assert {"Perplexity", "Experts and domains"} <= set(page.words)


def test_the_page_is_the_same_every_time_and_replaces_the_old_one_whole(config, make_results, tmp_path):
    path = tmp_path / "new" / "report.html"
    for _ in range(2):
        write_page(config, make_results(), _curves("seed"), path)
    assert path.read_text() == render_page(config, make_results(), _curves("seed"))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
