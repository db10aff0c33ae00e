"""Replies that somebody else generated: rows of any table, read into one form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmrm.errors import InputError
from cmrm.judges.base import EMPTY
from cmrm.measure.outcomes import Kind
from cmrm.measure.turns import Role, text_in, unpacked
from cmrm.prompts.cells import text_cell
from cmrm.prompts.columns import cell_of
from cmrm.prompts.labels import LABELS, checked_label, folded_label
from cmrm.prompts.tables import Row, is_absent
from cmrm.prompts.text import listed, shortened

FIELDS = ("request", "reply", "label", "category", "model", "language")
"""What a column can be mapped to; `request` and `reply` must be there."""

NAMES: dict[str, tuple[str, ...]] = {
    "request": (
        "request", "query", "prompt", "question", "instruction", "goal", "behavior", "prompt_text",
        "user_prompt", "doc.question", "doc.query", "doc.prompt", "doc.instruction", "input",
        "input_text", "messages", "conversations", "conversation", "arguments",
    ),
    "reply": (
        "reply", "response", "completion", "prediction", "model_output", "model_response", "output",
        "generation", "generated_text", "filtered_resps", "resps", "messages", "conversations",
        "conversation", "outputs", "responses", "model_answer",
    ),
    "label": ("label", "kind", "harm_label"),
    "category": (
        "category", "harm_category", "metadata.category", "doc.category", "l2_category", "topic",
    ),
    "model": ("model", "model_id", "model_name", "generator"),
    "language": ("language", "lang", "metadata.language"),
}  # fmt: skip
"""Field -> names of columns that it is read from when the user names none, the first one first.
Case does not matter, blanks and hyphens count as underscores."""
_VOCABULARIES = (("harmful", "benign", "harmless"), ("unsafe", "safe"))
"""Words for labels that belong together."""
KINDS: dict[str, Kind] = {"harmful": "harmful", "benign": "benign"}
"""Label -> kind of request; every other label is `other`."""
NO_ANSWER = "no reply was obtained: the cell holds an error message"
"""Why such a reply is unscored."""
_NO_ANSWER = re.compile(
    r"failed to obtain answer"
    r"|\W*(?:api|http|rate ?limit|timeout|connection|runtime|value)? ?error\s*[:\])]",
    re.IGNORECASE,
)
"""Beginning of what tools write in the place of a reply that they did not get."""


@dataclass(frozen=True)
class GivenReply:
    """A reply and what it answers."""

    file: str
    """Name of its file."""
    number: int
    """Row in the file, from 1; rows without any value are not counted."""
    request: str
    """What was asked, as text."""
    reply: str
    """The reply; empty where `missing` is not None."""
    kind: Kind
    """`harmful` or `benign` request; `other` where the row's label is neither."""
    category: str
    """Harm category or topic; empty without one."""
    model: str
    """The model that replied; the file's name where nothing says."""
    language: str
    """Of the reply, as the file names it; empty where no column says."""
    missing: str | None = None
    """Why there is no reply to judge; None where there is one."""

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
    """Words for benign ones. Where words are named, a row with another word is in no rate."""

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
        checked_label(self.label)
        shared = sorted(set(map(_folded, self.harmful)) & set(map(_folded, self.benign)))
        if shared:
            raise InputError(f"the label {shared[0]!r} cannot be both harmful and benign")

    @property
    def words(self) -> dict[str, str]:
        """Word of the label's column, folded -> label, as the user named them."""
        named = (("harmful", self.harmful), ("benign", self.benign))
        return {_folded(word): label for label, words in named for word in words}


@dataclass(frozen=True)
class Source:
    """Rows of a file, and what its format says."""

    name: str
    """Name of the file in messages and outputs."""
    rows: Sequence[Row]
    """Column name -> cell, for each row; at least one."""
    model: str
    """The model that replied, where no column says."""
    left_out: tuple[str, ...] = ()
    """Why samples of the file are no rows, a reason for each."""


@dataclass(frozen=True)
class ReplyFile:
    """The replies of a file, and how they were read."""

    name: str
    """Name of the file."""
    replies: tuple[GivenReply, ...]
    """In the order of the file."""
    columns: Mapping[str, str]
    """Field -> column that it was read from."""
    words: tuple[str, ...]
    """Words of the label's column."""
    left_out: tuple[str, ...]
    """Why samples of the file are no replies, a reason for each."""
    notes: tuple[str, ...]
    """What a reader of the results must know."""


def replies_of(source: Source, reading: Reading) -> ReplyFile:
    """The replies of a table.

    Raises:
        InputError: no column holds replies or requests, a cell cannot be read, or the labels are
            unknown or missing.
    """
    table = {name: _cells(name, source, reading.columns) for name in FIELDS}
    columns = {name: column for name, (column, _) in table.items() if column is not None}

    def texts(name: str) -> list[str]:
        column, cells = table[name]
        strict = name != "category" or name in reading.columns
        return [
            text_cell(cell, f"{source.name} row {number}", column or name, strict=strict) or ""
            for number, cell in enumerate(cells, 1)
        ]

    words = [word.strip() for word in texts("label")]
    kinds, notes = _kinds(words, reading, source)
    rows = zip(texts("request"), texts("reply"), kinds, texts("category"), texts("model"),
               texts("language"), strict=True)  # fmt: skip
    replies = tuple(_reply(source, number, columns, *row) for number, row in enumerate(rows, 1))
    notes += _counted(replies)
    distinct = tuple(dict.fromkeys(filter(None, words)))
    return ReplyFile(source.name, replies, columns, distinct, source.left_out, tuple(notes))


