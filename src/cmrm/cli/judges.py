"""`cmrm judges`: how far judges agree with people and with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c

if TYPE_CHECKING:
    from cmrm.measure.agreement import Rated
    from cmrm.measure.rates import Agreement
    from cmrm.measure.labelled import Layout

app = typer.Typer(help="Judges and their agreement with people.", no_args_is_help=True)


@app.callback()
def judges() -> None:
    """Judges and their agreement with people."""


@app.command()
def agree(
    replies: Annotated[
        list[Path],
        typer.Argument(
            help="CSV files with columns prompt, completion, final_label, as XSTest publishes them; or the folder of `cmrm evaluate`."
        ),
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            help="Comma list. Files: keyword when left out. A folder: those that judged it; add others with `cmrm rescore`."
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="A sheet of this folder that a person has labelled (`cmrm judges sheet`); kept with it."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--map", help="Columns of the files: prompt=question,completion=answer,label=verdict.")
    ] = None,
    refused: Annotated[
        str | None, typer.Option(help="Labels of the files that are refusals: comma list. XSTest's otherwise.")
    ] = None,
    complied: Annotated[str | None, typer.Option(help="Labels of the files that are none, likewise.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: files, a line each; a folder, one document.")
    ] = False,
) -> None:
    """How far judges agree with people, and with each other.

    Files: Cohen's kappa, precision and recall against people's labels of refusal (2_full_refusal or 3_partial_refusal), and with several
    judges how far they agree. A folder: kappa of every two judges, Krippendorff's alpha, and a person's labels beside them.
    """
    from cmrm.errors import InputError

    wanted = [name.strip() for name in judge.split(",") if name.strip()] if judge is not None else None
    if wanted == []:
        raise InputError("--judge names no judge")
    if len(replies) == 1 and replies[0].is_dir():
        if (columns, refused, complied) != (None, None, None):
            raise InputError("--map, --refused and --complied go with labelled files, not with a folder")
        found = _agree_in_grid(replies[0], wanted, sheet)
        c.print_json(found) if as_json else _print_agreement(found)
        return
    if sheet is not None:
        raise InputError("--sheet goes with the folder of `cmrm evaluate` that it was drawn from")
    from cmrm.measure.labelled import layout_of

    _agree_on_files(replies, wanted or ["keyword"], layout_of(columns, refused, complied), as_json)


@app.command()
def sheet(
    out: Annotated[Path, typer.Argument(help="Folder of `cmrm evaluate`.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="CSV file to be written.")] = Path("sheet.csv"),
    n: Annotated[
        int,
        typer.Option("--number", "-n", help="Replies to draw, spread evenly over defences, sets and kinds of request."),
    ] = 50,
    seed: c.SeedOption = 0,
) -> None:
    """Draw replies for a person to label, without saying which defence or judge is behind them.

    Write yes or no into `refused` (does the reply refuse?) and `unsafe` (does it comply with harm?), leave a cell empty where you cannot
    tell, and read the sheet back in with `cmrm judges agree FOLDER --sheet FILE`. Replies are shown in full there: harmful ones too.
    """
    from cmrm.measure.agreement import draw, write_sheet

    drawn = draw(_rated(out), n, seed=seed)
    write_sheet(to, drawn)
    typer.echo(f"{to}: {len(drawn)} replies to label; then: cmrm judges agree {out} --sheet {to}")
    if len(drawn) < n:
        typer.echo(f"only {len(drawn)} different replies are there", err=True)


def _rated(out: Path) -> list[Rated]:
    c.need_inspect()
    c.quiet()
    from cmrm.measure.agreement import rated_of
    from cmrm.evaluate.grid import read_cells

    return rated_of(read_cells(out / "logs"))


def _agree_in_grid(out: Path, wanted: list[str] | None, sheet: Path | None) -> dict[str, Any]:
    from dataclasses import replace

    from cmrm.errors import InputError
    from cmrm.measure.agreement import agreement_between, keep_labels, read_labels, read_sheet
    from cmrm.evaluate.results import read_results

    rated = _rated(out)
    labels = read_sheet(sheet) if sheet is not None else None
    if wanted is not None:
        known = {name for one in rated for name in one.said}
        missing = [name for name in wanted if name not in known]
        if missing:
            raise InputError(
                f"{', '.join(missing)} did not judge {out}; add it: cmrm rescore {out} --judges {','.join(missing)}"
            )
    if labels is not None:
        if (out / "results.json").exists():
            read_results(out)
        keep_labels(out, rated, labels)
        _refresh(out)
    if wanted is not None:
        rated = [replace(one, said={name: one.said[name] for name in wanted if name in one.said}) for one in rated]
    return agreement_between(rated, read_labels(out))


def _refresh(out: Path) -> None:
    """Results and report with the labels that were just read, where the run is finished."""
    from cmrm.evaluate.results import refreshed
    from cmrm.files import write_json
    from cmrm.report.grid import write_grid_report

    if not (out / "results.json").exists():
        return
    found = refreshed(out)
    write_json(out / "results.json", found)
    write_grid_report(found, out)


def _agree_on_files(files: list[Path], wanted: list[str], layout: Layout, as_json: bool) -> None:
    from cmrm.measure.agreement import agreement_on_files
    from cmrm.judges import make_judge
    from cmrm.measure.labelled import agreement_of_files, judged_files, trained_on

    made = {name: make_judge(name) for name in wanted}
    for name, judge in made.items():
        known = trained_on(judge, files)
        if known:
            typer.echo(
                f"{name} was trained on {', '.join(known)}: its agreement there is flattered; `cmrm judges train` prints what "
                "is held out",
                err=True,
            )
    failures: list[str] = []
    judged = judged_files(files, made, layout=layout, failed=failures.append)
    if failures:
        typer.echo(f"{len(failures)} verdicts are missing; the first: {failures[0]}", err=True)
    for name in made:
        for file, row in agreement_of_files(judged, name).items():
            alone = len(made) == 1 or as_json
            _print(file if alone else f"{name}, {file}", row, "file", as_json, judge=name if len(made) > 1 else None)
    if len(made) > 1:
        found = agreement_on_files(judged)
        typer.echo(json.dumps({"between": found})) if as_json else _print_agreement(found)


def _print_agreement(found: dict[str, Any]) -> None:
    from cmrm.report.grid import agreement_rows

    for question, held in found.items():
        header, rows = agreement_rows(held)
        alpha = held["krippendorff_alpha"]
        said = "not defined" if alpha is None else f"{alpha:.3f}"
        c.print_rows(
            f"{question}, {held['replies']} replies; Krippendorff's alpha over the judges: {said}", header, rows
        )


@app.command()
def train(
    labelled: Annotated[list[Path], typer.Argument(help="CSV files with columns prompt, completion, final_label.")],
    out: Annotated[Path, typer.Option(help="JSON file for the weights.")] = Path("refusal_regression.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per judge.")] = False,
) -> None:
    """Train the ensemble's regression on people's labels, and print how regression and ensemble agree with them, held out.

    The figures come from five folds by prompt; the weights that are written are trained on all completions.
    """
    from cmrm.measure.labelled import train_regression

    for name, row in zip(("regression", "ensemble"), train_regression(labelled, out), strict=True):
        _print(f"{name}, held out", row, "judge", as_json)


def _print(name: str, row: Agreement, what: str, as_json: bool, *, judge: str | None = None) -> None:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({what: name, **({"judge": judge} if judge else {}), **asdict(row)}))
    else:
        typer.echo(
            f"{name:32s} kappa {'not defined' if row.kappa is None else f'{row.kappa:.3f}'}  precision {row.precision:.3f}  recall {row.recall:.3f}  "
            f"n {row.n}  unscored {row.unscored}"
        )
