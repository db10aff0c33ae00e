"""`cmrm demo`: the demo VLM measured offline; and the commands that made its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

app = typer.Typer(
    help="Measure, restore and show, on a VLM that is assembled offline.",
    invoke_without_command=True,
)

PURPOSE, EXTRA = "`cmrm demo`", "demo"
LIBRARIES = ("easy_vqa", "gguf", "peft", "sklearn", *c.RESULTS, *c.REPORT)


@app.callback()
def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, report.html, table.md and the figures.")
    ] = Path("out"),
    full: Annotated[
        bool, typer.Option("--full", help="The whole test split instead of a stratified part.")
    ] = False,
) -> None:
    """Assemble the demo VLM, measure what an image costs in safety, and restore it with CMRM.

    A run that is stopped continues with the same command.
    """
    if context.invoked_subcommand is not None:
        return
    c.need_extra(PURPOSE, EXTRA, LIBRARIES)
    from cmrm.demo.loop import prepare_out

    prepare_out(out)
    c.quiet(offline=True)
    from cmrm.demo.loop import run_demo
    from cmrm.demo.settings import FULL, QUICK
    from cmrm.report.balance import balance_table
    from cmrm.report.headline import headline_table

    with screen.reporter() as shown:
        results = run_demo(
            out, FULL if full else QUICK, say=shown.name, tick=shown.advance, start=shown.size
        )
    size = results["settings"]["budget"]["name"]
    screen.print_rows(f"cmrm demo, {size} run, 95 % intervals", *headline_table(results))
    screen.print_rows("what each level gives back, and what it costs", *balance_table(results))
    screen.print_judges(results)
    typer.echo(f"report: {out / 'report.html'}   results: {out / 'results.json'}")
    screen.next_step("cmrm diagnose MODEL --data requests.csv", "cmrm ui demo")


@app.command()
def train(
    emoji: Annotated[
        Path, typer.Option(help="emoji-datasource-twitter 16.0.0 as `npm pack` fetches it.")
    ],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and weights.")] = Path("train"),
) -> None:
    """Train the demo VLM's weights from the start: text-only alignment, vision tower, connector.

    This takes hours on a laptop. A run that is stopped continues with the same command.
    """
    c.need_extra("`cmrm demo train`", EXTRA, LIBRARIES)
    c.quiet(offline=True)
    from cmrm.demo.train.recipe import train_demo

    typer.echo(f"weights: {train_demo(work, emoji)}")


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="Folder for the table and its resumable state.")] = Path(
        "out-tune"
    ),
) -> None:
    """Measure steering settings on the anchor split, never on test, and print their table."""
    c.need_extra("`cmrm demo tune`", EXTRA, LIBRARIES)
    from cmrm.demo.loop import prepare_out

    prepare_out(out)
    c.quiet(offline=True)
    from cmrm.demo.train.tune import tune_demo

    tune_demo(out, say=typer.echo)


@app.command()
def card() -> None:
    """Measure the demo VLM without defences, and print the figures of its model card."""
    c.need_extra("`cmrm demo card`", EXTRA, LIBRARIES)
    c.quiet(offline=True)
    from cmrm.demo.train.card import print_card

    print_card()
