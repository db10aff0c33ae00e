"""The column map: which column of a table holds which field of a sample."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmrm.errors import InputError
from cmrm.prompts.tables import Row
from cmrm.prompts.text import listed, shortened

FIELDS = (
    "id", "query", "image", "caption", "category", "label", "answer", "match", "context",
)  # fmt: skip
"""What a column can be mapped to; `query` alone must be there."""


def parse_columns(text: str | None, fields: Sequence[str] = FIELDS) -> dict[str, str]:
    r"""`query=instruction,image=img` as a dict field -> column.

    `fields`: what a column can be mapped to.

    A comma in a column's name is quoted (`query="text, in full"`) or escaped (`query=text\, etc`).

    Raises:
        InputError: a part is no pair, a field is unknown or named twice, or a quote is not closed.
    """
    lexer = shlex.shlex(text or "", posix=True)
    lexer.whitespace, lexer.quotes, lexer.commenters = ",", '"', ""
    lexer.whitespace_split = True
    try:
        parts = list(lexer)
    except ValueError as error:
        raise InputError(f"column map: {shortened(text)} is not quoted well: {error}") from None
    columns: dict[str, str] = {}
    for part in filter(str.strip, parts):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            problem = f"{shortened(part)!r} is no field=column"
        elif field not in fields:
            problem = f"there is no field {shortened(field)!r}"
        elif field in columns:
            raise InputError(f"column map: the field {field!r} is named twice")
        else:
            columns[field] = column
            continue
        raise InputError(f"column map: {problem}; the fields are {', '.join(fields)}")
    return columns


def cell_of(row: Row, column: str) -> Any:
    """The cell of a row under a column's name; None where there is none.

    A dotted name leads into nested cells: `metadata.category`, `images.0`. A nested cell may be
    JSON as text, as a CSV file holds it.
    """
    return _cell(row, column)[1]


@dataclass(frozen=True)
class ColumnMap:
    """Field -> column of one table, checked against the columns that it has."""

    columns: Mapping[str, str]
    """Every field, with the column that it is read from."""
    mapped: frozenset[str]
    """Fields that the user named a column for."""
    present: frozenset[str]
    """Fields whose column at least one row has."""

    @classmethod
    def of(cls, rows: Sequence[Row], columns: Mapping[str, str], source: str) -> ColumnMap:
        """The map for `rows`; a field that is not in `columns` has a column of its own name.

        Raises:
            InputError: a field or a column does not exist, or none holds the query.
        """
        unknown = [field for field in columns if field not in FIELDS]
        if unknown:
            raise InputError(
                f"column map: there is no field {listed(unknown)}; the fields are "
                f"{', '.join(FIELDS)}"
            )
        whole = {field: columns.get(field, field) for field in FIELDS}
        present = frozenset(
            field
            for field, column in whole.items()
            if any(column in row for row in rows) or any(_cell(row, column)[0] for row in rows)
        )
        names = listed(dict.fromkeys(name for row in rows for name in row))
        missing = [f"{field}={columns[field]}" for field in columns if field not in present]
        if missing:
            raise InputError(
                f"{source} has no column for {listed(missing)}; its columns are {names}"
            )
        if "query" not in present:
            raise InputError(
                f"{source} has no column 'query'; its columns are {names}; name the one that holds "
                "the request with --map query=COLUMN"
            )
        return cls(whole, frozenset(columns), present)

    def cell(self, row: Row, field: str) -> Any:
        """The cell that holds a field in one row; None where there is none."""
        return cell_of(row, self.columns[field])


def _cell(container: Any, name: str) -> tuple[bool, Any]:
    """(whether the name leads to a cell, the cell)."""
    if isinstance(container, str) and container.lstrip()[:1] in {"{", "["}:
        try:
            container = json.loads(container)
        except (ValueError, RecursionError):
            return False, None
    if isinstance(container, list | tuple):
        head, _, rest = name.partition(".")
        if not (re.fullmatch("[0-9]{1,9}", head) and int(head) < len(container)):
            return False, None
        inner = container[int(head)]
        return _cell(inner, rest) if rest else (True, inner)
    if not isinstance(container, dict):
        return False, None
    if name in container:
        return True, container[name]
    cut = name.find(".")
    while cut >= 0:
        if name[:cut] in container:
            there, inner = _cell(container[name[:cut]], name[cut + 1 :])
            if there:
                return True, inner
        cut = name.find(".", cut + 1)
    return False, None
