"""Judge stored replies anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inspect_ai import score
from inspect_ai.log import list_eval_logs, read_eval_log, write_eval_log

from cmrm.errors import InputError
from cmrm.evaluate.results import results_of
from cmrm.evaluate.scorers import RATING, rating_scorer, verdict_scorer
from cmrm.judges.base import scorer_name


def rescore(out: Path, judges: Sequence[str], *, rater: str | None = None, seed: int = 0) -> dict[str, Any]:
    """`rescore_logs`, and the grid of all logs. Raises as it does."""
    rescore_logs(out, judges, rater=rater)
    return results_of(out, seed=seed)


def rescore_logs(out: Path, judges: Sequence[str], *, rater: str | None = None) -> None:
    """Add the verdicts of `judges`, and the ratings of `rater`, to every log in `out/logs`; nothing is generated.

    Raises:
        InputError: there are no logs, nobody is to judge, or a judge is unknown.
    """
    made = {scorer_name(name): verdict_scorer(name) for name in judges}
    if rater is not None:
        made[RATING] = rating_scorer(rater)
    if not made:
        raise InputError("name at least one judge")
    folders = sorted(p for p in (out / "logs").iterdir() if p.is_dir()) if (out / "logs").is_dir() else []
    logs = [info for folder in folders for info in list_eval_logs(str(folder))]
    if not logs:
        raise InputError(f"{out} holds no logs of cmrm evaluate")
    for info in logs:
        log = read_eval_log(info)
        for sample in log.samples or []:  # a judge that is asked again replaces what it said before
            for name in made:
                (sample.scores or {}).pop(name, None)
        scored = score(log, [factory() for factory in made.values()], action="append", display="none")
        write_eval_log(scored, info.name)
