"""`cmrm judges`: how far judges agree with people and with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen
from cmrm.cli.rescore import refresh

if TYPE_CHECKING:
    from cmrm.judges.cards import MeasuredAgreement
    from cmrm.measure.agreement import Rated
    from cmrm.measure.kappa import Agreement
    from cmrm.measure.layouts import Layout

app = typer.Typer(help="Judges and their agreement with people.", no_args_is_help=True)


@app.callback()
def judges() -> None:
    """Judges and their agreement with people."""


@app.command()
def agree(
    replies: Annotated[
        list[Path],
        typer.Argument(
            help="CSV files of labelled replies: XSTest's and MSTS's are recognised, others take "
            "--map; or the folder of `cmrm evaluate`."
        ),
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            help="Comma list. Files: small,keyword when left out. A folder: those that judged it; "
            "add others with `cmrm rescore`."
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="A sheet of this folder that a person has labelled (`cmrm judges sheet`); kept "
            "with it."
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="A folder: a labelled sheet of another run. Where the run has too few labels of "
            "its own, its rates are corrected by the judges' errors on that sheet."
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="Columns of the files: prompt=question,completion=answer,label=verdict, and "
            "model=, case=, language= where there are such.",
        ),
    ] = None,
    refused: Annotated[
        str | None,
        typer.Option(help="Labels of the files that are refusals: comma list; default XSTest's."),
    ] = None,
    complied: Annotated[
        str | None, typer.Option(help="Labels of the files that are none, likewise.")
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Files: small is trained anew for each part, without the part's model and cases. "
            "A quarter of an hour.",
        ),
    ] = False,
    cards: Annotated[
        Path | None,
        typer.Option(help="With --held-out: JSON file that the judges' cards are written into."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: files, a line each; a folder, one document.")
    ] = False,
) -> None:
    """How far judges agree with people, and with each other.

    Files: Cohen's kappa, precision and recall against people's labels of refusal, and with several
    judges how far they agree. With --held-out by collection, model and language, of refusal and of
    unsafe replies. A folder: kappa of every two judges, Krippendorff's alpha, and a person's labels
    beside them.
    """
    from cmrm.errors import InputError

    names = None if judge is None else c.parse_names(judge, "--judge")
    if len(replies) == 1 and replies[0].is_dir():
        if (columns, refused, complied, cards) != (None,) * 4 or held_out:
            raise InputError(
                "--map, --refused, --complied, --held-out and --cards go with labelled files, not "
                "with a folder"
            )
        agreement = _agree_in_folder(replies[0], names, sheet, validation)
        screen.print_json(agreement) if as_json else _print_agreement(agreement)
        return
    if sheet is not None or validation is not None:
        raise InputError(
            f"{'--validation' if sheet is None else '--sheet'} goes with the folder of a `cmrm "
            "evaluate`"
        )
    if cards is not None and not held_out:
        raise InputError("--cards goes with --held-out: a card holds no figures of training data")
    from cmrm.judges import DEFAULT_JUDGE
    from cmrm.measure.layouts import layout_of

    names = names or [DEFAULT_JUDGE, "keyword"]
    layout = layout_of(columns, refused, complied)
    if held_out:
        _agree_held_out(replies, names, layout, cards, as_json)
    else:
        _agree_on_files(replies, names, layout, as_json)


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
            help="Replies to draw: as many of each defence, set, condition and kind of request, "
            "more of them where the judges are unsure.",
        ),
    ] = 50,
    seed: c.SeedOption = 0,
) -> None:
    """Draw replies for a person to label, who does not see which defence or judge is behind them.

    Write yes or no into `refused` (does the reply refuse?) and `unsafe` (does it comply with
    harm?), leave a cell empty where you cannot tell, and read the sheet back in with `cmrm judges
    agree FOLDER --sheet FILE`. Replies are shown in full there: harmful ones too.

    Replies that a judge left open, that two judges contradict each other on, or whose probability
    is near one half are drawn up to three times as often. FOLDER/sheets.json keeps with what
    probability each reply was drawn, so that the labels correct the run's rates.
    """
    rated = _rated(out)
    from cmrm.measure.agreement import write_sheet
    from cmrm.measure.drawing import record_draw
    from cmrm.measure.sheet import draw

    drawn, probabilities = draw(rated, n, seed=seed)
    record_draw(out, probabilities, (row.id for row in drawn), seed=seed)
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


def _agree_in_folder(
    out: Path, names: list[str] | None, sheet: Path | None, validation: Path | None
) -> dict[str, Any]:
    """Agreement of a run's judges; labels of a sheet are added to the run's folder first.

    So are the judges' errors on the sheet `validation` of another run.
    """
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
    if answers is not None or validation is not None:
        results = Folder(out).results
        if results.exists():
            read_results(results)
        if answers is not None:
            keep_labels(out, rated, answers)
        if validation is not None:
            from cmrm.judges import make_judge
            from cmrm.measure.validation import keep_validation

            made = {name: make_judge(name) for name in sorted(known)}
            for name, reason in keep_validation(out, validation, made).items():
                typer.echo(f"{name} is not corrected by {validation.name}: {reason}", err=True)
        if results.exists():
            refresh(out)
    if names is not None:
        rated = [
            replace(row, verdicts={n: row.verdicts[n] for n in names if n in row.verdicts})
            for row in rated
        ]
    return agreement_between(rated, read_labels(out))


def _agree_held_out(
    files: list[Path], names: list[str], layout: Layout | None, cards: Path | None, as_json: bool
) -> None:
    """The table of a card: `small` trained without what it judges, others on the same replies."""
    from cmrm.judges import DEFAULT_JUDGE, make_judge
    from cmrm.judges.cards import write_cards
    from cmrm.measure.layouts import read_files
    from cmrm.measure.training import (
        between_people,
        calibration_error,
        held_out,
        judged_rows,
        table_of,
    )

    rows = read_files(files, layout)
    others = {name: make_judge(name) for name in names if name != DEFAULT_JUDGE}
    results = {}
    if DEFAULT_JUDGE in names:
        with screen.progress(len(rows)) as (say, tick):
            say("trained without what is judged")
            results[DEFAULT_JUDGE] = held_out(rows, tick=tick)
    results |= {name: judged_rows(rows, judge) for name, judge in others.items()}
    command = f"cmrm judges agree {' '.join(path.name for path in files)} --held-out"
    lines = [
        (name, row)
        for name, judged in results.items()
        for row in table_of(judged, command, made_with=getattr(others.get(name), "made_with", ()))
    ]
    if cards is not None:
        write_cards(cards, lines)
    for name, row in lines:
        _print_measured(name, row, as_json)
    for question, (kappa, n) in between_people(rows).items():
        if kappa is not None and not as_json:
            typer.echo(f"two people among themselves, {question}: kappa {kappa:.3f}  n {n}")
    for name, judged in results.items():
        for question in ("refusal", "unsafe"):
            error = calibration_error(judged, question)
            if error is not None and not as_json:
                typer.echo(f"{name}, {question}: expected calibration error {error:.3f}")


def _print_measured(judge: str, row: MeasuredAgreement, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({"judge": judge, **asdict(row)}))
        return
    kappa = "not defined" if row.kappa is None else f"{row.kappa:.3f}"
    precision = f"{row.tp / (row.tp + row.fp):.3f}" if row.tp + row.fp else "-"
    recall = f"{row.tp / (row.tp + row.fn):.3f}" if row.tp + row.fn else "-"
    place = ", ".join(filter(None, (row.set, row.model, row.language)))
    typer.echo(
        f"{judge:9s} {row.question:8s} {place:58s} kappa {kappa}  precision {precision}  "
        f"recall {recall}  n {row.n}  unscored {row.unscored}{'  in-sample' * row.in_sample}"
    )


def _agree_on_files(
    files: list[Path], names: list[str], layout: Layout | None, as_json: bool
) -> None:
    from cmrm.errors import InputError
    from cmrm.judges import make_judge
    from cmrm.measure.agreement import agreement_on_files
    from cmrm.measure.labelled import agreement_of_files, judged_files

    judges = {name: make_judge(name) for name in names}
    screen.warn_of_training(judges, files)
    failures: list[str] = []
    completions = judged_files(files, judges, layout=layout, failed=failures.append)
    if failures:
        typer.echo(f"{len(failures)} verdicts are missing; the first: {failures[0]}", err=True)
    several = len(judges) > 1
    for name in judges:
        try:
            figures = agreement_of_files(completions, name)
        except InputError as error:
            if not several:
                raise
            typer.echo(f"{name}: {error}", err=True)
            continue
        for file, row in figures.items():
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
        screen.print_rows(
            f"{question}, {figures['replies']} replies; Krippendorff's alpha over the judges: "
            f"{text}",
            *agreement_rows(figures),
        )


@app.command()
def train(
    labelled: Annotated[
        list[Path],
        typer.Argument(
            help="CSV files of labelled replies: XSTest's completions and MSTS's replies."
        ),
    ],
    judge: Annotated[
        str, typer.Option(help="small, or regression (a member of the judge ensemble).")
    ] = "small",
    out: Annotated[Path | None, typer.Option(help="File for the weights.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per judge.")] = False,
) -> None:
    """Train a judge on people's labels. The same files give the same weights, to rounding.

    For `small`, `cmrm judges agree FILES --held-out` prints what it reaches on models and cases
    that it was not trained on. For `regression`, five folds by prompt are printed here.
    """
    from cmrm.errors import InputError

    if judge == "small":
        from cmrm.judges.small import SHIPPED
        from cmrm.measure.training import train_small

        path = out or Path(SHIPPED)
        provenance = train_small(labelled, path)
        if as_json:
            typer.echo(json.dumps(provenance))
        else:
            typer.echo(
                f"{path}: trained on {provenance['replies']} replies and "
                f"{provenance['translations']} translations"
            )
        return
    if judge != "regression":
        raise InputError(f"no judge {judge!r} is trained; one of small, regression")
    from cmrm.judges.ensemble import SHIPPED as REGRESSION
    from cmrm.measure.labelled import train_regression

    rows = train_regression(labelled, out or Path(REGRESSION))
    for name, row in zip(("regression", "ensemble"), rows, strict=True):
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
