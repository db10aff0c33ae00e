"""Replies that somebody else generated: rows of any table, read into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.measure.outcomes import Kind
from cmrm.prompts.cells import text_cell
from cmrm.prompts.columns import cell_of
from cmrm.prompts.labels import LABELS, folded_label
from cmrm.prompts.tables import Row
from cmrm.prompts.text import listed, shortened

FIELDS = ("reply", "request", "label", "category", "model", "language")
"""What a column can be mapped to; `reply` and `request` must be there."""

_NAMES: dict[str, tuple[str, ...]] = {
    "reply": (
        "reply", "response", "completion", "prediction", "model_output", "model_response",
        "output", "generation", "generated_text", "filtered_resps", "resps", "messages", "answer",
        "text",
    ),
    "request": (
        "request", "query", "prompt", "question", "instruction", "goal", "behavior", "prompt_text",
        "doc.question", "doc.query", "doc.prompt", "doc.instruction", "input", "messages",
        "arguments",
    ),
    "label": ("label", "kind", "harm_label"),
    "category": (
        "category", "harm_category", "metadata.category", "doc.category", "l2-category", "topic",
    ),
    "model": ("model", "model_id", "model_name"),
    "language": ("language", "lang"),
}  # fmt: skip
"""Field -> names of columns that it is read from when the user names none, the first one first."""
_VOCABULARIES = (("harmful", "benign", "harmless"), ("unsafe", "safe"))
"""Words for labels that belong together."""


@dataclass(frozen=True)
class GivenReply:
    """A reply and what it answers."""

    file: str
    """Name of its file."""
    number: int
    """Row in the file, from 1."""
    request: str
    """What was asked, as text."""
    reply: str
    """The reply; empty where the model said nothing."""
    kind: Kind
    """`harmful` or `benign` request; `other` where the row's label is neither."""
    category: str
    """Harm category or topic; empty without one."""
    model: str
    """The model that replied; the file's name where no column says."""
    language: str
    """Of the reply, as the file names it; empty where no column says."""

    @property
    def id(self) -> str:
        """File and row."""
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> column, as the user named them."""
    label: str | None = None
    """Label of rows that have none: harmful or benign."""
    harmful: tuple[str, ...] = ()
    """Words of the label's column for harmful requests."""
    benign: tuple[str, ...] = ()
    """Words for benign ones."""

    def __post_init__(self) -> None:
        """Check the settings against each other.

        Raises:
            InputError: a field is unknown, the label is neither word, or a word has two meanings.
        """
        unknown = [name for name in self.columns if name not in FIELDS]
        if unknown:
            raise InputError(
                f"column map: there is no field {listed(unknown)}; the fields are "
                f"{', '.join(FIELDS)}"
            )
        if self.label is not None and folded_label(self.label) not in LABELS:
            raise InputError(f"--label is {shortened(self.label)!r}; one of {', '.join(LABELS)}")
        shared = sorted(set(self.harmful) & set(self.benign))
        if shared:
            raise InputError(f"the label {shared[0]!r} cannot be both harmful and benign")


def replies_of(
    rows: Sequence[Row], reading: Reading, *, file: str, model: str = ""
) -> list[GivenReply]:
    """Replies of the rows of a table.

    Args:
        rows: column name -> cell.
        reading: how they are read.
        file: name of the table.
        model: the model that replied where no column says; the file's name when empty.

    Raises:
        InputError: no column holds replies or requests, a cell cannot be read, or the labels are
            unknown or missing.
    """
    columns = {name: _column(name, rows, reading.columns, file) for name in FIELDS}
    words = [_text(row, columns["label"], file, n, "label") for n, row in enumerate(rows, 1)]
    kinds = _kinds(words, reading, file)
    return [
        GivenReply(
            file, number,
            _spoken(row, columns["request"], file, number, "request", role="user"),
            _spoken(row, columns["reply"], file, number, "reply", role="assistant"),
            kind,
            _text(row, columns["category"], file, number, "category"),
            _text(row, columns["model"], file, number, "model") or model or Path(file).stem,
            _text(row, columns["language"], file, number, "language").lower(),
        )
        for number, (row, kind) in enumerate(zip(rows, kinds, strict=True), 1)
    ]  # fmt: skip


