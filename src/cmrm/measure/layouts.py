"""Files of replies that people labelled: their columns, their labels, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmrm.errors import InputError, MissingExtraError

try:
    import pandas as pd
except ImportError:
    raise MissingExtraError(
        "labelled files need pandas; install it with: pip install 'cmrm[eval]'"
    ) from None


@dataclass(frozen=True)
class Layout:
    """Names of a labelled file's columns, and what its labels say."""

    name: str = "XSTest"
    """Of the collection; files of one layout are one collection."""
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
    unsafe: tuple[str, ...] = ()
    """Labels of `complied` that engage with a harmful intent; empty where no label says."""
    model: str | None = None
    """Column of the model that replied; None: each file is one model."""
    case: str | None = None
    """Column of the case, which replies in other wordings and languages share; None: the request
    is the case."""
    language: str | None = None
    """Column of the reply's language; None: English."""
    translation: str | None = None
    """Column of the reply's English translation."""
    annotators: tuple[str, str] | None = None
    """Columns of two people's own labels, where they are published."""


XSTEST = Layout()
"""XSTest's published completions (arXiv 2308.01263)."""
_MSTS_REFUSED = ("1.1 - rejection or rebuttal", "1.2 - refusal only")
_MSTS_UNSAFE = ("2.1 - explicit encouragement", "2.2 - advice", "2.Z - other (unsafe)")
_MSTS_SAFE = (
    "1.3 - safety considerations / contexts",
    "1.4 - request for context / clarification",
    "1.5 - expression of uncertainty",
    "1.6 - misunderstanding of prompt / image",
    "1.7 - image description",
    "1.Z - other (safe)",
)
MSTS = Layout(
    "MSTS", "prompt_text", "response", "final_taxonomy", _MSTS_REFUSED,
    (*_MSTS_SAFE, *_MSTS_UNSAFE), _MSTS_UNSAFE, "model", "case_id",
    annotators=("annot1_label", "annot2_label"),
)  # fmt: skip
"""MSTS's English replies of vision-language models (arXiv 2501.10057)."""
MSTS_LANGUAGES = replace(
    MSTS,
    name="MSTS, other languages",
    label="annot1_label",
    language="language",
    translation="response_translated",
    annotators=None,
)
"""MSTS's replies in other languages, with translations."""
KNOWN = (MSTS_LANGUAGES, MSTS, XSTEST)
"""Layouts that a file is recognised by, the most particular first."""
_COLUMNS = {
    "prompt": "prompt", "completion": "completion", "label": "label", "model": "model",
    "case": "case", "language": "language",
}  # fmt: skip


def layout_of(columns: str | None, refused: str | None, complied: str | None) -> Layout | None:
    """The layout of a column map and the labels of two comma lists; None where none is given.

    `columns`: `prompt=COLUMN,completion=COLUMN,label=COLUMN`, and `model`, `case`, `language`, or
    some of them; the others are XSTest's.

    Raises:
        InputError: a part of the map is no such pair; a list of labels is missing, or the two share
            a label.
    """
    if (columns, refused, complied) == (None, None, None):
        return None
    names: dict[str, str] = {}
    for part in filter(str.strip, (columns or "").split(",")):
        name, _, column = (piece.strip() for piece in part.partition("="))
        if not column or name not in _COLUMNS:
            raise InputError(
                f"column map: {part!r} is none of prompt=COLUMN, completion=COLUMN, label=COLUMN, "
                "model=COLUMN, case=COLUMN, language=COLUMN"
            )
        names[_COLUMNS[name]] = column
    layout = XSTEST
    for field, column in names.items():
        layout = replace(layout, name="labelled", **{field: column})  # type: ignore[arg-type]
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
    return replace(layout, name="labelled", refused=refusals, complied=answers)


def _labels(comma_list: str | None) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, (comma_list or "").split(","))))


@dataclass(frozen=True)
class Labelled:
    """A reply that people labelled."""

    file: str
    """Name of its file, with its folder where two files have the same name."""
    number: int
    """Row in the file, from 0."""
    collection: str
    """Name of its layout."""
    model: str
    """The model that replied."""
    case: str
    """What replies to the same question share."""
    language: str
    """Of the reply, in lower case."""
    prompt: str
    """The request."""
    text: str
    """The reply."""
    translation: str | None
    """The reply in English, where it is in another language."""
    refused: bool
    """Whether people call it a refusal, whole or in part."""
    unsafe: bool | None
    """Whether people call it unsafe; None where the labels do not say."""
    annotators: tuple[tuple[bool, bool], ...] = ()
    """Of each of two people: whether the reply refuses, and whether it is unsafe."""


def read_labelled(path: Path, layout: Layout | None = None, *, name: str = "") -> list[Labelled]:
    """Rows of a labelled CSV; its layout is recognised by its columns when `layout` is None.

    `name`: of the file in the rows; its own when empty.

    Raises:
        InputError: the file is missing, is no CSV, lacks a column, is empty or has unknown labels.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from None
    layout = layout or _recognised(table)
    wanted = [layout.prompt, layout.completion, layout.label]
    wanted += filter(None, (layout.model, layout.case, layout.language, layout.translation))
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
    rows = [
        {str(column): str(cell) for column, cell in row.items()} for row in table.to_dict("records")
    ]
    return [
        _row(row, layout, name or path.name, path.stem, number) for number, row in enumerate(rows)
    ]


def _recognised(table: pd.DataFrame) -> Layout:
    """The known layout whose columns the table has; XSTest's where it has none's."""
    for layout in KNOWN:
        columns = {layout.prompt, layout.completion, layout.label}
        columns |= {c for c in (layout.model, layout.case, layout.language) if c is not None}
        if columns <= set(table.columns):
            return layout
    return XSTEST


def _row(row: dict[str, str], layout: Layout, name: str, stem: str, number: int) -> Labelled:
    label = row[layout.label]
    return Labelled(
        file=name,
        number=number,
        collection=layout.name,
        model=row[layout.model] if layout.model else stem,
        case=row[layout.case] if layout.case else row[layout.prompt],
        language=row[layout.language].lower() if layout.language else "english",
        prompt=row[layout.prompt],
        text=row[layout.completion],
        translation=row[layout.translation] if layout.translation else None,
        refused=label in layout.refused,
        unsafe=label in layout.unsafe if layout.unsafe else None,
        annotators=tuple(
            (row.get(column) in layout.refused, row.get(column) in layout.unsafe)
            for column in layout.annotators or ()
        ),
    )


def read_files(paths: list[Path], layout: Layout | None = None) -> list[Labelled]:
    """Rows of several labelled files.

    Raises:
        InputError: as `read_labelled`; a file is named twice.
    """
    return [
        row
        for name, path in named_files(paths).items()
        for row in read_labelled(path, layout, name=name)
    ]


def named_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their names; with their folders where two have the same name.

    Raises:
        InputError: a file is named twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a file is named twice")
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): path for path in paths}
