"""Completions that people labelled, and a judge's agreement with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cmrm.errors import InputError
from cmrm.evaluate.statistics import Agreement, agreement
from cmrm.judges.keyword import KeywordJudge, Verdict

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


def agreement_of_files(paths: Sequence[Path]) -> dict[str, Agreement]:
    """The keyword judge against people, per file and, with more than one, over all of them."""
    judge = KeywordJudge()
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
