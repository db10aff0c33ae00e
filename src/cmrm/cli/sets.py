"""`cmrm sets`: the named sets."""

from __future__ import annotations

from typing import Annotated

import typer

from cmrm.cli import options as c
from cmrm.cli import screen


def sets(
    name: Annotated[
        str | None, typer.Argument(help="Show the files, source and licence of this set.")
    ] = None,
    as_json: c.JsonOption = False,
) -> None:
    """Named sets: what each measures, and which files it needs."""
    from cmrm.errors import InputError
    from cmrm.prompts import NAMED

    if name is not None and name not in NAMED:
        raise InputError(f"there is no set {name!r}; one of {', '.join(NAMED)}")
    chosen = [NAMED[name]] if name is not None else list(NAMED.values())
    if as_json:
        screen.print_json([named.to_json() for named in chosen])
    elif name is None:
        rows = [
            [
                named.name,
                named.measures,
                ", ".join(named.counts),
                ", ".join(map(str, named.counts.values())),
                named.licence,
            ]
            for named in chosen
        ]
        columns = ["name", "measures", "variants", "samples", "licence"]
        screen.print_rows("named sets (`cmrm sets NAME` shows files and sources)", columns, rows)
    else:
        for field, value in chosen[0].to_json().items():
            text = value
            if isinstance(value, dict):
                text = ", ".join(f"{key}: {part}" for key, part in value.items())
            typer.echo(f"{field:9s} {text}")
