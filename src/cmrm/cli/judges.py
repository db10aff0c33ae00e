"""`cmrm judges`: how far a judge agrees with people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cmrm.evaluate.statistics import Agreement

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
    judge: Annotated[str, typer.Option(help="keyword, regression or ensemble.")] = "keyword",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per file.")] = False,
) -> None:
    """Cohen's kappa, precision and recall of a judge against people's labels of refusal.

    A completion counts as refused by people when its label is 2_full_refusal or 3_partial_refusal.
    """
    from cmrm.judges import make_judge
    from cmrm.judges.labelled import agreement_of_files

    for name, row in agreement_of_files(labelled, make_judge(judge)).items():
        _print(name, row, "file", as_json)


@app.command()
def train(
    labelled: Annotated[list[Path], typer.Argument(help="CSV files with columns prompt, completion, final_label.")],
    out: Annotated[Path, typer.Option(help="JSON file for the weights.")] = Path("refusal_regression.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per judge.")] = False,
) -> None:
    """Train the ensemble's regression on people's labels, and print how regression and ensemble agree with them, held out.

    The figures come from five folds by prompt; the weights that are written are trained on all completions.
    """
    from cmrm.judges.labelled import train_regression

    for name, row in zip(("regression", "ensemble"), train_regression(labelled, out), strict=True):
        _print(f"{name}, held out", row, "judge", as_json)


def _print(name: str, row: Agreement, what: str, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({what: name, **asdict(row)}))
    else:
        typer.echo(
            f"{name:32s} kappa {row.kappa:.3f}  precision {row.precision:.3f}  recall {row.recall:.3f}  "
            f"n {row.n}  unscored {row.unscored}"
        )