def _reply(
    source: Source, number: int, columns: Mapping[str, str], request: str, reply: str, kind: Kind,
    category: str, model: str, language: str,
) -> GivenReply:  # fmt: skip
    missing = EMPTY if not reply.strip() else None
    if _NO_ANSWER.match(reply):
        missing = NO_ANSWER
    return GivenReply(
        source.name, number, request, "" if missing else reply, kind, category.strip(),
        model.strip() or source.model, language.strip().lower(), missing,
    )  # fmt: skip


def _cells(name: str, source: Source, mapped: Mapping[str, str]) -> tuple[str | None, list[Any]]:
    """The column of a field (None where there is none and none is needed), and its cells."""
    column = _column(name, source, mapped)
    if column is None:
        return None, [None] * len(source.rows)
    cells = [cell_of(row, column) for row in source.rows]
    roles: dict[str, Role] = {"request": "request", "reply": "reply"}
    if name in roles:
        cells = [text_in(cell, roles[name]) for cell in unpacked(cells)]
    return column, cells


def _column(name: str, source: Source, mapped: Mapping[str, str]) -> str | None:
    """The column of a field; None where there is none and none is needed."""
    present = _present(source)
    if name in mapped:
        if mapped[name] not in present and not _filled(mapped[name], source.rows):
            raise InputError(
                f"{source.name} has no column {shortened(mapped[name])!r} for {name}; its columns "
                f"are {listed(present)}"
            )
        return mapped[name]
    folded = {_folded_name(column): column for column in reversed(present)}
    candidates = [
        folded.get(candidate, candidate if "." in candidate else None) for candidate in NAMES[name]
    ]
    columns = [column for column in candidates if column is not None]
    filled = next((column for column in columns if _filled(column, source.rows)), None)
    column = filled or next((column for column in columns if column in present), None)
    if column is None and name in ("reply", "request"):
        raise InputError(
            f"{source.name} has no column for the {name}; its columns are {listed(present)}; name "
            f"it with --map {name}=COLUMN"
        )
    return column


def _folded_name(column: str) -> str:
    return re.sub(r"[\s-]+", "_", column.strip().casefold())


def _filled(column: str, rows: Sequence[Row]) -> bool:
    """Whether a column holds anything in some row."""
    return any(not is_absent(cell_of(row, column)) for row in rows)


def _folded(word: str) -> str:
    return word.strip().casefold()


def _kinds(words: Sequence[str], reading: Reading, source: Source) -> tuple[list[Kind], list[str]]:
    """The kind of each row by the word of its label, and notes on words that do not speak for
    themselves."""
    named = reading.words
    meanings = {word: named.get(_folded(word)) or folded_label(word) for word in set(words) if word}
    strange = sorted(word for word, label in meanings.items() if label not in LABELS)
    constant = checked_label(reading.label)
    if not meanings and constant is None:
        raise InputError(
            f"{source.name} does not say which requests are harmful, so that there is no rate; "
            "label all of them with --label harmful (or benign), or name the column with --map "
            f"label=COLUMN; its columns are {listed(_present(source), 6)}"
        )
    if strange and constant is None and not named:
        raise InputError(
            f"{source.name} has labels that are neither harmful nor benign: {listed(strange, 4)}; "
            "say which are with --harmful WORDS and --benign WORDS, name another column with --map "
            "label=COLUMN, or label these rows with --label harmful"
        )
    by_vocabulary = {_folded(word) for word in meanings if _folded(word) not in named}
    if all(by_vocabulary.intersection(vocabulary) for vocabulary in _VOCABULARIES):
        raise InputError(
            f"{source.name} has labels of two vocabularies: {listed(sorted(meanings), 6)}; do safe "
            "and unsafe speak of the reply? Name the column of the request's label with --map "
            "label=COLUMN, or say what each word means with --harmful WORDS and --benign WORDS"
        )
    kinds = [
        KINDS.get(meanings.get(word) or "", KINDS.get(constant or "", "other")) for word in words
    ]
    notes = []
    if by_vocabulary.intersection(("safe", "unsafe")):
        notes.append(
            "the labels safe and unsafe are taken to speak of the request, not of the reply"
        )
    unlabelled = sum(meanings.get(word) not in LABELS for word in words)
    if unlabelled and (meanings or constant is None):
        which = f" ({listed(strange, 4)})" if strange else ""
        count = f"{unlabelled} of {len(words)} rows are labelled neither harmful nor benign{which}"
        effect = (
            "they are in no rate" if constant is None else f"they count as {constant}, by --label"
        )
        notes.append(f"{count}: {effect}")
    return kinds, notes


def _present(source: Source) -> dict[str, None]:
    """Names of the columns, in their order."""
    return dict.fromkeys(column for row in source.rows for column in row)


def _counted(replies: Sequence[GivenReply]) -> list[str]:
    """Notes on replies that are missing, requests that are empty, and rows that repeat."""
    notes = []
    for reason, count in Counter(reply.missing for reply in replies if reply.missing).items():
        notes.append(f"replies without a text to judge: {count}, {reason}")
    empty = sum(not reply.request.strip() for reply in replies)
    if empty:
        notes.append(f"rows with an empty request: {empty}; their replies are judged without it")
    seen = Counter((reply.model, reply.request, reply.reply) for reply in replies)
    repeated = sum(count - 1 for count in seen.values())
    if repeated:
        notes.append(f"rows that repeat the request and reply of a model: {repeated}; each counts")
    return notes
