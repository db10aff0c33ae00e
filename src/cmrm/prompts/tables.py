"""Rows of a table, whatever it is stored as: JSONL, JSON, CSV, TSV, Parquet, or `datasets` (a saved folder or a hub id)."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmrm.errors import InputError, MissingExtraError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

Row = dict[str, Any]


def read_table(source: str | Path, *, split: str | None = None, config: str | None = None) -> list[Row]:
    """Rows of a file, of a folder written by `datasets`, or of a hub data set.

    Args:
        source: a path, or `owner/name` on the hub.
        split: which split of a `datasets` source; needed when it has several.
        config: which configuration of a hub data set.

    Raises:
        InputError: nothing is there, or it cannot be read; the row is named where one is at fault.
        MissingExtraError: Parquet or `datasets` without their libraries.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _from_datasets(str(source), split, config, local=True)
        raise InputError(
            f"{source} is a folder, and no set saved by `datasets`; name a file ({', '.join(SUFFIXES)}) or a named set "
            "with --path (`cmrm sets` lists them)"
        )
    if path.suffix.lower() in SUFFIXES or path.is_file():
        if split is not None or config is not None:
            raise InputError(f"{source} is a file and has neither splits nor configurations; leave those options out")
        return _from_file(path)
    if _HUB_ID.match(str(source)):
        return _from_datasets(str(source), split, config, local=False)
    raise InputError(f"{source} is neither a file nor a hub id (owner/name) nor a named set (`cmrm sets` lists them)")


def _from_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    kind = path.suffix.lower()
    try:
        if kind in {".jsonl", ".ndjson"}:
            rows = list(_json_lines(path))
        elif kind == ".json":
            rows = _json_rows(path, json.loads(path.read_text(encoding="utf-8-sig")))
        elif kind in {".csv", ".tsv"}:
            rows = list(_csv_rows(path, "\t" if kind == ".tsv" else ","))
        elif kind == ".parquet":
            rows = _parquet_rows(path)
        else:
            raise InputError(f"{path} has an unknown kind {kind!r}; one of {', '.join(SUFFIXES)}")
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is {type(row).__name__}, expected an object")
        yield row


def _json_rows(path: Path, content: Any) -> list[Row]:
    """A list of objects, or an object of objects, whose keys become the column `key`."""
    if isinstance(content, dict) and content and all(isinstance(v, dict) for v in content.values()):
        return [{"key": key, **value} for key, value in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path} is no list of objects; expected one object a row")
    return content


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path} line {reader.line_num} has another number of fields than the header "
                    f"({len(reader.fieldnames or [])}); is it quoted as CSV?"
                )
            yield row


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError:
        raise MissingExtraError("reading Parquet needs pyarrow; install it with: pip install 'cmrm[data]'") from None
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except ArrowException as error:
        raise InputError(f"{path} is no whole Parquet file: {error}") from None
    return rows


def _from_datasets(source: str, split: str | None, config: str | None, *, local: bool) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"reading {source} needs the library `datasets`; install it with: pip install 'cmrm[data]'"
        ) from None
    try:
        held = datasets.load_from_disk(source) if local else datasets.load_dataset(source, config)
    except Exception as error:  # the library raises a dozen unrelated classes for a missing, gated or broken set
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load the data set {source}: {lines[0]}") from None
    if isinstance(held, dict):
        if split is None and len(held) > 1:
            raise InputError(f"{source} has the splits {', '.join(held)}; choose one with --split")
        name = split or next(iter(held))
        if name not in held:
            raise InputError(f"{source} has no split {name!r}; it has {', '.join(held)}")
        held = held[name]
    elif split is not None:
        raise InputError(f"{source} has no splits; leave --split out")
    for name, feature in held.features.items():
        if isinstance(feature, datasets.Image):
            held = held.cast_column(name, datasets.Image(decode=False))
    return [dict(row) for row in held]
