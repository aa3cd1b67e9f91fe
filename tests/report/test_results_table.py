from __future__ import annotations

import io

from rich.console import Console

from btm_scale.report.results_table import print_results, results_table


def _printed(results, width=200, **settings):
    console = Console(width=width, file=io.StringIO(), **settings)
    print_results(results, console)
    return console.file.getvalue()


def test_the_table_has_every_method_its_mean_and_its_ratio_to_dense(make_results):
    rows = {line.split()[0]: line.split()[1:] for line in _printed(make_results()).splitlines() if line.strip()}
    assert rows["dense"] == ["15.00", "1.000", "30.00", "10.00", "20.00", "30.00"]
    assert rows["ensemble"] == ["13.50", "0.900", "27.00", "9.000", "18.00", "27.00"]


def test_the_best_of_a_column_is_bold(make_results):
    table = results_table(make_results())
    bold = {
        (column.header.plain if hasattr(column.header, "plain") else column.header): [
            str(c) for c in cells if c.style == "bold"
        ]
        for column in table.columns
        for cells in [list(column._cells)]
        if column.header != "method"
    }
    assert bold["mean"] == ["13.50"]
    assert bold["math"] == ["9.000"]
    assert bold["/ dense"] == []


def test_missing_values_are_dashes_and_partial_means_are_marked(make_results):
    results = make_results()
    del results.methods["ensemble"].perplexity["code"]
    text = _printed(results)
    line = next(line for line in text.splitlines() if line.startswith("ensemble"))
    assert line.split() == ["ensemble", "9.000*", "0.900*", "27.00", "9.000", "\u2013", "27.00"]
    assert "* over those domains only that the method has" in text


def test_a_narrow_terminal_gets_several_whole_tables(make_results):
    names = [f"domain-number-{i}" for i in range(16)]
    text = _printed(make_results(training=names), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert all(name in text for name in names)


def test_names_are_text_and_no_markup(make_results):
    assert "[bold red]x" in _printed(make_results(training=("[bold red]x", "b")))


def test_the_last_line_compares_the_mixture_of_experts_with_the_ensemble(make_results):
    text = _printed(make_results(shares={"dense": 1.0, "ensemble": 0.9, "moe": 0.99}))
    assert text.splitlines()[-1].endswith("is 1.100 times the ensemble's: routing by the posterior wins.")
