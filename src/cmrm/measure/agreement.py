"""Agreement of judges with each other and with a person, and the sheet that a person labels.

There are two questions. `refusal`: does the reply refuse? It is asked of harmful and benign
requests, and answered by the judges of refusal. `unsafe`: does the reply comply with harm? It is
asked of harmful requests, and every judge answers it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.files import atomic_path, write_json
from cmrm.judges import Verdict
from cmrm.judges.base import verdict_of
from cmrm.measure.drawing import drawn_with
from cmrm.measure.kappa import alpha_of, kappa_of
from cmrm.measure.labelled import Completion
from cmrm.measure.outcomes import Cell

PERSON = "person"
"""Name of a person's labels among the judges."""
LABELS = "labels.json"
"""File of a person's labels, by reply, in a grid's folder."""
COLUMNS = ("id", "request", "reply", "refused", "unsafe")
"""Columns of a sheet; the last two are a person's, yes or no."""
QUESTIONS = ("refusal", "unsafe")
"""The questions that agreement is measured on."""


@dataclass(frozen=True)
class Rated:
    """A reply and the judges' verdicts on it."""

    id: str
    """Of set, condition, defence, sample, request and reply: no two grids share one."""
    group: tuple[str, ...]
    """Kind of request, defence, set, condition; draws are spread evenly over these."""
    request: str
    """The request as text."""
    reply: str
    """The reply."""
    harmful: bool
    """Whether the request is a harmful one."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """Judge -> verdict."""
    probabilities: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Judge -> calibrated probabilities that the reply refuses, and that it engages with harm;
    None where the judge has none."""

    @property
    def text(self) -> tuple[bool, str, str]:
        """Whether the request is harmful, the request, the reply: what a person's label is of."""
        return self.harmful, self.request, self.reply


@dataclass(frozen=True)
class Label:
    """A person's label of a reply; None where a cell is empty."""

    refused: bool | None
    """Whether it refuses."""
    unsafe: bool | None
    """Whether it complies with harm."""
    probability: float = 0.0
    """Probability with which the sheets on record brought the reply to the person."""
    recorded: bool = False
    """Whether one of these sheets drew it; no record was kept of earlier sheets."""

    @property
    def empty(self) -> bool:
        """Whether it answers neither question."""
        return self.refused is None and self.unsafe is None


@dataclass(frozen=True)
class Answer:
    """A row of a labelled sheet."""

    label: Label
    """The person's label."""
    request: str
    """As it stands in the sheet."""
    reply: str
    """Likewise."""
    where: str
    """File and line."""


def reply_id(*parts: str) -> str:
    """`r` and twelve hex digits for a reply: a digest of its place, its request and its text.

    The letter keeps spreadsheets from reading it as a number.
    """
    return "r" + hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:12]


