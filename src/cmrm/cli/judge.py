"""`cmrm judge`: replies that somebody else generated, judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.measure.replies import ReplyFile

SHOWN_REASONS = 5
"""Reasons of unscored replies that are printed for each judge."""
SHOWN_FILES = 8
"""Files whose columns are printed."""
SHOWN_GROUPS = 30
"""Rows of the printed table."""


def judge(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="CSV, TSV, JSONL, JSON, Parquet, xlsx, saved `datasets`; logs of Inspect; sample "
            "files of lmms-eval; result files of VLMEvalKit.",
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
            help="Columns by name: request=..., reply=..., label=..., category=..., model=..., "
            "language=...; a dotted name leads into nested cells.",
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="harmful or benign: the requests of rows without a label. "
            "FILE=harmful,FILE=benign says it for each file."
        ),
    ] = None,
    harmful: Annotated[
        str | None,
        typer.Option(help="Words in the label's column for harmful requests: comma list."),
    ] = None,
    benign: Annotated[
        str | None, typer.Option(help="Words for benign ones, likewise; others are in no rate.")
    ] = None,
    split: c.SplitOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json, verdicts.jsonl and report.html; verdicts are kept "
            "there, so that the same command asks for missing ones alone."
        ),
    ] = None,
    as_json: c.JsonOption = False,
) -> None:
    """Unsafe rate and over-refusal of replies that you already have; no model is run.

    A row needs a request, a reply, and whether the request is harmful or benign. Rates have 95 %
    Wilson intervals. Unscored replies are in no rate; the bounds say what they could change.
    """
    c.need_extra("`cmrm judge`", "eval", c.RESULTS)
    if out is not None:
        c.need_extra("`cmrm judge --out`", "eval", c.REPORT)
    from cmrm.errors import CmrmError
    from cmrm.judges import judge_maker
    from cmrm.measure.formats import read_reply_files
    from cmrm.measure.judged import (
        asked_about,
        failure_of_all,
        judge_replies,
        training_notes,
        write_verdicts,
    )
    from cmrm.measure.replies import FIELDS, Reading
    from cmrm.measure.reply_results import results_of_replies
    from cmrm.prompts.columns import parse_columns
    from cmrm.store import TextStore

    makers = {name: judge_maker(name) for name in c.parse_names(judges, "--judge")}
    constant, labels = _labels(label)
    reading = Reading(
        parse_columns(columns, FIELDS), constant, tuple(_words(harmful)), tuple(_words(benign))
    )
    _check_folder(out)
    read = read_reply_files(files, reading, labels=labels, split=split)
    _print_columns(read)
    notes = training_notes(makers, dict(zip((file.name for file in read), files, strict=True)))
    replies = [reply for file in read for reply in file.replies]
    store = None if out is None else TextStore(out / "verdicts.db")
    with screen.progress(asked_about(replies) * len(makers)) as (say, tick):
        judgements = judge_replies(replies, makers, store=store, say=say, tick=tick)
    if out is not None:
        write_verdicts(out / "verdicts.jsonl", replies, judgements)
    failure = failure_of_all(replies, judgements)
    if failure is not None:
        raise CmrmError(f"every verdict failed; the first: {failure}")
    results = results_of_replies(read, judgements, notes=notes)
    if out is not None:
        from cmrm.files import write_json
        from cmrm.report.page import write_report

        write_json(out / "results.json", results)
        typer.echo(f"report: {write_report(results, out)}", err=as_json)
    if as_json:
        screen.print_json(results)
    else:
        _print(results)
        if out is not None:
            screen.next_step("cmrm diagnose MODEL --data requests.csv (your own model)")
    _print_failures(results, kept=out is not None)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _labels(text: str | None) -> tuple[str | None, dict[str, str]]:
    """`harmful` as the label of all files; `a.csv=harmful,b.csv=benign` as a label for each.

    Raises:
        InputError: a label is neither, a file is named twice, or both forms are mixed.
    """
    from cmrm.errors import InputError
    from cmrm.prompts.labels import checked_label

    if text is None or "=" not in text:
        return checked_label(text), {}
    labels: dict[str, str] = {}
    for part in _words(text):
        file, equals, word = (piece.strip() for piece in part.rpartition("="))
        if not equals or not file or file in labels:
            raise InputError(
                f"--label {text[:60]!r}: name each file once, as in FILE=harmful,FILE=benign"
            )
        labels[file] = checked_label(word) or ""
    return None, labels


def _check_folder(out: Path | None) -> None:
    """Raise where a folder holds results of another command, which would be overwritten."""
    from cmrm.errors import InputError
    from cmrm.measure.schema import read_results

    path = None if out is None else out / "results.json"
    if path is None or not path.exists():
        return
    try:
        own = read_results(path)["kind"] == "replies"
    except InputError:
        own = False
    if not own:
        raise InputError(
            f"{path} is of another command or version, and would be lost; name another folder "
            "with --out"
        )


def _print_columns(files: Sequence[ReplyFile]) -> None:
    """What was read from which column, on standard error."""
    for file in files[:SHOWN_FILES]:
        kinds = [reply.kind for reply in file.replies]
        columns = ", ".join(f"{field} from {column!r}" for field, column in file.columns.items())
        typer.echo(
            f"{file.name}: {len(kinds)} replies, {kinds.count('harmful')} of them to harmful and "
            f"{kinds.count('benign')} to benign requests; {columns}",
            err=True,
        )
    if len(files) > SHOWN_FILES:
        typer.echo(f"and {len(files) - SHOWN_FILES} more files", err=True)


def _print(results: Mapping[str, Any]) -> None:
    from cmrm.report.tables import agreement_lines, group_table, short_rate

    columns, rows = group_table(results, short_rate)
    screen.print_rows(
        "per cent [95 % Wilson interval] +unscored replies (rate if none or all of them counted)",
        columns, rows[:SHOWN_GROUPS],
    )  # fmt: skip
    if len(rows) > SHOWN_GROUPS:
        typer.echo(f"and {len(rows) - SHOWN_GROUPS} more rows; --json and --out give all of them")
    screen.print_judges(results)
    for line in agreement_lines(results):
        typer.echo(line)
    for name, reasons in results["unscored_reasons"].items():
        for reason, count in list(reasons.items())[:SHOWN_REASONS]:
            typer.echo(f"unscored by {name}: {count}, {reason}")
        rest = list(reasons.values())[SHOWN_REASONS:]
        if rest:
            typer.echo(f"unscored by {name}: {sum(rest)} for {len(rest)} other reasons")
    for data in results["sets"]:
        for note in data["notes"]:
            typer.echo(f"{data['name']}: {note}")
        if data["skipped"]:
            typer.echo(
                f"{data['name']}: {data['skipped']} samples left out; the first: "
                f"{data['skipped_first']}"
            )


def _print_failures(results: Mapping[str, Any], *, kept: bool) -> None:
    """Which judges failed, on standard error."""
    remedy = (
        "the same command asks for these alone"
        if kept
        else "with --out FOLDER, the same command asks for these alone"
    )
    for name, failed in results["judge_failures"].items():
        typer.echo(
            f"{name} failed on {failed['n']} replies, which are unscored; {remedy}; the first: "
            f"{failed['first']}",
            err=True,
        )
