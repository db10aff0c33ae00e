"""Replies that people labelled, and a judge's agreement with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmrm.errors import InputError
from cmrm.judges import Judge, Judgement, Verdict
from cmrm.judges.base import assessed_all
from cmrm.measure.kappa import Agreement, agreement
from cmrm.measure.layouts import Labelled, Layout, layout_of, read_files, read_labelled

FOLDS = 5
"""Folds by prompt of the regression's held-out figures."""


@dataclass(frozen=True)
class Completion(Labelled):
    """A reply that people labelled, and the judges' verdicts on it."""

    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """Judge -> verdict."""


def judged_files(
    paths: Sequence[Path],
    judges: Mapping[str, Judge],
    *,
    layout: Layout | None = None,
    failed: Callable[[str], None] = lambda reason: None,
) -> list[Completion]:
    """Every completion of `paths`, judged once by each of `judges`.

    `layout`: of all files; recognised by their columns when None. `failed` takes the reason of each
    verdict that is missing because a judge broke.

    Raises:
        InputError: a file cannot be read, or is named twice.
    """
    rows = read_files(list(paths), layout)
    judgements: dict[str, list[Judgement]] = {}
    for name, judge in judges.items():
        judgements[name] = assessed_all(judge, [(row.prompt, row.text) for row in rows])
        for judgement in judgements[name]:
            if judgement.failed:
                failed(str(judgement.reason))
    return [
        with_verdicts(row, {name: given[k].verdict for name, given in judgements.items()})
        for k, row in enumerate(rows)
    ]


def with_verdicts(row: Labelled, verdicts: Mapping[str, Verdict]) -> Completion:
    """A labelled reply with the verdicts on it."""
    return Completion(**vars(row), verdicts=verdicts)


def agreement_of_files(completions: Sequence[Completion], judge: str) -> dict[str, Agreement]:
    """Agreement of a judge with people: file -> figures, and `all` with more than one file.

    Raises:
        InputError: the judge says of no completion of a file whether it refuses.
    """
    files: dict[str, list[Completion]] = {}
    for completion in completions:
        files.setdefault(completion.file, []).append(completion)
    if len(files) > 1:
        files["all"] = list(completions)
    return {
        name: agreement([row.verdicts[judge] for row in rows], [row.refused for row in rows])
        for name, rows in files.items()
    }


def trained_on(judge: Judge, paths: Sequence[Path]) -> list[str]:
    """Names of those files that the judge's weights were trained on."""
    from cmrm.files import sha256_file
    from cmrm.judges.ensemble import EnsembleJudge, RegressionJudge, shipped_provenance
    from cmrm.judges.small import SmallJudge, shipped_training

    if isinstance(judge, SmallJudge):
        known = set(shipped_training()["files"].values())
    elif isinstance(judge, EnsembleJudge | RegressionJudge):
        known = set(shipped_provenance()["files"].values())
    else:
        return []
    return [path.name for path in paths if path.is_file() and sha256_file(path) in known]


def train_regression(paths: Sequence[Path], out: Path) -> tuple[Agreement, Agreement]:
    """Train the ensemble's regression on labelled files into `out`.

    Returns the agreement of regression and ensemble with people in five folds by prompt: no prompt
    is trained on and judged in the same fold, whatever file it is in.

    Raises:
        InputError: a file cannot be read, or holds labels of one kind alone.
    """
    from sklearn.model_selection import GroupKFold

    from cmrm.files import sha256_file
    from cmrm.judges.ensemble import EnsembleJudge, Regression, RegressionJudge

    rows = read_files(list(paths))
    prompts, replies = [row.prompt for row in rows], [row.text for row in rows]
    people = [row.refused for row in rows]
    if len(set(prompts)) < FOLDS:
        raise InputError(f"the files hold fewer than {FOLDS} different prompts; train on more")
    verdicts: dict[str, list[Verdict]] = {
        name: [Verdict.UNSCORED] * len(replies) for name in ("regression", "ensemble")
    }
    for training, rest in GroupKFold(n_splits=FOLDS).split(replies, groups=prompts):
        fold = Regression.train([replies[k] for k in training], [people[k] for k in training])
        judges: tuple[Judge, Judge] = (RegressionJudge(fold), EnsembleJudge(fold))
        for k in rest:
            for judge in judges:
                verdicts[judge.name][k] = judge.judge(prompts[k], replies[k])
    provenance = {
        "files": {path.name: sha256_file(path) for path in paths},
        "replies": len(replies),
        "refused": sum(people),
        "source": "XSTest completions and labels, arXiv 2308.01263, CC-BY-4.0",
    }
    Regression.train(replies, people).save(out, provenance)
    return agreement(verdicts["regression"], people), agreement(verdicts["ensemble"], people)


__all__ = [
    "Completion",
    "Labelled",
    "Layout",
    "agreement_of_files",
    "judged_files",
    "layout_of",
    "read_files",
    "read_labelled",
    "train_regression",
    "trained_on",
    "with_verdicts",
]
