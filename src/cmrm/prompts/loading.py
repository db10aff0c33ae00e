"""Samples of any source: rows of a table by the column map, or a named set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from cmrm.errors import InputError
from cmrm.prompts.catalogue import NAMED
from cmrm.prompts.cells import image_cell, text_cell
from cmrm.prompts.columns import ColumnMap
from cmrm.prompts.labels import LABELS, checked_label, folded_label, with_label
from cmrm.prompts.sample import Match, Sample, image_digests
from cmrm.prompts.splits import check_unique, drawn_by_hash
from cmrm.prompts.tables import Row, read_table
from cmrm.prompts.text import listed, shortened

OnError = Literal["skip", "stop"]


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out."""

    row: str
    """The sample's id."""
    reason: str
    """Why."""


@dataclass(frozen=True)
class Loaded:
    """Samples, and what was left out on the way."""

    name: str
    """Name of the set, or the path or hub id."""
    samples: tuple[Sample, ...]
    """In the order of the source."""
    skipped: tuple[Skipped, ...] = ()
    """Samples without a usable image, under `--on-error skip`."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know: a partial set, another version."""
    harm: str | None = None
    """Where the harm of its harmful samples is: `text`, `image`, or `both`; None where unstated."""

    def to_json(self) -> dict[str, Any]:
        """Name, counts and notes, for every output that is made from the set."""
        return {
            "name": self.name,
            "n": len(self.samples),
            "skipped": len(self.skipped),
            "skipped_first": self.skipped[0].reason if self.skipped else None,
            "notes": list(self.notes),
            "harm": self.harm,
            "labels": dict(Counter(sample.label or "" for sample in self.samples)),
        }


def load_samples(
    source: str | Path,
    *,
    path: Path | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    label: str | None = None,
    split: str | None = None,
    config: str | None = None,
    variant: str | None = None,
    partial: bool = False,
    on_error: OnError = "stop",
    limit: int | None = None,
    seed: int = 0,
) -> Loaded:
    """Samples of a named set, of a file, or of a `datasets` folder or hub id.

    Args:
        source: a name that `cmrm sets` lists, a file (JSONL, JSON, CSV, TSV, Parquet), a folder
            saved by `datasets`, or a hub id `owner/name`.
        path: folder of a named set.
        columns: field -> column for files and hub data; a dotted name leads into nested cells. A
            field that is not mapped is read from a column of its own name.
        images: folder where relative image paths start, and where absolute paths of another
            machine are looked up by their tail; the file's own folder when None.
        label: `harmful` or `benign`, for all samples that are labelled neither.
        split: split of a `datasets` source.
        config: configuration of a hub data set.
        variant: variant of a named set that has several.
        partial: accept a named set whose counts or checksums are not the published ones; noted in
            every output.
        on_error: `stop` raises when samples cannot be used; `skip` leaves them out and counts them.
        limit: draw so many samples by the hash of their ids (`demo`: so many of each kind).
        seed: seed of sets that are composed by a recipe.

    Raises:
        InputError: the source, the column map, an option or a row cannot be used.
        MissingExtraError: the source needs a library that is not installed.
    """
    if on_error not in get_args(OnError):
        raise InputError(f"on_error is {on_error!r}; one of {', '.join(get_args(OnError))}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    checked_label(label)
    name, notes, harm = str(source), list[str](), None
    if name in NAMED:
        chosen = NAMED[name]
        if columns or images is not None or split is not None or config is not None:
            raise InputError(
                f"{source} is a named set and brings its own columns, images and split; leave "
                "--map, --images, --split and --config out"
            )
        harm = chosen.harm_of(variant)
        samples = chosen.read(
            path, variant=variant, partial=partial, limit=limit, seed=seed, note=notes.append
        )
    else:
        if path is not None or variant is not None:
            raise InputError(
                f"--path and --variant go with a named set; {shortened(source)} is none "
                "(`cmrm sets` lists them)"
            )
        rows = read_table(source, split=split, config=config)
        own = Path(source).parent if os.path.isfile(source) else None
        samples = rows_to_samples(
            rows, columns or {}, folder=images or own, source=name, search=images is not None
        )
    check_unique(samples)
    samples = with_label(samples, label)
    if limit is not None and limit < len(samples) and (name not in NAMED or not NAMED[name].drawn):
        notes.append(f"{limit} of {len(samples)} samples")
        samples = drawn_by_hash(samples, limit)
    usable, skipped = usable_samples(samples, on_error=on_error, name=name)
    return Loaded(name, tuple(usable), tuple(skipped), tuple(notes), harm)


def rows_to_samples(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    *,
    folder: Path | None,
    source: str,
    search: bool = False,
) -> list[Sample]:
    """Samples of the rows of a table, by the column map.

    Args:
        rows: column name -> cell, for each row.
        columns: field -> column.
        folder: where relative image paths start.
        source: name of the table, for messages.
        search: whether the user named `folder`, so that absolute image paths are looked up there.

    Raises:
        InputError: a column does not exist, a query is empty, or a cell cannot be used.
    """
    table = ColumnMap.of(rows, columns, source)
    if search and "image" not in table.present:
        raise InputError(
            f"{source} has no column 'image', but --images names a folder; its columns are "
            f"{listed(dict.fromkeys(name for row in rows for name in row))}; name the one that "
            "holds the paths with --map image=COLUMN"
        )
    return [
        _sample(row, table, number, f"{source} row {number}", folder, search)
        for number, row in enumerate(rows)
    ]


def _sample(
    row: Row, table: ColumnMap, number: int, place: str, folder: Path | None, search: bool
) -> Sample:
    def text(field: str, *, strict: bool = True) -> str | None:
        strict = strict or field in table.mapped
        return text_cell(table.cell(row, field), place, field, strict=strict)

    query = table.cell(row, "query")
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"{place} has no text in {shortened(table.columns['query'])!r}")
    label = text("label")
    unnamed = f"row-{number}" if "id" in table.present else str(number)
    return Sample(
        id=(text("id") or unnamed).strip(),
        query=text("query") or query,
        image=image_cell(table.cell(row, "image"), folder, place, search=search),
        caption=text("caption", strict=False),
        category=text("category", strict=False),
        label=None if label is None else folded_label(label),
        answer=text("answer"),
        match=_match(text("match"), place),
        context=text("context", strict=False),
    )


