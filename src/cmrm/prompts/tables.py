"""Rows of a table: JSON Lines, JSON, CSV, TSV, Parquet, or `datasets` (saved or on the hub)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmrm.errors import InputError, MissingExtraError
from cmrm.prompts.delimited import delimited_rows
from cmrm.prompts.text import listed, read_text, shortened

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Row = dict[str, Any]
"""Column name -> cell."""


def read_table(
    source: str | Path, *, split: str | None = None, config: str | None = None
) -> list[Row]:
    """Rows of a file, of a folder written by `datasets`, or of a hub data set; at least one.

    Rows without any value are left out.

    Args:
        source: a path, or `owner/name` on the hub.
        split: split of a `datasets` source; needed when it has several.
        config: configuration of a hub data set.

    Raises:
        InputError: there is no such source, it cannot be read, or it has no rows; the message names
            the line where one is at fault.
        MissingExtraError: Parquet or `datasets` without their libraries.
    """
    path = Path(source)
    is_file = os.path.isfile(path)  # False, not an error, for a name that no file can have
    if os.path.isdir(path):
        if not is_saved_dataset(path):
            raise InputError(
                f"{source} is a folder, and no set saved by `datasets`; name a file "
                f"({', '.join(SUFFIXES)}) or a named set with --path (`cmrm sets` lists them)"
            )
        rows = _dataset_rows(str(source), split, config, local=True)
    elif path.suffix.lower() in SUFFIXES or is_file:
        if split is not None or config is not None:
            raise InputError(
                f"{source} is a file and has neither splits nor configurations; leave those "
                "options out"
            )
        if not is_file:
            raise InputError(f"there is no file {shortened(path, 160)}")
        rows = _file_rows(path)
    elif _HUB_ID.fullmatch(str(source)):
        rows = _dataset_rows(str(source), split, config, local=False)
    else:
        raise InputError(
            f"{shortened(source)} is neither a file nor a hub id (owner/name) nor a named set "
            "(`cmrm sets` lists them)"
        )
    rows = [row for row in rows if not all(is_absent(cell) for cell in row.values())]
    if not rows:
        raise InputError(f"{source} holds no rows")
    return rows


def is_absent(cell: object) -> bool:
    """Whether a cell holds nothing: None, an empty text, or NaN as a number (not as a text)."""
    if isinstance(cell, float):
        return math.isnan(cell)
    if isinstance(cell, str):
        return not cell
    return cell is None or type(cell).__name__ in {"NAType", "NaTType"}


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved a set, or a dictionary of splits, in this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    return _json_value(read_text(path), str(path))


def read_json_lines(path: Path) -> list[Row]:
    """The objects of a JSON Lines file. A line ends at a line feed; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    return _json_lines(read_text(path), path)


def _file_rows(path: Path) -> list[Row]:
    kind = path.suffix.lower()
    if kind in {".jsonl", ".ndjson"}:
        return read_json_lines(path)
    if kind == ".json":
        return _json_rows(path)
    if kind in {".csv", ".tsv"}:
        return list(delimited_rows(path))
    if kind == ".parquet":
        return _parquet_rows(path)
    raise InputError(f"{path} has an unknown kind {kind!r}; one of {', '.join(SUFFIXES)}")


def _json_value(text: str, place: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is no JSON: {shortened(error, 100)}") from None


def _json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _json_value(line, f"{path} line {number}")
        if not isinstance(row, dict):
            raise InputError(
                f"{path} line {number} is {type(row).__name__}, expected an object in JSON"
            )
        rows.append(row)
    return rows


def _json_rows(path: Path) -> list[Row]:
    """Rows of a JSON file in one of the usual shapes.

    A list of objects; an object with such a list under `data`; an object of objects (its keys
    become the column `key`); an object of columns, as pandas writes it: each a list, or an object
    by row number. A file with one object a line is read as JSON Lines.
    """
    text = read_text(path)
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _json_lines(text, path)
        raise InputError(f"{path} is no JSON: {shortened(error, 100)}") from None
    if isinstance(content, dict) and _are_objects(content.get("data")):
        content = content["data"]
    if _are_objects(content):
        return list(content)
    if isinstance(content, dict) and content:
        values = list(content.values())
        if all(isinstance(value, dict) for value in values):
            if _by_row_number(values):
                return [
                    {name: column.get(number) for name, column in content.items()}
                    for number in values[0]
                ]
            return [{"key": key, **value} for key, value in content.items()]
        if all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1:
            return [dict(zip(content, cells, strict=True)) for cells in zip(*values, strict=True)]
    raise InputError(f"{path} is no list of objects; expected one object a row")


def _are_objects(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(row, dict) for row in content)


def _by_row_number(columns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these objects are columns: all have the same keys, which are whole numbers."""
    numbers = columns[0].keys()
    return bool(numbers) and all(
        column.keys() == numbers and all(key.lstrip("-").isdecimal() for key in column)
        for column in columns
    )


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError:
        raise MissingExtraError(
            "reading Parquet needs pyarrow; install it with: pip install 'cmrm[data]'"
        ) from None
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is no whole Parquet file: {shortened(error, 100)}") from None
    return rows


def _dataset_rows(source: str, split: str | None, config: str | None, *, local: bool) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"reading {shortened(source)} needs the library `datasets`; install it with: "
            "pip install 'cmrm[data]'"
        ) from None
    try:
        loaded = datasets.load_from_disk(source) if local else datasets.load_dataset(source, config)
    except Exception as error:  # the library has a class of its own for each kind of trouble
        raise _unloadable(source, error) from None
    if isinstance(loaded, dict):
        if split is None and len(loaded) > 1:
            raise InputError(f"{source} has the splits {listed(loaded)}; choose one with --split")
        name = split or next(iter(loaded), "")
        if name not in loaded:
            raise InputError(f"{source} has no split {name!r}; it has {listed(loaded)}")
        loaded = loaded[name]
    elif split is not None:
        raise InputError(f"{source} has no splits; leave --split out")
    try:
        features = {name: _encoded(feature) for name, feature in loaded.features.items()}
        if features != dict(loaded.features):
            loaded = loaded.cast(datasets.Features(features))
        return [dict(row) for row in loaded]
    except Exception as error:
        raise _unloadable(source, error) from None


def _encoded(feature: Any) -> Any:
    """A feature of `datasets` whose images stay encoded, alone or in lists."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    if inner is not None and _encoded(inner) != inner:
        return replace(feature, feature=_encoded(inner))
    return feature


def _unloadable(source: str, error: Exception) -> InputError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"cannot load the data set {shortened(source)}: {shortened(lines[0], 160)}")
