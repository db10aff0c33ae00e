"""Entry point of the `cmrm` command. Heavy imports happen inside the commands, so that `--help` stays quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cmrm import __version__
from cmrm.cli.sets import families, sets
from cmrm.cli.check import check
from cmrm.cli.demo import app as demo_app
from cmrm.cli.diagnose import diagnose
from cmrm.cli.evaluate import defenses, evaluate, rescore
from cmrm.cli.extract import extract
from cmrm.cli.generate import generate
from cmrm.cli.inspect import inspect
from cmrm.cli.judges import app as judges_app
from cmrm.cli.reproduce import reproduce
from cmrm.errors import CmrmError

INTERRUPTED = 130

app = typer.Typer(
    help="Give a vision-language model back the safety alignment that it loses when it sees an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(demo_app, name="demo")
for command in (diagnose, extract, generate, evaluate, rescore, reproduce, inspect, check, sets, defenses, families):
    app.command()(command)
app.add_typer(judges_app, name="judges")


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
    """Run the command line: a `CmrmError` is printed as one line, exit code 2; Ctrl-C says what to do next, exit code 130."""
    try:
        app()
    except CmrmError as error:
        print(f"cmrm: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            print("cmrm: stopped; the same command goes on from what is finished", file=sys.stderr)
        raise
