"""`cmrm rescore`: stored replies judged again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli.runs import print_results


def rescore(
    out: Annotated[Path, typer.Argument(help="Folder of `cmrm evaluate`.")],
    judges: Annotated[
        str, typer.Option(help="Comma list of judges; their verdicts are added to the logs.")
    ] = "",
    rater: Annotated[
        str | None, typer.Option(help="chat:MODEL or openai:MODEL@URL that rates open answers.")
    ] = None,
    as_json: c.JsonOption = False,
) -> None:
    """Judge the replies of a finished run again, without generating anything."""
    c.need_inspect()
    c.quiet()
    from cmrm.evaluate.rescore import rescore_logs
    from cmrm.measure.schema import read_results

    read_results(out / "results.json")
    names = [name.strip() for name in judges.split(",") if name.strip()]
    message = rescore_logs(out, names, rater=rater).message()
    if message:
        typer.echo(message, err=True)
    print_results(refresh(out), as_json)


def refresh(out: Path) -> dict[str, Any]:
    """Write results and report again, from the present logs and labels, and return the results.

    Raises:
        InputError: there are no results or no logs, or they are damaged.
    """
    from cmrm.evaluate.results import refreshed
    from cmrm.files import write_json
    from cmrm.report.page import write_report
    from cmrm.reproduce.comparison import with_comparison

    results = with_comparison(refreshed(out))
    write_json(out / "results.json", results)
    write_report(results, out)
    return results
