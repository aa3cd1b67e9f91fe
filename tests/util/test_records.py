from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import save_card

from btm_scale.errors import ForestError, UserError
from btm_scale.evaluate.soups import Soups
from btm_scale.forest.expert import CARD, Parent, read_expert
from btm_scale.util.records import Part, Record, read_object


class Leaf(Part):
    name: str
    weight: float


class Tree(Record):
    ERROR = ForestError
    ABSENT = "no tree in {folder}. Plant one first."
    REMEDY = "Delete {path} and plant it again."

    name: str
    age: int
    leaves: tuple[Leaf, ...] = ()
    rings: dict[int, str] = {}


OAK = Tree(name="oak", age=7, leaves=(Leaf(name="a", weight=0.1),), rings={3: "wide"})


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_saved_record_is_loaded_and_its_file_starts_with_the_schema(tmp_path: Path) -> None:
    OAK.save(tmp_path / "tree.json")
    assert Tree.load(tmp_path / "tree.json") == OAK
    content = json.loads((tmp_path / "tree.json").read_text())
    assert list(content) == ["schema", "name", "age", "leaves", "rings"]
    assert content["schema"] == 1
    assert content["leaves"] == [{"name": "a", "weight": 0.1}]
    assert [path.name for path in tmp_path.iterdir()] == ["tree.json"]


def test_numbers_come_back_to_the_last_digit(tmp_path: Path) -> None:
    for weight in (0.1 + 0.2, 1e300, 5e-324, math.inf):
        Tree(name="", age=1, leaves=(Leaf(name="", weight=weight),)).save(tmp_path / "tree.json")
        assert Tree.load(tmp_path / "tree.json").leaves[0].weight == weight


def test_a_file_without_a_schema_number_is_of_schema_1(tmp_path: Path) -> None:
    assert Tree.load(written(tmp_path / "old.json", {"name": "elm", "age": 1})).name == "elm"


def test_text_that_utf8_cannot_hold_does_not_make_a_record_unreadable(tmp_path: Path) -> None:
    Tree(name="\udc80oak", age=7).save(tmp_path / "tree.json")
    assert Tree.load(tmp_path / "tree.json").name == "?oak"


def test_keys_that_utf8_cannot_hold_do_not_become_one(tmp_path: Path) -> None:
    class Grove(Record):
        trees: dict[str, int]

    Grove(trees={"\udc80oak": 1, "elm": 2}).save(tmp_path / "grove.json")
    assert Grove.load(tmp_path / "grove.json").trees == {"?oak": 1, "elm": 2}
    Grove(trees=dict.fromkeys(("\udc80oak", "\udc81oak"), 1)).save(tmp_path / "grove.json")
    with pytest.raises(UserError, match=r"grove\.json is ambiguous: the key '\?oak' appears twice"):
        Grove.load(tmp_path / "grove.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"tree\.json is not valid JSON .* Delete .*tree\.json and plant it again\."),
        (b'{"name": "oak"', "not valid JSON"),
        (b'{"name": "\xff"}', "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
        (b"[]", "a JSON list, and must be an object"),
        (b'{"schema": 7}', "has schema 7, and this version reads schema 1. Update btm-scale"),
        (b'{"schema": true}', "has schema True"),
        (b'{"schema": null}', "has schema None"),
        (b'{"name": "oak"}', "field 'age' is missing"),
        (b'{"name": "oak", "age": "7"}', "field 'age' must be a valid integer and is '7'"),
        (b'{"name": "oak", "age": 7.0}', "field 'age' must be a valid integer"),
        (b'{"name": "oak", "age": true}', "field 'age' must be a valid integer"),
        (b'{"name": "oak", "age": 7, "leaf": 1}', "field 'leaf' is unknown to this version"),
        (b'{"name": "oak", "age": 7, "leaves": [{"name": "a"}]}', r"field 'leaves\.0\.weight' is missing"),
        (b'{"name": 1, "age": "a", "leaves": 2, "rings": 3}', "and 1 more"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_file_field_and_remedy(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "tree.json"
    path.write_bytes(content)
    with pytest.raises(ForestError, match=message) as error:
        Tree.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ForestError, match=f"no tree in {tmp_path}. Plant one first."):
        Tree.load(tmp_path / "tree.json")
    assert Tree.find(tmp_path / "tree.json") is None


def test_a_folder_of_that_name_is_an_error_of_its_reader(tmp_path: Path) -> None:
    with pytest.raises(ForestError, match="cannot be read: Is a directory"):
        Tree.load(tmp_path)
    with pytest.raises(ForestError, match="cannot be read"):
        read_object(tmp_path, ForestError)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("parents.0.name", {"parents": [{"name": "../../model", "weight": 1.0}]}),
        ("parents.0.name", {"parents": [{"name": "/home/other/model", "weight": 1.0}]}),
        ("name", {"name": "a/../../b"}),
        ("name", {"name": ""}),
        ("domains", {"domains": {"../text": 1.0}}),
    ],
)
def test_a_name_that_leads_out_of_the_run_is_refused(field: str, change: dict[str, Any], tmp_path: Path) -> None:
    save_card(tmp_path, "python", parents=(Parent("average/uniform", 1.0),))
    card = tmp_path / CARD
    assert read_expert(tmp_path).parents[0].name == "average/uniform"
    card.write_text(json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(ForestError, match=rf"field '{field}.* must be the name of a model or a file inside the run"):
        read_expert(tmp_path)


def test_a_name_that_is_too_long_for_a_file_is_refused(tmp_path: Path) -> None:
    save_card(tmp_path, "python", parents=(Parent("x" * 256, 1.0),))
    with pytest.raises(ForestError, match=r"field 'parents.0.name' must have at most 255 bytes between slashes"):
        read_expert(tmp_path)


def test_a_soup_of_models_outside_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "soups.json").write_text(json.dumps({"schema": 1, "forest": {}, "members": {"a": ["../../model"]}}))
    with pytest.raises(ForestError, match=r"field 'members.a.0' must be the name"):
        Soups.load(tmp_path / "soups.json")
