"""Completions that people labelled, and a judge's agreement with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmrm.errors import InputError, MissingExtraError
from cmrm.judges import Judge, Verdict
from cmrm.judges.base import assessed
from cmrm.measure.kappa import Agreement, agreement

try:
    import pandas as pd
except ImportError:
    raise MissingExtraError(
        "labelled files need pandas; install it with: pip install 'cmrm[eval]'"
    ) from None


@dataclass(frozen=True)
class Layout:
    """Names of a labelled file's columns, and the labels of refusals and of answers."""

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
"""Layout of XSTest's published completions."""
_COLUMNS = ("prompt", "completion", "label")


def layout_of(columns: str | None, refused: str | None, complied: str | None) -> Layout:
    """XSTest's layout with the columns of a map and the labels of two comma lists.

    `columns`: `prompt=COLUMN,completion=COLUMN,label=COLUMN`, or some of them.

    Raises:
        InputError: a part of the map is no such pair; a list of labels is missing, or the two share
            a label.
    """
    names = {column: getattr(XSTEST, column) for column in _COLUMNS}
    for part in filter(str.strip, (columns or "").split(",")):
        name, _, column = (piece.strip() for piece in part.partition("="))
        if not column or name not in names:
            raise InputError(
                f"column map: {part!r} is none of prompt=COLUMN, completion=COLUMN, label=COLUMN"
            )
        names[name] = column
    layout = Layout(**names)
    if refused is None and complied is None:
        return layout
    refusals, answers = _labels(refused), _labels(complied)
    if not refusals or not answers:
        raise InputError(
            "say both which labels are refusals (--refused) and which are not (--complied)"
        )
    shared = sorted(set(refusals) & set(answers))
    if shared:
        raise InputError(f"the label {shared[0]!r} cannot be both a refusal and none")
    return replace(layout, refused=refusals, complied=answers)


def _labels(comma_list: str | None) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, (comma_list or "").split(","))))


def read_labelled(path: Path, layout: Layout = XSTEST) -> pd.DataFrame:
    """Rows of a labelled CSV: text columns `prompt` and `completion`, and `refused` (bool).

    Raises:
        InputError: the file is missing, is no CSV, lacks a column, is empty or has unknown labels.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from None
    wanted = (layout.prompt, layout.completion, layout.label)
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        present = ", ".join(map(str, table.columns))[:200]
        raise InputError(f"{path} lacks the columns {', '.join(missing)}; it has {present}")
    if table.empty:
        raise InputError(f"{path} has no rows")
    known = (*layout.refused, *layout.complied)
    unknown = sorted(set(table[layout.label]) - set(known))
    if unknown:
        raise InputError(
            f"{path} has unknown labels {[label[:40] for label in unknown[:5]]}; "
            f"known are {', '.join(known)} (--refused, --complied)"
        )
    rows = {
        "prompt": table[layout.prompt],
        "completion": table[layout.completion],
        "refused": table[layout.label].isin(layout.refused),
    }
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Completion:
    """A completion that people labelled, and the judges' verdicts on it."""

    file: str
    """Name of its file, with its folder where two files have the same name."""
    number: int
    """Row in the file, from 0."""
    prompt: str
    """The request."""
    text: str
    """The completion."""
    refused: bool
    """Whether people call it a refusal, whole or in part."""
    verdicts: Mapping[str, Verdict]
    """Judge -> verdict."""


def judged_files(
    paths: Sequence[Path],
    judges: Mapping[str, Judge],
    *,
    layout: Layout = XSTEST,
    failed: Callable[[str], None] = lambda reason: None,
) -> list[Completion]:
    """Every completion of `paths`, judged once by each of `judges`.

    `failed` takes the reason of each verdict that is missing because a judge broke.

    Raises:
        InputError: a file cannot be read, or is named twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a file is named twice")
    names = [path.name for path in paths]
    completions = []
    for path in paths:
        file = path.name if names.count(path.name) == 1 else str(path)
        for number, row in enumerate(read_labelled(path, layout).itertuples(index=False)):
            prompt, text = str(row.prompt), str(row.completion)
            verdicts = {}
            for name, judge in judges.items():
                judgement = assessed(judge, prompt, text)
                verdicts[name] = judgement.verdict
                if judgement.failed:
                    failed(str(judgement.reason))
            completions.append(Completion(file, number, prompt, text, bool(row.refused), verdicts))
    return completions


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

    if not isinstance(judge, EnsembleJudge | RegressionJudge):
        return []
    known = set(shipped_provenance()["files"].values())
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

    table = pd.concat([read_labelled(path) for path in paths])
    prompts, replies = list(map(str, table["prompt"])), list(map(str, table["completion"]))
    people = list(map(bool, table["refused"]))
    verdicts: dict[str, list[Verdict]] = {
        name: [Verdict.UNSCORED] * len(replies) for name in ("regression", "ensemble")
    }
    for training, rest in GroupKFold(n_splits=5).split(replies, groups=prompts):
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
