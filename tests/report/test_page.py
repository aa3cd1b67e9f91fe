from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from btm_scale.report.page import render_page, write_page
from btm_scale.util.terminal import printable

_VOID = {"meta", "br", "rect", "path"}


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

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
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
        assert numbers == pytest.approx([(math_ + code) / 2, (math_ + code) / 30, math_, code, poems, poems], rel=1e-6)
    bits = page.numbers[len(results.methods) :]
    assert bits == [(method, []) for method, _ in rows]
    assert f"{results.methods['seed'].bits_per_byte['math']:.3f}" in page.words


def test_the_page_loads_nothing(config, make_results):
    source = render_page(config, make_results(), _curves("seed", "dense", "math", "code"))
    page = Page(source)
    assert not page.tags & {"link", "img", "iframe", "object", "image", "use", "base", "form"}
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert [value for _, _, value in page.attributes if value and "//" in value] == []
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_browser_is_allowed_the_pages_two_scripts_and_no_connection(config, make_results):
    source = render_page(config, make_results(), _curves("seed"))
    (policy,) = (value for tag, name, value in Page(source).attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    scripts = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    assert len(scripts) == 2
    allowed = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts}
    assert set(policy.partition("script-src ")[2].split()) == allowed


def test_64_experts_with_lineage_and_curves_take_less_than_6_mb(config, make_results):
    names = [f"domain-number-{i}" for i in range(64)]
    results = make_results(
        training=names, shares={f"ensemble:{i}": 1.1 for i in range(10)} | {"dense": 1, "ensemble": 0.9}
    )
    results.lineage.update({name: {names[0]: 0.4, "seed": 0.6} for name in names})
    assert len(render_page(config, results, _curves("seed", "dense", *names, steps=1000)).encode()) < 6e6


def test_each_figure_has_a_title_a_sentence_and_where_no_other_table_has_its_numbers_one_of_its_own(
    config, make_results
):
    source = render_page(config, make_results(), _curves("seed", "math"))
    labels = [v for tag, n, v in Page(source).attributes if n == "aria-label" and ("role", "img")]
    assert "Training loss over the schedule" in labels
    found = re.findall(
        r"<figure>.*?data-name=\"([\w-]+)\".*?<figcaption>(.*?)</figcaption>(.*?)</figure>", source, re.DOTALL
    )
    assert [name for name, _, _ in found] == ["forest", "ratios", "experts", "training-loss", "priors", "compute"]
    assert all(len(caption) > 40 for _, caption, _ in found)
    assert [name for name, _, rest in found if "<table" in rest] == ["training-loss", "priors", "compute"]
    assert source.count('<details class="data" open>') == 3


def test_figures_and_their_narrow_layouts_are_json_in_the_page(config, make_results):
    source = render_page(config, make_results(), _curves("seed", "math"))
    documents = [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', source, re.DOTALL)
    ]
    assert len(documents) == 6
    for document in documents:
        assert {"data", "layout", "narrow"} <= document.keys()
        assert document["data"]


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "<img src=x onerror=alert(1)>",
        '"><b onload=x>',
        "a & b",
        "\u2028line",
        "\x00nul\x1b",
        "\ud800",
        "日本語" * 30,
        "'",
        "{{ 7 * 7 }}",
    ],
)
def test_names_from_the_user_are_text(config, make_results, name):
    results = make_results(training=(name, "code")).model_copy(update={"name": name})
    results.methods[name] = results.methods["dense"]
    source = render_page(config, results, _curves("seed", name))
    page = Page(source)
    assert not page.tags & {"img", "b"} - {"b" if "<b>" in source else ""}
    assert len(re.findall("<script", source)) == 9 - ("math" in name)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert printable(name) in "".join(page.words)
    assert name.encode("utf-8", "replace") not in source.encode("utf-8", "replace") or "<" not in name


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


def test_infinities_and_nan_are_shown_as_such(config, make_results):
    results = make_results()
    results.methods["ensemble"].perplexity["math"] = math.nan
    results.methods["seed"].perplexity["code"] = math.inf
    curves = _curves("seed", "dense")
    curves["seed"][4]["loss"] = math.nan
    page = Page(render_page(config, results, curves))
    assert "NaN" in page.words
    assert any("1 step with a loss that is not a number" in words for words in page.words)
    assert not [v for tag, name, v in page.attributes if tag == "rect" and name == "width" and "nan" in (v or "")]


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


def test_the_page_says_whether_the_mixture_of_experts_beats_the_ensemble(config, make_results):
    page = Page(render_page(config, make_results(shares={"ensemble": 0.9, "moe": 0.81}), {}))
    assert "is 0.900 times the ensemble's: routing each token wins." in " ".join(page.words)
