"""Rows to samples: the column map, where images lie, and what happens to rows that cannot be used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from cmrm.errors import InputError
from cmrm.prompts.sample import Match, Picture, Sample, check_unique, open_images
from cmrm.prompts.tables import Row, read_table

FIELDS = ("id", "query", "image", "caption", "category", "label", "answer", "match", "context")
"""What a column can be mapped to; `query` is the one that must be there."""

OnError = Literal["skip", "stop"]


@dataclass(frozen=True)
class Skipped:
    """A row that was left out."""

    row: str
    """Which: the sample's id."""
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
    """Rows without a usable image, under `--on-error skip`."""
    notes: tuple[str, ...] = ()
    """What a reader of the results has to know: a partial set, another version."""
    harm: str | None = None
    """Where the harm of its harmful samples is: `text`, `image`, or `both`; None where it is not said."""

    def to_json(self) -> dict[str, Any]:
        """Name, counts and notes, for every output that is made from the set."""
        return {
            "name": self.name,
            "n": len(self.samples),
            "skipped": len(self.skipped),
            "skipped_first": self.skipped[0].reason if self.skipped else None,
            "notes": list(self.notes),
            "harm": self.harm,
            "labels": dict(Counter(s.label or "" for s in self.samples)),
        }


def parse_columns(given: str | None) -> dict[str, str]:
    """`query=instruction,image=img` as a dict field -> column.

    Raises:
        InputError: a part is no pair, a field is unknown or named twice.
    """
    columns: dict[str, str] = {}
    for part in (given or "").split(","):
        if not part.strip():
            continue
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise InputError(f"column map: {part!r} is no field=column; the fields are {', '.join(FIELDS)}")
        if field not in FIELDS:
            raise InputError(f"column map: there is no field {field!r}; the fields are {', '.join(FIELDS)}")
        if field in columns:
            raise InputError(f"column map: the field {field!r} is named twice")
        columns[field] = column
    return columns