def usable_samples(
    samples: Sequence[Sample], *, on_error: OnError, name: str
) -> tuple[list[Sample], list[Skipped]]:
    """The samples whose images open, and the others with their reasons.

    Each image file is decoded once; its digest is kept for content identities.

    Raises:
        InputError: under `stop`, when any cannot be used: how many, and the first; under `skip`,
            when none is left.
    """
    usable, skipped = [], []
    for sample in samples:
        try:
            if sample.image is not None:
                image_digests(sample)
        except InputError as error:
            skipped.append(Skipped(sample.id, str(error)))
        else:
            usable.append(sample)
    if skipped and (on_error == "stop" or not usable):
        remedy = "use --on-error skip to leave them out" if usable else "none is left"
        raise InputError(
            f"{name}: {len(skipped)} of {len(samples)} samples cannot be used; the first: "
            f"{skipped[0].reason}; {remedy}"
        )
    return usable, skipped


def refuse_unratable(loaded: Loaded) -> None:
    """Raise `InputError` when no rate can come from a set.

    A rate comes from samples that are labelled harmful or benign, and from samples with an answer.
    """
    if any(sample.label in LABELS or sample.answer is not None for sample in loaded.samples):
        return
    seen = Counter(sample.label for sample in loaded.samples if sample.label is not None)
    state = f"the labels are {listed(word for word, _ in seen.most_common())}" if seen else ""
    raise InputError(
        f"{shortened(loaded.name)}: no sample is labelled harmful or benign, and none has an "
        f"answer, so that there is no rate; {state or 'there are no labels'}; name the column with "
        "--map label=COLUMN (or answer=COLUMN), or label all samples with --label harmful or "
        "--label benign"
    )


def _match(text: str | None, place: str) -> Match:
    match = "exact" if text is None else text.strip()
    if match not in get_args(Match):
        raise InputError(
            f"{place}: match is {shortened(match)!r}; one of {', '.join(get_args(Match))}"
        )
    return cast(Match, match)
