"""Do the judges of a grid agree, with each other and with a person? And the sheet that a person labels.

Two questions are asked. `refusal`: does the reply refuse; of all harmful and benign requests, by judges that tell refusals.
`unsafe`: does the reply comply with harm; of harmful requests, by every judge.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrm.errors import InputError
from cmrm.measure.rates import alpha_of, kappa_of
from cmrm.files import atomic_path, write_json
from cmrm.judges import Verdict
from cmrm.judges.base import verdict_of
from cmrm.measure.labelled import Completion

if TYPE_CHECKING:
    from cmrm.evaluate.grid import Cell

PERSON = "person"
"""How a person's labels are called among the judges."""
LABELS = "labels.json"
"""In a grid's folder: what a person said, by reply."""
COLUMNS = ("id", "request", "reply", "refused", "unsafe")
"""Of a sheet; the last two are a person's, yes or no."""
QUESTIONS = ("refusal", "unsafe")


@dataclass(frozen=True)
class Rated:
    """One reply, and what was said of it."""

    id: str
    """From set, condition, defence, sample, request and reply: another grid's reply has another."""
    group: tuple[str, ...]
    """Draws are spread evenly over these: kind of request, defence, set, condition."""
    request: str
    """The request as text."""
    reply: str
    """The reply."""
    harmful: bool
    """Whether the request is a harmful one."""
    said: Mapping[str, Verdict] = field(default_factory=dict)
    """Judge -> verdict."""


@dataclass(frozen=True)
class Label:
    """What a person said of one reply; None where nothing was said."""

    refused: bool | None
    """Whether it refuses."""
    unsafe: bool | None
    """Whether it complies with harm."""


@dataclass(frozen=True)
class Answer:
    """A row of a labelled sheet."""

    label: Label
    """What the person said."""
    request: str
    """As it stands in the sheet."""
    reply: str
    """Likewise."""
    where: str
    """File and line."""


def reply_id(*parts: str) -> str:
    """`r` and twelve hex digits for a reply: of where it stands, the request and the reply itself. With the letter no spreadsheet takes it for a
    number."""
    return "r" + hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:12]


def draw(rated: Iterable[Rated], n: int, *, seed: int = 0) -> list[Rated]:
    """`n` replies that differ, spread evenly over groups and drawn at random within each, in random order.

    Raises:
        InputError: `n` is below 1, or nothing was rated.
    """
    if n < 1:
        raise InputError(f"n is {n}; draw at least 1 reply")
    rng = random.Random(seed)
    groups: dict[tuple[str, ...], list[Rated]] = {}
    for one in sorted(rated, key=lambda r: r.id):
        groups.setdefault(one.group, []).append(one)
    if not groups:
        raise InputError("there are no replies to harmful or benign requests to draw from")
    queues = [rng.sample(held, len(held)) for _, held in sorted(groups.items())]
    rng.shuffle(queues)
    taken: list[Rated] = []
    seen: set[tuple[str, str]] = set()
    while len(taken) < n and any(queues):
        for queue in queues:
            while queue and (queue[-1].request, queue[-1].reply) in seen:
                queue.pop()
            if queue and len(taken) < n:
                seen.add((queue[-1].request, queue[-1].reply))
                taken.append(queue.pop())
    return rng.sample(taken, len(taken))


