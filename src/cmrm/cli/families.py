"""`cmrm families`: the model families that the contract suite covers."""

from __future__ import annotations

from dataclasses import asdict

import typer

from cmrm.cli import options as c
from cmrm.cli import screen


def families(as_json: c.JsonOption = False) -> None:
    """Model families that the contract suite covers, with what is particular about each."""
    from cmrm.model.families import FAMILIES, NOT_COVERED

    if as_json:
        covered = [asdict(family) for family in FAMILIES]
        screen.print_json({"covered": covered, "not_covered": dict(NOT_COVERED)})
        return
    screen.print_rows(
        "covered by the contract suite, each on a tiny random model; "
        "`cmrm check MODEL` runs it on yours",
        ["family", "architecture", "example on the hub", "note"],
        [[f.name, f.architecture, f.example, f.note] for f in FAMILIES],
    )
    for name, reason in NOT_COVERED:
        typer.echo(f"not covered: {name}: {reason}")