def _column(name: str, rows: Sequence[Row], mapped: Mapping[str, str], file: str) -> str | None:
    """The column of a field; None where there is none and none is needed."""
    present = dict.fromkeys(column for row in rows for column in row)
    if name in mapped:
        if not any(_has(row, mapped[name]) for row in rows):
            raise InputError(
                f"{file} has no column {shortened(mapped[name])!r} for {name}; its columns are "
                f"{listed(present)}"
            )
        return mapped[name]
    folded = {column.strip().casefold(): column for column in reversed(present)}
    for candidate in _NAMES[name]:
        if candidate in folded:
            return folded[candidate]
        if "." in candidate and any(_has(row, candidate) for row in rows):
            return candidate
    if name in ("reply", "request"):
        raise InputError(
            f"{file} has no column for the {name}; its columns are {listed(present)}; name it "
            f"with --map {name}=COLUMN"
        )
    return None


def _has(row: Row, column: str) -> bool:
    return column in row or cell_of(row, column) is not None


def _text(row: Row, column: str | None, file: str, number: int, name: str) -> str:
    """A cell as text without blanks around it; empty where there is none."""
    if column is None:
        return ""
    text = text_cell(cell_of(row, column), f"{file} row {number}", name)
    return (text or "").strip()


def _spoken(row: Row, column: str | None, file: str, number: int, name: str, *, role: str) -> str:
    """A request or a reply as text: a cell, a list of one, the last message of `role` of a chat."""
    assert column is not None
    cell = _inner(cell_of(row, column), role)
    return text_cell(cell, f"{file} row {number}", name) or ""


_INSIDE = ("content", "text", "gen_args_0", "arg_0")
"""Keys that a message, a part of its content, and lmms-eval's arguments have their text under."""


def _inner(cell: Any, role: str) -> Any:
    """What a cell says: the text inside lists of one, chat messages and content parts."""
    if isinstance(cell, Mapping):
        inside = next((key for key in _INSIDE if key in cell), None)
        return cell if inside is None else _inner(cell[inside], role)
    if not isinstance(cell, list | tuple) or not cell:
        return None if isinstance(cell, list | tuple) else cell
    if all(isinstance(part, Mapping) and "role" in part for part in cell):
        turns = [part for part in cell if part["role"] == role]
        return _inner(turns[-1].get("content"), role) if turns else None
    if all(isinstance(part, Mapping) for part in cell):
        return "\n".join(str(part["text"]) for part in cell if part.get("text"))
    if len(cell) == 1 or role == "user":
        return _inner(cell[0], role)
    return cell


def _kinds(words: Sequence[str], reading: Reading, file: str) -> list[Kind]:
    """The kind of each row by the words of its label."""
    custom = dict.fromkeys(reading.harmful, "harmful") | dict.fromkeys(reading.benign, "benign")
    known = {word: custom.get(word) or folded_label(word) for word in set(words) if word}
    unknown = sorted(word for word, kind in known.items() if kind not in LABELS)
    if unknown and reading.label is None:
        raise InputError(
            f"{file} has labels that are neither harmful nor benign: {listed(unknown)}; say which "
            "are with --harmful WORDS and --benign WORDS, name another column with --map "
            "label=COLUMN, or give all rows one with --label harmful"
        )
    folded = {word.casefold() for word in known if word not in custom}
    if all(any(word in folded for word in vocabulary) for vocabulary in _VOCABULARIES):
        raise InputError(
            f"{file} has labels of two vocabularies: {listed(sorted(known))}; do safe and unsafe "
            "speak of the reply? Name the column of the request's label with --map label=COLUMN"
        )
    if not known and reading.label is None:
        raise InputError(
            f"{file} does not say which requests are harmful, and no rate can come from it; give "
            "all of them one label (--label harmful), or name a column (--map label=COLUMN)"
        )
    constant = folded_label(reading.label) if reading.label is not None else "other"
    kinds = (known.get(word, constant) for word in words)
    return [_KINDS.get(kind if kind in LABELS else constant, "other") for kind in kinds]


_KINDS: dict[str, Kind] = {"harmful": "harmful", "benign": "benign"}
