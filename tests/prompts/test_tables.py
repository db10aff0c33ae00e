"""Rows of JSON Lines, JSON, Parquet and `datasets`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmrm.errors import InputError, MissingExtraError
from cmrm.prompts import tables
from cmrm.prompts.loading import load_samples
from cmrm.prompts.sample import open_images
from cmrm.prompts.tables import is_absent, read_table

ROWS = [{"id": "a", "query": "one"}, {"id": "b", "query": "two"}]


def saved(folder: Path, name: str, content: str | bytes | Any) -> Path:
    path = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# JSON Lines


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1e", "\t"])
def test_a_line_of_json_ends_at_a_line_feed(tmp_path: Path, char: str) -> None:
    text = f'{{"id": "a", "query": "copy{char}paste"}}\n{{"id": "b", "query": "two"}}\n'
    rows = read_table(saved(tmp_path, "a.jsonl", text))
    assert [row["query"] for row in rows] == [f"copy{char}paste", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json"])
def test_crlf_blank_lines_and_byte_order_marks(tmp_path: Path, name: str) -> None:
    text = '\ufeff{"id": "a", "query": "one"}\r\n\r\n  \n{"id": "b", "query": "two"}\r\n'
    assert read_table(saved(tmp_path, name, text)) == ROWS


def test_utf_16_lines(tmp_path: Path) -> None:
    text = "\n".join(map(json.dumps, ROWS))
    assert read_table(saved(tmp_path, "a.jsonl", text.encode("utf-16"))) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}\nnot json', "line 2 is no JSON"),
        ('\n\n{"id": 1', "line 3 is no JSON"),
        ("[1]", "line 1 is list, expected an object"),
        ("", "holds no rows"),
        ("{}\n{}\n", "holds no rows"),
        ("[" * 100_000, "line 1 is no JSON"),
        (f'{{"id": {"9" * 5000}}}', "line 1 is no JSON"),
        (b'{"id": "\xff"}', "save as UTF-8"),
        (b'{"id": "a\0"}', "NUL"),
    ],
)  # fmt: skip
def test_broken_lines(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_table(saved(tmp_path, "a.jsonl", content))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


# JSON


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        {"data": ROWS},
        {"version": 2, "data": ROWS},
        {"id": {"0": "a", "1": "b"}, "query": {"0": "one", "1": "two"}},
        {"id": {"7": "a", "-2": "b"}, "query": {"7": "one", "-2": "two"}},
        {"id": ["a", "b"], "query": ["one", "two"]},
    ],
    ids=["objects", "data", "data and more", "pandas", "pandas, another index", "lists"],
)
def test_shapes_of_json(tmp_path: Path, content: Any) -> None:
    assert read_table(saved(tmp_path, "a.json", content)) == ROWS


def test_an_object_of_objects_keeps_its_keys(tmp_path: Path) -> None:
    content = {"3": {"query": "one"}, "x": {"query": "two", "key": "own"}}
    rows = read_table(saved(tmp_path, "a.json", content))
    assert rows == [{"key": "3", "query": "one"}, {"key": "own", "query": "two"}]


def test_what_pandas_writes_by_default(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    for orient in (None, "records", "columns", "table", "index"):
        frame.to_json(tmp_path / "a.json", orient=orient)
        rows = read_table(tmp_path / "a.json")
        assert [(row["id"], row["query"]) for row in rows] == [("a", "one"), ("b", "two")], orient
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert read_table(tmp_path / "a.jsonl") == ROWS
    frame.to_csv(tmp_path / "a.csv")
    assert read_table(tmp_path / "a.csv") == ROWS


@pytest.mark.parametrize(
    "content",
    ['{"a": 1}', "[1, 2]", '"text"', "null", '{"a": [1], "b": [1, 2]}', '[{"a": 1}, 2]', "3"],
)
def test_json_of_another_shape(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="no list of objects"):
        read_table(saved(tmp_path, "a.json", content))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"a": tru'])
def test_broken_json(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="is no JSON"):
        read_table(saved(tmp_path, "a.json", content))


@pytest.mark.parametrize("content", ["[]", '{"data": []}', '[{"a": null}, {"a": NaN}, {}]'])
def test_json_without_rows(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="holds no rows"):
        read_table(saved(tmp_path, "a.json", content))


# Sources


def test_nothing_there(tmp_path: Path) -> None:
    for source, message in (
        (tmp_path / "no.csv", "there is no file"),
        (tmp_path, "is a folder, and no set saved by"),
        ("what", "is neither a file nor a hub id"),
        ("x" * 10_000, "is neither a file nor a hub id"),
        ("a\0b.csv", "there is no file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_table(source)
        assert len(str(caught.value)) < 600


def test_unknown_kinds_and_stray_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown kind '.yaml'; one of .jsonl"):
        read_table(saved(tmp_path, "a.yaml", "a: b"))
    with pytest.raises(InputError, match="neither splits nor configurations"):
        read_table(saved(tmp_path, "a.json", ROWS), split="test")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow.*pip install 'cmrm\[data\]'"):
        read_table(saved(tmp_path, "a.parquet", "PAR1"))
    with pytest.raises(MissingExtraError, match=r"`datasets`.*pip install 'cmrm\[data\]'"):
        read_table("owner/name")


def test_absent_cells() -> None:
    assert all(map(is_absent, (None, "", float("nan"))))
    assert not any(map(is_absent, ("nan", " ", 0, 0.0, False, [], b"")))


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="no whole Parquet file"):
        read_table(saved(tmp_path, "a.parquet", "PAR1"))


def test_parquet_of_pandas_with_absent_cells(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"id": [1, None], "query": ["one", "two"], "label": ["safe", None], "image": [None, None]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    samples = load_samples(tmp_path / "a.parquet").samples
    assert [(s.id, s.query, s.label, s.image) for s in samples] == [
        ("1", "one", "benign", None),
        ("row-1", "two", None, None),
    ]


# datasets


def png(colour: str = "green", size: tuple[int, int] = (7, 5)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def test_saved_sets_with_images_and_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": png(), "path": None}, {"bytes": png("red", (3, 3)), "path": None}]
    table = datasets.Dataset.from_list(
        [{**row, "image": cell} for row, cell in zip(ROWS, cells, strict=True)]
    ).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for source in (tmp_path / "saved", tmp_path / "a.parquet"):
        samples = load_samples(source).samples
        assert [open_images(s)[0].size for s in samples] == [(7, 5), (3, 3)]
        assert all(isinstance(s.image, bytes) for s in samples), "decoded only when it is opened"
    datasets.DatasetDict({"x": table, "y": table}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(InputError, match="has the splits x, y; choose one with --split"):
        load_samples(tmp_path / "both")
    assert len(load_samples(tmp_path / "both", split="y").samples) == 2
    with pytest.raises(InputError, match="has no split 'z'; it has x, y"):
        load_samples(tmp_path / "both", split="z")
    with pytest.raises(InputError, match="has no splits"):
        load_samples(tmp_path / "saved", split="x")


def test_lists_of_images_in_a_saved_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cell = [{"bytes": png(), "path": None}, {"bytes": png("red", (3, 3)), "path": None}]
    features = datasets.Features(
        {"query": datasets.Value("string"), "image": datasets.List(datasets.Image())}
    )
    table = datasets.Dataset.from_list([{"query": "q", "image": cell}], features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    sample = load_samples(tmp_path / "saved").samples[0]
    assert [image.size for image in open_images(sample)] == [(7, 5), (3, 3)]
    assert all(isinstance(picture, bytes) for picture in sample.pictures)


def test_a_broken_saved_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "saved").mkdir()
    saved(tmp_path / "saved", "state.json", "{")
    with pytest.raises(InputError, match="cannot load the data set"):
        read_table(tmp_path / "saved")


def test_trouble_of_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refused(*args: Any) -> None:
        raise RuntimeError("first line " + "x" * 5000 + "\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(
        InputError, match=r"^cannot load the data set owner/name: first line"
    ) as error:
        tables.read_table("owner/name")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
