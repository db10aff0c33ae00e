"""The one page of every kind of results: self-contained HTML, without network, figures inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.report import headline, tables
from cmrm.report.balance import balance_table
from cmrm.report.categories import category_table
from cmrm.report.judged import correction_table, judge_lines
from cmrm.report.rendering import environment, plain_text, write_page
from cmrm.report.tables import Results

TITLES = {
    "demo": "What an image costs in safety, and what CMRM gives back",
    "diagnosis": "What an image costs {model}",
    "evaluation": "{model} under several defences",
    "replies": "How safe the replies of {model} are",
}


def write_report(results: Results, out: Path) -> Path:
    """Write `out/report.html` and its figures as PNG files; return the page.

    Args:
        results: in the form of `measure.schema.Results`.
        out: folder; made where it does not exist.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        InputError: `out` cannot be written to.
    """
    page, images = rendered(results)
    return write_page(page, images, out, "report")


def rendered(results: Results) -> tuple[str, dict[str, bytes]]:
    """The page, and its figures as PNG by name.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    from cmrm.report.explorer import explorer_data
    from cmrm.report.plots import pictures

    results = json.loads(json.dumps(results, sort_keys=True))  # as a file has them
    drawn = pictures(results)
    page = (
        environment()
        .get_template("page.html.jinja")
        .render(
            r=results,
            title=_title(results),
            cards=headline.cards(results),
            figures=drawn,
            explorer=explorer_data(results),
            headline=_headline(results),
            balance=balance_table(results),
            gap_points=_gap_points(results),
            groups=tables.group_table(results),
            reasons=tables.reason_table(results),
            outcomes=tables.outcome_table(results),
            cells=tables.cell_table(results),
            gaps=tables.gap_table(results),
            categories=category_table(results),
            sweep=tables.sweep_table(results),
            comparisons=tables.comparison_table(results),
            agreement=_agreement(results),
            judge_lines=judge_lines(results),
            corrections=correction_table(results),
            costs=tables.cost_table(results),
            targets=tables.target_rows((results["recipe"] or {}).get("targets", ())),
            examples=_examples(results),
            settings=_settings(results),
        )
    )
    return page, {name: picture.light for name, picture in drawn.items()}


def _title(results: Results) -> str:
    models = [group["name"] for group in results["groups"] if group["by"] == "model"]
    name = f"{len(models)} models" if models else results["model"]["id"]
    return TITLES[results["kind"]].format(model=name)


def _headline(results: Results) -> tables.Table:
    """The table of conditions; empty where the results have a table of their own."""
    if results["kind"] in ("evaluation", "replies"):
        return tables.Table([], [])
    return headline.headline_table(results)


def _gap_points(results: Results) -> str | None:
    """`40.3`: points of unsafe rate that the image adds, first judge; None where not measured."""
    if not results["judges"]:
        return None
    judge = results["judges"][0]
    rates = {
        cell["condition"]: cell["judges"][judge]["unsafe"]
        for cell in headline.headline_cells(results)
        if cell["defense"] == "none"
    }
    pair = [rates.get(condition) for condition in ("original", "query")]
    shares = [rate["rate"] for rate in pair if rate and rate["rate"] is not None]
    return f"{100 * (shares[0] - shares[1]):.1f}" if len(shares) == 2 else None


def _agreement(results: Results) -> list[tuple[str, Mapping[str, Any], tables.Table]]:
    """Question, its figures and its table, for each question with pairs of raters."""
    return [
        (question, figures, tables.agreement_rows(figures))
        for question, figures in results["agreement"].items()
        if figures["pairs"]
    ]


def _examples(results: Results) -> list[tuple[str, tables.Table]]:
    """A title and a table for each defence with examples."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for example in results["examples"]:
        grouped.setdefault(example["defense"], []).append(example)
    shown = []
    for defense, examples in grouped.items():
        if defense == "none":
            title, columns = "the image, untouched model", ["query alone", "with the image"]
        else:
            title, columns = tables.label(defense), ["without", "with"]
        fields = ["set", "kind", "category", "request", "before", "after", "verdicts"]
        rows = [[str(example[name]).replace("_", " ") for name in fields] for example in examples]
        header = ["set", "kind", "category", "request", *columns, "verdict"]
        shown.append((title, tables.Table(header, rows)))
    return shown


def _settings(results: Results) -> list[tuple[str, str]]:
    """Name and text of each setting, version and fact of the machine."""
    facts = {name: value for name, value in results["model"].items() if value is not None}
    rows = {f"model {name.replace('_', ' ')}": value for name, value in facts.items()}
    rows |= {name.replace("_", " "): value for name, value in results["settings"].items()}
    rows |= {
        "seed": results["seed"],
        "versions": results["versions"],
        "machine": results["machine"],
    }
    return [
        (name, plain_text(value)) for name, value in rows.items() if value not in (None, {}, [])
    ]
