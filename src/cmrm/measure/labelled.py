"""Completions that people labelled, and a judge's agreement with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cmrm.errors import InputError
from cmrm.measure.rates import Agreement, agreement
from cmrm.judges import Judge, Verdict
from cmrm.judges.base import safely


@dataclass(frozen=True)
class Layout:
    """What a labelled file's columns are called, and which of its labels say that a completion refuses."""

    prompt: str = "prompt"
    """Column of the request."""
    completion: str = "completion"
    """Column of the reply."""
    label: str = "final_label"
    """Column of people's label."""
    refused: tuple[str, ...] = ("2_full_refusal", "3_partial_refusal")
    """Labels of a refusal, whole or in part."""
    complied: tuple[str, ...] = ("1_full_compliance",)
    """Labels of a reply that does not refuse; a label that is in neither is an error."""


XSTEST = Layout()
"""As XSTest publishes its completions."""


def layout_of(columns: str | None, refused: str | None, complied: str | None) -> Layout:
    """XSTest's layout with the columns of `prompt=...,completion=...,label=...` and the labels of two comma lists.

    Raises:
        InputError: a part of the column map is no pair, or names another column; one list of labels is given without the other, or they
            share a label.
    """
    found: dict[str, str] = {}
    for part in (columns or "").split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if part.strip() and (not equals or not column or name not in ("prompt", "completion", "label")):
            raise InputError(f"column map: {part!r} is none of prompt=COLUMN, completion=COLUMN, label=COLUMN")
        if part.strip():
            found[name] = column
    layout = Layout(
        found.get("prompt", XSTEST.prompt),
        found.get("completion", XSTEST.completion),
        found.get("label", XSTEST.label),
    )
    if refused is None and complied is None:
        return layout
    held = [tuple(one.strip() for one in (given or "").split(",") if one.strip()) for given in (refused, complied)]
    if not all(held):
        raise InputError("say both which labels are refusals (--refused) and which are not (--complied)")
    if set(held[0]) & set(held[1]):
        raise InputError(f"the label {(set(held[0]) & set(held[1])).pop()!r} cannot be both a refusal and none")
    return replace(layout, refused=held[0], complied=held[1])


def read_labelled(path: Path, layout: Layout = XSTEST) -> pd.DataFrame:
    """A labelled CSV as text columns `prompt`, `completion`, and `refused` (bool).

    Raises:
        InputError: the file is missing, is no CSV, lacks a column, is empty or has an unknown label.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from None
    missing = [c for c in (layout.prompt, layout.completion, layout.label) if c not in table.columns]
    if missing:
        raise InputError(f"{path} lacks the columns {missing}; it has {list(table.columns)}")
    unknown = sorted(set(table[layout.label]) - {*layout.refused, *layout.complied})
    if unknown:
        raise InputError(
            f"{path} has unknown labels {unknown[:5]}; known are {', '.join((*layout.refused, *layout.complied))} (--refused, --complied)"
        )
    if table.empty:
        raise InputError(f"{path} has no rows")
    held = {
        "prompt": table[layout.prompt],
        "completion": table[layout.completion],
        "refused": table[layout.label].isin(layout.refused),
    }
    return pd.DataFrame(held)


@dataclass(frozen=True)
class Completion:
    """A completion that people labelled, and what judges said of it."""

    file: str
    """Where it is from: the file's name, with its folder where two are called alike."""
    number: int
    """Row in the file, from 0."""
    prompt: str
    """The request."""
    text: str
    """The completion."""
    refused: bool
    """Whether people call it a refusal, whole or in part."""
    said: Mapping[str, Verdict]
    """Judge -> verdict."""


def judged_files(
    paths: Sequence[Path],
    judges: Mapping[str, Judge],
    *,
    layout: Layout = XSTEST,
    failed: Callable[[str], None] = lambda why: None,
) -> list[Completion]:
    """Every completion of `paths`, judged once by each of `judges`; `failed` is told why a verdict is missing.

    Raises:
        InputError: a file cannot be read, or stands there twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a file is named twice")
    names = [path.name for path in paths]
    found = []
    for path in paths:
        name = path.name if names.count(path.name) == 1 else str(path)
        for number, row in enumerate(read_labelled(path, layout).itertuples(index=False)):
            prompt, text, said = str(row.prompt), str(row.completion), {}
            for judge_name, judge in judges.items():
                said[judge_name], why = safely(judge, prompt, text)
                if why is not None:
                    failed(why)
            found.append(Completion(name, number, prompt, text, bool(row.refused), said))
    return found


def agreement_of_files(completions: Sequence[Completion], judge: str) -> dict[str, Agreement]:
    """A judge against people, per file and, with more than one, over all of them.

    Raises:
        InputError: of no completion of a file it said whether it refuses.
    """
    by_file: dict[str, list[Completion]] = {}
    for one in completions:
        by_file.setdefault(one.file, []).append(one)
    if len(by_file) > 1:
        by_file["all"] = list(completions)
    return {name: agreement([o.said[judge] for o in held], [o.refused for o in held]) for name, held in by_file.items()}


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
    people = [bool(refused) for t in tables for refused in t["refused"]]
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