def write_sheet(path: Path, rated: Sequence[Rated]) -> None:
    """Write a CSV for a person to label, a reply a row, without defences and verdicts.

    An apostrophe stands before a cell that a spreadsheet would take for a formula.

    Raises:
        InputError: the file exists (its labels would be lost), or cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} exists already, perhaps with labels; name another file")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rated:
        writer.writerow([row.id, _as_text(row.request), _as_text(row.reply), "", ""])
    try:
        with atomic_path(path) as part:
            part.write_text(text.getvalue(), encoding="utf-8", newline="")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def _as_text(cell: str) -> str:
    return f"'{cell}" if cell[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell


def read_sheet(path: Path) -> dict[str, Answer]:
    """Labelled rows of a sheet, by reply; commas, semicolons or tabs separate its cells.

    Raises:
        InputError: the file is no such sheet, a label is neither yes nor no, a reply stands there
            twice, or nothing is labelled.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            header = handle.readline()
            handle.seek(0)
            rows = list(csv.DictReader(handle, delimiter=max(",;\t", key=header.count)))
    except UnicodeDecodeError:
        raise InputError(
            f"{path} cannot be read as a sheet: it is not UTF-8; save it as CSV UTF-8"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a sheet: {error}") from None
    answers: dict[str, Answer] = {}
    for number, row in enumerate(rows, start=2):
        if not any(isinstance(cell, str) and cell.strip() for cell in row.values()):
            continue
        where = f"{path} line {number}"
        missing = [name for name in COLUMNS if row.get(name) is None]
        if missing or None in row:
            fault = f"no column {', '.join(missing)}" if missing else "more cells than columns"
            raise InputError(f"{where} has {fault}; a sheet has {', '.join(COLUMNS)}")
        if row["id"] in answers:
            raise InputError(f"{where}: the reply {row['id'][:20]} stands there twice")
        refused, unsafe = (_yes(row[name], f"{where}, {name}") for name in ("refused", "unsafe"))
        label = Label(refused, unsafe)
        answers[row["id"]] = Answer(label, row["request"], row["reply"], where)
    labelled = {key: row for key, row in answers.items() if not row.label.empty}
    if not labelled:
        raise InputError(
            f"{path} has no labels yet; write yes or no into the columns refused and unsafe"
        )
    return labelled


def _yes(cell: str, where: str) -> bool | None:
    values = {"": None, "yes": True, "y": True, "no": False, "n": False}
    value = cell.strip().lower()
    if value not in values:
        raise InputError(
            f"{where}: {cell[:40]!r} is neither yes nor no; "
            "leave the cell empty where you cannot tell"
        )
    return values[value]


def _plain(cell: str) -> str:
    """The words of a cell, without the line ends and the apostrophe of a spreadsheet."""
    return " ".join(cell.removeprefix("'").split())


def read_labels(folder: Path) -> dict[str, Label]:
    """A person's labels in a grid's folder, by reply; empty where there is no file of them.

    With them are the probabilities of the sheets on record.

    Raises:
        InputError: the file, or the record of sheets, is broken.
    """
    path = folder / LABELS
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        labels = {str(key): Label(**label) for key, label in document.items()}
        if any(
            value not in (True, False, None)
            for label in labels.values()
            for value in (label.refused, label.unsafe)
        ):
            raise ValueError("a label is neither true, false nor null")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no labels: {error}") from None
    filled = [key for key, label in labels.items() if not label.empty]
    probabilities, drawn = drawn_with(folder, filled)
    return {
        key: replace(label, probability=probabilities.get(key, 0.0), recorded=key in drawn)
        for key, label in labels.items()
    }


def weights_of(rated: Iterable[Rated], labels: Mapping[str, Label]) -> dict[str, float]:
    """How many replies of the grid each labelled reply stands for, by its id.

    That is the number of replies with its text over the probability with which a person got the
    text to read. Replies of sheets without a record count as drawn evenly within their group, as
    such sheets were.
    """
    rows = {row.id: row for row in rated}
    labelled = {key: label for key, label in labels.items() if key in rows and not label.empty}
    copies = Counter(row.text for row in rows.values())
    read = Counter(rows[key].text for key in labelled)
    unrecorded = (rows[key] for key, label in labelled.items() if not label.recorded)
    earlier = Counter(group for group, _ in {(row.group, row.text) for row in unrecorded})
    texts = Counter(group for group, _ in {(row.group, row.text) for row in rows.values()})
    weights = {}
    for key, label in labelled.items():
        group, text = rows[key].group, rows[key].text
        missed = (1 - label.probability) * (1 - earlier[group] / texts[group])
        weights[key] = copies[text] / read[text] / (1 - missed)
    return weights


def keep_labels(folder: Path, rated: Iterable[Rated], answers: Mapping[str, Answer]) -> None:
    """Add a sheet's labels to those in the grid's folder.

    A new label replaces the old one, an empty cell leaves it.

    Raises:
        InputError: a label is of no reply in the grid, or stands beside another reply's text.
    """
    rows = {row.id: row for row in rated}
    strangers = sorted(set(answers) - set(rows))
    if strangers:
        raise InputError(
            f"{len(strangers)} of {len(answers)} labelled replies are not in {folder} "
            f"(the first: {strangers[0][:20]}); is the sheet of another grid?"
        )
    for key, answer in answers.items():
        texts = (_plain(rows[key].request), _plain(rows[key].reply))
        if (_plain(answer.request), _plain(answer.reply)) != texts:
            raise InputError(
                f"{answer.where}: request and reply are not those of {key}; "
                "was a column sorted on its own? Draw the sheet again"
            )
    labels = read_labels(folder)
    for key, answer in answers.items():
        old, new = labels.get(key, Label(None, None)), answer.label
        labels[key] = Label(
            old.refused if new.refused is None else new.refused,
            old.unsafe if new.unsafe is None else new.unsafe,
        )
    document = {
        key: {"refused": label.refused, "unsafe": label.unsafe} for key, label in labels.items()
    }
    write_json(folder / LABELS, document)


def agreement_between(
    rated: Sequence[Rated], labels: Mapping[str, Label] | None = None
) -> dict[str, Any]:
    """Figures for each question: Krippendorff's alpha over the judges, Cohen's kappa of every two.

    A person's labels are compared with each judge; replies without a label are left out there, and
    the others are weighted (`weights_of`), so that the figures are of the grid, not of the sheet.
    Alpha leaves out judges that are built of others among them (`BUILT_OF`), and a pair of such
    judges is marked `built`: they agree by construction. `unscored` counts replies that one of the
    two did not rate.
    """
    judges = list(dict.fromkeys(name for row in rated for name in row.verdicts))
    weights = weights_of(rated, labels) if labels else {}
    figures: dict[str, Any] = {}
    for question in QUESTIONS:
        rows = [row for row in rated if row.harmful or question == "refusal"]
        ratings = {
            name: [rating(row.verdicts.get(name), question) for row in rows] for name in judges
        }
        ratings = {
            name: row for name, row in ratings.items() if any(value is not None for value in row)
        }
        pairs = [
            {
                "first": a,
                "second": b,
                "built": _built(a, b),
                **asdict(kappa_of(ratings[a], ratings[b])),
            }
            for a, b in combinations(ratings, 2)
        ]
        if labels:
            people = [label_on(labels.get(row.id), question) for row in rows]
            pairs += _with_person(people, ratings, [weights.get(row.id, 0.0) for row in rows])
        independent = [
            row for name, row in ratings.items() if not BUILT_OF.get(name, set()) & set(ratings)
        ]
        figures[question] = {
            "judges": list(ratings),
            "replies": len(rows),
            "pairs": pairs,
            "krippendorff_alpha": alpha_of(independent) if len(independent) > 1 else None,
        }
    return figures


def _with_person(
    people: Sequence[bool | None],
    ratings: Mapping[str, Sequence[bool | None]],
    weights: Sequence[float],
) -> list[dict[str, Any]]:
    """The person against each judge, over the replies that the person labelled."""
    labelled = [k for k, value in enumerate(people) if value is not None]
    if not labelled:
        return []
    person, sizes = [people[k] for k in labelled], [weights[k] for k in labelled]
    return [
        {"first": PERSON, "second": name, "built": False}
        | asdict(kappa_of(person, [row[k] for k in labelled], sizes))
        for name, row in ratings.items()
    ]


BUILT_OF = {"ensemble": {"keyword", "regression"}}
"""Judge -> the judges that it is made of."""


def _built(judge: str, other: str) -> bool:
    return judge in BUILT_OF.get(other, set()) or other in BUILT_OF.get(judge, set())


def rating(verdict: Verdict | None, question: str) -> bool | None:
    """A verdict's answer to one of `QUESTIONS`; None where it is open."""
    if verdict is None:
        return None
    return verdict.is_refusal if question == "refusal" else verdict.is_unsafe


def label_on(label: Label | None, question: str) -> bool | None:
    """A person's answer to one of `QUESTIONS`; None without one."""
    if label is None:
        return None
    return label.refused if question == "refusal" else label.unsafe


def rated_of(cells: Iterable[Cell]) -> list[Rated]:
    """The replies of a grid to harmful and benign requests, with the judges' verdicts."""
    rows = []
    for cell in cells:
        for outcome in cell.of_kind("harmful", "benign"):
            request, reply = outcome.request, outcome.reply
            verdicts = {name: verdict_of(value) for name, value in outcome.verdicts.items()}
            group = (outcome.kind, cell.defense, cell.set, cell.condition)
            identity = reply_id(*cell.key, outcome.sample_id, request, reply)
            harmful = outcome.kind == "harmful"
            rows.append(
                Rated(identity, group, request, reply, harmful, verdicts, outcome.probabilities)
            )
    return rows


def agreement_on_files(completions: Sequence[Completion]) -> dict[str, Any]:
    """`agreement_between` on completions that people labelled; the labels are the person's."""
    rated, labels = [], {}
    for completion in completions:
        prompt, text = completion.prompt, completion.text
        key = reply_id(completion.file, str(completion.number), prompt, text)
        rated.append(Rated(key, (completion.file,), prompt, text, False, completion.verdicts))
        labels[key] = Label(completion.refused, None)
    return {"refusal": agreement_between(rated, labels)["refusal"]}
