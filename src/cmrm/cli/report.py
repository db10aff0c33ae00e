"""`cmrm report`: pages of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

app = typer.Typer(help="Pages of finished runs.", no_args_is_help=True)


@app.command()
def page(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its results.json.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the page; default: the run's.")
    ] = None,
) -> None:
    """Write the page of a finished run again."""
    c.need_extra("a report", "eval", (*c.RESULTS, *c.REPORT))
    from cmrm.measure.schema import read_results
    from cmrm.report.page import write_report

    file = run / "results.json" if run.is_dir() else run
    path = write_report(read_results(file), out or file.parent)
    typer.echo(f"report: {path}")


@app.command()
def compare(
    left: Annotated[Path, typer.Argument(help="Folder of a run, or its results.json.")],
    right: Annotated[Path, typer.Argument(help="The run that is compared with it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the page.")] = Path(
        "comparison"
    ),
    match: Annotated[
        list[str] | None,
        typer.Option(
            help="LEFT=RIGHT: defences of different names that stand beside each other; repeatable."
        ),
    ] = None,
    seed: c.SeedOption = 0,
    as_json: c.JsonOption = False,
) -> None:
    """Two runs on one page: rates side by side, their differences, what else is not the same.

    Runs of `cmrm evaluate` are compared sample by sample, others by their rates.
    """
    c.need_extra("a comparison", "eval", (*c.RESULTS, *c.REPORT))
    from cmrm.report.compare import comparison, comparison_rows, read_run, write_comparison

    pairs = _pairs(match or [])
    document = comparison(read_run(left), read_run(right), pairs, seed=seed)
    path = write_comparison(document, out)
    if as_json:
        screen.print_json(document)
        return
    table = comparison_rows(document)
    title = f"{document['left']['name']} beside {document['right']['name']}"
    screen.print_rows(title, table.columns, table.rows)
    typer.echo(f"report: {path}")


def _pairs(texts: list[str]) -> dict[str, str]:
    """`LEFT=RIGHT` texts as a mapping.

    Raises:
        InputError: a text is no such pair.
    """
    from cmrm.errors import InputError

    pairs = {}
    for text in texts:
        one, equals, other = text.partition("=")
        if not equals or not one or not other:
            raise InputError(f"--match {text!r} is no LEFT=RIGHT, such as none=served")
        pairs[one] = other
    return pairs
