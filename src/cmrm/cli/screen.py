"""What commands print: tables, JSON, notes on sets and judges, progress bars."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cmrm.judges import Judge
    from cmrm.prompts import Loaded


def print_notes(loaded: Loaded) -> None:
    """What a user has to know of a set, on standard error."""
    for note in loaded.notes:
        typer.echo(f"{loaded.name}: {note}", err=True)
    if loaded.skipped:
        count, first = len(loaded.skipped), loaded.skipped[0].reason
        typer.echo(f"{loaded.name}: {count} samples left out; the first: {first}", err=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=1))


FILE_COLUMNS = 180
"""Width of a table that goes into a file or a pipe."""


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; long cells are folded, never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_screen = sys.stdout.isatty() or "COLUMNS" in os.environ
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if on_screen else FILE_COLUMNS).print(table)


def print_judges(results: Mapping[str, Any]) -> None:
    """A line for each judge of results: its agreement with people."""
    from cmrm.report.judged import judge_lines

    for line in judge_lines(results):
        typer.echo(f"judged by {line}")


def warn_of_training(judges: Mapping[str, Judge], files: Sequence[Path]) -> None:
    """Say on stderr which judges were trained on which of the files."""
    from cmrm.measure.labelled import trained_on

    for name, judge in judges.items():
        known = trained_on(judge, files)
        if known:
            typer.echo(
                f"{name} was trained on {', '.join(known)}: its figures there are flattered; "
                "`cmrm judges agree --held-out` measures what it was not trained on",
                err=True,
            )


def progress_bar(console: Any) -> Any:
    """The progress bar: current step, share done, elapsed time."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


@contextmanager
def progress(total: int | None) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar on standard error over `total` prompts, as (name the current step, advance by n)."""
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)
        yield (lambda text: bar.update(task, description=text)), (lambda n: bar.advance(task, n))


@contextmanager
def progress_in_parts() -> Iterator[
    tuple[Callable[[str, int | None], None], Callable[[int], None]]
]:
    """A bar on standard error that starts again with each part, as (begin a part of so many
    prompts, advance by n)."""
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        yield (
            lambda name, total: bar.reset(task, total=total, description=name),
            lambda n: bar.advance(task, n),
        )


def sparkline(values: Sequence[float], low: float = 0.0, high: float | None = None) -> str:
    """Values as a row of bars from `low` to `high`, which is the largest value when None."""
    span = (max(values, default=low) if high is None else high) - low
    bars = "▁▂▃▄▅▆▇█"
    return "".join(
        bars[min(7, int(8 * (value - low) / span))] if span > 0 and value > low else bars[0]
        for value in values
    )
