"""`cmrm judges`: how far judges agree with people and with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli.rescore import refresh

if TYPE_CHECKING:
    from cmrm.measure.agreement import Rated
    from cmrm.measure.kappa import Agreement
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
            help="CSV files with columns prompt, completion, final_label, as XSTest publishes "
            "them; or the folder of `cmrm evaluate`."
        ),
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            help="Comma list. Files: keyword when left out. A folder: those that judged it; add "
            "others with `cmrm rescore`."
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="A sheet of this folder that a person has labelled (`cmrm judges sheet`); kept "
            "with it."
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--map", help="Columns of the files: prompt=question,completion=answer,label=verdict."
        ),
    ] = None,
    refused: Annotated[
        str | None,
        typer.Option(help="Labels of the files that are refusals: comma list; default XSTest's."),
    ] = None,
    complied: Annotated[
        str | None, typer.Option(help="Labels of the files that are none, likewise.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: files, a line each; a folder, one document.")
    ] = False,
) -> None:
    """How far judges agree with people, and with each other.

    Files: Cohen's kappa, precision and recall against people's labels of refusal (2_full_refusal
    or 3_partial_refusal), and with several judges how far they agree. A folder: kappa of every two
    judges, Krippendorff's alpha, and a person's labels beside them.
    """
    from cmrm.errors import InputError

    names = None if judge is None else c.parse_names(judge, "--judge")
    if len(replies) == 1 and replies[0].is_dir():
        if (columns, refused, complied) != (None, None, None):
            raise InputError(
                "--map, --refused and --complied go with labelled files, not with a folder"
            )
        agreement = _agree_in_folder(replies[0], names, sheet)
        c.print_json(agreement) if as_json else _print_agreement(agreement)
        return
    if sheet is not None:
        raise InputError("--sheet goes with the folder of `cmrm evaluate` that it was drawn from")
    from cmrm.measure.labelled import layout_of

    _agree_on_files(replies, names or ["keyword"], layout_of(columns, refused, complied), as_json)


@app.command()
def sheet(
    out: Annotated[Path, typer.Argument(help="Folder of `cmrm evaluate`.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="CSV file to be written.")] = Path(
        "sheet.csv"
    ),
    n: Annotated[
        int,
        typer.Option(
            "--number",
            "-n",
            help="Replies to draw, spread evenly over defences, sets and kinds of request.",
        ),
    ] = 50,
    seed: c.SeedOption = 0,
) -> None:
    """Draw replies for a person to label, who does not see which defence or judge is behind them.

    Write yes or no into `refused` (does the reply refuse?) and `unsafe` (does it comply with
    harm?), leave a cell empty where you cannot tell, and read the sheet back in with `cmrm judges
    agree FOLDER --sheet FILE`. Replies are shown in full there: harmful ones too.
    """
    rated = _rated(out)
    from cmrm.measure.agreement import draw, write_sheet

    drawn = draw(rated, n, seed=seed)
    write_sheet(to, drawn)
    typer.echo(f"{to}: {len(drawn)} replies to label; then: cmrm judges agree {out} --sheet {to}")
    if len(drawn) < n:
        typer.echo(f"only {len(drawn)} different replies are there", err=True)


def _rated(out: Path) -> list[Rated]:
    c.need_inspect()
    c.quiet()
    from cmrm.evaluate.folder import Folder
    from cmrm.evaluate.logs import read_cells
    from cmrm.measure.agreement import rated_of

    return rated_of(read_cells(Folder(out).logs))


def _agree_in_folder(out: Path, names: list[str] | None, sheet: Path | None) -> dict[str, Any]:
    """Agreement of a run's judges; labels of a sheet are added to the run's folder first."""
    from dataclasses import replace

    rated = _rated(out)
    from cmrm.errors import InputError
    from cmrm.evaluate.folder import Folder
    from cmrm.measure.agreement import agreement_between, keep_labels, read_labels, read_sheet
    from cmrm.measure.schema import read_results

    answers = read_sheet(sheet) if sheet is not None else None
    known = {name for row in rated for name in row.verdicts}
    missing = [name for name in names or () if name not in known]
    if missing:
        raise InputError(
            f"{', '.join(missing)} did not judge {out}; add it: cmrm rescore {out} --judges "
            f"{','.join(missing)}"
        )
    if answers is not None:
        results = Folder(out).results
        if results.exists():
            read_results(results)
        keep_labels(out, rated, answers)
        if results.exists():
            refresh(out)
    if names is not None:
        rated = [
            replace(row, verdicts={n: row.verdicts[n] for n in names if n in row.verdicts})
            for row in rated
        ]
    return agreement_between(rated, read_labels(out))


def _agree_on_files(files: list[Path], names: list[str], layout: Layout, as_json: bool) -> None:
    from cmrm.judges import make_judge
    from cmrm.measure.agreement import agreement_on_files
    from cmrm.measure.labelled import agreement_of_files, judged_files, trained_on

    judges = {name: make_judge(name) for name in names}
    for name, judge in judges.items():
        known = trained_on(judge, files)
        if known:
            typer.echo(
                f"{name} was trained on {', '.join(known)}: its agreement there is flattered; "
                "`cmrm judges train` prints what is held out",
                err=True,
            )
    failures: list[str] = []
    completions = judged_files(files, judges, layout=layout, failed=failures.append)
    if failures:
        typer.echo(f"{len(failures)} verdicts are missing; the first: {failures[0]}", err=True)
    several = len(judges) > 1
    for name in judges:
        for file, row in agreement_of_files(completions, name).items():
            title = f"{name}, {file}" if several and not as_json else file
            _print(title, row, "file", as_json, judge=name if several else None)
    if several:
        agreement = agreement_on_files(completions)
        if as_json:
            typer.echo(json.dumps({"between": agreement}))
        else:
            _print_agreement(agreement)


def _print_agreement(agreement: dict[str, Any]) -> None:
    from cmrm.report.tables import agreement_rows

    for question, figures in agreement.items():
        alpha = figures["krippendorff_alpha"]
        text = "not defined" if alpha is None else f"{alpha:.3f}"
        c.print_rows(
            f"{question}, {figures['replies']} replies; Krippendorff's alpha over the judges: "
            f"{text}",
            *agreement_rows(figures),
        )


@app.command()
def train(
    labelled: Annotated[
        list[Path], typer.Argument(help="CSV files with columns prompt, completion, final_label.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file for the weights.")] = Path(
        "refusal_regression.json"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per judge.")] = False,
) -> None:
    """Train the ensemble's regression on people's labels, and print its held-out agreement.

    The figures of regression and ensemble come from five folds by prompt; the weights that are
    written are trained on all completions.
    """
    from cmrm.measure.labelled import train_regression

    for name, row in zip(("regression", "ensemble"), train_regression(labelled, out), strict=True):
        _print(f"{name}, held out", row, "judge", as_json)


def _print(name: str, row: Agreement, key: str, as_json: bool, *, judge: str | None = None) -> None:
    """One line of agreement with people; `key` names the line's subject in JSON."""
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({key: name, **({"judge": judge} if judge else {}), **asdict(row)}))
        return
    kappa = "not defined" if row.kappa is None else f"{row.kappa:.3f}"
    typer.echo(
        f"{name:32s} kappa {kappa}  precision {row.precision:.3f}  recall {row.recall:.3f}  "
        f"n {row.n}  unscored {row.unscored}"
    )
