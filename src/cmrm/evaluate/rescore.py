"""Judge stored replies anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inspect_ai import score
from inspect_ai.log import EvalLog, list_eval_logs, write_eval_log
from inspect_ai.scorer import Score

from cmrm.errors import InputError
from cmrm.evaluate.grid import failed_verdict, read_log
from cmrm.evaluate.scorers import RATING, rating_scorer, verdict_scorer
from cmrm.judges.base import scorer_name


@dataclass
class Missing:
    """Verdicts and ratings that failed."""

    failed: int = 0
    """How many."""
    kept: int = 0
    """Of these, how many have what was said before in their place."""
    first: str | None = None
    """Why the first one failed."""

    def told(self) -> str | None:
        """One line for the user, or None."""
        if not self.failed:
            return None
        kept = f" ({self.kept} keep what was said before)" if self.kept else ""
        return f"{self.failed} verdicts are missing{kept}; the first: {self.first}"


def rescore_logs(out: Path, judges: Sequence[str], *, rater: str | None = None) -> Missing:
    """Add the verdicts of `judges`, and the ratings of `rater`, to every log in `out/logs`; nothing is generated, and the model is not
    loaded. A judge that is asked again replaces what it said before, but where it fails.

    Raises:
        InputError: there are no logs, one is broken (then none is changed), nobody is to judge, or a judge is unknown.
    """
    made = {scorer_name(name): verdict_scorer(name) for name in judges}
    if rater is not None:
        made[RATING] = rating_scorer(rater)
    if not made:
        raise InputError("name at least one judge")
    folders = sorted(p for p in (out / "logs").iterdir() if p.is_dir()) if (out / "logs").is_dir() else []
    logs = [(info, read_log(info)) for folder in folders for info in list_eval_logs(str(folder))]
    if not logs:
        raise InputError(f"{out} holds no logs of cmrm evaluate")
    missing = Missing()
    for info, log in logs:
        if not log.samples:
            continue
        before = _taken_out(log, list(made))
        scored = score(log, [factory() for factory in made.values()], action="append", display="none", model="none")
        _put_back(scored, list(made), before, missing)
        write_eval_log(scored, info.name)
    return missing


def _taken_out(log: EvalLog, names: Sequence[str]) -> dict[tuple[str, int, str], Score]:
    held = {}
    for sample in log.samples or []:
        for name in names:
            found = (sample.scores or {}).pop(name, None)
            if found is not None:
                held[str(sample.id), sample.epoch, name] = found
    return held


def _put_back(log: EvalLog, names: Sequence[str], before: dict[tuple[str, int, str], Score], missing: Missing) -> None:
    """What a judge said before stands where it failed now."""
    for sample in log.samples or []:
        scores = sample.scores or {}
        for name in names:
            why = failed_verdict(scores[name]) if name in scores else None
            if why is None:
                continue
            missing.failed += 1
            missing.first = missing.first or why
            old = before.get((str(sample.id), sample.epoch, name))
            if old is not None and failed_verdict(old) is None:
                scores[name] = old
                missing.kept += 1
