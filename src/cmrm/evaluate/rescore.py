"""Stored replies judged again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inspect_ai import score
from inspect_ai.log import EvalLog, write_eval_log
from inspect_ai.scorer import Score

from cmrm.errors import InputError
from cmrm.evaluate.folder import Folder
from cmrm.evaluate.logs import failure_of, log_files, read_log
from cmrm.evaluate.scorers import RATER, rating_scorer, verdict_scorer
from cmrm.judges.base import scorer_name

Place = tuple[str, int, str]
"""Sample, epoch and scorer of a score."""


@dataclass
class Missing:
    """Verdicts and ratings that failed."""

    failed: int = 0
    """How many."""
    kept: int = 0
    """Of these, how many have an earlier verdict in their place."""
    first: str | None = None
    """Why the first one failed."""

    def message(self) -> str | None:
        """One line for the user, or None."""
        if not self.failed:
            return None
        kept = f" ({self.kept} keep their earlier verdict)" if self.kept else ""
        return f"{self.failed} verdicts are missing{kept}; the first: {self.first}"


def rescore_logs(out: Path, judges: Sequence[str], *, rater: str | None = None) -> Missing:
    """Add the verdicts of `judges`, and the ratings of `rater`, to every log of a run.

    Nothing is generated, and the model is not loaded. A judge that is asked again replaces its
    earlier verdicts, except where it fails.

    Raises:
        InputError: there are no logs, one is broken (then none is changed), no judge is named, or
            a judge is unknown.
    """
    factories = {scorer_name(name): verdict_scorer(name) for name in judges}
    if rater is not None:
        factories[RATER] = rating_scorer(rater)
    if not factories:
        raise InputError("name at least one judge")
    logs = [(info, read_log(info)) for _, info in log_files(Folder(out).logs)]
    if not logs:
        raise InputError(f"{out} holds no logs of cmrm evaluate")
    missing = Missing()
    for info, log in logs:
        if not log.samples:
            continue
        earlier = _taken_out(log, list(factories))
        scorers = [factory() for factory in factories.values()]
        scored = score(log, scorers, action="append", display="none", model="none")
        _put_back(scored, list(factories), earlier, missing)
        write_eval_log(scored, info.name)
    return missing


def _taken_out(log: EvalLog, names: Sequence[str]) -> dict[Place, Score]:
    """The earlier scores of some scorers, which are removed from the log."""
    scores: dict[Place, Score] = {}
    for sample in log.samples or []:
        for name in names:
            old = (sample.scores or {}).pop(name, None)
            if old is not None:
                scores[str(sample.id), sample.epoch, name] = old
    return scores


def _put_back(
    log: EvalLog, names: Sequence[str], earlier: dict[Place, Score], missing: Missing
) -> None:
    """Earlier scores in the place of those that failed now."""
    for sample in log.samples or []:
        scores = sample.scores or {}
        for name in names:
            reason = failure_of(scores[name]) if name in scores else None
            if reason is None:
                continue
            missing.failed += 1
            missing.first = missing.first or reason
            old = earlier.get((str(sample.id), sample.epoch, name))
            if old is not None and failure_of(old) is None:
                scores[name] = old
                missing.kept += 1
