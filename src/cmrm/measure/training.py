"""The judge `small`: how it is trained, and its agreement with people on what was held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from joblib import Parallel, delayed

from cmrm.errors import CmrmError, InputError
from cmrm.files import sha256_file
from cmrm.judges import Judge, Judgement, Verdict
from cmrm.judges.base import assessed_all
from cmrm.judges.cards import MeasuredAgreement, Question
from cmrm.judges.normalise import normalise
from cmrm.judges.small import SmallJudge
from cmrm.judges.small_fit import Example, fit_small, fold_of
from cmrm.measure.layouts import Labelled, named_files, read_files

OUTER = 4
"""Folds by case of the held-out table."""
QUESTIONS: tuple[Question, ...] = get_args(Question)
"""The questions that a card answers."""
SOURCES = {
    "MSTS": "MSTS replies and labels, arXiv 2501.10057, CC BY 4.0",
    "MSTS, other languages": "MSTS replies and labels, arXiv 2501.10057, CC BY 4.0",
    "XSTest": "XSTest completions and labels, arXiv 2308.01263, CC BY 4.0",
}
"""Collection -> credit to those who labelled it."""


def examples_of(rows: Sequence[Labelled]) -> list[Example]:
    """Labelled replies as training examples; a translation is an example of its own."""
    return [
        Example(row.prompt, words, row.case, row.refused, row.unsafe)
        for row in rows
        for text in (row.text, row.translation)
        if text and (words := normalise(text))
    ]


def train_small(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Train the judge `small` on labelled files into `out`, and return its provenance.

    Raises:
        InputError: a file cannot be read, or holds labels of one kind alone.
    """
    rows = read_files(list(paths))
    examples = examples_of(rows)
    provenance = {
        "files": {name: sha256_file(path) for name, path in sorted(named_files(paths).items())},
        "replies": len(rows),
        "translations": len(examples) - sum(bool(normalise(row.text)) for row in rows),
        "refused": sum(row.refused for row in rows),
        "source": "; ".join(
            dict.fromkeys(SOURCES.get(row.collection, row.collection) for row in rows)
        ),
    }
    fit_small(examples).save(out, provenance)
    return provenance


@dataclass(frozen=True)
class HeldOut:
    """A labelled reply and its judgement by a judge that saw neither its model nor its case."""

    row: Labelled
    """The reply."""
    judgement: Judgement
    """Of the judge."""


def cells_of(rows: Sequence[Labelled], folds: int = OUTER) -> Iterator[list[int]]:
    """Indices of the rows that are judged together: a collection's model and a fold of its
    cases."""
    cells: dict[tuple[str, str, int], list[int]] = {}
    for k, row in enumerate(rows):
        cells.setdefault((row.collection, row.model, fold_of(row.case, folds)), []).append(k)
    yield from cells.values()


def held_out(
    rows: Sequence[Labelled], *, folds: int = OUTER, tick: Callable[[int], None] = lambda n: None
) -> list[HeldOut]:
    """Every reply judged by a `small` that was trained without its model and without its cases.

    A collection of one model alone cannot leave that model out: there its cases alone are left out.

    Raises:
        InputError: too few labelled replies are left to train on.
    """
    models: dict[str, set[str]] = {}
    for row in rows:
        models.setdefault(row.collection, set()).add(row.model)
    cells = list(cells_of(rows, folds))
    judgements: dict[int, Judgement] = {}
    alone = [len(models[rows[cell[0]].collection]) == 1 for cell in cells]
    work = (delayed(_judged_cell)(rows, *item) for item in zip(cells, alone, strict=True))
    for cell, results in zip(cells, Parallel(n_jobs=-1, return_as="generator")(work), strict=True):
        judgements.update(zip(cell, results, strict=True))
        tick(len(cell))
    return [HeldOut(row, judgements[k]) for k, row in enumerate(rows)]


def _judged_cell(rows: Sequence[Labelled], cell: Sequence[int], alone: bool) -> list[Judgement]:
    """The rows of a cell judged by what was trained without its cases and, unless its model is
    `alone` in its collection, without its model."""
    model, cases = rows[cell[0]].model, {rows[k].case for k in cell}
    training = [row for row in rows if row.case not in cases and (alone or row.model != model)]
    if not training:
        raise InputError("no labelled reply of another model and another case is left to train on")
    judge = SmallJudge(fit_small(examples_of(training)))
    return assessed_all(judge, [(rows[k].prompt, rows[k].text) for k in cell])


