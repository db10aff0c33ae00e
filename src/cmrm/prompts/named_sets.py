"""Sets by the names that `cmrm evaluate` and recipes take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cmrm.prompts.catalogue import NAMED
from cmrm.prompts.loading import Loaded, OnError, load_samples


def load_named(
    name: str,
    places: Mapping[str, Path],
    *,
    limit: int | None,
    seed: int = 0,
    partial: bool = False,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    label: str | None = None,
    on_error: OnError = "stop",
) -> Loaded:
    """A named set (`xstest`), one of its variants (`xstest-safe`), or a file.

    Args:
        name: see above; a file's set is called by its name without suffix.
        places: name, with or without variant -> folder of the set; otherwise the folder is looked
            up below `CMRM_DATA` (`place.place_of`).
        limit: draw so many samples by hashed id (`demo`: of each kind).
        seed: seed of sets that are composed by a recipe.
        partial: accept a set whose count or checksums are not the published ones.
        columns: field -> column of a file; named sets bring their own.
        images: folder of a file's images; named sets bring their own.
        label: `harmful` or `benign`, for samples of a file that are labelled neither.
        on_error: `stop` raises when samples cannot be used; `skip` leaves them out.

    Raises:
        InputError: the set cannot be used.
        MissingExtraError: it needs a library that is not installed.
    """
    source, variant = _source(name)
    named = is_named(name)
    loaded = load_samples(
        source,
        path=places.get(name, places.get(source)) if named else None,
        variant=variant,
        columns=None if named else columns,
        images=None if named else images,
        label=None if named else label,
        limit=limit,
        seed=seed,
        partial=partial,
        on_error=on_error,
    )
    return replace(loaded, name=Path(name).stem if not named and os.path.exists(name) else name)


def is_named(name: str) -> bool:
    """Whether `load_named` takes the name for a named set or a variant of one, not for a file."""
    return _source(name)[0] in NAMED


def _source(name: str) -> tuple[str, str | None]:
    """(named set or file, variant)."""
    if name not in NAMED and not os.path.exists(name):
        for known in sorted(NAMED, key=len, reverse=True):
            if name.startswith(f"{known}-"):
                return known, name.removeprefix(f"{known}-")
    return name, None
