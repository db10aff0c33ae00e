"""CSV and TSV as spreadsheets, pandas and people save them."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from cmrm.errors import InputError
from cmrm.prompts.delimited import delimited_rows

ROWS = [{"id": "1", "query": "one"}, {"id": "2", "query": "two, and three"}]


def rows(folder: Path, content: str | bytes, name: str = "rows.csv") -> list[dict[str, str]]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return delimited_rows(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,query\n1,one\n2,"two, and three"\n'),
        ("a.csv", 'id,query\r\n1,one\r\n2,"two, and three"'),
        ("a.csv", 'id,query\r1,one\r2,"two, and three"\r'),
        ("a.csv", "id;query\n1;one\n2;two, and three\n"),
        ("a.csv", "id\tquery\n1\tone\n2\ttwo, and three\n"),
        ("a.csv", "sep=;\nid;query\n1;one\n2;two, and three\n"),
        ("a.tsv", "id\tquery\n1\tone\n2\ttwo, and three\n"),
        ("a.tsv", 'id,query\n1,one\n2,"two, and three"\n'),
        ("a.csv", '\n , \nid,query\n1,one\n\n,\n  ,  \n2,"two, and three"\n,,\n'),
        ("a.csv", '  id ,\u00a0query\t\n1,one\n2,"two, and three"\n'),
        ("a.csv", '"id","query"\n"1","one"\n"2","two, and three"\n'),
        ("a.csv", '\ufeff\ufeff"id",query\n1,one\n2,"two, and three"\n'),
        ("a.csv", 'id,query,,\n1,one,,\n2,"two, and three",,,,\n'),
        ("a.csv", ',id,query\n0,1,one\n1,2,"two, and three"\n2,,\n'),
    ],
    ids=["plain", "CRLF", "CR", "semicolons", "tabs in CSV", "sep=", "TSV", "commas in TSV",
         "blank rows", "blanks in the header", "all quoted", "byte order marks", "padded",
         "the index of pandas"],
)  # fmt: skip
def test_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert rows(tmp_path, content, name) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    text = "id;query\n1;Gr\u00fc\u00dfe \u4f60\u597d\n"
    content = text.encode(encoding) if "with" not in encoding else (
        codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    )  # fmt: skip
    assert rows(tmp_path, content) == [{"id": "1", "query": "Gr\u00fc\u00dfe \u4f60\u597d"}]


@pytest.mark.parametrize(
    "content",
    ["id;query\n1;Gr\u00fc\u00dfe\n".encode("cp1252"), "id,query\n1,one\n".encode("utf-16-le"),
     "id,query\n1,one\n".encode("utf-32"), b"\xff\xfeq", b"id,query\n1,o\0ne\n"],
    ids=["Windows", "UTF-16 without a mark", "UTF-32", "half a UTF-16 character", "NUL"],
)  # fmt: skip
def test_other_encodings_are_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"cannot be read: .*save as UTF-8$"):
        rows(tmp_path, content)


def test_short_rows_are_padded(tmp_path: Path) -> None:
    assert rows(tmp_path, "id,query,label\n1,one\n") == [{"id": "1", "query": "one", "label": ""}]


def test_text_in_quotes_may_hold_anything(tmp_path: Path) -> None:
    cell = 'a\nb\r\nc,"d";\te\u2028f\u2029g\x85h\x0ci'
    quoted = cell.replace('"', '""')
    assert rows(tmp_path, f'id,query\n1,"{quoted}"\n') == [{"id": "1", "query": cell}]


def test_a_line_separator_outside_quotes_is_text(tmp_path: Path) -> None:
    assert rows(tmp_path, "id,query\n1,a\u2028b\x85c\x0cd\n")[0]["query"] == "a\u2028b\x85c\x0cd"


def test_one_column_of_text_with_semicolons(tmp_path: Path) -> None:
    assert rows(tmp_path, "query\nfirst; second\n") == [{"query": "first; second"}]


def test_a_cell_of_a_million_characters(tmp_path: Path) -> None:
    assert len(rows(tmp_path, f"query\n{'x' * 1_000_000}\n")[0]["query"]) == 1_000_000


@pytest.mark.parametrize("content", ["", "\n\n", ",,\n,\n", "id,query\n", "id,query\n,\n \n"])
def test_nothing_in_it(tmp_path: Path, content: str) -> None:
    assert rows(tmp_path, content) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,query\n1,a\n2,b,c\n", "line 3 has 3 fields, more than the header (2)"),
        ("id,query\n\n1,a,,c\n", "line 3 has 4 fields"),
        ('id,query\n1,"a\nb",c\n', "line 2 has 3 fields"),
        ("id,query,id\n1,a,b\n", "names a column twice: id"),
        ("id, id\n1,a\n", "names a column twice: id"),
        ('id,query\n1,a\n2,"no end\n3,c\n', "line 3 cannot be read"),
        ('id,query\n1,"a" b\n', "line 2 cannot be read"),
    ],
)
def test_broken_tables_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        rows(tmp_path, content)
    assert message in str(caught.value)