def judged_rows(rows: Sequence[Labelled], judge: Judge) -> list[HeldOut]:
    """The same rows by a judge that is not trained on them.

    Raises:
        CmrmError: the judge failed on some of them.
    """
    results = assessed_all(judge, [(row.prompt, row.text) for row in rows])
    failures = [judgement.reason for judgement in results if judgement.failed]
    if failures:
        raise CmrmError(
            f"{judge.name} failed on {len(failures)} of {len(rows)} replies, and its agreement "
            f"would say nothing; the first: {failures[0]}"
        )
    return [HeldOut(row, judgement) for row, judgement in zip(rows, results, strict=True)]


def measured(
    question: Question, results: Sequence[HeldOut], command: str, *, model: str | None = None
) -> MeasuredAgreement:
    """A judge against people over `results` of one collection, as a line of its card.

    `model`: whose replies they are, where the line is about one of several.
    """
    from cmrm.measure.kappa import kappa_of

    people = [_label(result.row, question) for result in results]
    judge = [_answer(result.judgement.verdict, question) for result in results]
    pairs = [(p, j) for p, j in zip(people, judge, strict=True) if j is not None]
    tp, fn, tn, fp = (sum(pair == key for pair in pairs) for key in _PAIRS)
    languages = {result.row.language for result in results}
    return MeasuredAgreement(
        question,
        results[0].row.collection,
        model,
        languages.pop() if len(languages) == 1 else None,
        len(pairs),
        len(results) - len(pairs),
        kappa_of(people, judge).kappa if pairs else None,
        tp,
        fn,
        tn,
        fp,
        command,
    )


_PAIRS = ((True, True), (True, False), (False, False), (False, True))
"""(people, judge): tp, fn, tn, fp."""


def _label(row: Labelled, question: str) -> bool:
    return row.refused if question == "refusal" else bool(row.unsafe)


def _answer(verdict: Verdict, question: str) -> bool | None:
    return verdict.is_refusal if question == "refusal" else verdict.is_unsafe


def table_of(
    results: Sequence[HeldOut], command: str, *, made_with: Sequence[str] = ()
) -> list[MeasuredAgreement]:
    """Each collection whole, then by model or language, for each question that it has labels of.

    Args:
        results: judged replies.
        command: what prints these figures.
        made_with: collections that the judge was made with: its figures there are in-sample.
    """
    rows: list[MeasuredAgreement] = []
    for members in _grouped(results, lambda row: row.collection).values():
        models = _grouped(members, lambda row: row.model)
        languages = _grouped(members, lambda row: row.language)
        for question in QUESTIONS:
            if question == "unsafe" and members[0].row.unsafe is None:
                continue
            rows.append(measured(question, members, command))
            if len(models) > 1:
                rows += [measured(question, part, command, model=m) for m, part in models.items()]
            if len(languages) > 1:
                rows += [measured(question, part, command) for part in languages.values()]
    return [replace(row, in_sample=row.set in made_with) for row in rows]


def _grouped(
    results: Sequence[HeldOut], key: Callable[[Labelled], str]
) -> dict[str, list[HeldOut]]:
    groups: dict[str, list[HeldOut]] = {}
    for result in results:
        groups.setdefault(key(result.row), []).append(result)
    return groups


def between_people(rows: Sequence[Labelled]) -> dict[Question, tuple[float | None, int]]:
    """Question -> Cohen's kappa of the two people who labelled alone, and their replies.

    Empty where no file publishes both people's labels.
    """
    from cmrm.measure.kappa import kappa_of

    twice = [row.annotators for row in rows if len(row.annotators) == 2]
    if not twice:
        return {}
    kappas = {}
    for place, question in enumerate(QUESTIONS):
        first, second = (
            [person[place] for person in people] for people in zip(*twice, strict=True)
        )
        kappas[question] = (kappa_of(first, second).kappa, len(twice))
    return kappas


def calibration_error(results: Sequence[HeldOut], question: str, bins: int = 10) -> float | None:
    """Expected calibration error in `bins` bins of equal width; None without probabilities.

    The mean over labelled replies of |share of yes - mean probability| in the reply's bin.
    """
    name = "refusal" if question == "refusal" else "engagement"
    pairs = [
        (float(p), _label(result.row, question)) for result in results
        if (p := getattr(result.judgement, name)) is not None
        and (question == "refusal" or result.row.unsafe is not None)
    ]  # fmt: skip
    if not pairs:
        return None
    values, labels = np.array([p for p, _ in pairs]), np.array([y for _, y in pairs])
    places = np.minimum((values * bins).astype(int), bins - 1)
    error = sum(
        abs(labels[places == k].mean() - values[places == k].mean()) * (places == k).sum()
        for k in range(bins) if (places == k).any()
    )  # fmt: skip
    return round(float(error) / len(pairs), 4)
