"""`cmrm judge`: replies that somebody else generated, judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c

if TYPE_CHECKING:
    from cmrm.judges import Judgement

SHOWN_REASONS = 5


def judge(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="CSV, TSV, JSONL, JSON, Parquet or xlsx with requests and replies; logs of "
            "Inspect; sample files of lmms-eval; result files of VLMEvalKit."
        ),
    ],
    judges: Annotated[
        str,
        typer.Option("--judge", "--judges", help="Comma list of judges; see docs/judge.md."),
    ] = "small,keyword",
    columns: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="Columns that are not recognised: request=..., reply=..., label=..., "
            "category=..., model=..., language=...; a dotted name leads into nested cells.",
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="harmful or benign: of the requests whose row does not say."),
    ] = None,
    harmful: Annotated[
        str | None, typer.Option(help="Words of the label's column for harmful: comma list.")
    ] = None,
    benign: Annotated[
        str | None, typer.Option(help="Words of the label's column for benign: comma list.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json, verdicts.jsonl and report.html; verdicts are kept there "
            "and not asked for again."
        ),
    ] = None,
    as_json: c.JsonOption = False,
) -> None:
    """Unsafe rate and over-refusal of replies that you already have; no model is run.

    A row needs a request, a reply, and whether the request is harmful or benign. Rates carry 95 %
    Wilson intervals; unscored replies are in no rate, and the bounds say what they could change.
    """
    c.need_extra("`cmrm judge`", "eval", c.RESULTS)
    if out is not None:
        c.need_extra("`cmrm judge --out`", "eval", c.REPORT)
    from cmrm.errors import CmrmError
    from cmrm.judges import make_judge
    from cmrm.measure.formats import read_reply_files
    from cmrm.measure.judged import ASKED, judge_replies, results_of_replies, write_verdicts
    from cmrm.measure.replies import FIELDS, Reading
    from cmrm.prompts.columns import parse_columns
    from cmrm.store import TextStore

    names = c.parse_names(judges, "--judge")
    reading = Reading(
        parse_columns(columns, FIELDS), label, tuple(_words(harmful)), tuple(_words(benign))
    )
    replies = read_reply_files(files, reading)
    asked = sum(reply.kind in ASKED for reply in replies)
    made = {name: make_judge(name) for name in names}
    c.warn_of_training(made, files)
    store = None if out is None else TextStore(out / "verdicts.db")
    with c.progress(asked * len(made)) as (say, tick):
        say("judging")
        judgements = judge_replies(replies, made, store=store, tick=tick)
    if out is not None:
        write_verdicts(out / "verdicts.jsonl", replies, judgements)
    given = [j for row in judgements.values() for j in row if j is not None]
    if given and all(j.failed for j in given):
        raise CmrmError(f"every verdict failed; the first: {given[0].reason}")
    results = results_of_replies(replies, judgements)
    if out is not None:
        from cmrm.files import write_json
        from cmrm.report.page import write_report

        write_json(out / "results.json", results)
        typer.echo(f"report: {write_report(results, out)}", err=as_json)
    if as_json:
        c.print_json(results)
    else:
        _print(results, judgements)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _print(results: dict[str, Any], judgements: dict[str, list[Judgement | None]]) -> None:
    from cmrm.measure.judged import open_reasons
    from cmrm.report.tables import group_table, short_rate

    c.print_rows(
        f"{results['model']['id']}: per cent, 95 % intervals, +k: unscored, and the bounds",
        *group_table(results, short_rate),
    )
    c.print_judges(results)
    for data in results["sets"]:
        for note in data["notes"]:
            typer.echo(f"{data['name']}: {note}")
    for name, reasons in open_reasons(judgements).items():
        for reason, count in reasons[:SHOWN_REASONS]:
            typer.echo(f"{name} left open {count}: {reason}")
    for name, failure in results["judge_failures"].items():
        typer.echo(
            f"{name} failed on {failure['n']} replies; run the same command again with --out to "
            f"ask for these alone; the first: {failure['first']}",
            err=True,
        )
