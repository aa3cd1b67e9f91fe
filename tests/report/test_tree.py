from __future__ import annotations

import xml.etree.ElementTree as ET

from btm_scale.report.tree import generations, is_worth_drawing, lineage_graph

FAMILY = {"seed": {}, "math": {"seed": 1.0}, "code": {"seed": 1.0}, "both": {"math": 0.3, "code": 0.7}}


def test_a_model_stands_after_the_last_of_its_parents() -> None:
    assert generations(FAMILY) == {"seed": 0, "math": 1, "code": 1, "both": 2}


def test_branches_of_the_seed_alone_are_no_news() -> None:
    assert not is_worth_drawing({"seed": {}, "math": {"seed": 1.0}})
    assert is_worth_drawing(FAMILY)


def test_a_line_for_every_parent_as_thick_as_its_weight() -> None:
    drawing = ET.fromstring(lineage_graph(FAMILY, {"both": "c1"}, width=800))
    paths = [path for path in drawing.iter() if path.tag.endswith("path")]
    assert len(paths) == 4
    from_math, from_code = (float(path.get("stroke-width", 0)) for path in paths if "c1" in path.get("class", ""))
    assert abs(from_code / from_math - 7 / 3) < 0.1
    words = " ".join(drawing.itertext())
    assert "both began with 70% of code" in words
