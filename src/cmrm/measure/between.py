"""Two runs beside each other: each cell of one against the same cell of the other.

Where both runs have their replies, a comparison is paired: the same samples, a bootstrap over them,
McNemar's exact test. Where a run has rates alone, it is not: Newcombe's interval of the difference
of two Wilson intervals, and the score test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

from cmrm.errors import InputError
from cmrm.measure.outcomes import Cell
from cmrm.measure.rates import holm
from cmrm.measure.table import ACCURACY, compared_cells

FIGURES = ("unsafe", "over_refusal")
"""Rates that have a judge."""


@dataclass(frozen=True)
class Run:
    """One side of a comparison."""

    name: str
    """How it is called: its folder."""
    results: Mapping[str, Any]
    """In the form of `measure.schema.Results`."""
    cells: Sequence[Cell] = ()
    """Its replies; empty where it has rates alone."""


def compared_runs(
    left: Run, right: Run, match: Mapping[str, str] | None = None, *, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each set, condition, judge and figure that both runs have; right minus left.

    Args:
        left: what is compared with.
        right: what is compared.
        match: defence of `left` -> defence of `right` that stands beside it; the same name else.
        seed: of the bootstrap.

    Raises:
        InputError: the runs have no cell in common, or `match` names a defence that is not there.
    """
    match = dict(match or {})
    _check_match(left, right, match)
    rows: list[dict[str, Any]] = []
    theirs = {_key(cell): cell for cell in right.results["cells"]}
    for cell in left.results["cells"]:
        defense = match.get(cell["defense"], cell["defense"])
        other = theirs.get((cell["set"], cell["condition"], defense))
        if other is not None:
            rows += _cell_rows(left, right, cell, other, seed)
    if not rows:
        raise InputError(
            f"{left.name} and {right.name} have no figure in common: other sets, conditions, "
            "defences or judges. Defences of different names are compared by --match NAME=NAME"
        )
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = p_value
    return rows


def _key(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    return cell["set"], cell["condition"], cell["defense"]


def _check_match(left: Run, right: Run, match: Mapping[str, str]) -> None:
    for run, names in ((left, match.keys()), (right, match.values())):
        known = {cell["defense"] for cell in run.results["cells"]}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(
                f"--match: {run.name} has no defence {unknown[0]!r}; it has "
                f"{', '.join(sorted(known))}"
            )


def _cell_rows(
    left: Run, right: Run, one: Mapping[str, Any], other: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Rows of one pair of cells, in the order of the left run's judges, accuracy last."""
    judges = [name for name in left.results["judges"] if name in right.results["judges"]]
    pairs = [
        (judge, figure, *(cell["judges"].get(judge, {}).get(figure) for cell in (one, other)))
        for judge in judges
        for figure in FIGURES
    ]
    pairs.append((ACCURACY, "accuracy", one["accuracy"], other["accuracy"]))
    paired = _paired_rows(left, right, _key(one), _key(other), judges, seed)
    rows = []
    for judge, figure, before, after in pairs:
        if not _scored(before) or not _scored(after):
            continue
        row = {
            "set": one["set"], "condition": one["condition"], "left": one["defense"],
            "right": other["defense"], "judge": judge, "figure": figure, "left_rate": before,
            "right_rate": after,
        }  # fmt: skip
        tested = paired.get((judge, figure))
        rows.append({**row, **(_unpaired(before, after) if tested is None else tested)})
    return rows


def _scored(rate: Mapping[str, Any] | None) -> bool:
    return rate is not None and rate["rate"] is not None


def _paired_rows(
    left: Run,
    right: Run,
    one: tuple[str, str, str],
    other: tuple[str, str, str],
    judges: Sequence[str],
    seed: int,
) -> dict[tuple[str, str], dict[str, Any]]:
    """(judge, figure) -> the paired test; empty where a run has no replies."""
    base = next((cell for cell in left.cells if cell.key == one), None)
    cell = next((cell for cell in right.cells if cell.key == other), None)
    if base is None or cell is None:
        return {}
    asked = {  # an id alone does not make two requests the same
        name: outcome
        for name, outcome in cell.outcomes.items()
        if name in base.outcomes and base.outcomes[name].request == outcome.request
    }
    shared = replace(cell, outcomes=asked)
    rows = {}
    for judge in (*judges, ACCURACY):
        for row in compared_cells(shared, base, judge, "left", seed=seed):
            rows[judge, row["outcome"]] = {
                "paired": True, "difference": row["difference"], "low": row["low"],
                "high": row["high"], "only_left": row["only_before"],
                "only_right": row["only_after"], "p_value": row["p_value"], "n": row["n"],
            }  # fmt: skip
    return rows


def _unpaired(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The test of two independent shares."""
    counts = [(round(rate["rate"] * rate["n"]), rate["n"]) for rate in (after, before)]
    (hits, n), (hits_before, n_before) = counts
    low, high = confint_proportions_2indep(hits, n, hits_before, n_before, method="newcomb")
    same = hits * n_before == hits_before * n
    p_value = 1.0
    if not same:
        p_value = float(
            test_proportions_2indep(hits, n, hits_before, n_before, method="score").pvalue
        )
    return {
        "paired": False, "difference": round(after["rate"] - before["rate"], 6),
        "low": round(float(low), 6), "high": round(float(high), 6), "only_left": None,
        "only_right": None, "p_value": p_value, "n": min(n, n_before),
    }  # fmt: skip


def differing_facts(left: Run, right: Run) -> list[tuple[str, Any, Any]]:
    """What is not the same in both runs, beside their replies: (name, left, right)."""
    facts: list[tuple[str, Any, Any]] = []
    for part in ("model", "versions", "machine"):
        one, other = left.results[part], right.results[part]
        facts += [
            (f"{part} {name}".replace("_", " "), one.get(name), other.get(name))
            for name in dict.fromkeys([*one, *other])
            if one.get(name) != other.get(name)
        ]
    one, other = ({**run.results["settings"], "seed": run.results["seed"]} for run in (left, right))
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            facts.append((name.replace("_", " "), one.get(name), other.get(name)))
    sizes = [{data["name"]: data["n"] for data in run.results["sets"]} for run in (left, right)]
    if sizes[0] != sizes[1]:
        facts.append(("samples", sizes[0], sizes[1]))
    return facts
