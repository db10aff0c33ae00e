"""Commands run in this process, and the errors that they end with."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from cmrm.cli.main import app
from cmrm.errors import CmrmError


def run(*args: object) -> Result:
    """The outcome of a command line."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def output(*args: object) -> str:
    """What a command that succeeds prints."""
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def json_of(*args: object) -> Any:
    """The JSON document that a command prints on standard output."""
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def refused(*args: object) -> str:
    """The message of the error that a command ends with: one short line."""
    result = run(*args)
    assert isinstance(result.exception, CmrmError), (result.output, result.exception)
    message = str(result.exception)
    assert len(message) < 400
    assert "\n" not in message
    return message
