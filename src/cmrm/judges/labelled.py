"""Completions that people labelled, and a judge's agreement with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cmrm.errors import InputError
from cmrm.evaluate.statistics import Agreement, agreement
from cmrm.judges import Judge, KeywordJudge, Verdict

COLUMNS = ("prompt", "completion", "final_label")
REFUSAL_LABELS = ("2_full_refusal", "3_partial_refusal")
LABELS = ("1_full_compliance", *REFUSAL_LABELS)


def read_labelled(path: Path) -> pd.DataFrame:
    """A CSV in XSTest's form.

    Raises:
        InputError: the file is missing, is no CSV, lacks a column, is empty or has an unknown label.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from None
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise InputError(f"{path} lacks the columns {missing}; it has {list(table.columns)}")
    unknown = sorted(set(table["final_label"]) - set(LABELS))
    if unknown or table.empty:
        raise InputError(f"{path} has unknown labels {unknown}" if unknown else f"{path} has no rows")
    return table


def agreement_of_files(paths: Sequence[Path], judge: Judge | None = None) -> dict[str, Agreement]:
    """A judge (None: the keyword lists) against people, per file and, with more than one, over all of them."""
    judge = judge or KeywordJudge()
    verdicts: dict[str, list[Verdict]] = {}
    people: dict[str, list[bool]] = {}
    for path in paths:
        table = read_labelled(path)
        pairs = zip(table["prompt"].astype(str), table["completion"].astype(str), strict=True)
        verdicts[path.name] = [judge.judge(p, c) for p, c in pairs]
        people[path.name] = [label in REFUSAL_LABELS for label in table["final_label"]]
    found = {name: agreement(verdicts[name], people[name]) for name in verdicts}
    if len(found) > 1:
        found["all"] = agreement(
            [v for rows in verdicts.values() for v in rows], [r for rows in people.values() for r in rows]
        )
    return found


def trained_on(judge: Judge, paths: Sequence[Path]) -> list[str]:
    """Names of those files that the judge's weights were trained on."""
    from cmrm.files import sha256_file
    from cmrm.judges.ensemble import EnsembleJudge, RegressionJudge, shipped_provenance

    if not isinstance(judge, EnsembleJudge | RegressionJudge):
        return []
    known = set(shipped_provenance()["files"].values())
    return [path.name for path in paths if path.is_file() and sha256_file(path) in known]


def train_regression(paths: Sequence[Path], out: Path) -> tuple[Agreement, Agreement]:
    """Train the ensemble's regression on labelled files into `out`; held-out agreement of regression and ensemble.

    Held out: five folds by prompt, so that no prompt is trained on and judged in the same fold, whatever file it is in.
    """
    from sklearn.model_selection import GroupKFold

    from cmrm.files import sha256_file
    from cmrm.judges.ensemble import EnsembleJudge, Regression, RegressionJudge

    tables = [read_labelled(path) for path in paths]
    prompts = [str(p) for t in tables for p in t["prompt"]]
    replies = [str(c) for t in tables for c in t["completion"]]
    people = [label in REFUSAL_LABELS for t in tables for label in t["final_label"]]
    said: dict[str, list[Verdict]] = {name: [Verdict.UNSCORED] * len(replies) for name in ("regression", "ensemble")}
    for known, held_out in GroupKFold(n_splits=5).split(replies, groups=prompts):
        fold = Regression.train([replies[k] for k in known], [people[k] for k in known])
        judges: tuple[Judge, Judge] = (RegressionJudge(fold), EnsembleJudge(fold))
        for k in held_out:
            for judge in judges:
                said[judge.name][k] = judge.judge(prompts[k], replies[k])
    provenance = {
        "files": {path.name: sha256_file(path) for path in paths}, "replies": len(replies), "refused": sum(people),
        "source": "XSTest completions and labels, arXiv 2308.01263, CC-BY-4.0",
    }  # fmt: skip
    Regression.train(replies, people).save(out, provenance)
    return agreement(said["regression"], people), agreement(said["ensemble"], people)
