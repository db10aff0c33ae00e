"""Corrections by labelled replies of another source, such as a sheet of another run.

The judges' errors have to be those of the run: with other models, prompts or languages they need
not be, and the run's own labels come first where there are any.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.files import write_json
from cmrm.judges import Judge
from cmrm.judges.base import assessed_all
from cmrm.measure.agreement import Answer, Label, Rated, label_on, rating, read_sheet
from cmrm.measure.correction import OUTCOMES, Correction, JudgeError, run_corrections

VALIDATION = "validation.json"
"""File of the judges' errors on a validation file, in a grid's folder."""
COUNTS = {(True, True): "tp", (True, False): "fn", (False, False): "tn", (False, True): "fp"}
"""A person's answer and the judge's -> name of their count."""

Errors = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Judge -> outcome -> `tp`, `fn`, `tn`, `fp`, `unscored`."""


def errors_on(
    answers: Iterable[Answer],
    judges: Mapping[str, Judge],
    *,
    failed: Callable[[str, str], None] = lambda judge, reason: None,
) -> dict[str, dict[str, dict[str, int]]]:
    """Counts of right, wrong and unscored verdicts on labelled replies.

    Every row with a label of refusal serves over-refusal, every row with one of harm the unsafe
    rate. An outcome whose question a judge never answers is left out.

    Args:
        answers: rows of a sheet.
        judges: by name; each judges every row once.
        failed: takes the name of a judge that broke on a row, and a reason. Nothing is measured of
            such a judge: its remaining verdicts are no fair part of the rows.
    """
    rows = list(answers)
    pairs = [(row.request, row.reply) for row in rows]
    errors: dict[str, dict[str, dict[str, int]]] = {}
    for name, judge in judges.items():
        judgements = assessed_all(judge, pairs)
        failures = [judgement.reason for judgement in judgements if judgement.failed]
        if failures:
            failed(name, f"it failed on {len(failures)} of {len(rows)} rows: {failures[0]}")
            continue
        verdicts = [judgement.verdict for judgement in judgements]
        for outcome, (_, question) in OUTCOMES.items():
            counts: Counter[str] = Counter()
            for verdict, row in zip(verdicts, rows, strict=True):
                person, judged = label_on(row.label, question), rating(verdict, question)
                if person is not None:
                    counts["unscored" if judged is None else COUNTS[person, judged]] += 1
            if counts.total() > counts["unscored"]:
                names = (*COUNTS.values(), "unscored")
                errors.setdefault(name, {})[outcome] = {key: counts[key] for key in names}
    return errors


def corrections_by(
    errors: Errors, source: str, *, seed: int = 0
) -> dict[str, dict[str, Correction]]:
    """Corrections by counts of a judge's right and wrong verdicts.

    Args:
        errors: of `errors_on`.
        source: name of the file that they were measured on.
        seed: of the intervals.
    """
    return {
        judge: {
            outcome: Correction(
                JudgeError.of_counts(source, **{key: counts[key] for key in COUNTS.values()}),
                seed=seed,
            )
            for outcome, counts in outcomes.items()
        }
        for judge, outcomes in errors.items()
    }


def keep_validation(folder: Path, file: Path, judges: Mapping[str, Judge]) -> dict[str, str]:
    """Measure judges on a labelled sheet, and keep their errors in a grid's folder.

    Judges that were measured before on another file are replaced, others stay.

    Args:
        folder: of the grid.
        file: labelled rows in the columns of a sheet, of any run.
        judges: by name.

    Returns:
        Judge -> why it could not be measured, for those that broke.

    Raises:
        InputError: the file is no labelled sheet, or the folder cannot be written to.
    """
    failures: dict[str, str] = {}
    measured = errors_on(read_sheet(file).values(), judges, failed=failures.__setitem__)
    new = {judge: {"source": file.name, "outcomes": errors} for judge, errors in measured.items()}
    write_json(folder / VALIDATION, {**_kept(folder), **new})
    return failures


def read_validation(folder: Path, *, seed: int = 0) -> dict[str, dict[str, Correction]]:
    """Corrections by the validation file of a grid's folder; empty where there is none.

    Raises:
        InputError: what was kept is damaged.
    """
    corrections: dict[str, dict[str, Correction]] = {}
    for judge, kept in _kept(folder).items():
        try:
            corrections |= corrections_by({judge: kept["outcomes"]}, str(kept["source"]), seed=seed)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / VALIDATION} is damaged ({error!r}); remove it") from None
    return corrections


def corrections_in(
    folder: Path, rated: Sequence[Rated], labels: Mapping[str, Label], *, seed: int = 0
) -> dict[str, dict[str, Correction]]:
    """Corrections of a run: by its own labels where they suffice, else by its validation file.

    Args:
        folder: of the grid.
        rated: replies of the run with their verdicts.
        labels: of a person, by reply.
        seed: of the intervals.

    Raises:
        InputError: what was kept of the validation file is damaged.
    """
    corrections = read_validation(folder, seed=seed)
    for judge, by_outcome in run_corrections(rated, labels, seed=seed).items():
        kept = corrections.setdefault(judge, {})
        for outcome, correction in by_outcome.items():
            if correction.error.sufficient or outcome not in kept:
                kept[outcome] = correction
    return corrections


def _kept(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / VALIDATION
    if not path.exists():
        return {}
    try:
        document: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {str(judge): dict(row) for judge, row in document.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it") from None
