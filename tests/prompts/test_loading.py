"""Files to samples: the column map, images, unusable rows, limits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts import load_named, load_samples
from cmrm.prompts.loading import rows_to_samples
from cmrm.prompts.sample import open_images

ROWS = [
    {"qid": "a", "text": "What is this?", "file": "one.png", "kind": "benign"},
    {"qid": "b", "text": "And this?", "file": "two.png", "kind": "harmful"},
    {"qid": "c", "text": "Or that?", "file": "one.png", "kind": "harmful"},
]
MAP = {"id": "qid", "query": "text", "image": "file", "label": "kind"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "one.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "two.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"rows.{suffix}").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    return tmp_path


def one_sample(row: dict[str, Any], **columns: str) -> Sample:
    return rows_to_samples([row], columns, folder=None, source="mine")[0]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_every_kind_of_file_gives_the_same_samples(folder: Path, kind: str) -> None:
    loaded = load_samples(folder / f"rows.{kind}", columns=MAP)
    fields = [(s.id, s.query, s.label) for s in loaded.samples]
    assert fields == [(row["qid"], row["text"], row["kind"]) for row in ROWS]
    sizes = [open_images(s)[0].size for s in loaded.samples]
    assert sizes == [(20, 10), (8, 8), (20, 10)]


# Fields


def test_fields_of_the_same_name_need_no_map() -> None:
    row = {
        "id": 7, "query": " q ", "caption": "c", "category": "k", "label": "Unsafe", "answer": 3.0,
        "match": " letter ", "context": ["x"], "image": "a.png", "other": "ignored",
    }  # fmt: skip
    assert one_sample(row) == Sample(
        "7", " q ", Path("a.png"), caption="c", category="k", label="harmful", answer="3",
        match="letter", context='["x"]',
    )  # fmt: skip


def test_absent_cells_are_absent_fields() -> None:
    nothing = dict.fromkeys(("id", "image", "caption", "category", "label", "answer", "match"))
    for absent in (None, "", float("nan")):
        row = {**dict.fromkeys(nothing, absent), "query": "q"}
        assert one_sample(row) == Sample("row-0", "q")


def test_rows_without_ids_are_numbered() -> None:
    samples = rows_to_samples([{"query": "q"}, {"query": "r"}], {}, folder=None, source="mine")
    assert [s.id for s in samples] == ["0", "1"]


def test_nested_columns() -> None:
    row = {"text": {"en": "q"}, "metadata": '{"category": "fraud"}', "images": ["a.png", "b.png"]}
    sample = one_sample(row, query="text.en", category="metadata.category", image="images.1")
    assert sample == Sample("0", "q", Path("b.png"), category="fraud")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "  "}, "mine row 0 has no text in 'query'"),
        ({"query": None, "id": 1}, "mine row 0 has no text in 'query'"),
        ({"query": 5}, "mine row 0 has no text in 'query'"),
        ({"query": ["q"]}, "mine row 0 has no text in 'query'"),
        ({"query": "q", "image": 3}, "mine row 0: its image is int"),
        ({"query": "q", "match": "close"}, "mine row 0: match is 'close'; one of exact, letter"),
        ({"query": "q", "answer": ["a", "b"]}, "mine row 0: its answer is list, expected text"),
        ({"query": "q", "id": {"a": 1}}, "mine row 0: its id is dict, expected text"),
        ({"query": "half \ud800"}, "its query holds half of a surrogate pair"),
    ],
)
def test_broken_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        one_sample(row)
    assert message in str(caught.value)


def test_wrong_column_map_lists_what_is_there(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"no column for query=question; its columns are qid, text"
    ):
        load_samples(folder / "rows.jsonl", columns={"query": "question"})
    with pytest.raises(InputError, match=r"no column 'query'.*--map query=COLUMN"):
        load_samples(folder / "rows.jsonl")


def test_repeated_ids_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"two samples have the id 'one\.png'"):
        load_samples(folder / "rows.jsonl", columns={**MAP, "id": "file"})


# Images


def test_images_of_another_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    table.write_text((folder / "rows.jsonl").read_text())
    assert len(load_samples(table, columns=MAP, images=folder).samples) == 3
    with pytest.raises(InputError, match="3 of 3 samples cannot be used"):
        load_samples(table, columns=MAP)


def test_absolute_paths_of_another_machine_are_found_in_the_image_folder(folder: Path) -> None:
    lines = [{"query": "q", "image": "/home/x/one.png"}, {"query": "r", "image": r"C:\x\two.png"}]
    (folder / "far.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = load_samples(folder / "far.jsonl", images=folder).samples
    assert [s.image for s in samples] == [folder / "one.png", folder / "two.png"]
    with pytest.raises(InputError, match="there is no image at"):
        load_samples(folder / "far.jsonl")


def test_an_image_folder_without_an_image_column_is_a_mistake(folder: Path) -> None:
    columns = {"query": "text"}
    message = r"no column 'image', but --images names a folder; .* file, kind; .*--map image=COLUMN"
    with pytest.raises(InputError, match=message):
        load_samples(folder / "rows.csv", columns=columns, images=folder)
    assert len(load_samples(folder / "rows.csv", columns=columns).samples) == 3


def test_unusable_images_are_counted_and_the_first_is_named(folder: Path) -> None:
    (folder / "two.png").write_bytes(b"broken")
    message = r"1 of 3 samples cannot be used; the first: sample 'b'.*--on-error skip"
    with pytest.raises(InputError, match=message):
        load_samples(folder / "rows.jsonl", columns=MAP)
    loaded = load_samples(folder / "rows.jsonl", columns=MAP, on_error="skip")
    assert [s.id for s in loaded.samples] == ["a", "c"]
    assert [s.row for s in loaded.skipped] == ["b"]
    assert loaded.to_json()["skipped"] == 1
    (folder / "one.png").unlink()
    with pytest.raises(InputError, match=r"3 of 3 .*none is left"):
        load_samples(folder / "rows.jsonl", columns=MAP, on_error="skip")


# Limits and options


def test_limit_is_a_draw_that_does_not_depend_on_order(folder: Path) -> None:
    few = load_samples(folder / "rows.jsonl", columns=MAP, limit=2)
    (folder / "turned.json").write_text(json.dumps(ROWS[::-1]), encoding="utf-8")
    again = load_samples(folder / "turned.json", columns=MAP, limit=2)
    assert {s.id for s in few.samples} == {s.id for s in again.samples}
    assert few.notes == ("2 of 3 samples",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0; it is at least 1"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; one of skip, stop"),
        ({"variant": "tiny"}, "go with a named set"),
        ({"path": Path("x")}, "go with a named set"),
        ({"split": "test"}, "neither splits"),
    ],
)
def test_options_that_do_not_fit_a_file(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_samples(folder / "rows.csv", columns=MAP, **options)


@pytest.mark.parametrize(
    "options", [{"columns": {"query": "x"}}, {"images": Path()}, {"split": "x"}, {"config": "x"}]
)
def test_options_that_do_not_fit_a_named_set(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="brings its own columns"):
        load_samples("xstest", **options)


def test_json_of_a_loaded_set(folder: Path) -> None:
    assert load_samples(folder / "rows.csv", columns=MAP, limit=3).to_json() == {
        "name": str(folder / "rows.csv"), "n": 3, "skipped": 0, "skipped_first": None,
        "notes": [], "harm": None, "labels": {"benign": 1, "harmful": 2},
    }  # fmt: skip


def test_a_file_by_its_name(folder: Path) -> None:
    loaded = load_named(str(folder / "rows.csv"), {}, limit=None, columns=MAP, label="harmful")
    assert loaded.name == "rows"
    assert [s.label for s in loaded.samples] == ["benign", "harmful", "harmful"]
    with pytest.raises(InputError, match="neither a file"):
        load_named("x" * 10_000, {}, limit=None)
