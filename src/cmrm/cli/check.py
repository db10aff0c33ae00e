"""`cmrm check`: the contract that capture and steering rest on, run on a checkpoint."""

from __future__ import annotations

from dataclasses import asdict

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

MARKS = {"pass": "pass", "fail": "FAIL", "skip": "skip"}


def check(
    model: c.ModelArgument,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Run the contract of capture and steering on MODEL. Exit code 1: a check failed."""
    vlm = c.open_model(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )

    from cmrm.checks.run import CHECKS, failed, run_checks

    with screen.progress(len(CHECKS)) as (say, tick):
        say("checking")
        findings = run_checks(vlm, on_check=lambda finding: tick(1))
    architecture, precision = type(vlm.model).__name__, str(vlm.model.dtype)
    if as_json:
        screen.print_json(
            {
                "model": vlm.model_id,
                "architecture": architecture,
                "dtype": precision,
                "checks": [asdict(finding) for finding in findings],
                "failed": len(failed(findings)),
            }
        )
    else:
        screen.print_rows(
            f"{vlm.model_id}: {architecture}, {precision.removeprefix('torch.')}",
            ["check", "outcome", "detail"],
            [[f.name, MARKS[f.outcome], f.detail] for f in findings],
        )
    if failed(findings):
        raise typer.Exit(1)
    if not as_json:
        screen.next_step(f"cmrm diagnose {model} --data requests.csv")
