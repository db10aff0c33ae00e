"""Draws with known probabilities, and the record of them beside the labels.

A reply that stands for many others has to count for them. So each draw fixes the probability of
every reply first, draws by it, and writes it down.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmrm.errors import InputError
from cmrm.files import write_json

DRAWS = "sheets.json"
"""File of the sheets that were drawn, in a grid's folder."""
UNSURE = 3.0
"""How many times likelier a reply is drawn of which the judges are least sure.

Neyman's allocation: in proportion to the standard deviation of an error. It is 0.17 where 3 % of
the verdicts are wrong, and 0.49 where 40 % are.
"""


def shares(total: float, sizes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """`total` in parts proportional to `sizes` (positive), none above its `most`.

    All arrays have the same length. Where `total` is more than the sum of `most`, that is shared.
    """
    if total >= most.sum():
        return most.astype(float)
    free = np.ones(len(sizes), dtype=bool)
    while True:
        left = total - most[~free].sum()
        parts = np.where(free, sizes * left / sizes[free].sum(), most)
        over = free & (parts > most)
        if not over.any():
            return parts
        free &= ~over


def systematic(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places that a systematic draw takes, each with its own probability (Madow, 1949).

    `probabilities`: within 0..1, with a whole sum n. Exactly n places are taken, and of neighbours
    whose probabilities sum to s, s of them, rounded down or up.
    """
    n = round(float(probabilities.sum()))
    ends = np.cumsum(probabilities)
    points = rng.random() + np.arange(n)
    return np.searchsorted(ends * (n / ends[-1]), points, side="right").clip(max=len(ends) - 1)


def record_draw(
    folder: Path, probabilities: Mapping[str, float], drawn: Iterable[str], *, seed: int
) -> None:
    """Add a sheet to the record in a grid's folder.

    Args:
        folder: of the grid.
        probabilities: of every reply that might have been drawn, by its id.
        drawn: ids of the drawn replies.
        seed: of the draw.

    Raises:
        InputError: the record is damaged, or cannot be written.
    """
    sheet = {
        "seed": seed,
        "drawn": sorted(drawn),
        "probabilities": {key: round(value, 9) for key, value in probabilities.items()},
    }
    earlier = _sheets(folder)
    if sheet not in earlier:
        write_json(folder / DRAWS, [*earlier, sheet])


def drawn_with(folder: Path, labelled: Sequence[str]) -> tuple[dict[str, float], set[str]]:
    """Probability with which the recorded sheets brought each labelled reply to a person.

    A sheet of which a share alone is labelled counts with that share: its rows are in random order.

    Args:
        folder: of the grid.
        labelled: ids of the labelled replies.

    Returns:
        id -> probability, 0 where no recorded sheet could draw the reply; and the ids of labelled
        replies that a recorded sheet did draw.

    Raises:
        InputError: the record is damaged.
    """
    missed = dict.fromkeys(labelled, 1.0)
    drawn: set[str] = set()
    for sheet in _sheets(folder):
        returned = set(sheet["drawn"]) & set(labelled)
        drawn |= returned
        share = len(returned) / len(sheet["drawn"])
        for key in missed:
            missed[key] *= 1 - share * sheet["probabilities"].get(key, 0.0)
    return {key: 1 - value for key, value in missed.items()}, drawn


def _sheets(folder: Path) -> list[dict[str, Any]]:
    path = folder / DRAWS
    if not path.exists():
        return []
    try:
        sheets: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for sheet in sheets:
            values = sheet["probabilities"].values()
            if not sheet["drawn"] or not all(0 < value <= 1 for value in values):
                raise ValueError("a sheet is empty, or a probability is not within 0..1")
            if not set(sheet["drawn"]) <= set(sheet["probabilities"]):
                raise ValueError("a drawn reply has no probability")
        return sheets
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no record of drawn sheets ({error}); restore it, or remove it: labels then "
            "count evenly within each group"
        ) from None
