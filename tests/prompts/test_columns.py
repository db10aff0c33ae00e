"""The column map and dotted names."""

from __future__ import annotations

from typing import Any

import pytest

from cmrm.errors import InputError
from cmrm.prompts.columns import ColumnMap, cell_of, parse_columns


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (None, {}),
        ("", {}),
        ("query=instruction,image=img", {"query": "instruction", "image": "img"}),
        (" query = the text , image = img ,", {"query": "the text", "image": "img"}),
        ("query=Rephrased Question(SD)", {"query": "Rephrased Question(SD)"}),
        ("query=a=b", {"query": "a=b"}),
        ('query="text, in full",id=n', {"query": "text, in full", "id": "n"}),
        (r"query=text\, in full,id=n", {"query": "text, in full", "id": "n"}),
        ("query=don't ask,id=it's", {"query": "don't ask", "id": "it's"}),
        ("query=# of text", {"query": "# of text"}),
        ("label=m.label,image=images.0", {"label": "m.label", "image": "images.0"}),
    ],
)  # fmt: skip
def test_the_syntax_of_a_map(text: str | None, columns: dict[str, str]) -> None:
    assert parse_columns(text) == columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query", "'query' is no field=column; the fields are id, query"),
        ("=x", "is no field=column|no field ''"),
        ("query=", "is no field=column"),
        ("querry=x", "no field 'querry'"),
        ("query=a,query=b", "'query' is named twice"),
        ('query="a', "not quoted well"),
        ("query=a\\", "not quoted well"),
        ("x" * 10_000, "is no field=column"),
    ],
)
def test_broken_maps(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_columns(text)
    assert len(str(caught.value)) < 300


ROW: dict[str, Any] = {
    "metadata": {"category": "fraud", "a.b": {"c": 1}, "none": None},
    "images": ["x.png", {"path": "y.png"}],
    "a.b": "flat",
    "a": {"b": "nested", "c": "inner"},
    "json": '{"inner": ["first", {"deep": 2}]}',
    "broken": "{not json",
}


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("metadata.category", "fraud"),
        ("metadata.a.b.c", 1),
        ("metadata.none", None),
        ("images.0", "x.png"),
        ("images.1.path", "y.png"),
        ("a.b", "flat"),
        ("a.c", "inner"),
        ("json.inner.0", "first"),
        ("json.inner.1.deep", 2),
        *((name, None) for name in (
            "images.2", "images.-1", "images.x", "images.0.x", "metadata.nothing", "nothing",
            "broken.not", "a.b.c", "", ".", "..", "images.99999999999999999999",
        )),
    ],
)  # fmt: skip
def test_dotted_names_lead_into_cells(name: str, cell: Any) -> None:
    assert cell_of(ROW, name) == cell


def test_a_map_lists_the_columns_that_there_are() -> None:
    rows = [{"text": "q", "file": "f"}]
    with pytest.raises(
        InputError, match=r"x has no column for query=question; its columns are text"
    ):
        ColumnMap.of(rows, {"query": "question"}, "x")
    with pytest.raises(InputError, match=r"no column 'query'; .* text, file; .*--map query=COLUMN"):
        ColumnMap.of(rows, {}, "x")
    with pytest.raises(InputError, match="no field querry"):
        ColumnMap.of(rows, {"querry": "text"}, "x")


def test_a_long_list_of_columns_is_cut() -> None:
    with pytest.raises(InputError, match="and 492 more") as caught:
        ColumnMap.of([{f"column {k} {'x' * 100}": "" for k in range(500)}], {}, "x")
    assert len(str(caught.value)) < 500


def test_a_nested_column_of_some_rows_is_there() -> None:
    rows: list[dict[str, Any]] = [{"m": None, "query": "q"}, {"m": {"label": "safe"}, "query": "q"}]
    table = ColumnMap.of(rows, {"label": "m.label"}, "x")
    assert [table.cell(row, "label") for row in rows] == [None, "safe"]
    assert table.mapped == {"label"}
    with pytest.raises(InputError, match=r"no column for label=m\.lable"):
        ColumnMap.of(rows, {"label": "m.lable"}, "x")
