"""Cells: text and numbers, and images in every form that other tools write."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts.cells import image_cell, text_cell
from cmrm.prompts.sample import open_images

RED = Image.new("RGB", (7, 5), "red")
STREAM = io.BytesIO()
RED.save(STREAM, "PNG")
PNG = STREAM.getvalue()
TEXT = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{TEXT}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train" / "images").mkdir(parents=True)
    RED.save(tmp_path / "a.png")
    RED.save(tmp_path / "[1].png")
    RED.save(tmp_path / "train" / "images" / "b.png")
    return tmp_path


def sizes(cell: Any, folder: Path | None, *, search: bool = False) -> list[tuple[int, int]]:
    picture = image_cell(cell, folder, "row 0", search=search)
    return [image.size for image in open_images(Sample("s", "q", picture))]


# Text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("word", "word"), (" two words ", " two words "), (3, "3"), (3.0, "3"), (2.5, "2.5"),
        (True, "True"), (np.int64(4), "4"), (np.float32(4), "4"), (b"bytes", "bytes"),
        ("nan", "nan"), ("None", "None"), (10**30, str(10**30)), (float("inf"), "inf"),
        (None, None), ("", None), (" \t", None), (float("nan"), None), (np.float64("nan"), None),
        (np.float32("nan"), None),
    ],
)  # fmt: skip
def test_text_cells(cell: Any, text: str | None) -> None:
    assert text_cell(cell, "row 0", "label") == text


def test_pandas_own_absent_values() -> None:
    pandas = pytest.importorskip("pandas")
    assert text_cell(pandas.NA, "row 0", "label") is None
    assert text_cell(pandas.NaT, "row 0", "label") is None
    assert image_cell(pandas.NA, None, "row 0") is None


@pytest.mark.parametrize("cell", [["a"], {"a": 1}, ("a",), b"\xff", np.zeros(3), RED])
def test_text_that_is_none(cell: Any) -> None:
    with pytest.raises(InputError, match=r"^row 0: its answer is .* such as answer\.0"):
        text_cell(cell, "row 0", "answer")


def test_lists_become_json_where_that_is_enough() -> None:
    assert (
        text_cell(["a", {"b": "\u00fc"}], "row 0", "context", strict=False)
        == '["a", {"b": "\u00fc"}]'
    )


@pytest.mark.parametrize("cell", ["\ud800", ["\udfff"]])
def test_half_a_surrogate_pair_is_refused(cell: Any) -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        text_cell(cell, "row 0", "query", strict=False)


# Images


@pytest.mark.parametrize(
    "cell",
    [
        "a.png", " a.png ", Path("a.png"), "train/images/b.png", r"train\images\b.png", "[1].png",
        PNG, bytearray(PNG), TEXT, URI, RED, np.asarray(RED), TEXT[:20] + "\n" + TEXT[20:],
        {"bytes": PNG, "path": None}, {"bytes": TEXT, "path": None}, {"bytes": URI},
        {"bytes": None, "path": "a.png"}, {"bytes": float("nan"), "path": "a.png"},
        {"bytes": b"", "path": "a.png"}, {"path": "a.png"}, {"bytes": PNG, "path": "gone.png"},
        ["a.png"], '["a.png"]', "['a.png']", np.array(["a.png"]),
    ],
)  # fmt: skip
def test_one_image_in_every_form(folder: Path, cell: Any) -> None:
    assert sizes(cell, folder) == [(7, 5)]


@pytest.mark.parametrize(
    "cell",
    [
        ["a.png", "train/images/b.png"], ("a.png", PNG), [RED, RED], [TEXT, {"bytes": PNG}],
        json.dumps(["a.png", TEXT]), json.dumps([URI, {"bytes": TEXT, "path": None}]),
        "['a.png', 'train/images/b.png']", [None, "a.png", "", [PNG], float("nan")],
        np.array(["a.png", "a.png"], dtype=object), [np.asarray(RED), RED],
    ],
)  # fmt: skip
def test_several_images_in_every_form(folder: Path, cell: Any) -> None:
    assert sizes(cell, folder) == [(7, 5), (7, 5)]


@pytest.mark.parametrize(
    "cell",
    [None, "", "  ", float("nan"), [], "[]", [None], {"bytes": None, "path": None}, ["", None]],
)
def test_no_image(cell: Any) -> None:
    assert image_cell(cell, None, "row 0") is None


@pytest.mark.parametrize(
    "cell", [3, 2.5, True, {"url": "x"}, object(), ["a.png", 3], {"bytes": [1, 2]},
             {"path": {"a": 1}}, np.zeros(3), np.zeros((2, 2, 7)), [[[[[["a.png"]]]]]],
             json.dumps([[[[[[1]]]]]])]
)  # fmt: skip
def test_cells_that_hold_no_image(cell: Any) -> None:
    with pytest.raises(InputError, match=r"^row 0: its image") as caught:
        image_cell(cell, None, "row 0")
    assert len(str(caught.value)) < 300


def test_a_file_named_like_base64_is_a_file(folder: Path) -> None:
    Image.new("RGB", (2, 2)).save(folder / "tiny.gif")
    name = base64.b64encode((folder / "tiny.gif").read_bytes()).decode().replace("/", "_")
    RED.save(folder / name, "PNG")
    assert sizes(name, folder) == [(7, 5)]


def test_a_missing_path_is_a_path() -> None:
    picture = image_cell("/9j/4AAQ/images/of/another/machine/number/0001/photo", None, "row 0")
    assert picture == Path("/9j/4AAQ/images/of/another/machine/number/0001/photo")


@pytest.mark.parametrize("cell", ["A" * 100_000, TEXT[:-20] + "*" * 5000, "x" * 5000])
def test_a_long_text_gives_a_short_error(folder: Path, cell: str) -> None:
    with pytest.raises(InputError) as caught:
        sizes(cell, folder)
    assert len(str(caught.value)) < 200


def test_broken_base64_of_an_image_is_one_short_error(folder: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "PNG")
    with pytest.raises(InputError, match="cannot be read as an image") as caught:
        sizes(base64.b64encode(stream.getvalue()[:900]).decode(), folder)
    assert len(str(caught.value)) < 200


def test_a_url_is_not_fetched(folder: Path) -> None:
    with pytest.raises(InputError, match="would have to be fetched"):
        sizes("https://example.org/a.png", folder)


# Paths of another machine


@pytest.mark.parametrize(
    "path",
    ["/home/somebody/data/train/images/b.png", r"C:\Users\somebody\train\images\b.png",
     "D:/data/train/images/b.png", r"\\server\share\images\b.png", "/b.png", "/train/images/b.png"],
)  # fmt: skip
def test_an_absolute_path_is_found_by_its_tail(folder: Path, path: str) -> None:
    images = folder if "train" in path else folder / "train" / "images"
    assert sizes(path, images, search=True) == [(7, 5)]
    with pytest.raises(InputError, match="there is no image at"):
        sizes(path, images)


def test_the_longest_tail_wins(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"another file")
    (folder / "images").mkdir()
    (folder / "images" / "b.png").write_bytes(b"another file")
    cell = image_cell("/data/train/images/b.png", folder, "row 0", search=True)
    assert cell == folder / "train" / "images" / "b.png"


def test_an_absolute_path_that_exists_is_taken(folder: Path) -> None:
    elsewhere = folder / "train" / "a.png"
    Image.new("RGB", (3, 3)).save(elsewhere)
    assert sizes(str(elsewhere), folder, search=True) == [(3, 3)]


def test_a_tail_never_leaves_the_folder(folder: Path) -> None:
    cell = image_cell("/data/../a.png", folder / "train", "row 0", search=True)
    assert cell == Path("/data/../a.png")
