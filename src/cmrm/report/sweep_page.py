"""The page of one sweep: its figures, and a table of every point."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.report.rendering import environment, plain_text, write_page
from cmrm.report.tables import EMPTY, RateText, Table, label, or_dash, rate_text, without_empty

TITLES = {
    "layers": "Which layers are steered",
    "anchors": "How many anchors are enough",
    "images": "Perturbed images",
    "corruptions": "Vectors of one corrupted image on images of another kind",
    "sets": "Anchors of one set on another set",
    "shifts": "Artifacts side by side",
}
"""Heading by what is varied; settings have one of their own."""


def write_sweep_report(document: Mapping[str, Any], out: Path) -> Path:
    """Write `out/sweep.html` and its figures as PNG files; return the page.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        InputError: `out` cannot be written to.
    """
    from cmrm.report.sweep_plots import sweep_pictures

    document = json.loads(json.dumps(document))
    figures = sweep_pictures(document)
    counts = [f"{n} {kind}" for kind, n in document["samples"].items() if n]
    page = environment().get_template("sweep.html.jinja").render(
        d=document, title=sweep_title(document), figures=figures, points=sweep_table(document),
        counts=counts, facts=_facts(document),
    )  # fmt: skip
    images = {name: picture.light for name, picture in figures.items()}
    return write_page(page, images, out, "sweep")


def sweep_title(document: Mapping[str, Any]) -> str:
    """The heading of a sweep."""
    return TITLES.get(document["over"], f"What {document['over']} changes")


def sweep_table(document: Mapping[str, Any], text: RateText = rate_text) -> Table:
    """A row for each point, the untouched model first; several draws have a row each."""
    judges = document["judges"]
    several = any(point["draw"] for point in document["points"])
    columns = ["defence", document["x"], document["y"] or "-", "draw"]
    for name in ("unsafe", "over-refusal"):
        columns += [f"{name} ({judge})" for judge in judges]
    columns += ["accuracy", "generic", "not measured"]
    references = document["references"]
    rows = []
    for name, key in (("as text", "text"), ("untouched", "image")):
        if references[key] is not None:
            rows.append([name, *[EMPTY] * 3, *_cells(references[key], judges, text), EMPTY])
    for point in document["points"]:
        y = EMPTY if point["y"] is None else str(point["y"])
        draw = str(point["draw"] + 1) if several else EMPTY
        place = [label(point["series"]), f"{point['x']:g}" if _number(point["x"]) else point["x"]]
        rows.append([
            *place, y, draw, *_cells(point["rates"], judges, text), point["reason"] or EMPTY,
        ])  # fmt: skip
    return without_empty(columns, rows)


def _number(value: object) -> bool:
    return isinstance(value, int | float)


def _cells(rates: Mapping[str, Any] | None, judges: list[str], text: RateText) -> list[str]:
    if rates is None:
        return [EMPTY] * (2 * len(judges) + 2)
    judged = [rates["judges"][judge][f] for f in ("unsafe", "over_refusal") for judge in judges]
    return [or_dash(rate, text) for rate in (*judged, rates["accuracy"], rates["generic"])]


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the sweep depends on, name and text."""
    names = ("model", "samples", "batch_size", "max_new_tokens", "seed", "seconds", "versions",
             "machine")  # fmt: skip
    model = {name: fact for name, fact in document["model"].items() if fact is not None}
    facts = {**document, "model": model}
    rows = [(name.replace("_", " "), plain_text(facts[name])) for name in names]
    rows.append(("judges", ", ".join(document["judges"])))
    seen: dict[str, Mapping[str, Any]] = {}
    for point in document["points"]:
        if point["series"] != "none":
            seen.setdefault(_owner(document, point), point["settings"])
    return rows + [(f"settings of {name}", plain_text(values)) for name, values in seen.items()]


def _owner(document: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """Whose settings a point shows: each artifact has its own, other points what is not varied."""
    name = str(point["series"])
    return f"{name}, {point['x']}" if document["over"] == "shifts" else f"{name}, first point"
