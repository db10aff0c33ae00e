"""Published figures beside those of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmrm.reproduce.schema import Recipe


def published(recipe: Recipe) -> dict[str, Any]:
    """A recipe as results hold it (`measure.schema.RecipeRow`), before anything is compared."""
    return {
        "title": recipe.title, "source": recipe.source, "notes": list(recipe.notes),
        "judges": list(recipe.judges),
        "targets": [
            {
                "set": target.set, "condition": target.condition.value, "defense": target.defense,
                "figure": target.figure, "published": target.value,
            }
            for target in recipe.targets
        ],
    }  # fmt: skip


def with_comparison(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results with their recipe's targets compared again; results without a recipe as they are."""
    if not results.get("recipe"):
        return dict(results)
    return {**results, "recipe": compared(results["recipe"], results)}


def compared(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's block with `judge`, and with the run's figure beside each published one.

    The rates are those of the publication's judge where it judged, else of the first judge that
    did. Figures are per cent, or a rating of 100, with the run's 95 % interval; `inside` says
    whether the published figure lies within it. All are None where the run has no such figure.
    """
    cells = {(row["set"], row["condition"], row["defense"]): row for row in results["cells"]}
    known = results["judges"]
    judge = next((name for name in [*recipe["judges"], *known] if name in known), None)
    targets = []
    for target in recipe["targets"]:
        cell = cells.get((target["set"], target["condition"], target["defense"]))
        figure = None if cell is None else _figure(cell, target["figure"], judge)
        value, low, high, n = figure or (None, None, None, 0)
        inside = None if figure is None else figure[1] <= target["published"] <= figure[2]
        targets.append(
            {**target, "measured": value, "low": low, "high": high, "n": n, "inside": inside}
        )
    return {**recipe, "judge": judge, "targets": targets}


def _figure(
    cell: Mapping[str, Any], figure: str, judge: str | None
) -> tuple[float, float, float, int] | None:
    """(value, low, high, n) of one figure of a cell, per cent or a rating; None without one."""
    if figure == "rating":
        rating = cell.get("rating")
        if not rating or rating["value"] is None:
            return None
        return rating["value"], rating["low"], rating["high"], rating["n"]
    rate = cell.get("accuracy")
    if figure != "accuracy":
        rate = cell["judges"].get(judge, {}).get(figure)
    if not rate or rate["rate"] is None:
        return None
    return 100 * rate["rate"], 100 * rate["low"], 100 * rate["high"], rate["n"]