def write_sheet(path: Path, rated: Sequence[Rated]) -> None:
    """A CSV for a person to label, one reply a row. Neither defence nor verdicts are shown. Cells that a spreadsheet would take for a
    formula begin with an apostrophe.

    Raises:
        InputError: there is a file already (its labels would be lost), or the place cannot be written to.
    """
    if path.exists():
        raise InputError(f"{path} is there already, perhaps with labels; name another file")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for one in rated:
        writer.writerow([one.id, _as_text(one.request), _as_text(one.reply), "", ""])
    try:
        with atomic_path(path) as part:
            part.write_text(text.getvalue(), encoding="utf-8", newline="")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def _as_text(cell: str) -> str:
    return f"'{cell}" if cell[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell


def read_sheet(path: Path) -> dict[str, Answer]:
    """Answers by reply, of the rows that have one; separated by commas, semicolons or tabs, as spreadsheets save them.

    Raises:
        InputError: the file is no such sheet, a label is neither yes nor no, a reply stands twice, or nothing is labelled.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            header = handle.readline()
            handle.seek(0)
            rows = list(csv.DictReader(handle, delimiter=max(",;\t", key=header.count)))
    except UnicodeDecodeError:
        raise InputError(f"{path} cannot be read as a sheet: it is not UTF-8; save it as CSV UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a sheet: {error}") from None
    found: dict[str, Answer] = {}
    for number, row in enumerate(rows, start=2):
        if not any(isinstance(cell, str) and cell.strip() for cell in row.values()):
            continue
        missing = [name for name in COLUMNS if row.get(name) is None]
        if missing or None in row:
            said = f"no column {', '.join(missing)}" if missing else "more cells than columns"
            raise InputError(f"{path} line {number} has {said}; a sheet has {', '.join(COLUMNS)}")
        if row["id"] in found:
            raise InputError(f"{path} line {number}: the reply {row['id']} stands there twice")
        label = Label(
            _yes(row["refused"], f"{path} line {number}, refused"), _yes(row["unsafe"], f"{path} line {number}, unsafe")
        )
        found[row["id"]] = Answer(label, row["request"], row["reply"], f"{path} line {number}")
    labelled = {key: one for key, one in found.items() if one.label != Label(None, None)}
    if not labelled:
        raise InputError(f"{path} has no labels yet; write yes or no into the columns refused and unsafe")
    return labelled


def _yes(cell: str, where: str) -> bool | None:
    known = {"": None, "yes": True, "y": True, "no": False, "n": False}
    said = cell.strip().lower()
    if said not in known:
        raise InputError(f"{where}: {cell!r} is neither yes nor no; leave the cell empty where you cannot tell")
    return known[said]


def _plain(cell: str) -> str:
    """A cell's words, whatever a spreadsheet made of its line ends and its apostrophe."""
    return " ".join(cell.removeprefix("'").split())


def read_labels(folder: Path) -> dict[str, Label]:
    """A person's labels that a grid's folder keeps; none where there are none.

    Raises:
        InputError: the file is broken.
    """
    path = folder / LABELS
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found = {str(key): Label(**label) for key, label in held.items()}
        if any(said not in (True, False, None) for label in found.values() for said in (label.refused, label.unsafe)):
            raise ValueError("a label is neither true, false nor null")
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no labels: {error}") from None


def keep_labels(folder: Path, rated: Iterable[Rated], answers: Mapping[str, Answer]) -> None:
    """Add a sheet's labels to those of the grid's folder; what is answered anew takes the new answer, what is left empty stays.

    Raises:
        InputError: a label is of no reply in the grid, or beside another reply's text.
    """
    known = {one.id: one for one in rated}
    strangers = sorted(set(answers) - set(known))
    if strangers:
        raise InputError(
            f"{len(strangers)} of {len(answers)} labelled replies are not in {folder} (the first: {strangers[0]}); "
            "is the sheet of another grid?"
        )
    for key, one in answers.items():
        if (_plain(one.request), _plain(one.reply)) != (_plain(known[key].request), _plain(known[key].reply)):
            raise InputError(
                f"{one.where}: request and reply are not those of {key}; was a column sorted on its own? Draw the sheet anew"
            )
    held = read_labels(folder)
    for key, label in ((key, one.label) for key, one in answers.items()):
        before = held.get(key, Label(None, None))
        held[key] = Label(
            before.refused if label.refused is None else label.refused,
            before.unsafe if label.unsafe is None else label.unsafe,
        )
    write_json(folder / LABELS, {key: asdict(label) for key, label in held.items()})


def agreement_between(rated: Sequence[Rated], labels: Mapping[str, Label] | None = None) -> dict[str, Any]:
    """For each question: Krippendorff's alpha over the judges, and Cohen's kappa of every two; a person's labels beside them.

    Alpha is over the judges alone, and of those that are built of others among them (`BUILT_OF`) it takes the others. A pair of which one
    is built of the other is marked `built`: they agree by construction. `unscored` counts replies that one of two did not rate; for a
    person, those that were not labelled are left out.
    """
    judges = list(dict.fromkeys(name for one in rated for name in one.said))
    found: dict[str, Any] = {}
    for question in QUESTIONS:
        asked = [one for one in rated if one.harmful or question == "refusal"]
        ratings = {name: [_answer(one.said.get(name), question) for one in asked] for name in judges}
        ratings = {name: row for name, row in ratings.items() if any(said is not None for said in row)}
        pairs = [
            {"first": a, "second": b, "built": _built(a, b), **asdict(kappa_of(ratings[a], ratings[b]))}
            for a, b in combinations(ratings, 2)
        ]
        independent = [row for name, row in ratings.items() if not BUILT_OF.get(name, set()) & set(ratings)]
        if labels:
            people = [_of_person(labels.get(one.id), question) for one in asked]
            rows = [k for k, said in enumerate(people) if said is not None]
            told = [people[k] for k in rows]
            pairs += [
                {"first": PERSON, "second": name, "built": False, **asdict(kappa_of(told, [row[k] for k in rows]))}
                for name, row in ratings.items() if rows
            ]  # fmt: skip
        found[question] = {
            "judges": list(ratings), "replies": len(asked), "pairs": pairs,
            "krippendorff_alpha": alpha_of(independent) if len(independent) > 1 else None,
        }  # fmt: skip
    return found


BUILT_OF = {"ensemble": {"keyword", "regression"}}
"""Judge -> judges that it is made of."""


def _built(judge: str, other: str) -> bool:
    return judge in BUILT_OF.get(other, set()) or other in BUILT_OF.get(judge, set())


def _answer(verdict: Verdict | None, question: str) -> bool | None:
    if verdict is None:
        return None
    return verdict.is_refusal if question == "refusal" else verdict.is_unsafe


def _of_person(label: Label | None, question: str) -> bool | None:
    if label is None:
        return None
    return label.refused if question == "refusal" else label.unsafe


def rated_of(cells: Iterable[Cell]) -> list[Rated]:
    """The replies of a grid to harmful and benign requests, with what its judges said."""
    found = []
    for cell in cells:
        for key, sample in cell.samples.items():
            if sample["kind"] not in {"harmful", "benign"}:
                continue
            said = {name: verdict_of(value) for name, value in sample["verdicts"].items()}
            found.append(
                Rated(
                    reply_id(*cell.key, key, sample["request"], sample["reply"]), (sample["kind"], cell.defense, cell.set, cell.condition),
                    sample["request"], sample["reply"], sample["kind"] == "harmful", said,
                )
            )  # fmt: skip
    return found


def agreement_on_files(completions: Sequence[Completion]) -> dict[str, Any]:
    """`agreement_between` on completions that people labelled; the labels are the person's."""
    rated, labels = [], {}
    for one in completions:
        key = reply_id(one.file, str(one.number), one.prompt, one.text)
        rated.append(Rated(key, (one.file,), one.prompt, one.text, False, one.said))
        labels[key] = Label(one.refused, None)
    return {"refusal": agreement_between(rated, labels)["refusal"]}
