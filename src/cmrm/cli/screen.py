"""What commands print: tables, JSON, notes on sets and judges, progress bars."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
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


def next_step(*commands: str) -> None:
    """What a user would do next, on standard error, so that output can be piped."""
    typer.echo(f"next: {'   or: '.join(commands)}", err=True)


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


class Bar:
    """A progress bar on a terminal: current step, share done, elapsed time."""

    def __init__(self, console: Any) -> None:
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
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, step: str, total: int | None = None) -> None:
        """A part begins, of so many prompts."""
        self._bar.reset(self._task, total=total, description=step)

    def name(self, step: str) -> None:
        """The current step of the same part."""
        self._bar.update(self._task, description=step)

    def size(self, total: int | None) -> None:
        """Prompts of the part."""
        self._bar.update(self._task, total=total)

    def advance(self, n: int) -> None:
        """So many prompts are done."""
        self._bar.advance(self._task, n)


EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


class Lines:
    """Progress where no bar can be drawn, as in a log: a line every `EVERY` seconds.

    `write` receives each line; nothing is said of what is over sooner.
    """

    def __init__(self, write: Callable[[str], None], every: float = EVERY) -> None:
        self.write = write
        self.every = every
        self.step, self.done = "starting", 0
        self.total: int | None = None
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, step: str, total: int | None = None) -> None:
        """A part begins, of so many prompts."""
        self.step, self.done, self.total = step, 0, total

    def name(self, step: str) -> None:
        """The current step of the same part."""
        self.step = step

    def size(self, total: int | None) -> None:
        """Prompts of the part."""
        self.total = total

    def advance(self, n: int) -> None:
        """So many prompts are done."""
        self.done += n

    def line(self) -> str:
        """`cmrm: 00:01:20 none: demo-original, 96 of 480`."""
        passed = str(timedelta(seconds=int(time.monotonic() - self._start))).rjust(8, "0")
        of = "" if self.total is None else f" of {self.total}"
        count = f", {self.done}{of}" if self.done or self.total is not None else ""
        return f"cmrm: {passed} {self.step}{count}"

    def _speak(self) -> None:
        while not self._ended.wait(self.every):
            self.write(self.line())


def _write_line(text: str) -> None:
    typer.echo(text, err=True)


def reporter() -> Bar | Lines:
    """Progress on standard error: a bar on a terminal, lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines(_write_line)


@contextmanager
def progress(total: int | None) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Progress over `total` prompts, as (name the current step, advance by n)."""
    with reporter() as shown:
        shown.size(total)
        yield shown.name, shown.advance


@contextmanager
def progress_in_parts() -> Iterator[
    tuple[Callable[[str, int | None], None], Callable[[int], None]]
]:
    """Progress that starts again with each part, as (begin a part of so many prompts, advance by
    n)."""
    with reporter() as shown:
        yield shown.begin, shown.advance


def sparkline(values: Sequence[float], low: float = 0.0, high: float | None = None) -> str:
    """Values as a row of bars from `low` to `high`, which is the largest value when None."""
    span = (max(values, default=low) if high is None else high) - low
    bars = "▁▂▃▄▅▆▇█"
    return "".join(
        bars[min(7, int(8 * (value - low) / span))] if span > 0 and value > low else bars[0]
        for value in values
    )
