"""`cmrm sets` and `cmrm families`: what can be read, and which models the contract covers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cmrm.cli import options as c
from cmrm.errors import InputError


def sets(
    name: Annotated[str | None, typer.Argument(help="Show one set's files, source and licence.")] = None,
    as_json: c.JsonOption = False,
) -> None:
    """Named sets: what each measures, and what has to lie where."""
    from cmrm.prompts import NAMED

    if name is not None and name not in NAMED:
        raise InputError(f"there is no set {name!r}; one of {', '.join(NAMED)}")
    chosen = [NAMED[name]] if name is not None else list(NAMED.values())
    if as_json:
        c.print_json([s.to_json() for s in chosen])
    elif name is None:
        c.print_rows(
            "named sets (`cmrm sets NAME` shows files and sources)",
            ["name", "measures", "variants", "samples", "licence"],
            [
                [s.name, s.measures, ", ".join(s.counts), ", ".join(map(str, s.counts.values())), s.licence]
                for s in chosen
            ],
        )
    else:
        for field, value in chosen[0].to_json().items():
            shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            typer.echo(f"{field:9s} {shown}")


def families(as_json: c.JsonOption = False) -> None:
    """Model families that the contract suite covers, with what is particular about each."""
    from cmrm.model.families import FAMILIES, NOT_COVERED

    if as_json:
        c.print_json({"covered": [asdict(f) for f in FAMILIES], "not_covered": dict(NOT_COVERED)})
        return
    c.print_rows(
        "covered by the contract suite, each on a tiny random model; `cmrm check MODEL` runs it on yours",
        ["family", "architecture", "example on the hub", "note"],
        [[f.name, f.architecture, f.example, f.note] for f in FAMILIES],
    )
    for name, reason in NOT_COVERED:
        typer.echo(f"not covered: {name}: {reason}")
