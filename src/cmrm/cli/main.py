"""Entry point of `cmrm`. Commands import what they need when they run: `--help` stays quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cmrm import __version__
from cmrm.cli.check import check
from cmrm.cli.defenses import defenses
from cmrm.cli.demo import app as demo_app
from cmrm.cli.diagnose import diagnose
from cmrm.cli.doctor import doctor
from cmrm.cli.evaluate import evaluate
from cmrm.cli.export import app as export_app
from cmrm.cli.extract import extract
from cmrm.cli.families import families
from cmrm.cli.generate import generate
from cmrm.cli.inspect import inspect
from cmrm.cli.judge import judge
from cmrm.cli.judges import app as judges_app
from cmrm.cli.report import app as report_app
from cmrm.cli.reproduce import reproduce
from cmrm.cli.rescore import rescore
from cmrm.cli.serve import serve
from cmrm.cli.sets import sets
from cmrm.cli.sweep import sweep
from cmrm.cli.tune import tune
from cmrm.cli.ui import ui
from cmrm.errors import CmrmError

INTERRUPTED = 130

app = typer.Typer(
    help="Give a vision-language model back the safety alignment that an image takes from it.",
    epilog="Where to begin: cmrm doctor, cmrm demo, cmrm judge replies.jsonl, cmrm check MODEL",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(demo_app, name="demo")
for command in (
    judge, diagnose, extract, generate, tune, sweep, evaluate, rescore, reproduce, inspect, check,
    serve, ui, doctor, sets, defenses, families,
):  # fmt: skip
    app.command()(command)
app.add_typer(judges_app, name="judges")
app.add_typer(export_app, name="export")
app.add_typer(report_app, name="report")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cmrm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure and restore refusals of vision-language models."""


def run() -> None:
    """Run the command line.

    A `CmrmError` is printed as one line, exit code 2. After Ctrl-C a line says how to continue,
    exit code 130.
    """
    try:
        app()
    except CmrmError as error:
        print("cmrm:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            print("cmrm: stopped; run the same command again to continue", file=sys.stderr)
        raise
