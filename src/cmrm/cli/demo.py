"""`cmrm demo`: the whole loop on real weights, offline; and the commands that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmrm.cli.options import progress_bar, quiet

app = typer.Typer(help="Measure, restore and show, on a VLM that is assembled offline.", invoke_without_command=True)


@app.callback()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and the PNGs.")] = Path("out"),
    full: Annotated[bool, typer.Option("--full", help="The whole test split instead of a stratified part.")] = False,
) -> None:
    """Assemble the demo VLM, measure what an image costs in safety, restore it with CMRM, and write a report."""
    if context.invoked_subcommand is not None:
        return
    from cmrm.demo.loop import prepare_out

    prepare_out(out)
    quiet(offline=True)
    from rich.console import Console

    from cmrm.demo.loop import run_demo
    from cmrm.demo.settings import FULL, QUICK

    console = Console()
    progress = progress_bar(console)
    with progress:
        task = progress.add_task("starting", total=None)
        results = run_demo(
            out,
            FULL if full else QUICK,
            say=lambda text: progress.update(task, description=text),
            tick=lambda n: progress.advance(task, n),
            start=lambda total: progress.update(task, total=total),
        )
    print_table(results, console)
    console.print(f"report: {out / 'report.html'}   results: {out / 'results.json'}", soft_wrap=True)


def print_table(results: dict[str, Any], console: Any) -> None:
    """The paper's table for the demo VLM."""
    from rich.table import Table

    from cmrm.report.page import table_rows

    table = Table(
        title=f"cmrm demo, {results['settings']['budget']['name']} run, n = {results['conditions']['query']['n']}"
    )
    for column in ("input", "unsafe rate", "gap closed", "over-refusal", "easy-VQA accuracy"):
        table.add_column(column, overflow="fold")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)


@app.command()
def train(
    emoji: Annotated[Path, typer.Option(help="emoji-datasource-twitter 16.0.0 as `npm pack` fetches it.")],
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints and weights; a stopped run goes on from there.")
    ] = Path("train"),
) -> None:
    """Train the demo VLM's weights anew: text-only alignment, vision tower, connector. Hours on a laptop; resumable."""
    quiet(offline=True)
    from cmrm.demo.train.recipe import train_demo

    typer.echo(f"weights: {train_demo(work, emoji)}")


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="Folder for the table of tries and its resumable state.")] = Path(
        "out-tune"
    ),
) -> None:
    """Try steering settings on the anchor split (never on test) and print the table that the demo's setting was chosen from."""
    from cmrm.demo.loop import prepare_out

    prepare_out(out)
    quiet(offline=True)
    from rich.console import Console

    from cmrm.demo.train.tune import tune_demo

    console = Console()
    tune_demo(out, say=lambda text: console.print(text, soft_wrap=True))


@app.command()
def card() -> None:
    """Measure the demo VLM alone (all conditions, over-refusal, easy-VQA) and print the figures of its model card."""
    quiet(offline=True)
    from cmrm.demo.train.card import print_card

    print_card()
