"""What a search comes to: `tune.json`, settings for `cmrm evaluate`, and an artifact."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import isinf
from pathlib import Path
from typing import Any

from cmrm.defenses import base_name, make_defense
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.files import write_json
from cmrm.measure.environment import machine_info, model_info, versions_info
from cmrm.tune.choose import choose, frontier
from cmrm.tune.measuring import OUTCOMES, Bench
from cmrm.tune.proxy import correlation
from cmrm.tune.run import Options, Search
from cmrm.tune.schema import checked
from cmrm.tune.sets import Sets
from cmrm.tune.study import Row

ARTIFACT = "shift.safetensors"
"""Artifact with the chosen setting as the recommended one, in the folder of a study."""
SETTINGS = "settings.json"
"""The chosen setting, as `cmrm evaluate --settings` takes it."""
RESULT = "tune.json"
"""Everything, in the form of `tune.schema`."""


def tuned(
    search: Search, bench: Bench, sets: Sets, options: Options, name: str | None = None
) -> dict[str, Any]:
    """The result of a search, in the form of `tune.schema.Tuned`; `artifact` is not written yet.

    `name`: of the model, instead of its id or folder.
    """
    finished = [row for row in search.rows if row.state == "finished"]
    points = [row.point for row in finished]
    chosen = choose(points, search.base, options.limits)
    best = next((row for row in finished if row.number == chosen.best), None)
    judge = next(iter(bench.judges))
    counts = {
        "harmful anchors": len(sets.anchors.harmful), "benign anchors": len(sets.anchors.benign),
        "harmful": len(sets.dev.harmful), "benign": len(sets.dev.benign),
        "questions": len(sets.dev.questions),
    }  # fmt: skip
    return checked({
        "model": model_info(bench.engine, name),
        "defense": options.defense,
        "judges": list(bench.judges),
        "objectives": [f"{figure} by {judge}" for figure in OUTCOMES[:2]]
        + ["1 - accuracy"] * (len(search.base) > 2),
        "limits": asdict(options.limits),
        "space": search.space,
        "samples": counts,
        "untouched": search.untouched,
        "trials": [_trial(row) for row in search.rows],
        "frontier": frontier(points),
        "chosen": chosen.best,
        "runner_up": chosen.runner_up,
        "nearest": chosen.nearest,
        "reason": chosen.reason,
        "proxy": {
            "unsafe": _correlation(finished, "harmful", 0),
            "over_refusal": _correlation(finished, "benign", 1),
        },
        "settings": {} if best is None else {
            f"{base_name(options.defense)}@tuned": best.attributes["settings"]
        },
        "artifact": ARTIFACT if best is not None and _extracts(search) else None,
        "seconds": round(search.seconds, 3),
        "budget": None if isinf(options.budget) else options.budget,
        "seed": bench.seed,
        "versions": versions_info(),
        "machine": machine_info(),
    })  # fmt: skip


def _extracts(search: Search) -> bool:
    return isinstance(search.default, CmrmDataset)


def _trial(row: Row) -> dict[str, Any]:
    names = ("origin", "settings", "rates", "partial", "proxy", "seconds", "reason")
    return {
        "number": row.number, "state": row.state,
        **{name: row.attributes.get(name) for name in names},
    }  # fmt: skip


def _correlation(rows: list[Row], kind: str, objective: int) -> dict[str, Any]:
    return correlation(
        [row.attributes["proxy"][kind] for row in rows], [row.values[objective] for row in rows]
    )


def write_tuned(result: dict[str, Any], search: Search, out: Path) -> None:
    """Write `tune.json`, and for a chosen setting `settings.json` and the artifact of CMRM.

    Raises:
        InputError, ArtifactError: a file cannot be written.
    """
    for stale in (out / SETTINGS, out / ARTIFACT):
        if result["chosen"] is None:
            stale.unlink(missing_ok=True)
    for name, settings in result["settings"].items():
        write_json(out / SETTINGS, {name: settings})
        if result["artifact"] is not None:
            defense = make_defense(name, {name: settings})
            assert isinstance(defense, CmrmDataset)
            shift = search.fitter.artifact(defense)
            record = {
                "defense": result["defense"], "trial": result["chosen"],
                "reason": result["reason"], "limits": result["limits"],
                "dev": {key: result["samples"][key] for key in ("harmful", "benign", "questions")},
            }  # fmt: skip
            replace(shift, records={**shift.records, "tune": record}).save(out / ARTIFACT)
    write_json(out / RESULT, result)
