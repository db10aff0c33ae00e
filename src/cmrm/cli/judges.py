"""`cmrm judges`: how far a judge agrees with people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Judges and their agreement with people.", no_args_is_help=True)


@app.callback()
def judges() -> None:
    """Judges and their agreement with people."""


@app.command()
def agree(
    labelled: Annotated[
        list[Path],
        typer.Argument(help="CSV files with columns prompt, completion, final_label, as XSTest publishes them."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per file.")] = False,
) -> None:
    """Cohen's kappa, precision and recall of the keyword judge against people's labels of refusal.

    A completion counts as refused by people when its label is 2_full_refusal or 3_partial_refusal.
    """
    from dataclasses import asdict

    from cmrm.judges.labelled import agreement_of_files

    rows = agreement_of_files(labelled)
    for name, row in rows.items():
        if as_json:
            typer.echo(json.dumps({"file": name, **asdict(row)}))
        else:
            typer.echo(
                f"{name:32s} kappa {row.kappa:.3f}  precision {row.precision:.3f}  recall {row.recall:.3f}  "
                f"n {row.n}  unscored {row.unscored}"
            )
