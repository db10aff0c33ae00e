"""Judge stored replies anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inspect_ai import score
from inspect_ai.log import list_eval_logs, read_eval_log, write_eval_log

from cmrm.errors import InputError
from cmrm.evaluate.run import results_of
from cmrm.evaluate.scorers import verdict_scorer
from cmrm.judges.base import scorer_name


def rescore(out: Path, judges: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Add the verdicts of `judges` to every log in `out/logs`, and return the grid of all of them.

    Raises:
        InputError: there are no logs, or a judge is unknown.
    """
    made = {name: verdict_scorer(name) for name in judges}
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
                (sample.scores or {}).pop(scorer_name(name), None)
        scored = score(log, [factory() for factory in made.values()], action="append", display="none")
        write_eval_log(scored, info.name)
    return results_of(out, seed=seed)