def load_samples(
    source: str | Path,
    *,
    path: Path | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
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
        source: a name that `cmrm sets` lists, a file (JSONL, JSON, CSV, TSV, Parquet), a folder saved by `datasets`, or a
            hub id `owner/name`.
        path: where a named set lies.
        columns: field -> column for files and hub data; a field that is not mapped is read from a column of its own name.
        images: folder that relative image paths start from; the file's own folder when None.
        split: split of a `datasets` source.
        config: configuration of a hub data set.
        variant: variant of a named set that has several.
        partial: accept a named set whose counts or checksums are not the published ones; noted in every output.
        on_error: `stop` raises when rows cannot be used and says how many; `skip` leaves them out and counts them.
        limit: keep the first so many samples in the order of their hashed ids, so that a limit is a fair draw.
        seed: seed of sets that are composed by a recipe.

    Raises:
        InputError: the source, the map or a row cannot be used.
    """
    from cmrm.prompts.catalogue import NAMED

    if on_error not in get_args(OnError):
        raise InputError(f"on_error is {on_error!r}; one of {', '.join(get_args(OnError))}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    notes: list[str] = []
    harm = None
    if str(source) in NAMED:
        chosen = NAMED[str(source)]
        if columns:
            raise InputError(f"{source} is a named set and brings its own columns; leave the column map out")
        harm = chosen.harm_of(variant)
        name, samples = str(source), chosen.read(path, variant=variant, partial=partial, seed=seed, note=notes.append)
    else:
        if path is not None or variant is not None:
            raise InputError(f"--path and --variant go with a named set; {source} is none (`cmrm sets` lists them)")
        name = str(source)
        rows = read_table(source, split=split, config=config)
        folder = images if images is not None else Path(source).parent if Path(source).is_file() else None
        samples = rows_to_samples(rows, columns or {}, folder=folder, source=name)
    check_unique(samples)
    if limit is not None and limit < len(samples):
        notes.append(f"{limit} of {len(samples)} samples")
        samples = drawn_by_hash(samples, limit)
    usable, skipped = usable_samples(samples, on_error=on_error, name=name)
    return Loaded(name, tuple(usable), tuple(skipped), tuple(notes), harm)


def drawn_by_hash(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` samples (None: all) by the hash of their ids, in the order given: a fair draw, whatever the order of the source."""
    if limit is None or limit >= len(samples):
        return list(samples)
    ranked = sorted(samples, key=lambda s: hashlib.sha256(f"limit\x00{s.id}".encode()).digest())
    kept = {s.id for s in ranked[:limit]}
    return [s for s in samples if s.id in kept]


def rows_to_samples(
    rows: Sequence[Row], columns: Mapping[str, str], *, folder: Path | None, source: str
) -> list[Sample]:
    """Rows to samples by the column map; image cells are paths, bytes, or the dicts that `datasets` stores.

    Raises:
        InputError: a mapped column is not there, there is no query column, a query is empty, or a `match` is unknown.
    """
    present = list(dict.fromkeys(name for row in rows for name in row))
    where = {field: columns.get(field, field) for field in FIELDS}
    missing = [f"{field}={where[field]}" for field in columns if where[field] not in present]
    if missing:
        raise InputError(f"{source} has no column for {', '.join(missing)}; its columns are {', '.join(present)}")
    if where["query"] not in present:
        raise InputError(
            f"{source} has no column 'query'; its columns are {', '.join(present)}; say which holds the request with "
            "--map query=COLUMN"
        )
    samples = []
    for number, row in enumerate(rows):
        query = row.get(where["query"])
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"{source} row {number} has no text in {where['query']!r}")
        given = row.get(where["id"])
        samples.append(
            Sample(
                id=str(given) if given not in (None, "") else f"{number}",
                query=query,
                image=image_cell(row.get(where["image"]), folder, f"{source} row {number}"),
                caption=_text(row.get(where["caption"])),
                category=_text(row.get(where["category"])),
                label=_text(row.get(where["label"])),
                answer=_text(row.get(where["answer"])),
                match=_match(row.get(where["match"]), f"{source} row {number}"),
                context=_text(row.get(where["context"])),
            )
        )
    return samples


def image_cell(value: Any, folder: Path | None, place: str) -> Picture | tuple[Picture, ...] | None:
    """What a table's cell says of an image: a path (relative to `folder`), bytes, `{"bytes", "path"}`, or a list of these."""
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        return Path(value) if folder is None or Path(value).is_absolute() else folder / value
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        return image_cell(value.get("bytes") or value.get("path"), folder, place)
    if isinstance(value, list | tuple):
        several = [image_cell(one, folder, place) for one in value]
        flat = tuple(one for one in several if one is not None and not isinstance(one, tuple))
        return flat or None
    raise InputError(f"{place}: its image is {type(value).__name__}; expected a path, bytes, or a list of these")


def usable_samples(
    samples: Sequence[Sample], *, on_error: OnError, name: str, check: Callable[[Sample], Any] = open_images
) -> tuple[list[Sample], list[Skipped]]:
    """Samples whose images open, and the others with their reasons; every image is decoded once.

    Raises:
        InputError: under `stop`, when any cannot be used: how many, which first, and how to go on; under `skip`, when
            none is left.
    """
    usable, skipped = [], []
    for sample in samples:
        if sample.image is None:
            usable.append(sample)
            continue
        try:
            check(sample)
        except InputError as error:
            skipped.append(Skipped(sample.id, str(error)))
        else:
            usable.append(sample)
    if skipped and (on_error == "stop" or not usable):
        how = "use --on-error skip to leave them out" if usable else "none is left"
        raise InputError(
            f"{name}: {len(skipped)} of {len(samples)} samples cannot be used; the first: {skipped[0].reason}; {how}"
        )
    return usable, skipped


def _match(value: Any, place: str) -> Match:
    given = _text(value) or "exact"
    if given not in get_args(Match):
        raise InputError(f"{place}: match is {given!r}; one of {', '.join(get_args(Match))}")
    return cast(Match, given)


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
