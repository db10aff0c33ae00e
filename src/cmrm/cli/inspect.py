"""`cmrm inspect`: what is in an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cmrm.cli import options as c


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Shift artifact (.safetensors).")],
    as_json: c.JsonOption = False,
) -> None:
    """Provenance, recommended use, norm and explained ratio per decoder layer."""
    from cmrm.shift.artifact import FORMAT, ShiftVectors

    shift = ShiftVectors.load(artifact)
    held, use = asdict(shift.provenance), asdict(shift.recommended)
    if as_json:
        c.print_json({"format": FORMAT, "provenance": held, "recommended": use})
        return
    norms, ratios = held.pop("norms"), held.pop("explained_ratio")
    rows = [[name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)]
            for name, value in held.items()]  # fmt: skip
    rows += [[f"recommended {name}", "all" if value is None else str(value)] for name, value in use.items()]
    c.print_rows(f"{artifact} ({FORMAT})", ["field", "value"], rows)
    typer.echo(f"norm             {c.sparkline(norms)}  {min(norms):.3g} to {max(norms):.3g}")
    typer.echo(f"explained ratio  {c.sparkline(ratios)}  {min(ratios):.2f} to {max(ratios):.2f}")
    c.print_rows(
        "per decoder layer",
        ["layer", "norm", "explained ratio"],
        [[str(k), f"{n:.4g}", f"{r:.3f}"] for k, (n, r) in enumerate(zip(norms, ratios, strict=True))],
    )
