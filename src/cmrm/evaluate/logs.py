"""Inspect's logs as cells: every reply with its verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, EvalLogInfo, EvalSample, list_eval_logs, read_eval_log
from inspect_ai.scorer import Score

from cmrm.errors import InputError
from cmrm.evaluate.scorers import (
    COMPARISON,
    FAILED,
    NOT_ASKED,
    PROBABILITIES,
    RATER,
    ratings_of,
)
from cmrm.judges import Verdict
from cmrm.judges.base import judge_of
from cmrm.measure.answers import EXACT
from cmrm.measure.outcomes import Cell, Outcome
from cmrm.measure.table import RATING


def read_cells(folder: Path) -> list[Cell]:
    """All cells of the logs in a folder, the untouched model's first.

    Of several logs of one cell it is the one with the most replies.

    Raises:
        InputError: there are no logs, or one cannot be read.
    """
    cells: dict[tuple[str, str, str], Cell] = {}
    for defense, info in log_files(folder):
        cell = cell_of(read_log(info), defense)
        known = cells.get(cell.key)
        if known is None or len(cell.outcomes) > len(known.outcomes):
            cells[cell.key] = cell
    if not cells:
        raise InputError(f"{folder} holds no logs of cmrm evaluate")
    return sorted(
        cells.values(), key=lambda c: (c.defense != "none", c.set, c.defense, c.condition)
    )


def log_files(folder: Path) -> list[tuple[str, EvalLogInfo]]:
    """Logs below a folder, which has one folder a defence: (defence, log)."""
    places = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [(place.name, info) for place in places for info in list_eval_logs(str(place))]


def read_log(info: EvalLogInfo) -> EvalLog:
    """One of Inspect's logs.

    Raises:
        InputError: it is broken.
    """
    try:
        return read_eval_log(info)
    except Exception as error:  # zip, JSON and schema errors of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{info.name} cannot be read as a log ({reason}); remove it and run the same command "
            "again: its replies are stored apart"
        ) from None


def cell_of(log: EvalLog, defense: str) -> Cell:
    """One log as a cell. A sample that failed, or that no scorer reached, is not in it."""
    metadata = log.eval.metadata or {}
    data: dict[str, Any] = metadata.get("set", {})
    cell = Cell(
        str(data.get("name", log.eval.task)), str(metadata.get("condition", "")), defense,
        int(data.get("n", 0)), settings=dict(metadata.get("settings", {})), harm=data.get("harm"),
    )  # fmt: skip
    for sample in log.samples or []:
        if sample.error is None and sample.scores:
            cell.outcomes[str(sample.id)] = _outcome(sample, sample.scores)
    return cell


def _outcome(sample: EvalSample, scores: dict[str, Score]) -> Outcome:
    verdicts, reasons, failed = {}, {}, {}
    values: dict[str, Any] = {}
    probabilities: dict[str, tuple[float | None, float | None]] = {}
    for name, score in scores.items():
        if score.value == NOT_ASKED:
            continue
        judge = judge_of(name)
        if judge is not None:
            verdicts[judge] = str(score.value)
            pair = (score.metadata or {}).get(PROBABILITIES)
            if isinstance(pair, list) and len(pair) == 2:
                probabilities[judge] = (pair[0], pair[1])
        elif name == COMPARISON:
            values[EXACT] = score.value
        elif name == RATER:
            values[RATING] = ratings_of(score.value)
        reason = failure_of(score)
        if reason is not None:
            failed[judge or RATING] = reason
        elif score.explanation or score.value == Verdict.UNSCORED.value:
            reasons[judge or RATING] = score.explanation or "no reason is on record"
    metadata = sample.metadata
    return Outcome(
        str(sample.id), metadata.get("kind", "other"), str(metadata.get("category", "")),
        str(metadata.get("request", "")), sample.output.completion, verdicts, reasons, failed,
        values, probabilities,
    )  # fmt: skip


def failure_of(score: Score) -> str | None:
    """Why a judge or rater broke on a sample; None where it answered, if only `unscored`."""
    return (score.explanation or FAILED) if (score.metadata or {}).get(FAILED) else None
