"""`results.json` of a run: made from its logs, read back, and held against published figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.measure.agreement import agreement_between, rated_of, read_labels
from cmrm.measure.fluency import FluencyStore, perplexities
from cmrm.evaluate.grid import SCHEMA, grid, judge_failures, read_cells


def results_of(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """The grid of all logs of a run, and how far its judges agree with each other and with a person's labels."""
    cells = read_cells(out / "logs")
    found = grid(cells, seed=seed, fluency=perplexities(fluency_of(out), cells, seed=seed))
    return found | {
        "agreement": agreement_between(rated_of(cells), read_labels(out)), "judge_failures": judge_failures(cells),
    }  # fmt: skip


def refreshed(out: Path) -> dict[str, Any]:
    """What a finished run's results are with the logs and labels of now, a recipe's comparison among them.

    Raises:
        InputError: there are no results, or they are broken.
    """
    held = read_results(out)
    found: dict[str, Any] = held | results_of(out, seed=held.get("seed", 0))
    if found.get("recipe"):
        found["recipe"] = found["recipe"] | compared(found["recipe"], found)
    return found


def fluency_of(out: Path) -> FluencyStore:
    """The likelihoods that a run keeps."""
    return FluencyStore(out / "fluency.db")


def read_results(out: Path) -> dict[str, Any]:
    """`out/results.json` of a run.

    Raises:
        InputError: there is none, or it is broken.
    """
    try:
        held: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out} holds no results of cmrm evaluate: {error}") from None
    if not isinstance(held, dict) or held.get("schema") != SCHEMA:
        raise InputError(f"{out / 'results.json'} is no result of cmrm evaluate: its schema is not {SCHEMA}")
    whole = {"model": dict, "cost": dict, "cells": list, "failures": list}
    wrong = [name for name, kind in whole.items() if not isinstance(held.get(name), kind)]
    recipe = held.get("recipe")
    if recipe is not None and not (
        isinstance(recipe, dict) and {"title", "source", "notes", "judges", "targets"} <= set(recipe)
    ):
        wrong.append("recipe")
    if wrong or not isinstance(held.get("seed", 0), int):
        raise InputError(
            f"{out / 'results.json'} is broken ({', '.join(wrong) or 'seed'}); run the same `cmrm evaluate` again: it makes it anew from the logs"
        )
    return held


def compared(recipe: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """`judge` and `targets`: every published figure beside what the run found, by the publication's judge where it judged, else by the
    first one that did.

    A target holds `set`, `condition`, `defense`, `figure` and `published`; added are `found`, `low`, `high` (per cent, or a rating),
    `n`, and `inside` (whether the published figure lies within the run's 95 % interval), null where the run has no such figure.
    """
    cells = {(c["set"], c["condition"], c["defense"]): c for c in found["cells"]}
    judges = [name for name in recipe["judges"] if name in found["judges"]] or list(found["judges"])
    judge = judges[0] if judges else None
    rows = []
    for target in recipe["targets"]:
        cell = cells.get((target["set"], target["condition"], target["defense"]))
        row = {**target, "found": None, "low": None, "high": None, "n": 0, "inside": None}
        held = _figure(cell, target["figure"], judge) if cell else None
        if held is not None:
            value, low, high, n = held
            row |= {"found": value, "low": low, "high": high, "n": n, "inside": low <= target["published"] <= high}
        rows.append(row)
    return {"judge": judge, "targets": rows}


def _figure(cell: Mapping[str, Any], figure: str, judge: str | None) -> tuple[float, float, float, int] | None:
    if figure == "rating":
        held = cell.get("rating")
        return None if not held or held["value"] is None else (held["value"], held["low"], held["high"], held["n"])
    rate = cell.get("accuracy") if figure == "accuracy" else cell["judges"].get(judge, {}).get(figure)
    if not rate or rate["rate"] is None:
        return None
    return 100 * rate["rate"], 100 * rate["low"], 100 * rate["high"], rate["n"]
