"""Rows of CSV and TSV files as spreadsheets, pandas and people save them."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cmrm.errors import InputError
from cmrm.prompts.text import listed, read_text, shortened

DELIMITERS = (",", ";", "\t")
LARGEST_CELL = 2**31 - 1
"""Characters; an image in base64 is one cell."""
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?\r?\n')
"""The first line that Excel writes and reads to name the delimiter."""

Record = tuple[int, list[str]]
"""Line number of the start of a record, and its cells."""


def delimited_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV or TSV file by its header.

    The delimiter is the one of comma, semicolon and tab that gives the most columns; in a TSV file
    the tab where the header has one. Blank rows are skipped, short rows padded with empty cells.
    Columns without a name are ignored.

    Raises:
        InputError: the file cannot be read, its quoting is broken, its header is empty or repeats a
            name, or a row has more cells than the header.
    """
    csv.field_size_limit(LARGEST_CELL)
    text = read_text(path)
    stated = _SEPARATOR_LINE.match(text)
    if stated:
        delimiter, text = stated[1], text[stated.end() :]
    else:
        delimiter = _delimiter(text, "\t" if path.suffix.lower() == ".tsv" else None)
    records = _records(path, text, delimiter)
    header = next((_names(cells) for _, cells in records if not _blank(cells)), [])
    if not header:
        return []
    repeated = [name for name, n in Counter(filter(None, header)).items() if n > 1]
    if repeated:
        raise InputError(f"{path} names a column twice: {listed(repeated)}; rename one of them")
    rows = []
    for line, cells in records:
        if not _blank(cells[len(header) :]):
            raise InputError(
                f"{path} line {line} has {len(cells)} fields, more than the header "
                f"({len(header)}); is it quoted as CSV?"
            )
        padded = cells[: len(header)] + [""] * (len(header) - len(cells))
        row = {name: cell for name, cell in zip(header, padded, strict=True) if name}
        if not _blank(list(row.values())):
            rows.append(row)
    return rows


def _records(path: Path, text: str, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path} line {line} cannot be read: {shortened(error)}; is it quoted as CSV?"
            ) from None


def _delimiter(text: str, preferred: str | None) -> str:
    """The delimiter of a text by its header: `preferred` where the header has it."""
    columns = {delimiter: _columns(text, delimiter) for delimiter in DELIMITERS}
    if preferred is not None and columns[preferred] > 1:
        return preferred
    return max(DELIMITERS, key=lambda delimiter: (columns[delimiter], delimiter == preferred))


def _columns(text: str, delimiter: str) -> int:
    """Named columns of the header under a delimiter; 0 where it is not quoted for it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next((cells for cells in reader if not _blank(cells)), [])
    except csv.Error:
        return 0
    return sum(bool(name.strip("".join(DELIMITERS))) for name in _names(header))


def _names(cells: list[str]) -> list[str]:
    """Column names without blanks and byte order marks around them."""
    return [cell.replace("\N{ZERO WIDTH NO-BREAK SPACE}", "").strip() for cell in cells]


def _blank(cells: list[str]) -> bool:
    return not any(cell.strip() for cell in cells)
