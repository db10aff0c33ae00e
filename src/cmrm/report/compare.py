"""The page that puts two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.measure.between import Run, compared_runs, differing_facts
from cmrm.measure.schema import read_results
from cmrm.report.rendering import environment, plain_text, write_page
from cmrm.report.tables import EMPTY, Table, label, rate_text

WORDS = {"unsafe": "unsafe rate", "over_refusal": "over-refusal", "accuracy": "accuracy"}
"""Names of the figures."""


def read_run(place: Path) -> Run:
    """A run from its folder, or from a file of results.

    Replies are read where the folder has logs of `cmrm evaluate`.

    Raises:
        InputError: there are no results, or they are damaged.
    """
    file = place / "results.json" if place.is_dir() else place
    results = read_results(file)
    logs = file.parent / "logs"
    if results["kind"] != "evaluation" or not logs.is_dir():
        return Run(_name(place), results)
    from cmrm.evaluate.logs import read_cells

    return Run(_name(place), results, tuple(read_cells(logs)))


def _name(place: Path) -> str:
    resolved = place.resolve()
    return resolved.name if place.is_dir() else f"{resolved.parent.name}/{resolved.name}"


def comparison(
    left: Run, right: Run, match: Mapping[str, str] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Both runs' figures, their differences, and what else is not the same, as JSON values.

    Raises:
        InputError: they have no figure in common.
    """
    rows = compared_runs(left, right, match, seed=seed)
    document = {
        "schema": "cmrm-comparison/1",
        "left": _facts_of(left), "right": _facts_of(right), "rows": rows,
        "differing": [
            {"name": name, "left": one, "right": other}
            for name, one, other in differing_facts(left, right)
        ],
    }  # fmt: skip
    whole: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return whole


def _facts_of(run: Run) -> dict[str, Any]:
    return {"name": run.name, "kind": run.results["kind"], "model": run.results["model"]["id"]}


def write_comparison(document: Mapping[str, Any], out: Path) -> Path:
    """Write `out/comparison.html`, its figures and `out/comparison.json`; return the page.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        InputError: `out` cannot be written to.
    """
    from cmrm.files import write_json
    from cmrm.report.compare_plots import comparison_pictures

    figures = comparison_pictures(document)
    page = environment().get_template("compare.html.jinja").render(
        d=document, table_of=comparison_rows(document), figures=figures,
        differing=differing_rows(document), pairing=_pairing(document["rows"]),
    )  # fmt: skip
    images = {name: picture.light for name, picture in figures.items()}
    path = write_page(page, images, out, "comparison")
    try:
        write_json(out / "comparison.json", document)
    except OSError as error:
        raise InputError(f"cannot write the comparison into {out}: {error}") from None
    return path


def row_name(row: Mapping[str, Any]) -> str:
    """Words for what a row compares: `none`, or `none / served` where the names differ."""
    names = dict.fromkeys(label(row[side]) for side in ("left", "right"))
    return " / ".join(names)


def comparison_rows(document: Mapping[str, Any]) -> Table:
    """A row for each figure: both rates, and the right one minus the left one."""
    columns = [
        "defence", "set", "condition", "figure", "judge", document["left"]["name"],
        document["right"]["name"], "difference", "only left / right", "p", "p (Holm)", "n",
    ]  # fmt: skip
    if columns[5] == columns[6]:
        columns[5:7] = ["left", "right"]
    rows = []
    for row in document["rows"]:
        changed = f"{row['only_left']} / {row['only_right']}" if row["paired"] else EMPTY
        low, high = 100 * row["low"], 100 * row["high"]
        rows.append([
            row_name(row), row["set"], label(row["condition"]), WORDS[row["figure"]], row["judge"],
            rate_text(row["left_rate"]), rate_text(row["right_rate"]),
            f"{100 * row['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]",
            changed, f"{row['p_value']:.2g}", f"{row['p_holm']:.2g}", str(row["n"]),
        ])  # fmt: skip
    return Table(columns, rows)


def differing_rows(document: Mapping[str, Any]) -> Table:
    """What is not the same in both runs."""
    rows = [
        [
            fact["name"],
            *(EMPTY if fact[s] is None else plain_text(fact[s]) for s in ("left", "right")),
        ]
        for fact in document["differing"]
    ]
    return Table(["", "left", "right"], rows)


def _pairing(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the rows were tested."""
    paired = sum(row["paired"] for row in rows)
    if paired == len(rows):
        return "All comparisons are paired: the same samples in both runs."
    words = "No comparison is paired" if not paired else f"{paired} of {len(rows)} are paired"
    return f"{words}: a run without its replies has rates alone, and intervals are wider for it."
